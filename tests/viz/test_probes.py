"""The figure of linear probes shows the numbers of the table, and says where there are none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sinkscope.errors import InputError, SelectionError
from sinkscope.viz import plot_probes

NUMBERS = {"ordinary": 0.4, "mine": 0.8}


def line(layer, group, target, metric):
    there = group in NUMBERS
    value = NUMBERS[group] + layer / 100 if there else np.nan
    return {
        "layer": layer,
        "group": group,
        "target": target,
        "metric": metric,
        "accuracy": value,
        "low": value - 0.05,
        "high": value + 0.1,
        "null_high": 0.3 if there else np.nan,
        "majority": 0.25 if there else np.nan,
        "note": "" if there else "none found",
    }


@pytest.fixture(scope="module")
def table():
    kinds = (("count", "accuracy"), ("colours", "label accuracy"), ("colours", "exact set"))
    groups = ("V-sinks", "ordinary", "mine")
    return pd.DataFrame([line(la, g, *k) for la in (0, 2, 5) for g in groups for k in kinds])


def drawn(ax):
    """Group's colour -> the accuracies and the ends of the bars."""
    out = {}
    for bars in ax.containers:
        points, _, (ends,) = bars.lines
        spans = [tuple(segment[:, 1]) for segment in ends.get_segments()]
        out[points.get_color()] = (points.get_ydata().tolist(), spans)
    return out


def test_points_and_bars_are_those_of_the_table(table) -> None:
    figure = plot_probes(table)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["count", "colours (label accuracy)"]
    for ax in figure.axes:
        found = drawn(ax)
        assert len(found) == 2
        assert ax.get_ylabel() == "accuracy"
        for values, spans in found.values():
            assert values == pytest.approx([values[0] + la / 100 for la in (0, 2, 5)])
            want = [(v - 0.05, v + 0.1) for v in values]
            assert np.allclose(spans, want)
        assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "2", "5"]
        (null,) = ax.collections[:1]
        assert null.get_paths()[0].get_extents().y1 == pytest.approx(0.3)


def test_groups_without_tokens_are_named(table) -> None:
    (legend,) = plot_probes(table).legends
    assert [t.get_text() for t in legend.get_texts()] == [
        "V-sinks: none found",
        "ordinary",
        "mine",
        "shuffled labels (95 %, highest of the groups)",
        "most frequent class",
    ]


def test_what_to_show_can_be_chosen(table) -> None:
    figure = plot_probes(table, metric="exact set", groups=["mine"])
    assert figure.axes[1].get_title(loc="left") == "colours (exact set)"
    assert [len(drawn(ax)) for ax in figure.axes] == [1, 1]
    bare = plot_probes(table.assign(null_high=np.nan), groups=["mine"])
    assert "shuffled labels (95 %, highest of the groups)" not in [
        t.get_text() for t in bare.legends[0].get_texts()
    ]


def test_a_table_without_any_probe_says_so(table) -> None:
    figure = plot_probes(table, groups=["V-sinks"])
    for ax in figure.axes:
        assert [t.get_text() for t in ax.texts] == ["none found"]
        assert not drawn(ax)


def test_wrong_use_is_refused(table) -> None:
    with pytest.raises(InputError, match=r"lacks \['note'\]"):
        plot_probes(table.drop(columns="note"))
    with pytest.raises(InputError, match="lacks lines"):
        plot_probes(table[:0])
    with pytest.raises(SelectionError, match="metric='f1'; expected one of"):
        plot_probes(table, metric="f1")
    with pytest.raises(SelectionError, match="expected some of"):
        plot_probes(table, groups=["yours"])
    with pytest.raises(SelectionError, match="expected some of"):
        plot_probes(table, groups=[])

"""Figures by layer and of the whole trace: lines equal the measurements, nulls and limits are drawn."""

from __future__ import annotations

import dataclasses

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import sinkscope as ss
from sinkscope.detectors.detection import SATURATION
from sinkscope.errors import SelectionError
from sinkscope.viz import (
    plot_detections,
    plot_mass_by_layer,
    plot_received_by_layer,
    plot_spikes,
    plot_trace,
)
from tests.viz.conftest import texts


def lines(figure):
    """Label -> y values of every labelled line."""
    own = figure.axes[0].lines
    return {li.get_label(): list(li.get_ydata()) for li in own if li.get_label()[0] != "_"}


def dashed(figure):
    """Colour -> y values of the lines of nulls."""
    own = [li for li in figure.axes[0].lines if li.get_label()[0] == "_"]
    return {li.get_color(): list(li.get_ydata()) for li in own if li.get_linestyle() == "--"}


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_received_is_the_mean_over_tokens_of_a_kind(traces, heads) -> None:
    trace = traces["two rows"]
    figure = plot_received_by_layer(trace, 1, heads=heads)
    colours = {li.get_label(): li.get_color() for li in figure.axes[0].lines}
    for group in ("V-sinks", "L-sinks", "ordinary"):
        got, null = lines(figure)[group], dashed(figure)[colours[group]]
        for layer in (0, 4):
            places = trace.groups[group][1, layer].nonzero().flatten().tolist()
            if not places:
                assert got[layer] != got[layer], "a layer without such tokens leaves a gap"
                continue
            by_head = trace.received[1, layer][:, places]
            joined = by_head.mean(dim=0) if heads == "mean" else by_head.amax(dim=0)
            assert got[layer] == pytest.approx(float(joined.mean()), rel=1e-5)
            uniform = float(trace.null[1, layer, places].mean())
            assert null[layer] == pytest.approx(uniform, rel=1e-5)
    assert figure.axes[0].get_yscale() == "log"
    assert "0 to 1" in figure.axes[0].get_ylabel()


def test_received_says_which_kinds_are_missing(traces) -> None:
    figure = plot_received_by_layer(traces["none"])
    missing = [label for label in lines(figure) if label.endswith(": none found")]
    assert missing == [f"{kind}: none found" for kind in ("V-sinks", "L-sinks", "text sinks")]
    assert len(dashed(figure)) == 2, "only ordinary tokens and text have a null to show"


def test_masses_are_those_of_the_result(traces) -> None:
    result = traces.masses["two rows"]
    shown = lines(plot_mass_by_layer(result, 1))
    for i, group in enumerate(result.groups):
        want = result.mass[1, ..., i].nanmean(dim=(1, 2)).tolist()
        assert shown[group] == pytest.approx(want, abs=1e-6)
    total = [sum(shown[group][layer] for group in result.groups) for layer in range(6)]
    assert total == pytest.approx([1.0] * 6, abs=1e-5)
    both = lines(plot_mass_by_layer(result))["V-sinks"]
    each = [lines(plot_mass_by_layer(result, row))["V-sinks"] for row in (0, 1)]
    assert min(*each)[0] <= both[0] <= max(*each)[0]


def test_masses_of_own_groups_without_a_null(traces) -> None:
    trace = traces["one"]
    nobody = torch.zeros_like(trace.v_sinks)
    probe = ss.AttentionMass({"image": "image", "nobody": nobody}, null=False)
    figure = plot_mass_by_layer(traces.lvlm.run(trace.sample, [probe])[probe])
    assert list(lines(figure)) == ["image", "nobody: none found"]
    assert not dashed(figure)


def test_spikes_of_both_towers(traces) -> None:
    trace = traces["two images"]
    figure = plot_spikes(trace)
    shown, ax = lines(figure), figure.axes[0]
    for image in (0, 1):
        assert shown[f"ViT, block output, image {image}"] == trace.vit_spikes[image].tolist()
    assert shown["LLM, layer input"] == trace.llm_spikes[0].tolist()
    assert (ax.get_yscale(), ax.get_ylabel()) == ("log", "max |h| / median |h| (log scale)")
    assert texts(ax.get_xticklabels()) == ["0", "1", "2", "3", "4", "0", "1", "2", "3", "4", "5"]


def sized(evidence, medians):
    """The same evidence with every largest ``|h|`` of so many medians."""
    massive = evidence.massive
    values = massive.median[..., None, None].expand_as(massive.values) * medians
    return dataclasses.replace(evidence, massive=dataclasses.replace(massive, values=values))


@pytest.mark.parametrize(("largest", "drawn"), [(20.0, False), (900.0, True), (1e6, True)])
def test_the_massive_line_is_drawn_where_it_falls_into_the_picture(traces, largest, drawn) -> None:
    trace = traces["one"]
    towers = {"vision": sized(trace.vision, 10.0), "language": sized(trace.language, largest)}
    figure = plot_spikes(dataclasses.replace(trace, **towers))
    assert ("1000 medians" in lines(figure)) is drawn


def test_flagged_fractions_and_the_saturation_line(traces) -> None:
    trace = traces["saturated"]
    figure = plot_detections(trace)
    shown = lines(figure)
    assert shown["V rule, ViT"] == trace.v_detection.fraction[0].tolist()
    assert shown["L rule, LLM"] == trace.l_detection.fraction[0].tolist()
    assert shown["saturated above 20 %"] == [SATURATION] * 2 == [0.2, 0.2]
    assert max(shown["V rule, ViT"]) > 0.2
    assert "(%)" in figure.axes[0].get_ylabel()
    for name in ("none", "one"):
        said = "nothing is flagged" in texts(plot_detections(traces[name]).axes[0].texts)
        assert said is (name == "none")


def test_wrong_use_is_refused(traces) -> None:
    for plot in (plot_received_by_layer, plot_spikes, plot_detections, plot_trace):
        with pytest.raises(SelectionError, match="Got row 2; expected 0 to 1"):
            plot(traces["two rows"], 2)
    for row in (2, -1):
        with pytest.raises(SelectionError, match=f"Got row {row}; expected 0 to 1, or None"):
            plot_mass_by_layer(traces.masses["two rows"], row)
    with pytest.raises(SelectionError, match="Got heads='all'; expected one of"):
        plot_received_by_layer(traces["one"], heads="all")


MAP = "Attention received, largest over layers"
PER_TOKEN = "Attention per token, mean of heads"
MASS = "Attention mass, mean of heads and queries"
BELOW = ["Spike size", "What the rules flag"]
HEAD = "Sink trace: 2 V-sinks, 2 L-sinks, 1 text sink"


@pytest.mark.parametrize(
    ("name", "images", "panels", "head"),
    [
        ("one", 1, [MAP, PER_TOKEN, *BELOW], HEAD),
        ("none", 1, [MAP, PER_TOKEN, *BELOW], "Sink trace: no V-sinks, no L-sinks, no text sinks"),
        ("two images", 2, [PER_TOKEN, *BELOW], "Sink trace: 4 V-sinks, 4 L-sinks, 1 text sink"),
        ("two rows", 1, [MAP, PER_TOKEN, MASS, *BELOW], HEAD.replace("trace", "trace of row 1")),
        ("saturated", 1, [MAP, PER_TOKEN, *BELOW], "Sink trace: 64 V-sinks, no L-sinks, 10 text sinks"),
    ],
)  # fmt: skip
def test_the_whole_trace_has_its_panels_and_nothing_is_cut_off(
    traces, name, images, panels, head, monkeypatch
) -> None:
    monkeypatch.setattr(plt, "show", lambda *a, **k: pytest.fail("plt.show was called"))
    before, trace = dict(matplotlib.rcParams), traces[name]
    figure = plot_trace(trace, len(trace.sample) - 1, mass=traces.masses.get(name))
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]
    assert titles == [*(f"Sinks, image {i} (any layer)" for i in range(images)), *panels]
    assert figure.get_suptitle().strip() == head
    figure.draw_without_rendering()
    for legend in [ax.get_legend() for ax in figure.axes if ax.get_legend() is not None]:
        box = legend.get_window_extent()
        assert min(box.x0, box.y0) >= 0, texts(legend.get_texts())
        assert box.x1 <= figure.bbox.x1, texts(legend.get_texts())
    warned = figure.get_supxlabel()
    assert warned.startswith("Warning: Norm(tau=1.0" if trace.warnings else "")
    assert warned.endswith("(+1 more)" if trace.warnings else "")
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == [], "a figure was left with pyplot, which nobody will close"


def test_a_notebook_can_show_it(traces) -> None:
    """Also where pyplot was never used, which is what tells notebooks about figures."""
    assert traces["one"].plot()._repr_png_().startswith(b"\x89PNG")

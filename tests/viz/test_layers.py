"""Figures by layer: lines equal the measurements, and nulls and limits are drawn."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import SelectionError
from sinkscope.viz import plot_detections, plot_mass_by_layer, plot_received_by_layer, plot_spikes


def lines(figure):
    """Label -> y values of every labelled line."""
    return {
        line.get_label(): list(line.get_ydata())
        for line in figure.axes[0].lines
        if not line.get_label().startswith("_")
    }


def dashed(figure):
    """Colour -> y values of the lines of nulls."""
    return {
        line.get_color(): list(line.get_ydata())
        for line in figure.axes[0].lines
        if line.get_linestyle() == "--" and line.get_label().startswith("_")
    }


def colour(figure, label):
    return next(li.get_color() for li in figure.axes[0].lines if li.get_label() == label)


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_received_is_the_mean_over_tokens_of_a_kind(traces, heads) -> None:
    trace = traces["two rows"]
    figure = plot_received_by_layer(trace, 1, heads=heads)
    for group in ("V-sinks", "L-sinks", "ordinary"):
        got, null = lines(figure)[group], dashed(figure)[colour(figure, group)]
        for layer in (0, 4):
            places = trace.groups[group][1, layer].nonzero().flatten().tolist()
            by_head = [trace.received[1, layer, :, p] for p in places]
            joined = [float(h.mean() if heads == "mean" else h.max()) for h in by_head]
            if not places:
                assert got[layer] != got[layer], "a layer without such tokens leaves a gap"
                continue
            assert got[layer] == pytest.approx(sum(joined) / len(joined), rel=1e-5)
            uniform = [float(trace.null[1, layer, p]) for p in places]
            assert null[layer] == pytest.approx(sum(uniform) / len(uniform), rel=1e-5)
    assert figure.axes[0].get_yscale() == "log"
    assert "0 to 1" in figure.axes[0].get_ylabel()


def test_received_says_which_kinds_are_missing(traces) -> None:
    figure = plot_received_by_layer(traces["none"])
    missing = [label for label in lines(figure) if label.endswith(": none found")]
    assert missing == [f"{kind}: none found" for kind in ("V-sinks", "L-sinks", "text sinks")]
    assert len(dashed(figure)) == 2, "only ordinary tokens and text have a null to show"


def test_masses_are_those_of_the_result(traces) -> None:
    result = traces.masses["two rows"]
    figure = plot_mass_by_layer(result, 1)
    shown = lines(figure)
    for i, group in enumerate(result.groups):
        live = ~result.mass[1, 0, 0, :, i].isnan()
        for layer in (0, 5):
            values = result.mass[1, layer, :, live, i]
            assert shown[group][layer] == pytest.approx(float(values.mean()), abs=1e-6)
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


@pytest.mark.parametrize("row", [2, -1])
def test_masses_of_a_row_that_is_not_there(traces, row) -> None:
    with pytest.raises(SelectionError, match=f"Got row {row}; expected 0 to 1, or None"):
        plot_mass_by_layer(traces.masses["two rows"], row)


def test_spikes_of_both_towers(traces) -> None:
    trace = traces["two images"]
    figure = plot_spikes(trace)
    shown = lines(figure)
    for image in (0, 1):
        assert shown[f"ViT, block output, image {image}"] == trace.vit_spikes[image].tolist()
    assert shown["LLM, layer input"] == trace.llm_spikes[0].tolist()
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_ylabel() == "max |h| / median |h| (log scale)"
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks == ["0", "1", "2", "3", "4", "0", "1", "2", "3", "4", "5"]


def sized(evidence, medians):
    """The same evidence with every largest ``|h|`` of so many medians."""
    massive = evidence.massive
    values = massive.median[..., None, None].expand_as(massive.values) * medians
    return dataclasses.replace(evidence, massive=dataclasses.replace(massive, values=values))


@pytest.mark.parametrize(("largest", "drawn"), [(20.0, False), (900.0, True), (1e6, True)])
def test_the_massive_line_is_drawn_where_it_falls_into_the_picture(traces, largest, drawn) -> None:
    trace = traces["one"]
    small = dataclasses.replace(
        trace, vision=sized(trace.vision, 10.0), language=sized(trace.language, largest)
    )
    assert ("1000 medians" in lines(plot_spikes(small))) is drawn


def test_flagged_fractions_and_the_saturation_line(traces) -> None:
    trace = traces["saturated"]
    figure = plot_detections(trace)
    shown = lines(figure)
    assert shown["V rule, ViT"] == trace.v_detection.fraction[0].tolist()
    assert shown["L rule, LLM"] == trace.l_detection.fraction[0].tolist()
    assert shown["saturated above 20 %"] == [0.2, 0.2]
    assert max(shown["V rule, ViT"]) > 0.2
    assert "(%)" in figure.axes[0].get_ylabel()


@pytest.mark.parametrize(("name", "said"), [("none", True), ("one", False)])
def test_detections_say_that_nothing_is_flagged(traces, name, said) -> None:
    texts = [text.get_text() for text in plot_detections(traces[name]).axes[0].texts]
    assert ("nothing is flagged" in texts) is said


@pytest.mark.parametrize("plot", [plot_received_by_layer, plot_spikes, plot_detections])
def test_rows_that_are_not_there(traces, plot) -> None:
    with pytest.raises(SelectionError, match="Got row 2; expected 0 to 1"):
        plot(traces["two rows"], 2)


def test_unknown_heads(traces) -> None:
    with pytest.raises(SelectionError, match="Got heads='all'; expected one of"):
        plot_received_by_layer(traces["one"], heads="all")

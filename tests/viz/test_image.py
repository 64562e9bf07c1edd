"""Sinks and attention on the picture: every marker where its sink is, and words where there is none."""

from __future__ import annotations

import matplotlib.colors
import pytest
import torch

import sinkscope as ss
from sinkscope.errors import LayerError, SelectionError
from sinkscope.testing import random_image
from sinkscope.viz import plot_received_map, plot_sinks_on_image
from sinkscope.viz.style import STYLES
from tests.keeping_cls import keeping_cls
from tests.viz.conftest import PLANTED, cells


def marked(figure, label):
    """The (row, column) of every marker of a label, 8 pixels a patch."""
    ax = figure.axes[0]
    (found,) = [c for c in ax.collections if c.get_label() == label]
    return {(int(y // 8), int(x // 8)) for x, y in found.get_offsets()}


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_every_sink_is_marked_at_its_patch(traces) -> None:
    figure = plot_sinks_on_image(traces["one"])
    assert marked(figure, "V-sinks") == cells(PLANTED["V"])
    assert marked(figure, "L-sinks") == cells(PLANTED["L"])
    assert marked(figure, "V-sinks, L rule too") == cells({46})
    assert legend(figure) == [
        "V-sinks (2)",
        "L-sinks (2)",
        "V-sinks, L rule too (1)",
        "text sinks (1)",
    ]
    assert figure.axes[0].get_xlabel() == "▲ <s> at 0"
    assert figure.axes[0].images, "the picture itself is missing"


def test_a_layer_shows_what_is_a_sink_there(traces) -> None:
    """Block 1 writes the LLM spike, so layer 1 reads none of it yet."""
    early = plot_sinks_on_image(traces["one"], layer=1)
    assert marked(early, "V-sinks") == cells(PLANTED["V"])
    assert legend(early) == ["V-sinks (2)", "L-sinks: none found", "text sinks: none found"]
    assert early.axes[0].get_xlabel() == ""
    late = plot_sinks_on_image(traces["one"], layer=2)
    assert marked(late, "L-sinks") == cells(PLANTED["L"])


def test_none_found_is_said(traces) -> None:
    figure = plot_sinks_on_image(traces["none"])
    assert legend(figure) == [
        f"{kind}: none found" for kind in ("V-sinks", "L-sinks", "text sinks")
    ]
    assert marked(figure, "V-sinks") == set()


def test_the_second_of_two_images_has_its_own_sinks(traces) -> None:
    """It is 96 x 64 pixels, and the processor looks at the 64 in the middle."""
    figure = plot_sinks_on_image(traces["two images"], image=1)
    assert marked(figure, "V-sinks") == {(r, c + 2) for r, c in cells(PLANTED["V"])}
    assert "image 1" in figure.axes[0].get_title(loc="left")


def test_the_second_row_has_its_own_words(traces) -> None:
    trace = traces["two rows"]
    (bos,) = [r.pos for r in trace.records if r.kind == "text" and r.batch == 1]
    assert bos > 0, "the shorter row should be padded on the left"
    assert plot_sinks_on_image(trace, 1).axes[0].get_xlabel() == f"▲ <s> at {bos}"


def test_without_a_picture_the_grid_stands_alone(traces) -> None:
    figure = plot_sinks_on_image(traces["no picture"])
    ax = figure.axes[0]
    assert not ax.images
    assert ax.get_ylabel() == "no picture: input pixels"
    assert marked(figure, "V-sinks") == cells(PLANTED["V"])
    assert ax.get_ylim() == (64, 0)
    assert len(ax.collections[0].get_segments()) == 9 + 9


def test_kinds_differ_in_colour_and_in_shape() -> None:
    styles = [STYLES[group] for group in ("V-sinks", "L-sinks", "text sinks", "ordinary", "text")]
    assert len({style.marker for style in styles}) == len(styles)
    colours = [matplotlib.colors.to_rgb(style.colour) for style in styles]
    assert len(set(colours)) == len(styles)


def test_markers_fit_a_fine_grid(traces) -> None:
    """24 patches a side leave less room than 8."""
    from sinkscope.viz.style import draw_picture, new_axes

    trace = traces["one"]
    coarse = draw_picture(new_axes(None, (4, 4)), trace, 0, 0)
    fine = draw_picture(new_axes(None, (4, 4)), with_columns(trace, 24), 0, 0)
    assert fine < coarse / 2


def with_columns(trace, n):
    """The same trace, said to have ``n`` columns."""
    from dataclasses import replace

    column = trace.sample.tokens.column.clone()
    column[0, 30] = n - 1
    tokens = replace(trace.sample.tokens, column=column)
    return replace(trace, sample=replace(trace.sample, tokens=tokens))


@pytest.mark.parametrize("layer", [None, 3])
@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("unit", ["null", "share"])
def test_the_map_shows_what_was_received(traces, layer, heads, unit) -> None:
    trace = traces["one"]
    figure = plot_received_map(trace, layer=layer, heads=heads, unit=unit)
    shown = torch.as_tensor(figure.axes[0].images[-1].get_array().filled(float("nan")))
    start = int((trace.sample.tokens.image[0] >= 0).int().argmax())
    for patch in (0, 9, 46, 63):
        values = []
        for at in range(trace.n_layers) if layer is None else [layer]:
            got = trace.language.received
            by_head = (got.others if unit == "null" else got.received)[0, at, :, start + patch]
            value = by_head.mean() if heads == "mean" else by_head.max()
            values.append(
                value / got.others_null[0, at, start + patch] if unit == "null" else value
            )
        assert float(shown[divmod(patch, 8)]) == pytest.approx(float(max(values)), rel=1e-5)


def test_near_uniform_attention_looks_uniform(traces) -> None:
    """A colour scale that fits the data would turn a few per cent into a picture."""
    norm = plot_received_map(traces["none"]).axes[0].images[-1].norm
    assert (norm.vmin, norm.vmax) == (0.5, 4.0)


def test_draws_into_given_axes(traces) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    ax = figure.subplots()
    for plot in (plot_sinks_on_image, plot_received_map):
        assert plot(traces["one"], ax=ax) is figure


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"row": 1}, SelectionError, "Got row 1; expected 0 to 0"),
        ({"row": -1}, SelectionError, "Got row -1"),
        ({"image": -1}, SelectionError, "Got image -1 of row 0; expected 0 to 0"),
        ({"image": 1}, SelectionError, "Got image 1 of row 0; expected 0 to 0"),
        ({"layer": 6}, LayerError, "Got layer 6; expected 0 to 5"),
        ({"layer": -1}, LayerError, "Got layer -1"),
    ],
)
@pytest.mark.parametrize("plot", [plot_sinks_on_image, plot_received_map])
def test_bad_places_are_refused(traces, plot, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        plot(traces["one"], **arguments)


@pytest.mark.parametrize(("name", "value"), [("heads", "median"), ("unit", "percent")])
def test_unknown_words_are_refused(traces, name, value) -> None:
    with pytest.raises(SelectionError, match=f"Got {name}='{value}'; expected one of"):
        plot_received_map(traces["one"], **{name: value})


def test_a_cls_that_is_kept_is_no_patch() -> None:
    """Its value stood in the last patch's place, and the picture's corners were NaN."""
    lvlm = keeping_cls()
    sample = lvlm.prepare(random_image(32, 32), "what")
    rule, nothing = ss.detectors.VisionTokens("cls"), ss.detectors.NoSinks()
    trace = ss.trace_sinks(lvlm, sample, rule, nothing)
    figure = plot_received_map(trace, layer=0, unit="share")
    picture = figure.axes[0].images[1]
    image = (sample.tokens.image[0] >= 0).nonzero().flatten()
    shown = trace.received[0, 0].mean(dim=0)[image[1:]]
    assert torch.allclose(torch.tensor(picture.get_array()).flatten(), shown)
    assert picture.get_extent() == [0, 32, 32, 0]
    assert trace.plot().axes


def test_decoys_are_crosses_that_can_be_seen(traces) -> None:
    """One of each kind, at its patch, with an outline for dark pictures."""
    trace = traces["one"]
    decoys = {"spike decoys": 12, "attention decoys": 50}
    tokens = trace.sample.tokens
    patch = tokens.row * 8 + tokens.column
    masks = {name: (patch == at) & (tokens.row >= 0) for name, at in decoys.items()}
    ax = plot_sinks_on_image(trace, decoys=masks).axes[0]
    drawn = {c.get_label(): c for c in ax.collections if c.get_label() in decoys}
    for name, at in decoys.items():
        row, column = divmod(at, 8)
        box = tokens.box[0][masks[name][0]][0]
        (x, y), *others = drawn[name].get_offsets().tolist()
        assert not others
        assert (x, y) == (float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2)
        assert (int(box[1]), int(box[0])) == (8 * row, 8 * column)
        assert drawn[name].get_path_effects()
    shown = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"spike decoys (1)", "attention decoys (1)"} <= set(shown)

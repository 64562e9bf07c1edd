"""Sinks and attention on the picture: every marker where its sink is, and words where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure

import sinkscope as ss
from sinkscope.errors import LayerError, SelectionError
from sinkscope.testing import random_image
from sinkscope.viz import plot_received_map, plot_sinks_on_image
from sinkscope.viz.image import draw_picture
from sinkscope.viz.theme import STYLES, new_axes
from tests.keeping_cls import keeping_cls
from tests.viz.conftest import PLANTED, cells, texts


def marked(figure, label):
    """The (row, column) of every marker of a label, 8 pixels a patch."""
    (found,) = [c for c in figure.axes[0].collections if c.get_label() == label]
    return {(int(y // 8), int(x // 8)) for x, y in found.get_offsets()}


def legend(figure):
    return texts(figure.axes[0].get_legend().get_texts())


def test_every_sink_is_marked_at_its_patch(traces) -> None:
    figure = plot_sinks_on_image(traces["one"])
    assert marked(figure, "V-sinks") == cells(PLANTED["V"])
    assert marked(figure, "L-sinks") == cells(PLANTED["L"])
    assert marked(figure, "V-sinks, L rule too") == cells({46})
    both = "V-sinks, L rule too (1)"
    assert legend(figure) == ["V-sinks (2)", "L-sinks (2)", both, "text sinks (1)"]
    assert figure.axes[0].get_xlabel() == "▲ <s> at 0"
    assert figure.axes[0].images, "the picture itself is missing"
    assert len({style.marker for style in STYLES.values()}) == len(STYLES)
    assert len({style.colour for style in STYLES.values()}) == len(STYLES)


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
    kinds = ("V-sinks", "L-sinks", "text sinks")
    assert legend(figure) == [f"{kind}: none found" for kind in kinds]
    assert marked(figure, "V-sinks") == set()


def test_other_images_and_rows_have_their_own_sinks(traces) -> None:
    """The second image is 96 x 64 pixels, and the processor looks at the 64 in the middle."""
    figure = plot_sinks_on_image(traces["two images"], image=1)
    assert marked(figure, "V-sinks") == {(r, c + 2) for r, c in cells(PLANTED["V"])}
    assert "image 1" in figure.axes[0].get_title(loc="left")
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


def test_markers_fit_a_fine_grid(traces) -> None:
    """24 patches a side leave less room than 8."""
    trace = traces["one"]
    column = trace.sample.tokens.column.clone()
    column[0, 30] = 23
    sample = replace(trace.sample, tokens=replace(trace.sample.tokens, column=column))
    made = (trace, replace(trace, sample=sample))
    coarse, fine = (draw_picture(new_axes(None, (4, 4)), one, 0, 0) for one in made)
    assert fine < coarse / 2


@pytest.mark.parametrize(
    ("layer", "heads", "unit"), [(None, "mean", "null"), (None, "max", "share"), (3, "max", "null"), (3, "mean", "share")]
)  # fmt: skip
def test_the_map_shows_what_was_received(traces, layer, heads, unit) -> None:
    trace = traces["one"]
    figure = plot_received_map(trace, layer=layer, heads=heads, unit=unit)
    shown = torch.as_tensor(figure.axes[0].images[-1].get_array().filled(float("nan")))
    start = int((trace.sample.tokens.image[0] >= 0).int().argmax())
    got = trace.language.received
    for patch in (0, 9, 46, 63):
        by_head = (got.others if unit == "null" else got.received)[0, :, :, start + patch]
        values = by_head.mean(dim=1) if heads == "mean" else by_head.amax(dim=1)
        values = values / got.others_null[0, :, start + patch] if unit == "null" else values
        want = float(values.max() if layer is None else values[layer])
        assert float(shown[divmod(patch, 8)]) == pytest.approx(want, rel=1e-5)


def test_near_uniform_attention_looks_uniform(traces) -> None:
    """A colour scale that fits the data would turn a few per cent into a picture."""
    norm = plot_received_map(traces["none"]).axes[0].images[-1].norm
    assert (norm.vmin, norm.vmax) == (0.5, 4.0)


def test_draws_into_given_axes(traces) -> None:
    figure = Figure()
    ax = figure.subplots()
    for plot in (plot_sinks_on_image, plot_received_map):
        assert plot(traces["one"], ax=ax) is figure


@pytest.mark.parametrize("plot", [plot_sinks_on_image, plot_received_map])
def test_bad_places_are_refused(traces, plot) -> None:
    for given, error, message in (
        ({"row": 1}, SelectionError, "Got row 1; expected 0 to 0"),
        ({"row": -1}, SelectionError, "Got row -1"),
        ({"row": 0.0}, SelectionError, "Got row 0.0"),
        ({"image": -1}, SelectionError, "Got image -1; expected 0 to 0, counted within row 0"),
        ({"image": 1}, SelectionError, "Got image 1; expected 0 to 0"),
        ({"layer": 6}, LayerError, "Got layer 6; expected 0 to 5"),
        ({"layer": -1}, LayerError, "Got layer -1"),
    ):
        with pytest.raises(error, match=message):
            plot(traces["one"], **given)


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
    picture = plot_received_map(trace, layer=0, unit="share").axes[0].images[1]
    image = (sample.tokens.image[0] >= 0).nonzero().flatten()
    shown = trace.received[0, 0].mean(dim=0)[image[1:]]
    assert torch.allclose(torch.tensor(picture.get_array()).flatten(), shown)
    assert picture.get_extent() == [0, 32, 32, 0]
    assert trace.plot().axes


def test_decoys_are_crosses_that_can_be_seen(traces) -> None:
    """One of each kind, at its patch, with an outline for dark pictures."""
    decoys = {"spike decoys": 12, "attention decoys": 50}
    tokens = traces["one"].sample.tokens
    patch = tokens.row * 8 + tokens.column
    masks = {name: (patch == at) & (tokens.row >= 0) for name, at in decoys.items()}
    figure = plot_sinks_on_image(traces["one"], decoys=masks)
    for name, at in decoys.items():
        (drawn,) = [c for c in figure.axes[0].collections if c.get_label() == name]
        assert drawn.get_offsets().tolist() == [[8 * (at % 8) + 4, 8 * (at // 8) + 4]]
        assert drawn.get_path_effects()
    assert {"spike decoys (1)", "attention decoys (1)"} <= set(legend(figure))

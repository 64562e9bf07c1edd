"""The strip of a prompt: what its chips say, receive and hold, as a figure and as HTML."""

from __future__ import annotations

import dataclasses
import itertools
import warnings

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

import sinkscope as ss
from sinkscope.errors import LayerError, SelectionError
from sinkscope.tokens import VISION_KINDS
from sinkscope.viz import plot_received_map, plot_tokens, tokens_html
from sinkscope.viz.pages import most_attended, pictures_of
from sinkscope.viz.theme import (
    GROUP_OF,
    MISSING,
    STYLES,
    colour_of,
    columns_of,
    cut,
    drawable,
    ink_on,
    share_scale,
)
from sinkscope.viz.tokens import SEEN, chips_of
from tests.viz.conftest import Page, texts


def test_text_tokens_have_a_chip_each_and_images_one(traces) -> None:
    trace = traces["two images"]
    chips, tokens = chips_of(trace), trace.sample.tokens
    covered = [pos for chip in chips for pos in range(chip.first, chip.last + 1)]
    assert covered == tokens.live[0].nonzero().flatten().tolist()
    images = [chip for chip in chips if chip.text.startswith("image")]
    for number, chip in enumerate(images):
        assert chip.text.split(",")[0] == f"image {number}: 64 tokens"
        assert tokens.image[0, chip.first : chip.last + 1].unique().tolist() == [number]
    words = [chip.text for chip in chips if not chip.text.startswith("image")]
    assert words[0] == "<s>"
    assert "Compare" in "".join(words)


@pytest.mark.parametrize("layer", [None, 3])
def test_a_chip_says_the_largest_share_and_where(traces, layer) -> None:
    trace = traces["two rows"]
    layers = range(trace.n_layers) if layer is None else [layer]
    for chip in chips_of(trace, 1, layer):
        own = trace.received[1, list(layers), :, chip.first : chip.last + 1].nan_to_num()
        pos, at, head = chip.at
        assert float(trace.received[1, at, head, pos]) == pytest.approx(float(own.max()))
        assert chip.null == pytest.approx(float(trace.null[1, at, pos]))
        assert chip.first <= pos <= chip.last
        assert at in layers
        if chip.share is not None:
            assert chip.share == pytest.approx(float(own.max()))
        if chip.text.startswith("image"):
            assert float(chip.text.split("max ")[1]) == pytest.approx(float(own.max()), rel=0.05)


def test_tokens_that_few_queries_see_have_no_share(traces) -> None:
    chips = chips_of(traces["one"])
    without = [chip for chip in chips if chip.share is None]
    assert [chip.first for chip in without] == [c.first for c in chips][-(SEEN - 1) :]
    assert SEEN == 8


def test_sinks_are_counted_where_they_are(traces) -> None:
    trace = traces["one"]
    chips = chips_of(trace)
    (image,) = [chip for chip in chips if chip.text.startswith("image")]
    assert image.sinks == {"V": 2, "L": 2}
    assert image.marked == f"● 2 ■ 2 {image.text}"
    assert (chips[0].sinks, chips[0].marked) == ({"text": 1}, "▲ <s>")
    early = chips_of(trace, layer=0)  # L-sinks and BOS are born in block 1
    assert [chip.sinks for chip in early if chip.sinks] == [{"V": 2}]


def test_cls_and_registers_that_are_kept_stand_apart(traces) -> None:
    """As in the layouts whose projector reads them."""
    trace = traces["one"]
    tokens = trace.sample.tokens
    kind = tokens.vision.kind.clone()
    first = tokens.sources[0, tokens.image[0] == 0, 0][:2].tolist()
    kind[0, first] = torch.tensor([VISION_KINDS.index(name) for name in ("cls", "register")])
    changed = dataclasses.replace(tokens, vision=dataclasses.replace(tokens.vision, kind=kind))
    sample = dataclasses.replace(trace.sample, tokens=changed)
    shown = [c.text for c in chips_of(dataclasses.replace(trace, sample=sample))]
    at = shown.index("image 0 CLS")
    assert shown[at + 1] == "image 0 register"
    assert shown[at + 2].startswith("image 0: 62 tokens")


def test_the_scale_of_colours_and_widths() -> None:
    assert float(share_scale()(0.25)) == 0.5
    assert [ink_on(share) for share in (0.0, 0.2, 0.5, 1.0)] == ["#1c2127"] * 2 + ["#ffffff"] * 2
    assert len({colour_of(share) for share in (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)}) == 6
    assert colour_of(1.2) == colour_of(1.0)
    assert (columns_of("ab"), columns_of("图a"), columns_of("e\u0301")) == (2, 3, 1)
    assert (cut("abcdef", 4), cut("图图图", 5), cut("abc", 3)) == ("abc…", "图图…", "abc")


def boxes(figure):
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


def written(figure):
    """The texts of the chips, in order, without the positions beside the lines."""
    return [text for text in figure.axes[0].texts if text.get_ha() == "left"]


def test_the_figure_shows_every_chip(traces) -> None:
    trace = traces["two rows"]
    figure, chips = plot_tokens(trace, 1), chips_of(trace, 1)
    assert texts(written(figure)) == [chip.marked for chip in chips]
    for box, chip in zip(boxes(figure), chips, strict=True):
        want = "#ffffff" if chip.share is None else colour_of(chip.share)
        assert to_hex(box.get_facecolor()) == want
        if chip.sinks:
            group = GROUP_OF[next(iter(chip.sinks))]
            assert to_hex(box.get_edgecolor()) == STYLES[group].colour.lower()
            assert box.get_linewidth() > 2
        else:
            assert (box.get_linestyle() != "-") is (chip.share is None)
    said = " ".join(texts(figure.texts))
    for part in (
        *("largest over heads and layers (row 1)", "● V-sinks (2)", "■ L-sinks (2)"),
        *("▲ text sinks (1)", "under uniform attention (null)", "fewer than 8 queries"),
    ):
        assert part in said
    assert "largest over the heads of layer 2" in plot_tokens(trace, layer=2).texts[0].get_text()


def test_kinds_without_sinks_say_so(traces) -> None:
    said = " ".join(texts(plot_tokens(traces["none"]).texts))
    for kind in ("V-sinks", "L-sinks", "text sinks"):
        assert f"{kind}: none found" in said
        assert f"{kind}: none found" in tokens_html(traces["none"])


@pytest.fixture(scope="module")
def long(traces):
    """About 300 tokens: much text, Chinese, an accent, an emoji, and what HTML and TeX would read."""
    text = "How many red shapes are there? " * 25
    text += "图中有几个红色的形状? <b>$x$</b> & café 🙂 " + "x" * 60
    images = [traces["one"].sample.images[0][0]]
    sample = traces.lvlm.prepare(images=images, text=[text])
    nothing = ss.detectors.NoSinks()
    return ss.trace_sinks(traces.lvlm, sample, nothing, nothing)


def test_a_long_prompt_is_wrapped_and_nothing_overlaps(long) -> None:
    figure = plot_tokens(long)
    drawn = boxes(figure)
    rows = sorted({box.get_y() for box in drawn})
    assert len(rows) >= 10
    low, high = sorted(figure.axes[0].get_xlim())
    for y in rows:
        line = sorted((b for b in drawn if b.get_y() == y), key=lambda b: b.get_x())
        for one, other in itertools.pairwise(line):
            assert one.get_x() + one.get_width() <= other.get_x()
        assert low <= line[0].get_x()
        assert line[-1].get_x() + line[-1].get_width() <= high
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a character that no font has
        for dpi in (72, 110, 130, 200):  # letters are as wide as whole pixels
            figure.set_dpi(dpi)
            figure.draw_without_rendering()
            for box, text in zip(drawn, written(figure), strict=True):
                inner, outer = text.get_window_extent(), box.get_window_extent()
                assert outer.x0 <= inner.x0 <= inner.x1 <= outer.x1, (dpi, text.get_text())
    beside = texts(t for t in figure.axes[0].texts if t.get_ha() == "right")
    assert beside[0] == "0"
    assert len(beside) == len(rows)
    assert max(figure.get_size_inches()) < 10


def test_characters_without_a_font_are_visible(long, monkeypatch) -> None:
    monkeypatch.setattr("sinkscope.viz.theme._covered", lambda: set(range(0x2000)) | {0x25B2})
    assert drawable("图 1/3 é ▲") == f"{MISSING} 1/3 é ▲"
    figure = plot_tokens(long)
    assert f"{MISSING} 1/3" in texts(written(figure))
    assert "no font on this machine has the character" in "".join(texts(figure.texts))


def test_the_html_shows_the_same(traces) -> None:
    trace = traces["two rows"]
    html = tokens_html(trace, 1, layer=3)
    chips, found = chips_of(trace, 1, 3), Page(html).chips
    assert [text for *_, text in found] == [chip.marked for chip in chips]
    for chip, (classes, style, title, _) in zip(chips, found, strict=True):
        assert ("sink" in classes.split()) is bool(chip.sinks)
        assert ("few" in classes.split()) is (chip.share is None)
        assert title.startswith("position")
        if chip.share is None:
            assert title.endswith("seen by too few queries")
            continue
        assert f"background:{colour_of(chip.share)};color:{ink_on(chip.share)};" in style
        pos, layer, head = chip.at
        assert f"at position {pos} in layer {layer}, head {head}; under uniform attention" in title
    assert "largest over the heads of layer 3" in html


def test_words_are_escaped_and_a_chip_stays_small(long) -> None:
    html = tokens_html(long)
    words = [text for *_, text in Page(html).chips]
    assert {"<", "&", "图 1/3", "🙂 1/4"} <= set(words)
    assert "<b>" not in html
    assert len(html) / len(words) < 320, "a page holds one strip per row"


def test_wrong_use_is_explained(traces) -> None:
    for make in (plot_tokens, tokens_html):
        with pytest.raises(SelectionError, match="Got row 3; expected 0 to 0"):
            make(traces["one"], 3)
        with pytest.raises(LayerError, match="Got layer 9; expected 0 to 5"):
            make(traces["one"], layer=9)


def test_the_report_shows_the_heads_of_the_most_attended(traces) -> None:
    trace = traces["two rows"]
    for mass in (None, traces.masses["two rows"]):
        heads = [p for p in pictures_of(trace, mass) if p.name.endswith("heads")]
        assert [picture.name for picture in heads] == ["row0_heads", "row1_heads"]
        record = next(r for r in trace.records if r.kind == "text" and r.batch == 1)
        what = "the text sinks" if mass is not None else f"the token at {record.pos}"
        assert f"gives {what} the most" in heads[1].alt
        assert "uniform attention would give" in heads[1].alt
    free = traces["none"]
    seen = torch.arange(free.sample.tokens.live.shape[1]).flip(0) >= SEEN - 1
    most = (free.received - free.null[:, :, None])[0].amax(dim=(0, 1)).masked_fill(~seen, -1)
    assert most_attended(free, 0) == int(most.argmax())


def test_a_cls_that_the_projector_keeps_is_shown_and_has_no_place_in_the_picture() -> None:
    """As in LLaVA's layout around a tower that says which features to take in full."""
    planted = ss.testing.plant("clip")
    planted.model.config.vision_feature_select_strategy = "full"
    planted.processor.vision_feature_select_strategy = "full"
    lvlm = ss.LVLM(planted.model, planted.processor)
    sample = lvlm.prepare(images=[ss.testing.random_image(64, 64, 0)], text=["what is it"])
    rules = ss.detectors.NoSinks(), ss.detectors.SinkDimensions(planted.truth.l_dims, 5.0)
    trace = ss.trace_sinks(lvlm, sample, *rules)
    shown = [chip.text for chip in chips_of(trace)]
    at = shown.index("image 0 CLS")
    assert shown[at + 1].startswith("image 0: 64 tokens")
    shown = plot_received_map(trace, unit="share", heads="max").axes[0].images[-1].get_array()
    patches = trace.received[0, :, :, trace.sample.tokens.row[0] >= 0].amax(dim=(0, 1))
    assert torch.allclose(torch.tensor(shown).flatten().float(), patches, atol=1e-6)

"""The figures of a report: their names, captions and what they say to somebody who cannot see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sinkscope.probes import ReceivedResult
from sinkscope.viz.chips import chips_of
from sinkscope.viz.heads import heads_of, plot_heads, plot_received_heads, share, top_of
from sinkscope.viz.image import plot_received_map, plot_sinks_on_image
from sinkscope.viz.layers import (
    plot_detections,
    plot_mass_by_layer,
    plot_received_by_layer,
    plot_spikes,
)
from sinkscope.viz.style import images_of
from sinkscope.viz.table import SINKS, counts, of_kind
from sinkscope.viz.words import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from sinkscope.experiments.trace import SinkTrace
    from sinkscope.probes import MassResult


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        name: Of its file, without the ending.
        caption: What it shows and how to read it.
        alt: What it says, in words and numbers.
        draw: Draws it.
    """

    name: str
    caption: str
    alt: str
    draw: Callable[[], Figure]


def pictures_of(
    trace: SinkTrace,
    mass: MassResult | None = None,
    decoys: Mapping[str, Tensor] | None = None,
) -> Iterator[Picture]:
    """The figures of every row: its images, then its layers."""
    for row in range(len(trace.sample)):
        name = f"row{row}_" if len(trace.sample) > 1 else ""
        for image in range(len(images_of(trace, row))):
            yield from _image_pictures(trace, row, image, name, decoys)
        yield _received(trace, row, name)
        yield _heads(trace, mass, row, name)
        if mass is not None:
            yield _mass(trace, mass, row, name)
        yield _spikes(trace, row, name)
        yield _detections(trace, row, name)


def _image_pictures(
    trace: SinkTrace, row: int, image: int, name: str, decoys: Mapping[str, Tensor] | None
) -> Iterator[Picture]:
    yield Picture(
        f"{name}sinks_image{image}",
        "The picture under the patch grid of the vision tower. Circles are V-sinks, squares L-sinks, "
        "hexagons patches that draw attention without a spike; text sinks are listed under the picture.",
        _sinks_in_words(trace, row, image),
        partial(plot_sinks_on_image, trace, row, image, decoys=decoys),
    )
    own = trace.sample.tokens.image[row] == image
    times = trace.language.received.times_null()[row].nan_to_num()
    over = times.mean(dim=1)[:, own].amax(dim=0)
    yield Picture(
        f"{name}received_image{image}",
        "Attention that other tokens give every image token in the LLM, as a multiple of uniform "
        "attention: mean over heads, largest over layers.",
        f"Heat map over image {image}: image tokens receive between {short(float(over.min()))} and "
        f"{short(float(over.max()))} times their null.",
        partial(plot_received_map, trace, row, image),
    )


def _sinks_in_words(trace: SinkTrace, row: int, image: int) -> str:
    parts = []
    for kind, noun in list(SINKS.items())[:2]:
        found = [r for r in of_kind(trace, kind, row) if r.image == image]
        cells = "; ".join(f"{r.row},{r.column}" for r in found[:12])
        more = f" and {len(found) - 12} more" if len(found) > 12 else ""
        parts.append(f"{noun}s at row,column {cells}{more}" if found else f"{noun}s: none found")
    return f"Image {image} with its patch grid. {'. '.join(parts)}."


def _received(trace: SinkTrace, row: int, name: str) -> Picture:
    return Picture(
        f"{name}received_by_layer",
        "Attention that one token of each kind receives, by LLM layer, on a logarithmic scale. "
        "Dashed: the same tokens under uniform attention.",
        f"Line plot of attention received by layer for {counts(trace, row)}, ordinary image tokens "
        "and text, each with its null.",
        partial(plot_received_by_layer, trace, row),
    )


def _heads(trace: SinkTrace, mass: MassResult | None, row: int, name: str) -> Picture:
    """Layer x head: the mass on all text sinks or, without it, what the most attended token receives."""
    if mass is not None and "text sinks" in mass.groups and bool(trace.text_sinks()[row].any()):
        values, null = heads_of(mass, "text sinks", row)
        what, draw = "the text sinks", partial(plot_heads, mass, "text sinks", row)
    else:
        pos = most_attended(trace, row)
        result = ReceivedResult(trace.received, trace.null, trace.l_detection.layers)
        values, null = trace.received[row, :, :, pos], trace.null[row, :, pos]
        what, draw = f"the token at {pos}", partial(plot_received_heads, result, pos, row)
    layer, head, top = top_of(values)
    flat = "" if null is None else f"; uniform attention would give {share(float(null[layer]))}"
    return Picture(
        f"{name}heads",
        f"How much attention every head of the LLM gives to {what}, mean over queries. The frame marks "
        "the head that gives the most.",
        f"Heat map of layers and heads. Layer {trace.l_detection.layers[layer]}, head {head} gives {what} "
        f"the most, {share(top)} of its attention{flat}.",
        draw,
    )


def most_attended(trace: SinkTrace, row: int) -> int:
    """The text sink that receives the most in some head; without any, the token that does."""
    chips = chips_of(trace, row)
    sinks = [chip for chip in chips if "text" in chip.sinks]
    return max(sinks or chips, key=lambda chip: (chip.share or 0.0) - chip.null).at[0]


def _mass(trace: SinkTrace, mass: MassResult, row: int, name: str) -> Picture:
    means = mass.mass[row].nanmean(dim=(1, 2)).mean(dim=0).tolist()
    words = ", ".join(
        f"{group} {short(value)}" for group, value in zip(mass.groups, means, strict=True)
    )
    return Picture(
        f"{name}mass_by_layer",
        "How the attention of the LLM divides between the kinds of tokens, by layer. Dashed: uniform "
        "attention under the same mask.",
        f"Line plot of attention mass by layer. Means over layers: {words}.",
        partial(plot_mass_by_layer, mass, row),
    )


def _spikes(trace: SinkTrace, row: int, name: str) -> Picture:
    vision = float(trace.vit_spikes[images_of(trace, row)].max())
    language = float(trace.llm_spikes[row].max())
    return Picture(
        f"{name}spikes",
        "The largest activation of every block over the median magnitude of that block, in both "
        "towers. About 1000 is called massive (Sun et al., 2402.17762).",
        f"Line plot. The largest activation is {short(vision)} medians in the vision tower and "
        f"{short(language)} in the LLM.",
        partial(plot_spikes, trace, row),
    )


def _detections(trace: SinkTrace, row: int, name: str) -> Picture:
    vision = float(trace.v_detection.fraction[images_of(trace, row)].max())
    language = float(trace.l_detection.fraction[row].max())
    return Picture(
        f"{name}flagged",
        "Share of the image tokens that each rule flags, by block. Above 20 % a rule is saturated: it "
        "finds the scale of the model and no sinks. In the vision tower only the blocks that feed "
        "the projector decide.",
        f"Line plot. The V rule flags at most {vision:.1%} of a block's patches, the L rule at most "
        f"{language:.1%} of a layer's image tokens.",
        partial(plot_detections, trace, row),
    )

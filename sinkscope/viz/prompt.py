"""A prompt as chips: one per text token, one per image, with what each receives and which sinks it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.patches import Rectangle

from sinkscope.tokens import VISION_KINDS
from sinkscope.viz.image import shown_records
from sinkscope.viz.style import (
    ADVANCE,
    COLOURS,
    GROUP_OF,
    MISSING,
    QUIET,
    SMALL,
    STYLES,
    TICKS,
    TITLE,
    check_layer,
    colour_of,
    columns_of,
    cut,
    drawable,
    families,
    ink_on,
    new_figure,
    share_scale,
)
from sinkscope.viz.tables import MARKS, readable, short

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sinkscope.experiments.tracing import SinkTrace
    from sinkscope.tokens import TokenMap

SEEN = 8

"""Queries that must see a token before its mean says more than what it gives to itself."""


@dataclass(frozen=True)
class Chip:
    """One token, or the patches of one image.

    Attributes:
        text: What to write on it.
        first: Its first position.
        last: Its last position.
        share: The largest share of attention that one of its tokens receives, 0 to 1; None where too
            few queries see it.
        null: The same token and layer under uniform attention.
        at: The position, LLM layer and head of that share.
        sinks: Kind of sink -> how many it holds.
    """

    text: str
    first: int
    last: int
    share: float | None
    null: float
    at: tuple[int, int, int]
    sinks: dict[str, int]


def chips_of(trace: SinkTrace, row: int = 0, layer: int | None = None) -> list[Chip]:
    """The prompt of a row, from its first token that is no padding to its last.

    Args:
        trace: The trace.
        row: The row of the batch.
        layer: One LLM layer, with the sinks of that layer; None for the largest share over all.

    Raises:
        SelectionError: If there is no such row.
        LayerError: If there is no such layer.
    """
    layers = range(trace.n_layers) if layer is None else [check_layer(trace, layer)]
    kinds = {record.pos: record.kind for record in shown_records(trace, row, layer)}
    tokens = trace.sample.tokens
    received, null = trace.received[row, list(layers)], trace.null[row, list(layers)]
    seen = tokens.live[row].flip(0).cumsum(0).flip(0)  # a token is seen by itself and what follows
    out = []
    for name, group in groupby(tokens.live[row].nonzero().flatten().tolist(), _name(tokens, row)):
        places = list(group)
        part = received[:, :, places].nan_to_num()
        index, head, key = (int(i) for i in torch.unravel_index(part.argmax(), part.shape))
        held = [kinds[pos] for pos in places if pos in kinds]
        share = float(part[index, head, key])
        out.append(
            Chip(
                text=_text(name, places, share),
                first=places[0],
                last=places[-1],
                share=share if int(seen[places[0]]) >= SEEN else None,
                null=float(null[index, places[key]]),
                at=(places[key], layers[index], head),
                sinks={kind: held.count(kind) for kind in MARKS if kind in held},
            )
        )
    return out


def marks_of(chip: Chip) -> str:
    """The marks of the sinks in a chip: ``▲``, or ``● 2`` where one chip holds several tokens."""
    many = chip.last > chip.first
    return " ".join(f"{MARKS[kind]}{f' {n}' if many else ''}" for kind, n in chip.sinks.items())


def kinds_in(chips: Sequence[Chip]) -> list[tuple[str, str]]:
    """``("V-sinks", "● V-sinks (2)")`` for every kind of sink."""
    out = []
    for kind, mark in MARKS.items():
        count = sum(chip.sinks.get(kind, 0) for chip in chips)
        found = f" ({count})" if count else ": none found"
        out.append((GROUP_OF[kind], f"{mark} {GROUP_OF[kind]}{found}"))
    return out


def strip_title(layer: int | None) -> str:
    """What the colours of a strip mean."""
    where = "heads and layers" if layer is None else f"the heads of layer {layer}"
    return f"Attention that every token of the prompt receives, largest over {where}"


def strip_notes(chips: Sequence[Chip]) -> list[str]:
    """What a reader of the strip must know."""
    known = [chip for chip in chips if chip.share is not None]
    nulls = [chip.null for chip in known]
    notes = []
    if known:
        notes.append(
            f"under uniform attention (null) these tokens would receive {short(min(nulls), 2)} to "
            f"{short(max(nulls), 2)}"
        )
    if len(known) < len(chips):
        notes.append(f"dashed: fewer than {SEEN} queries see the token, so it has no colour")
    return notes


def _name(tokens: TokenMap, row: int) -> Callable[[int], tuple[str, int]]:
    """A function of a position: its own name, or that of the image that it shares a chip with."""

    def name(pos: int) -> tuple[str, int]:
        image = int(tokens.image[row, pos])
        if image < 0:
            return readable(tokens.words[row][pos] if tokens.words else None), pos
        source = int(tokens.sources[row, pos, 0])
        kind = VISION_KINDS[int(tokens.vision.kind[int(tokens.image_index[row, pos]), source])]
        if kind in ("cls", "register"):
            return f"image {image} {'CLS' if kind == 'cls' else kind}", pos
        return f"image {image}", -1

    return name


def _text(name: tuple[str, int], places: list[int], share: float) -> str:
    word, pos = name
    return word if pos >= 0 else f"{word}: {len(places)} tokens, max {short(share, 2)}"


LETTER = 8.6

"""Points."""

COLUMNS = 96

"""Letters of a line."""

MARGIN = 6

"""Columns for the positions beside the lines."""

LONGEST = 48

"""Letters of a chip."""

INCHES = LETTER * ADVANCE / 72

"""Width of a letter."""

LINE, TOP, BELOW, NOTE = 0.29, 0.5, 0.95, 0.17

"""Inches: a line of chips, the title, the bar and the kinds of sinks, a line of notes."""


def plot_tokens(trace: SinkTrace, row: int = 0, *, layer: int | None = None) -> Figure:
    """Every token of the prompt, coloured by the largest share of attention it receives.

    The share is the mean over the queries that see the token, in the head that gives it the most. It
    is drawn on a square-root scale from 0 to 1. Sinks have an outline and a mark of their kind. All
    patches of an image share one chip; CLS and registers that the projector keeps have their own.
    Numbers at the left are positions. Tokens that fewer than 8 queries see have no colour: their
    share is mostly what they give to themselves.

    Args:
        trace: The trace.
        row: The row of the batch.
        layer: One LLM layer, with the sinks of that layer; None for the largest share over layers.

    Returns:
        The figure.

    Raises:
        SelectionError: If there is no such row.
        LayerError: If there is no such layer.
    """
    chips = chips_of(trace, row, layer)
    lines = _lines(chips)
    notes = strip_notes(chips)
    if any(MISSING in text for line in lines for _, text, _ in line):
        notes.append(f"{MISSING}: no font on this machine has the character")
    wide = (MARGIN + COLUMNS + 1) * INCHES
    below = BELOW + NOTE * len(notes)
    figure = new_figure((wide + 0.3, TOP + LINE * len(lines) + below))
    figure.set_layout_engine("none")
    tall = figure.get_figheight()
    part = (0.15 / (wide + 0.3), below / tall, wide / (wide + 0.3), LINE * len(lines) / tall)
    ax = figure.add_axes(part)
    ax.set(xlim=(-MARGIN, COLUMNS + 1), ylim=(len(lines) - 0.5, -0.5))
    ax.axis("off")
    for place, line in enumerate(lines):
        _draw_line(ax, place, line)
    title = strip_title(layer) + (f" (row {row})" if len(trace.sample) > 1 else "")
    figure.text(0.15 / (wide + 0.3), 1 - 0.1 / tall, title, fontsize=TITLE, va="top")
    _draw_key(figure, chips, notes)
    return figure


def _lines(chips: Sequence[Chip]) -> list[list[tuple[int, str, Chip]]]:
    """The chips of every line, with the column where each begins and what is written on it."""
    lines: list[list[tuple[int, str, Chip]]] = [[]]
    at = 0
    for chip in chips:
        text = drawable(cut(f"{marks_of(chip)} {chip.text}".strip(), LONGEST))
        wide = columns_of(text) + 2
        if lines[-1] and at + wide - 1 > COLUMNS:
            lines.append([])
            at = 0
        lines[-1].append((at, text, chip))
        at += wide
    return lines


def _draw_line(ax: Axes, place: int, line: Sequence[tuple[int, str, Chip]]) -> None:
    """One line, and the position of its first token."""
    look: Any = {"family": list(families()), "va": "center_baseline", "parse_math": False}
    first = line[0][2].first
    ax.text(-0.8, place, str(first), ha="right", color=QUIET, fontsize=SMALL - 2, va="center")
    for at, text, chip in line:
        kind = next(iter(chip.sinks), None)
        unknown = chip.share is None
        box = Rectangle(
            (at, place - 0.4), columns_of(text) + 1.2, 0.8,
            facecolor="white" if chip.share is None else colour_of(chip.share),
            edgecolor=STYLES[GROUP_OF[kind]].colour if kind else "#b9bec4",
            linewidth=2.2 if kind else 0.6,
            linestyle=(0, (3, 2)) if unknown and not kind else "-",
        )  # fmt: skip
        ax.add_patch(box)
        ink = "#1c2127" if chip.share is None else ink_on(chip.share)
        ax.text(at + 0.6, place, text, fontsize=LETTER, color=ink, **look)


def _draw_key(figure: Figure, chips: Sequence[Chip], notes: Sequence[str]) -> None:
    """The colour bar, the kinds of sinks and the notes, under the strip."""
    wide, tall = figure.get_size_inches()
    left = 0.15 + MARGIN * INCHES
    base = NOTE * len(notes)
    bar = figure.add_axes((left / wide, (base + 0.48) / tall, 2.6 / wide, 0.13 / tall))
    scale = ScalarMappable(share_scale(), COLOURS)
    figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=TICKS)
    bar.set_xticklabels([f"{tick:g}" for tick in TICKS])
    bar.tick_params(labelsize=SMALL - 1)
    bar.set_title("share of a query's attention", fontsize=SMALL, loc="left", pad=4)
    for i, (group, text) in enumerate(kinds_in(chips)):
        y = (base + 0.68 - 0.18 * i) / tall
        figure.text((left + 3.2) / wide, y, text, fontsize=SMALL, color=STYLES[group].colour)
    for i, note in enumerate(reversed(notes)):
        figure.text(left / wide, (0.08 + NOTE * i) / tall, note, fontsize=SMALL, color=QUIET)


EDGE = "#b9bec4"

CSS = (
    ".sinkscope-tokens { line-height: 2.1; }"
    ".sinkscope-tokens .chip { display: inline-block; line-height: 1.4; margin: 0 1px; padding: 0 5px;"
    f" border: 1px solid {EDGE}; border-radius: 3px; font-family: ui-monospace, monospace;"
    " font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; background: #fff; color: #1c2127; }"
    ".sinkscope-tokens .sink { border-width: 3px; }"
    ".sinkscope-tokens .few { border-style: dashed; }"
    ".sinkscope-tokens .head { line-height: 1.4; margin-bottom: .4em; }"
    ".sinkscope-tokens .key { font-size: 90%; line-height: 1.7; margin-top: .5em; }"
)


def tokens_html(trace: SinkTrace, row: int = 0, *, layer: int | None = None) -> str:
    """The same as `plot_tokens`, as HTML; a chip tells its position, layer, head and null when pointed at.

    Args:
        trace: The trace.
        row: The row of the batch.
        layer: One LLM layer, with the sinks of that layer; None for the largest share over layers.

    Returns:
        A ``<div>`` with its own style, such as for ``IPython.display.HTML``.

    Raises:
        SelectionError: If there is no such row.
        LayerError: If there is no such layer.
    """
    return f"<div><style>{CSS}</style>{strip(trace, row, layer)}</div>"


def strip(trace: SinkTrace, row: int, layer: int | None = None) -> str:
    """The strip without its style, which a page needs once."""
    chips = chips_of(trace, row, layer)
    notes = "".join(f"<div>{escape(note)}</div>" for note in strip_notes(chips))
    return (
        f'<div class="sinkscope-tokens"><div class="head">{escape(strip_title(layer))}</div>'
        f"<div>{' '.join(_chip(chip) for chip in chips)}</div>"
        f'<div class="key">{_shares()}<div>{_kinds(chips)}</div>{notes}</div></div>'
    )


def _chip(chip: Chip) -> str:
    """One chip; what it says when pointed at stands in its title."""
    pos, layer, head = chip.at
    where = (
        f"position {chip.first}"
        if chip.first == chip.last
        else f"positions {chip.first} to {chip.last}"
    )
    classes, style = ["chip"], ""
    if chip.share is None:
        classes.append("few")
        about = f"{where}: seen by too few queries"
    else:
        style = f"background:{colour_of(chip.share)};color:{ink_on(chip.share)};"
        about = (
            f"{where}: {short(chip.share)} of a query's attention at position {pos} in layer {layer}, "
            f"head {head}; under uniform attention {short(chip.null)}"
        )
    if chip.sinks:
        classes.append("sink")
        style += f"border-color:{STYLES[GROUP_OF[next(iter(chip.sinks))]].colour};"
    text = f"{marks_of(chip)} {chip.text}".strip()
    return f'<span class="{" ".join(classes)}" style="{style}" title="{escape(about)}">{escape(text)}</span>'


def _shares() -> str:
    """The scale of colours."""
    boxes = [
        f'<span class="chip" style="background:{colour_of(tick)};color:{ink_on(tick)}">{tick:g}</span>'
        for tick in TICKS
    ]
    return f"<div>{' '.join(boxes)} share of a query's attention</div>"


def _kinds(chips: Sequence[Chip]) -> str:
    """The marks, and how many sinks of each kind there are."""
    return " &nbsp; ".join(
        f'<span style="color:{STYLES[group].colour}">{text}</span>'
        for group, text in kinds_in(chips)
    )

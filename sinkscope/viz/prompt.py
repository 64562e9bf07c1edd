"""A prompt as chips, one per text token or image: what each receives and which sinks it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sinkscope.viz import theme
from sinkscope.viz.image import shown_records
from sinkscope.viz.tables import MARKS, render, short, token_name
from sinkscope.viz.theme import GROUP_OF, QUIET, SMALL, STYLES, TICKS, Trace

SEEN = 8  # queries that must see a token before its mean says more than what it gives to itself
# Points of a letter; letters of a line, of the positions beside it, and of a chip.
LETTER, COLUMNS, MARGIN, LONGEST = 8.6, 96, 6, 48
INCHES = LETTER * theme.ADVANCE / 72  # width of a letter
# Inches: a line of chips, the title, the bar and the kinds of sinks, a line of notes.
LINE, TOP, BELOW, NOTE = 0.29, 0.5, 0.95, 0.17


@dataclass(frozen=True)
class Chip:
    """One token, or the patches of one image, from a first to a last position."""

    text: str
    first: int
    last: int
    share: (
        float | None
    )  # the largest that one of its tokens receives, None where too few queries see it
    null: float  # what uniform attention gives there
    at: tuple[int, int, int]  # its position, LLM layer and head
    sinks: dict[str, int]  # how many of each kind

    @property
    def kind(self) -> str | None:
        """The kind of its first sink."""
        return next(iter(self.sinks), None)

    @property
    def marked(self) -> str:
        """The text behind the marks of its sinks: ``▲``, or ``● 2`` where it holds several tokens."""
        many = self.last > self.first
        marks = [f"{MARKS[kind]}{f' {n}' if many else ''}" for kind, n in self.sinks.items()]
        return " ".join([*marks, self.text])

    @property
    def about(self) -> str:
        """Its position, layer, head and null, in words."""
        (pos, layer, head), last = self.at, "" if self.first == self.last else f" to {self.last}"
        where = f"position{'s' if last else ''} {self.first}{last}"
        if self.share is None:
            return f"{where}: seen by too few queries"
        return (
            f"{where}: {short(self.share)} of a query's attention at position {pos} in layer {layer}, "
            f"head {head}; under uniform attention {short(self.null)}"
        )


def chips_of(trace: Trace, row: int = 0, layer: int | None = None) -> list[Chip]:
    """The prompt of a row without padding; the largest share over all layers, or of one layer."""
    layers = theme.layers_of(trace, layer)
    kinds = {record.pos: record.kind for record in shown_records(trace, row, layer)}
    tokens, attention = trace.sample.tokens, trace.language.received
    received, null = attention.received[row, layers], attention.null[row, layers]
    seen = tokens.live[row].flip(0).cumsum(0).flip(0)  # a token is seen by itself and what follows
    out = []

    def chip_of(pos: int) -> tuple[str, int]:  # one of all patches of an image
        name, patch = token_name(tokens, row, pos, tokens.words)
        return (name.rpartition(" ")[0], -1) if patch else (name, pos)

    for name, group in groupby(tokens.live[row].nonzero().flatten().tolist(), chip_of):
        places = list(group)
        part = received[:, :, places].nan_to_num()
        index, head, key = (int(i) for i in torch.unravel_index(part.argmax(), part.shape))
        held = [kinds[pos] for pos in places if pos in kinds]
        share, (word, own) = float(part[index, head, key]), name
        out.append(
            Chip(
                word if own >= 0 else f"{word}: {len(places)} tokens, max {short(share, 2)}",
                first=places[0],
                last=places[-1],
                share=share if int(seen[places[0]]) >= SEEN else None,
                null=float(null[index, places[key]]),
                at=(places[key], layers[index], head),
                sinks={kind: held.count(kind) for kind in MARKS if kind in held},
            )
        )
    return out


def strip_of(trace: Trace, row: int, layer: int | None = None) -> tuple[Any, ...]:
    """The chips of a row, the title, what a reader must know, and how many sinks of each kind."""
    chips = chips_of(trace, row, layer)
    where = "heads and layers" if layer is None else f"the heads of layer {layer}"
    title = f"Attention that every token of the prompt receives, largest over {where}"
    nulls = [chip.null for chip in chips if chip.share is not None]
    notes, kinds = [], []
    if nulls:
        between = f"{short(min(nulls), 2)} to {short(max(nulls), 2)}"
        notes.append(f"under uniform attention (null) these tokens would receive {between}")
    if len(nulls) < len(chips):
        notes.append(f"dashed: fewer than {SEEN} queries see the token, so it has no colour")
    for kind, mark in MARKS.items():
        count = sum(chip.sinks.get(kind, 0) for chip in chips)
        found = f" ({count})" if count else ": none found"
        kinds.append((kind, f"{mark} {GROUP_OF[kind]}{found}"))
    return chips, title, notes, kinds


def tokens_html(trace: Trace, row: int = 0, *, layer: int | None = None) -> str:
    """Write `plot_tokens` as a ``<div>`` with its own style, such as for ``IPython.display.HTML``.

    A chip tells position, layer, head and null when pointed at.
    """
    return render("tokens.html", strip=strip_of(trace, row, layer))


def plot_tokens(trace: Trace, row: int = 0, *, layer: int | None = None) -> Figure:
    """Draw every token of the prompt, coloured by the largest share of attention it receives.

    The share is the mean over the queries that see the token, in the head that gives it the most, on a
    square-root scale from 0 to 1; none if fewer than 8 queries see it. Sinks have an outline and a mark of
    their kind. All patches of an image share one chip; CLS and registers have their own. Numbers at the
    left are positions. With ``layer`` it is one LLM layer, with the sinks of that layer.
    """
    chips, title, notes, kinds = strip_of(trace, row, layer)
    lines = _lines(chips)
    if any(theme.MISSING in text for line in lines for _, text, _ in line):
        notes.append(f"{theme.MISSING}: no font on this machine has the character")
    inner, below = (MARGIN + COLUMNS + 1) * INCHES, BELOW + NOTE * len(notes)
    wide, tall = inner + 0.3, TOP + LINE * len(lines) + below
    figure = theme.new_figure((wide, tall))
    figure.set_layout_engine("none")
    ax = figure.add_axes((0.15 / wide, below / tall, inner / wide, LINE * len(lines) / tall))
    ax.set(xlim=(-MARGIN, COLUMNS + 1), ylim=(len(lines) - 0.5, -0.5))
    ax.axis("off")
    for place, line in enumerate(lines):
        _draw_line(ax, place, line)
    title += f" (row {row})" if len(trace.sample) > 1 else ""
    figure.text(0.15 / wide, 1 - 0.1 / tall, title, fontsize=theme.TITLE, va="top")
    _draw_key(figure, kinds, notes)
    return figure


def _lines(chips: Sequence[Chip]) -> list[list[tuple[int, str, Chip]]]:
    """The chips of every line, with the column where each begins and what is written on it."""
    lines: list[list[tuple[int, str, Chip]]] = [[]]
    at = 0
    for chip in chips:
        text = theme.drawable(theme.cut(chip.marked, LONGEST))
        wide = theme.columns_of(text) + 2
        if lines[-1] and at + wide - 1 > COLUMNS:
            at = 0
            lines.append([])
        lines[-1].append((at, text, chip))
        at += wide
    return lines


def _draw_line(ax: Axes, place: int, line: Sequence[tuple[int, str, Chip]]) -> None:
    """One line, and the position of its first token."""
    look: Any = {"family": list(theme.families()), "va": "center_baseline", "parse_math": False}
    first = line[0][2].first
    ax.text(-0.8, place, str(first), ha="right", color=QUIET, fontsize=SMALL - 2, va="center")
    for at, text, chip in line:
        share, edge = chip.share, STYLES[GROUP_OF[chip.kind]].colour if chip.kind else theme.EDGE
        box = Rectangle((at, place - 0.4), theme.columns_of(text) + 1.2, 0.8, edgecolor=edge)
        box.set_facecolor("white" if share is None else theme.colour_of(share))
        box.set_linewidth(2.2 if chip.kind else 0.6)
        box.set_linestyle((0, (3, 2)) if share is None and not chip.kind else "-")
        ax.add_patch(box)
        ink = theme.INK if share is None else theme.ink_on(share)
        ax.text(at + 0.6, place, text, fontsize=LETTER, color=ink, **look)


def _draw_key(figure: Figure, kinds: Sequence[tuple[str, str]], notes: Sequence[str]) -> None:
    """The colour bar, the kinds of sinks and the notes, under the strip."""
    wide, tall = figure.get_size_inches()
    left, base = 0.15 + MARGIN * INCHES, NOTE * len(notes)
    bar = figure.add_axes((left / wide, (base + 0.48) / tall, 2.6 / wide, 0.13 / tall))
    scale = ScalarMappable(theme.share_scale(), theme.SHARES)
    figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=TICKS)
    bar.set_xticklabels([f"{tick:g}" for tick in TICKS])
    bar.tick_params(labelsize=SMALL - 1)
    bar.set_title("share of a query's attention", fontsize=SMALL, loc="left", pad=4)
    for i, (kind, text) in enumerate(kinds):
        y, colour = (base + 0.68 - 0.18 * i) / tall, STYLES[GROUP_OF[kind]].colour
        figure.text((left + 3.2) / wide, y, text, fontsize=SMALL, color=colour)
    for i, note in enumerate(reversed(notes)):
        figure.text(left / wide, (0.08 + NOTE * i) / tall, note, fontsize=SMALL, color=QUIET)

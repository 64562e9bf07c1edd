"""The prompt as a strip of tokens, coloured by the attention they receive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.cm import ScalarMappable
from matplotlib.patches import Rectangle

from sinkscope.viz.chips import chips_of, kinds_in, marks_of, strip_notes, strip_title
from sinkscope.viz.glyphs import ADVANCE, MISSING, columns_of, cut, drawable, families
from sinkscope.viz.shares import COLOURS, TICKS, colour_of, ink_on, share_scale
from sinkscope.viz.style import GROUP_OF, QUIET, SMALL, STYLES, TITLE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sinkscope.experiments.trace import SinkTrace
    from sinkscope.viz.chips import Chip

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

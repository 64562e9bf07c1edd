"""The strip of `plot_tokens` as HTML, for notebooks and the page of a report."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from sinkscope.viz.chips import chips_of, kinds_in, marks_of, strip_notes, strip_title
from sinkscope.viz.shares import TICKS, colour_of, ink_on
from sinkscope.viz.style import GROUP_OF, STYLES
from sinkscope.viz.words import short

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sinkscope.experiments.trace import SinkTrace
    from sinkscope.viz.chips import Chip

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

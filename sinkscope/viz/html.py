"""A trace as HTML: for notebooks, and the parts of which a report is made."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from sinkscope.viz.style import GROUP_OF, STYLES
from sinkscope.viz.table import KINDS, SINKS, by_row, columns_for, counts, of_kind
from sinkscope.viz.text import TOWERS, rules
from sinkscope.viz.words import neat

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.experiments.records import SinkRecord
    from sinkscope.experiments.trace import SinkTrace

MARKS = {"V": "●", "L": "■", "text": "▲", "attention": "⬢"}

LONG = 60
"""Characters from which a cell of a small table breaks into lines."""

NOTEBOOK = (
    ".sinkscope-trace table { border-collapse: collapse; font-size: 85%; }"
    ".sinkscope-trace table th, .sinkscope-trace table td { text-align: left; padding: 2px 8px;"
    " white-space: nowrap; min-width: 0; border: 0; border-bottom: 1px solid #8884; }"
)
"""Small and left-aligned in every notebook and on every site that has a style of its own."""


def trace_html(trace: SinkTrace, *, limit: int = 10) -> str:
    """The table of `trace_summary` as HTML, for a notebook.

    Args:
        trace: The trace.
        limit: The most sinks of each kind to list.

    Returns:
        A ``<div>``.
    """
    found = "".join(f"<div>{escape(' '.join(line.split()))}</div>" for line in rules(trace))
    return (
        f'<div class="sinkscope-trace"><style>{NOTEBOOK}</style>'
        f"<p><strong>{escape(counts(trace))}</strong></p>"
        f"{sink_table(trace, limit=limit)}{nothing_html(trace)}"
        f'<div style="margin-top:.6em;font-size:90%">{found}</div>{warnings_html(trace)}</div>'
    )


def sink_table(trace: SinkTrace, *, limit: int | None = None) -> str:
    """A table of the sinks; every kind without any has a line that says so.

    Args:
        trace: The trace.
        limit: The most sinks of each kind to list; None for all.
    """
    columns = columns_for(trace)
    heads = "".join(
        f'<th scope="col" title="{escape(c.meaning)}">{_head(c.head)}</th>' for c in columns
    )
    lines = []
    for kind, noun in KINDS.items():
        records = of_kind(trace, kind)
        lines += [_line(columns, record) for record in by_row(records[:limit])]
        if not records and kind in SINKS:
            lines.append(_remark(f"{noun}s: none found", len(columns)))
        elif limit is not None and len(records) > limit:
            lines.append(_remark(f"{len(records) - limit} more {noun}s", len(columns)))
    return (
        '<div style="overflow-x:auto"><table class="sinkscope">'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def frame_table(frame: pd.DataFrame) -> str:
    """Any small table as HTML, and under it the sentences in its ``attrs["notes"]``."""
    heads = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in frame.columns)
    lines = [
        "<tr>" + "".join(_cell(_plain(value)) for value in line) + "</tr>"
        for line in frame.itertuples(index=False)
    ]
    notes = "".join(f"<p>{escape(note)}</p>" for note in frame.attrs.get("notes", ()))
    return (
        '<div style="overflow-x:auto"><table class="sinkscope">'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{notes}"
    )


def nothing_html(trace: SinkTrace) -> str:
    """What spikes and what draws in a tower where nothing is flagged, with the candidates; or nothing."""
    if not trace.outcomes:
        return ""
    import pandas as pd

    said = "".join(
        f"<p><strong>{TOWERS[tower]}, nothing flagged:</strong> {escape(neat(text))}.</p>"
        for tower, text in trace.outcomes.items()
    )
    lines = [
        {
            "tower": TOWERS[c.tower],
            "token": c.token,
            "largest |h| in medians": f"{c.medians:.0f} (layer {c.spike_layer})",
            "times upper quartile": f"{c.prominence:.1f}",
            "drawn beyond uniform": "-" if c.drawn_at is None else f"{c.drawn:.2f}",
            "in head": "-" if c.drawn_at is None else f"{c.drawn_at[0]}.{c.drawn_at[1]}",
            "refused because": c.reason,
        }
        for c in trace.candidates
        if c.tower in trace.outcomes
    ]
    return said + frame_table(pd.DataFrame(lines))


def warnings_html(trace: SinkTrace) -> str:
    """The warnings, or nothing."""
    if not trace.warnings:
        return ""
    items = "".join(f"<li>{escape(neat(text))}</li>" for text in trace.warnings)
    return f'<div class="warnings" role="note"><strong>Warnings</strong><ul>{items}</ul></div>'


def _line(columns: Sequence[Any], record: SinkRecord) -> str:
    colour = STYLES[GROUP_OF[record.kind]].colour
    mark = f'<span aria-hidden="true" style="color:{colour}">{MARKS[record.kind]}</span> '
    cells = [escape(column.cell(record)) for column in columns]
    at = next(i for i, column in enumerate(columns) if column.head == "kind")
    cells[at] = mark + cells[at]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _remark(text: str, across: int) -> str:
    return f'<tr><td colspan="{across}"><em>{escape(text)}</em></td></tr>'


def _head(head: str) -> str:
    """``re-|ceived`` is one word in a table that has room; ``norm|ViT`` is two."""
    return escape(head.replace("-|", "").replace("|", " "))


def _cell(text: str) -> str:
    """A cell; long text may break into lines."""
    wrap = ' style="white-space:normal;min-width:16em"' if len(text) > LONG else ""
    return f"<td{wrap}>{escape(text)}</td>"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

"""Short words for tokens, places and layers, the same in tables, figures and pages."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from sinkscope.viz.style import GROUP_OF, STYLES

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.experiments.sink_records import SinkRecord
    from sinkscope.experiments.tracing import SinkTrace


def readable(word: str | None) -> str:
    """A token as something one can see: control characters and blanks are written out."""
    if word is None:
        return "token"
    if not word.strip(" "):
        return repr(word)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in word.strip(" "))


def ranges(layers: Iterable[int]) -> str:
    """Ascending layers in few characters: ``1-3, 5``; ``-`` for none."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(parts) or "-"


def short(value: float | None, digits: int = 3) -> str:
    """A number with few significant digits and no exponent where one can do without."""
    if value is None:
        return "-"
    if value != value:
        return "nan"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}" if abs(value) < 1e6 else f"{value:.1e}"
    text = f"{value:.{digits}g}"
    return f"{value:.{digits}f}" if "e" in text else text


def neat(text: str) -> str:
    """A description with its long decimal numbers cut to four digits."""
    return re.sub(r"\d+\.\d{4,}", lambda found: f"{float(found[0]):.4g}", text)


def aligned(lines: Sequence[Sequence[str]], heads: int = 1) -> str:
    """Rows of cells as a table for a terminal, with a rule under the ``heads`` first rows."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    ]
    padded.insert(heads, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in padded)


def plural(count: int, noun: str) -> str:
    """``1 V-sink``, ``2 V-sinks``, ``no V-sinks``."""
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


SINKS = {"V": "V-sink", "L": "L-sink", "text": "text sink"}

KINDS = SINKS | {"attention": "attended token"}

"""`SinkRecord.kind` -> what to call one; sinks first."""

MOST_BIRTHS = 2

"""Births that a line lists."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        head: Its name; a line break for narrow tables at ``|``.
        cell: What to write for a sink.
        meaning: For the glossary.
    """

    head: str
    cell: Callable[[SinkRecord], str]
    meaning: str


def _token(record: SinkRecord) -> str:
    if record.image < 0:
        return f"{record.pos} {readable(record.word)}"
    what = "" if record.vit_kind in (None, "patch") else f" {str(record.vit_kind).upper()}"
    return f"{record.pos} image {record.image}{what}"


def _cell(record: SinkRecord) -> str:
    return "-" if record.row < 0 else f"{record.row},{record.column}"


def _box(record: SinkRecord) -> str:
    if record.box is None:
        return "-"
    x0, y0, x1, y1 = (round(edge) for edge in record.box)
    return f"{x0},{y0}-{x1},{y1}"


def _born(record: SinkRecord) -> str:
    vision = record.kind in ("V", "attention")
    if not vision:
        births = [_block(block, half) for block, _, half in record.llm_lives]
        return "LLM " + ", ".join(births[:MOST_BIRTHS]) if births else "-"
    if record.vit_birth is None:
        return "-"
    return "ViT " + _block(record.vit_birth, record.vit_writer)


def _block(block: int, half: str | None) -> str:
    return "input" if block < 0 else f"{block} {half or ''}".strip()


def _layers(record: SinkRecord) -> str:
    layers = record.llm_layers
    if ranges(layers).count(",") < 3:
        return ranges(layers)
    return f"{layers[0]}-{layers[-1]} ({len(layers)})"


COLUMNS = (
    Column(
        "kind",
        lambda r: r.kind,
        "V: a visual token that left the vision tower as a sink. L: a visual token that became one "
        "in the LLM. text: a token outside the image that meets the L rule, such as BOS. attention: an "
        "image token to which the vision tower attends throughout, and which the V rule does not flag.",
    ),
    Column("token", _token, "Position in the prompt, and the word or the image it belongs to."),
    Column("cell", _cell, "Row and column of the token in the image's grid, from 0."),
    Column("pixels", _box, "The pixels that the token covers: left, top - right, bottom."),
    Column(
        "born in",
        _born,
        "The block whose output first shows the spike, and which half of the block wrote the largest "
        "channel: attention or MLP. A sink of the LLM that goes and comes back has several.",
    ),
    Column(
        "norm|ViT",
        lambda r: short(r.vit_norm),
        "L2 norm of the vision state that the projector reads.",
    ),
    Column(
        "norm|LLM",
        lambda r: short(r.llm_norm),
        "L2 norm after the projector, in the embeddings of the LLM.",
    ),
    Column(
        "L rule|in layers",
        _layers,
        "LLM layers on whose input the L rule holds; the first, the last and how many, where they are "
        "scattered.",
    ),
    Column(
        "draws|from",
        lambda r: "-" if r.first_drawn is None else str(r.first_drawn),
        "First LLM layer in which some head gives the token 0.06 or more beyond uniform attention, "
        "counting other tokens' queries only (or what `draws` says).",
    ),
    Column(
        "top|head",
        lambda r: "-" if r.head is None else f"{r.head[0]}.{r.head[1]}",
        "LLM layer and head in which other tokens give it the most beyond uniform attention.",
    ),
    Column(
        "re-|ceived",
        lambda r: "-" if r.head is None else short(r.head_received, 2),
        "What they give it there, 0 to 1: the mean over the other tokens that can see it.",
    ),
    Column(
        "null",
        lambda r: "-" if r.head is None else short(r.head_null, 2),
        "What they would give it there under uniform attention, the null.",
    ),
    Column(
        "ViT|top",
        lambda r: f"{max(r.vit_drawn):.2f}" if r.vit_drawn else "-",
        "The most that a head of the vision tower gives its ViT token beyond uniform attention.",
    ),
    Column(
        "writes",
        lambda r: short(r.value_ratio, 2),
        "Norm of what the token writes in that head, over the mean of the other tokens. Near 0: "
        "attention is parked on it and nothing is said.",
    ),
    Column(
        "verdict",
        lambda r: r.verdict,
        "NOP: it writes at most 0.2 of what others write. broadcast: at least 0.5, and the head "
        "writes one direction (stable rank at most 1.5). mixed: neither (Fesser et al., 2606.08105). "
        "draws nothing: no head of the LLM attends to it. seen by few: fewer than 8 tokens see it.",
    ),
    Column(
        "V+L",
        lambda r: "yes" if r.overlap else "-",
        "Whether a V-sink meets the L rule too, in some layer. V wins, so it is not counted as L.",
    ),
)

ROW = Column("row", lambda r: str(r.batch), "Row of the batch.")


def columns_for(trace: SinkTrace) -> tuple[Column, ...]:
    """The columns; with the batch row where there are several."""
    return COLUMNS if len(trace.sample) == 1 else (ROW, *COLUMNS)


def of_kind(trace: SinkTrace, kind: str, row: int | None = None) -> list[SinkRecord]:
    """The records of one kind, those that draw most beyond uniform attention first."""
    own = [r for r in trace.records if r.kind == kind and row in (None, r.batch)]
    return sorted(own, key=lambda r: -r.excess if r.head is not None else 2.0)


def by_row(records: Iterable[SinkRecord]) -> list[SinkRecord]:
    """The same, row by row."""
    return sorted(records, key=lambda r: r.batch)


def counts(trace: SinkTrace, row: int | None = None) -> str:
    """``2 V-sinks, no L-sinks, 1 text sink``."""
    found = {kind: len(of_kind(trace, kind, row)) for kind in KINDS}
    shown = [
        plural(found[kind], noun) for kind, noun in KINDS.items() if kind in SINKS or found[kind]
    ]
    return ", ".join(shown)


def flagged_share(trace: SinkTrace) -> tuple[float, float]:
    """The shares of image tokens that are V-sinks, and that meet the L rule in the worst layer."""
    visual = (trace.sample.tokens.image >= 0).sum(dim=1).clamp(min=1)
    share = (trace.v_sinks.sum(dim=1) / visual).max()
    return float(share), float(trace.l_detection.fraction.max())


WIDTH = 110

KEY = (
    "born: block of the ViT or the LLM and the half that wrote the spike. Top head: layer.head where "
    "other tokens give it the most beyond uniform attention. ViT top: the same in the vision tower. "
    "Writes: size of its write over that of the other tokens. attention: the vision tower attends to it "
    "throughout, and the V rule does not flag it."
)

TOWERS = {"vision": "ViT", "language": "LLM"}


def trace_summary(trace: SinkTrace, *, limit: int = 10) -> str:
    """The sinks as a table for a terminal, how they were found, and what to beware of.

    Kinds of which there are none say "none found".

    Args:
        trace: The trace.
        limit: The most sinks of each kind to list, those that draw most first.

    Returns:
        Several lines without a line break at the end.
    """
    blocks = [f"Sinks: {counts(trace)}"]
    listed: list[SinkRecord] = []
    remarks: list[str] = []
    for kind, noun in KINDS.items():
        found = of_kind(trace, kind)
        listed += by_row(found[:limit])
        if not found and kind in SINKS:
            remarks.append(f"{noun}s: none found")
        elif len(found) > limit:
            remarks.append(f"{noun}s: {len(found) - limit} more, that draw less, are not listed")
    if listed:
        blocks.append(text_table(columns_for(trace), listed))
    if remarks:
        blocks.append("\n".join(remarks))
    if listed:
        blocks.append(_wrapped(KEY, "", ""))
    if trace.outcomes:
        blocks.append("\n".join(why_nothing(trace)))
        blocks.append(candidate_table(trace))
    blocks.append("\n".join(rules(trace)))
    blocks += [_wrapped(neat(warning), "Warning: ") for warning in trace.warnings]
    return "\n\n".join(blocks)


def why_nothing(trace: SinkTrace) -> list[str]:
    """For a tower in which nothing is flagged, what spikes there and what draws."""
    return [
        _wrapped(neat(text), f"{TOWERS[tower]}, nothing flagged: ", "  ")
        for tower, text in trace.outcomes.items()
    ]


def candidate_table(trace: SinkTrace) -> str:
    """The candidates of the towers in which nothing is flagged, as a table for a terminal."""
    heads = ["", "token", "medians", "layer", "drawn", "head", "refused because"]
    lines = [
        [
            TOWERS[c.tower],
            c.token,
            f"{c.medians:.0f}",
            str(c.spike_layer),
            "-" if c.drawn_at is None else f"{c.drawn:.2f}",
            "-" if c.drawn_at is None else f"{c.drawn_at[0]}.{c.drawn_at[1]}",
            c.reason,
        ]
        for c in trace.candidates
        if c.tower in trace.outcomes
    ]
    head = (
        "Most attended tokens and largest spikes there (largest |h| in medians; what a head draws):"
    )
    return head + "\n" + aligned([heads, *lines])


def text_table(columns: Sequence[Column], records: Sequence[SinkRecord]) -> str:
    """Records under their column heads, aligned; heads may take two lines."""
    heads = [column.head.split("|") for column in columns]
    tall = max(len(head) for head in heads)
    above = [[""] * (tall - len(head)) + head for head in heads]
    lines = [[head[i] for head in above] for i in range(tall)]
    lines += [[column.cell(record) for column in columns] for record in records]
    return aligned(lines, tall)


def rules(trace: SinkTrace) -> list[str]:
    """Which detectors were used, how they were chosen, what they flag, and the overlap."""
    share = flagged_share(trace)
    overlap = sum(record.overlap for record in trace.records)
    return [
        f"Detectors: {trace.chosen}",
        _wrapped(
            f"{neat(trace.v_detection.detector)} flags {share[0]:.1%} of the image tokens", "  V: "
        ),
        _wrapped(
            f"{neat(trace.l_detection.detector)} flags at most {share[1]:.1%} of them in a layer",
            "  L: ",
        ),
        f"Overlap: {plural(overlap, 'V-sink')} {'meets' if overlap == 1 else 'meet'} the L rule too",
    ]


def _wrapped(text: str, start: str, indent: str = "     ") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False
    )


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
        "<tr>" + "".join(_cell_html(_plain(value)) for value in line) + "</tr>"
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


def _cell_html(text: str) -> str:
    """A cell; long text may break into lines."""
    wrap = ' style="white-space:normal;min-width:16em"' if len(text) > LONG else ""
    return f"<td{wrap}>{escape(text)}</td>"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

"""The columns of a sink table: what they say, how they are written, what they mean.

One list serves the terminal, the notebook and the report, so that the three cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sinkscope.viz.words import plural, ranges, readable, short

if TYPE_CHECKING:
    from sinkscope.experiments.records import SinkRecord
    from sinkscope.experiments.trace import SinkTrace

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

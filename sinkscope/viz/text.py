"""A trace in a terminal: a compact table of sinks, the rules that found them, and the warnings."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sinkscope.viz.table import KINDS, Column, by_row, columns_for, counts, flagged_share, of_kind
from sinkscope.viz.words import aligned, neat, plural

if TYPE_CHECKING:
    from sinkscope.experiments.records import SinkRecord
    from sinkscope.experiments.trace import SinkTrace

WIDTH = 110
KEY = (
    "born: block of the ViT or the LLM and the half that wrote the spike. Top head: layer.head where "
    "it receives the most over its null (uniform attention). Writes: size of its write over that of "
    "the other tokens."
)


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
        if not found:
            remarks.append(f"{noun}s: none found")
        elif len(found) > limit:
            remarks.append(f"{noun}s: {len(found) - limit} more, that draw less, are not listed")
    if listed:
        blocks.append(text_table(columns_for(trace), listed))
    if remarks:
        blocks.append("\n".join(remarks))
    if listed:
        blocks.append(_wrapped(KEY, "", ""))
    blocks.append("\n".join(rules(trace)))
    blocks += [_wrapped(neat(warning), "Warning: ") for warning in trace.warnings]
    return "\n\n".join(blocks)


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

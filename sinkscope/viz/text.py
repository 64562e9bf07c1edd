"""A trace in a terminal: a compact table of sinks, the rules that found them, and the warnings."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sinkscope.viz.table import (
    KINDS,
    SINKS,
    Column,
    by_row,
    columns_for,
    counts,
    flagged_share,
    of_kind,
)
from sinkscope.viz.words import aligned, neat, plural

if TYPE_CHECKING:
    from sinkscope.experiments.records import SinkRecord
    from sinkscope.experiments.trace import SinkTrace

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

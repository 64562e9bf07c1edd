"""Time lines in interleaved rounds and write their table: what the benchmarks of cost share."""

from __future__ import annotations

import gc
import json
import math
import random
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Measure = Callable[[Callable[[], object]], tuple[float, int]]
"""Runs something and says how many seconds it took, and how many bytes at its peak (0: unknown)."""


@dataclass
class Line:
    """One line of a table; the first of a block is the plain pass, which ratios are formed with."""

    label: str
    run: Callable[[], object]
    aim: float | None = None
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    failed: str = ""

    def row(self, plain: Line) -> dict[str, Any]:
        row: dict[str, Any] = {"label": self.label, "aim": self.aim, "rounds": len(self.seconds)}
        if self.failed or plain.failed or not self.seconds:
            return row | {"failed": self.failed or ("no plain pass" if plain.failed else "no time")}
        ratios = [mine / theirs for mine, theirs in zip(self.seconds, plain.seconds, strict=True)]
        row |= {"seconds": statistics.median(self.seconds), "ratio": statistics.median(ratios)}
        row |= {"interval": interval(ratios), "peak": self.peak, "ratios": ratios}
        return row | {"met": None if self.aim is None else row["ratio"] <= self.aim}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Order statistics that hold the median in 95 % of cases; the whole range under six values."""
    ordered, n = sorted(values), len(values)
    below, tail = 0, 0.0
    while below < n // 2 and (tail := tail + math.comb(n, below) / 2**n) <= 0.025:
        below += 1
    below = max(below, 1)
    return ordered[below - 1], ordered[-below]


def time_rounds(
    lines: Sequence[Line], rounds: int, measure: Measure, until: float, *, warm: bool, strict: bool
) -> list[dict[str, Any]]:
    """Run every line once a round, in random order, until the rounds or the time are over.

    A round that the time ends is dropped as a whole, so that every ratio has both parts of one round. A
    line that fails is left out of later rounds and says why in its row; ``strict`` raises instead.

    Args:
        until: Of ``time.monotonic()``.
        warm: Whether a pass of every line comes first that does not count.
    """
    plain, last = lines[0], dict.fromkeys((line.label for line in lines), 0.0)
    for number in range(-warm, rounds):
        order = [line for line in lines if not line.failed]
        if number > 0:  # before, the plain pass goes first: without it there is nothing to compare
            random.Random(number).shuffle(order)
        found: dict[str, tuple[float, int]] = {}
        gc.collect()
        for line in order:
            start = time.monotonic()
            if start + last[line.label] > until:
                return [line.row(plain) for line in lines]
            try:
                found[line.label] = measure(line.run)
            except Exception as error:  # with one chance at a machine, what failed is a result
                if strict:
                    raise
                line.failed = f"{type(error).__name__}: {error}".splitlines()[0][:160]
                traceback.print_exc(limit=-4)
                if line is plain:
                    return [each.row(plain) for each in lines]
            last[line.label] = time.monotonic() - start
        for line in order if number >= 0 else ():
            if not line.failed:
                line.seconds.append(found[line.label][0])
                line.peak = max(line.peak, found[line.label][1])
    return [line.row(plain) for line in lines]


def table(rows: Sequence[dict[str, Any]], *, memory: bool, unit: str = "time") -> list[str]:
    """Rows as lines of Markdown."""
    head = ["", "rounds", unit, "× plain (95 % interval)", *["peak memory"] * memory, "aim", "met"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for row in rows:
        aim = "" if row["aim"] is None else f"{row['aim']:g}"
        if "failed" in row:
            cells = [row["label"], str(row["rounds"]), "", row["failed"].replace("|", "/")]
            cells += [*[""] * memory, aim, ""]
        else:
            low, high = row["interval"]
            cells = [row["label"], str(row["rounds"]), f"{row['seconds'] * 1e3:.1f} ms"]
            cells += [f"**{row['ratio']:.2f}** ({low:.2f}–{high:.2f})"]
            cells += [f"{row['peak'] / 2**30:.2f} GiB"] * memory
            cells += [aim, {None: "", True: "yes", False: "no"}[row["met"]]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Which aims are met, in one line."""
    asked = [row for row in rows if row["aim"] is not None]
    missed = [
        f"{row.get('block', '')} {row['label']} "
        f"({row['failed'] if 'failed' in row else format(row['ratio'], '.2f')})".lstrip()
        for row in asked
        if not row.get("met")
    ]
    count = f"{len(asked) - len(missed)} of {len(asked)} aims met"
    return f"{count}; missed: {', '.join(missed)}." if missed else f"{count}."


def write(report: dict[str, Any], text: str, path: Path) -> None:
    """The report as JSON, and its text as Markdown beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")

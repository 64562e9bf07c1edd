"""What a summary of a comparison says, in words: cells, counts and the note under every table.

Terminal, page, Markdown, LaTeX and figure take their words and numbers from here, so they agree.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sinkscope.errors import InputError, SelectionError
from sinkscope.experiments.comparison import count_comparisons
from sinkscope.viz.words import aligned

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = frozenset(
    {
        "task",
        "condition",
        "n",
        "accuracy",
        "delta",
        "delta_low",
        "delta_high",
        "touched",
        "changed",
    }
)
NONE = "none found"
TOO_FEW = "too few to draw from"
UNCHANGED = "0 (none changed)"
WIDTH = 110
"""Characters of a line in a terminal."""


def effects_text(
    summary: pd.DataFrame,
    *,
    tasks: Sequence[str] | None = None,
    base: str | None = None,
    width: int = WIDTH,
) -> str:
    """The same as `plot_effects`, as a table for a terminal.

    Args:
        summary: Of ``Comparison.summary()``.
        tasks: Which tasks to show, in this order; None for all.
        base: The condition that the others are compared with; None for the first.
        width: The most characters of a line; a table is cut into several where it is wider.

    Returns:
        Several lines: the accuracy of the base, the change in percentage points with its interval,
        a star where the interval excludes zero, and which conditions found nothing to edit.

    Raises:
        InputError: If the table is not such a summary.
        SelectionError: If there is no such task or condition.
    """
    table = effects_frame(summary, tasks=tasks, base=base)
    lines = [list(table.columns), *table.to_numpy().tolist()]
    out = [aligned(part) for part in _blocks(lines, width)]
    out += [textwrap.fill(note, width, break_on_hyphens=False) for note in table.attrs["notes"]]
    return "\n\n".join(out)


def effects_frame(
    summary: pd.DataFrame, *, tasks: Sequence[str] | None = None, base: str | None = None
) -> pd.DataFrame:
    """The cells of `effects_text`: a line per condition that edited something, a column per task.

    Args:
        summary: Of ``Comparison.summary()``.
        tasks: Which tasks to show, in this order; None for all.
        base: The condition that the others are compared with; None for the first.

    Returns:
        Texts. ``attrs["notes"]`` are the sentences that belong under the table.

    Raises:
        InputError: If the table is not such a summary.
        SelectionError: If there is no such task or condition.
    """
    import pandas as pd

    shown, base, others = check_summary(summary, tasks, base)
    cells = {(r["task"], r["condition"]): r for r in summary.to_dict("records")}
    digits = 1 if max(cells[task, base]["n"] for task in shown) >= 100 else 0
    alive = [c for c in others if found_in_any(summary, shown, c)]
    lines = [[base, *(f"{cells[task, base]['accuracy']:.{digits}%}" for task in shown)]]
    lines += [
        [c, *(change_text(cells.get((task, c)), digits, "{}*") for task in shown)] for c in alive
    ]
    heads = [f"{task} (n = {cells[task, base]['n']})" for task in shown]
    out = pd.DataFrame(lines, columns=["accuracy, then changes in points", *heads])
    notes = [note_on(summary, base, shown, "A star")]
    missing = [c for c in others if c not in alive]
    if missing:
        own = [c for c in missing if "random" not in c] or missing
        notes.insert(0, f"{NONE}, so nothing was edited: {', '.join(own)}")
    out.attrs["notes"] = notes
    return out


def note_on(summary: pd.DataFrame, base: str, tasks: Sequence[str], mark: str) -> str:
    """What a reader of the table must know, in one line.

    Args:
        summary: Of ``Comparison.summary()``.
        base: The condition that the others are compared with.
        tasks: The tasks that are shown.
        mark: What marks an interval that excludes zero, such as ``"Bold"``.
    """
    level = summary.attrs.get("level", 0.95)
    many = count_comparisons(summary, base, tasks)
    records = summary.to_dict("records")
    lines = [r for r in records if r["task"] in tasks and r["condition"] != base]
    if all(line["delta_low"] != line["delta_low"] for line in lines):
        out = "Changes in percentage points, without intervals, which need more than one image. "
        end = f"{_shown(many)}."
    else:
        out = (
            f"Changes in percentage points, with {100 * level:g} % intervals that resample "
            f"{resampled(summary)}. {mark}: the interval excludes zero. "
        )
        chance = many * (1 - level)
        about = f"{chance:.0f}" if chance >= 1 else f"{chance:.1g}"
        end = (
            f"{_shown(many)}, none corrected for their number: about {about} such intervals "
            "exclude zero by chance alone."
        )
    if any(unchanged(line) for line in lines):
        out += f'"{UNCHANGED}": no answer turned right or wrong, which is no proof of no effect. '
    return out + end


def change_text(line: Any, digits: int, strong: str) -> str:
    """The change of one task and condition in percentage points, with its interval.

    Args:
        line: Of the summary, or None if it has no such line.
        digits: Behind the decimal point.
        strong: How to write it where the interval excludes zero.
    """
    if line is None:
        return NONE
    if not found(line):
        return nothing(line)
    if unchanged(line):
        return UNCHANGED
    parts = (100 * line[name] for name in ("delta", "delta_low", "delta_high"))
    change, low, high = (f"{round(part, digits) + 0.0:+.{digits}f}" for part in parts)
    if line["delta_low"] != line["delta_low"]:
        return change
    text = f"{change} [{low}, {high}]"
    return strong.format(text) if clear(line) else text


def check_summary(
    summary: pd.DataFrame, tasks: Sequence[str] | None, base: str | None
) -> tuple[list[str], str, list[str]]:
    """The tasks to show, the base and the other conditions, after a look at the table."""
    missing = COLUMNS - set(getattr(summary, "columns", ()))
    if missing or not len(summary):
        raise InputError(
            f"Got a table that lacks {sorted(missing) or 'lines'}; expected what "
            "Comparison.summary() returns."
        )
    known = list(dict.fromkeys(summary["task"]))
    conditions: list[str] = list(dict.fromkeys(summary["condition"]))
    shown = sorted(known, key=lambda task: task != "all") if tasks is None else list(tasks)
    first = conditions[0] if base is None else base
    for kind, asked, there in (("task", shown, known), ("base", [first], conditions)):
        wrong = [name for name in asked if name not in there]
        if wrong or not asked:
            raise SelectionError(f"Got {kind} {wrong or asked}; expected some of {there}.")
    others = [condition for condition in conditions if condition != first]
    if not others:
        raise InputError(f"Got a table of {first!r} only; expected a second condition to compare.")
    return shown, first, others


def resampled(summary: pd.DataFrame) -> str:
    """What the intervals of a summary resample."""
    several = "seeds" in summary and bool((summary["seeds"] > 1).any())
    return "images and seeds" if several else "images"


def found(line: Any) -> bool:
    """Whether the condition touched a row of the task."""
    return bool(line["touched"] > 0)


def nothing(line: Any) -> str:
    """Why a condition touched no row."""
    return TOO_FEW if line.get("uncontrolled", 0) > 0 else NONE


def found_in_any(summary: pd.DataFrame, shown: Sequence[str], condition: str) -> bool:
    """Whether a condition touched a row in some of the tasks, or could not where it should."""
    own = summary[(summary["condition"] == condition) & summary["task"].isin(shown)]
    left = own["uncontrolled"] if "uncontrolled" in own else 0 * own["touched"]
    return bool(((own["touched"] > 0) | (left > 0)).any())


def clear(line: Any) -> bool:
    """Whether the interval excludes zero."""
    return bool(line["delta_low"] > 0 or line["delta_high"] < 0)


def unchanged(line: Any) -> bool:
    """Whether rows were edited and no answer turned right or wrong."""
    return found(line) and bool(line["changed"] == 0)


def _shown(many: int) -> str:
    return "1 change is shown" if many == 1 else f"{many} changes are shown"


def _blocks(lines: list[list[str]], width: int) -> list[list[list[str]]]:
    """The columns cut into tables that fit into a line, each with the first column."""
    widths = [max(len(line[i]) for line in lines) + 2 for i in range(len(lines[0]))]
    parts, used = [[0]], widths[0]
    for i in range(1, len(widths)):
        if used + widths[i] - 2 > width and len(parts[-1]) > 1:
            parts.append([0])
            used = widths[0]
        parts[-1].append(i)
        used += widths[i]
    return [[[line[i] for i in part] for line in lines] for part in parts]

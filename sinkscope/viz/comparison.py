"""The summary of a comparison as a table for a page: Markdown and LaTeX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinkscope.viz.effects import NONE, check_summary, nothing, resampled

if TYPE_CHECKING:
    import pandas as pd

MARKS = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "~": r"\textasciitilde{}"}


def comparison_markdown(summary: pd.DataFrame, *, base: str | None = None) -> str:
    """One line per condition, one column per task.

    Args:
        summary: Of ``Comparison.summary()``.
        base: The condition that the others are compared with; None for the first.

    Returns:
        The table and a note. The base has its accuracy with an interval; the others have the
        change in percentage points, with an interval, bold where it excludes zero.

    Raises:
        InputError: If the table is not such a summary.
    """
    lines = _cells(summary, base, "**{}**")
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    rule = f"|{'---|' * len(lines[0])}"
    return "\n".join([head, rule, *body, "", note_on(summary), ""])


def comparison_latex(summary: pd.DataFrame, *, base: str | None = None) -> str:
    """As `comparison_markdown`, for LaTeX (with the package booktabs).

    Args:
        summary: Of ``Comparison.summary()``.
        base: The condition that the others are compared with; None for the first.

    Returns:
        A ``tabular``, and the note as a comment under it.

    Raises:
        InputError: If the table is not such a summary.
    """
    lines = [[_escaped(cell) for cell in line] for line in _cells(summary, base, "<<{}>>")]
    rows = [" & ".join(line).replace("<<", r"\textbf{").replace(">>", "}") for line in lines]
    rows = [rf"{row} \\" for row in rows]
    body = [r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    columns = "l" + "r" * (len(lines[0]) - 1)
    out = [rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}", f"% {note_on(summary)}"]
    return "\n".join([*out, ""])


def note_on(summary: pd.DataFrame) -> str:
    """What a reader of the table must know, in one line."""
    level = summary.attrs.get("level", 0.95)
    many = summary.attrs.get("comparisons") or len(summary) - summary["task"].nunique()
    return (
        f"Changes in percentage points, with {100 * level:g} % intervals that resample {resampled(summary)}. "
        f"{many} changes are shown and none is corrected for that: about {many * (1 - level):.1g} "
        "such intervals exclude zero by chance alone."
    )


def _cells(summary: pd.DataFrame, base: str | None, strong: str) -> list[list[str]]:
    """The table as texts, its head first."""
    shown, first, others = check_summary(summary, None, base)
    cells = {(r["task"], r["condition"]): r for r in summary.to_dict("records")}
    head = ["condition", *(f"{task} (n = {cells[task, first]['n']})" for task in shown)]
    level = [first, *(_accuracy(cells[task, first]) for task in shown)]
    rest = [
        [name, *(_change(cells.get((task, name)), strong) for task in shown)] for name in others
    ]
    return [head, level, *rest]


def _accuracy(line: Any) -> str:
    return f"{100 * line['accuracy']:.1f}{_between(line['low'], line['high'], '.1f')}"


def _change(line: Any, strong: str) -> str:
    if line is None or not line["touched"] > 0:
        return NONE if line is None else nothing(line)
    text = f"{100 * line['delta']:+.1f}{_between(line['delta_low'], line['delta_high'], '+.1f')}"
    clear = line["delta_low"] > 0 or line["delta_high"] < 0
    return strong.format(text) if clear else text


def _between(low: float, high: float, form: str) -> str:
    """An interval in percentage points; nothing if there is none."""
    return "" if low != low or high != high else f" [{100 * low:{form}}, {100 * high:{form}}]"


def _escaped(text: str) -> str:
    return "".join(MARKS.get(letter, letter) for letter in text)

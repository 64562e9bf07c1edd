"""The summary of a comparison as a table for a page: Markdown and LaTeX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinkscope.viz.changes import NONE, change_text, check_summary, note_on

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
    lines, note = _cells(summary, base, "**{}**")
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    rule = f"|{'---|' * len(lines[0])}"
    return "\n".join([head, rule, *body, "", note, ""])


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
    cells, note = _cells(summary, base, "<<{}>>")
    lines = [[_escaped(cell) for cell in line] for line in cells]
    rows = [" & ".join(line).replace("<<", r"\textbf{").replace(">>", "}") for line in lines]
    rows = [rf"{row} \\" for row in rows]
    body = [r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    columns = "l" + "r" * (len(lines[0]) - 1)
    out = [rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}", f"% {note}"]
    return "\n".join([*out, ""])


def _cells(summary: pd.DataFrame, base: str | None, strong: str) -> tuple[list[list[str]], str]:
    """The table as texts, its head first, and the note under it."""
    shown, first, others = check_summary(summary, None, base)
    cells = {(r["task"], r["condition"]): r for r in summary.to_dict("records")}
    head = ["condition", *(f"{task} (n = {cells[task, first]['n']})" for task in shown)]
    level = [first, *(_accuracy(cells[task, first]) for task in shown)]
    rest = [
        [name, *(change_text(cells.get((task, name)), 1, strong) for task in shown)]
        for name in others
    ]
    note = note_on(summary, first, shown, "Bold")
    if any(NONE in line for line in rest):
        note += f' "{NONE}": there was no such token, so nothing was edited.'
    return [head, level, *rest], note


def _accuracy(line: Any) -> str:
    """In percent, with its interval if there is one."""
    low, high = line["low"], line["high"]
    between = "" if low != low or high != high else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * line['accuracy']:.1f}{between}"


def _escaped(text: str) -> str:
    return "".join(MARKS.get(letter, letter) for letter in text)

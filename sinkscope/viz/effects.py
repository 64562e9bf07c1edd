"""What a summary of a comparison says, in words: cells, counts and the note under every table.

Terminal, page, Markdown, LaTeX and figure take their words and numbers from here, so they agree.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sinkscope.errors import InputError, SelectionError
from sinkscope.experiments.comparing import count_comparisons
from sinkscope.viz.style import (
    LABEL,
    QUIET,
    SMALL,
    STYLES,
    TITLE,
    dress,
    figure_of,
    legend_below,
    new_axes,
    new_figure,
)
from sinkscope.viz.tables import aligned

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sinkscope.experiments.controls import ControlResult

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


REAL, RANDOM = STYLES["V-sinks"], STYLES["L-sinks"]

"""The edit, and other tokens edited in the same way."""

SAME = "|"

"""Where no answer changed: a point with an interval of no width would look like certainty."""

ACROSS = 6

"""Tasks side by side."""

NAME = 34

"""Characters of a line of a condition's name in the figure."""


def plot_effects(
    summary: pd.DataFrame, *, tasks: Sequence[str] | None = None, base: str | None = None
) -> Figure:
    """The change of accuracy under every condition, task by task, with intervals.

    A filled point has an interval that excludes zero; a stroke at zero says that no answer turned
    right or wrong. Conditions whose names say "random" (the controls of
    `sinkscope.experiments.effect_table`) are squares of another colour. Where no row was touched,
    because there is no such token, it says "none found"; controls of such conditions are left out. A
    control says "too few to draw from" where that is why nothing was touched.

    Args:
        summary: Of ``Comparison.summary()``.
        tasks: Which tasks to show, in this order; None for all.
        base: The condition that the others are compared with; None for the first.

    Returns:
        The figure: one panel per task, with the accuracy of the base above it.

    Raises:
        InputError: If the table is not such a summary.
        SelectionError: If there is no such task or condition.
    """
    shown, base, others = check_summary(summary, tasks, base)
    across = min(ACROSS, len(shown))
    down = -(-len(shown) // across)
    others = [c for c in others if "random" not in c or found_in_any(summary, shown, c)]
    width = 3.1 + 1.75 * across
    figure = new_figure((width, down * (1.3 + 0.3 * len(others)) + 1.1))
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten()
    reach = _reach(summary, shown)
    for i, (ax, task) in enumerate(zip(grid, shown, strict=False)):
        lines = summary[summary["task"] == task].set_index("condition")
        _draw_task(ax, lines, others)
        before = lines.loc[base]
        head = f"{task}\n{before['accuracy']:.0%}, n = {before['n']:.0f}"
        ax.set_title(head, fontsize=LABEL, loc="left")
        ax.set_xlim(-reach, reach)
        if i + across >= len(shown):
            ax.set_xlabel("change (points)", fontsize=LABEL)
            ax.tick_params(labelbottom=True)
    for ax in grid[len(shown) :]:
        ax.set_visible(False)
    names = [textwrap.fill(name, NAME) for name in others]
    grid[0].set_yticks(range(len(others)), names)
    grid[0].set_ylim(len(others) - 0.4, -0.6)
    text = (
        f"Change of accuracy in percentage points, with intervals over {resampled(summary)}. "
        f"Above each panel: accuracy of “{base}”. None of the "
        f"{count_comparisons(summary, base, shown)} changes is corrected for their number."
    )
    figure.suptitle(textwrap.fill(text, int(11.5 * width)), fontsize=TITLE, x=0.01, ha="left")
    _legend(figure, others, across, _any_unchanged(summary, shown, others))
    return figure


def plot_control(
    result: ControlResult, row: int = 0, *, label: str | None = None, ax: Axes | None = None
) -> Figure:
    """The edit as a line over the histogram of its random controls, with its two-sided p value.

    Args:
        result: Of ``RandomControl(...).run(...)``.
        row: The row of the batch.
        label: What the score is, with its unit; None for what the result says.
        ax: Where to draw, or None for a new figure.

    Returns:
        The figure.

    Raises:
        SelectionError: If there is no such row.
    """
    rows = len(result.real)
    if not 0 <= row < rows:
        raise SelectionError(f"Got row {row}; expected 0 to {rows - 1}: a row of the batch.")
    controls, real = result.controls[:, row].tolist(), float(result.real[row])
    base, p = float(result.base[row]), float(result.p_value()[row])
    low, high = (float(edge[row]) for edge in result.interval())
    ax = new_axes(ax, (5.6, 3.8))
    name = f"{len(controls)} random controls (same {result.match})"
    edges = _edges([*controls, real, base])
    ax.hist(controls, edges, color=RANDOM.colour, alpha=0.55, edgecolor="white", label=name)
    ax.axvspan(low, high, ymax=0.035, color=RANDOM.colour, label="their central 95 %")
    ax.axvline(real, color=REAL.colour, linewidth=2.2, label=f"the edit, p = {p:.2g}")
    ax.axvline(base, color=QUIET, linewidth=1.2, linestyle=":", label="without an edit")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.margins(x=0.04)
    dress(
        ax, "The edit and the same edit of other tokens", label or result.score, "number of draws"
    )
    legend_below(ax, points=40.0)
    return figure_of(ax)


def _draw_task(ax: Axes, lines: pd.DataFrame, others: list[str]) -> None:
    """One point and its interval per condition."""
    ax.axvline(0, color=QUIET, linewidth=1)
    for y, condition in enumerate(others):
        line = lines.loc[condition]
        if not found(line):
            ax.text(0, y, f" {nothing(line)} ", fontsize=SMALL - 1, color=QUIET, ha="center", va="center",
                    backgroundcolor="white")  # fmt: skip
            continue
        style = _style(condition)
        if unchanged(line):
            ax.plot(0, y, SAME, color=style.colour, markersize=10, markeredgewidth=1.5)
            continue
        ends = [100 * line["delta_low"], 100 * line["delta_high"]]
        ax.plot(ends, [y, y], color=style.colour, linewidth=1.8, solid_capstyle="butt")
        face = style.colour if clear(line) else "white"
        ax.plot(100 * line["delta"], y, style.marker, color=style.colour, markerfacecolor=face,
                markersize=6, markeredgewidth=1.5)  # fmt: skip
    ax.tick_params(labelsize=SMALL)
    ax.grid(visible=True, axis="x", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))


def _style(condition: str) -> Any:
    return RANDOM if "random" in condition else REAL


def _reach(summary: pd.DataFrame, shown: list[str]) -> float:
    """Half of the x axis: all intervals fit, zero is in the middle."""
    own = summary[summary["task"].isin(shown)]
    numbers = [abs(x) for name in ("delta", "delta_low", "delta_high") for x in own[name].tolist()]
    return max(2.0, 108 * max(x for x in numbers if x == x))


def _any_unchanged(summary: pd.DataFrame, shown: list[str], others: list[str]) -> bool:
    own = (r for r in summary.to_dict("records") if r["task"] in shown)
    return any(unchanged(line) for line in own if line["condition"] in others)


def _legend(figure: Figure, others: list[str], across: int, same: bool) -> None:
    """What the marks mean, under the panels."""
    kinds = {"condition": REAL}
    if any("random" in condition for condition in others):
        kinds["random tokens"] = RANDOM
    marks = {
        name: Line2D([], [], color=style.colour, marker=style.marker, markersize=6)
        for name, style in kinds.items()
    }
    hollow = {"color": QUIET, "linestyle": "", "marker": "o", "markersize": 6}
    marks["interval excludes 0"] = Line2D([], [], **hollow)
    marks["interval holds 0"] = Line2D([], [], **hollow, markerfacecolor="white")
    if same:
        marks["no answer changed"] = Line2D([], [], **(hollow | {"marker": SAME, "markersize": 10}))
    figure.legend(
        marks.values(),
        marks.keys(),
        loc="outside lower left",
        ncols=5 if across > 1 else 2,
        fontsize=SMALL,
        frameon=False,
    )


def _edges(values: list[float], bins: int = 24) -> list[float]:
    """Edges of equal bins over all values."""
    low, high = min(values), max(values)
    step = (high - low) / bins or max(abs(low), 1.0) / bins
    return [low + i * step for i in range(bins + 1)]

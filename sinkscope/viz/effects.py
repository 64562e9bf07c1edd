"""What edits did: changes of accuracy with intervals, and an edit beside its random controls."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sinkscope.errors import SelectionError
from sinkscope.experiments.comparison import count_comparisons
from sinkscope.viz.changes import (
    check_summary,
    clear,
    found,
    found_in_any,
    nothing,
    resampled,
    unchanged,
)
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

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sinkscope.interventions.controls import ControlResult

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

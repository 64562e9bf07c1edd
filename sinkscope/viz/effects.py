"""What edits did, in text, tables and figures, with the same words and numbers in all of them."""

import textwrap
from collections.abc import Sequence
from typing import Any, TypeAlias

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sinkscope.checks import among, check_whole
from sinkscope.errors import InputError, SelectionError
from sinkscope.viz import theme
from sinkscope.viz.tables import WIDTH, aligned, as_cell, render
from sinkscope.viz.theme import LABEL, QUIET, SMALL, STYLES

Tasks: TypeAlias = Sequence[str] | None
COLUMNS = "task condition n accuracy delta delta_low delta_high touched changed"
NONE, UNCHANGED = "none found", "0 (none changed)"

REAL, RANDOM = STYLES["V-sinks"], STYLES["L-sinks"]  # the edit, and other tokens edited likewise


def count_comparisons(summary: pd.DataFrame, base: str, tasks: Tasks = None) -> int:
    """Count the changes to the base that a summary reports: tasks and conditions that touched a row."""
    shown: Any = summary[(summary["condition"] != base) & (summary["touched"] > 0)]
    return len(shown) if tasks is None else int(shown["task"].isin(tasks).sum())


class Effects:
    """A checked summary: the tasks to show, the base and the other conditions, and what cells say."""

    def __init__(self, summary: pd.DataFrame, tasks: Tasks = None, base: str | None = None) -> None:
        theme.check_table(summary, COLUMNS, "what Comparison.estimates() returns")
        known = list(dict.fromkeys(summary["task"]))
        conditions: list[str] = list(dict.fromkeys(summary["condition"]))
        if tasks is not None and (isinstance(tasks, str) or not isinstance(tasks, Sequence)):
            raise SelectionError(f"Got tasks={tasks!r}; expected a list of some of {known}.")
        self.tasks = sorted(known, key=lambda t: t != "all") if tasks is None else list(tasks)
        self.base = conditions[0] if base is None else base
        for kind, asked, there in (("task", self.tasks, known), ("base", [self.base], conditions)):
            wrong = [name for name in asked if not among(name, there)]
            if wrong or not asked:
                raise SelectionError(f"Got {kind} {wrong or asked}; expected some of {there}.")
        self.others = [condition for condition in conditions if condition != self.base]
        if not self.others:
            raise InputError(
                f"Got a table of {self.base!r} only; expected a second condition to compare."
            )
        several = "seeds" in summary and bool((summary["seeds"] > 1).any())
        self.resampled = "images and seeds" if several else "images"
        self.many = count_comparisons(summary, self.base, self.tasks)
        self.level = summary.attrs.get("level", 0.95)
        shown: Any = summary[summary["task"].isin(self.tasks)]
        self.lines = {(line["task"], line["condition"]): line for line in shown.to_dict("records")}
        there = {name for (_, name), line in self.lines.items() if _words(line) != NONE}
        self.missing = [name for name in self.others if name not in there]
        self.before = [self.lines[task, self.base] for task in self.tasks]
        self.heads = [f"{line['task']} (n = {line['n']})" for line in self.before]

    def row(self, name: str, digits: int, strong: str) -> list[str]:
        """A condition and its changes, a column per task."""
        return [name, *(_change(self.lines.get((t, name)), digits, strong) for t in self.tasks)]

    def note(self, mark: str) -> str:
        """What a reader of the table must know; ``mark`` tells an interval that excludes zero."""
        lines = [line for (_, name), line in self.lines.items() if name != self.base]
        chance = self.many * (1 - self.level)
        given = {
            "plain": all(line["delta_low"] != line["delta_low"] for line in lines),
            "same": UNCHANGED if UNCHANGED in map(_words, lines) else "",
            "about": f"{chance:.0f}" if chance >= 1 else f"{chance:.1g}",
        }
        return render("changes.txt", effects=self, mark=mark, **given)


def _change(line: Any, digits: int, strong: str) -> str:
    """A change in points with its interval, written as ``strong`` where that excludes zero."""
    if words := _words(line):
        return words
    parts = (100 * line[name] for name in ("delta", "delta_low", "delta_high"))
    change, low, high = (f"{round(part, digits) + 0.0:+.{digits}f}" for part in parts)
    if line["delta_low"] != line["delta_low"]:
        return change
    clear = line["delta_low"] > 0 or line["delta_high"] < 0
    return (strong if clear else "{}").format(f"{change} [{low}, {high}]")


def _words(line: Any) -> str:
    """What stands in place of a change: nothing was edited, or no answer changed; else empty."""
    if line and line["touched"] > 0:
        return UNCHANGED if line["changed"] == 0 else ""
    return "too few to draw from" if line and line.get("uncontrolled", 0) > 0 else NONE


def effects_text(
    summary: pd.DataFrame, *, tasks: Tasks = None, base: str | None = None, width: int = WIDTH
) -> str:
    """Write what `plot_effects` shows as a table for a terminal, cut into several where it is wider.

    The change in percentage points has its interval, with a star where that excludes zero.
    """
    check_whole(20, width=width)
    table = effects_frame(summary, tasks=tasks, base=base)
    lines = [list(table.columns), *table.to_numpy().tolist()]
    widths = [max(len(line[i]) for line in lines) + 2 for i in range(len(lines[0]))]
    blocks = [[0]]
    for i in range(1, len(widths)):
        if sum(widths[j] for j in [*blocks[-1], i]) - 2 > width and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(i)
    out = [aligned([[line[i] for i in block] for line in lines]) for block in blocks]
    out += [textwrap.fill(note, width, break_on_hyphens=False) for note in table.attrs["notes"]]
    return "\n\n".join(out)


def effects_frame(
    summary: pd.DataFrame, *, tasks: Tasks = None, base: str | None = None
) -> pd.DataFrame:
    """The cells of `effects_text`, with the sentences under them in ``attrs["notes"]``."""
    effects = Effects(summary, tasks, base)
    digits = 1 if max(line["n"] for line in effects.before) >= 100 else 0
    lines = [[effects.base, *(f"{line['accuracy']:.{digits}%}" for line in effects.before)]]
    lines += [effects.row(c, digits, "{}*") for c in effects.others if c not in effects.missing]
    out = pd.DataFrame(lines, columns=["accuracy, then changes in points", *effects.heads])
    out.attrs["notes"] = [effects.note("A star")]
    if own := [name for name in effects.missing if "random" not in name] or effects.missing:
        out.attrs["notes"].insert(0, f"{NONE}, so nothing was edited: {', '.join(own)}")
    return out


def comparison_markdown(summary: pd.DataFrame, *, base: str | None = None) -> str:
    """Write accuracy of the base and changes, a line per condition, a column per task, and a note."""
    lines, note = _cells(summary, base, "**{}**")
    lines = [[*map(as_cell, lines[0])], *([as_cell(c), *x] for c, *x in lines[1:])]
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, f"|{'---|' * len(lines[0])}", *body, "", note, ""])


def comparison_latex(summary: pd.DataFrame, *, base: str | None = None) -> str:
    """Write `comparison_markdown` as a ``tabular`` for booktabs, the note as a comment under it."""
    (head, *body), note = _cells(summary, base, "\x02{}\x03")
    align = "l" + "r" * (len(head) - 1)
    table = pd.DataFrame(body, columns=head).to_latex(index=False, escape=True, column_format=align)
    table = table.replace("\x02", "\\textbf{").replace("\x03", "}")  # in no name
    return f"{table}% {note}\n"


def _cells(summary: pd.DataFrame, base: str | None, strong: str) -> tuple[list[list[str]], str]:
    """The table as texts, its head first, and the note under it."""
    effects = Effects(summary, None, base)
    level = [effects.base]
    for line in effects.before:
        accuracy, low, high = (f"{100 * line[name]:.1f}" for name in ("accuracy", "low", "high"))
        level.append(accuracy if "nan" in (low, high) else f"{accuracy} [{low}, {high}]")
    rest, note = [effects.row(c, 1, strong) for c in effects.others], effects.note("Bold")
    if any(NONE in line for line in rest):
        note += f' "{NONE}": there was no such token, so nothing was edited.'
    return [["condition", *effects.heads], level, *rest], note


def plot_effects(summary: pd.DataFrame, *, tasks: Tasks = None, base: str | None = None) -> Figure:
    """Draw the change of accuracy under every condition, task by task, with intervals.

    A filled point has an interval that excludes zero; a stroke at zero says that no answer turned
    right or wrong. Conditions with "random" in their name (controls) are squares. "none found": there is
    no such token, so no row was touched, and its control is left out. "too few to draw from": the same
    of a control. The ``summary`` is that of ``Comparison.estimates()``; ``tasks`` are shown in their order,
    None for all; ``base`` is the condition to compare with, None for the first.
    """
    effects = Effects(summary, tasks, base)
    shown, lines, across = effects.tasks, effects.lines, min(6, len(effects.tasks))
    others = [c for c in effects.others if "random" not in c or c not in effects.missing]
    tall = -(-len(shown) // across) * (1.3 + 0.3 * len(others)) + 1.1
    figure = theme.new_figure((3.1 + 1.75 * across, tall))
    axes = theme.panels(figure, len(shown), across, sharex=True, sharey=True)
    ends = [abs(li[d]) for li in lines.values() for d in ("delta", "delta_low", "delta_high")]
    reach = max(2.0, 108 * max(end for end in ends if end == end))
    for i, (ax, task) in enumerate(zip(axes, shown, strict=True)):
        for y, name in enumerate(others):
            _draw_change(ax, y, lines.get((task, name)), RANDOM if "random" in name else REAL)
        ax.axvline(0, color=QUIET, linewidth=1, zorder=1.9)
        theme.plain(ax, "x", ("top", "right", "left"))
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}" if x else "0"))
        head = f"{task}\n{effects.before[i]['accuracy']:.0%}, n = {effects.before[i]['n']:.0f}"
        ax.set_title(head, fontsize=LABEL, loc="left")
        ax.set_xlim(-reach, reach)
        ax.set_xlabel("change (points)" if i + across >= len(shown) else "", fontsize=LABEL)
    axes[0].set_yticks(range(len(others)), [textwrap.fill(name, 34) for name in others])
    axes[0].set_ylim(len(others) - 0.4, -0.6)
    theme.headline(
        figure,
        f"Change of accuracy in percentage points, with intervals over {effects.resampled}. Above each "
        f"panel: accuracy of “{effects.base}”. None of the {effects.many} changes is corrected for "
        "their number.",
    )
    marks = {"condition": theme.entry(**REAL.look, markersize=6)}
    if any("random" in name for name in others):
        marks["random tokens"] = theme.entry(**RANDOM.look, markersize=6)
    hollow = {"color": QUIET, "linestyle": "", "marker": "o", "markersize": 6}
    marks["interval excludes 0"] = theme.entry(**hollow)
    marks["interval holds 0"] = theme.entry(**hollow, markerfacecolor="white")
    if any(_words(line) == UNCHANGED for (_, name), line in lines.items() if name in others):
        marks["no answer changed"] = theme.entry(**hollow | {"marker": "|", "markersize": 10})
    return theme.legend_of(figure, marks, 5 if across > 1 else 2)


def _draw_change(ax: Any, y: int, line: Any, style: Any) -> None:
    """A point with its interval, a stroke where no answer changed, or words."""
    if (words := _words(line)) == UNCHANGED:
        ax.plot(0, y, "|", color=style.colour, markersize=10, markeredgewidth=1.5)
    elif words:
        look = {"fontsize": SMALL - 1, "color": QUIET, "ha": "center", "va": "center"}
        ax.text(0, y, f" {words} ", **look, backgroundcolor="white")
    else:
        ends = [100 * line["delta_low"], 100 * line["delta_high"]]
        ax.plot(ends, [y, y], color=style.colour, linewidth=1.8, solid_capstyle="butt")
        face = style.colour if ends[0] > 0 or ends[1] < 0 else "white"
        look = {"markerfacecolor": face, "markersize": 6, "markeredgewidth": 1.5}
        ax.plot(100 * line["delta"], y, linestyle="", **style.look, **look)


def plot_control(
    result: Any, row: int = 0, *, label: str | None = None, ax: Axes | None = None
) -> Figure:
    """Draw the edit over the histogram of its random controls, with its two-sided p value.

    The ``result`` is that of ``RandomControl(...).run(...)``; ``label`` says what the score is, with its
    unit, None for what the result says.
    """
    theme.check_place(len(result.real), row=row)
    parts = (result.real, result.base, result.p_value(), *result.interval())
    real, base, p, low, high = (float(part[row]) for part in parts)
    controls = result.controls[:, row].tolist()
    ax = theme.new_axes(ax, (5.6, 3.8))
    name = f"{len(controls)} random controls (same {result.match})"
    least, most = min(*controls, real, base), max(*controls, real, base)
    step = (most - least) / 24 or max(abs(least), 1.0) / 24
    edges = [least + i * step for i in range(25)]
    ax.hist(controls, edges, color=RANDOM.colour, alpha=0.55, edgecolor="white", label=name)
    ax.axvspan(low, high, ymax=0.035, color=RANDOM.colour, label="their central 95 %")
    ax.axvline(real, color=REAL.colour, linewidth=2.2, label=f"the edit, p = {p:.2g}")
    ax.axvline(base, color=QUIET, linewidth=1.2, linestyle=":", label="without an edit")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.margins(x=0.04)
    title = "The edit and the same edit of other tokens"
    return theme.finish(ax, title, label or result.score, "number of draws", points=40.0)

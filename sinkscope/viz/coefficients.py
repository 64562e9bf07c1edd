"""What gates answer: mean coefficients by layer and task, a panel per group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D

from sinkscope.errors import InputError
from sinkscope.viz.style import LABEL, QUIET, SMALL, STYLES, TITLE, new_figure, ticks_for
from sinkscope.viz.training import COLOURS, MARKERS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEEDED = frozenset(
    {"task", "layer", "group", "coefficient", "low", "high", "untrained", "tokens", "n"}
)
NAMES = {"V": "V-sinks", "L": "L-sinks", "rest": "other image tokens"}
"""Group -> what it is called, in the order of the panels."""
ALL = "all"
UNTRAINED: dict[str, Any] = {"color": QUIET, "linewidth": 1, "linestyle": (0, (4, 3))}
WIDE = 0.5
"""How far apart the tasks of one layer stand together, in layers."""
BARS = 8
"""With more layers than this, intervals are bands."""


def plot_coefficients(table: pd.DataFrame) -> Figure:
    """Mean coefficients over the layers that gates read, with intervals.

    Every panel is a group and every line a task; all questions together are black. The dashed line is
    what an untrained gate gives. A hollow mark says that no question has such a token, so that the
    coefficient acts on nothing.

    Args:
        table: Of ``GateCoefficients.to_dataframe()``.

    Returns:
        The figure.

    Raises:
        InputError: If the table is no such one.
    """
    missing = sorted(NEEDED - set(table.columns))
    if missing or not len(table):
        raise InputError(
            f"Got a table with {sorted(table.columns)} and {len(table)} lines; expected that of "
            f"gate_coefficients(...).to_dataframe(), missing {missing}."
        )
    groups = [group for group in NAMES if (table["group"] == group).any()]
    tasks, layers = list(dict.fromkeys(table["task"])), sorted(set(table["layer"]))
    width = max(2.8, min(6.0, 0.9 + 0.16 * len(layers) * max(2.0, 0.6 * len(tasks))))
    figure = new_figure((0.6 + len(groups) * width, 3.7))
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for ax, group in zip(panels, groups, strict=True):
        _draw_group(ax, table[table["group"] == group], tasks, layers)
        ax.set_title(NAMES[group], fontsize=TITLE, loc="left")
    panels[0].set_ylabel("factor of the keys", fontsize=LABEL)
    panels[0].set_ylim(bottom=0)
    _legend(figure, table, tasks)
    return figure


def _draw_group(ax: Axes, own: Any, tasks: list[str], layers: list[int]) -> None:
    """A line per task; of few layers they stand side by side within a layer."""
    bands = len(layers) > BARS
    wide = 0.0 if bands or len(tasks) == 1 else WIDE
    steps = np.linspace(-wide / 2, wide / 2, len(tasks))
    null = own.drop_duplicates("layer").sort_values("layer")
    edges = [layers.index(layer) for layer in null["layer"]]
    for x, value in zip(edges, null["untrained"], strict=True):
        ax.plot([x - 0.5, x + 0.5], [value, value], **UNTRAINED)
    for place, task in enumerate(tasks):
        part = own[own["task"] == task].sort_values("layer")
        look = look_of(task, place)
        x = np.array([layers.index(layer) for layer in part["layer"]]) + steps[place]
        y, low, high = (part[name].to_numpy(dtype=float) for name in ("coefficient", "low", "high"))
        ax.plot(x, y, color=look["color"], linewidth=1.2, alpha=0.6)
        if bands:
            ax.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
        else:
            ax.vlines(x, low, high, color=look["color"], linewidth=1.4)
        empty = part["tokens"].to_numpy() == 0
        for chosen, face in ((~empty, look["color"]), (empty, "white")):
            size = 3.5 if bands else 5
            ax.plot(
                x[chosen], y[chosen], **look, linestyle="", markersize=size, markerfacecolor=face
            )
    shown = ticks_for(len(layers), 10)
    names = ["embed" if layer == -1 else str(layer) for layer in layers]
    ax.set_xticks(shown, [names[i] for i in shown], fontsize=SMALL)
    ax.set_xlim(-0.6, len(layers) - 0.4)
    ax.set_xlabel("layer that the gate reads", fontsize=LABEL)
    ax.tick_params(labelsize=SMALL)
    ax.grid(visible=True, axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def look_of(task: str, place: int) -> dict[str, Any]:
    """Colour and marker of a task; of all questions together black."""
    if task == ALL:
        return {"color": "black", "marker": STYLES["ordinary"].marker}
    again = place // len(COLOURS)  # further tasks have a colour again, with another marker
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[(place + again) % len(MARKERS)],
    }


def _legend(figure: Figure, table: pd.DataFrame, tasks: list[str]) -> None:
    """Tasks with their numbers of questions, and what lines and marks mean."""
    marks: dict[str, Any] = {}
    for place, task in enumerate(tasks):
        n = int(table.loc[table["task"] == task, "n"].iloc[0])
        marks[f"{task} (n = {n})"] = Line2D([], [], **look_of(task, place), markersize=5)
    marks["untrained gate"] = Line2D([], [], **UNTRAINED)
    if (table["tokens"] == 0).any():
        hollow: dict[str, Any] = {"color": QUIET, "marker": "o", "markerfacecolor": "white"}
        marks["no such token"] = Line2D([], [], **hollow, linestyle="", markersize=5)
    figure.legend(
        marks.values(),
        marks.keys(),
        loc="outside lower left",
        ncols=4 if figure.get_figwidth() > 7 else 2,
        fontsize=SMALL,
        frameon=False,
    )

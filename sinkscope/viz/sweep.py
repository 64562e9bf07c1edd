"""The layer x coefficient map as heat maps, one per task."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D

from sinkscope.errors import InputError
from sinkscope.viz.style import LABEL, SMALL, TITLE, new_figure, ticks_for
from sinkscope.viz.ternary import fits_triangles, plot_triangles

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = frozenset(
    {"task", "layer", "pair", "s_v", "s_rest", "n", "base", "delta", "low", "high", "clear"}
)
COLOURS = "PuOr_r"
"""Orange above the base, purple below: apart for colour-blind readers, and white at no change."""
DOT: dict[str, Any] = {
    "marker": "o",
    "linestyle": "",
    "color": "black",
    "markersize": 4,
    "markeredgecolor": "white",
    "markeredgewidth": 0.5,
}
ACROSS = 3
"""Tasks side by side."""
LETTERS = 13.0
"""Letters of a panel's title that fit into an inch."""


def plot_sweep(table: pd.DataFrame, *, score: str = "exact answers (points)") -> Figure:
    """The change against the base in every cell, one heat map per task with one scale for all.

    A dot marks a cell whose interval excludes 0; of many cells without an effect one in twenty has
    one too. Triples that add to 1 are drawn as triangles, one per layer and task: V-sinks at the top,
    L-sinks on the left, ordinary tokens on the right. Other triples stand side by side, as pairs do.

    Args:
        table: Of ``Sweep.map()``.
        score: What is shown, with its unit; ``(points)`` shows fractions times 100.

    Returns:
        The figure.

    Raises:
        InputError: If the table is no such map.
    """
    missing = sorted(COLUMNS - set(table.columns))
    if missing or table.empty:
        raise InputError(
            f"Got a table with {sorted(table.columns)} and {len(table)} lines; expected that of "
            f"sweep.map(), missing {missing}."
        )
    factor = 100.0 if "points" in score else 1.0
    reach = max(float(table["delta"].abs().max()) * factor, 1e-9)
    scale = Normalize(-reach, reach)
    if fits_triangles(table):
        figure = plot_triangles(table, factor, scale, COLOURS, DOT)
        figure.suptitle(f"Change of {score}", fontsize=TITLE, x=0.01, ha="left")
        return figure
    under = "s_V / s_L / s_rest" if "s_l" in table else "s_V (V-sinks) / s_rest (other)"
    tasks = list(dict.fromkeys(table["task"]))
    across = min(ACROSS, len(tasks))
    down = -(-len(tasks) // across)
    layers, pairs = table["layer"].nunique(), table["pair"].nunique()
    width = max(2.6, 0.27 * pairs)
    titles = [_title(table[table["task"] == task].iloc[0], factor, width) for task in tasks]
    lines = max(title.count("\n") for title in titles)
    size = (
        1.6 + across * width,
        1.3 + down * (1.25 + 0.15 * lines + min(4.2, 0.26 * layers + 0.3)),
    )
    figure = new_figure(size)
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    axes = list(grid.flatten())
    for i, (ax, task) in enumerate(zip(axes, tasks, strict=False)):
        _draw(ax, cast("pd.DataFrame", table[table["task"] == task]), factor, scale)
        ax.set_title(titles[i], fontsize=LABEL, loc="left")
        if i + across >= len(tasks):
            ax.set_xlabel(under, fontsize=LABEL)
            ax.tick_params(labelbottom=True)
        if i % across == 0:
            ax.set_ylabel("layer (edited: next block)", fontsize=LABEL)
    for ax in axes[len(tasks) :]:
        ax.set_visible(False)
    bar = figure.colorbar(ScalarMappable(scale, COLOURS), ax=grid, shrink=0.8, pad=0.02)
    bar.set_label("change against the base", fontsize=LABEL)
    bar.ax.tick_params(labelsize=SMALL)
    figure.suptitle(f"Change of {score}", fontsize=TITLE, x=0.01, ha="left")
    dot = Line2D([], [], **DOT)
    figure.legend([dot], ["interval excludes 0"], loc="upper right", fontsize=SMALL, frameon=False)
    return figure


def _draw(ax: Axes, part: pd.DataFrame, factor: float, scale: Normalize) -> None:
    """One task."""
    delta = part.pivot(index="layer", columns="pair", values="delta").sort_index()
    clear = part.pivot(index="layer", columns="pair", values="clear").sort_index()
    ax.imshow(
        delta.to_numpy(dtype=float) * factor,
        aspect="auto",
        origin="lower",
        cmap=COLOURS,
        norm=scale,
        interpolation="nearest",
    )
    rows, columns = np.nonzero(clear.to_numpy(dtype=bool))
    ax.plot(columns, rows, **DOT)
    names = ["embed" if layer == -1 else str(layer) for layer in delta.index]
    shown = ticks_for(len(names), 16)
    ax.set_yticks(shown, [names[i] for i in shown], fontsize=SMALL)
    pairs = part.drop_duplicates("pair").sort_values("pair")
    names = [name for name in ("s_v", "s_l", "s_rest") if name in pairs]
    labels = ["/".join(f"{x:g}" for x in row) for row in pairs[names].to_numpy(dtype=float)]
    places = ticks_for(len(labels), 12)
    ax.set_xticks(places, [labels[i] for i in places], fontsize=SMALL, rotation=90)


def _title(first: Mapping[Any, Any], factor: float, width: float) -> str:
    """A task, its base and its number of questions, in as many lines as a panel's width needs."""
    kept = f"base {first['base'] * factor:.1f}, n = {first['n']}".split(", ")
    text = ", ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in kept)
    text = f"{first['task']}: {text}"
    return fill(text, max(12, int(LETTERS * width)))

r"""The layer x coefficient map of triples that add to 1: a small triangle per layer, some rows per task.

::

         V         every cell is a triple; a corner is the triple that is 1 for its group and 0 for
        / \         the others, and the side opposite to it has 0 for that group
      L --- rest
"""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D

from sinkscope.errors import InputError
from sinkscope.viz.style import LABEL, QUIET, SMALL, TITLE, new_figure, ticks_for

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

ACROSS = 10

"""Layers side by side."""

TALL = 3**0.5 / 2

CORNERS = {"V": (0.5, TALL), "L": (0.0, 0.0), "rest": (1.0, 0.0)}

"""Where the triple lies that is 1 for V-sinks, for L-sinks, for ordinary tokens."""

MEANING = (
    "numbers: layer (edited: next block); corners: V, s_V = 1;\n"
    "L, s_L = 1; rest, s_rest = 1 (ordinary tokens)"
)


def fits_triangles(table: pd.DataFrame) -> bool:
    """Whether a map has triples that add to 1, at least three of them."""
    if "s_l" not in table:
        return False
    triples = table.drop_duplicates("pair")
    total = triples["s_v"] + triples["s_l"] + triples["s_rest"]
    return len(triples) > 2 and bool(np.isclose(total, 1.0).all())


def points_of(triples: pd.DataFrame) -> np.ndarray:
    """Where triples lie in a triangle with sides of 1, ``[triple 2]``."""
    weights = triples[["s_v", "s_l", "s_rest"]].to_numpy(dtype=float)
    return weights @ np.array(list(CORNERS.values()))


def _step(points: np.ndarray) -> float:
    """The least distance of two points."""
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    return float(apart[apart > 1e-9].min())


def plot_triangles(
    table: pd.DataFrame, factor: float, scale: Normalize, colours: str, dot: dict[str, Any]
) -> Figure:
    """One triangle per layer and task, with one scale for all.

    Args:
        table: Of ``Sweep.map()``, with triples.
        factor: What changes are multiplied with.
        scale: Of the colours.
        colours: The colour map.
        dot: How a cell whose interval excludes 0 is marked.

    Returns:
        The figure, without a title.
    """
    tasks, layers = list(dict.fromkeys(table["task"])), sorted(set(table["layer"]))
    across = min(ACROSS, len(layers))
    down = -(-len(layers) // across)
    side = max(0.95, min(1.9, 7.0 / across))
    size = (1.3 + across * side, 1.2 + len(tasks) * (0.3 + down * (0.05 + TALL * side)))
    figure = new_figure((max(6.0, size[0]), size[1]))
    grid = figure.subplots(len(tasks) * down, across, squeeze=False)
    for i, task in enumerate(tasks):
        part: Any = table[table["task"] == task]
        panels = list(grid[i * down : (i + 1) * down].flatten())
        for ax, layer in zip(panels, layers, strict=False):
            _draw(ax, part[part["layer"] == layer], factor, scale, colours, dot, side)
        for ax in panels[len(layers) :]:
            ax.set_visible(False)
        first = part.iloc[0]
        head = f"{task}: base {first['base'] * factor:.1f}, n = {first['n']}"
        panels[0].set_title(head, fontsize=LABEL, loc="left")
        _name_corners(panels[0], _step(points_of(part.drop_duplicates("pair"))))
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=grid, shrink=0.8, pad=0.02)
    bar.set_label("change against the base", fontsize=LABEL)
    bar.ax.tick_params(labelsize=SMALL)
    marks = [Line2D([], [], **dot), Line2D([], [], linestyle="")]
    figure.legend(
        marks,
        ["interval excludes 0", MEANING],
        loc="outside lower left",
        ncols=2,
        fontsize=SMALL,
        frameon=False,
    )
    return figure


def _draw(
    ax: Axes,
    part: pd.DataFrame,
    factor: float,
    scale: Normalize,
    colours: str,
    dot: dict[str, Any],
    side: float,
) -> None:
    """One layer of one task: a hexagon around every triple."""
    part = part.sort_values("pair")
    points = points_of(part)
    step = _step(points)
    turns = np.deg2rad(np.arange(30, 390, 60))
    hexagon = step / 3**0.5 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    cells = PolyCollection(
        list(points[:, None] + hexagon),
        cmap=colours,
        norm=scale,
        edgecolors="#cccccc",
        linewidths=0.3,
    )
    cells.set_array(part["delta"].to_numpy(dtype=float) * factor)
    ax.add_collection(cells)
    clear = points[part["clear"].to_numpy(dtype=bool)]
    small = min(dot["markersize"], 0.45 * 72 * side * step / (1 + 2 * step))
    ax.plot(clear[:, 0], clear[:, 1], **{**dot, "markersize": small})
    ax.set(xlim=(-step, 1 + step), ylim=(-step, TALL + step), aspect="equal")
    layer = int(part["layer"].iloc[0])
    name = "embed" if layer == -1 else str(layer)
    size = SMALL - (1 if layer >= 0 else 2)  # the word is as wide as there is room
    ax.text(0, 1, name, transform=ax.transAxes, fontsize=size, ha="left", va="top")
    ax.axis("off")


def _name_corners(ax: Axes, step: float) -> None:
    """The names of the corners, outside of the triangle."""
    out = 0.6 * step
    for name, (x, y), across, place in (
        ("V", (0.5 + out, TALL), "left", "center"),
        ("L", (0.0, -out), "center", "top"),
        ("rest", (1.0, -out), "center", "top"),
    ):
        ax.annotate(
            name,
            (x, y),
            xytext=(1, -1),
            textcoords="offset points",
            fontsize=SMALL - 2,
            color=QUIET,
            ha=across,
            va=place,
        )


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

ACROSS_sweep = 3

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
    across = min(ACROSS_sweep, len(tasks))
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
        _draw_sweep(ax, cast("pd.DataFrame", table[table["task"] == task]), factor, scale)
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


def _draw_sweep(ax: Axes, part: pd.DataFrame, factor: float, scale: Normalize) -> None:
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

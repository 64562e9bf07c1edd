"""Accuracy of linear probes by layer, with their intervals and what shuffled labels give."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from sinkscope.errors import InputError, SelectionError
from sinkscope.viz.style import (
    LABEL,
    QUIET,
    SMALL,
    STYLES,
    TITLE,
    Style,
    new_figure,
    style_of,
    ticks_for,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = frozenset(
    {
        "layer",
        "group",
        "target",
        "metric",
        "accuracy",
        "low",
        "high",
        "null_high",
        "majority",
        "note",
    }
)
METRICS = ("label accuracy", "exact set")
NULL = "#cfcfcf"


def plot_probes(
    table: pd.DataFrame, *, metric: str = "label accuracy", groups: Sequence[str] | None = None
) -> Figure:
    """Accuracy by layer, a panel per target and a line per group.

    Bars are the intervals over test images; points of several groups stand side by side. The
    grey area is what probes of shuffled labels reach (95 % quantile, the highest of the groups that
    are drawn); the dotted line is the most frequent class. Groups without a token are named in
    the legend.

    Args:
        table: Of ``LinearProbes.table``.
        metric: What to show of targets with several labels: ``"label accuracy"``, the share of
            labels that are right, or ``"exact set"``, whether all are.
        groups: Which groups to draw, in this order, or None for all.

    Returns:
        The figure.

    Raises:
        InputError: If the table is none of these.
        SelectionError: If there is no such metric or group.
    """
    missing = COLUMNS - set(getattr(table, "columns", ()))
    if missing or not len(table):
        raise InputError(
            f"Got a table that lacks {sorted(missing) or 'lines'}; expected LinearProbes.table."
        )
    if metric not in METRICS:
        raise SelectionError(f"Got metric={metric!r}; expected one of {METRICS}.")
    known: list[str] = list(dict.fromkeys(table["group"]))
    chosen = known if groups is None else list(groups)
    if not chosen or [g for g in chosen if g not in known]:
        raise SelectionError(f"Got groups={groups!r}; expected some of {known}.")
    shown: Any = table[table["group"].isin(chosen) & table["metric"].isin(("accuracy", metric))]
    styles = _styles(chosen)
    targets = list(dict.fromkeys(shown["target"]))
    across = 1 if len(targets) == 1 else 2
    down = -(-len(targets) // across)
    width = 5.2 * across
    figure = new_figure((width, 2.9 * down + 0.95 + 0.24 * (len(chosen) + 2) / 3))
    axes = figure.subplots(down, across, squeeze=False, sharex=True).flatten()
    for ax, target in zip(axes, targets, strict=False):
        _draw(ax, shown[shown["target"] == target], styles)
        ax.set_ylabel("accuracy", fontsize=LABEL)
    for ax in axes[len(targets) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(targets) - across) : len(targets)]:
        ax.set_xlabel("LLM layer", fontsize=LABEL)
        ax.tick_params(labelbottom=True)
    text = "Linear probes on the mean state of a token group: accuracy on test images"
    figure.suptitle(textwrap.fill(text, int(11.5 * width)), fontsize=TITLE, x=0.01, ha="left")
    _legend(figure, shown, styles, 2 if across == 1 else 3)
    return figure


def _styles(groups: Sequence[str]) -> dict[str, Style]:
    """A style per group; those of the user's own take turns."""
    own = [g for g in groups if g not in STYLES]
    return {g: style_of(g, own.index(g) if g in own else 0) for g in groups}


def _draw(ax: Axes, part: Any, styles: dict[str, Style]) -> None:
    """One target."""
    layers: list[int] = sorted(set(part["layer"]))
    places = {layer: i for i, layer in enumerate(layers)}
    there = part[part["accuracy"].notna()]
    if len(there):
        _draw_baselines(ax, there, places)
        _draw_groups(ax, there, places, styles)
    else:
        ax.text(0.5, 0.5, part["note"].iloc[0], transform=ax.transAxes, ha="center", color=QUIET)
    head, metric = part["target"].iloc[0], part["metric"].iloc[0]
    title = head if metric == "accuracy" else f"{head} ({metric})"
    ax.set_title(title, fontsize=LABEL, loc="left")
    ax.set_xlim(-0.5, len(layers) - 0.5)
    shown = ticks_for(len(layers))
    ax.set_xticks(shown, [str(layers[i]) for i in shown])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.tick_params(labelsize=SMALL)
    ax.grid(visible=True, axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _draw_baselines(ax: Axes, there: Any, places: dict[int, int]) -> None:
    """The null as an area, the most frequent class as a line, and the range of the y axis."""
    lowest = min(there[name].min() for name in ("low", "accuracy", "majority"))
    bottom = max(0.0, lowest - 0.06)
    ax.set_ylim(bottom, 1.02)
    if there["null_high"].notna().any():
        null = there.groupby("layer")["null_high"].max()
        edges = [x for layer in null.index for x in (places[layer] - 0.5, places[layer] + 0.5)]
        heights = [max(y, bottom) for y in null.tolist() for _ in range(2)]
        ax.fill_between(edges, bottom, heights, color=NULL, alpha=0.6, linewidth=0, zorder=0)
    common = there.groupby("layer")["majority"].mean()
    x = [places[layer] for layer in common.index]
    ax.plot(x, common, color=QUIET, linestyle=":", linewidth=1.6)


def _draw_groups(ax: Axes, there: Any, places: dict[int, int], styles: dict[str, Style]) -> None:
    """A line per group, its points beside those of the others."""
    drawn = [g for g in styles if g in set(there["group"])]
    for i, group in enumerate(drawn):
        lines = there[there["group"] == group].sort_values("layer")
        shift = 0.11 * (i - (len(drawn) - 1) / 2)
        x = [places[layer] + shift for layer in lines["layer"]]
        bars: Any = [lines["accuracy"] - lines["low"], lines["high"] - lines["accuracy"]]
        look = {"color": styles[group].colour, "marker": styles[group].marker, "markersize": 5.5}
        ax.errorbar(x, lines["accuracy"], bars, **look, linewidth=1.4, elinewidth=1.2)


def _legend(figure: Figure, table: Any, styles: dict[str, Style], columns: int) -> None:
    """What the marks mean, under the panels; groups without a probe say why."""
    marks: dict[str, Any] = {}
    for group, style in styles.items():
        own = table[table["group"] == group]
        empty = bool(own["accuracy"].isna().all())
        name = f"{group}: {own['note'].iloc[0]}" if empty else group
        line = "" if empty else "-"
        marks[name] = Line2D([], [], color=style.colour, marker=style.marker, linestyle=line,
                             markerfacecolor="white" if empty else style.colour)  # fmt: skip
    if table["null_high"].notna().any():
        marks["shuffled labels (95 %, highest of the groups)"] = Patch(color=NULL, alpha=0.6)
    marks["most frequent class"] = Line2D([], [], color=QUIET, linestyle=":", linewidth=1.6)
    figure.legend(
        marks.values(),
        marks.keys(),
        loc="outside lower left",
        ncols=columns,
        fontsize=SMALL,
        frameon=False,
    )

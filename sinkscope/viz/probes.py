"""How gates learned: the loss of answers and the coefficients over the steps."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sinkscope.errors import InputError, SelectionError
from sinkscope.viz.style import (
    LABEL,
    QUIET,
    SMALL,
    STYLES,
    TITLE,
    Style,
    dress,
    legend_below,
    new_figure,
    plain_log,
    style_of,
    ticks_for,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEEDED = frozenset({"layer", "step", "split", "loss"})

COLOURS = ("#0072B2", "#D55E00", "#00795A", "#B45C91", "#E69F00", "#56B4E9")

MARKERS = "osD^vP"

DASHES: dict[str, Any] = {"rho_V": "-", "rho_L": ":", "rho_rest": "--"}

NAMED = 6

"""With more layers than this, colours run along the layers and a legend shows some of them."""


def plot_training(history: pd.DataFrame, base: float | None = None) -> Figure:
    """Loss per answer token, and the mean coefficients of every group, over the steps.

    Args:
        history: Of `TrainResult.history`.
        base: The validation loss without a gate, or None.

    Returns:
        The figure. Thin lines are training steps, marked lines the validation part.

    Raises:
        InputError: If the table is no such history.
    """
    if not set(history.columns) >= NEEDED or not len(history):
        raise InputError(
            f"Got a table with the columns {list(history.columns)}; expected at least {sorted(NEEDED)} "
            "and a line. Write plot_training(result.history)."
        )
    groups = [name for name in history.columns if name in DASHES]
    figure = new_figure((9.5 if groups else 5.5, 3.9))
    axes = figure.subplots(1, 2 if groups else 1, squeeze=False)[0]
    layers = list(dict.fromkeys(history["layer"]))
    for place, (_, lines) in enumerate(history.groupby("layer", sort=False)):
        look = _look(place, len(layers))
        _draw_loss(axes[0], lines, look)
        for group in groups:
            _draw_group(axes[1], lines, group, look)
    if base is not None:
        axes[0].axhline(base, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    dress(axes[0], "Loss of the answers", "step", "nats per token")
    _focus(axes[0], history, base)
    axes[0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend_below(axes[0], _entries(layers, base, history))
    if groups:
        dress(axes[1], "Mean coefficients", "step", "factor of the keys")
        axes[1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes[1].set_ylim(bottom=0)
        names = {
            f"{group.removeprefix('rho_')}": Line2D([], [], color=QUIET, linestyle=DASHES[group])
            for group in groups
        }
        legend_below(axes[1], names)
    return figure


def _look(place: int, many: int) -> dict[str, Any]:
    """Colour and marker of a layer."""
    if many <= NAMED:
        return {"color": COLOURS[place], "marker": MARKERS[place]}
    return {"color": colormaps["viridis"](0.92 * place / (many - 1)), "marker": "o"}


def _draw_loss(ax: Any, lines: pd.DataFrame, look: dict[str, Any]) -> None:
    """Training as a thin line, validation as a marked one."""
    for split, style in (
        ("train", {"linewidth": 0.7, "alpha": 0.4, "marker": None}),
        ("validation", {"linewidth": 1.6, "markersize": 4}),
    ):
        part = lines[lines["split"] == split]
        ax.plot(part["step"], part["loss"], **{**look, **style})


def _focus(ax: Any, history: pd.DataFrame, base: float | None) -> None:
    """Show the range of the validation part, where there is one: single steps are noisier."""
    held = history["loss"][history["split"] == "validation"].tolist()
    if not held:
        return
    held += [] if base is None else [base]
    low, high = min(held), max(held)
    if low > 0 and high > 4 * low:
        ax.set_yscale("log")
        plain_log(ax.yaxis)
        ax.set_ylim(low / 1.3, high * 1.3)
    else:
        room = 0.3 * (high - low) or 0.1 * high
        ax.set_ylim(max(0.0, low - room), high + room)


def _draw_group(ax: Any, lines: pd.DataFrame, group: str, look: dict[str, Any]) -> None:
    """One coefficient, on the validation part where there is one."""
    held = lines[lines["split"] == "validation"]
    part, marked = (held, 3) if len(held) else (lines, 0)
    ax.plot(
        part["step"], part[group], **look, linestyle=DASHES[group], linewidth=1.3, markersize=marked
    )


def _entries(layers: list[Any], base: float | None, history: pd.DataFrame) -> dict[str, Any]:
    """The legend: layers, and what lines mean."""
    shown = range(len(layers))
    if len(layers) > NAMED:
        last = len(layers) - 1
        shown = sorted({round(i * last / (NAMED - 1)) for i in range(NAMED)})
    out: dict[str, Any] = {
        f"layer {layers[i]}": Line2D([], [], **_look(i, len(layers)), markersize=4) for i in shown
    }
    if "train" in set(history["split"]):
        out["training step"] = Line2D([], [], color=QUIET, linewidth=0.7, alpha=0.6)
    if base is not None:
        out["without a gate"] = Line2D([], [], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    return out


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


NEEDED_coefficients = frozenset(
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
    missing = sorted(NEEDED_coefficients - set(table.columns))
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
        _draw_group_coefficients(ax, table[table["group"] == group], tasks, layers)
        ax.set_title(NAMES[group], fontsize=TITLE, loc="left")
    panels[0].set_ylabel("factor of the keys", fontsize=LABEL)
    panels[0].set_ylim(bottom=0)
    _legend_coefficients(figure, table, tasks)
    return figure


def _draw_group_coefficients(ax: Axes, own: Any, tasks: list[str], layers: list[int]) -> None:
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


def _legend_coefficients(figure: Figure, table: pd.DataFrame, tasks: list[str]) -> None:
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

"""Figures of linear probes, of how gates learned, and of the coefficients that gates give."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sinkscope.checks import check_choice
from sinkscope.errors import SelectionError
from sinkscope.viz import theme
from sinkscope.viz.theme import LABEL, QUIET, SERIES, STYLES, TITLE, Style

HISTORY = "layer loss split step"
COLUMNS = "layer group target metric accuracy low high null_high majority note"
COEFFICIENTS = "task layer group coefficient low high untrained tokens n"
DASHES: dict[str, Any] = {"rho_V": "-", "rho_L": ":", "rho_rest": "--"}
NAMED = 6  # with more layers, colours run along the layers and a legend shows some of them
GREY = "#cfcfcf"
NAMES = {"V": "V-sinks", "L": "L-sinks", "rest": "other image tokens"}  # of panels, in order
UNTRAINED: dict[str, Any] = {"color": QUIET, "linewidth": 1, "linestyle": (0, (4, 3))}


def plot_training(history: pd.DataFrame, base: float | None = None) -> Figure:
    """Draw the loss per answer token, and the mean coefficients of every group, over the steps.

    Thin lines are training steps, marked lines the validation part; ``base`` is its loss without a gate.
    """
    wanted = f"at least the columns {HISTORY}, as in TrainResult.history"
    theme.check_table(history, HISTORY, wanted)
    groups = [name for name in history.columns if name in DASHES]
    figure = theme.new_figure((9.5 if groups else 5.5, 3.9))
    axes = theme.panels(figure, 1 + bool(groups), 1 + bool(groups))
    layers = list(dict.fromkeys(history["layer"]))
    few, marks = np.linspace(0, len(layers) - 1, min(NAMED, len(layers))).round(), {}
    for place, (layer, lines) in enumerate(history.groupby("layer", sort=False)):
        look: dict[str, Any] = SERIES[place % len(SERIES)].look
        if len(layers) > NAMED:
            colour = colormaps["viridis"](0.92 * place / (len(layers) - 1))
            look = {"marker": "o", "color": colour}
        if place in few:
            marks[f"layer {layer}"] = theme.entry(**look, markersize=4)
        steps, held = (lines[lines["split"] == split] for split in ("train", "validation"))
        axes[0].plot(steps["step"], steps["loss"], color=look["color"], linewidth=0.7, alpha=0.4)
        axes[0].plot(held["step"], held["loss"], **look, linewidth=1.6, markersize=4)
        part, look["markersize"] = (held, 3) if len(held) else (lines, 0)
        for group in groups:
            style = {"linestyle": DASHES[group], "linewidth": 1.3}
            axes[1].plot(part["step"], part[group], **look, **style)
    if "train" in set(history["split"]):
        marks["training step"] = theme.entry(color=QUIET, linewidth=0.7, alpha=0.6)
    if base is not None:
        axes[0].axhline(base, **UNTRAINED)
        marks["without a gate"] = theme.entry(**UNTRAINED)
    _focus(axes[0], history, base)
    theme.finish(axes[0], "Loss of the answers", "step", "nats per token", marks)
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if groups:
        axes[1].set_ylim(bottom=0)
        look = {g: theme.entry(color=QUIET, linestyle=DASHES[g]) for g in groups}
        marks = {group.removeprefix("rho_"): line for group, line in look.items()}
        theme.finish(axes[1], "Mean coefficients", "step", "factor of the keys", marks)
    return figure


def _focus(ax: Any, history: pd.DataFrame, base: float | None) -> None:
    """Show the range of the validation part, where there is one: single steps are noisier."""
    held = history["loss"][history["split"] == "validation"].tolist()
    if not held:
        return
    held += [] if base is None else [base]
    low, high = min(held), max(held)
    if low > 0 and high > 4 * low:
        ax.set_yscale("log")
        theme.plain_log(ax.yaxis)
        ax.set_ylim(low / 1.3, high * 1.3)
    else:
        room = 0.3 * (high - low) or 0.1 * high
        ax.set_ylim(max(0.0, low - room), high + room)


def plot_probes(
    table: pd.DataFrame, *, metric: str = "label accuracy", groups: Sequence[str] | None = None
) -> Figure:
    """Draw accuracy by layer, a panel per target and a line per group.

    Bars are the intervals over test images. The grey area is what probes of shuffled labels reach (95 %
    quantile, the highest of the groups that are drawn); the dotted line is the most frequent class. The
    ``table`` is that of `LinearProbes`, and ``metric`` what to show of targets with several labels:
    ``"label accuracy"``, the share of labels that are right, or ``"exact set"``, whether all are.
    """
    theme.check_table(table, COLUMNS, "LinearProbes.table")
    check_choice(("label accuracy", "exact set"), error=SelectionError, metric=metric)
    known: list[str] = list(dict.fromkeys(table["group"]))
    chosen = known if groups is None else list(groups)
    if not chosen or [g for g in chosen if g not in known]:
        raise SelectionError(f"Got groups={groups!r}; expected some of {known}.")
    shown: Any = table[table["group"].isin(chosen) & table["metric"].isin(("accuracy", metric))]
    own = [g for g in chosen if g not in STYLES]
    styles = {g: theme.style_of(g, own.index(g) if g in own else 0) for g in chosen}
    targets = list(dict.fromkeys(shown["target"]))
    across = min(2, len(targets))
    tall = 2.9 * -(-len(targets) // across) + 0.95 + 0.08 * (len(chosen) + 2)
    figure = theme.new_figure((5.2 * across, tall))
    axes = theme.panels(figure, len(targets), across, sharex=True)
    for i, (ax, target) in enumerate(zip(axes, targets, strict=True)):
        part = shown[shown["target"] == target]
        _draw_probes(ax, part, styles)
        kind = part["metric"].iloc[0]
        title = target if kind == "accuracy" else f"{target} ({kind})"
        ax.set_title(title, fontsize=LABEL, loc="left")
        theme.label(ax, "LLM layer" if i + across >= len(targets) else "", "accuracy")
    title = "Linear probes on the mean state of a token group: accuracy on test images"
    theme.headline(figure, title)
    return theme.legend_of(figure, _probes_legend(shown, styles), across + 1)


def _draw_probes(ax: Any, part: Any, styles: dict[str, Style]) -> None:
    """One target: the null as an area, the most frequent class as a line, a line per group."""
    layers: list[int] = sorted(set(part["layer"]))
    there = part[part["accuracy"].notna()]
    there = there.assign(x=there["layer"].map(layers.index))
    if not len(there):
        theme.say(ax, part["note"].iloc[0])
    else:
        bottom = max(0.0, float(there[["low", "accuracy", "majority"]].min().min()) - 0.06)
        ax.set_ylim(bottom, 1.02)
        null = there.groupby("x")["null_high"].max().dropna()
        edges = [x + side for x in null.index for side in (-0.5, 0.5)]
        heights = np.repeat(null.clip(lower=bottom).to_numpy(), 2)
        look: Any = {"color": GREY, "alpha": 0.6, "linewidth": 0, "zorder": 0}
        ax.fill_between(edges, bottom, heights, **look)
        common = there.groupby("x")["majority"].mean()
        ax.plot(common.index, common, color=QUIET, linestyle=":", linewidth=1.6)
    drawn = [g for g in styles if g in set(there["group"])]
    for i, group in enumerate(drawn):
        lines = there[there["group"] == group].sort_values("layer")
        x, y = lines["x"] + 0.11 * (i - (len(drawn) - 1) / 2), lines["accuracy"]
        bars: Any = [y - lines["low"], lines["high"] - y]
        look = {"markersize": 5.5, "linewidth": 1.4, "elinewidth": 1.2}
        ax.errorbar(x, y, bars, **styles[group].look, **look)
    ax.set_xlim(-0.5, len(layers) - 0.5)
    theme.layer_ticks(ax.xaxis, layers)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    theme.plain(ax)


def _probes_legend(table: Any, styles: dict[str, Style]) -> dict[str, Any]:
    marks: dict[str, Any] = {}
    for group, style in styles.items():
        own = table[table["group"] == group]
        look, name = style.look, group
        if own["accuracy"].isna().all():
            look |= {"linestyle": "", "markerfacecolor": "white"}
            name = f"{group}: {own['note'].iloc[0]}"
        marks[name] = theme.entry(**look)
    if table["null_high"].notna().any():
        marks["shuffled labels (95 %, highest of the groups)"] = Patch(color=GREY, alpha=0.6)
    marks["most frequent class"] = theme.entry(color=QUIET, linestyle=":", linewidth=1.6)
    return marks


def plot_coefficients(table: pd.DataFrame) -> Figure:
    """Draw mean coefficients over the layers that gates read, with intervals.

    Every panel is a group and every line a task; all questions together are black. The dashed line is
    what an untrained gate gives; a hollow mark says that no question has such a token. The ``table`` is
    that of ``GateCoefficients.to_dataframe()``.
    """
    theme.check_table(table, COEFFICIENTS, "that of gate_coefficients(...).to_dataframe()")
    groups = [group for group in NAMES if (table["group"] == group).any()]
    tasks, layers = list(dict.fromkeys(table["task"])), sorted(set(table["layer"]))
    width = max(2.8, min(6.0, 0.9 + 0.16 * len(layers) * max(2.0, 0.6 * len(tasks))))
    figure = theme.new_figure((0.6 + len(groups) * width, 3.7))
    axes = theme.panels(figure, len(groups), len(groups), sharey=True)
    for ax, group in zip(axes, groups, strict=True):
        _draw_coefficients(ax, table[table["group"] == group], tasks, layers)
        ax.set_title(NAMES[group], fontsize=TITLE, loc="left")
        ax.set_xlabel("layer that the gate reads", fontsize=LABEL)
    axes[0].set_ylabel("factor of the keys", fontsize=LABEL)
    axes[0].set_ylim(bottom=0)
    marks: dict[str, Any] = {}
    for place, task in enumerate(tasks):
        n = int(table.loc[table["task"] == task, "n"].iloc[0])
        marks[f"{task} (n = {n})"] = theme.entry(**_task_look(task, place), markersize=5)
    marks["untrained gate"] = theme.entry(**UNTRAINED)
    if (table["tokens"] == 0).any():
        hollow: dict[str, Any] = {"color": QUIET, "marker": "o", "markerfacecolor": "white"}
        marks["no such token"] = theme.entry(**hollow, linestyle="", markersize=5)
    return theme.legend_of(figure, marks, 4 if figure.get_figwidth() > 7 else 2)


def _draw_coefficients(ax: Any, own: Any, tasks: list[str], layers: list[int]) -> None:
    """A line per task; of few layers the tasks stand side by side, with bars instead of bands."""
    bands = len(layers) > 8
    wide = 0.0 if bands or len(tasks) == 1 else 0.5
    null = own.drop_duplicates("layer").set_index("layer")["untrained"]
    for x, layer in enumerate(layers):
        if layer in null.index:
            ax.plot([x - 0.5, x + 0.5], [null[layer]] * 2, **UNTRAINED)
    steps = wide * np.linspace(-0.5, 0.5, len(tasks))
    for place, task in enumerate(tasks):
        part, look = own[own["task"] == task].sort_values("layer"), _task_look(task, place)
        x = np.array([layers.index(layer) for layer in part["layer"]]) + steps[place]
        y, low, high = (part[name].to_numpy(dtype=float) for name in ("coefficient", "low", "high"))
        ax.plot(x, y, color=look["color"], linewidth=1.2, alpha=0.6)
        if bands:
            ax.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
        else:
            ax.vlines(x, low, high, color=look["color"], linewidth=1.4)
        empty = part["tokens"].to_numpy() == 0
        look |= {"linestyle": "", "markersize": 3.5 if bands else 5}
        for chosen, face in ((~empty, look["color"]), (empty, "white")):
            ax.plot(x[chosen], y[chosen], **look, markerfacecolor=face)
    theme.layer_ticks(ax.xaxis, layers, 10)
    ax.set_xlim(-0.6, len(layers) - 0.4)
    theme.plain(ax)


def _task_look(task: str, place: int) -> dict[str, Any]:
    if task == "all":
        return {"color": "black", "marker": STYLES["ordinary"].marker}
    again = place // len(SERIES)  # further tasks have a colour again, with another marker
    marker = SERIES[(place + again) % len(SERIES)].marker
    return {"color": SERIES[place % len(SERIES)].colour, "marker": marker}

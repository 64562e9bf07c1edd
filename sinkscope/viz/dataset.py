"""Figures of the sinks of a data set: by layer, on the picture, by rule, and from birth to death."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from sinkscope.viz import theme
from sinkscope.viz.theme import GROUP_OF, LABEL, NULL, QUIET, SMALL

LAYERS = "layer group tokens tokens_low tokens_high mass low high null"
AGREEMENT = "tower rule other flagged share low high"
LIVES = "kind born last first_drawn again sinks"
TOWERS = {"vision": "ViT, blocks that feed the projector", "language": "LLM, all layers"}


def plot_dataset_layers(table: pd.DataFrame) -> Figure:
    """Draw how many tokens of each kind a record has, and the attention mass on them, in every LLM layer.

    Bands are intervals over images; dashed lines are the mass under uniform attention. The ``table`` is that
    of ``DatasetTrace.by_layer()``.
    """
    theme.check_table(table, LAYERS, "that of trace.by_layer()")
    figure = theme.new_figure((10.5, 4.4))
    left, right = theme.panels(figure, 2, 2)
    entries: dict[str, Any] = {}
    for group, part in table.groupby("group", sort=False):
        style = theme.style_of(str(group))
        for ax, name, (low, high) in (
            (left, "tokens", ("tokens_low", "tokens_high")),
            (right, "mass", ("low", "high")),
        ):
            if part[name].notna().any():
                ax.plot(part["layer"], part[name], **style.look, markersize=4)
                edges = (part[low].astype(float), part[high].astype(float))
                ax.fill_between(part["layer"], *edges, color=style.colour, alpha=0.2, linewidth=0)
        right.plot(part["layer"], part["null"], color=style.colour, **NULL)
        entries[str(group)] = theme.entry(**style.look, markersize=4)
    entries["dashed: uniform (null)"] = theme.entry(color=QUIET, **NULL)
    titles = ("Sinks per record", "Attention mass, mean of heads and queries")
    sides = ("tokens per record", "mass on the group, 0 to 1")
    for ax, title, side in zip((left, right), titles, sides, strict=True):
        ax.set_title(title, fontsize=LABEL, loc="left")
        ax.set_ylim(bottom=0)
        layers = sorted(set(table["layer"]))
        ax.set_xticks([layers[i] for i in theme.ticks_for(len(layers), 12)])
        theme.label(ax, "LLM layer", side)
        theme.plain(ax)
    if table["mass"].isna().all():
        theme.say(right, "not measured (masses=False)", fontsize=LABEL)
    return theme.legend_of(figure, entries, 3)


def plot_dataset_places(places: Mapping[str, np.ndarray]) -> Figure:
    """Draw where on the normalised picture the sinks of each kind are: the share of them in every cell.

    ``places`` are those of ``DatasetTrace.places()``: kind -> sinks ``[row column]``. All panels have one
    scale, with a mark at the share of a cell if sinks were anywhere alike (the null).
    """
    figure = theme.new_figure((3.3 * len(places) + 0.9, 3.9))
    axes = theme.panels(figure, len(places), len(places))
    shares = {kind: values / max(values.sum(), 1.0) for kind, values in places.items()}
    top = max([0.01, *(float(one.max()) for one in shares.values())])
    picture: Any = None
    for ax, (kind, values) in zip(axes, shares.items(), strict=True):
        look: Any = {"cmap": theme.SHARES, "norm": Normalize(0.0, top), "extent": (0, 1, 1, 0)}
        picture = ax.imshow(values, **look)
        count = int(places[kind].sum())
        name = GROUP_OF.get(kind, kind)
        ax.set_title(f"{name}, n = {count}", fontsize=LABEL, loc="left")
        ax.set_xticks([0, 0.5, 1], ["left", "", "right"], fontsize=SMALL)
        ax.set_yticks([0, 0.5, 1], ["top", "", "bottom"], fontsize=SMALL)
        if not count:
            theme.say(ax, "none found", fontsize=LABEL)
    bar = theme.colour_bar(figure, picture, axes, "share of the sinks of a kind", shrink=0.8)
    flat = 1.0 / next(iter(places.values())).size
    bar.ax.axhline(min(flat, top), color=theme.INK, linewidth=1.4)
    figure.supxlabel(
        f"line on the bar: sinks anywhere alike, {flat:.4f} per cell", fontsize=SMALL, color=QUIET
    )
    return figure


def plot_dataset_agreement(table: pd.DataFrame) -> Figure:
    """Draw how rules agree: of the image tokens that the rule of a line flags, the share another flags too.

    The ``table`` is that of ``DatasetTrace.agreement()``; a cell has the share over its interval. Lines say
    how many tokens a rule flags.
    """
    theme.check_table(table, AGREEMENT, "that of trace.agreement()")
    towers = list(dict.fromkeys(table["tower"]))
    most = max(table.groupby("tower")["rule"].nunique())
    figure = theme.new_figure((1.6 + (1.6 + 0.95 * most) * len(towers), 1.5 + 0.62 * most))
    axes, picture = theme.panels(figure, len(towers), len(towers)), None
    for ax, tower in zip(axes, towers, strict=True):
        part: Any = table[table["tower"] == tower]
        names = list(dict.fromkeys(part["rule"]))
        shares, low, high = (
            part.pivot(index="rule", columns="other", values=value)
            .loc[names, names]
            .to_numpy(dtype=float)
            for value in ("share", "low", "high")
        )
        ax.set_facecolor("#e4e4e4")
        picture = ax.imshow(shares, cmap=theme.SHARES, norm=theme.share_scale(), aspect="auto")
        for row, column in np.ndindex(*shares.shape):
            value, ends = shares[row, column], (low[row, column], high[row, column])
            text = "-" if np.isnan(value) else f"{value:.2f}"
            if row != column and not np.isnan(ends).any():
                text += f"\n{ends[0]:.2f}-{ends[1]:.2f}"
            ink = theme.INK if np.isnan(value) else theme.ink_on(value)
            ax.text(column, row, text, ha="center", va="center", fontsize=SMALL - 1, color=ink)
        many = part.drop_duplicates("rule").set_index("rule")["flagged"]
        lines = [f"{name}\nn = {many[name]}" for name in names]
        ax.set_xticks(range(len(names)), names, fontsize=SMALL, rotation=30, ha="right")
        ax.set_yticks(range(len(names)), lines, fontsize=SMALL)
        ax.set_title(TOWERS[str(tower)], fontsize=LABEL, loc="left")
    theme.label(axes[0], "flagged by this rule too", "of the tokens of this rule")
    theme.colour_bar(figure, picture, axes, "share, 0 to 1 (square-root scale)")
    return figure


def plot_dataset_lives(table: pd.DataFrame, layers: Sequence[int]) -> Figure:
    """Draw which block makes a sink and how long it stays one, and when a head first attends to it.

    The ``table`` is that of ``DatasetTrace.lives()``, of a model with these ``layers``: a cell counts
    unbroken stretches of layers in which a token of the kind meets the L rule.
    """
    if set(LIVES.split()) - set(table.columns):
        theme.check_table(table, LIVES, "that of trace.lives()")
    kinds, depth = ("V", "L", "text"), len(layers)
    figure = theme.new_figure((13.5, 4.0))
    axes = theme.panels(figure, 4, 4)
    lived: Any = table.dropna(subset=["born"])
    most: Any = lived.groupby(["kind", "born", "last"])["sinks"].sum()
    top = max(2.0, float(most.max())) if len(most) else 2.0
    picture: Any = None
    for ax, kind in zip(axes, kinds, strict=False):
        part = lived[lived["kind"] == kind]
        cells = np.full((depth + 1, depth), np.nan)
        for born, last, many in zip(part["born"], part["last"], part["sinks"], strict=True):
            cells[born + 1, last] = np.nan_to_num(cells[born + 1, last]) + many
        look: Any = {"cmap": theme.SHARES, "norm": LogNorm(0.5, top), "origin": "lower"}
        picture = ax.imshow(cells, aspect="auto", **look)
        ax.set_title(f"{GROUP_OF[kind]}, n = {part['sinks'].sum()}", fontsize=LABEL, loc="left")
        theme.layer_ticks(ax.xaxis, list(layers))
        theme.layer_ticks(ax.yaxis, [-1, *layers])
        theme.label(ax, "last layer as a sink", "written by block" if kind == "V" else "")
        if not len(part):
            theme.say(ax, "none found", fontsize=LABEL)
    bar = theme.colour_bar(figure, picture, axes[:3], "stretches (log scale)", pad=0.02)
    theme.plain_log(bar.ax.yaxis)
    _draw_first(axes[3], table, layers)
    return figure


def _draw_first(ax: Axes, table: pd.DataFrame, layers: Sequence[int]) -> None:
    """The share of the sinks of each kind to which a head attends first in a layer."""
    for kind in GROUP_OF:
        part: Any = table[(table["kind"] == kind) & ~table["again"].astype(bool)]
        if len(part):
            share = part.groupby("first_drawn")["sinks"].sum() / part["sinks"].sum()
            share, look = (
                share.reindex(list(layers), fill_value=0.0),
                theme.style_of(GROUP_OF[kind]).look,
            )
            ax.plot(layers, share.astype(float), **look, label=GROUP_OF[kind], markersize=4)
    ax.set_title("First attended to", fontsize=LABEL, loc="left")
    ax.set_xticks([layers[i] for i in theme.ticks_for(len(layers))])
    theme.label(ax, "LLM layer", "share of the kind")
    theme.plain(ax)
    if len(table):
        theme.legend_below(ax)
    else:
        theme.say(ax, "none found", fontsize=LABEL)

"""Maps of layers by heads, and of layers by coefficients."""

from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from sinkscope.checks import is_whole
from sinkscope.errors import SelectionError
from sinkscope.viz import theme
from sinkscope.viz.tables import share
from sinkscope.viz.theme import LABEL, QUIET, SMALL, TITLE

MARK = "#D55E00"  # orange stands out on both ends of the colours of a map of heads
COLUMNS = "task layer pair s_v s_rest n base delta low high clear"
COLOURS = "PuOr_r"  # orange above the base, purple below, white at no change
DOT: dict[str, Any] = {"marker": "o", "linestyle": "", "color": "black", "markersize": 4}
DOT |= {"markeredgecolor": "white", "markeredgewidth": 0.5}
TALL = 3**0.5 / 2
CORNERS = np.array([(0.5, TALL), (0.0, 0.0), (1.0, 0.0)])  # of V-sinks, L-sinks, ordinary tokens
MEANING = """\
numbers: layer (edited: next block); corners: V, s_V = 1;
L, s_L = 1; rest, s_rest = 1 (ordinary tokens)"""


def plot_heads(
    result: Any,
    group: str,
    row: int | None = None,
    *,
    query: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Map how much attention every head of every layer gives to a group of tokens.

    The head that gives the most has a frame and is named under the map; a line on the colour bar is at what
    uniform attention would give there (the null). Layers in which the group has no token are grey. The
    ``result`` is such as that of ``AttentionMass(trace.groups)``, and ``group`` one of its groups; ``query``
    is the position of one query. Without ``row`` or ``query`` it is the mean.
    """
    theme.check_has(
        result, "result", "mass", "lvlm.run(sample, [probe])[probe] of an AttentionMass"
    )
    values, null = heads_of(result, group, row, query)
    over = "mean over queries" if query is None else f"query at position {query}"
    title = f"Attention mass on {group}"
    if len(result.mass) > 1:
        title += "" if row is None else f", row {row}"
        over += " and rows" if row is None and query is None else ""
    return _draw_heads(ax, values, null, result.layers, title, over)


def plot_received_heads(result: Any, pos: int, row: int = 0, *, ax: Axes | None = None) -> Figure:
    """Map how much attention one token receives from every head of every layer, as `plot_heads` does.

    The mean over the queries that can see the token at ``pos``, itself among them, of the ``result`` of
    ``ReceivedAttention()``.
    """
    theme.check_has(
        result, "result", "of_key", "lvlm.run(sample, [probe])[probe] of a ReceivedAttention"
    )
    some = result.mean if hasattr(result, "by_head") else result.received.mean(dim=2)
    theme.check_place(len(some), row=row)
    live = (~some[row].isnan().all(dim=0)).nonzero().flatten().tolist()
    if not is_whole(pos) or pos not in live:
        raise SelectionError(
            f"Got position {pos} of row {row}; expected {live[0]} to {live[-1]}: the tokens of that "
            "row that are no padding."
        )
    null = None if result.null is None else result.null[row, :, pos]
    title = f"Attention on the token at {pos}"
    title += f", row {row}" if len(some) > 1 else ""
    over = "mean over the queries that see it"
    return _draw_heads(ax, result.of_key(row, pos), null, result.layers, title, over)


def heads_of(
    result: Any, group: str, row: int | None = None, query: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """What `plot_heads` shows: ``[layer head]``, NaN without a token; and the null ``[layer]``."""
    keep, null = ~result.mass[:, 0, 0, :, 0].isnan(), None  # [batch query]
    if row is not None:
        theme.check_place(len(keep), ", or None for all rows", row=row)
        keep &= (torch.arange(len(keep)) == row)[:, None]
    places = result.queries.expand_as(keep)
    known = sorted(set(places[keep].tolist()))
    asked = is_whole(query) and places == query
    keep = keep if query is None else keep & asked
    if not bool(keep.any()):
        there = f"{known[0]} to {known[-1]}" if known else "none, because its answer has ended"
        raise SelectionError(
            f"Got query={query} of row {row}; expected a position that was measured there ({there}), "
            "or None for the mean over all."
        )

    def mean(values: Tensor) -> Tensor:
        kept = keep.reshape(len(keep), *[1] * (values.ndim - 2), keep.shape[1])
        return (values.nan_to_num() * kept).sum(dim=(0, -1)) / kept.sum()

    values = mean(result.group(group))
    if result.null is not None:
        null = mean(result.null[..., result.groups.index(group)])
    empty = values.amax(dim=1) == 0 if null is None else null == 0
    return values.masked_fill(empty[:, None], float("nan")), null


def top_of(values: Tensor) -> tuple[int, int, float]:
    """The layer index and the head that give the most, and how much."""
    layer, head = divmod(int(values.nan_to_num(-1.0).argmax()), values.shape[1])
    return layer, head, float(values[layer, head])


def _draw_heads(
    ax: Axes | None, values: Tensor, null: Tensor | None, layers: list[int], title: str, over: str
) -> Figure:
    """The map of ``[layer head]``, its colour bar, the frame, and what stands under it."""
    wide, tall = (2.0 + 0.13 * n for n in values.shape)
    ax = theme.new_axes(ax, (min(10.0, max(5.6, wide)), min(10.0, max(4.2, tall))))
    ax.set_facecolor("#e4e4e4")
    most = float(values.nan_to_num().max()) or 1.0
    look: Any = {"aspect": "auto", "interpolation": "none", "norm": Normalize(0.0, most)}
    picture = ax.imshow(values.T.numpy(), cmap="cividis", **look)
    label, figure = "share of attention, 0 to 1", theme.figure_of(ax)
    bar = theme.colour_bar(figure, picture, ax, label, pad=0.02).ax
    theme.layer_ticks(ax.xaxis, layers, 15)
    ax.set_yticks(theme.ticks_for(values.shape[1], 12))
    ax.tick_params(labelsize=SMALL)
    theme.label(ax, "layer", "head")
    ax.set_title(title, fontsize=TITLE, loc="left", parse_math=False)
    gone, notes = values.isnan(), [over]
    if bool(gone.all()):
        theme.say(ax, "none found", va="center", fontsize=LABEL)
        notes.append("the group has no token in any layer")
    else:
        layer, head, top = top_of(values)
        look = {"fill": False, "edgecolor": MARK, "linewidth": 2.2}
        ax.add_patch(Rectangle((layer - 0.5, head - 0.5), 1, 1, **look))
        notes.append(f"frame: layer {layers[layer]}, head {head} gives the most, {share(top)}")
        if null is not None:
            flat = float(null[layer])
            bar.axhline(min(flat, top), color=MARK, linewidth=1.6)
            notes.append(f"line on the bar: uniform attention (null) in that layer, {share(flat)}")
        if bool(gone.any()):
            notes.append("grey: the group has no token in that layer")
    look = {"fontsize": SMALL, "color": QUIET, "ha": "left", "va": "top"}
    ax.annotate("\n".join(notes), (0, 0), (0, -36), "axes fraction", "offset points", **look)
    return figure


def plot_sweep(table: pd.DataFrame, *, score: str = "exact answers (points)") -> Figure:
    """Draw the change against the base in every cell, a heat map per task with one scale for all.

    A dot marks a cell whose interval excludes 0; of many cells without an effect one in twenty has
    one too. Triples that add to 1 are drawn as triangles, one per layer and task: V-sinks at the top,
    L-sinks on the left, ordinary tokens on the right. The ``table`` is that of ``Sweep.map()``; ``(points)``
    in ``score`` shows fractions times 100.
    """
    theme.check_table(table, COLUMNS, "that of sweep.map()")
    factor = 100.0 if "points" in score else 1.0
    table = table.assign(delta=table["delta"] * factor, base=table["base"] * factor)
    reach = max(float(table["delta"].abs().max()), 1e-9)
    scale, legend = Normalize(-reach, reach), {"interval excludes 0": theme.entry(**DOT)}
    parts = {str(task): part for task, part in table.groupby("task", sort=False)}
    triples = table.reindex(columns=["s_v", "s_l", "s_rest"]).sum(axis=1, skipna=False)
    if table["pair"].nunique() > 2 and np.isclose(triples, 1.0).all():
        figure = _draw_triangles(parts, scale)
        legend[MEANING] = theme.entry(linestyle="")
    else:
        figure = _draw_grids(parts, scale)
    bar: Any = (ScalarMappable(scale, COLOURS), figure.axes, "change against the base")
    theme.colour_bar(figure, *bar, shrink=0.8, pad=0.02)
    figure.suptitle(f"Change of {score}", fontsize=TITLE, x=0.01, ha="left")
    return theme.legend_of(figure, legend, 2)


def _draw_grids(parts: dict[str, Any], scale: Normalize) -> Figure:
    first = next(iter(parts.values()))
    pairs = first.drop_duplicates("pair").sort_values("pair")
    names = [name for name in ("s_v", "s_l", "s_rest") if name in pairs]
    labels = ["/".join(f"{x:g}" for x in row) for row in pairs[names].to_numpy(dtype=float)]
    under = "s_V / s_L / s_rest" if "s_l" in names else "s_V (V-sinks) / s_rest (other)"
    across, width = min(3, len(parts)), max(2.6, 0.27 * len(pairs))
    titles = [_title(task, part, width) for task, part in parts.items()]
    lines = max(title.count("\n") for title in titles)
    tall = 1.25 + 0.15 * lines + min(4.2, 0.26 * first["layer"].nunique() + 0.3)
    figure = theme.new_figure((1.6 + across * width, 1.5 + -(-len(parts) // across) * tall))
    axes = theme.panels(figure, len(parts), across, sharex=True, sharey=True)
    for i, (ax, part, title) in enumerate(zip(axes, parts.values(), titles, strict=True)):
        delta, clear = (part.pivot(index="layer", columns="pair")[v] for v in ("delta", "clear"))
        look: Any = {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}
        ax.imshow(delta.to_numpy(dtype=float), cmap=COLOURS, norm=scale, **look)
        rows, columns = np.nonzero(clear.to_numpy(dtype=bool))
        ax.plot(columns, rows, **DOT)
        theme.layer_ticks(ax.yaxis, list(delta.index), 16)
        places = theme.ticks_for(len(labels), 12)
        ax.set_xticks(places, [labels[i] for i in places], fontsize=SMALL, rotation=90)
        ax.set_title(title, fontsize=LABEL, loc="left")
        left = "" if i % across else "layer (edited: next block)"
        theme.label(ax, under if i + across >= len(parts) else "", left)
    return figure


def _title(task: str, part: Any, width: float) -> str:
    """A task, its base and its number of questions, in as many lines as the width needs (inches)."""
    kept = (f"base {part['base'].iloc[0]:.1f},", f"n = {part['n'].iloc[0]}")
    text = " ".join([f"{task}:", *(words.replace(" ", "\N{NO-BREAK SPACE}") for words in kept)])
    return fill(text, max(12, int(13 * width)))


def _draw_triangles(parts: dict[str, Any], scale: Normalize) -> Figure:
    """A triangle per layer and task; a corner is the triple of 1 for its group and 0 for others."""
    layers = sorted(set(next(iter(parts.values()))["layer"]))
    across = min(10, len(layers))
    down, side = -(-len(layers) // across), max(0.95, min(1.9, 7.0 / across))
    tall = 1.2 + len(parts) * (0.3 + down * (0.05 + TALL * side))
    figure = theme.new_figure((max(6.0, 1.3 + across * side), tall))
    grid: Any = figure.subplots(len(parts) * down, across, squeeze=False)
    for ax in grid.flatten():
        ax.axis("off")
    for i, (task, part) in enumerate(parts.items()):
        axes, step = list(grid[i * down : (i + 1) * down].flatten()), 0.0
        for ax, layer in zip(axes, layers, strict=False):
            step = _draw_triangle(ax, part[part["layer"] == layer].sort_values("pair"), scale, side)
            name = "embed" if layer == -1 else str(layer)
            size = SMALL - (1 if layer >= 0 else 2)  # the word is as wide as there is room
            ax.text(0, 1, name, transform=ax.transAxes, fontsize=size, ha="left", va="top")
        axes[0].set_title(_title(task, part, 1000), fontsize=LABEL, loc="left")
        out = 0.6 * step
        for name, place, ha, va in (
            ("V", (0.5 + out, TALL), "left", "center"),
            ("L", (0.0, -out), "center", "top"),
            ("rest", (1.0, -out), "center", "top"),
        ):
            look: Any = {"fontsize": SMALL - 2, "color": QUIET, "ha": ha, "va": va}
            axes[0].annotate(name, place, xytext=(1, -1), textcoords="offset points", **look)
    return figure


def _draw_triangle(ax: Axes, part: Any, scale: Normalize, side: float) -> float:
    """One layer of one task: a hexagon around every triple; returns the distance of two triples."""
    points = part[["s_v", "s_l", "s_rest"]].to_numpy(dtype=float) @ CORNERS
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    step = float(apart[apart > 1e-9].min())
    turns = np.deg2rad(np.arange(30, 390, 60))
    hexagon = step / TALL / 2 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    look: Any = {"cmap": COLOURS, "norm": scale, "edgecolors": "#cccccc", "linewidths": 0.3}
    cells = PolyCollection(list(points[:, None] + hexagon), **look)
    cells.set_array(part["delta"].to_numpy(dtype=float))
    ax.add_collection(cells)
    clear = points[part["clear"].to_numpy(dtype=bool)]
    small = min(DOT["markersize"], 0.45 * 72 * side * step / (1 + 2 * step))
    ax.plot(clear[:, 0], clear[:, 1], **{**DOT, "markersize": small})
    ax.set(xlim=(-step, 1 + step), ylim=(-step, TALL + step), aspect="equal")
    return step

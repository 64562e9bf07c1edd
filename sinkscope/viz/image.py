"""Figures on the picture itself: where the sinks lie, and what the image tokens receive."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from sinkscope.checks import check_choice
from sinkscope.errors import InputError, SelectionError
from sinkscope.viz import theme
from sinkscope.viz.tables import MARKS, readable
from sinkscope.viz.theme import LABEL, QUIET, SMALL, STYLES, TITLE, Trace

SQUARE: Any = {"marker": "s", "facecolors": "none", "edgecolors": STYLES["L-sinks"].colour}
SQUARE |= {"linewidths": 2.2, "zorder": 3.5}  # around the circle of a V-sink that meets the L rule
CROSS: Any = {
    "color": "#111111",
    "linewidths": 2.4,
    "zorder": 5,
}  # bold of spikes, upright of attention
CROSS["path_effects"] = [withStroke(linewidth=5.0, foreground="white")]


def plot_sinks_on_image(
    trace: Trace,
    row: int = 0,
    image: int = 0,
    layer: int | None = None,
    *,
    decoys: Mapping[str, Tensor] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the picture with the patch grid of the vision tower and every sink at its place.

    V-sinks are circles, L-sinks squares, V-sinks that meet the L rule too both, and patches to which the
    vision tower attends throughout without a spike hexagons; text sinks are listed below. Without a picture
    (a sample made of processor output) the grid stands alone, in pixels of the model's input. With
    ``layer`` only L-sinks, overlaps and text sinks of that LLM layer. ``decoys``, name -> bool ``[batch
    pos]``, are tokens known to be no sinks, drawn as crosses.
    """
    theme.layers_of(trace, layer)
    ax = theme.new_axes(ax, (4.6, 5.0))
    side = draw_picture(ax, trace, row, image)
    shown, tokens = shown_records(trace, row, layer), trace.sample.tokens
    kinds = ("V", "L", "attention")
    v, low, attended = ([r for r in shown if r.kind == k and r.image == image] for k in kinds)
    legend = _draw_kind(ax, "V-sinks", v, side) | _draw_kind(ax, "L-sinks", low, side)
    if both := [r for r in v if (r.llm_layers if layer is None else layer in r.llm_layers)]:
        boxes = [r.box for r in both if r.box is not None]
        name, key = "V-sinks, L rule too", {"markersize": 11, "markerfacecolor": "none"}
        key |= {"markeredgecolor": SQUARE["edgecolors"], "markeredgewidth": 2}
        legend |= _mark(ax, boxes, name, len(both), 0.72 * side, SQUARE, **key)
    if placed := [r for r in attended if r.box is not None]:
        legend |= _draw_kind(ax, "attended", placed, side)
    named = decoys is None or isinstance(decoys, Mapping)
    if not (named and all(torch.is_tensor(mask) for mask in dict(decoys or {}).values())):
        raise InputError(f"Got decoys={decoys!r:.60}; expected a dict of name -> mask [batch pos].")
    for name, mask in (decoys or {}).items():
        boxes = tokens.box[row][mask[row] & (tokens.image[row] == image)].tolist()
        look = {"marker": "x" if name.startswith("spike") else "+", **CROSS}
        key = {"color": CROSS["color"], "markersize": 8, "markeredgewidth": 2.2}
        legend |= _mark(ax, boxes, name, len(boxes), 80**0.5, look, **key)
    words = [r for r in shown if r.kind == "text"]
    legend |= _draw_kind(ax, "text sinks", words, side)
    _list_words(ax, words)
    when = "any layer" if layer is None else f"layer {layer}"
    ax.set_title(f"Sinks, image {image} ({when})", fontsize=TITLE, loc="left")
    theme.legend_below(ax, legend, points=22.0)
    return theme.figure_of(ax)


def plot_received_map(
    trace: Trace,
    row: int = 0,
    image: int = 0,
    layer: int | None = None,
    *,
    heads: str = "mean",
    unit: str = "null",
    ax: Axes | None = None,
) -> Figure:
    """Draw the attention that the image tokens receive in the LLM as a heat map over the picture.

    ``heads`` is ``"mean"`` or ``"max"`` over the heads of a layer; without ``layer`` it is the largest value
    over all layers. ``unit`` is ``"null"`` for what other tokens give, in multiples of uniform attention
    under the same mask, which depends less on the place in the prompt; ``"share"`` for the attention itself.
    """
    check_choice(("mean", "max"), error=SelectionError, heads=heads)
    check_choice(("null", "share"), error=SelectionError, unit=unit)
    layers = theme.layers_of(trace, layer)
    ax = theme.new_axes(ax, (5.4, 4.6))
    draw_picture(ax, trace, row, image, grey=True)
    got = trace.language.by_key
    by_layer = {"mean": got.mean, "max": got.most}[heads]
    if unit == "null" and heads == "max":  # what is largest stays so in multiples of the null
        by_layer = got.drawn / got.others_null
    elif unit == "null" and layer is not None:
        by_layer = trace.language.received.times_null().nan_to_num().mean(dim=2)
    most = by_layer[row, layers].nan_to_num().amax(dim=0)
    if unit == "null" and heads == "mean" and layer is None:
        most = got.times[row]
    grid, extent = _token_grid(trace, row, image, most)
    low, high = (float(edge(grid[~grid.isnan()])) for edge in (torch.min, torch.max))
    norm, meaning = Normalize(0.0, max(high, 1e-6)), "share of a query's attention"
    if unit == "null":  # near-uniform attention must look uniform
        norm = LogNorm(max(min(low, 0.5), 0.01), max(high, 4.0))
        meaning = "times uniform attention"
    view = {"xlim": ax.get_xlim(), "ylim": ax.get_ylim()}
    look: Any = {"cmap": "cividis", "norm": norm, "alpha": 0.85, "extent": extent}
    picture = ax.imshow(grid.numpy(), **look, zorder=1.5)
    ax.set(**view)  # the patches may cover a part of the picture
    look = {"label": f"{meaning}, {heads} of heads", "shrink": 0.85, "pad": 0.02}
    bar = theme.colour_bar(theme.figure_of(ax), picture, ax, **look)
    if unit == "null":
        theme.plain_log(bar.ax.yaxis)
    when = "largest over layers" if layer is None else f"layer {layer}"
    ax.set_title(f"Attention received, {when}", fontsize=TITLE, loc="left")
    return theme.figure_of(ax)


def shown_records(trace: Trace, row: int, layer: int | None) -> list[Any]:
    """The sinks of a row; with a layer, V-sinks and those that meet the L rule there."""
    theme.images_of(trace, row)
    everywhere = MARKS if layer is None else ("V", "attention")
    own = [r for r in trace.records if r.batch == row]
    return [r for r in own if r.kind in everywhere or layer in r.llm_layers]


def draw_picture(ax: Axes, trace: Trace, row: int, image: int, *, grey: bool = False) -> float:
    """Draw the image, if there is one, under the grid of patches; returns the points that a token is wide."""
    own, tokens = theme.images_of(trace, row), trace.sample.tokens
    if not own or not bool((tokens.row[row] >= 0).any()):
        why = tokens.unmapped or "no token is known to show an image"
        raise SelectionError(
            f"Got row {row} of a sample in which {why}; expected image tokens with a place in a picture. Write "
            "trace.plot() for the figures that need none."
        )
    theme.check_place(len(own), f", counted within row {row}", image=image)
    box = tokens.vision.box[own[image]]
    boxes = box[~box.isnan().any(dim=-1)]
    x0, y0, x1, y1 = (*boxes[:, :2].amin(dim=0).tolist(), *boxes[:, 2:].amax(dim=0).tolist())
    images = trace.sample.images
    if images is None:
        ax.set(xlim=(x0, x1), ylim=(y1, y0), facecolor="#f2f2f2", aspect="equal")
        ax.set_ylabel("no picture: input pixels", fontsize=SMALL, color=QUIET)
    else:
        picture = images[row][image]
        extent = (0, picture.width, picture.height, 0)
        ax.imshow(picture.convert("L" if grey else "RGB"), extent=extent, cmap="gray", zorder=0)
    xs, ys = (boxes[:, i::2].unique().tolist() for i in (0, 1))
    lines = [[(x, y0), (x, y1)] for x in xs] + [[(x0, y), (x1, y)] for y in ys]
    width = 0.9 if len(xs) < 20 else 0.4
    for colour, thick in (("black", width), ("white", width / 2)):
        look: Any = {"colors": colour, "linewidths": thick, "alpha": 0.55, "zorder": 1}
        ax.add_collection(LineCollection(lines, **look), autolim=False)
    ax.set(xticks=[], yticks=[], anchor="NW")
    return min(26.0, max(6.0, 230.0 / (int(trace.sample.tokens.column[row].amax()) + 1)))


def _token_grid(trace: Trace, row: int, image: int, values: Tensor) -> tuple[Tensor, list[float]]:
    """Values ``[pos]`` of the patches as ``[row column]``, and where they lie; CLS has no place."""
    tokens = trace.sample.tokens
    own = (tokens.image[row] == image) & (tokens.row[row] >= 0)
    rows, columns, box = tokens.row[row, own], tokens.column[row, own], tokens.box[row, own]
    grid = torch.full((int(rows.max()) + 1, int(columns.max()) + 1), float("nan"))
    grid[rows, columns] = values[own].float()
    (x0, y0), (x1, y1) = box[:, :2].amin(dim=0).tolist(), box[:, 2:].amax(dim=0).tolist()
    return grid, [x0, x1, y1, y0]


def _mark(
    ax: Axes, boxes: Sequence[Any], name: str, count: int, side: float, look: Any, **key: Any
) -> dict[str, Any]:
    """Draw a marker in the middle of every box, ``side`` points wide; returns its legend entry."""
    x, y = ([(box[i] + box[i + 2]) / 2 for box in boxes] for i in (0, 1))
    ax.scatter(x, y, s=side**2, label=name, **look)
    title = f"{name} ({count})" if count else f"{name}: none found"
    return {title: theme.entry(linestyle="", marker=look["marker"], **key)}


def _draw_kind(ax: Axes, group: str, found: list[Any], side: float) -> dict[str, Any]:
    """Outline and marker of every sink of one kind that has a place."""
    style, outline = STYLES[group], [withStroke(linewidth=3.6, foreground="white")]
    boxes, size = [r.box for r in found if r.box is not None], 0.45 * side
    look: Any = {"fill": False, "linewidth": 2.0, "zorder": 3, "path_effects": outline}
    for x0, y0, x1, y1 in boxes:
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, edgecolor=style.colour, **look))
    look = {"edgecolors": "white", "linewidths": 1.2, "zorder": 4, **style.look}
    key = {"color": style.colour, "markersize": min(10.0, size + 2)}
    return _mark(ax, boxes, group, len(found), size, look, **key, markeredgecolor="white")


def _list_words(ax: Axes, words: list[Any]) -> None:
    """Text sinks under the picture, as many by name as fit."""
    named = [f"▲ {readable(r.word)} at {r.pos}" for r in words]
    shown = [name for i, name in enumerate(named) if len("   ".join(named[: i + 1])) <= 28]
    if len(named) > len(shown):
        shown.append(f"{'and' if shown else '▲'} {len(named) - len(shown)} more")
    ax.set_xlabel("   ".join(shown), loc="left", fontsize=LABEL, color=STYLES["text sinks"].colour)
    ax.xaxis.label.set_parse_math(False)

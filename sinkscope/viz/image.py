"""Figures on the picture itself: where the sinks lie, and what the image tokens receive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.colors import LogNorm, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from sinkscope.viz.style import (
    GROUP_OF,
    LABEL,
    SMALL,
    STYLES,
    TITLE,
    check_choice,
    check_layer,
    check_row,
    draw_picture,
    figure_of,
    legend_below,
    new_axes,
    plain_log,
    token_grid,
)
from sinkscope.viz.tables import readable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sinkscope.experiments.sink_records import SinkRecord
    from sinkscope.experiments.tracing import SinkTrace

OVERLAP = "V-sinks, L rule too"
NONE = "none found"
INK = "#111111"
WORDS_FIT = 28
"""Characters under a picture."""


def plot_sinks_on_image(
    trace: SinkTrace,
    row: int = 0,
    image: int = 0,
    layer: int | None = None,
    *,
    decoys: Mapping[str, Tensor] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The picture with the patch grid of the vision tower and every sink at its place.

    V-sinks are circles, L-sinks squares; a V-sink that meets the L rule too carries a square
    around its circle, and patches to which the vision tower attends throughout without a spike are
    hexagons. Text sinks have no place in the picture and are listed under it, as
    triangles. A kind without sinks says "none found" in the legend. Where the sample was made from
    processor output there is no picture: then the grid stands alone, in pixels of the model's input.

    Args:
        trace: The trace.
        row: The row of the batch.
        image: The image, counted within the row.
        layer: Only L-sinks, overlaps and text sinks of this LLM layer; None for those of any.
        decoys: Name -> bool ``[batch pos]``: tokens that are known to be no sinks, drawn as crosses.
        ax: Where to draw, or None for a new figure.

    Returns:
        The figure.

    Raises:
        SelectionError: If there is no such row or image.
        LayerError: If there is no such layer.
    """
    if layer is not None:
        check_layer(trace, layer)
    ax = new_axes(ax, (4.6, 5.0))
    side = draw_picture(ax, trace, row, image)
    shown = shown_records(trace, row, layer)
    here = [r for r in shown if r.image == image]
    legend: dict[str, Line2D] = {}
    for kind in ("V", "L"):
        found = [r for r in here if r.kind == kind]
        legend |= _draw_kind(ax, GROUP_OF[kind], found, side)
    both = [r for r in here if r.kind == "V" and _meets_l_rule(r, layer)]
    if both:
        legend |= _draw_overlap(ax, both, side)
    placed = [r for r in here if r.kind == "attention" and r.box is not None]
    if placed:
        legend |= _draw_kind(ax, GROUP_OF["attention"], placed, side)
    for name, mask in (decoys or {}).items():
        legend |= _draw_decoys(
            ax, name, mask[row] & (trace.sample.tokens.image[row] == image), trace, row
        )
    words = [r for r in shown if r.kind == "text"]
    legend |= {_entry("text sinks", len(words)): _handle("text sinks", side)}
    _list_words(ax, words)
    when = "any layer" if layer is None else f"layer {layer}"
    ax.set_title(f"Sinks, image {image} ({when})", fontsize=TITLE, loc="left")
    legend_below(ax, legend, points=22.0)
    return figure_of(ax)


def plot_received_map(
    trace: SinkTrace,
    row: int = 0,
    image: int = 0,
    layer: int | None = None,
    *,
    heads: str = "mean",
    unit: str = "null",
    ax: Axes | None = None,
) -> Figure:
    """A heat map of the attention that the image tokens receive in the LLM, over the picture.

    Args:
        trace: The trace.
        row: The row of the batch.
        image: The image, counted within the row.
        layer: One LLM layer; None for the largest value over all layers.
        heads: ``"mean"`` or ``"max"`` over the heads of a layer.
        unit: ``"null"`` for what other tokens give, in multiples of uniform attention under the same
            mask, which depends less on where in the prompt a token stands; ``"share"`` for the
            attention itself.
        ax: Where to draw, or None for a new figure.

    Returns:
        The figure.

    Raises:
        SelectionError: If there is no such row or image, or ``heads`` or ``unit`` is unknown.
        LayerError: If there is no such layer.
    """
    check_choice("heads", heads, ("mean", "max"))
    check_choice("unit", unit, ("null", "share"))
    layers = slice(None) if layer is None else [check_layer(trace, layer)]
    ax = new_axes(ax, (5.4, 4.6))
    draw_picture(ax, trace, row, image, grey=True)
    got = trace.language.received
    received = (got.times_null() if unit == "null" else trace.received)[row, layers].nan_to_num()
    by_layer = received.mean(dim=1) if heads == "mean" else received.amax(dim=1)
    grid, extent = token_grid(trace, row, image, by_layer.amax(dim=0))
    norm, view = _scale(grid, unit), (ax.get_xlim(), ax.get_ylim())
    picture = ax.imshow(
        grid.numpy(), extent=extent, cmap="cividis", norm=norm, alpha=0.85, zorder=1.5
    )
    ax.set(xlim=view[0], ylim=view[1])  # the patches may cover a part of the picture
    bar = figure_of(ax).colorbar(picture, ax=ax, shrink=0.85, pad=0.02)
    meaning = "times uniform attention" if unit == "null" else "share of a query's attention"
    bar.set_label(f"{meaning}, {heads} of heads", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    if isinstance(norm, LogNorm):
        plain_log(bar.ax.yaxis)
    when = "largest over layers" if layer is None else f"layer {layer}"
    ax.set_title(f"Attention received, {when}", fontsize=TITLE, loc="left")
    return figure_of(ax)


def shown_records(trace: SinkTrace, row: int, layer: int | None) -> list[SinkRecord]:
    """The sinks of a row; with a layer, V-sinks and those that meet the L rule there."""
    own = [r for r in trace.records if r.batch == check_row(trace, row)]
    if layer is None:
        return own
    return [r for r in own if r.kind in ("V", "attention") or layer in r.llm_layers]


def _scale(grid: Tensor, unit: str) -> Normalize:
    """Colours that make near-uniform attention look uniform: never less than 0.5 to 4 times the null."""
    values = grid[~grid.isnan()]
    low, high = float(values.min()), float(values.max())
    if unit == "null":
        return LogNorm(max(min(low, 0.5), 0.01), max(high, 4.0))
    return Normalize(0.0, max(high, 1e-6))


def _meets_l_rule(record: SinkRecord, layer: int | None) -> bool:
    return bool(record.llm_layers) if layer is None else layer in record.llm_layers


def _draw_kind(ax: Axes, group: str, found: list[SinkRecord], side: float) -> dict[str, Line2D]:
    """Outline and marker of every sink of one kind, and its legend entry."""
    style = STYLES[group]
    boxes = [r.box for r in found if r.box is not None]
    for x0, y0, x1, y1 in boxes:
        _outline(ax, (x0, y0, x1, y1), style.colour, 2.0)
    ax.scatter(
        [(b[0] + b[2]) / 2 for b in boxes],
        [(b[1] + b[3]) / 2 for b in boxes],
        s=(0.45 * side) ** 2,
        marker=style.marker,
        color=style.colour,
        edgecolors="white",
        linewidths=1.2,
        zorder=4,
        label=group,
    )
    return {_entry(group, len(found)): _handle(group, side)}


def _draw_decoys(
    ax: Axes, name: str, mask: Tensor, trace: SinkTrace, row: int
) -> dict[str, Line2D]:
    """A cross on every decoy, and its legend entry; a bold one for spikes, a thin one for attention."""
    boxes = trace.sample.tokens.box[row][mask]
    marker = "x" if name.startswith("spike") else "+"
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    ax.scatter(
        x.tolist(),
        y.tolist(),
        s=80,
        linewidths=2.4,
        zorder=5,
        marker=marker,
        color=INK,
        label=name,
        path_effects=[withStroke(linewidth=5.0, foreground="white")],
    )
    handle = Line2D(
        [], [], linestyle="", markersize=8, markeredgewidth=2.2, marker=marker, color=INK
    )
    return {f"{name} ({int(mask.sum())})": handle}


def _draw_overlap(ax: Axes, both: list[SinkRecord], side: float) -> dict[str, Line2D]:
    """A square around the circle."""
    boxes = [r.box for r in both if r.box is not None]
    style = STYLES["L-sinks"]
    ax.scatter(
        [(b[0] + b[2]) / 2 for b in boxes],
        [(b[1] + b[3]) / 2 for b in boxes],
        s=(0.72 * side) ** 2,
        marker=style.marker,
        facecolors="none",
        edgecolors=style.colour,
        linewidths=2.2,
        zorder=3.5,
        label=OVERLAP,
    )
    handle = Line2D(
        [], [], linestyle="", marker="s", markersize=11, markerfacecolor="none",
        markeredgecolor=style.colour, markeredgewidth=2,
    )  # fmt: skip
    return {f"{OVERLAP} ({len(both)})": handle}


def _outline(ax: Axes, box: tuple[float, float, float, float], colour: str, thick: float) -> None:
    x0, y0, x1, y1 = box
    ax.add_patch(
        Rectangle(
            (x0, y0),
            x1 - x0,
            y1 - y0,
            fill=False,
            edgecolor=colour,
            linewidth=thick,
            zorder=3,
            path_effects=[withStroke(linewidth=thick + 1.6, foreground="white")],
        )
    )


def _entry(group: str, count: int) -> str:
    return f"{group} ({count})" if count else f"{group}: {NONE}"


def _handle(group: str, side: float) -> Line2D:
    style = STYLES[group]
    return Line2D(
        [], [], linestyle="", marker=style.marker, color=style.colour,
        markersize=min(10.0, 0.45 * side + 2), markeredgecolor="white",
    )  # fmt: skip


def _list_words(ax: Axes, words: list[SinkRecord]) -> None:
    """Text sinks under the picture, as many by name as fit."""
    named = [f"▲ {readable(r.word)} at {r.pos}" for r in words]
    shown = [name for i, name in enumerate(named) if len("   ".join(named[: i + 1])) <= WORDS_FIT]
    if len(named) > len(shown):
        shown.append(f"{'and' if shown else '▲'} {len(named) - len(shown)} more")
    ax.set_xlabel("   ".join(shown), loc="left", fontsize=LABEL, color=STYLES["text sinks"].colour)
    ax.xaxis.label.set_parse_math(False)

"""Layer x head maps: which heads attend to a group of tokens, or to one token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from torch import Tensor

from sinkscope.errors import SelectionError
from sinkscope.viz.style import (
    LABEL,
    QUIET,
    SMALL,
    TITLE,
    figure_of,
    new_axes,
    ticks_for,
)
from sinkscope.viz.words import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sinkscope.probes import MassResult, ReceivedResult

COLOURS = "cividis"
MARK = "#D55E00"
"""The head that gives the most; orange stands out on both ends of the colours."""
ABSENT = "#e4e4e4"


def plot_heads(
    result: MassResult,
    group: str,
    row: int | None = None,
    *,
    query: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """How much attention every head of every layer gives to a group of tokens.

    The head that gives the most has a frame and is named under the map, beside what uniform
    attention would give there (the null); a line on the colour bar is at that null. Layers in which
    the group has no token are grey.

    Args:
        result: Of ``AttentionMass(groups)``, such as ``AttentionMass(trace.groups)``.
        group: One of its groups.
        row: The row of the batch; None for the mean over all.
        query: The position of one query; None for the mean over all that were measured.
        ax: Where to draw, or None for a new figure.

    Returns:
        The figure.

    Raises:
        ProbeError: If there is no such group.
        SelectionError: If there is no such row or query.
    """
    values, null = heads_of(result, group, row, query)
    mass = result.mass
    rows = f", row {row}" if row is not None and len(mass) > 1 else ""
    over = "mean over queries" if query is None else f"query at position {query}"
    over += " and rows" if len(mass) > 1 and row is None and query is None else ""
    return _draw(ax, values, null, result.layers, f"Attention mass on {group}{rows}", over)


def plot_received_heads(
    result: ReceivedResult, pos: int, row: int = 0, *, ax: Axes | None = None
) -> Figure:
    """How much attention one token receives from every head of every layer.

    The mean over the queries that can see the token, itself among them. Drawn as `plot_heads`.

    Args:
        result: Of ``ReceivedAttention()``.
        pos: The position of the token.
        row: The row of the batch.
        ax: Where to draw, or None for a new figure.

    Returns:
        The figure.

    Raises:
        SelectionError: If there is no such row, or no live token at that position.
    """
    rows, places = result.received.shape[0], result.received.shape[3]
    if not 0 <= row < rows:
        raise SelectionError(f"Got row {row}; expected 0 to {rows - 1}. Write row=0 for the first.")
    if not 0 <= pos < places or bool(result.received[row, ..., pos].isnan().all()):
        live = (~result.received[row].isnan().all(dim=0).all(dim=0)).nonzero().flatten().tolist()
        raise SelectionError(
            f"Got position {pos} of row {row}; expected {live[0]} to {live[-1]}: the tokens of that "
            "row that are no padding."
        )
    null = None if result.null is None else result.null[row, :, pos]
    title = f"Attention on the token at {pos}" + (f", row {row}" if rows > 1 else "")
    over = "mean over the queries that see it"
    return _draw(ax, result.received[row, :, :, pos], null, result.layers, title, over)


def heads_of(
    result: MassResult, group: str, row: int | None = None, query: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """What `plot_heads` shows: ``[layer head]``, NaN where the group has no token, and the null ``[layer]``."""
    mass, null = result.group(group), None
    keep = _kept(result, row, query)
    values = _mean(mass, keep)
    if result.null is not None:
        null = _mean(result.null[..., result.groups.index(group)], keep)
    empty = values.amax(dim=1) == 0 if null is None else null == 0
    return values.masked_fill(empty[:, None], float("nan")), null


def top_of(values: Tensor) -> tuple[int, int, float]:
    """The layer index and the head that give the most, and how much."""
    layer, head = divmod(int(values.nan_to_num(-1.0).argmax()), values.shape[1])
    return layer, head, float(values[layer, head])


def _kept(result: MassResult, row: int | None, query: int | None) -> Tensor:
    """The rows and queries to average over, bool ``[batch query]``.

    Raises:
        SelectionError: If there is no such row or query.
    """
    rows = len(result.mass)
    if row is not None and not 0 <= row < rows:
        raise SelectionError(f"Got row {row}; expected 0 to {rows - 1}, or None for all rows.")
    keep = ~result.mass[:, 0, 0, :, 0].isnan()
    if row is not None:
        keep[[other for other in range(rows) if other != row]] = False
    places = result.queries.expand_as(keep)
    known = sorted(set(places[keep].tolist()))
    if query is not None:
        keep = keep & (places == query)
    if not bool(keep.any()):
        there = f"{known[0]} to {known[-1]}" if known else "none, because its answer has ended"
        raise SelectionError(
            f"Got query={query} of row {row}; expected a position that was measured there ({there}), or "
            "None for the mean over all."
        )
    return keep


def _mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean of ``[batch layer ... query]`` over the kept rows and queries, ``[layer ...]``."""
    keep = keep.reshape(len(keep), *[1] * (values.ndim - 2), keep.shape[1])
    return (values.nan_to_num() * keep).sum(dim=(0, -1)) / keep.sum()


def _draw(
    ax: Axes | None,
    values: Tensor,
    null: Tensor | None,
    layers: tuple[int, ...],
    title: str,
    over: str,
) -> Figure:
    """The map of ``[layer head]``, its colour bar, the frame, and what stands under it."""
    n_layers, n_heads = values.shape
    size = (min(10.0, max(5.6, 2.0 + 0.13 * n_layers)), min(10.0, max(4.2, 2.0 + 0.13 * n_heads)))
    ax = new_axes(ax, size)
    ax.set_facecolor(ABSENT)
    top = float(values.nan_to_num().max())
    look: Any = {"aspect": "auto", "interpolation": "none", "norm": Normalize(0.0, top or 1.0)}
    picture = ax.imshow(values.T.numpy(), cmap=COLOURS, **look)
    bar = figure_of(ax).colorbar(picture, ax=ax, pad=0.02)
    bar.set_label("share of attention, 0 to 1", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    shown = ticks_for(n_layers, 15)
    ax.set_xticks(shown, [str(layers[i]) for i in shown])
    ax.set_yticks(ticks_for(n_heads, 12))
    ax.tick_params(labelsize=SMALL)
    ax.set_ylabel("head", fontsize=LABEL)
    ax.set_xlabel("layer", fontsize=LABEL)
    ax.set_title(title, fontsize=TITLE, loc="left", parse_math=False)
    ax.annotate(
        "\n".join([over, *_mark_top(ax, bar.ax, values, null, layers)]),
        (0, 0), (0, -36), "axes fraction", "offset points",
        fontsize=SMALL, color=QUIET, ha="left", va="top",
    )  # fmt: skip
    return figure_of(ax)


def _mark_top(
    ax: Axes, bar: Axes, values: Tensor, null: Tensor | None, layers: tuple[int, ...]
) -> list[str]:
    """Frame the head that gives the most and mark its null; returns what the marks mean."""
    gone = values.isnan()
    if bool(gone.all()):
        look: Any = {"ha": "center", "va": "center", "fontsize": LABEL, "color": QUIET}
        ax.text(0.5, 0.5, "none found", transform=ax.transAxes, **look)
        return ["the group has no token in any layer"]
    layer, head, top = top_of(values)
    frame = Rectangle((layer - 0.5, head - 0.5), 1, 1, fill=False, edgecolor=MARK, linewidth=2.2)
    ax.add_patch(frame)
    notes = [f"frame: layer {layers[layer]}, head {head} gives the most, {share(top)}"]
    if null is not None:
        flat = float(null[layer])
        bar.axhline(min(flat, top), color=MARK, linewidth=1.6)
        notes.append(f"line on the bar: uniform attention (null) in that layer, {share(flat)}")
    if bool(gone.any()):
        notes.append("grey: the group has no token in that layer")
    return notes


def share(value: float) -> str:
    """A share of attention with three decimals, more where it is small."""
    return f"{value:.3f}" if value >= 0.01 else short(value, 2)

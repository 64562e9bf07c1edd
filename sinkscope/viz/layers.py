"""Layer x head maps: which heads attend to a group of tokens, or to one token."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from sinkscope.detectors.detection import SATURATION
from sinkscope.errors import SelectionError
from sinkscope.viz.image import plot_received_map, plot_sinks_on_image
from sinkscope.viz.style import (
    LABEL,
    QUIET,
    SMALL,
    STYLES,
    TITLE,
    TowerAxis,
    check_choice,
    check_row,
    dress,
    figure_of,
    images_of,
    legend_below,
    new_axes,
    new_figure,
    plain_log,
    style_of,
    ticks_for,
)
from sinkscope.viz.tables import counts, neat, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sinkscope.experiments.tracing import SinkTrace
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


MASSIVE_RATIO = 1000.0

"""Sun et al. (2402.17762): a massive activation is about this many medians large."""

NULL = "dashed: uniform (null)"

Curve = tuple[Tensor, "Tensor | None"]


def plot_received_by_layer(
    trace: SinkTrace, row: int = 0, *, heads: str = "mean", ax: Axes | None = None
) -> Figure:
    """Attention that one token of each kind receives in every LLM layer, against its null.

    The mean over the tokens of a kind, which for L-sinks and text sinks are those of that layer;
    layers without any leave a gap. Dashed lines are the same tokens under uniform attention.

    Args:
        trace: The trace.
        row: The row of the batch.
        heads: ``"mean"`` or ``"max"`` over the heads of a layer.
        ax: Where to draw, or None for a new figure.

    Returns:
        The figure.

    Raises:
        SelectionError: If there is no such row, or ``heads`` is unknown.
    """
    check_choice("heads", heads, ("mean", "max"))
    check_row(trace, row)
    received = trace.received[row].nan_to_num()
    joined = received.mean(dim=1) if heads == "mean" else received.amax(dim=1)
    curves: dict[str, Curve] = {}
    for name, masks in trace.groups.items():
        mask = masks[row]
        curves[name] = (_over(joined, mask), _over(trace.null[row].nan_to_num(), mask))
    ax = new_axes(ax, (5.6, 4.2))
    _draw_curves(ax, curves, trace.l_detection.layers)
    every = torch.stack([part for curve in curves.values() for part in curve if part is not None])
    every = every[every > 0]
    ax.set_yscale("log")
    ax.set_ylim(float(every.min()) / 1.6, min(1.2, 2.5 * float(every.max())))
    plain_log(ax.yaxis)
    joining = "mean" if heads == "mean" else "largest"
    dress(ax, f"Attention per token, {joining} of heads", "LLM layer", "attention received, 0 to 1")
    legend_below(ax)
    return figure_of(ax)


def plot_mass_by_layer(
    result: MassResult, row: int | None = None, *, ax: Axes | None = None
) -> Figure:
    """Attention mass on every group in each layer, against its null.

    The mean over heads and queries. Over groups that split all keys, the masses of a layer sum
    to 1, unless the model has learned sink logits.

    Args:
        result: Of ``AttentionMass(groups)``, such as ``AttentionMass(trace.groups)``.
        row: The row of the batch; None for the mean over all.
        ax: Where to draw, or None for a new figure.

    Returns:
        The figure.

    Raises:
        SelectionError: If there is no such row.
    """
    rows = len(result.mass)
    if row is not None and not 0 <= row < rows:
        raise SelectionError(f"Got row {row}; expected 0 to {rows - 1}, or None for all rows.")
    chosen = slice(None) if row is None else slice(row, row + 1)
    mass = result.mass[chosen].nanmean(dim=(0, 2, 3))
    null = None if result.null is None else result.null[chosen].nanmean(dim=(0, 2))
    empty = mass.abs().sum(dim=0) == 0
    curves: dict[str, Curve] = {}
    for i, name in enumerate(result.groups):
        values = torch.full_like(mass[:, i], float("nan")) if empty[i] else mass[:, i]
        curves[name] = (values, None if null is None or empty[i] else null[:, i])
    ax = new_axes(ax, (5.6, 4.2))
    _draw_curves(ax, curves, result.layers)
    ax.set_ylim(-0.02, 1.02)
    dress(ax, "Attention mass, mean of heads and queries", "layer", "mass on the group, 0 to 1")
    legend_below(ax)
    return figure_of(ax)


def plot_spikes(trace: SinkTrace, row: int = 0, *, ax: Axes | None = None) -> Figure:
    """The largest activation of every block of both towers, as a multiple of the median ``|h|``.

    Vision blocks show their output, LLM layers what their attention reads. The line at 1000
    medians (Sun et al., 2402.17762) is drawn where it falls into the picture.

    Args:
        trace: The trace.
        row: The row of the batch.
        ax: Where to draw, or None for a new figure.

    Returns:
        The figure.

    Raises:
        SelectionError: If there is no such row.
    """
    images = images_of(trace, row)
    ax = new_axes(ax, (5.6, 4.2))
    towers = _towers(trace)
    _draw_images(ax, towers.vision, trace.vit_spikes[images])
    style = STYLES["L-sinks"]
    ax.plot(
        towers.language,
        trace.llm_spikes[row].tolist(),
        color=style.colour,
        marker=style.marker,
        markersize=4,
        label="LLM, layer input",
    )
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    low, high = ax.set_ylim(low / 1.6, high * 1.6)
    if low <= MASSIVE_RATIO <= high:
        ax.axhline(MASSIVE_RATIO, color=QUIET, linewidth=1, linestyle="--", label="1000 medians")
    plain_log(ax.yaxis)
    dress(ax, "Spike size", "", "max |h| / median |h| (log scale)")
    towers.draw(ax)
    legend_below(ax)
    return figure_of(ax)


def plot_detections(trace: SinkTrace, row: int = 0, *, ax: Axes | None = None) -> Figure:
    """The share of the image tokens that each rule flags, by block, in both towers.

    A rule that flags more than 20 % finds the scale of a model and no sinks: that line is drawn.
    In the vision tower only the blocks that feed the projector decide.

    Args:
        trace: The trace.
        row: The row of the batch.
        ax: Where to draw, or None for a new figure.

    Returns:
        The figure.

    Raises:
        SelectionError: If there is no such row.
    """
    images = images_of(trace, row)
    ax = new_axes(ax, (5.6, 4.2))
    towers = _towers(trace)
    shares = trace.v_detection.fraction[images], trace.l_detection.fraction[row]
    _draw_images(ax, towers.vision, shares[0], "V rule, ViT")
    style = STYLES["L-sinks"]
    ax.plot(
        towers.language,
        shares[1].tolist(),
        color=style.colour,
        marker=style.marker,
        markersize=4,
        label="L rule, LLM",
    )
    top = max(float(share.max()) for share in shares)
    ax.set_ylim(-0.01, max(0.26, min(1.05, 1.15 * top)))
    ax.axhline(SATURATION, color=QUIET, linewidth=1, linestyle="--", label="saturated above 20 %")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    dress(ax, "What the rules flag", "", "flagged image tokens (%)")
    if top == 0:
        ax.text(
            0.5,
            0.45,
            "nothing is flagged",
            transform=ax.transAxes,
            ha="center",
            fontsize=LABEL,
            color=QUIET,
        )
    towers.draw(ax)
    legend_below(ax)
    return figure_of(ax)


def _towers(trace: SinkTrace) -> TowerAxis:
    return TowerAxis(trace.vit_spikes.shape[1], trace.llm_spikes.shape[1])


def _over(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of a mask in every layer; NaN where there is none."""
    return (values * mask).sum(dim=-1) / mask.sum(dim=-1)


def _draw_images(ax: Axes, x: list[int], values: Tensor, name: str = "ViT, block output") -> None:
    """One line per image; the lines differ by their dashes."""
    style = STYLES["V-sinks"]
    for i, line in enumerate(values.tolist()):
        ax.plot(
            x,
            line,
            color=style.colour,
            marker=style.marker,
            markersize=4,
            linestyle=("-", "--", ":", "-.")[i % 4],
            label=name if len(values) == 1 else f"{name}, image {i}",
        )


def _draw_curves(ax: Axes, curves: Mapping[str, Curve], layers: tuple[int, ...]) -> None:
    """A line per group, and its null dashed in the same colour."""
    for i, (name, (values, null)) in enumerate(curves.items()):
        style = style_of(name, i)
        found = not bool(values.isnan().all())
        ax.plot(
            layers,
            values.tolist(),
            color=style.colour,
            marker=style.marker,
            markersize=4.5,
            label=name if found else f"{name}: none found",
        )
        if found and null is not None:
            ax.plot(layers, null.tolist(), color=style.colour, linestyle="--", linewidth=1.1)
    if any(null is not None for _, null in curves.values()):
        ax.add_line(Line2D([], [], color=QUIET, linestyle="--", linewidth=1.1, label=NULL))
    ax.set_xticks([layers[i] for i in ticks_for(len(layers), 12)])
    ax.tick_params(labelsize=SMALL)


ACROSS = 3

"""Pictures side by side."""

WIDTHS = (1.0, 1.15, 1.12)


def plot_trace(trace: SinkTrace, row: int = 0, *, mass: MassResult | None = None) -> Figure:
    """Sinks on the pictures, attention by layer and kind, spikes, and what the rules flag.

    ::

        picture with sinks | attention on the picture | attention by layer
        (masses of groups) | spikes in both towers    | flagged fraction

    A row with several images shows each of them with its sinks, three side by side, and below them the
    masses or, without them, the attention by layer.

    Args:
        trace: The trace.
        row: The row of the batch.
        mass: The result of ``AttentionMass(trace.groups)``, for the masses of the groups.

    Returns:
        The figure.

    Raises:
        SelectionError: If there is no such row.
    """
    images = images_of(trace, row)
    tall = 4.2 * -(-len(images) // ACROSS)
    figure = new_figure((13.5, tall + 4.6))
    halves: Any = figure.subfigures(2, 1, height_ratios=[tall, 4.4])
    below = [partial(plot_spikes, trace, row), partial(plot_detections, trace, row)]
    if mass is not None:
        below.insert(0, partial(plot_mass_by_layer, mass, row))
    if len(images) == 1:
        above = [plot_sinks_on_image, plot_received_map, plot_received_by_layer]
        for plot, part in zip(above, halves[0].subfigures(1, 3, width_ratios=WIDTHS), strict=True):
            plot(trace, row, ax=part.subplots())
    else:
        across = min(ACROSS, len(images))
        parts = halves[0].subfigures(-(-len(images) // across), across, squeeze=False).flatten()
        for image, part in zip(range(len(images)), parts, strict=False):
            plot_sinks_on_image(trace, row, image, ax=part.subplots())
        if mass is None:
            below.insert(0, partial(plot_received_by_layer, trace, row))
    for plot, ax in zip(below, halves[1].subplots(1, len(below)), strict=True):
        plot(ax=ax)
    _headline(figure, trace, row)
    return figure


def _headline(figure: Figure, trace: SinkTrace, row: int) -> None:
    """How many sinks there are, above; what to beware of, below."""
    name = f" of row {row}" if len(trace.sample) > 1 else ""
    text = f"Sink trace{name}: {counts(trace, row)}\n"
    figure.suptitle(text, fontsize=TITLE + 2, x=0.01, ha="left")
    if trace.warnings:
        first, *others = trace.warnings
        more = f" (+{len(others)} more)" if others else ""
        text = _shorten(f"Warning: {neat(first)}", more)
        figure.supxlabel(text, fontsize=LABEL, color="#9a3412")


def _shorten(text: str, more: str, length: int = 150) -> str:
    return (text if len(text) <= length else text[: length - 3] + "...") + more

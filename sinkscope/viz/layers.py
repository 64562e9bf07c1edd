"""Figures by layer: attention by kind of token against its null, spikes, and flagged fractions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from sinkscope.detectors.detection import SATURATION
from sinkscope.errors import SelectionError
from sinkscope.viz.style import (
    LABEL,
    QUIET,
    SMALL,
    STYLES,
    TowerAxis,
    check_choice,
    check_row,
    dress,
    figure_of,
    images_of,
    legend_below,
    new_axes,
    plain_log,
    style_of,
    ticks_for,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sinkscope.experiments.trace import SinkTrace
    from sinkscope.probes import MassResult

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

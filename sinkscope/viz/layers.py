"""Figures by layer: attention, spikes, what the rules flag, and the whole trace."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from sinkscope.checks import check_choice
from sinkscope.errors import SelectionError
from sinkscope.viz import theme
from sinkscope.viz.image import plot_received_map, plot_sinks_on_image
from sinkscope.viz.tables import counts, neat
from sinkscope.viz.theme import LABEL, NULL, QUIET, SMALL, STYLES, TITLE, Trace

LIMIT: dict[str, Any] = {"color": QUIET, "linewidth": 1, "linestyle": "--"}
BOTH = "vision blocks, then LLM layers (dotted: projector)"


def plot_received_by_layer(
    trace: Trace, row: int = 0, *, heads: str = "mean", ax: Axes | None = None
) -> Figure:
    """Draw the attention that one token of each kind receives in every LLM layer, against its null.

    The mean over the tokens of a kind, for L-sinks and text sinks those of that layer. Dashed lines are the
    same tokens under uniform attention. ``heads`` is ``"mean"`` or ``"max"`` over the heads of a layer.
    """
    check_choice(("mean", "max"), error=SelectionError, heads=heads)
    theme.images_of(trace, row)
    got = trace.language.by_key
    joined = (got.mean if heads == "mean" else got.most)[row].nan_to_num()
    flat = got.null[row].nan_to_num()
    curves = {
        name: tuple((values * mask[row]).sum(-1) / mask[row].sum(-1) for values in (joined, flat))
        for name, mask in trace.groups.items()
    }
    ax = theme.new_axes(ax, (5.6, 4.2))
    _draw_curves(ax, curves, trace.l_detection.layers)
    every = torch.stack([part for curve in curves.values() for part in curve])
    every = every[every > 0]
    if len(every):
        ax.set_yscale("log")
        ax.set_ylim(float(every.min()) / 1.6, min(1.2, 2.5 * float(every.max())))
        theme.plain_log(ax.yaxis)
    else:
        theme.say(ax, "no layer attends", 0.5, fontsize=LABEL)
    title = f"Attention per token, {'mean' if heads == 'mean' else 'largest'} of heads"
    return theme.finish(ax, title, "LLM layer", "attention received, 0 to 1")


def plot_mass_by_layer(result: Any, row: int | None = None, *, ax: Axes | None = None) -> Figure:
    """Draw the attention mass on every group in each layer, against its null.

    The mean over heads and queries, and without ``row`` over rows, of a ``result`` such as that of
    ``AttentionMass(trace.groups)``. Over groups that split all keys, the masses of a layer sum to 1,
    unless the model has learned sink logits.
    """
    theme.check_has(
        result, "result", "mass", "lvlm.run(sample, [probe])[probe] of an AttentionMass"
    )
    if row is not None:
        theme.check_place(len(result.mass), ", or None for all rows", row=row)
    chosen = slice(None) if row is None else [row]
    mass, null = result.mass[chosen].nanmean(dim=(0, 2, 3)).T, [None] * len(result.groups)
    mass = mass.masked_fill(~mass.any(dim=1, keepdim=True), float("nan"))  # [group layer]
    if result.null is not None:
        null = result.null[chosen].nanmean(dim=(0, 2)).T
    ax = theme.new_axes(ax, (5.6, 4.2))
    curves = dict(zip(result.groups, zip(mass, null, strict=True), strict=True))
    _draw_curves(ax, curves, result.layers)
    ax.set_ylim(-0.02, 1.02)
    title = "Attention mass, mean of heads and queries"
    return theme.finish(ax, title, "layer", "mass on the group, 0 to 1")


def _draw_curves(ax: Axes, curves: Mapping[str, Any], layers: Sequence[int]) -> None:
    """A line per group, and its null dashed in the same colour."""
    for i, (name, (values, null)) in enumerate(curves.items()):
        style, found = theme.style_of(name, i), not bool(values.isnan().all())
        label = name if found else f"{name}: none found"
        ax.plot(layers, values.tolist(), **style.look, markersize=4.5, label=label)
        if found and null is not None:
            ax.plot(layers, null.tolist(), color=style.colour, **NULL)
    if any(null is not None for _, null in curves.values()):
        ax.add_line(theme.entry(color=QUIET, **NULL, label="dashed: uniform (null)"))
    ax.set_xticks([layers[i] for i in theme.ticks_for(len(layers), 12)])


def plot_spikes(trace: Trace, row: int = 0, *, ax: Axes | None = None) -> Figure:
    """Draw the largest activation of every block of both towers in medians of ``|h|``.

    Vision blocks show their output, LLM layers what their attention reads. The line at 1000
    medians (Sun et al., 2402.17762) is drawn where it falls into the picture.
    """
    images = theme.images_of(trace, row)
    ax = theme.new_axes(ax, (5.6, 4.2))
    names = ("ViT, block output", "LLM, layer input")
    _draw_towers(ax, trace.vit_spikes[images], trace.llm_spikes[row], names)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(low / 1.6, high * 1.6)
    if low / 1.6 <= 1000 <= high * 1.6:
        ax.axhline(1000.0, **LIMIT, label="1000 medians")
    theme.plain_log(ax.yaxis)
    return theme.finish(ax, "Spike size", BOTH, "max |h| / median |h| (log scale)")


def plot_detections(trace: Trace, row: int = 0, *, ax: Axes | None = None) -> Figure:
    """Draw the share of the image tokens that each rule flags, by block, in both towers.

    A rule that flags more than 20 % finds the scale of a model and no sinks: that line is drawn.
    In the vision tower only the blocks that feed the projector decide.
    """
    images = theme.images_of(trace, row)
    ax = theme.new_axes(ax, (5.6, 4.2))
    vision, language = trace.v_detection.fraction[images], trace.l_detection.fraction[row]
    _draw_towers(ax, vision, language, ("V rule, ViT", "L rule, LLM"))
    top = max([*vision.flatten().tolist(), float(language.max())])
    ax.set_ylim(-0.01, max(0.26, min(1.05, 1.15 * top)))
    ax.axhline(0.2, **LIMIT, label="saturated above 20 %")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if top == 0:
        theme.say(ax, "nothing is flagged", 0.45, fontsize=LABEL)
    return theme.finish(ax, "What the rules flag", BOTH, "flagged image tokens (%)")


def _draw_towers(ax: Axes, vision: Tensor, language: Tensor, names: tuple[str, str]) -> None:
    """Lines ``[image block]`` and ``[layer]`` over one axis, the projector between them."""
    n, m = vision.shape[1], len(language)
    for i, line in enumerate(vision.tolist()):
        name = names[0] if len(vision) == 1 else f"{names[0]}, image {i}"
        dashes: Any = {"linestyle": ("-", "--", ":", "-.")[i % 4], "markersize": 4}
        ax.plot(range(n), line, **STYLES["V-sinks"].look, **dashes, label=name)
    look: Any = {**STYLES["L-sinks"].look, "markersize": 4}
    ax.plot(range(n + 1, n + 1 + m), language.tolist(), **look, label=names[1])
    low, high = theme.ticks_for(n, 6), theme.ticks_for(m, 6)
    ax.set_xticks([*low, *(n + 1 + tick for tick in high)], [str(tick) for tick in low + high])
    ax.set_xlim(-0.6, n + m + 0.6)
    ax.axvline(n, color=QUIET, linewidth=1, linestyle=":")
    for x, name in ((-0.4, "ViT"), (n + 0.6, "LLM")):
        look = {"transform": ax.get_xaxis_transform(), "fontsize": SMALL, "color": QUIET}
        ax.text(x, 1.01, name, ha="left", va="bottom", **look)


def plot_trace(trace: Trace, row: int = 0, *, mass: Any = None) -> Figure:
    """Draw sinks on the pictures, attention by layer and kind, spikes, and what the rules flag.

    ::

        picture with sinks | attention on the picture | attention by layer
        (masses of groups) | spikes in both towers    | flagged fraction

    A row with several images shows each with its sinks, and below them the masses or, without them, the
    attention by layer. ``mass`` is the result of ``AttentionMass(trace.groups)``.
    """
    many, placed = len(theme.images_of(trace, row)), bool((trace.sample.tokens.row[row] >= 0).any())
    tall = 4.2 * max(1, -(-many // 3))
    figure = theme.new_figure((13.5, tall + 4.6))
    halves: Any = figure.subfigures(2, 1, height_ratios=[tall, 4.4])
    below = [partial(plot, trace, row) for plot in (plot_spikes, plot_detections)]
    if mass is not None:
        below.insert(0, partial(plot_mass_by_layer, mass, row))
    elif many > 1:
        below.insert(0, partial(plot_received_by_layer, trace, row))
    above: list[Any] = [plot_sinks_on_image, plot_received_map, plot_received_by_layer]
    sizes: dict[str, Any] = {"width_ratios": (1.0, 1.15, 1.12)}
    if not many or not placed:  # there is no picture, or its tokens have no place in it
        above, sizes = [plot_received_by_layer], {}
    if many > 1 and placed:
        above, sizes = [partial(plot_sinks_on_image, image=i) for i in range(many)], {}
    parts = halves[0].subfigures(-(-len(above) // 3), min(3, len(above)), squeeze=False, **sizes)
    for plot, part in zip(above, parts.flatten(), strict=False):
        plot(trace, row, ax=part.subplots())
    for plot, ax in zip(below, halves[1].subplots(1, len(below)), strict=True):
        plot(ax=ax)
    name = f" of row {row}" if len(trace.sample) > 1 else ""
    text = f"Sink trace{name}: {counts(trace, row)}\n"
    figure.suptitle(text, fontsize=TITLE + 2, x=0.01, ha="left")
    if trace.warnings:
        text, more = f"Warning: {neat(trace.warnings[0])}", len(trace.warnings) - 1
        text = text if len(text) <= 150 else text[:147] + "..."
        text += f" (+{more} more)" if more else ""
        figure.supxlabel(text, fontsize=LABEL, color="#9a3412")
    return figure

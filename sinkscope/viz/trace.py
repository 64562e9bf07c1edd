"""The whole trace in one figure."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from sinkscope.viz.image import plot_received_map, plot_sinks_on_image
from sinkscope.viz.layers import (
    plot_detections,
    plot_mass_by_layer,
    plot_received_by_layer,
    plot_spikes,
)
from sinkscope.viz.style import LABEL, TITLE, images_of, new_figure
from sinkscope.viz.table import counts
from sinkscope.viz.words import neat

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sinkscope.experiments.trace import SinkTrace
    from sinkscope.probes import MassResult

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

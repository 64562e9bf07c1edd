"""Figures, tables and reports of sink traces.

Every ``plot_...`` function returns its matplotlib figure, shows nothing by itself, and draws into
axes of yours if you pass ``ax=``. ``trace.plot()`` and ``print(trace.summary())`` are the short ways in.
"""

from sinkscope.viz.changes import effects_text
from sinkscope.viz.coefficients import plot_coefficients
from sinkscope.viz.effects import plot_control, plot_effects
from sinkscope.viz.generation import generation_text, plot_generation
from sinkscope.viz.heads import plot_heads, plot_received_heads
from sinkscope.viz.html import trace_html
from sinkscope.viz.image import plot_received_map, plot_sinks_on_image
from sinkscope.viz.layers import (
    plot_detections,
    plot_mass_by_layer,
    plot_received_by_layer,
    plot_spikes,
)
from sinkscope.viz.probes import plot_probes
from sinkscope.viz.prompt import plot_tokens
from sinkscope.viz.prompt_html import tokens_html
from sinkscope.viz.report import write_report
from sinkscope.viz.sweep import plot_sweep
from sinkscope.viz.text import trace_summary
from sinkscope.viz.trace import plot_trace
from sinkscope.viz.training import plot_training

__all__ = [
    "effects_text",
    "generation_text",
    "plot_coefficients",
    "plot_control",
    "plot_detections",
    "plot_effects",
    "plot_generation",
    "plot_heads",
    "plot_mass_by_layer",
    "plot_probes",
    "plot_received_by_layer",
    "plot_received_heads",
    "plot_received_map",
    "plot_sinks_on_image",
    "plot_spikes",
    "plot_sweep",
    "plot_tokens",
    "plot_trace",
    "plot_training",
    "tokens_html",
    "trace_html",
    "trace_summary",
    "write_report",
]

"""Figures, tables and reports of sink traces.

Every ``plot_...`` function returns its matplotlib figure and shows nothing by itself. Everywhere
``trace`` is a trace, ``row`` a row of the batch, ``image`` an image counted within its row, and ``ax``
where to draw, None for a new figure. All raise SelectionError for a row, image, task, condition, group
or word that is not there, LayerError for such a layer, and InputError for another table or folder.
"""

from sinkscope.viz.dataset import (
    plot_dataset_agreement,
    plot_dataset_layers,
    plot_dataset_lives,
    plot_dataset_places,
)
from sinkscope.viz.effects import effects_text, plot_control, plot_effects
from sinkscope.viz.image import plot_received_map, plot_sinks_on_image
from sinkscope.viz.layers import (
    plot_detections,
    plot_mass_by_layer,
    plot_received_by_layer,
    plot_spikes,
    plot_trace,
)
from sinkscope.viz.maps import plot_heads, plot_received_heads, plot_sweep
from sinkscope.viz.pages import write_report
from sinkscope.viz.probes import plot_coefficients, plot_probes, plot_training
from sinkscope.viz.tables import trace_html, trace_summary
from sinkscope.viz.tokens import generation_text, plot_generation, plot_tokens, tokens_html

__all__ = ["effects_text", "generation_text", "plot_coefficients", "plot_control"]
__all__ += ["plot_dataset_agreement", "plot_dataset_layers", "plot_dataset_lives"]
__all__ += ["plot_dataset_places"]
__all__ += ["plot_detections", "plot_effects", "plot_generation", "plot_heads"]
__all__ += ["plot_mass_by_layer", "plot_probes", "plot_received_by_layer", "plot_received_heads"]
__all__ += ["plot_received_map", "plot_sinks_on_image", "plot_spikes", "plot_sweep", "plot_tokens"]
__all__ += ["plot_trace", "plot_training", "tokens_html", "trace_html", "trace_summary"]
__all__ += ["write_report"]

"""The field's measures by name, each as its paper and its released code define it.

They are made of the probes, detectors and interventions of this library, which have more options. Here the
published settings are the defaults, and what must hold for a published number is checked first. Every
result names its ``source``.
"""

from sinkscope.published.measures import (
    MassiveEntries,
    OutlierTokens,
    RegisterNeurons,
    SinkRate,
    VisualSinks,
    massive_activations,
    outlier_tokens,
    sink_rate,
    test_time_registers,
    var,
)
from sinkscope.published.writes import (
    NopBroadcast,
    ValueEffects,
    nop_broadcast,
    value_edits,
    value_effects,
)

__all__ = ["MassiveEntries", "NopBroadcast", "OutlierTokens", "RegisterNeurons", "SinkRate"]
__all__ += ["ValueEffects", "VisualSinks", "massive_activations", "nop_broadcast"]
__all__ += [
    "outlier_tokens",
    "sink_rate",
    "test_time_registers",
    "value_edits",
    "value_effects",
    "var",
]

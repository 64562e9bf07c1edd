"""Experiments: questions that take more than one probe."""

from sinkscope.experiments.compare import Comparison, Item, compare
from sinkscope.experiments.conditions import EditSinks, top_received
from sinkscope.experiments.effects import effect_conditions, effect_table
from sinkscope.experiments.questions import Questions
from sinkscope.experiments.records import SinkRecord, nop_or_broadcast
from sinkscope.experiments.statistics import cluster_bootstrap
from sinkscope.experiments.trace import SinkTrace, trace_sinks

__all__ = [
    "Comparison",
    "EditSinks",
    "Item",
    "Questions",
    "SinkRecord",
    "SinkTrace",
    "cluster_bootstrap",
    "compare",
    "effect_conditions",
    "effect_table",
    "nop_or_broadcast",
    "top_received",
    "trace_sinks",
]

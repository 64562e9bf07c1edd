"""Experiments: questions that take more than one probe."""

from sinkscope.experiments.compare import Comparison, Item, compare
from sinkscope.experiments.records import SinkRecord, nop_or_broadcast
from sinkscope.experiments.statistics import cluster_bootstrap
from sinkscope.experiments.trace import SinkTrace, trace_sinks

__all__ = [
    "Comparison",
    "Item",
    "SinkRecord",
    "SinkTrace",
    "cluster_bootstrap",
    "compare",
    "nop_or_broadcast",
    "trace_sinks",
]

"""Experiments: questions that take more than one probe."""

from sinkscope.experiments import baselines
from sinkscope.experiments.coefficients import GateCoefficients, gate_coefficients
from sinkscope.experiments.compare import compare
from sinkscope.experiments.comparison import Comparison
from sinkscope.experiments.conditions import EditSinks, top_received
from sinkscope.experiments.effects import effect_conditions, effect_table
from sinkscope.experiments.generation import trace_generation
from sinkscope.experiments.items import Item
from sinkscope.experiments.linear_probes import linear_probes
from sinkscope.experiments.lives import GenerationTrace, SinkLife
from sinkscope.experiments.probing.labelled import LabelledImage
from sinkscope.experiments.probing.pooling import RandomGroup, sink_groups
from sinkscope.experiments.probing.result import LinearProbes
from sinkscope.experiments.questions import Questions
from sinkscope.experiments.records import SinkRecord, nop_or_broadcast
from sinkscope.experiments.statistics import (
    cluster_bootstrap,
    cluster_intervals,
    sign_flip_maximum,
)
from sinkscope.experiments.sweep import sweep
from sinkscope.experiments.sweeps.cost import SweepCost
from sinkscope.experiments.sweeps.grid import lsg_grid
from sinkscope.experiments.sweeps.result import Sweep
from sinkscope.experiments.sweeps.scores import Answered
from sinkscope.experiments.trace import SinkTrace, trace_sinks
from sinkscope.experiments.variants import PerSeed, per_seed

__all__ = [
    "Answered",
    "Comparison",
    "EditSinks",
    "GateCoefficients",
    "GenerationTrace",
    "Item",
    "LabelledImage",
    "LinearProbes",
    "PerSeed",
    "Questions",
    "RandomGroup",
    "SinkLife",
    "SinkRecord",
    "SinkTrace",
    "Sweep",
    "SweepCost",
    "baselines",
    "cluster_bootstrap",
    "cluster_intervals",
    "compare",
    "effect_conditions",
    "effect_table",
    "gate_coefficients",
    "linear_probes",
    "lsg_grid",
    "nop_or_broadcast",
    "per_seed",
    "sign_flip_maximum",
    "sink_groups",
    "sweep",
    "top_received",
    "trace_generation",
    "trace_sinks",
]

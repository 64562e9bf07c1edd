"""Experiments: questions that take more than one probe."""

from sinkscope.data.answers import Answered
from sinkscope.data.items import Item, LabelledImage
from sinkscope.data.questions import Questions
from sinkscope.experiments import baselines
from sinkscope.experiments.baselines import effect_conditions, effect_table
from sinkscope.experiments.comparing import Comparison, PerSeed, compare, per_seed
from sinkscope.experiments.controls import ControlResult, RandomControl, replacement_table
from sinkscope.experiments.dataset import trace_dataset
from sinkscope.experiments.dataset_result import DatasetTrace
from sinkscope.experiments.gating import GateCoefficients, gate_coefficients
from sinkscope.experiments.generation import GenerationTrace, SinkLife, trace_generation
from sinkscope.experiments.harness import read_lmms_eval
from sinkscope.experiments.measuring import SinkRecord, nop_or_broadcast
from sinkscope.experiments.pooling import RandomGroup, sink_groups
from sinkscope.experiments.probing import LinearProbes, linear_probes
from sinkscope.experiments.sink_edits import EditSinks, top_received
from sinkscope.experiments.statistics import cluster_bootstrap, cluster_intervals, sign_flip_maximum
from sinkscope.experiments.sweep_grid import SweepCost, lsg_grid
from sinkscope.experiments.sweep_result import Sweep
from sinkscope.experiments.sweeping import sweep
from sinkscope.experiments.tracing import SinkTrace, trace_sinks

__all__ = ["Answered", "Comparison", "ControlResult", "DatasetTrace", "EditSinks"]
__all__ += ["GateCoefficients"]
__all__ += ["GenerationTrace", "Item", "LabelledImage", "LinearProbes", "PerSeed", "Questions"]
__all__ += ["RandomControl", "RandomGroup", "SinkLife", "SinkRecord", "SinkTrace", "Sweep"]
__all__ += ["SweepCost", "baselines", "cluster_bootstrap", "cluster_intervals", "compare"]
__all__ += ["effect_conditions", "effect_table", "gate_coefficients", "linear_probes", "lsg_grid"]
__all__ += ["nop_or_broadcast", "per_seed", "read_lmms_eval", "replacement_table"]
__all__ += ["sign_flip_maximum", "sink_groups"]
__all__ += ["sweep", "top_received", "trace_dataset", "trace_generation", "trace_sinks"]

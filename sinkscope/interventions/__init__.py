"""Interventions: change what the model uses, exactly, and say what changed."""

from sinkscope.interventions.attention import (
    AttentionKnockout,
    MaskKeys,
    ScaleAttention,
    ScaleKeys,
)
from sinkscope.interventions.controls import ControlResult, RandomControl, replacement_table
from sinkscope.interventions.edited import Edited
from sinkscope.interventions.protocol import Edit, Effect, Intervention
from sinkscope.interventions.redistribute import ImageCentric, Redistribute
from sinkscope.interventions.register import (
    NeuronActivity,
    NeuronResult,
    TestTimeRegister,
    find_register_neurons,
)
from sinkscope.interventions.states import (
    AblateActivations,
    PatchActivations,
    ScaleTokens,
    SinkToFront,
)
from sinkscope.interventions.streaming import EvictKeys
from sinkscope.interventions.values import AblateValues

__all__ = [
    "AblateActivations",
    "AblateValues",
    "AttentionKnockout",
    "ControlResult",
    "Edit",
    "Edited",
    "Effect",
    "EvictKeys",
    "ImageCentric",
    "Intervention",
    "MaskKeys",
    "NeuronActivity",
    "NeuronResult",
    "PatchActivations",
    "RandomControl",
    "Redistribute",
    "ScaleAttention",
    "ScaleKeys",
    "ScaleTokens",
    "SinkToFront",
    "TestTimeRegister",
    "find_register_neurons",
    "replacement_table",
]

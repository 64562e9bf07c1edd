"""Interventions: change what the model uses, exactly, and say what changed."""

from sinkscope.interventions.application import Edited
from sinkscope.interventions.keys import (
    AttentionKnockout,
    AttentionTemperature,
    EvictKeys,
    ImageCentric,
    MaskKeys,
    Redistribute,
    ScaleAttention,
    ScaleKeys,
)
from sinkscope.interventions.live import LiveRule
from sinkscope.interventions.registers import (
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
from sinkscope.interventions.values import AblateValues
from sinkscope.protocols import BaseIntervention, Edit, Effect, Intervention

__all__ = ["AblateActivations", "AblateValues", "AttentionKnockout", "AttentionTemperature"]
__all__ += ["BaseIntervention", "Edit", "Edited", "Effect", "EvictKeys", "ImageCentric"]
__all__ += ["Intervention", "LiveRule", "MaskKeys", "NeuronActivity", "NeuronResult"]
__all__ += ["PatchActivations", "Redistribute", "ScaleAttention", "ScaleKeys", "ScaleTokens"]
__all__ += ["SinkToFront", "TestTimeRegister", "find_register_neurons"]

"""Layer-wise Sink Gating: the gate, how it is attached, trained and kept."""

from sinkscope.detectors.choice import describe, detector_of
from sinkscope.lsg.attach import Attachment
from sinkscope.lsg.config import GateConfig
from sinkscope.lsg.gate import LSG
from sinkscope.lsg.importing import ImportedGates, import_gates
from sinkscope.lsg.result import GateStack, TrainResult, greedy_stack
from sinkscope.lsg.train import TrainingCost, train_lsg
from sinkscope.training import TrainingSettings

__all__ = ["LSG", "Attachment", "GateConfig", "GateStack", "ImportedGates", "TrainResult"]
__all__ += ["TrainingCost", "TrainingSettings", "describe", "detector_of", "greedy_stack"]
__all__ += ["import_gates", "train_lsg"]

"""Layer-wise Sink Gating: the gate, how it is attached, trained and kept."""

from sinkscope.lsg.attach import Attachment
from sinkscope.lsg.config import GateConfig, describe, detector_of
from sinkscope.lsg.gate import LSG
from sinkscope.lsg.importing import ImportedGates, import_gates

__all__ = [
    "LSG",
    "Attachment",
    "GateConfig",
    "ImportedGates",
    "describe",
    "detector_of",
    "import_gates",
]

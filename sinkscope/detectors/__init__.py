"""Detectors: from scores to sink tokens, with their flagged fraction, null and warnings."""

from sinkscope.detectors.calibration import Calibration, TowerCalibration, calibrate
from sinkscope.detectors.choice import KNOWN, Known, SinkRules, known_for, table
from sinkscope.detectors.detection import (
    SATURATION,
    Detection,
    Detector,
    agreement,
    detect,
    detect_all,
    jaccard,
)
from sinkscope.detectors.gap import Gap, Limits
from sinkscope.detectors.kinds import RandomTokens, VisionTokens
from sinkscope.detectors.rules import (
    CosineToBOS,
    Massive,
    Norm,
    NoSinks,
    Received,
    SinkDimensions,
    ZScore,
)

__all__ = [
    "KNOWN",
    "SATURATION",
    "Calibration",
    "CosineToBOS",
    "Detection",
    "Detector",
    "Gap",
    "Known",
    "Limits",
    "Massive",
    "NoSinks",
    "Norm",
    "RandomTokens",
    "Received",
    "SinkDimensions",
    "SinkRules",
    "TowerCalibration",
    "VisionTokens",
    "ZScore",
    "agreement",
    "calibrate",
    "detect",
    "detect_all",
    "jaccard",
    "known_for",
    "table",
]

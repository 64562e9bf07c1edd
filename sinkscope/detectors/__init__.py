"""Detectors: from scores to sink tokens, with their flagged fraction, null and warnings."""

from sinkscope.detectors.calibration import Calibration, Limits, TowerCalibration, calibrate
from sinkscope.detectors.choice import KNOWN, Known, SinkRules, known_for, table
from sinkscope.detectors.detection import SATURATION, Detection, jaccard
from sinkscope.detectors.gap import Gap
from sinkscope.detectors.kinds import RandomTokens, VisionTokens
from sinkscope.detectors.rules import (
    CosineToBOS,
    Detector,
    Massive,
    Norm,
    NoSinks,
    Received,
    SinkDimensions,
)
from sinkscope.detectors.running import agreement, detect, detect_all

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
    "agreement",
    "calibrate",
    "detect",
    "detect_all",
    "jaccard",
    "known_for",
    "table",
]

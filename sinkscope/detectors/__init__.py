"""Detectors: from scores to sink tokens, with their flagged fraction, null and warnings."""

from sinkscope.detectors.calibrate import Calibration, TowerCalibration, calibrate
from sinkscope.detectors.constants import KNOWN, Known, known_for, table
from sinkscope.detectors.detection import SATURATION, Detection, jaccard
from sinkscope.detectors.kinds import VisionTokens
from sinkscope.detectors.random import RandomTokens
from sinkscope.detectors.rules import (
    CosineToBOS,
    Detector,
    Massive,
    Norm,
    NoSinks,
    Received,
    SinkDimensions,
)
from sinkscope.detectors.run import agreement, detect, detect_all

__all__ = [
    "KNOWN",
    "SATURATION",
    "Calibration",
    "CosineToBOS",
    "Detection",
    "Detector",
    "Known",
    "Massive",
    "NoSinks",
    "Norm",
    "RandomTokens",
    "Received",
    "SinkDimensions",
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

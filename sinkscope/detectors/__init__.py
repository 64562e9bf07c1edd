"""Detectors: from scores to sink tokens, with their flagged fraction, null and warnings."""

from sinkscope.detectors.calibration import Calibration, TowerCalibration, calibrate
from sinkscope.detectors.choice import (
    KNOWN,
    Known,
    RandomTokens,
    SinkRules,
    VisionTokens,
    known_for,
    table,
)
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
from sinkscope.detectors.rules import (
    CosineToBOS,
    Massive,
    Norm,
    NoSinks,
    Received,
    SinkDimensions,
    ZScore,
)

__all__ = ["SATURATION", "Detection", "Detector", "agreement", "detect", "detect_all", "jaccard"]
__all__ += ["CosineToBOS", "Gap", "Limits", "Massive", "NoSinks", "Norm", "RandomTokens"]
__all__ += ["Received", "SinkDimensions", "VisionTokens", "ZScore"]
__all__ += ["KNOWN", "Calibration", "Known", "SinkRules", "TowerCalibration", "calibrate"]
__all__ += ["known_for", "table"]

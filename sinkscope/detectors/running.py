"""Use detectors alone: run one or several on a sample, and compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sinkscope.detectors.detection import Detection, jaccard
from sinkscope.detectors.rules import Detector, decide
from sinkscope.errors import DetectorError
from sinkscope.sites import Tower

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.models.inputs import Sample
    from sinkscope.models.lvlm import LVLM, Run


def check_detector(detector: Any) -> Detector:
    """The detector itself.

    Raises:
        DetectorError: If it is none.
    """
    if isinstance(detector, type) or not isinstance(detector, Detector):
        raise DetectorError(
            f"Got {detector!r} as detector; expected an object such as "
            "ss.detectors.SinkDimensions([1415, 2533], tau=20) or ss.detectors.Norm('valley')."
        )
    return detector


def visual_tokens(sample: Sample, tower: Tower) -> tuple[Any, Any]:
    """Image tokens and live tokens of a tower, bool ``[batch pos]``."""
    if tower == "vision":
        return sample.tokens.vision.select("patch"), sample.tokens.vision.live
    return sample.tokens.image >= 0, sample.tokens.live


def decided(detector: Detector, run: Run, probe: Any, lvlm: LVLM, sample: Sample) -> Detection:
    """The detection of a probe that already ran."""
    tower = probe.tower
    visual, live = visual_tokens(sample, tower)
    return decide(detector, run[probe], visual, live, tower, lvlm.anatomy.tower(tower))


def detect(
    lvlm: LVLM,
    sample: Sample,
    detector: Detector,
    *,
    tower: Tower = "language",
    layers: Any = None,
    remote: bool | str | None = None,
) -> Detection:
    """Run one detector.

    Args:
        lvlm: The model.
        sample: The sample.
        detector: The detector.
        tower: Where to look. States are judged on ``resid_pre`` in the language tower (what the
            block's attention reads) and on ``resid_post`` in the vision tower.
        layers: Block indices, or None for all.
        remote: See `LVLM.run`.

    Returns:
        The detection.

    Raises:
        DetectorError: If the detector cannot work on this tower.
    """
    return detect_all(lvlm, sample, {"it": detector}, tower=tower, layers=layers, remote=remote)[
        "it"
    ]


def detect_all(
    lvlm: LVLM,
    sample: Sample,
    detectors: Mapping[str, Detector],
    *,
    tower: Tower = "language",
    layers: Any = None,
    remote: bool | str | None = None,
) -> dict[str, Detection]:
    """Run several detectors in one forward pass.

    Args:
        lvlm: The model.
        sample: The sample.
        detectors: Name -> detector.
        tower: See `detect`.
        layers: Block indices, or None for all.
        remote: See `LVLM.run`.

    Returns:
        Name -> detection.

    Raises:
        DetectorError: If a detector cannot work on this tower.
    """
    anatomy = lvlm.anatomy.tower(tower)
    probes = {
        name: check_detector(detector).probe(tower, layers, anatomy)
        for name, detector in detectors.items()
    }
    run = lvlm.run(sample, list(probes.values()), logits="last", remote=remote)
    return {
        name: decided(detectors[name], run, probe, lvlm, sample) for name, probe in probes.items()
    }


def agreement(detections: Mapping[str, Detection] | Sequence[Detection]) -> pd.DataFrame:
    """Pairwise Jaccard index of detections of the same sample, tower and layers.

    Args:
        detections: Name -> detection, or a list.

    Returns:
        A square table in [0, 1]; two empty detections agree fully.

    Raises:
        DetectorError: If they looked at other tokens or layers, or are no detections; or if two of a
            list have the same name.
    """
    import pandas as pd

    listed = [*detections.values()] if isinstance(detections, Mapping) else [*detections]
    for one in listed:
        if not isinstance(one, Detection):
            raise DetectorError(f"Got {type(one).__name__}; expected what ss.detect(...) returns.")
    if not isinstance(detections, Mapping):
        detections = {one.detector: one for one in listed}
    if len(detections) < len(listed):
        raise DetectorError(
            f"Got {len(listed)} detections with {len(detections)} names; expected a name for each. "
            "Write agreement({'a': one, 'b': other})."
        )
    names = list(detections)
    table = [[jaccard(detections[a], detections[b]) for b in names] for a in names]
    return pd.DataFrame(table, index=names, columns=names)

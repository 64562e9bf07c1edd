"""What a detector is and returns, and how detectors are run and compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.anatomy.towers import TowerAnatomy
from sinkscope.checks import is_whole, typed
from sinkscope.errors import DetectorError, LayerError
from sinkscope.kernels.gating import reaches
from sinkscope.models.inputs import Sample
from sinkscope.models.lvlm import LVLM, Run
from sinkscope.protocols import Probe
from sinkscope.results import Result
from sinkscope.sites import Tower

SATURATION = 0.2
"""A detector that flags more than this share of the image tokens is saturated."""


@runtime_checkable
class Detector(Protocol):
    """Anything that flags tokens. It may also have ``strict``, whether a score that equals its threshold is
    below it, and ``also(result)``, bool ``[batch layer pos]``, what must hold besides."""

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """What to measure; raises if the parameters cannot work on this tower."""
        ...

    def scores(self, result: Any) -> Tensor:
        """The scores ``[batch layer pos]`` of a result."""
        ...

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """The threshold of every row and layer, ``[batch layer]``."""
        ...

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """The score to expect without any sink."""
        ...


@dataclass(frozen=True, eq=False)
class Detection(Result, columns={"score": "scores", "flagged": "mask"}):
    """The tokens a detector flags; rows are images in the vision tower.

    ``scores`` are NaN at padding, a ``threshold`` is infinite where the data give none, ``null`` is the score
    to expect without any sink. ``visual`` are the image tokens (patches in the ViT). If ``strict``, a score
    that equals its threshold is below it. ``warnings`` must be read before the mask is used.
    """

    detector: str
    tower: Tower
    layers: tuple[int, ...]
    mask: Bool[Tensor, "batch layer pos"]
    scores: Float[Tensor, "batch layer pos"]
    threshold: Float[Tensor, "batch layer"]
    null: float
    visual: Bool[Tensor, "batch pos"]
    strict: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def fraction(self) -> Float[Tensor, "batch layer"]:
        """The flagged share of the image tokens."""
        count = self.visual.sum(dim=-1).clamp(min=1)
        return (self.mask & self.visual[:, None]).sum(dim=-1) / count[:, None]

    @property
    def saturated(self) -> bool:
        """Whether more than 20 % of the image tokens are flagged in some layer."""
        return bool((self.fraction > SATURATION).any())

    def at(self, layer: int) -> Bool[Tensor, "batch pos"]:
        """The mask of one layer; LayerError if the layer was not looked at."""
        if not is_whole(layer) or layer not in self.layers:
            raise LayerError(f"Got layer {layer!r}; this detection holds layers {self.layers}.")
        return self.mask[:, self.layers.index(layer)]

    def any_layer(self) -> Bool[Tensor, "batch pos"]:
        """Tokens flagged in at least one layer."""
        return self.mask.any(dim=1)


def decide(
    detector: Any, result: Any, visual: Tensor, live: Tensor, tower: Tower, anatomy: TowerAnatomy
) -> Detection:
    """Flag tokens of a result, with a warning if over 20 % of the image tokens are flagged. ``visual`` are
    the image tokens and ``live`` all tokens, bool ``[batch pos]``."""
    scores, strict = detector.scores(result), getattr(detector, "strict", False)
    limit = detector.thresholds(result, scores)
    above = reaches(scores, limit[..., None], strict) & live[:, None]
    if getattr(detector, "also", None) is not None:
        above = above & detector.also(result)
    parts = (above, scores, limit, detector.null(result, anatomy), visual, strict)
    found = Detection(repr(detector), tower, result.layers, *parts)
    return replace(found, warnings=saturation(found))


def saturation(found: Detection) -> tuple[str, ...]:
    """The warning if over 20 % of the image tokens are flagged in some layer, or none."""
    if not found.saturated:
        return ()
    worst = found.fraction.amax(dim=0)
    layers = [found.layers[i] for i in (worst > SATURATION).nonzero().flatten().tolist()]
    text = (
        f"{found.detector} flags up to {float(worst.max()):.0%} of the image tokens in the {found.tower} "
        "tower "
        f"(layers {layers}): over {SATURATION:.0%} it finds no sinks but the scale of the model. Calibrate "
        "with ss.calibrate(lvlm, samples) or compare detectors."
    )
    return (text,)


@cache
def expected_peak(n: int) -> float:
    """``E max of n |N(0, 1)|``: the null of a largest normalised channel among ``n``."""
    t = torch.linspace(0, 12, 24001, dtype=torch.float64)
    return float(torch.trapezoid(1 - torch.erf(t / 2**0.5) ** n, t))


def check_detector(detector: Any) -> Detector:
    """The detector itself; DetectorError if it is none."""
    if isinstance(detector, type) or not isinstance(detector, Detector):
        raise DetectorError(
            f"Got {detector!r} as detector; expected an object such as "
            "ss.detectors.SinkDimensions([1415, 2533], tau=20) or ss.detectors.Norm('valley')."
        )
    return detector


def check_rules(*rules: Any) -> None:
    """Refuse what is neither a detector nor None, before any work: DetectorError."""
    for rule in rules:
        if rule is not None:
            check_detector(rule)


def visual_tokens(sample: Sample, tower: Tower) -> tuple[Any, Any]:
    """Image tokens and live tokens of a tower, bool ``[batch pos]``."""
    if tower == "vision":
        return sample.tokens.vision.select("patch"), sample.tokens.vision.live
    return sample.tokens.image >= 0, sample.tokens.live


def unseen(anatomy: TowerAnatomy, samples: Sequence[Sample]) -> str:
    """Why nothing can be measured in a tower, or ""."""
    if (
        anatomy.tower == "vision"
        and anatomy.blocks
        and not any(len(s.tokens.vision.live) for s in samples)
    ):
        return "no token of the prompt is known to show an image"
    return "" if anatomy.blocks else anatomy.missing


def decided(
    detector: Detector, run: Run | Mapping[Any, Any], probe: Any, lvlm: Any, sample: Sample
) -> Detection:
    """The detection of a probe whose result is there."""
    tower, masks = probe.tower, visual_tokens(sample, probe.tower)
    return decide(detector, run[probe], *masks, tower, lvlm.anatomy.tower(tower))


@typed
def detect(
    lvlm: LVLM,
    sample: Sample,
    detector: Detector,
    *,
    tower: Tower = "language",
    layers: Any = None,
    remote: bool | str | None = None,
) -> Detection:
    """Run one detector; DetectorError if it cannot work on this tower.

    States are judged on ``resid_pre`` in the LLM (what the block's attention reads) and on ``resid_post`` in
    the vision tower. ``layers`` are block indices, or None for all.
    """
    found = detect_all(lvlm, sample, {"it": detector}, tower=tower, layers=layers, remote=remote)
    return found["it"]


@typed
def detect_all(
    lvlm: LVLM,
    sample: Sample,
    detectors: Mapping[str, Detector],
    *,
    tower: Tower = "language",
    layers: Any = None,
    remote: bool | str | None = None,
) -> dict[str, Detection]:
    """Run several detectors, given by name, in one forward pass; for the rest see `detect`."""
    anatomy = lvlm.anatomy.tower(tower)
    if not isinstance(detectors, Mapping) or not detectors:
        raise DetectorError("Got no dict of detectors; expected name -> detector. See ss.detect.")
    probes = {n: check_detector(d).probe(tower, layers, anatomy) for n, d in detectors.items()}
    run = lvlm.run(sample, list(probes.values()), logits="last", remote=remote)
    return {name: decided(detectors[name], run, p, lvlm, sample) for name, p in probes.items()}


@typed
def jaccard(one: Detection, other: Detection) -> float:
    """Share of the (layer, token) pairs flagged by either that both flag; 1 if both are empty. DetectorError
    if they looked at other tokens or layers."""
    looked = [(each.tower, each.layers, tuple(each.mask.shape)) for each in (one, other)]
    if looked[0] != looked[1]:
        got = f"Got detections of (tower, layers, shape) {looked[0]} and {looked[1]}"
        raise DetectorError(f"{got}; expected the same sample, tower and layers.")
    union = (one.mask | other.mask).sum().item()
    return 1.0 if union == 0 else (one.mask & other.mask).sum().item() / union


@typed
def agreement(detections: Mapping[str, Detection] | Sequence[Detection]) -> pd.DataFrame:
    """A square table of `jaccard` of detections of the same sample, tower and layers, by name or listed.
    DetectorError if they looked at other tokens or layers, or two of a list have the same name."""
    named = isinstance(detections, Mapping)
    listed = [*detections.values()] if named else [*detections]
    if not listed:
        raise DetectorError("Got no detections; expected some. Write ss.detect(...).")
    for one in listed:
        if not isinstance(one, Detection):
            raise DetectorError(f"Got {type(one).__name__}; expected what ss.detect(...) returns.")
    names = [*detections] if named else [one.detector for one in listed]
    if (many := len(set(names))) < len(listed):
        raise DetectorError(
            f"Got {len(listed)} detections with {many} names; expected a name for each. Write "
            "agreement({'a': one, 'b': other})."
        )
    table = [[jaccard(one, other) for other in listed] for one in listed]
    return pd.DataFrame(table, index=names, columns=names)

"""What a detector returns: the flagged tokens, why, and how much to trust it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.checks import is_whole
from sinkscope.errors import DetectorError, LayerError
from sinkscope.results import Result, tidy
from sinkscope.sites import Tower

if TYPE_CHECKING:
    import pandas as pd

SATURATION = 0.2
"""A detector that flags more than this share of the image tokens is saturated."""


@dataclass(frozen=True, eq=False)
class Detection(Result):
    """The tokens a detector flags.

    Attributes:
        detector: The detector's description.
        tower: ``"language"`` or ``"vision"``.
        layers: The block indices, in order.
        mask: Bool ``[batch layer pos]``; rows are images in the vision tower.
        scores: Float ``[batch layer pos]``; NaN at padding.
        threshold: Float ``[batch layer]``; infinite where the data give none.
        null: The score to expect without any sink, see each detector.
        visual: Bool ``[batch pos]``, which tokens are image tokens (patches in the ViT).
        strict: Whether a score that equals its threshold is below it.
        warnings: What a reader must know before using the mask.
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
    warnings: tuple[str, ...] = field(default=())

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
        """The mask of one layer.

        Raises:
            LayerError: If the layer was not looked at.
        """
        if not is_whole(layer) or layer not in self.layers:
            raise LayerError(f"Got layer {layer!r}; this detection holds layers {self.layers}.")
        return self.mask[:, self.layers.index(layer)]

    def any_layer(self) -> Bool[Tensor, "batch pos"]:
        """Tokens flagged in at least one layer."""
        return self.mask.any(dim=1)

    def to_dataframe(self) -> pd.DataFrame:
        """Columns batch, layer, pos, score, flagged."""
        table = tidy({"score": self.scores}, ("batch", "layer", "pos"), {"layer": self.layers})
        return table.assign(flagged=self.mask[~self.scores.isnan()].numpy())


def saturation_warning(detection: Detection) -> Detection:
    """The same detection with a warning if it flags over 20 % of the image tokens."""
    if not detection.saturated:
        return detection
    from dataclasses import replace

    worst = detection.fraction.amax(dim=0)
    layers = [
        layer for layer, f in zip(detection.layers, worst.tolist(), strict=True) if f > SATURATION
    ]
    text = (
        f"{detection.detector} flags up to {float(worst.max()):.0%} of the image tokens in the "
        f"{detection.tower} tower (layers {layers}): over {SATURATION:.0%} it finds no sinks but "
        "the scale of the model. Calibrate with ss.calibrate(lvlm, samples) or compare detectors."
    )
    return replace(detection, warnings=(*detection.warnings, text))


def jaccard(one: Detection, other: Detection) -> float:
    """Agreement of two detections: shared over all flagged (layer, token) pairs; 1 if both are empty.

    Raises:
        DetectorError: If they looked at other tokens or layers.
    """
    looked = [(each.tower, each.layers, tuple(each.mask.shape)) for each in (one, other)]
    if looked[0] != looked[1]:
        raise DetectorError(
            f"Got detections of the (tower, layers, shape) {looked[0]} and {looked[1]}; expected the "
            "same sample, tower and layers."
        )
    union = (one.mask | other.mask).sum().item()
    return 1.0 if union == 0 else (one.mask & other.mask).sum().item() / union


def expected_peak(n: int) -> float:
    """``E max of n |N(0, 1)|``: the null of a largest normalised channel among ``n``."""
    t = torch.linspace(0, 12, 24001, dtype=torch.float64)
    return float(torch.trapezoid(1 - torch.erf(t / 2**0.5) ** n, t))

"""Limits: one threshold per layer, on one of three scores; what a calibration keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.checks import is_number
from sinkscope.detectors.rules import (
    STATE_SITE,
    Detector,
    Massive,
    NoSinks,
    SinkDimensions,
    check_strict,
)
from sinkscope.errors import DetectorError
from sinkscope.probes import MassiveActivations, Probe, SinkDimensionScores
from sinkscope.sites import Tower

if TYPE_CHECKING:
    from sinkscope.models.anatomy import TowerAnatomy

SCORES = ("channels", "ratio", "absolute")


@dataclass(frozen=True)
class Limits:
    """Tokens whose score reaches the limit of their layer.

    Args:
        score: ``"channels"``: largest ``|h|`` on the sink channels, divided by the token's RMS;
            ``"ratio"``: largest ``|h|`` over the layer's median; ``"absolute"``: largest ``|h|``.
        limits: One per block of the tower; infinity where the layer has no sink.
        dims: The sink channels, for ``"channels"``.
    """

    score: str
    limits: Sequence[float]
    dims: Sequence[int] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        if self.score not in SCORES or (self.score == "channels") != bool(len(self.dims)):
            raise DetectorError(
                f"Got score={self.score!r} with dims={tuple(self.dims)}; expected one of {SCORES}, and "
                "channels for 'channels' only. Limits come from ss.calibrate(lvlm, samples)."
            )
        if not all(limit == float("inf") or is_number(limit, above=0) for limit in self.limits):
            raise DetectorError(
                f"Got limits={tuple(self.limits)}; expected a positive one per block, infinity where there "
                "is no sink. Limits come from ss.calibrate(lvlm, samples)."
            )
        check_strict(self)

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """What the score is made of.

        Raises:
            DetectorError: If there is not one limit per block.
        """
        if len(self.limits) != anatomy.n_layers:
            raise DetectorError(
                f"Got {len(self.limits)} limits for the {tower} tower of {anatomy.n_layers} blocks; "
                "expected a positive one per block. Limits belong to one model: run "
                "ss.calibrate(lvlm, samples) for this one."
            )
        if self.score == "channels":
            return SinkDimensionScores(tuple(self.dims), layers, tower, "rms", STATE_SITE[tower])
        return MassiveActivations(layers, tower, 1, STATE_SITE[tower])

    def scores(self, result: Any) -> Tensor:
        """The score of every token."""
        if self.score == "channels":
            return result.scores
        return result.ratio() if self.score == "ratio" else result.values[..., 0].abs()

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """The limits of the layers that were read."""
        limits = torch.tensor([float(self.limits[layer]) for layer in result.layers])
        return limits[None].expand(scores.shape[0], -1)

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """What an isotropic state shows, as for `SinkDimensions` and `Massive`."""
        return self._like(1.0).null(result, anatomy) / (
            float(result.median.nanmean()) if self.score == "ratio" else 1.0
        )

    def at(self, layer: int) -> Detector:
        """The rule of one layer as a detector with one number, for gates, which judge in one layer."""
        limit = float(self.limits[layer])
        return NoSinks("no sink in this layer") if limit == float("inf") else self._like(limit)

    def _like(self, limit: float) -> Detector:
        if self.score == "channels":
            return SinkDimensions(tuple(self.dims), limit, "rms", strict=False)
        if self.score == "ratio":
            return Massive(absolute=0.0, ratio=limit)
        return Massive(absolute=limit, ratio=0.0)

    def __repr__(self) -> str:
        known = [limit for limit in self.limits if limit != float("inf")]
        span = f"{min(known):.3g} to {max(known):.3g}" if known else "none"
        dims = f", dims={tuple(self.dims)}" if len(self.dims) else ""
        return f"Limits({self.score!r}, {span} in {len(known)} of {len(self.limits)} layers{dims})"

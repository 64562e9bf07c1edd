"""RandomTokens: a control that flags tokens which are sinks by no rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.checks import is_whole
from sinkscope.errors import DetectorError
from sinkscope.kernels.gating import hashed
from sinkscope.probes import MassiveActivations, Probe
from sinkscope.sites import Tower

if TYPE_CHECKING:
    from sinkscope.models.anatomy import TowerAnatomy


@dataclass(frozen=True)
class RandomTokens:
    """As many tokens as one likes, chosen by a hash: the control for a detector.

    The choice differs from image to image and is the same whenever an image is seen again. It is a
    hash of every token's position and largest channel, so rounding in another dtype can change it. In
    a ViT the CLS token may be among the chosen; most projectors drop it, and no LLM token is made of it.

    Args:
        count: How many tokens per row.
        seed: Another seed, other tokens.
    """

    count: int
    seed: int = 0
    strict: bool = True

    def __post_init__(self) -> None:
        if not is_whole(self.count, 1) or not is_whole(self.seed):
            raise DetectorError(
                f"Got count={self.count!r}, seed={self.seed!r}; expected whole numbers, the count 1 or more."
            )

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """The largest channel of every token."""
        from sinkscope.detectors.rules import STATE_SITE

        return MassiveActivations(layers, tower, 1, STATE_SITE[tower])

    def scores(self, result: Any) -> Tensor:
        """Minus the rank of the hash; NaN at padding."""
        live = ~result.values[..., 0].isnan()
        peaks = result.channels[..., 0]
        ranks = torch.stack(
            [hashed(peaks[:, i], live[:, i], self.seed) for i in range(peaks.shape[1])], dim=1
        )
        return (-ranks.float()).masked_fill(~live, float("nan"))

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """Minus the count."""
        return torch.full(scores.shape[:2], -float(self.count))

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """Minus the mean rank."""
        return -(result.values.shape[2] - 1) / 2

"""ZScore: tokens whose norm stands out from the other tokens of their row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sinkscope.checks import check_number
from sinkscope.detectors.rules import NormRule
from sinkscope.errors import DetectorError


@dataclass(frozen=True)
class ZScore(NormRule):
    """Norms more than ``z`` standard deviations above the mean of the layer's live tokens, per row.

    The score is the L2 norm; the null is the median norm. Of n tokens none lies more than
    ``(n - 1) / sqrt(n)`` deviations above the mean, so a short row has none at ``z=3``: that takes 11.
    Large norms raise the deviation that they are judged by; ``Norm("valley")`` does not have that.

    Args:
        z: Standard deviations (of a sample, with n - 1).
        strict: Whether a norm that equals the limit is no sink.
    """

    z: float = 3.0
    strict: bool = True

    def __post_init__(self) -> None:
        check_number(above=0, z=self.z, error=DetectorError)
        super().__post_init__()

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """Mean plus ``z`` deviations of every row and layer; infinite for fewer than two tokens."""
        count, mean = (~scores.isnan()).sum(dim=-1), scores.nanmean(dim=-1)
        square = (scores - mean[..., None]).pow(2).nansum(dim=-1)
        deviation = (square / (count - 1).clamp(min=1)).sqrt()
        return (mean + self.z * deviation).masked_fill(count < 2, float("inf"))

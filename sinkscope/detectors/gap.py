"""The gap rule: a sink stands apart from the other tokens of its layer, and draws attention there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sinkscope.checks import is_number
from sinkscope.detectors.detection import expected_peak
from sinkscope.detectors.rules import check_strict
from sinkscope.errors import DetectorError
from sinkscope.probes.evidence import EvidenceResult, SinkEvidence
from sinkscope.probes.protocol import Probe
from sinkscope.sites import Tower

if TYPE_CHECKING:
    from sinkscope.models.anatomy import TowerAnatomy

GAP, MEDIANS, DRAWS, GROWTH = 3.0, 20.0, 0.06, 2.0


@dataclass(frozen=True)
class Gap:
    """Tokens that spike *and* draw attention, judged on the sample itself; no constant of a model.

    In a layer, a token **spikes** if its largest ``|h|`` is at least ``gap`` times the upper quartile of
    that number over the tokens of the layer, and at least ``medians`` times the layer's median ``|h|``.
    In the LLM the channel must also have doubled since the embeddings: a V-sink, which arrives large in
    channels of its own, is none for that. It **draws** if some head gives it at least ``draws`` beyond
    uniform attention, from other tokens only: in the LLM in that layer, in the vision tower in some
    block. In the vision tower patches are judged; CLS and registers are kinds of their own.

    The score is the largest ``|h|`` in medians, the threshold the larger of the two limits. Null: the
    peak-to-median ratio of an isotropic state.

    Args:
        gap: Least multiple of the layer's upper quartile.
        medians: Least multiple of the layer's median ``|h|``.
        draws: Least share of attention beyond uniform, 0 to 1.
        growth: Least multiple of what the token's largest channel had in the embeddings of the LLM.
    """

    gap: float = GAP
    medians: float = MEDIANS
    draws: float = DRAWS
    growth: float = GROWTH
    strict: bool = False

    def __post_init__(self) -> None:
        positive = all(is_number(number, above=0) for number in (self.medians, self.growth))
        share = is_number(self.draws, above=0, below=1)
        if not (is_number(self.gap, above=1) and positive and share):
            raise DetectorError(
                f"Got gap={self.gap!r}, medians={self.medians!r}, draws={self.draws!r}, growth={self.growth!r}; "
                "expected a gap above 1, positive medians and growth, and a share of attention between 0 "
                "and 1. Write ss.detectors.Gap() for the default."
            )
        check_strict(self)

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """Spikes and attention."""
        return SinkEvidence(layers, tower)

    def scores(self, result: EvidenceResult) -> Tensor:
        """The largest ``|h|`` in medians of the layer."""
        return result.medians()

    def thresholds(self, result: EvidenceResult, scores: Tensor) -> Tensor:
        """The larger of ``gap`` upper quartiles and ``medians``."""
        return (self.gap * result.upper_quartile()).clamp(min=self.medians)

    def also(self, result: EvidenceResult) -> Tensor:
        """Whether the token draws attention, has grown in the LLM, and is judged at all."""
        return self.draws_in(result) & (result.growth() >= self.growth) & result.judged[:, None]

    def draws_in(self, result: EvidenceResult) -> Tensor:
        """Where a token draws attention, bool ``[batch layer pos]``."""
        drawing = result.drawn() >= self.draws
        if result.first is None:
            drawing = drawing.any(dim=1, keepdim=True).expand(-1, len(result.layers), -1)
        return drawing

    def spikes_in(self, result: EvidenceResult) -> Tensor:
        """Where a token spikes, whether or not it draws, bool ``[batch layer pos]``."""
        scores = self.scores(result)
        above = scores >= self.thresholds(result, scores)[..., None]
        return above & (result.growth() >= self.growth) & result.judged[:, None]

    def null(self, result: EvidenceResult, anatomy: TowerAnatomy) -> float:
        """Peak over median of D half-normals."""
        return expected_peak(anatomy.d_model) / 0.6745

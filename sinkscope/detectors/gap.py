"""The gap rule: a sink stands apart from the other tokens of its layer, and draws attention there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.checks import is_number
from sinkscope.detectors.detection import expected_peak
from sinkscope.detectors.rules import check_strict
from sinkscope.errors import DetectorError
from sinkscope.probes.evidence import EvidenceResult, SinkEvidence
from sinkscope.protocols import Probe
from sinkscope.sites import Tower

if TYPE_CHECKING:
    from sinkscope.anatomy.towers import TowerAnatomy

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


NAMED = 3

"""Tokens that a sentence names."""


@dataclass(frozen=True)
class Outcome:
    """Why no token of a tower is a sink by the gap rule.

    Attributes:
        spiking: Tokens that spike in some layer, as (sample, row, position).
        drawing: Tokens that draw attention in some layer.
        text: The same in words.
    """

    spiking: tuple[tuple[int, int, int], ...]
    drawing: tuple[tuple[int, int, int], ...]
    text: str


def outcome_of(
    rule: Gap,
    evidence: Sequence[EvidenceResult],
    tower: str,
    name: Callable[[int, int, int], str] | None = None,
) -> Outcome:
    """What was seen in one tower where nothing both spikes and draws.

    Args:
        rule: The rule.
        evidence: Of every sample.
        tower: ``"language"`` or ``"vision"``.
        name: ``(sample, row, position) -> what to call the token``; None for its position.
    """
    called = name or (lambda sample, row, pos: f"position {pos}")
    spiking = _tokens([rule.spikes_in(one) for one in evidence])
    drawing = _tokens([rule.draws_in(one) & one.judged[:, None] for one in evidence])
    noun = "patch" if tower == "vision" else "token"
    parts = []
    if spiking:
        largest = {at: _peak(evidence, at) for at in spiking}
        parts.append(_listed(spiking, largest, called, noun, "spike", "medians"))
    else:
        medians, times, grown = _largest_spike(rule, evidence)
        came = "" if grown else ", and came with the embeddings"
        parts.append(
            f"no {noun} spikes: the largest |h| is {medians:.0f} medians and {times:.1f} times the upper "
            f"quartile of its layer{came}, where a spike has {rule.medians:g} and {rule.gap:g}"
        )
    if drawing:
        most = {at: _most_drawn(evidence, at) for at in drawing}
        parts.append(_listed(drawing, most, called, noun, "draw attention", "beyond uniform"))
    else:
        parts.append(
            f"no {noun} draws: the most that a head gives one beyond uniform attention is "
            f"{_most(evidence):.3f}, where a sink has {rule.draws:g}"
        )
    if spiking and drawing:
        parts.append("none does both in one layer")
    return Outcome(spiking, drawing, "; ".join(parts))


def _tokens(masks: Sequence[Tensor]) -> tuple[tuple[int, int, int], ...]:
    """Tokens that are True in some layer."""
    found = []
    for sample, mask in enumerate(masks):
        found += [(sample, row, pos) for row, pos in mask.any(dim=1).nonzero().tolist()]
    return tuple(found)


def _listed(
    tokens: Sequence[tuple[int, int, int]],
    sizes: dict[tuple[int, int, int], float],
    called: Callable[[int, int, int], str],
    noun: str,
    verb: str,
    unit: str,
) -> str:
    """``2 tokens spike: position 1 (208 medians), ...``, the largest first."""
    ranked = sorted(tokens, key=lambda at: -sizes[at])
    digits = 0 if unit == "medians" else 2
    some = [f"{called(*at)} ({sizes[at]:.{digits}f} {unit})" for at in ranked[:NAMED]]
    more = f" and {len(ranked) - NAMED} more" if len(ranked) > NAMED else ""
    many = (
        f"1 {noun} {_third(verb)}" if len(ranked) == 1 else f"{len(ranked)} {_plural(noun)} {verb}"
    )
    return f"{many}: {', '.join(some)}{more}"


def _third(verb: str) -> str:
    first, *rest = verb.split(" ")
    return " ".join([first + "s", *rest])


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("ch") else "s")


def _peak(evidence: Sequence[EvidenceResult], at: tuple[int, int, int]) -> float:
    sample, row, pos = at
    return float(evidence[sample].medians()[row, :, pos].nan_to_num().max())


def _most_drawn(evidence: Sequence[EvidenceResult], at: tuple[int, int, int]) -> float:
    sample, row, pos = at
    return float(evidence[sample].drawn()[row, :, pos].nan_to_num().max())


def _judged(one: EvidenceResult, values: Tensor) -> Tensor:
    """Values of judged tokens; the least possible elsewhere."""
    return torch.where(one.judged[:, None], values, torch.full_like(values, -1.0)).nan_to_num(-1.0)


def _largest_spike(rule: Gap, evidence: Sequence[EvidenceResult]) -> tuple[float, float, bool]:
    """The most prominent token: medians, multiple of the upper quartile, and whether it grew to that."""
    best = (0.0, 0.0, True)
    for one in evidence:
        times = _judged(one, one.prominence())
        at = int(times.argmax())
        large = float(times.flatten()[at]) >= rule.gap
        grown = one.first is None or not large or bool(one.growth().flatten()[at] >= rule.growth)
        found = float(one.medians().flatten()[at]), float(times.flatten()[at]), grown
        best = max(best, found, key=lambda three: three[1])
    return best


def _most(evidence: Sequence[EvidenceResult]) -> float:
    return max(float(_judged(one, one.drawn()).max()) for one in evidence)

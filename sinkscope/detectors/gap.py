"""Rules by layer: a gap to the other tokens of the layer, or a limit for each layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sinkscope.anatomy.towers import TowerAnatomy
from sinkscope.checks import among, is_number, is_whole
from sinkscope.detectors.detection import Detector, expected_peak
from sinkscope.detectors.rules import STATE_SITE, Massive, NoSinks, Rule, SinkDimensions
from sinkscope.errors import DetectorError
from sinkscope.probes import EvidenceResult, MassiveActivations, SinkEvidence
from sinkscope.protocols import Probe
from sinkscope.results import same
from sinkscope.sites import Tower

GAP, MEDIANS, DRAWS, GROWTH = 3.0, 20.0, 0.06, 2.0


@dataclass(frozen=True)
class Gap(Rule):
    """Tokens that spike *and* draw attention, judged on the sample itself; no constant of a model.

    In a layer, a token **spikes** if its largest ``|h|`` is at least ``gap`` times the upper quartile of
    that number over the tokens of the layer, and at least ``medians`` times the layer's median ``|h|``.
    In the LLM the channel must also have ``growth`` times what it had in the embeddings: a V-sink, which
    arrives large in channels of its own, is none for that. It **draws** if some head gives it at least
    ``draws`` (0 to 1) beyond uniform attention, from other tokens only: in the LLM in that layer, in the
    vision tower in some block. There patches are judged; CLS and registers are kinds of their own.

    The score is the largest ``|h|`` in medians, the threshold the larger of the two limits.
    """

    ranges: ClassVar[Any] = {"gap": {"above": 1}, "draws": {"above": 0, "below": 1}}
    ranges |= {"medians": {"above": 0}, "growth": {"above": 0}}
    gap: float = GAP
    medians: float = MEDIANS
    draws: float = DRAWS
    growth: float = GROWTH
    strict: bool = False

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """Spikes and attention; AttentionCallError if no block attends."""
        if not anatomy.attending:
            anatomy.call(0)
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
        if result.first is not None:
            return drawing
        return drawing.any(dim=1, keepdim=True).expand(-1, len(result.layers), -1)

    def spikes_in(self, result: EvidenceResult) -> Tensor:
        """Where a token spikes, whether or not it draws, bool ``[batch layer pos]``."""
        scores = self.scores(result)
        above = scores >= self.thresholds(result, scores)[..., None]
        return above & (result.growth() >= self.growth) & result.judged[:, None]

    def null(self, result: EvidenceResult, anatomy: TowerAnatomy) -> float:
        """The peak-to-median ratio of an isotropic state, D half-normals."""
        return expected_peak(anatomy.d_model) / 0.6745


@dataclass(frozen=True)
class Limits(Rule):
    """Tokens whose score reaches the limit of their layer.

    The ``score`` is the largest ``|h|`` on the sink channels ``dims``, divided by the token's RMS
    (``"channels"``), the largest over the layer's median (``"ratio"``), or the largest (``"absolute"``).
    ``limits`` has one per block of the tower, infinity where the layer has no sink.
    """

    choices: ClassVar[Any] = {"score": ("channels", "ratio", "absolute")}
    score: str
    limits: Sequence[float]
    dims: Sequence[int] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        dims, limits, said = tuple(self.dims), tuple(self.limits), ""
        if not all(is_whole(dim, 0) for dim in dims):
            said = f"dims={dims}; expected channels, such as (1415, 2533)"
        elif (self.score == "channels") != bool(dims):
            said = f"score={self.score!r} with dims={dims}; expected channels for 'channels' only"
        elif not all(among(x, (float("inf"),)) or is_number(x, above=0) for x in limits):
            said = f"limits={limits}; expected a positive one per block, infinity where no sink is"
        if said:
            raise DetectorError(f"Got {said}. Limits come from ss.calibrate(lvlm, samples).")

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """What the score is made of; DetectorError if there is not one limit per block."""
        if len(self.limits) != anatomy.n_layers:
            raise DetectorError(
                f"Got {len(self.limits)} limits for the {tower} tower of {anatomy.n_layers} blocks; "
                "expected a positive one per block. Write ss.calibrate(lvlm, samples) for this model."
            )
        return self._like(1.0).probe(tower, layers, anatomy)

    def scores(self, result: Any) -> Tensor:
        """The score of every token."""
        return result.ratio() if self.score == "ratio" else self._like(1.0).scores(result)

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """The limits of the layers that were read."""
        limits = torch.tensor([float(self.limits[layer]) for layer in result.layers])
        return limits[None].expand(scores.shape[0], -1)

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """What an isotropic state shows, as for `SinkDimensions` and `Massive`."""
        size = float(result.median.nanmean()) if self.score == "ratio" else 1.0
        return self._like(1.0).null(result, anatomy) / size

    def at(self, layer: int) -> Detector:
        """The rule of one layer as a detector with one number, for gates, which judge in one layer."""
        limit = float(self.limits[layer])
        return NoSinks("no sink in this layer") if limit == float("inf") else self._like(limit)

    def in_pass(self, layer: int) -> dict[str, Any] | None:
        """That of the layer's one number; see `at`."""
        rule: Any = self.at(layer)
        return rule.in_pass(layer)

    def _like(self, limit: float) -> Detector:
        return one_number(self.score, tuple(self.dims), limit, strict=False)

    def __repr__(self) -> str:
        known = [limit for limit in self.limits if limit != float("inf")]
        span = f"{min(known):.3g} to {max(known):.3g}" if known else "none"
        dims = f", dims={tuple(self.dims)}" if len(self.dims) else ""
        return f"Limits({self.score!r}, {span} in {len(known)} of {len(self.limits)} layers{dims})"


def one_number(score: str, dims: tuple[int, ...], limit: float, *, strict: bool = True) -> Detector:
    """The detector of one score and one threshold for all layers; ``strict`` is for channels."""
    if score == "channels":
        return SinkDimensions(dims, limit, "rms", strict=strict)
    return Massive(0.0, limit) if score == "ratio" else Massive(limit, 0.0)


def outcome_of(
    rule: Gap,
    evidence: Sequence[EvidenceResult],
    tower: str,
    called: Callable[[int, int, int], str] = lambda sample, row, pos: f"position {pos}",
) -> str:
    """Say why no token of a tower is a sink: what spikes, what draws attention. ``called`` gives the name of
    the token at ``(sample, row, position)``."""
    one, many = ("patch", "patches") if tower == "vision" else ("token", "tokens")

    def listed(verb: str, what: str, unit: str, seen: list[tuple[Tensor, Tensor]]) -> str:
        sizes = {
            (sample, row, pos): float(values[row, :, pos].nan_to_num().max())
            for sample, (mask, values) in enumerate(seen)
            for row, pos in mask.any(dim=1).nonzero().tolist()
        }
        ranked = sorted(sizes, key=lambda at: -sizes[at])
        some = ", ".join(f"{called(*at)} ({unit.format(sizes[at])})" for at in ranked[:3])
        more = f" and {len(ranked) - 3} more" if len(ranked) > 3 else ""
        which = f"1 {one} {verb}s" if len(ranked) == 1 else f"{len(ranked)} {many} {verb}"
        return f"{which}{what}: {some}{more}" if ranked else ""

    spiking = [(rule.spikes_in(seen), seen.medians()) for seen in evidence]
    drawing = [(rule.draws_in(s) & s.judged[:, None], s.drawn()) for s in evidence]
    spikes = listed("spike", "", "{:.0f} medians", spiking)
    draws = listed("draw", " attention", "{:.2f} beyond uniform", drawing)
    both = "; none does both in one layer" if spikes and draws else ""
    if not spikes:
        size, times, came = _largest_spike(rule, evidence)
        spikes = (
            f"no {one} spikes: the largest |h| is {size:.0f} medians and {times:.1f} times the upper "
            f"quartile of its layer{came}, where a spike has {rule.medians:g} and {rule.gap:g}"
        )
    if not draws and all(bool(seen.drawn().isnan().all()) for seen in evidence):
        draws = f"what attention gives a {one} is unknown"
    elif not draws:
        most = max(float(_judged(seen, seen.drawn()).max()) for seen in evidence)
        draws = (
            f"no {one} draws: the most that a head gives one beyond uniform attention is "
            f"{most:.3f}, where a sink has {rule.draws:g}"
        )
    return f"{spikes}; {draws}{both}"


def _judged(one: EvidenceResult, values: Tensor) -> Tensor:
    """Values of judged tokens; the least possible elsewhere."""
    return torch.where(one.judged[:, None], values, torch.full_like(values, -1.0)).nan_to_num(-1.0)


def _largest_spike(rule: Gap, evidence: Sequence[EvidenceResult]) -> tuple[float, float, str]:
    """The most prominent token: medians, multiple of the upper quartile, and whether it came with that."""
    best = (0.0, 0.0, "")
    for one in evidence:
        times = _judged(one, one.prominence())
        at = int(times.argmax())
        size, top, grown = (float(v.flatten()[at]) for v in (one.medians(), times, one.growth()))
        came = ", and came with the embeddings" if top >= rule.gap and grown < rule.growth else ""
        best = max(best, (size, top, came), key=lambda three: three[1])
    return best


def shared_probe(rule: Any, probe: Any, asked: Sequence[Any]) -> Any:
    """One of the probes ``asked`` anyway that tells a rule as much as its own ``probe``, else that. For
    the result see `told`."""
    for one in asked:
        spikes = isinstance(rule, (Massive, Limits)) and isinstance(one, SinkEvidence)
        largest = (one.layers, one.tower, 1, STATE_SITE[one.tower])
        if same(probe, MassiveActivations(*largest) if spikes else one):
            return one
    return probe


def told(rule: Any, result: Any) -> Any:
    """What a rule judges of the result of a shared probe: of evidence the largest channels, if it is for those."""
    spikes = isinstance(rule, (Massive, Limits)) and isinstance(result, EvidenceResult)
    return result.massive if spikes else result

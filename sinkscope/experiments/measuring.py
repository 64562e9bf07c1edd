"""One pass that measures what a trace reads, what the rules flag in it, and what came close."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sinkscope import probes
from sinkscope.detectors.choice import SinkRules
from sinkscope.detectors.detection import Detection, decided
from sinkscope.detectors.gap import Gap, outcome_of
from sinkscope.detectors.rules import STATE_SITE, NoSinks
from sinkscope.models import LVLM, Sample
from sinkscope.sites import Tower
from sinkscope.tokens import VISION_KINDS
from sinkscope.viz.tables import readable


@dataclass(frozen=True, eq=False)
class Measured:
    """What one pass of a trace measured, and what the rules flag."""

    sample: Sample
    vision: probes.EvidenceResult
    language: probes.EvidenceResult
    v: Detection
    low: Detection
    # What attention and MLP add, by site, in the blocks of which that is known.
    vit_attn_and_mlp: Mapping[str, probes.MassiveResult]
    llm_attn_and_mlp: Mapping[str, probes.MassiveResult]
    vit_norms: Tensor  # [image layer pos]
    llm_norms: Tensor  # [batch pos], in the embeddings of the LLM
    writes: probes.WriteResult | None  # in the layers where what a head writes is known
    last: int  # the last vision block that feeds the projector
    draws: float  # the least attention beyond uniform

    @cached_property
    def excess(self) -> Tensor:
        """``[batch layer head key]`` in the LLM, see `ReceivedResult.excess`."""
        return self.language.received.excess()

    @cached_property
    def ratio(self) -> Tensor | None:
        """``[batch layer head key]``, every key's write over the mean of the others."""
        return None if self.writes is None else self.writes.ratio()

    def attended_throughout(self) -> Tensor:
        """ViT tokens that attract attention in most blocks up to the last, bool ``[image pos]``.

        In a block some head gives them ``draws`` beyond uniform attention and 5 times as much as
        uniform attention (ACT, 2406.15765), which matters where there are few tokens.
        """
        uniform: Any = self.vision.received.others_null
        attended = self.vision.drawn() >= (4.0 * uniform).clamp(min=self.draws)
        return attended[:, : self.last + 1].float().mean(dim=1) > 0.5


def measure(lvlm: LVLM, sample: Sample, rules: SinkRules, draws: float, remote: Any) -> Measured:
    """Measure everything that a trace reads in one forward pass, and what the rules flag in it."""
    a = lvlm.anatomy
    towers: tuple[Tower, Tower] = ("vision", "language")
    k = min(16, a.vision.d_model, a.language.d_model)
    vision, language = probes.SinkEvidence(tower="vision"), probes.SinkEvidence()
    # The gap rule needs no probe of its own.
    v, low = (
        own if isinstance(rule, Gap) else rule.probe(own.tower, None, a.tower(own.tower))
        for own, rule in ((vision, rules.v), (language, rules.l_rule))
    )
    vit_norms = probes.TokenNorms(None, "vision", STATE_SITE["vision"])
    llm_norms = probes.TokenNorms([0], "language", STATE_SITE["language"])
    writes = [probes.HeadWrites(a.language.writing)] if a.language.writing else []
    halves: dict[Any, dict[str, probes.MassiveActivations]] = {
        tower: {s: probes.MassiveActivations(blocks, tower, k, s) for s in ("attn_out", "mlp_out")}
        for tower in towers
        if (blocks := a.tower(tower).adding)
    }
    asked: Any = [vision, language, vit_norms, llm_norms, *writes, v, low]
    asked += [probe for of_tower in halves.values() for probe in of_tower.values()]
    run = lvlm.run(sample, list(dict.fromkeys(asked)), logits="last", remote=remote)
    vit, llm = ({site: run[p] for site, p in halves.get(tower, {}).items()} for tower in towers)
    v_found = decided(rules.v, run, v, lvlm, sample)
    l_found = decided(rules.l_rule, run, low, lvlm, sample)
    found = sample, run[vision], run[language], v_found, l_found, vit, llm
    norms = run[vit_norms].norms, run[llm_norms].norms[:, 0]
    return Measured(*found, *norms, run[writes[0]] if writes else None, a.feed_layers[-1], draws)


def carry(sample: Sample, detection: Detection, feeds: Sequence[int], merge: str) -> Tensor:
    """V-sinks at their LLM positions: the rule on every state that feeds the projector.

    One of the ViT tokens that merge must be flagged, so that all of the rule holds for it. With
    ``merge="mean"`` their mean score must pass the threshold too.
    """
    tokens = sample.tokens
    flagged = torch.zeros_like(tokens.live)
    for feed in feeds:
        passed = tokens.from_vision(detection.mask[:, feed].float()).nan_to_num() > 0
        if merge == "mean":
            score = tokens.from_vision(detection.scores[:, feed].nan_to_num(), "mean")
            limit = detection.threshold[:, feed][tokens.image_index.clamp(min=0)]
            passed &= score > limit if detection.strict else score >= limit
        flagged |= passed
    return flagged & (tokens.image >= 0)


@dataclass(frozen=True)
class Candidate:
    """A token that spikes or attracts attention more than the others of its tower.

    Attributes:
        row: Row of the batch, or image of the batch in the vision tower.
        pos: Position in the prompt, or ViT token; ``token`` is its word, or what ViT token it is.
        medians: Its largest ``|h|`` in medians of the layer where it stands out most, ``spike_layer``;
            ``prominence`` in multiples of the layer's upper quartile.
        drawn: The most that some head, ``drawn_at`` as ``(layer, head)``, gives it beyond uniform
            attention, from other tokens; NaN and None where fewer than 8 see it.
        flagged: Whether the tower's rule flags it in some layer; ``reason`` says why not.
    """

    tower: Tower
    row: int
    pos: int
    token: str
    medians: float
    prominence: float
    spike_layer: int
    drawn: float
    drawn_at: tuple[int, int] | None
    flagged: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The candidate as JSON-ready values."""
        return asdict(self)


def named(of: Any, tower: Tower, row: int, pos: int) -> str:
    """A token's position with its word, or what ViT token it is; ``of`` has a ``sample``."""
    tokens = of.sample.tokens
    if tower == "vision":
        vision = tokens.vision
        kind = VISION_KINDS[int(vision.kind[row, pos])]
        if kind != "patch":
            return "CLS" if kind == "cls" else f"{kind} {pos}"
        return f"patch {int(vision.row[row, pos])},{int(vision.column[row, pos])}"
    if int(tokens.image[row, pos]) >= 0:
        cell = f"{int(tokens.row[row, pos])},{int(tokens.column[row, pos])}"
        at = "" if cell == "-1,-1" else f" at {cell}"
        return f"{pos} image {int(tokens.image[row, pos])}{at}"
    return f"{pos} {readable(tokens.words[row][pos] if tokens.words else None)}"


@dataclass(frozen=True, eq=False)
class JudgedTower:
    """What was measured in one tower, the rule, what it flags, and the layers where that counts."""

    tower: Tower
    sample: Sample
    rule: Any
    evidence: probes.EvidenceResult
    detection: Detection
    layers: Sequence[int]

    def candidates(self) -> list[Candidate]:
        """Three tokens per row for their spike and three for their attention, the latter in order."""
        tokens, out = self.sample.tokens, []
        live = tokens.vision.live if self.tower == "vision" else tokens.live
        large = self.evidence.prominence()[:, self.layers].nan_to_num(-1.0)
        attention = self.evidence.drawn().nan_to_num(-2.0).amax(dim=1)
        for row in range(len(large)):
            both = (attention[row], large[row].amax(dim=0))
            first, second = (x.topk(min(3, len(x))).indices.tolist() for x in both)
            best = dict.fromkeys([*first, *second])
            for pos in sorted(best, key=lambda p, row=row: -float(attention[row, p])):
                if bool(live[row, pos]):
                    out.append(self._candidate(row, pos, large[row, :, pos]))
        return out

    def outcome(self, draws: float) -> str:
        """What spikes and what attracts attention in a tower in which nothing is flagged."""
        if isinstance(self.rule, NoSinks):
            return self.rule.reason
        rule = self.rule if isinstance(self.rule, Gap) else Gap(draws=draws)
        evidence = [self.evidence.at(self.layers)]
        return outcome_of(rule, evidence, self.tower, lambda _, *at: named(self, self.tower, *at))

    def _candidate(self, row: int, pos: int, times: Tensor) -> Candidate:
        layer = self.layers[int(times.argmax())]
        excess = self.evidence.received.excess()[row, :, :, pos]
        unknown = bool(excess.isnan().all())
        at = None if unknown else divmod(int(excess.nan_to_num(-2.0).argmax()), excess.shape[1])
        drawn = float("nan") if at is None else float(excess[at])
        flagged = bool(self.detection.mask[row, self.layers, pos].any())
        reason = "flagged" if flagged else self._why_not(row, pos)
        where = self.tower, row, pos, named(self, self.tower, row, pos)
        spike = float(self.evidence.medians()[row, layer, pos]), float(times.max()), layer
        return Candidate(*where, *spike, drawn, at, flagged, reason)

    def _why_not(self, row: int, pos: int) -> str:
        rule, evidence = self.rule, self.evidence
        if isinstance(rule, NoSinks):
            return "there is no rule for this tower"
        if not isinstance(rule, Gap):
            scores, limits = self.detection.scores[row, :, pos], self.detection.threshold[row]
            layer = int((scores / limits).nan_to_num(-1.0).argmax())
            return f"score {scores[layer]:.3g} of {limits[layer]:.3g} (layer {layer})"
        if not bool(evidence.judged[row, pos]):
            return "no patch: a kind of its own, listed apart"
        at = (row, self.layers, pos)
        times = evidence.prominence()[at]
        large = (times >= rule.gap) & (evidence.medians()[at] >= rule.medians)
        draws = bool(rule.draws_in(evidence)[at].any())
        if not bool(large.any()):
            most = f"{float(times.nan_to_num(-1.0).max()):.1f} of {rule.gap:g} upper quartiles"
            return f"no spike: {most}" + ("" if draws else "; draws nothing")
        if not bool((large & (evidence.growth()[at] >= rule.growth)).any()):
            return "its spike came with the embeddings"
        if draws:
            return "spikes and draws attention, but never in the same layer"
        known = evidence.drawn()[at]
        if bool(known.isnan().all()):
            return "spikes; fewer than 8 tokens see it"
        return f"spikes and draws nothing: {float(known.nan_to_num(-1.0).max()):.3f} beyond uniform"

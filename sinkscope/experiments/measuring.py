"""One pass that measures everything a trace reads, and what the rules flag in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.detectors.detection import Detection, decided
from sinkscope.detectors.gap import Gap
from sinkscope.detectors.rules import STATE_SITE
from sinkscope.models.inputs import Sample
from sinkscope.probes import (
    EvidenceResult,
    HeadWrites,
    MassiveActivations,
    MassiveResult,
    SinkEvidence,
    TokenNorms,
    WriteResult,
)
from sinkscope.sites import Tower

if TYPE_CHECKING:
    from sinkscope.detectors.choice import SinkRules
    from sinkscope.models.lvlm import LVLM


@dataclass(frozen=True, eq=False)
class Measured:
    """What one pass of a trace measured, and what the rules flag."""

    sample: Sample
    vision: EvidenceResult
    language: EvidenceResult
    v: Detection
    low: Detection
    # What attention and MLP add, by site, in the blocks of which that is known.
    vit_attn_and_mlp: Mapping[str, MassiveResult]
    llm_attn_and_mlp: Mapping[str, MassiveResult]
    vit_norms: Tensor  # [image layer pos]
    llm_norms: Tensor  # [batch pos], in the embeddings of the LLM
    writes: WriteResult | None  # in the layers where what a head writes is known
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
        uniform = self.vision.received.others_null
        assert uniform is not None
        attended = self.vision.drawn() >= (4.0 * uniform).clamp(min=self.draws)
        return attended[:, : self.last + 1].float().mean(dim=1) > 0.5


def measure(lvlm: LVLM, sample: Sample, rules: SinkRules, draws: float, remote: Any) -> Measured:
    """Everything that a trace reads, in one forward pass, and what the rules flag in it."""
    a = lvlm.anatomy
    towers: tuple[Tower, Tower] = ("vision", "language")
    k = min(16, a.vision.d_model, a.language.d_model)
    vision, language = SinkEvidence(tower="vision"), SinkEvidence()
    # The gap rule needs no probe of its own.
    v, low = (
        own if isinstance(rule, Gap) else rule.probe(own.tower, None, a.tower(own.tower))
        for own, rule in ((vision, rules.v), (language, rules.l_rule))
    )
    vit_norms = TokenNorms(None, "vision", STATE_SITE["vision"])
    llm_norms = TokenNorms([0], "language", STATE_SITE["language"])
    writes = [HeadWrites(a.language.writing)] if a.language.writing else []
    halves: dict[Any, dict[str, MassiveActivations]] = {
        tower: {s: MassiveActivations(blocks, tower, k, s) for s in ("attn_out", "mlp_out")}
        for tower in towers
        if (blocks := a.tower(tower).adding)
    }
    probes: Any = [vision, language, vit_norms, llm_norms, *writes, v, low]
    probes += [probe for of_tower in halves.values() for probe in of_tower.values()]
    run = lvlm.run(sample, list(dict.fromkeys(probes)), logits="last", remote=remote)
    vit, llm = ({site: run[p] for site, p in halves.get(tower, {}).items()} for tower in towers)
    return Measured(
        sample=sample,
        vision=run[vision],
        language=run[language],
        v=decided(rules.v, run, v, lvlm, sample),
        low=decided(rules.l_rule, run, low, lvlm, sample),
        vit_attn_and_mlp=vit,
        llm_attn_and_mlp=llm,
        vit_norms=run[vit_norms].norms,
        llm_norms=run[llm_norms].norms[:, 0],
        writes=run[writes[0]] if writes else None,
        last=a.feed_layers[-1],
        draws=draws,
    )


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

"""Candidates: the most attended tokens and the largest spikes, and why the rules refuse them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from sinkscope.detectors.detection import Detection
from sinkscope.detectors.gap import Gap, outcome_of
from sinkscope.detectors.rules import NoSinks
from sinkscope.probes import EvidenceResult
from sinkscope.sites import Tower
from sinkscope.tokens import VISION_KINDS

if TYPE_CHECKING:
    from sinkscope.experiments.tracing import SinkTrace

EACH = 3
"""Tokens listed per tower and row for their spike, and as many for the attention they draw."""


@dataclass(frozen=True)
class Candidate:
    """A token that spikes or draws attention more than the others of its tower.

    Attributes:
        tower: ``"language"`` or ``"vision"``.
        row: Row of the batch, or image of the batch in the vision tower.
        pos: Position in the prompt, or ViT token.
        token: Its word, or what ViT token it is.
        medians: Its largest ``|h|`` in medians of the layer, in the layer where it stands out most.
        prominence: The same as a multiple of the layer's upper quartile.
        spike_layer: That layer.
        drawn: The most that some head gives it beyond uniform attention, from other tokens; NaN where
            fewer than 8 see it.
        drawn_at: ``(layer, head)`` of it, or None.
        flagged: Whether the tower's rule flags it in some layer.
        reason: Why not, or where.
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


def candidates_of(trace: SinkTrace) -> tuple[Candidate, ...]:
    """Candidates of both towers, row by row, those that draw most first."""
    out: list[Candidate] = []
    towers: tuple[tuple[Tower, EvidenceResult, Detection, Any], ...] = (
        ("vision", trace.vision, trace.v_detection, trace.rules.v),
        ("language", trace.language, trace.l_detection, trace.rules.l_rule),
    )
    for tower, evidence, detection, rule in towers:
        times, drawn = evidence.prominence()[:, judged_layers(trace, tower)], evidence.drawn()
        tokens = trace.sample.tokens
        live = tokens.vision.live if tower == "vision" else tokens.live
        for row in range(len(times)):
            spiking = times[row].nan_to_num(-1.0).amax(dim=0)
            drawing = drawn[row].nan_to_num(-2.0).amax(dim=0)
            best = [*drawing.topk(min(EACH, len(drawing))).indices.tolist()]
            best += spiking.topk(min(EACH, len(spiking))).indices.tolist()
            for pos in sorted(dict.fromkeys(best), key=lambda p: -float(drawing[p])):
                if bool(live[row, pos]):
                    out.append(_candidate(trace, tower, evidence, detection, rule, row, pos))
    return tuple(out)


def outcomes_of(trace: SinkTrace) -> dict[Tower, str]:
    """What spikes and what draws, for each tower in which the rule flags nothing that counts."""
    out: dict[Tower, str] = {}
    nothing: tuple[tuple[Tower, bool, Any, EvidenceResult], ...] = (
        ("vision", not bool(trace.v_sinks.any()), trace.rules.v, trace.vision),
        ("language", not bool(trace.l_detection.mask.any()), trace.rules.l_rule, trace.language),
    )
    for tower, empty, rule, evidence in nothing:
        if not empty:
            continue
        if isinstance(rule, NoSinks):
            out[tower] = rule.reason
            continue
        seen = rule if isinstance(rule, Gap) else Gap(draws=trace.draws)

        def name(sample: int, row: int, pos: int, tower: Tower = tower) -> str:
            return named(trace, tower, row, pos)

        evidence = evidence.at(judged_layers(trace, tower))
        out[tower] = outcome_of(seen, [evidence], tower, name).text
    return out


def judged_layers(trace: SinkTrace, tower: Tower) -> list[int]:
    """Layers in which a rule counts: those that feed the projector, and all of the LLM's."""
    return list(trace.feeds) if tower == "vision" else list(trace.l_detection.layers)


def named(trace: SinkTrace, tower: Tower, row: int, pos: int) -> str:
    """A token's position with its word, or what ViT token it is."""
    from sinkscope.viz.tables import readable

    tokens = trace.sample.tokens
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
    word = tokens.words[row][pos] if tokens.words else None
    return f"{pos} {readable(word)}"


def _candidate(
    trace: SinkTrace,
    tower: Tower,
    evidence: EvidenceResult,
    detection: Detection,
    rule: Any,
    row: int,
    pos: int,
) -> Candidate:
    layers = judged_layers(trace, tower)
    times = evidence.prominence()[row, layers, pos].nan_to_num(-1.0)
    layer = layers[int(times.argmax())]
    excess = evidence.received.excess()[row, :, :, pos]
    known = not bool(excess.isnan().all())
    at = divmod(int(excess.nan_to_num(-2.0).argmax()), excess.shape[1]) if known else None
    drawn = float(excess[at]) if at is not None else float("nan")
    mask = detection.mask[row, layers, pos]
    flagged = bool(mask.any())
    return Candidate(
        tower=tower,
        row=row,
        pos=pos,
        token=named(trace, tower, row, pos),
        medians=float(evidence.medians()[row, layer, pos]),
        prominence=float(times.max()),
        spike_layer=layer,
        drawn=drawn,
        drawn_at=at,
        flagged=flagged,
        reason="flagged" if flagged else _why_not(trace, rule, evidence, detection, row, pos),
    )


def _why_not(
    trace: SinkTrace, rule: Any, evidence: EvidenceResult, detection: Detection, row: int, pos: int
) -> str:
    """Which part of the rule refuses a token."""
    if isinstance(rule, NoSinks):
        return "there is no rule for this tower"
    if not isinstance(rule, Gap):
        over = (detection.scores / detection.threshold[..., None])[row, :, pos].nan_to_num(-1.0)
        layer = int(over.argmax())
        score, limit = (
            float(detection.scores[row, layer, pos]),
            float(detection.threshold[row, layer]),
        )
        return f"score {score:.3g} of {limit:.3g} (layer {layer})"
    if not bool(evidence.judged[row, pos]):
        return "no patch: a kind of its own, listed apart"
    layers = judged_layers(trace, detection.tower)
    draws = bool(rule.draws_in(evidence)[row, layers, pos].any())
    times = evidence.prominence()[row, layers, pos]
    large = (times >= rule.gap) & (evidence.medians()[row, layers, pos] >= rule.medians)
    grown = evidence.growth()[row, layers, pos] >= rule.growth
    if not bool(large.any()):
        most = float(times.nan_to_num(-1.0).max())
        return f"no spike: {most:.1f} of {rule.gap:g} upper quartiles" + (
            "" if draws else "; draws nothing"
        )
    if not bool((large & grown).any()):
        return "its spike came with the embeddings"
    if not draws:
        known = evidence.drawn()[row, layers, pos]
        if bool(torch.isnan(known).all()):
            return "spikes; fewer than 8 tokens see it"
        return f"spikes and draws nothing: {float(known.nan_to_num(-1.0).max()):.3f} beyond uniform"
    return "spikes and draws attention, but never in the same layer"

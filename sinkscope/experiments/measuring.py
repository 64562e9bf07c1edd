"""One pass that measures what a trace reads, what the rules flag in it, and a record of every sink."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from sinkscope import probes
from sinkscope.checks import typed
from sinkscope.detectors import Detection, SinkRules
from sinkscope.detectors.detection import decided, unseen
from sinkscope.detectors.gap import shared_probe, told
from sinkscope.detectors.rules import STATE_SITE
from sinkscope.models import LVLM, Sample
from sinkscope.probes.evidence import Closing
from sinkscope.results import over_layers
from sinkscope.sites import Tower
from sinkscope.tokens import VISION_KINDS


@typed
def nop_or_broadcast(ratio: float, stable_rank: float, event: bool) -> str:
    """Tell whether a head's sink writes anything, by the definitions of Fesser et al. (2606.08105).

    ``"no event"``: without a sink event (see `ReceivedResult.event`) the paper labels nothing. ``"NOP"``: the
    norm of the sink's write is at most 0.2 times the mean of the other tokens' (``ratio_out``).
    ``"broadcast"``: at least 0.5, and a stable rank of the head's output of at most 1.5. Else ``"mixed"``.
    """
    if not event:
        return "no event"
    if ratio <= 0.2:
        return "NOP"
    return "broadcast" if ratio >= 0.5 and stable_rank <= 1.5 else "mixed"


@dataclass(frozen=True, kw_only=True)
class SinkRecord:
    """One sink; ``head`` and what follows it are None or NaN where too few other tokens see the sink.

    Attributes:
        kind: ``"V"`` (born in the vision tower), ``"L"`` (a visual token that became one in the LLM),
            ``"text"``, or ``"attention"``: an image token to which the vision tower attends throughout
            and which the V rule does not flag (a kept CLS, for instance).
        batch: Row of the batch, and ``pos`` the LLM position of ``word``.
        image: Image of the row, with the token's grid ``row`` and ``column``; all -1 for text.
        box: ``(x0, y0, x1, y1)`` in pixels (see `TokenMap.box_unit`), None for text.
        vit_tokens: The ViT tokens that feed the position; ``vit_token``: that with the highest score,
            -1 for text, and ``vit_kind``: ``"patch"``, ``"cls"`` or ``"register"``, None for text.
        vit_birth: Vision block whose output first shows a V-sink, or None; ``vit_writer``: which half of
            it wrote the top channel, ``"attention"`` or ``"mlp"``.
        vit_norm: Norm of that ViT token where the projector reads (the last feeding block), and
            ``vit_channels``: its largest channels there, as ``(channel, value)``.
        vit_drawn: By block what the head that gives it most gives beyond uniform attention, from
            other tokens; empty for text.
        llm_norm: Norm after the projector, in the embeddings of the LLM; ``llm_channels`` as above.
        llm_birth: LLM block whose output first meets the L rule; -1: the embeddings; None: never.
        llm_layers: LLM layers on whose input the L rule holds; ``llm_lives``: its unbroken stretches,
            ``(block that wrote it, last layer, writer)``.
        peak_channels: Largest channels on the layer with the largest activation.
        first_drawn: First LLM layer where some head gives it at least ``draws`` beyond uniform
            attention, from other tokens (see `ReceivedResult.excess`).
        received: Mean over heads of the attention received, by layer; ``received_max``: highest head;
            ``null``: under uniform attention.
        head: ``(layer, head)`` where other tokens give it the most beyond uniform attention.
        head_received: What they give there, 0 to 1, ``head_null`` under uniform attention; ``excess``: the
            difference, by which sinks are ranked.
        routed: Share of the queries that see it which give it at least half of their attention there; NaN if
            another token is that head's dominant key. ``event``: at least 0.9 (`ReceivedResult.event`).
        contribution: What it writes there, the mean over the queries that see it of ``||A_qs D W_O^h
            v_s||_2``, D being what lies between head and stream.
        value_ratio: Its write there over the mean write of the other tokens; ``stable_rank``: of that head.
        verdict: See `nop_or_broadcast`, of ``head``; ``"draws nothing"`` without a head that gives ``draws``
            beyond uniform attention; ``"writes unknown"`` where ``D`` is not known; ``"seen by few"``.
        overlap: A V-sink that also meets the L rule in some layer.
    """

    kind: str
    batch: int
    pos: int
    word: str | None
    image: int
    row: int
    column: int
    box: tuple[float, float, float, float] | None
    vit_tokens: tuple[int, ...]
    vit_token: int = -1
    vit_kind: str | None = None
    vit_birth: int | None = None
    vit_writer: str | None = None
    vit_norm: float | None = None
    vit_channels: tuple[tuple[int, float], ...] = ()
    vit_drawn: tuple[float, ...] = ()
    llm_norm: float
    llm_channels: tuple[tuple[int, float], ...]
    llm_birth: int | None = None
    llm_writer: str | None = None
    llm_layers: tuple[int, ...]
    llm_lives: tuple[tuple[int, int, str | None], ...]
    peak_channels: tuple[tuple[int, float], ...]
    first_drawn: int | None = None
    received: tuple[float, ...]
    received_max: tuple[float, ...]
    null: tuple[float, ...]
    head: tuple[int, int] | None = None
    head_received: float = float("nan")
    head_null: float = float("nan")
    excess: float = float("nan")
    routed: float = float("nan")
    event: bool = False
    contribution: float = float("nan")
    value_ratio: float = float("nan")
    stable_rank: float = float("nan")
    verdict: str = "seen by few"
    overlap: bool

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values."""
        return asdict(self)


def carry(sample: Sample, detection: Detection, feeds: Sequence[int], merge: str) -> Tensor:
    """V-sinks at their LLM positions: the rule on every state that feeds the projector."""
    tokens = sample.tokens
    flagged = torch.zeros_like(tokens.live)
    for feed in feeds:
        # One of the ViT tokens that merge must be flagged, so that all of the rule holds for it.
        passed = placed(sample, detection.mask[:, feed].float()) > 0
        if merge == "mean":  # and their mean score must pass the threshold
            score = placed(sample, detection.scores[:, feed].nan_to_num(), "mean")
            limit = detection.threshold[:, feed][tokens.image_index.clamp(min=0)]
            passed &= score > limit if detection.strict else score >= limit
        flagged |= passed
    return flagged & (tokens.image >= 0)


def placed(sample: Sample, scores: Tensor, merge: str = "max") -> Tensor:
    """Scores of ViT tokens at the LLM positions that they feed; 0 elsewhere, and where no place is known."""
    tokens = sample.tokens
    if tokens.unmapped or not len(scores):
        return torch.zeros(tokens.live.shape)
    return tokens.from_vision(scores, merge).nan_to_num()


def nothing_seen(rule: Any) -> tuple[Detection, probes.EvidenceResult]:
    """What is measured where there are no ViT tokens: results of no image and no block."""
    line, head = torch.zeros(0, 0, 1), torch.zeros(0, 0, 1, 1)
    judged, line_of = torch.zeros(0, 1, dtype=torch.bool), torch.zeros(0, 0)
    massive = probes.MassiveResult(head, head.long(), line_of, (), STATE_SITE["vision"])
    received = probes.ReceivedResult(head, line, (), head, line)
    evidence = probes.EvidenceResult(massive, received, None, judged, ())
    found = line.bool(), line, line_of, float("nan"), judged
    return Detection(repr(rule), "vision", (), *found), evidence


class Measured:
    """One forward pass that measures everything that a trace reads, and what the rules flag in it."""

    def __init__(
        self, lvlm: LVLM, sample: Sample, rules: SinkRules, draws: float, full: bool, how: Any
    ) -> None:
        # ``draws`` is the least attention beyond uniform; ``full`` whether all evidence comes back.
        a, self.sample, self.draws = lvlm.anatomy, sample, draws
        # Vision blocks whose output reaches the decoder, of those with one state per ViT token.
        blocks = () if unseen(a.vision, [sample]) else a.vision.stating
        self.feeds: tuple[int, ...] = tuple(i for i in a.reaching if i in blocks)
        sees, every = bool(self.feeds), tuple(range(a.vision.n_layers))
        towers: tuple[Tower, ...] = ("vision", "language") if sees else ("language",)
        some: dict[str, Any] = {"vision": None if blocks == every else blocks, "language": None}
        own: dict[str, Any] = {tower: probes.SinkEvidence(some[tower], tower) for tower in towers}
        vit_norms = probes.TokenNorms(some["vision"], "vision", STATE_SITE["vision"])
        llm_norms = probes.TokenNorms([0], "language", STATE_SITE["language"])
        shared, judged = (*own.values(), *[vit_norms] * sees, llm_norms), {}
        rule: dict[str, Any] = {"vision": rules.v, "language": rules.l_rule}
        for tower in towers:
            probe = rule[tower].probe(tower, some[tower], a.tower(tower))
            # A rule of the user's own may read what is not sent: then its probe is asked besides.
            ours = full or type(rule[tower]).__module__.partition(".")[0] == "sinkscope"
            judged[tower] = shared_probe(rule[tower], probe, shared) if ours else probe
        last = self.feeds[-1] if sees else -1
        if vit_norms not in judged.values():
            vit_norms = probes.TokenNorms([last], "vision", STATE_SITE["vision"])
        ends = [Closing.of(evidence, a, full, last) for evidence in own.values()]
        others = [probe for probe in judged.values() if probe not in own.values()]
        asked = [part for end in ends for part in end.parts]
        asked += [*[vit_norms] * sees, llm_norms, *others, *ends]
        run = lvlm.run(sample, list(dict.fromkeys(asked)), logits="last", **how)
        self.ends = {end.tower: run[end] for end in ends}
        back = {end.tower: run[end].evidence or run[end.parts[0]] for end in ends}
        self.language = back["language"]
        results = {own[tower]: one for tower, one in back.items()} | dict(run.results)
        seen = {probe: told(rule[tower], results[probe]) for tower, probe in judged.items()}
        found = {t: decided(rule[t], seen, probe, lvlm, sample) for t, probe in judged.items()}
        self.low = over_layers(found["language"], self.language.layers)
        self.v, self.vision = nothing_seen(rules.v)
        if sees:
            got = back["vision"]
            self.vision = replace(got, massive=over_layers(got.massive, every), layers=every)
            self.vit_norms = over_layers(run[vit_norms], every).norms  # [image layer pos]
            self.v = over_layers(found["vision"], every)
        self.llm_norms = run[llm_norms].norms[:, 0]  # [batch pos], in the embeddings
        self.event = self.language.received.event()  # [batch layer head]
        # ViT tokens that attract attention in most blocks up to the last feed that attend, [image pos]: some
        # head gives them draws beyond uniform attention, and 5 times uniform (ACT, 2406.15765), for few tokens.
        uniform: Any = self.vision.received.others_null
        self.vit_drawn = self.vision.drawn()  # [image layer pos]
        attended = self.vit_drawn >= (4.0 * uniform).clamp(min=draws)
        blocks = [i for i in a.vision.attending if self.feeds and i <= self.feeds[-1]]
        self.attended = attended[:, blocks].float().mean(dim=1).nan_to_num() > 0.5

    def records(self, v_sinks: Tensor, attended: Tensor) -> tuple[SinkRecord, ...]:
        """One record per sink and per image token that is attended without one, in position order."""
        tokens, rule, found = self.sample.tokens, self.low.any_layer(), []
        for batch, pos in ((v_sinks | rule | attended) & tokens.live).nonzero().tolist():
            at, flagged = (batch, pos), bool(rule[batch, pos])
            cell, box = ("image", "row", "column"), tokens.box[at]
            parts: Any = {name: int(getattr(tokens, name)[at]) for name in cell}
            kind = "text" if parts["image"] < 0 else "L" if flagged else "attention"
            kind = "V" if bool(v_sinks[at]) else kind
            parts["word"] = tokens.words[batch][pos] if tokens.words else None
            parts["box"] = None if box.isnan().any() else tuple(box.tolist())
            parts["vit_tokens"] = tuple(int(source) for source in tokens.sources[at] if source >= 0)
            parts |= self._in_vision(int(tokens.image_index[at]), parts["vit_tokens"])
            parts |= self._in_language(*at) | self._attention(*at)
            both = kind == "V" and flagged
            found.append(SinkRecord(kind=kind, batch=batch, pos=pos, overlap=both, **parts))
        return tuple(found)

    def _in_vision(self, image: int, sources: tuple[int, ...]) -> dict[str, Any]:
        if image < 0 or not sources:  # such as a newline, which the tower does not fill
            return {}
        last = self.feeds[-1]
        token = sources[int(self.v.scores[image, last, list(sources)].nan_to_num().argmax())]
        channels = _channels(self.ends["vision"], image, token)
        # Unbroken up to the state that the projector reads; later blocks do not matter.
        birth, half = birth_block(self.v.mask[image, : last + 1, token]), None
        if birth is not None:
            half = _writer(self.ends["vision"], birth, image, token)
        parts: dict[str, Any] = {"vit_token": token, "vit_birth": birth, "vit_writer": half}
        parts["vit_kind"] = VISION_KINDS[int(self.sample.tokens.vision.kind[image, token])]
        parts["vit_norm"] = float(self.vit_norms[image, last, token])
        parts["vit_drawn"] = tuple(self.vit_drawn[image, :, token].tolist())
        return parts | {"vit_channels": channels}

    def _in_language(self, batch: int, pos: int) -> dict[str, Any]:
        end = self.ends["language"]
        layers = tuple(self.low.mask[batch, :, pos].nonzero().flatten().tolist())
        lives: list[tuple[int, int, str | None]] = []
        for _, stretch in groupby(enumerate(layers), lambda pair: pair[1] - pair[0]):
            run = [layer for _, layer in stretch]
            block = run[0] - 1  # layer l reads what block l - 1 wrote; -1: embeddings
            lives.append((block, run[-1], _writer(end, block, batch, pos)))
        birth, _, writer = lives[0] if lives else (None, None, None)
        parts = {"llm_birth": birth, "llm_writer": writer, "llm_layers": layers}
        parts |= {"peak_channels": _channels(end, batch, pos), "llm_lives": tuple(lives)}
        parts |= {"llm_channels": _channels(self.language.first, batch, 0, pos)}
        return parts | {"llm_norm": float(self.llm_norms[batch, pos])}

    def _attention(self, batch: int, pos: int) -> dict[str, Any]:
        got: Any = self.language.by_key  # with nulls and the attention of others
        null, excess = got.others_null[batch, :, pos], self.language.drawn()[batch, :, pos]
        by_layer = {"received": got.mean, "received_max": got.most, "null": got.null}
        parts: Any = {name: tuple(x[batch, :, pos].tolist()) for name, x in by_layer.items()}
        if excess.isnan().all():
            return parts
        known = excess.nan_to_num(nan=-2.0)
        drawn = (known >= self.draws).nonzero().flatten().tolist()
        layer = int(known.argmax())
        head, at = int(got.head[batch, layer, pos]), self.ends["language"].at_head
        norm, ratio, rank = (float(at[name][batch, pos]) for name in ("norm", "ratio", "rank"))
        own = int(got.sink[batch, layer, head]) == pos  # the head's dominant key is this one
        event = own and bool(self.event[batch, layer, head])
        parts["routed"] = float(got.routed[batch, layer, head]) if own else float("nan")
        verdict = "writes unknown" if ratio != ratio else nop_or_broadcast(ratio, rank, event)
        parts |= {"event": event, "first_drawn": drawn[0] if drawn else None, "head": (layer, head)}
        parts["head_received"] = float(got.drawn[batch, layer, pos])
        parts["head_null"] = float(null[layer])
        parts |= {"excess": float(excess[layer]), "value_ratio": ratio, "stable_rank": rank}
        parts["contribution"] = float(at["received"][batch, pos]) * norm
        return parts | {"verdict": verdict if drawn else "draws nothing"}


def birth_block(mask: Tensor) -> int | None:
    """First index of the last unbroken stretch of True, or None if the last entry is False."""
    first = max((~mask).nonzero().flatten().tolist(), default=-1) + 1
    return first if first < len(mask) else None


def _channels(result: Any, *at: int) -> tuple[tuple[int, float], ...]:
    return tuple(zip(result.channels[at].tolist(), result.values[at].tolist(), strict=True))


def _writer(end: Any, block: int, row: int, pos: int) -> str | None:
    """Which half of a block wrote more into a channel of a token; None where that is unknown."""
    if block not in end.wrote:
        return None
    return "attention" if bool(end.wrote[block][row, pos]) else "mlp"

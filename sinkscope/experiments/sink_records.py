"""SinkRecord: everything a trace knows about one sink, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from torch import Tensor

from sinkscope.experiments.measuring import Measured
from sinkscope.probes import MassiveResult
from sinkscope.tokens import VISION_KINDS


def nop_or_broadcast(ratio: float, stable_rank: float) -> str:
    """Whether a sink writes anything, by the definitions of Fesser et al. (2606.08105).

    ``"NOP"``: a norm of its write of at most 0.2 times the mean of the other tokens' (``ratio_out``).
    ``"broadcast"``: at least 0.5, and a stable rank of the head's output of at most 1.5. Else ``"mixed"``.
    """
    if ratio <= 0.2:
        return "NOP"
    return "broadcast" if ratio >= 0.5 and stable_rank <= 1.5 else "mixed"


@dataclass(frozen=True, kw_only=True)
class SinkRecord:
    """One sink.

    Attributes:
        kind: ``"V"`` (born in the vision tower), ``"L"`` (a visual token that became one in the LLM),
            ``"text"``, or ``"attention"``: an image token to which the vision tower attends throughout
            and which the V rule does not flag (a kept CLS, for instance).
        batch: Row of the batch, and ``pos`` the LLM position of ``word``.
        image: Image of the row, with the token's grid ``row`` and ``column``; all -1 for text.
        box: ``(x0, y0, x1, y1)`` in pixels (see `TokenMap.box_unit`), None for text.
        vit_tokens: The ViT tokens that feed the position; ``vit_token``: that with the highest score,
            -1 for text, and ``vit_kind``: ``"patch"``, ``"cls"`` or ``"register"``, None for text.
        vit_birth: Vision block whose output first shows a V-sink, None if it is none there.
        vit_writer: ``"attention"`` or ``"mlp"``: which half of that block wrote the top channel.
        vit_norm: Norm of that ViT token where the projector reads (the last feeding block), and
            ``vit_channels``: its largest channels there, as ``(channel, value)``.
        vit_drawn: What the head that gives it most gives beyond uniform attention, from other tokens,
            by block; empty for text.
        llm_norm: Norm after the projector, in the embeddings of the LLM; ``llm_channels`` as above.
        llm_birth: LLM block whose output first meets the L rule; -1: the embeddings; None: never.
        llm_layers: LLM layers on whose input the L rule holds; ``llm_lives``: its unbroken stretches,
            ``(block that wrote it, last layer, writer)``.
        peak_channels: Largest channels on the layer with the largest activation.
        first_drawn: First LLM layer where some head gives it at least ``draws`` beyond uniform
            attention, from other tokens (see `ReceivedResult.excess`).
        received: Mean over heads of the attention received, by layer; ``received_max``: highest head;
            ``null``: under uniform attention.
        head: ``(layer, head)`` where other tokens give it the most beyond uniform attention; None, and
            the numbers of that head NaN, where too few see it.
        head_received: What they give there, 0 to 1, and ``head_null`` under uniform attention.
        excess: The difference of the two, by which sinks are ranked.
        contribution: What it writes there, the mean over the queries that see it of ``||A_qs D W_O^h
            v_s||_2``, D being what lies between head and stream.
        value_ratio: ``ratio_out`` there: its write over the mean write of the other tokens.
        stable_rank: Of that head's output.
        verdict: See `nop_or_broadcast`; ``"draws nothing"`` without a head that gives ``draws`` beyond
            uniform attention; ``"writes unknown"`` where ``D`` is not known; ``"seen by few"``.
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
    contribution: float = float("nan")
    value_ratio: float = float("nan")
    stable_rank: float = float("nan")
    verdict: str = "seen by few"
    overlap: bool

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values."""
        return asdict(self)


def collect_records(m: Measured, v_sinks: Tensor, attended: Tensor) -> tuple[SinkRecord, ...]:
    """One record per sink and per image token that is attended without one, in position order."""
    tokens, rule, found = m.sample.tokens, m.low.any_layer(), []
    for at in ((v_sinks | rule | attended) & tokens.live).nonzero().tolist():
        batch, pos = at
        flagged, kind = bool(rule[batch, pos]), "V"
        if not bool(v_sinks[batch, pos]):
            visual = int(tokens.image[batch, pos]) >= 0
            kind = "text" if not visual else "L" if flagged else "attention"
        parts = _place(m, *at) | _in_vision(m, *at) | _in_language(m, *at) | _attention(m, *at)
        found.append(SinkRecord(kind=kind, overlap=kind == "V" and flagged, **parts))
    return tuple(found)


def _place(m: Measured, batch: int, pos: int) -> dict[str, Any]:
    tokens = m.sample.tokens
    word, box = tokens.words[batch][pos] if tokens.words else None, tokens.box[batch, pos]
    cell = {n: int(getattr(tokens, n)[batch, pos]) for n in ("image", "row", "column")}
    sources = tuple(int(s) for s in tokens.sources[batch, pos] if s >= 0)
    box = None if box.isnan().any() else tuple(box.tolist())
    return {"batch": batch, "pos": pos, "word": word, **cell, "box": box, "vit_tokens": sources}


def _in_vision(m: Measured, batch: int, pos: int) -> dict[str, Any]:
    tokens = m.sample.tokens
    if (image := int(tokens.image_index[batch, pos])) < 0:
        return {}
    sources = [int(s) for s in tokens.sources[batch, pos] if s >= 0]
    token = sources[int(m.v.scores[image, m.last, sources].nan_to_num().argmax())]
    channels = _channels(m.vision.massive, image, m.last, token)
    # Unbroken up to the state that the projector reads; later blocks do not matter.
    birth, half = birth_block(m.v.mask[image, : m.last + 1, token]), None
    if birth is not None:
        half = _writer(m.vit_attn_and_mlp, image, birth, token, channels[0][0])
    return {
        "vit_token": token,
        "vit_kind": VISION_KINDS[int(tokens.vision.kind[image, token])],
        "vit_birth": birth,
        "vit_writer": half,
        "vit_norm": float(m.vit_norms[image, m.last, token]),
        "vit_channels": channels,
        "vit_drawn": tuple(m.vision.drawn()[image, :, token].tolist()),
    }


def birth_block(mask: Tensor) -> int | None:
    """First index of the last unbroken stretch of True, or None if the last entry is False."""
    if not bool(mask[-1]):
        return None
    off = (~mask).nonzero().flatten()
    return int(off[-1]) + 1 if len(off) else 0


def _in_language(m: Measured, batch: int, pos: int) -> dict[str, Any]:
    massive = m.language.massive
    layers = tuple(m.low.mask[batch, :, pos].nonzero().flatten().tolist())
    lives: list[tuple[int, int, str | None]] = []
    for _, stretch in groupby(enumerate(layers), lambda pair: pair[1] - pair[0]):
        run = [layer for _, layer in stretch]
        first, half = run[0], None  # layer l reads what block l - 1 wrote, layer 0 the embeddings
        if first:
            channel = int(massive.channels[batch, first, pos, 0])
            half = _writer(m.llm_attn_and_mlp, batch, first - 1, pos, channel)
        lives.append((first - 1, run[-1], half))
    peak = int(massive.values[batch, :, pos, 0].abs().argmax())
    return {
        "llm_norm": float(m.llm_norms[batch, pos]),
        "llm_channels": _channels(massive, batch, 0, pos),
        "llm_birth": lives[0][0] if lives else None,
        "llm_writer": lives[0][2] if lives else None,
        "llm_layers": layers,
        "llm_lives": tuple(lives),
        "peak_channels": _channels(massive, batch, peak, pos),
    }


def _channels(result: MassiveResult, row: int, layer: int, pos: int) -> Any:
    at = (row, layer, pos)
    return tuple(zip(result.channels[at].tolist(), result.values[at].tolist(), strict=True))


def _writer(
    attn_and_mlp: Mapping[str, MassiveResult], row: int, block: int, pos: int, channel: int
) -> str | None:
    """Which half of a block wrote more into a channel of a token; None where that is unknown."""
    size = {}
    for site, result in attn_and_mlp.items():
        if block not in result.layers:
            return None
        at = (row, result.layers.index(block), pos)
        size[site] = float(result.values[at].abs()[result.channels[at] == channel].sum())
    if not size:
        return None
    return "attention" if size["attn_out"] > size["mlp_out"] else "mlp"


def _attention(m: Measured, batch: int, pos: int) -> dict[str, Any]:
    got: Any = m.language.received  # a trace measures its nulls and the attention of others too
    received, excess = got.received[batch, :, :, pos], m.excess[batch, :, :, pos]
    by_layer = (received.mean(dim=1), received.amax(dim=1), got.null[batch, :, pos])
    names = ("received", "received_max", "null")
    parts: Any = {name: tuple(x.tolist()) for name, x in zip(names, by_layer, strict=True)}
    if excess.isnan().all():
        return parts
    known = excess.nan_to_num(nan=-2.0)
    drawn = (known.amax(dim=1) >= m.draws).nonzero().flatten().tolist()
    layer, head = divmod(int(known.argmax()), excess.shape[1])
    ratio = rank = norm = float("nan")
    if m.writes is not None and m.ratio is not None and layer in m.writes.layers:
        at = (batch, m.writes.layers.index(layer), head)
        ratio, norm = float(m.ratio[at][pos]), float(m.writes.norms[at][pos])
        rank = float(m.writes.stable_rank[at])
    verdict = nop_or_broadcast(ratio, rank) if ratio == ratio else "writes unknown"
    return parts | {
        "first_drawn": drawn[0] if drawn else None,
        "head": (layer, head),
        "head_received": float(got.others[batch, layer, head, pos]),
        "head_null": float(got.others_null[batch, layer, pos]),
        "excess": float(excess[layer, head]),
        "contribution": float(received[layer, head]) * norm,
        "value_ratio": ratio,
        "stable_rank": rank,
        "verdict": verdict if drawn else "draws nothing",
    }

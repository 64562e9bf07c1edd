"""SinkRecord: everything the trace knows about one sink, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sinkscope.detectors.detection import Detection
from sinkscope.models.inputs import Sample
from sinkscope.models.lvlm import LVLM, Run
from sinkscope.probes import EvidenceResult, MassiveActivations, MassiveResult, WriteResult
from sinkscope.tokens import VISION_KINDS

if TYPE_CHECKING:
    from sinkscope.experiments.tracing import Probes

NOP_RATIO = 0.2

BROADCAST_RATIO = 0.5

BROADCAST_RANK = 1.5


def nop_or_broadcast(ratio: float, stable_rank: float) -> str:
    """Does the sink write anything? The definitions of Fesser et al. (2606.08105).

    Args:
        ratio: ``ratio_out``: the norm of the sink's write over the mean of the other tokens'.
        stable_rank: Of the head's output.

    Returns:
        ``"NOP"`` (ratio at most 0.2), ``"broadcast"`` (ratio at least 0.5 and stable rank at most
        1.5) or ``"mixed"``.
    """
    if ratio <= NOP_RATIO:
        return "NOP"
    if ratio >= BROADCAST_RATIO and stable_rank <= BROADCAST_RANK:
        return "broadcast"
    return "mixed"


@dataclass(frozen=True)
class SinkRecord:
    """One sink.

    Attributes:
        kind: ``"V"`` (born in the vision tower), ``"L"`` (a visual token that became one in the
            LLM), ``"text"``, or ``"attention"``: an image token to which the vision tower attends
            throughout and which the V rule does not flag (a kept CLS, for instance).
        batch: Row of the batch.
        pos: LLM position.
        word: The token's text.
        image: Image of the row, -1 for text.
        row: Grid row of the image token, -1 for text.
        column: Grid column.
        box: ``(x0, y0, x1, y1)`` in pixels (see `TokenMap.box_unit`), None for text.
        vit_tokens: The ViT tokens that feed the position.
        vit_token: The one of them with the highest score, -1 for text.
        vit_kind: What that token is: ``"patch"``, ``"cls"`` or ``"register"``; None for text.
        vit_birth: Vision block whose output first shows a V-sink, None if it is none there.
        vit_writer: ``"attention"`` or ``"mlp"``: which half of that block wrote the top channel.
        vit_norm: Norm of that ViT token where the projector reads (the last feeding block).
        vit_channels: Its largest channels there, as ``(channel, value)``.
        vit_drawn: The most that a head of each vision block gives that ViT token beyond uniform
            attention, from other tokens, by block; empty for text.
        llm_norm: Norm after the projector, in the embeddings of the LLM.
        llm_channels: Largest channels in the embeddings.
        llm_birth: LLM block whose output first meets the L rule; ``-1`` if the embeddings do; None
            if it never does.
        llm_writer: ``"attention"`` or ``"mlp"``: which half of that block wrote the top channel.
        llm_layers: LLM layers on whose input the L rule holds.
        llm_lives: Its unbroken stretches in the LLM: ``(block that wrote it, last layer, writer)``, so
            a sink that goes and comes back has two. The first block and writer are ``llm_birth`` and
            ``llm_writer``.
        peak_channels: Largest channels on the layer with the largest activation.
        first_drawn: First LLM layer where some head gives it at least ``draws`` beyond uniform
            attention, from other tokens (see `ReceivedResult.excess`).
        received: Mean over heads of the attention received, by layer.
        received_max: Highest head, by layer.
        null: The same under uniform attention, by layer.
        head: ``(layer, head)`` where other tokens give it the most beyond uniform attention; None
            where too few see it to tell.
        head_received: What they give there, 0 to 1; NaN if ``head`` is None.
        head_null: What they would give there under uniform attention.
        excess: The difference of the two, by which sinks are ranked.
        contribution: What it writes there: mean over the queries that see it of
            ``||A_qs D W_O^h v_s||_2`` with D what lies between head and stream, which is the attention received times the norm of its write.
        value_ratio: ``ratio_out`` there: its write over the mean write of the other tokens.
        stable_rank: Of that head's output.
        verdict: ``"NOP"``, ``"broadcast"``, ``"mixed"``; ``"draws nothing"`` for a token to which no
            head of the LLM gives ``draws`` beyond uniform attention; ``"writes unknown"`` where it is not
            known what lies between its head and the stream.
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
    vit_token: int
    vit_kind: str | None
    vit_birth: int | None
    vit_writer: str | None
    vit_norm: float | None
    vit_channels: tuple[tuple[int, float], ...]
    vit_drawn: tuple[float, ...]
    llm_norm: float
    llm_channels: tuple[tuple[int, float], ...]
    llm_birth: int | None
    llm_writer: str | None
    llm_layers: tuple[int, ...]
    llm_lives: tuple[tuple[int, int, str | None], ...]
    peak_channels: tuple[tuple[int, float], ...]
    first_drawn: int | None
    received: tuple[float, ...]
    received_max: tuple[float, ...]
    null: tuple[float, ...]
    head: tuple[int, int] | None
    head_received: float
    head_null: float
    excess: float
    contribution: float
    value_ratio: float
    stable_rank: float
    verdict: str
    overlap: bool

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values."""
        return asdict(self)


MULTIPLE = 5.0

"""Times uniform attention from which a token draws (ACT, 2406.15765)."""

Channels = tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False)
class Measured:
    """What a trace has measured, with the few numbers that every record needs.

    Attributes:
        sample: The sample.
        run: The run.
        probes: Its probes.
        v: What the V rule flags.
        low: What the L rule flags.
        last: The last vision block that feeds the projector.
        draws: Least attention beyond uniform.
        excess: ``[batch layer head key]`` in the LLM, see `ReceivedResult.excess`.
        writes: What heads write, in the layers of which that is known; None if there are none.
        ratio: ``[batch layer head key]``, every key's write over the mean of the others, there.
    """

    sample: Sample
    run: Run
    probes: Probes
    v: Detection
    low: Detection
    last: int
    draws: float
    excess: Tensor
    writes: WriteResult | None
    ratio: Tensor | None

    @property
    def vision(self) -> EvidenceResult:
        """Spikes and attention in the vision tower."""
        return self.run[self.probes.vision]

    @property
    def language(self) -> EvidenceResult:
        """Spikes and attention in the LLM."""
        return self.run[self.probes.language]


def measured(
    lvlm: LVLM, sample: Sample, run: Run, probes: Probes, v: Detection, low: Detection, draws: float
) -> Measured:
    """What `collect_records` takes."""
    writes = None if probes.writes is None else run[probes.writes]
    return Measured(
        sample=sample,
        run=run,
        probes=probes,
        v=v,
        low=low,
        last=lvlm.anatomy.feed_layers[-1],
        draws=draws,
        excess=run[probes.language].received.excess(),
        writes=writes,
        ratio=None if writes is None else writes.ratio(),
    )


def attended_throughout(evidence: EvidenceResult, last: int, draws: float) -> Tensor:
    """ViT tokens that draw attention in most blocks up to ``last``, bool ``[image pos]``.

    In a block they draw if some head gives them ``draws`` beyond uniform attention and `MULTIPLE`
    times as much, which matters where there are few tokens.
    """
    received = evidence.received
    assert received.others_null is not None
    enough = (MULTIPLE - 1) * received.others_null
    drawing = evidence.drawn() >= enough.clamp(min=draws)
    return drawing[:, : last + 1].float().mean(dim=1) > 0.5


def top_channels(result: MassiveResult, batch: int, layer: int, pos: int) -> Channels:
    """The largest channels of a token, as ``(channel, value)``."""
    channels = result.channels[batch, layer, pos].tolist()
    values = result.values[batch, layer, pos].tolist()
    return tuple(zip(channels, values, strict=True))


def writer(
    run: Run, halves: Mapping[str, MassiveActivations], where: tuple[int, int, int], channel: int
) -> str | None:
    """Which half of a block wrote more into a channel of a token.

    Args:
        run: The run.
        halves: The probes of ``attn_out`` and ``mlp_out``; none where no block's are known.
        where: Row, block, position.
        channel: The channel.

    Returns:
        ``"attention"``, ``"mlp"``, or None where it is not known what the block adds.
    """
    row, block, pos = where
    size = {}
    for site, probe in halves.items():
        result = run[probe]
        if block not in result.layers:
            return None
        at = (row, result.layers.index(block), pos)
        size[site] = float(result.values[at].abs()[result.channels[at] == channel].sum())
    if not size:
        return None
    return "attention" if size["attn_out"] > size["mlp_out"] else "mlp"


def births(mask: Tensor) -> int | None:
    """First index of the last unbroken stretch of True, or None if the last entry is False."""
    if not bool(mask[-1]):
        return None
    off = (~mask).nonzero().flatten()
    return int(off[-1]) + 1 if len(off) else 0


def collect_records(m: Measured, v_sinks: Tensor, attended: Tensor) -> tuple[SinkRecord, ...]:
    """One record per sink and per image token that is attended without one, in position order.

    Args:
        m: The measurements.
        v_sinks: Bool ``[batch pos]``.
        attended: Bool ``[batch pos]``: image tokens whose ViT token is `attended_throughout`.
    """
    rule = m.low.any_layer()
    found = []
    for batch, pos in ((v_sinks | rule | attended) & m.sample.tokens.live).nonzero().tolist():
        visual = int(m.sample.tokens.image[batch, pos]) >= 0
        kind = "V" if bool(v_sinks[batch, pos]) else ("L" if visual else "text")
        if kind == "L" and not bool(rule[batch, pos]):
            kind = "attention"
        parts: dict[str, Any] = {"kind": kind, "batch": batch, "pos": pos}
        parts |= place_of(m.sample, batch, pos)
        parts |= vision_part(m, batch, pos)
        parts |= language_part(m, batch, pos)
        parts |= attention_part(m, batch, pos)
        parts["overlap"] = kind == "V" and parts["llm_birth"] is not None
        found.append(SinkRecord(**parts))
    return tuple(found)


def place_of(sample: Sample, batch: int, pos: int) -> dict[str, Any]:
    """Where a token is: word, image, grid cell, pixel box, ViT tokens."""
    tokens = sample.tokens
    box = tokens.box[batch, pos]
    sources = tuple(int(s) for s in tokens.sources[batch, pos] if s >= 0)
    return {
        "word": tokens.words[batch][pos] if tokens.words else None,
        "image": int(tokens.image[batch, pos]),
        "row": int(tokens.row[batch, pos]),
        "column": int(tokens.column[batch, pos]),
        "box": None if box.isnan().any() else tuple(box.tolist()),
        "vit_tokens": sources,
    }


def vision_part(m: Measured, batch: int, pos: int) -> dict[str, Any]:
    """What the token was in the vision tower: birth, writer, norm and channels."""
    image = int(m.sample.tokens.image_index[batch, pos])
    if image < 0:
        return {
            "vit_token": -1,
            "vit_kind": None,
            "vit_birth": None,
            "vit_writer": None,
            "vit_norm": None,
            "vit_channels": (),
            "vit_drawn": (),
        }
    sources = [int(s) for s in m.sample.tokens.sources[batch, pos] if s >= 0]
    token = sources[int(m.v.scores[image, m.last, sources].nan_to_num().argmax())]
    channels = top_channels(m.vision.massive, image, m.last, token)
    # Unbroken up to the state that the projector reads; later blocks do not matter.
    birth = births(m.v.mask[image, : m.last + 1, token])
    half = None
    if birth is not None:
        half = writer(m.run, m.probes.vit_halves, (image, birth, token), channels[0][0])
    return {
        "vit_token": token,
        "vit_kind": VISION_KINDS[int(m.sample.tokens.vision.kind[image, token])],
        "vit_birth": birth,
        "vit_writer": half,
        "vit_norm": float(m.run[m.probes.vit_norms].norms[image, m.last, token]),
        "vit_channels": channels,
        "vit_drawn": tuple(m.vision.drawn()[image, :, token].tolist()),
    }


def language_part(m: Measured, batch: int, pos: int) -> dict[str, Any]:
    """What the token is in the LLM: channels, birth, writer, the layers where the L rule holds."""
    massive = m.language.massive
    layers = tuple(int(layer) for layer in m.low.mask[batch, :, pos].nonzero().flatten())
    peak = int(massive.values[batch, :, pos, 0].abs().argmax())
    lives = tuple(life(m, batch, pos, stretch) for stretch in stretches(layers))
    return {
        "llm_norm": float(m.run[m.probes.llm_norms].norms[batch, 0, pos]),
        "llm_channels": top_channels(massive, batch, 0, pos),
        "llm_birth": lives[0][0] if lives else None,
        "llm_writer": lives[0][2] if lives else None,
        "llm_layers": layers,
        "llm_lives": lives,
        "peak_channels": top_channels(massive, batch, peak, pos),
    }


def stretches(layers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of every unbroken run of ascending layers."""
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs


def life(
    m: Measured, batch: int, pos: int, stretch: tuple[int, int]
) -> tuple[int, int, str | None]:
    """The block that wrote a spike, the last layer that reads it, and which half of the block wrote.

    Layer l reads what block l - 1 wrote; layer 0 reads the embeddings.
    """
    first, last = stretch
    if not first:
        return -1, last, None
    channel = int(m.language.massive.channels[batch, first, pos, 0])
    return first - 1, last, writer(m.run, m.probes.llm_halves, (batch, first - 1, pos), channel)


def attention_part(m: Measured, batch: int, pos: int) -> dict[str, Any]:
    """What the token receives, since when, and what it writes in the head that attends it most."""
    got = m.language.received
    null, others, others_null = got.null, got.others, got.others_null
    assert null is not None
    assert others is not None
    assert others_null is not None
    received = got.received[batch, :, :, pos]
    excess = m.excess[batch, :, :, pos]
    nowhere = float("nan")
    parts: dict[str, Any] = {
        "received": tuple(received.mean(dim=1).tolist()),
        "received_max": tuple(received.amax(dim=1).tolist()),
        "null": tuple(null[batch, :, pos].tolist()),
    }
    if excess.isnan().all():
        return parts | {
            "first_drawn": None,
            "head": None,
            "head_received": nowhere,
            "head_null": nowhere,
            "excess": nowhere,
            "contribution": nowhere,
            "value_ratio": nowhere,
            "stable_rank": nowhere,
            "verdict": "seen by few",
        }
    known = excess.nan_to_num(nan=-2.0)
    drawn = (known.amax(dim=1) >= m.draws).nonzero().flatten()
    layer, head = divmod(int(known.argmax()), excess.shape[1])
    ratio, rank, norm = written(m, batch, layer, head, pos)
    verdict = "writes unknown" if ratio != ratio else nop_or_broadcast(ratio, rank)
    return parts | {
        "first_drawn": int(drawn[0]) if len(drawn) else None,
        "head": (layer, head),
        "head_received": float(others[batch, layer, head, pos]),
        "head_null": float(others_null[batch, layer, pos]),
        "excess": float(excess[layer, head]),
        "contribution": float(received[layer, head]) * norm,
        "value_ratio": ratio,
        "stable_rank": rank,
        "verdict": verdict if len(drawn) else "draws nothing",
    }


def written(m: Measured, batch: int, layer: int, head: int, pos: int) -> tuple[float, float, float]:
    """What a token writes in a head: over the others' mean, the head's stable rank, and its norm.

    NaN where it is not known what lies between the head and the residual stream.
    """
    if m.writes is None or m.ratio is None or layer not in m.writes.layers:
        return float("nan"), float("nan"), float("nan")
    at = m.writes.layers.index(layer)
    return (
        float(m.ratio[batch, at, head, pos]),
        float(m.writes.stable_rank[batch, at, head]),
        float(m.writes.norms[batch, at, head, pos]),
    )

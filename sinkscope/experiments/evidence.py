"""Turn the measurements of a trace into one record per sink."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sinkscope.detectors.detection import Detection
from sinkscope.experiments.records import SinkRecord, nop_or_broadcast
from sinkscope.models.lvlm import LVLM, Run
from sinkscope.models.prepare import Sample
from sinkscope.probes import MassiveActivations, MassiveResult

if TYPE_CHECKING:
    from sinkscope.experiments.trace import Probes

Channels = tuple[tuple[int, float], ...]


def top_channels(result: MassiveResult, batch: int, layer: int, pos: int) -> Channels:
    """The largest channels of a token, as ``(channel, value)``."""
    channels = result.channels[batch, layer, pos].tolist()
    values = result.values[batch, layer, pos].tolist()
    return tuple(zip(channels, values, strict=True))


def writer(
    run: Run, halves: Mapping[str, MassiveActivations], where: tuple[int, int, int], channel: int
) -> str:
    """Which half of a block wrote more into a channel of a token.

    Args:
        run: The run.
        halves: The probes of ``attn_out`` and ``mlp_out``.
        where: Row, layer index, position.
        channel: The channel.

    Returns:
        ``"attention"`` or ``"mlp"``.
    """
    size = {}
    for site, probe in halves.items():
        result = run[probe]
        channels = result.channels[where]
        values = result.values[where].abs()
        size[site] = float(values[channels == channel].sum())
    return "attention" if size["attn_out"] > size["mlp_out"] else "mlp"


def births(mask: Tensor) -> int | None:
    """First index of the last unbroken stretch of True, or None if the last entry is False."""
    if not bool(mask[-1]):
        return None
    off = (~mask).nonzero().flatten()
    return int(off[-1]) + 1 if len(off) else 0


def collect_records(
    lvlm: LVLM,
    sample: Sample,
    run: Run,
    probes: Probes,
    v: Detection,
    low: Detection,
    v_sinks: Tensor,
    draw: float,
) -> tuple[SinkRecord, ...]:
    """One record per V-sink, L-sink and text sink, in batch and position order."""
    flagged = (v_sinks | low.any_layer()) & sample.tokens.live
    found = []
    for batch, pos in flagged.nonzero().tolist():
        visual = int(sample.tokens.image[batch, pos]) >= 0
        kind = "V" if bool(v_sinks[batch, pos]) else ("L" if visual else "text")
        parts: dict[str, Any] = {"kind": kind, "batch": batch, "pos": pos}
        parts |= place_of(sample, batch, pos)
        parts |= vision_part(lvlm, sample, run, probes, v, batch, pos)
        parts |= language_part(run, probes, low, batch, pos)
        parts |= attention_part(run, probes, batch, pos, draw)
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


def vision_part(
    lvlm: LVLM, sample: Sample, run: Run, probes: Probes, v: Detection, batch: int, pos: int
) -> dict[str, Any]:
    """What the token was in the vision tower: birth, writer, norm and channels."""
    nothing = {
        "vit_token": -1,
        "vit_birth": None,
        "vit_writer": None,
        "vit_norm": None,
        "vit_channels": (),
    }
    image = int(sample.tokens.image_index[batch, pos])
    if image < 0:
        return nothing
    last = lvlm.anatomy.feed_layers[-1]
    sources = [int(s) for s in sample.tokens.sources[batch, pos] if s >= 0]
    scores = v.scores[image, last, sources].nan_to_num()
    token = sources[int(scores.argmax())]
    massive = run[probes.vit_massive]
    channels = top_channels(massive, image, last, token)
    # Unbroken up to the state that the projector reads; later blocks do not matter.
    birth = births(v.mask[image, : last + 1, token])
    half = None
    if birth is not None:
        half = writer(run, probes.vit_halves, (image, birth, token), channels[0][0])
    return {
        "vit_token": token,
        "vit_birth": birth,
        "vit_writer": half,
        "vit_norm": float(run[probes.vit_norms].norms[image, last, token]),
        "vit_channels": channels,
    }


def language_part(run: Run, probes: Probes, low: Detection, batch: int, pos: int) -> dict[str, Any]:
    """What the token is in the LLM: channels, birth, writer, the layers where the L rule holds."""
    massive = run[probes.llm_massive]
    mask = low.mask[batch, :, pos]
    layers = tuple(int(layer) for layer in mask.nonzero().flatten())
    peak = int(massive.values[batch, :, pos, 0].abs().argmax())
    birth = half = None
    if layers:
        # Layer l reads what block l - 1 wrote; layer 0 reads the embeddings.
        birth = layers[0] - 1
        if birth >= 0:
            channel = int(massive.channels[batch, layers[0], pos, 0])
            half = writer(run, probes.llm_halves, (batch, birth, pos), channel)
    return {
        "llm_norm": float(run[probes.llm_norms].norms[batch, 0, pos]),
        "llm_channels": top_channels(massive, batch, 0, pos),
        "llm_birth": birth,
        "llm_writer": half,
        "llm_layers": layers,
        "peak_channels": top_channels(massive, batch, peak, pos),
    }


def attention_part(run: Run, probes: Probes, batch: int, pos: int, draw: float) -> dict[str, Any]:
    """What the token receives, since when, and what it writes in the head that attends it most."""
    got = run[probes.received]
    received = got.received[batch, :, :, pos]
    null = got.null[batch, :, pos]
    over = received / null[:, None]
    drawn = (over.amax(dim=1) >= draw).nonzero().flatten()
    at = int(over.argmax())
    layer, head = divmod(at, over.shape[1])
    writes = run[probes.writes]
    ratio = float(writes.ratio()[batch, layer, head, pos])
    rank = float(writes.stable_rank[batch, layer, head])
    verdict = nop_or_broadcast(ratio, rank) if len(drawn) else "draws nothing"
    return {
        "first_drawn": int(drawn[0]) if len(drawn) else None,
        "received": tuple(received.mean(dim=1).tolist()),
        "received_max": tuple(received.amax(dim=1).tolist()),
        "null": tuple(null.tolist()),
        "head": (layer, head),
        "head_received": float(received[layer, head]),
        "over_null": float(over[layer, head]),
        "contribution": float(received[layer, head] * writes.norms[batch, layer, head, pos]),
        "value_ratio": ratio,
        "stable_rank": rank,
        "verdict": verdict,
    }

"""SinkRecord: everything the trace knows about one sink, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

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

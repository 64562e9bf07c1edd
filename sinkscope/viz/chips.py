"""A prompt as chips: one per text token, one per image, with what each receives and which sinks it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from sinkscope.tokens import VISION_KINDS
from sinkscope.viz.html import MARKS
from sinkscope.viz.image import shown_records
from sinkscope.viz.style import GROUP_OF, check_layer
from sinkscope.viz.words import readable, short

if TYPE_CHECKING:
    from sinkscope.experiments.trace import SinkTrace
    from sinkscope.tokens import TokenMap

SEEN = 8
"""Queries that must see a token before its mean says more than what it gives to itself."""


@dataclass(frozen=True)
class Chip:
    """One token, or the patches of one image.

    Attributes:
        text: What to write on it.
        first: Its first position.
        last: Its last position.
        share: The largest share of attention that one of its tokens receives, 0 to 1; None where too
            few queries see it.
        null: The same token and layer under uniform attention.
        at: The position, LLM layer and head of that share.
        sinks: Kind of sink -> how many it holds.
    """

    text: str
    first: int
    last: int
    share: float | None
    null: float
    at: tuple[int, int, int]
    sinks: dict[str, int]


def chips_of(trace: SinkTrace, row: int = 0, layer: int | None = None) -> list[Chip]:
    """The prompt of a row, from its first token that is no padding to its last.

    Args:
        trace: The trace.
        row: The row of the batch.
        layer: One LLM layer, with the sinks of that layer; None for the largest share over all.

    Raises:
        SelectionError: If there is no such row.
        LayerError: If there is no such layer.
    """
    layers = range(trace.n_layers) if layer is None else [check_layer(trace, layer)]
    kinds = {record.pos: record.kind for record in shown_records(trace, row, layer)}
    tokens = trace.sample.tokens
    received, null = trace.received[row, list(layers)], trace.null[row, list(layers)]
    seen = tokens.live[row].flip(0).cumsum(0).flip(0)  # a token is seen by itself and what follows
    out = []
    for name, group in groupby(tokens.live[row].nonzero().flatten().tolist(), _name(tokens, row)):
        places = list(group)
        part = received[:, :, places].nan_to_num()
        index, head, key = (int(i) for i in torch.unravel_index(part.argmax(), part.shape))
        held = [kinds[pos] for pos in places if pos in kinds]
        share = float(part[index, head, key])
        out.append(
            Chip(
                text=_text(name, places, share),
                first=places[0],
                last=places[-1],
                share=share if int(seen[places[0]]) >= SEEN else None,
                null=float(null[index, places[key]]),
                at=(places[key], layers[index], head),
                sinks={kind: held.count(kind) for kind in MARKS if kind in held},
            )
        )
    return out


def marks_of(chip: Chip) -> str:
    """The marks of the sinks in a chip: ``▲``, or ``● 2`` where one chip holds several tokens."""
    many = chip.last > chip.first
    return " ".join(f"{MARKS[kind]}{f' {n}' if many else ''}" for kind, n in chip.sinks.items())


def kinds_in(chips: Sequence[Chip]) -> list[tuple[str, str]]:
    """``("V-sinks", "● V-sinks (2)")`` for every kind of sink."""
    out = []
    for kind, mark in MARKS.items():
        count = sum(chip.sinks.get(kind, 0) for chip in chips)
        found = f" ({count})" if count else ": none found"
        out.append((GROUP_OF[kind], f"{mark} {GROUP_OF[kind]}{found}"))
    return out


def strip_title(layer: int | None) -> str:
    """What the colours of a strip mean."""
    where = "heads and layers" if layer is None else f"the heads of layer {layer}"
    return f"Attention that every token of the prompt receives, largest over {where}"


def strip_notes(chips: Sequence[Chip]) -> list[str]:
    """What a reader of the strip must know."""
    known = [chip for chip in chips if chip.share is not None]
    nulls = [chip.null for chip in known]
    notes = []
    if known:
        notes.append(
            f"under uniform attention (null) these tokens would receive {short(min(nulls), 2)} to "
            f"{short(max(nulls), 2)}"
        )
    if len(known) < len(chips):
        notes.append(f"dashed: fewer than {SEEN} queries see the token, so it has no colour")
    return notes


def _name(tokens: TokenMap, row: int) -> Callable[[int], tuple[str, int]]:
    """A function of a position: its own name, or that of the image that it shares a chip with."""

    def name(pos: int) -> tuple[str, int]:
        image = int(tokens.image[row, pos])
        if image < 0:
            return readable(tokens.words[row][pos] if tokens.words else None), pos
        source = int(tokens.sources[row, pos, 0])
        kind = VISION_KINDS[int(tokens.vision.kind[int(tokens.image_index[row, pos]), source])]
        if kind in ("cls", "register"):
            return f"image {image} {'CLS' if kind == 'cls' else kind}", pos
        return f"image {image}", -1

    return name


def _text(name: tuple[str, int], places: list[int], share: float) -> str:
    word, pos = name
    return word if pos >= 0 else f"{word}: {len(places)} tokens, max {short(share, 2)}"

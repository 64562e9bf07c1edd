"""Other tokens for a control: as many, taking as much attention, or another image's positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.errors import InterventionError, NoEffectError

if TYPE_CHECKING:
    from sinkscope.experiments.trace import SinkTrace

FIELDS = ("tokens", "keys", "source")
"""Where an intervention says what it edits."""


def token_field(intervention: Any) -> str:
    """The field that holds the edited tokens.

    Raises:
        InterventionError: If there is none, or the tower is not the decoder.
    """
    for field in FIELDS:
        if hasattr(intervention, field):
            if getattr(intervention, "tower", "language") != "language":
                raise InterventionError(
                    "Got an intervention of the vision tower; expected one of the decoder, whose "
                    "tokens a trace knows."
                )
            return field
    raise InterventionError(
        f"Got {type(intervention).__name__}; expected an intervention with one of the fields "
        f"{FIELDS}."
    )


def tokens_of(intervention: Any, trace: SinkTrace) -> Tensor:
    """The tokens that an intervention edits, ``[batch pos]`` or ``[batch layer pos]``."""
    chosen = getattr(intervention, token_field(intervention))
    return trace.sample.tokens.select(chosen, trace.n_layers)


def receiving(intervention: Any, trace: SinkTrace) -> Float[Tensor, "batch pos"]:
    """What every token receives in the layers and heads that an intervention edits.

    The mean over those, and over the queries that can see the token: `SinkTrace.received`.
    """
    layers, heads = getattr(intervention, "layers", None), getattr(intervention, "heads", None)
    received = trace.received.nan_to_num()
    if layers is not None:
        received = received[:, list(layers)]
    if heads is not None:
        received = received[:, :, list(heads)]
    return received.mean(dim=(1, 2))


def attention_on(intervention: Any, trace: SinkTrace) -> Float[Tensor, " batch"]:
    """Attention that the edited tokens receive in the unedited run, in the edited layers and heads.

    Per token it is the mean over the queries that can see it, as in `ReceivedAttention`. These are
    fewer for later tokens, so the sum over tokens is no share and may exceed 1. A selection that
    differs by layer counts the tokens that it holds in any layer.
    """
    mask = tokens_of(intervention, trace)
    flat = mask if mask.ndim == 2 else mask.any(dim=1)
    return (receiving(intervention, trace) * flat).sum(dim=1)


def ordinary_like(mask: Tensor, trace: SinkTrace) -> Tensor:
    """Tokens to draw from: of the edited tokens' kind (image or text), sinks at no layer, unedited."""
    tokens = trace.sample.tokens
    flat = mask if mask.ndim == 2 else mask.any(dim=1)
    visual = tokens.image >= 0
    text = tokens.live & ~visual & ~trace.text_sinks().any(dim=1)
    kind_visual = bool((flat & visual).any()) or not bool(flat.any())
    kind_text = bool((flat & ~visual).any())
    pool = torch.zeros_like(flat)
    if kind_visual:
        pool |= trace.ordinary()
    if kind_text:
        pool |= text
    return pool & ~flat


def draw_by_count(mask: Tensor, pool: Tensor, generator: torch.Generator) -> Tensor:
    """As many random tokens as are edited, in every row and layer.

    Raises:
        InterventionError: If too few tokens are left.
    """
    layers = mask if mask.ndim == 3 else mask[:, None]
    out = torch.zeros_like(layers)
    for b in range(layers.shape[0]):
        candidates = pool[b].nonzero().flatten()
        order = candidates[torch.randperm(len(candidates), generator=generator)]
        for layer in range(layers.shape[1]):
            wanted = int(layers[b, layer].sum())
            if wanted > len(order):
                raise InterventionError(
                    f"Row {b} has {len(order)} ordinary tokens to draw from; expected at least "
                    f"{wanted}, as many as are edited. Edit fewer tokens or match by mass."
                )
            out[b, layer, order[:wanted]] = True
    return out if mask.ndim == 3 else out[:, 0]


def draw_by_mass(
    wanted: Tensor, received: Tensor, pool: Tensor, generator: torch.Generator
) -> Tensor:
    """Random tokens until they receive what the edited ones do, in every row.

    Args:
        wanted: Float ``[batch]``, see `attention_on`.
        received: Float ``[batch pos]``, see `receiving`.
        pool: Bool ``[batch pos]``, what may be drawn.
        generator: Of the draw.

    Raises:
        InterventionError: If all that may be drawn receive less.
    """
    out = torch.zeros_like(pool)
    for b, most in enumerate(wanted.tolist()):
        candidates = pool[b].nonzero().flatten()
        there = float(received[b, candidates].sum())
        if there < most:
            raise InterventionError(
                f"Row {b} has ordinary tokens that receive {there:.3g} of attention together; "
                f"expected at least {most:.3g}, which the edited tokens receive. Write match='count', "
                "or edit fewer tokens."
            )
        order = candidates[torch.randperm(len(candidates), generator=generator)]
        so_far = received[b, order].cumsum(0) - received[b, order]
        out[b, order[so_far < most]] = True
    return out


def other_positions(mask: Tensor, trace: SinkTrace, donor: SinkTrace | None) -> Tensor:
    """The sink positions of another image that are no sinks in this one.

    Raises:
        InterventionError: If there is no donor, or its prompt has another shape.
        NoEffectError: If no position is left.
    """
    if donor is None:
        raise InterventionError(
            "Got match='position' without a donor; expected the trace of another image. Write "
            "control.run(lvlm, trace, donor=other_trace)."
        )
    if donor.v_sinks.shape != trace.v_sinks.shape:
        raise InterventionError(
            f"Got a donor with a prompt of shape {tuple(donor.v_sinks.shape)}; expected "
            f"{tuple(trace.v_sinks.shape)}. Use the same question on another image."
        )
    there = donor.v_sinks | donor.l_sinks().any(dim=1)
    out = there & trace.ordinary()
    if not out.any():
        raise NoEffectError(
            "The other image's sinks lie where this one has sinks too; expected other positions. "
            "Choose another donor."
        )
    return out

"""Other tokens for a control: as many, taking as much attention, or another image's positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sinkscope.errors import InterventionError, NoEffectError, TooFewTokensError

if TYPE_CHECKING:
    from sinkscope.experiments.trace import SinkTrace
    from sinkscope.models.lvlm import LVLM

FIELDS = ("tokens", "keys", "source")
"""Where an intervention says what it edits."""


def token_field(intervention: Any) -> str:
    """The field that holds the edited tokens.

    Raises:
        InterventionError: If there is none, or the tower is not the decoder.
    """
    if isinstance(intervention, nn.Module):
        raise InterventionError(
            f"Got a {type(intervention).__name__}, which finds its tokens itself; expected an "
            "intervention that names them. For random tokens under a gate write "
            "ss.LSG.for_model(lvlm, ..., v_detector=ss.detectors.RandomTokens(4))."
        )
    for field in FIELDS:
        if hasattr(intervention, field):
            if getattr(intervention, "tower", "language") != "language":
                raise InterventionError(
                    "Got an intervention of the vision tower; expected one of the decoder, whose "
                    "tokens a trace knows."
                )
            return field
    came = intervention if isinstance(intervention, type) else type(intervention)
    raise InterventionError(
        f"Got {came.__name__}; expected an intervention with one of the fields {FIELDS}."
    )


def tokens_of(intervention: Any, trace: SinkTrace) -> Tensor:
    """The tokens that an intervention edits, ``[batch pos]`` or ``[batch layer pos]``."""
    chosen = getattr(intervention, token_field(intervention))
    return trace.sample.tokens.select(chosen, trace.n_layers)


def layers_of(intervention: Any, trace: SinkTrace) -> list[int]:
    """The layers that an intervention edits; all if it names none.

    Raises:
        InterventionError: If one is no layer of the decoder.
    """
    given = getattr(intervention, "layers", None)
    if given is None:
        return list(range(trace.n_layers))
    several = isinstance(given, Iterable) and not isinstance(given, str)
    wanted: list[Any] = list(given) if several else [given]
    for layer in wanted:
        whole = isinstance(layer, Integral) and not isinstance(layer, bool)
        if not whole or not 0 <= int(layer) < trace.n_layers:
            raise InterventionError(
                f"Got layer {layer!r}; expected block indices from 0 to {trace.n_layers - 1}. "
                f"Layers are never negative: write {trace.n_layers - 1} for the last block."
            )
    return sorted({int(layer) for layer in wanted})


def receiving(
    intervention: Any, trace: SinkTrace, lvlm: LVLM | None = None
) -> Float[Tensor, "batch layer pos"]:
    """What every token receives in the layers and heads that an intervention edits.

    The mean over those heads, and over queries: for an intervention without ``queries`` those that
    can see the token (`SinkTrace.received`), else the chosen ones, of which those that cannot see it
    give 0. These are measured in one unedited pass. Only the edited layers are there, in order.

    Raises:
        InterventionError: If the intervention has queries and there is no model to ask.
    """
    layers, heads = layers_of(intervention, trace), getattr(intervention, "heads", None)
    queries = getattr(intervention, "queries", None)
    if queries is None:
        received = trace.received[:, layers].nan_to_num()
    elif lvlm is None:
        raise InterventionError(
            "Got an intervention with queries and no model; expected one, to measure what these "
            "queries give every token. Write control.draws(trace, lvlm=lvlm)."
        )
    else:
        from sinkscope.probes import AttentionPatterns

        probe = AttentionPatterns(queries, layers)
        result = lvlm.run(trace.sample, probes=[probe], logits="last")[probe]
        there = (result.rows >= 0)[:, None, None, :, None]
        given = torch.where(there, result.patterns.nan_to_num(), 0.0)
        received = given.sum(3) / there.sum(3).clamp(min=1)
    if heads is not None:
        chosen: list[Any] = list(heads) if isinstance(heads, Iterable) else [heads]
        received = received[:, :, chosen]
    return received.mean(dim=2)


def attention_on(
    tokens: Tensor, received: Float[Tensor, "batch layer pos"], layers: list[int]
) -> Float[Tensor, " batch"]:
    """Attention that tokens receive in the unedited run, in the edited layers and heads.

    The sum over tokens of what `receiving` says, averaged over layers. Without queries it is a mean
    over the queries that can see the token: these are fewer for later tokens, so the sum is no share
    and may exceed 1.

    Args:
        tokens: Bool ``[batch pos]`` or ``[batch layer pos]``; with layers, each counts its own.
        received: From `receiving`.
        layers: From `layers_of`.
    """
    mask = tokens[:, None] if tokens.ndim == 2 else tokens[:, layers]
    return (received * mask).sum(dim=2).mean(dim=1)


Draw = Callable[[Tensor, Tensor, str], Tensor]


def draw_by_kind(mask: Tensor, trace: SinkTrace, draw: Draw) -> Tensor:
    """Image tokens for the edited image tokens of every row, and text tokens for the text tokens.

    Drawn from tokens that are edited in no layer and sinks in no layer.

    Args:
        mask: Bool ``[batch pos]`` or ``[batch layer pos]``.
        trace: The trace.
        draw: ``draw(mask, pool, kind)`` of one kind.
    """
    flat = mask if mask.ndim == 2 else mask.any(dim=1)
    out = torch.zeros_like(mask)
    for kind, (all_of_kind, ordinary) in kinds(trace).items():
        if (flat & all_of_kind).any():
            these = all_of_kind if mask.ndim == 2 else all_of_kind[:, None]
            out |= draw(mask & these, ordinary & ~flat, kind)
    return out


def kinds(
    trace: SinkTrace,
) -> dict[str, tuple[Bool[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]]:
    """Image and text: all tokens of the kind, and those that are sinks at no layer."""
    tokens = trace.sample.tokens
    visual = tokens.image >= 0
    text = tokens.live & ~visual
    return {
        "image": (visual, trace.ordinary()),
        "text": (text, text & ~trace.text_sinks().any(dim=1)),
    }


def drawable(mask: Tensor, trace: SinkTrace) -> Bool[Tensor, " batch"]:
    """The rows with as many ordinary tokens of each kind as are edited, in every layer."""
    layers = mask if mask.ndim == 3 else mask[:, None]
    out = torch.ones(len(mask), dtype=torch.bool)
    for all_of_kind, ordinary in kinds(trace).values():
        pool = (ordinary & ~layers.any(dim=1)).sum(dim=1, keepdim=True)
        out &= ((layers & all_of_kind[:, None]).sum(dim=2) <= pool).all(dim=1)
    return out


def by_count(generator: torch.Generator) -> Draw:
    """As many random tokens as are edited, in every row and layer.

    The tokens of a layer with fewer are among those of a layer with more.
    """

    def draw(mask: Tensor, pool: Tensor, kind: str) -> Tensor:
        layers = mask if mask.ndim == 3 else mask[:, None]
        out = torch.zeros_like(layers)
        for b in range(layers.shape[0]):
            order = shuffled(pool[b], generator)
            for layer in range(layers.shape[1]):
                wanted = int(layers[b, layer].sum())
                if wanted > len(order):
                    raise TooFewTokensError(
                        f"Row {b} has {len(order)} ordinary {kind} tokens to draw from; expected at "
                        f"least {wanted}, as many as are edited. Edit fewer tokens or match by mass."
                    )
                out[b, layer, order[:wanted]] = True
        return out if mask.ndim == 3 else out[:, 0]

    return draw


def by_mass(
    received: Float[Tensor, "batch layer pos"], layers: list[int], generator: torch.Generator
) -> Draw:
    """Random tokens until they receive what the edited ones do, in every row.

    A selection by layer is matched in each edited layer, by the first tokens of one order per row; a
    layer in which nothing is selected gets none. Any other selection is matched by the mean over
    the edited layers.

    Args:
        received: From `receiving`.
        layers: From `layers_of`.
        generator: Of the draw.
    """

    def draw(mask: Tensor, pool: Tensor, kind: str) -> Tensor:
        out = torch.zeros_like(mask)
        for b in range(mask.shape[0]):
            order = shuffled(pool[b], generator)
            if mask.ndim == 2:
                out[b] = enough(mask[b], received[b].mean(0), order, f"Row {b}", kind)
                continue
            for at, layer in enumerate(layers):
                where = f"Row {b}, layer {layer},"
                out[b, layer] = enough(mask[b, layer], received[b, at], order, where, kind)
        return out

    return draw


def shuffled(pool: Bool[Tensor, " pos"], generator: torch.Generator) -> Tensor:
    """The positions of a pool in random order."""
    candidates = pool.nonzero().flatten()
    return candidates[torch.randperm(len(candidates), generator=generator)]


def enough(mask: Tensor, received: Tensor, order: Tensor, where: str, kind: str) -> Tensor:
    """The first tokens of an order that together receive what those of the mask do, ``[pos]``.

    Raises:
        TooFewTokensError: If all of them receive less.
    """
    out = torch.zeros_like(mask)
    if not mask.any():
        return out
    most, there = float(received[mask].sum()), float(received[order].sum())
    if there < most or not len(order):
        raise TooFewTokensError(
            f"{where} has {len(order)} ordinary {kind} tokens that receive {there:.3g} of attention "
            f"together; expected at least {most:.3g}, which the edited tokens receive. Write "
            "match='count', or edit fewer tokens."
        )
    so_far = received[order].cumsum(0) - received[order]
    chosen = so_far < most
    chosen[0] = True
    out[order[chosen]] = True
    return out


def other_positions(mask: Tensor, trace: SinkTrace, donor: SinkTrace) -> Tensor:
    """The sink positions of another image that are no sinks in this one.

    Of the kind that is edited in the row, image or text, and none in rows and layers where nothing
    is edited.

    Raises:
        InterventionError: If the donor is no trace, or its prompt has another shape.
        NoEffectError: If a row that is edited has no such position.
    """
    check_trace(donor, "a donor")
    if donor.v_sinks.shape != trace.v_sinks.shape:
        raise InterventionError(
            f"Got a donor with a prompt of shape {tuple(donor.v_sinks.shape)}; expected "
            f"{tuple(trace.v_sinks.shape)}. Use the same question on another image."
        )
    there = donor.v_sinks | donor.l_sinks().any(dim=1) | donor.text_sinks().any(dim=1)
    flat = mask if mask.ndim == 2 else mask.any(dim=1)
    out = torch.zeros_like(flat)
    for kind, (all_of_kind, ordinary) in kinds(trace).items():
        edited = (flat & all_of_kind).any(dim=1)
        free = there & ordinary & ~flat & edited[:, None]
        without = (edited & ~free.any(dim=1)).nonzero().flatten().tolist()
        if without:
            raise NoEffectError(
                f"The other image's {kind} sinks lie where this one has sinks too in the rows "
                f"{without}, or there are none; expected other positions. Choose another donor."
            )
        out |= free
    return out if mask.ndim == 2 else out[:, None] & mask.any(dim=2, keepdim=True)


def check_trace(trace: Any, what: str = "a sample to edit") -> None:
    """Refuse what is no trace.

    Raises:
        InterventionError: If so.
    """
    if not hasattr(trace, "v_sinks"):
        raise InterventionError(
            f"Got {type(trace).__name__} as {what}; expected a trace. Write "
            "ss.trace_sinks(lvlm, sample)."
        )

"""Where an edit of attention holds, and what it did there."""

from __future__ import annotations

import torch

from sinkscope.kernels.attention import arguments, fit_keys, one_head, weigh_values
from sinkscope.kernels.recipe import without


def head_mask(call, heads, like):
    """Selected heads as ``[1 1 head 1]`` bool, all if ``heads`` is None."""
    count = arguments(call)[0]["query"].shape[1]
    chosen = torch.ones(count, dtype=torch.bool, device=like.device)
    if heads is not None:
        chosen = torch.zeros_like(chosen)
        chosen[heads] = True
    return chosen[None, None, :, None]


def knows_float32(call):
    """Whether the model's kernel takes fp32; flash kernels do not."""
    return "flash" not in getattr(getattr(call[0], "plain", call[0]), "__name__", "")


def evened(call):
    """The call with ``q = 0``, earlier masks considered: a visible key has some weight, others none.

    Of one head, unless earlier edits may differ by head.
    """
    asked = without(call, "weights", "values")
    if not hasattr(asked[0], "recipe"):
        asked = one_head(asked)
    named, rest = arguments(asked)
    return asked[0], (), {**named, **rest, "query": torch.zeros_like(named["query"])}


def keys_seen(call, keys):
    """Which rows see an edited key, and which see nothing else, earlier masks considered.

    Asked of the call with ``q = 0``, in fp32 where the kernel knows it: in fp16 a key that an earlier
    edit made light would weigh nothing. Where a learned sink takes attention too, a row always sees
    something else.

    Args:
        call: The call, plain or edited.
        keys: ``[batch key]`` bool.

    Returns:
        ``(sees, only)``, bool ``[batch query head|1 1]``.
    """
    heads = arguments(call)[0]["query"].shape[1]
    columns = torch.stack([keys, ~keys], dim=-1).float()
    share = weigh_values(evened(call), columns, float32=knows_float32(call)).transpose(1, 2) > 0
    share = share if share.shape[2] == heads else share[:, :, :1]
    sees, others = share[..., :1], share[..., 1:]
    return sees, torch.zeros_like(sees) if learned_sink(call) else sees & ~others


def learned_sink(call):
    """Whether a learned sink takes part of the attention."""
    named, rest = arguments(call)
    return hasattr(named["module"], "sinks") or rest.get("s_aux") is not None


def gate_of(call, keys, live, rows, heads, spare_empty):
    """Which rows and heads an edit touches.

    Args:
        call: The call.
        keys: ``[batch key]`` bool: the edited keys.
        live: ``[batch query]`` bool.
        rows: ``[batch query]`` bool: the selected queries, or None.
        heads: Selected query heads, or None.
        spare_empty: Whether rows that see edited keys only are left as they are.

    Returns:
        ``(gate [batch query head 1], empty rows [batch query])``.
    """
    sees, only = keys_seen(call, keys)
    chosen = live if rows is None else live & rows
    wanted = chosen[:, :, None, None] & sees & head_mask(call, heads, chosen)
    empty = wanted & only if spare_empty else torch.zeros_like(wanted)
    return wanted & ~empty, empty[..., 0].any(dim=2)


def effect_of(before, after, gate, keys, empty, measure):
    """What an edit did: rows touched, rows left empty, attention on the keys before and after.

    Args:
        before: The call as it came.
        after: The edited call.
        gate: ``[batch query head 1]`` bool, where the edit holds.
        keys: ``[batch key]`` bool, the edited keys.
        empty: ``[batch query]`` bool, rows left as they were, from `gate_of`.
        measure: Whether to ask both calls for the attention on the keys.

    Returns:
        ``{"rows", "empty", "tokens": [batch], "count", "before", "after": [batch]}``; the last two
        are sums over ``count`` touched (row, head) pairs.
    """
    out = {
        "rows": gate.any(dim=2)[..., 0].sum(1),
        "empty": empty.sum(1),
        "tokens": keys.sum(1),
        "count": gate.sum(dim=(1, 2, 3)),
    }
    if measure:
        columns = keys[..., None].float()
        for name, call in (("before", before), ("after", after)):
            mass = weigh_values(call, columns)[..., 0].float().transpose(1, 2)
            out[name] = torch.where(gate[..., 0], mass, torch.zeros_like(mass)).sum(dim=(1, 2))
    return out


def here(x, span, n_keys, state):
    """The part of ``[batch key]`` that a call covers, with keys generated since the prompt unset.

    A sliding cache holds the last keys only, so the last ones are taken.
    """
    if x is None:
        return None
    if span is not None:
        return x[:, span[0] : span[1]]
    return fit_keys(x[..., None], n_keys, state.get("step", 0))[..., 0]


def prepared(call, state, span, keys, live, rows):
    """Masks of the part of the sequence that a call covers.

    Args:
        call: The call.
        state: The run's scratch space, which knows the step.
        span: The part of a packed sequence that the call covers, or None.
        keys: ``[batch key]`` bool of the prompt.
        live: ``[batch query]`` bool of the prompt.
        rows: ``[batch query]`` bool of the prompt, or None.

    Returns:
        ``(keys, live, rows)`` for this call: keys generated since the prompt are not selected, the
        query of a decode step is live.
    """
    named, _ = arguments(call)
    n_query, n_key = named["query"].shape[2], named["key"].shape[2]
    if span is not None:
        live = live[:, span[0] : span[1]]
        rows = None if rows is None else rows[:, span[0] : span[1]]
    elif live.shape[1] != n_query:
        live = torch.ones(live.shape[0], n_query, dtype=torch.bool, device=live.device)
    return here(keys, span, n_key, state), live, rows

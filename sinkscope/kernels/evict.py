"""The keys that a streaming cache would still hold: the first few and the most recent."""

from __future__ import annotations

import torch

from sinkscope.kernels.attention import arguments, weigh_values
from sinkscope.kernels.edits import masked
from sinkscope.kernels.gates import evened, head_mask, knows_float32
from sinkscope.kernels.recipe import with_change


def evict_keys(call, state, span, live, start, recent, measure=True):
    """Attention to the first ``start`` live keys and the last ``recent`` ones only (2309.17453).

    The mask differs by query, so it is made explicit: ``query x key`` numbers per batch row.

    Args:
        call: The attention call.
        state: The run's scratch space.
        span: Unused; packed towers have no cache.
        live: ``[batch key]`` bool of the prompt.
        start: How many first live keys are kept.
        recent: How many recent keys are kept, the query's own among them.
        measure: Whether to measure the attention on the evicted keys.

    Returns:
        The edited call and its effect; ``tokens`` are keys that the last query has lost, and the
        attention is that of every row on the keys that this row has lost.
    """
    named, _ = arguments(call)
    n_query, n_key = named["query"].shape[2], named["key"].shape[2]
    out, rows = out_of_reach(live, state.get("step", 0), n_query, n_key, start, recent)
    lost = out & visible(call)
    rows = rows & lost.any(-1)
    gate = rows[:, :, None, None] & head_mask(call, None, rows)

    def change(named, rest):
        mask = masked(named, rest, torch.zeros(out.shape[0], n_key, device=out.device))
        mask = mask.masked_fill(out[:, None], torch.finfo(mask.dtype).min)
        return {**named, "attention_mask": mask}, rest

    after = with_change(call, "logits", gate, change)
    effect = {
        "rows": rows.sum(1),
        "empty": torch.zeros_like(rows).sum(1),
        "tokens": lost[:, -1].sum(1),
        "count": gate.sum(dim=(1, 2, 3)),
    }
    if measure:
        for name, one in (("before", call), ("after", after)):
            mass = sum(
                (part * lost[:, None, :, at]).sum(-1) for at, part in weights_by_key(one, False)
            )
            effect[name] = torch.where(gate[..., 0].transpose(1, 2), mass, 0.0).sum(dim=(1, 2))
    return after, effect


def out_of_reach(live, step, n_query, n_key, start, recent):
    """The keys that a streaming cache has dropped when a query comes.

    Ranks are counted over the whole sequence, prompt and answer, and cut afterwards: a sliding cache
    holds the last keys only.

    Returns:
        ``[batch query key]`` bool, and the live queries ``[batch query]``.
    """
    grown = torch.ones(live.shape[0], step, dtype=torch.bool, device=live.device)
    alive = torch.cat([live, grown], dim=1)
    rank = alive.cumsum(1) - 1
    query_rank, query_alive = rank[:, -n_query:], alive[:, -n_query:]
    alive, rank = alive[:, -n_key:], rank[:, -n_key:]
    distance = query_rank[:, :, None] - rank[:, None]
    out = (rank[:, None] >= start) & (distance >= recent) & alive[:, None]
    return out, query_alive


def weights_by_key(call, float32):
    """Attention weights, some keys at a time: ``(slice of keys, [batch head query key])``."""
    value = arguments(call)[0]["value"]
    n_key, width = value.shape[2], value.shape[3]
    every = torch.eye(n_key, device=value.device)[None]
    for first in range(0, n_key, width):
        at = slice(first, min(first + width, n_key))
        yield at, weigh_values(call, every[..., at], float32=float32).float()


def visible(call):
    """Which keys a row sees in some head under the model's mask and earlier ones, ``[batch query key]``."""
    parts = weights_by_key(evened(call), knows_float32(call))
    return torch.cat([(part > 0).any(dim=1) for _, part in parts], dim=-1)

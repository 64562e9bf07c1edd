"""The keys that a streaming cache would still hold: the first few and the most recent."""

from __future__ import annotations

import torch

from sinkscope.kernels.attention import arguments
from sinkscope.kernels.edits import masked
from sinkscope.kernels.gates import effect_of, head_mask
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
        The edited call and its effect; ``tokens`` are keys that the last query has lost.
    """
    named, _ = arguments(call)
    n_query, n_key = named["query"].shape[2], named["key"].shape[2]
    grown = torch.ones(live.shape[0], state.get("step", 0), dtype=torch.bool, device=live.device)
    alive = torch.cat([live, grown], dim=1)[:, -n_key:]
    rank = alive.cumsum(1) - 1
    query_rank = rank[:, -n_query:]
    distance = query_rank[:, :, None] - rank[:, None]
    lost = (rank[:, None] >= start) & (distance >= recent) & alive[:, None]
    rows = lost.any(-1) & alive[:, -n_query:]
    gate = rows[:, :, None, None] & head_mask(call, None, rows)

    def change(named, rest):
        zero = torch.zeros(lost.shape[0], n_key, device=lost.device)
        mask = masked(named, rest, zero)
        mask = mask.masked_fill(lost[:, None], torch.finfo(mask.dtype).min)
        return {**named, "attention_mask": mask}, rest

    after = with_change(call, "logits", gate, change)
    empty = torch.zeros_like(rows)
    return after, effect_of(call, after, gate, lost[:, -1], empty, measure)

"""AttentionEntropy: how spread out attention is, over token groups or over single keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.errors import ProbeError
from sinkscope.kernels.attention import (
    arguments,
    group_mass,
    is_causal,
    learned_sink,
    one_head,
    pick,
    spans,
    unpack,
    weigh_queries,
)
from sinkscope.probes.attention import chosen_rows, groups_by_layer, refuse_flash
from sinkscope.probes.per_layer import AttentionProbe
from sinkscope.results import Result
from sinkscope.sites import Tower
from sinkscope.tokens import Selection


def entropy(calls, state, groups=None, rows=None, layout=None):  # type: ignore[no-untyped-def]
    """Entropy of attention rows in nats, per head and under uniform attention.

    ``groups`` is ``[batch key group]`` one-hot, or None for single keys; for the others see `group_mass`.
    Gives ``{"entropy": [batch head query], "null": [batch query]}``.
    """
    if groups is not None:
        mass = group_mass(calls, state, groups, rows, True, True, layout)
        return {"entropy": of_shares(mass["mass"]), "null": of_shares(mass["null"])}
    own = rows if layout is None else None  # in a packed tower rows are chosen at the end
    found, nulls = by_key(calls, own, False), by_key_null(calls, state, own)
    if layout is not None:
        found = pick(unpack(found, layout, 2), rows, 2)
        nulls = pick(unpack(nulls, layout, 1), rows, 1)
    return {"entropy": found, "null": nulls}


def of_shares(shares):  # type: ignore[no-untyped-def]
    """Entropy of shares ``[... part]`` and of what they leave to 1."""
    rest = (1 - shares.sum(dim=-1, keepdim=True)).clamp(min=0)
    every = torch.cat([shares.clamp(min=0), rest], dim=-1)
    return -torch.xlogy(every, every).sum(dim=-1)


def by_key(calls, rows, null):  # type: ignore[no-untyped-def]
    """Entropy over single keys ``[batch head row]``, from the weights of sixteen queries at a time."""
    located, first = spans(calls), arguments(calls[0])[0]["query"]
    n_query = located[-1][1]
    places = torch.arange(n_query, device=first.device)
    if rows is None or n_query == 1:
        rows = places[None].expand(first.shape[0], -1)
    out = []
    for part in rows.split(16, dim=1):
        onehot, total = (part[..., None] == places).float(), torch.zeros((), device=first.device)
        for call, (q_at, q_to, _, _) in zip(calls, located, strict=True):
            weights = weigh_queries(call, onehot[..., q_at:q_to], null=null).clamp(min=0)
            named, rest = arguments(call)
            if hasattr(named["module"], "sinks") or rest.get("s_aux") is not None:
                inside = onehot[:, None, :, q_at:q_to].sum(dim=-1, keepdim=True)
                left = (inside - weights.sum(dim=-1, keepdim=True)).clamp(min=0)
                weights = torch.cat([weights, left], dim=-1)
            total = total - torch.xlogy(weights, weights).sum(dim=-1)
        out.append(total.masked_fill((part < 0)[:, None], float("nan")))
    return torch.cat(out, dim=2)


def by_key_null(calls, state, rows):  # type: ignore[no-untyped-def]
    """The same under uniform attention ``[batch row]``, once per kind of mask."""
    masks, seen = [], []
    for call in calls:
        named, rest = arguments(call)
        own = id(named["module"]) if learned_sink(call) else None
        masks.append(named["attention_mask"])
        seen.append((id(masks[-1]), rest.get("sliding_window"), is_causal(named, rest), own))
    mark = ("entropy", id(rows), *seen, *spans(calls))
    if mark not in state:  # masks and rows are kept so that their ids cannot be given to others
        state[mark] = by_key([one_head(call) for call in calls], rows, True)[:, 0], masks, rows
    return state[mark][0]


@dataclass(frozen=True, eq=False)
class EntropyResult(Result, columns={"entropy": "entropy", "null": "null"}):
    """Entropy of attention rows in nats, from 0 (one group or key) to the log of their number.

    ``null`` is that of uniform attention under the model's own mask; NaN at padding.
    """

    entropy: Float[Tensor, "batch layer head query"]
    null: Float[Tensor, "batch layer query"]
    layers: tuple[int, ...]
    queries: Int[Tensor, "batch query"]


@dataclass(frozen=True, eq=False)
class AttentionEntropy(
    AttentionProbe, kernel=entropy, result=EntropyResult, needs="gradients", over="queries"
):
    """Shannon entropy of attention by head and query, in nats. Exact, in fp32.

    ``-sum_g p_g log p_g`` over the masses of token groups (see `AttentionMass`) and of the rest, that
    is what is in no group, what was generated, and what a learned sink takes: one attention call per
    layer. Without groups over single keys: one call and its gradient per layer and 16 queries, or
    fewer where many heads share a key, and never an N x N matrix.

    ``groups`` is name -> selection, and no token may be in two of them; ``queries`` is a selection, or None
    for all. At a decode step the one query is used.
    """

    groups: Mapping[str, Selection] | None = None
    layers: Any = None
    queries: Selection | None = None
    tower: Tower = "language"

    def _parameters(self, context: Context) -> dict[str, Any]:
        refuse_flash(context, self.tower, "AttentionEntropy")
        rows = chosen_rows(self, context)
        if self.groups is None:
            return {"rows": rows}
        names, onehot = context.groups(self.tower, self.groups)
        twice = (onehot.sum(dim=-1, keepdim=True) > 1) & (onehot > 0)
        if twice.any():
            both = [name for name, one in zip(names, twice.unbind(-1), strict=True) if one.any()]
            raise ProbeError(
                f"Got the groups {both}, which share tokens; expected every token in one group at most. "
                "Write groups of a partition, such as trace.groups."
            )
        return {"groups": groups_by_layer(context, self.tower, self.groups), "rows": rows}

"""AttentionEntropy: how spread out attention is, over token groups or over single keys."""

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
from sinkscope.probes.per_layer import AttentionProbe
from sinkscope.results import Result
from sinkscope.sites import Tower
from sinkscope.tokens import Selection


def entropy(calls, state, groups=None, rows=None, layout=None):  # type: ignore[no-untyped-def]
    """Entropy of attention rows in nats: ``{"entropy": [batch head query], "null": [batch query]}``.
    ``groups`` is ``[batch key group]`` one-hot, or None for single keys; for the others see `group_mass`."""
    if groups is not None:
        mass = group_mass(calls, state, groups, rows, True, True, layout)
        return {"entropy": of_shares(mass["mass"]), "null": of_shares(mass["null"])}
    own = rows if layout is None else None  # in a packed tower rows are chosen at the end
    masks, seen = [], []
    for call in calls:
        named, rest = arguments(call)
        module = id(named["module"]) if learned_sink(call) else None
        masks.append(named["attention_mask"])
        seen.append((id(masks[-1]), rest.get("sliding_window"), is_causal(named, rest), module))
    mark = ("entropy", id(own), *seen, *spans(calls))
    if mark not in state:  # masks and rows are kept so that their ids cannot be given to others
        state[mark] = by_key([one_head(call) for call in calls], own, True)[:, 0], masks, own
    found, nulls = by_key(calls, own, False), state[mark][0]
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
    located, first, out = spans(calls), arguments(calls[0])[0]["query"], []
    n_query = located[-1][1]
    places = torch.arange(n_query, device=first.device)
    if rows is None or n_query == 1:
        rows = places[None].expand(first.shape[0], -1)
    for part in rows.split(16, dim=1):
        onehot, total = (part[..., None] == places).float(), torch.zeros((), device=first.device)
        for call, (q_at, q_to, _, _) in zip(calls, located, strict=True):
            weights = weigh_queries(call, onehot[..., q_at:q_to], null=null).clamp(min=0)
            if learned_sink(call):
                inside = onehot[:, None, :, q_at:q_to].sum(dim=-1, keepdim=True)
                left = (inside - weights.sum(dim=-1, keepdim=True)).clamp(min=0)
                weights = torch.cat([weights, left], dim=-1)
            total = total - torch.xlogy(weights, weights).sum(dim=-1)
        out.append(total.masked_fill((part < 0)[:, None], float("nan")))
    return torch.cat(out, dim=2)


@dataclass(frozen=True, eq=False)
class EntropyResult(Result, columns={"entropy": "entropy", "null": "null"}):
    """Entropy of attention rows in nats, from 0 (one group or key) to the log of their number. ``null`` is
    that of uniform attention under the model's own mask; NaN at padding."""

    entropy: Float[Tensor, "batch layer head query"]
    null: Float[Tensor, "batch layer query"]
    layers: tuple[int, ...]
    queries: Int[Tensor, "batch query"]


@dataclass(frozen=True, eq=False)
class AttentionEntropy(
    AttentionProbe, kernel=entropy, result=EntropyResult, needs="gradients", over="queries"
):
    """Shannon entropy of attention by head and query, in nats. Exact, in fp32.

    ``-sum_g p_g log p_g`` over the masses of token groups and of the rest, that is what is in no group, what
    was generated, and what a learned sink takes: one attention call per layer. Without groups over single
    keys: one call and its gradient per layer and 16 queries, or fewer where many heads share a key, and never
    an N x N matrix. Arguments are as for `AttentionMass`, but no token may be in two groups.
    """

    groups: Mapping[str, Selection] | None = None
    layers: Any = None
    queries: Selection | None = None
    tower: Tower = "language"

    def _parameters(self, context: Context) -> dict[str, Any]:
        self._refuse_flash(context)
        rows = self._rows(context, self.queries)
        if self.groups is None:
            return {"rows": rows}
        masks = context.groups(self.tower, self.groups)
        twice = (masks & (masks.sum(dim=-1, keepdim=True) > 1)).unbind(-1)
        both = [name for name, mask in zip(self.groups, twice, strict=True) if mask.any()]
        if both:
            raise ProbeError(
                f"Got the groups {both}, which share tokens; expected every token in one group at most. "
                "Write groups of a partition, such as trace.groups."
            )
        return {"groups": self._groups(context, self.groups), "rows": rows}

"""Attention that every key receives: from all queries, and from other tokens only.

The weight of a token on itself, ``A_ii``, is taken from the model's own call on one key more: a copy
of every query's own key. In two extra head dimensions the query carries ``q_i k_i`` and the new key a
one, so its logit is that of the token's own key. ::

    causal, no mask   new key first:  query i sees  new k_0 ... k_{i-1}   so the new key takes A_ii
    else              new key last:   query i sees  k_0 ... k_{n-1} new   so it takes p = A_ii / (1 + A_ii)
"""

import torch

from sinkscope.kernels.attention import (
    EXTRA,
    arguments,
    ask,
    attending,
    is_causal,
    shared_null,
    spans,
    unpack,
    weigh_queries,
    weigh_values,
    weights_on,
)
from sinkscope.kernels.logsumexp import column_sums as fused_sums
from sinkscope.kernels.logsumexp import fused, weights_on_key
from sinkscope.kernels.logsumexp import own_weights as fused_weights

HALF = 0.5  # the weight with which a query routes to a key (Fesser et al., 2606.08105)


def received(calls, state, live, layout=None, null=True, others=False, events=False):
    """Mean attention each key receives from the live queries that can see it, and its null.

    ``r_k = sum_i A_ik / #{i live : i sees k}`` (Gu et al., 2410.10781, section 3), per head; NaN for
    keys that no query in ``live`` ``[batch query]`` sees:
    ``{"received": [batch head key], "null": [batch key]}``. With ``others`` also ``"others"``,
    ``"others_null"``, the same without ``i = k``, and how many others see the key, ``"seeing"``
    ``[batch key]``; with ``events`` also what `dominant` gives.
    """
    windows, columns, told = [], [], []
    for call, (q_at, q_to, k_at, k_to) in zip(calls, spans(calls), strict=True):
        rows = live[:, q_at:q_to] if len(calls) > 1 else live[:, -(q_to - q_at) :]
        of, mark = fused(call), ("received", id(live), others, null, k_at, k_to)
        flat = shared_null(state, call, mark, under_uniform, rows, others, null)
        total, own = column_sums(call, rows, others, state, of=of, count=flat["count"])
        one = {"received": total / flat["count"][:, None]}
        columns.append((total, flat["count"][:, None]))
        told.append(of)
        if others:
            one["others"] = mean(total - own, flat["seeing"][:, None])
        one |= {name: value for name, value in flat.items() if name != "count"}
        windows.append(one)
    out = windows[0]
    if len(windows) > 1:
        out = {name: torch.cat([one[name] for one in windows], dim=-1) for name in out}
    out = {name: unpack(x, layout, x.ndim - 1) for name, x in out.items()}
    return {**out, **dominant(calls, columns, live, layout, told[0])} if events else out


def under_uniform(call, rows, others, null):
    """What calls share whose queries see the same keys: how many see each key, and the nulls of `received`."""
    count = visible_queries(call, rows)
    found = {"count": count}
    if others:
        # Which keys are seen by their own token's live query.
        own_row = torch.nn.functional.pad(rows.float(), (count.shape[1] - rows.shape[1], 0))
        found["seeing"] = count - own_row
    if null:
        total, own = column_sums(call, rows, others, {}, True, count=count)
        found["null"] = total[:, 0] / count
        if others:
            found["others_null"] = mean(total[:, 0] - own[:, 0], found["seeing"])
    return found


def dominant(calls, columns, live, layout=None, of=None):
    """The key that takes most attention in every head, and what share of its queries route to it.

    ``s = argmax_j sum_i A_ij`` over live queries; over those that see ``s``, ``"sink_mass"`` is the mean of
    ``A_is`` and ``"routed"`` the share with ``A_is >= 0.5`` (Fesser et al. 2606.08105); with ``"sink"``
    all ``[batch head]``. ``columns`` are sums and counts of queries, ``[batch head|1 key]``, by window;
    ``of`` is what a fused kernel knows of a call that has no other beside it, or None.
    """
    total, count = (unpack(torch.cat(x, dim=-1), layout, 2) for x in zip(*columns, strict=True))
    most, sink = total.nan_to_num(-1.0).max(dim=-1)
    seeing = count.expand_as(total).gather(-1, sink[..., None])[..., 0].clamp(min=1)
    if of is not None and len(calls) == 1 and layout is None:
        own = weights_on_key(of, sink)
        routed = ((own >= HALF) & live[:, None, -own.shape[2] :]).sum(2) / seeing
        return {"sink": sink, "sink_mass": most / seeing, "routed": routed}
    # In a packed tower every head of every image asks for a column of one sequence.
    at = sink if layout is None else layout.gather(1, sink).flatten()[None]
    routed = torch.zeros(at.shape, device=at.device)
    for call, (q_at, q_to, k_at, k_to) in zip(calls, spans(calls), strict=True):
        keys = torch.arange(k_at, k_to, device=at.device)[:, None]
        weights = weigh_values(call, (at[:, None] == keys).float(), float32=True)
        own = weights.unflatten(-1, (-1, sink.shape[1])).diagonal(dim1=1, dim2=4).flatten(2)
        rows = live[:, q_at:q_to] if len(calls) > 1 else live[:, -own.shape[1] :]
        routed += ((own >= HALF) & rows[..., None]).sum(1)
    routed = routed.view(sink.shape) / seeing
    return {"sink": sink, "sink_mass": most / seeing, "routed": routed}


def visible_queries(call, live):
    """How many live queries ``[batch query]`` can see each key, ``[batch key]`` in fp32."""
    named, rest = arguments(call)
    n_query, n_key = named["query"].shape[2], named["key"].shape[2]
    mask, weights = named["attention_mask"], live.float()
    if mask is not None and mask.ndim == 4:
        seen = mask[:, 0, :, :n_key]
        seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
        return torch.einsum("bq,bqk->bk", weights, seen.float())
    if not is_causal(named, rest) or n_query == 1:
        return weights.sum(1, keepdim=True).expand(-1, n_key)
    from_here = weights.flip(1).cumsum(1).flip(1)
    window = rest.get("sliding_window")
    if window is not None and window < n_query:
        from_here = from_here - torch.nn.functional.pad(from_here[:, window:], (0, window))
    return from_here


def mean(total, count):
    """A mean; NaN where nothing was counted."""
    return (total / count.clamp(min=1)).clamp(min=0).masked_fill(count == 0, float("nan"))


def column_sums(call, rows, others, state, null=False, of=None, count=None):
    """Sums of attention over live queries, ``[batch head key]``, and each token's own share of it; ``of`` is
    what a fused kernel knows of the call, and ``count`` ``[batch key]`` how many queries see each key."""
    of = fused(call, null) if of is None else of
    if of is not None:
        total = fused_sums(of, rows, state)
        if of.mask is not None:
            total = total.masked_fill(count[:, None] == 0, 0.0)
        own = fused_weights(of).masked_fill(~rows[:, None], 0.0) if others else None
        return total, own if own is None else pad_keys(own, total)
    total = weigh_queries(call, rows[:, None], null=null)[:, :, 0]
    if not others:
        return total, None
    own = own_weights(call, null=null).masked_fill(~rows[:, None], 0.0)
    return total, pad_keys(own, total)


def pad_keys(own, total):
    """Values of the last keys, 0 at those before."""
    return torch.nn.functional.pad(own, (total.shape[-1] - own.shape[-1], 0))


def own_weights(call, null=False):
    """The weight of every query on its own token's key, ``A_ii``, ``[batch head query]`` in fp32."""
    call = attending(call, null)
    named, rest = arguments(call)
    query, key = named["query"].detach(), named["key"].detach()
    query = torch.zeros_like(query) if null else query
    mask, window = named["attention_mask"], rest.get("sliding_window")
    plain = not hasattr(call[0], "recipe") and query.shape[2] == key.shape[2]
    implied = mask is None and window is not None and window < query.shape[2]
    shaped = mask is None or (mask.ndim == 4 and mask.shape[2] == query.shape[2])
    if query.shape[2] == 1 or not plain or not shaped or implied:
        # From the weights on a few keys at a time, the last of which belong to the call's queries.
        call = (call[0], (), {**rest, **named, "query": query})
        step, first, out = named["value"].shape[-1], key.shape[2] - query.shape[2], []
        for at in range(0, query.shape[2], step):
            answer = weights_on(call, first + at, first + at + step, float32=True)
            out.append(answer[:, :, at : at + step].diagonal(dim1=2, dim2=3))
        return torch.cat(out, dim=-1)
    # From one call with a copy of every token's own key.
    width, first = query.shape[-1], mask is None and is_causal(named, rest)
    key, share = key.float(), query.shape[1] // key.shape[1]
    own = (query * key.repeat_interleave(share, dim=1)).sum(dim=-1, keepdim=True)
    query = torch.cat([query, torch.nn.functional.pad(own, (0, EXTRA - 1))], dim=-1)
    copy = torch.zeros(*key.shape[:2], 1, width + EXTRA, device=key.device)
    copy[..., width] = 1.0
    key = torch.nn.functional.pad(key, (0, EXTRA))
    key = torch.cat([copy, key] if first else [key, copy], dim=2)
    value = torch.zeros_like(key)
    value[:, :, 0 if first else -1, 0] = 1.0
    if mask is not None:
        mask = mask[..., : key.shape[2] - 1]
        mask = torch.cat([mask, mask.diagonal(dim1=2, dim2=3)[..., None]], dim=-1)
    scaling = width**-0.5 if rest.get("scaling") is None else rest["scaling"]
    wider = {**named, **rest, "attention_mask": mask, "scaling": scaling}
    taken = ask((call[0], (), wider), query, key, value, float32=True)[..., 0].transpose(1, 2)
    return taken if first else taken / (1 - taken)

"""Edits of attention weights, exact under the model's kernel, mask, window and scaling.

Parameters that all of them share:

* ``call``: the attention call; ``state``: the run's scratch space; ``span``: the part of a packed
  sequence that the call covers, or None;
* ``live``, ``rows``: ``[batch query]`` bool, the live and the selected queries (None for all);
* ``heads``: selected query heads, or None for all;
* ``measure``: whether to measure the attention on the keys before and after.

All return the edited call and its effect.
"""

from __future__ import annotations

import math

import torch

from sinkscope.kernels.attention import arguments, weigh_values
from sinkscope.kernels.edited_call import (
    column,
    effect_of,
    evened,
    gate_of,
    head_mask,
    here,
    knows_float32,
    learned_sink,
    prepared,
    with_change,
)

MASKED = -1.0e4

WIDEST = 256

EXTRA = 8


def scale_keys(keys, factor):
    """``q (s k)``: multiplies the *logits* of the chosen keys (LSG, Choi et al. 2604.03316).

    A factor below 1 raises the weight of a key whose logit is negative, and 0 gives logit 0.

    Args:
        keys: ``[batch key]`` bool.
        factor: A number, or ``[batch key]``.
    """

    def change(named, rest):
        scale = torch.where(keys, torch.as_tensor(factor, device=keys.device), 1.0)
        scaled = named["key"] * scale[:, None, :, None]
        return {**named, "key": scaled.to(named["key"].dtype)}, rest

    return change


def bias_keys(bias):
    """Logits plus ``bias`` ``[batch key]``: a mask if very negative, a factor ``s`` if ``log s``.

    The bias rides in extra head dimensions, so the call stays on its fused kernel. Two of them hold
    a high and a low part, which keeps bf16 exact to 16 bits. Under a soft-cap or beyond 256
    dimensions it becomes an explicit mask instead, whose bias is rounded to the mask's dtype.
    """

    def change(named, rest):
        width = named["query"].shape[-1]
        if rest.get("softcap") is not None or width + EXTRA > WIDEST:
            return {**named, "attention_mask": masked(named, rest, bias)}, rest
        scaling = rest.get("scaling")
        scaling = width**-0.5 if scaling is None else scaling
        # A power of two, so that only the keys' side is rounded.
        size = 2.0 ** round(math.log2(max(1.0, float(bias.abs().max()) / scaling)) / 2)
        query, key, value = named["query"], named["key"], named["value"]
        wanted = bias / (size * scaling)
        high = wanted.to(key.dtype)
        low = (wanted - high.float()).to(key.dtype)
        extra_k = torch.zeros(*key.shape[:3], EXTRA, dtype=key.dtype, device=key.device)
        extra_k[..., 0] = high[:, None]
        extra_k[..., 1] = low[:, None]
        extra_q = torch.zeros(*query.shape[:3], EXTRA, dtype=query.dtype, device=query.device)
        extra_q[..., :2] = size
        wider = {
            **named,
            "query": torch.cat([query, extra_q], dim=-1),
            "key": torch.cat([key, extra_k], dim=-1),
            "value": torch.cat([value, torch.zeros_like(extra_k).to(value.dtype)], dim=-1),
        }
        return wider, {**rest, "scaling": scaling}

    return change


def masked(named, rest, bias):
    """The model's own mask, made explicit where it is implied, plus a bias on the keys."""
    query, key, mask = named["query"], named["key"], named["attention_mask"]
    n_query, n_key = query.shape[2], key.shape[2]
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        causal = rest.get("is_causal")
        causal = getattr(named["module"], "is_causal", True) if causal is None else causal
        allowed = torch.ones(n_query, n_key, dtype=torch.bool, device=query.device)
        if causal and n_query > 1:
            allowed = allowed.tril()
            window = rest.get("sliding_window")
            if window is not None:
                allowed = allowed & ~allowed.tril(-window)
        mask = allowed[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(
            ~mask, lowest
        )
    return (mask[..., :n_key] + bias[:, None, None].to(mask.dtype)).clamp(min=lowest)


def scale_weights(keys, factor):
    """``A v + (s - 1) A (1_g v)``: weights of the chosen keys times ``s``, not renormalised."""

    def change(ask, value, output):
        return output.float() + (factor - 1) * ask(value * column(keys, value)).float()

    return change


def move_weights(source, target, recycle, budget, among):
    """Take a share of the weight on ``source`` and give it to ``target`` in proportion.

    ``A v - r A 1_s v + r m_s A_t v``, where ``A_t`` is attention among the target keys alone. It is
    asked with all others masked: the quotient ``A 1_t v / A 1_t`` is 0 / 0 beside a real sink.

    Args:
        source: ``[batch key]`` bool.
        target: ``[batch key]`` bool, disjoint from the source.
        recycle: Share ``r`` taken from the source, 0 to 1.
        budget: ``[batch query head 1]``: ``r m_s`` over what ``A_t`` sums to.
        among: The change of logits that leaves the target, or None to take what earlier edits of
            weights have left of it.
    """

    def change(ask, value, output):
        taken = ask(value * column(source, value)).float()
        given = ask(value * column(target, value), among).float()
        return output.float() - recycle * taken + budget * given

    return change


def edit_keys(
    call, state, span, keys, live, how, factor, rows=None, heads=None, measure=True, factors=None
):
    """Scale or bias the logits of chosen keys.

    Args:
        call: See above, as are those that say no more.
        state: See above.
        span: See above.
        keys: ``[batch key]`` bool.
        live: See above.
        how: ``"scale"`` (logit times factor), ``"weight"`` (weight times factor, renormalised),
            ``"weight without renormalising"`` or ``"mask"``.
        factor: The factor.
        rows: See above.
        heads: See above.
        measure: See above.
        factors: ``[batch key]`` instead of one factor, for ``"scale"``.
    """
    keys, live, rows = prepared(call, state, span, keys, live, rows)
    masks = how == "mask" or (how == "weight" and factor == 0)
    gate, empty = gate_of(call, keys, live, rows, heads, masks)
    if how == "scale":
        if factors is not None:
            factor = here(factors, span, keys.shape[1], state)
        after = with_change(call, "keys", gate, scale_keys(keys, factor))
    elif how == "weight without renormalising":
        after = with_change(call, "weights", gate, scale_weights(keys, factor))
    else:
        bias = torch.zeros(keys.shape, device=keys.device)
        bias = bias.masked_fill(keys, MASKED if masks else math.log(factor))
        after = with_change(call, "logits", gate, bias_keys(bias))
    return after, effect_of(call, after, gate, keys, empty, measure)


def edit_mass(
    call,
    state,
    span,
    source,
    target,
    live,
    recycle,
    rows=None,
    heads=None,
    measure=True,
    visual=None,
    visual_sinks=None,
    least_visual=None,
    most_sink_share=None,
):
    """Move attention from source keys to target keys (VAR, Kang et al. 2503.03321).

    Args:
        call: See above, as are those that say no more.
        state: See above.
        span: See above.
        source: ``[batch key]`` bool.
        target: ``[batch key]`` bool.
        live: See above.
        recycle: Share of the source's weight to move, 0 to 1.
        rows: See above.
        heads: See above.
        measure: See above.
        visual: ``[batch key]`` bool, for the image-centric rule, or None for no rule.
        visual_sinks: ``[batch key]`` bool.
        least_visual: Rows and heads with less mass on the image are left alone.
        most_sink_share: Those where visual sinks hold more of it are left alone.
    """
    keys, live, rows = prepared(call, state, span, source, live, rows)
    n_key = keys.shape[1]
    target = here(target, span, n_key, state)
    gate, empty = gate_of(call, keys, live, rows, heads, False)
    columns = [keys, target]
    if visual is not None:
        columns += [here(visual, span, n_key, state), here(visual_sinks, span, n_key, state)]
    # Flash kernels know no fp32; the others get it, because these masses become coefficients.
    exact = knows_float32(call)
    mass = weigh_values(call, torch.stack(columns, dim=-1).float(), float32=exact).float()
    among, whole, wanted = of_target(call, target, live, mass, exact)
    budget = (recycle * mass[..., 0] / whole).transpose(1, 2)[..., None]
    gate = gate & wanted
    if visual is not None:
        gate = gate & image_centric(mass, columns[2], least_visual, most_sink_share)
    after = with_change(call, "weights", gate, move_weights(keys, target, recycle, budget, among))
    return after, effect_of(call, after, gate, keys, empty, measure)


def image_centric(mass, visual, least_visual, most_sink_share):
    """Rows and heads that look at the image, and not mostly at its sinks, ``[batch query head 1]``.

    Args:
        mass: ``[batch head query 4]``: on source, target, image and visual sinks.
        visual: ``[batch key]`` bool.
        least_visual: See `edit_mass`.
        most_sink_share: See `edit_mass`.
    """
    # The released code adds 1e-6 to the weight of every image token.
    share = mass[..., 3] / (mass[..., 2] + 1e-6 * visual.sum(-1)[:, None, None])
    centric = (mass[..., 2] >= least_visual) & (share <= most_sink_share)
    return centric.transpose(1, 2)[..., None]


def of_target(call, target, live, mass, exact):
    """How to ask for attention among the target keys, and in which rows there is any.

    Args:
        call: The call.
        target: ``[batch key]`` bool.
        live: ``[batch query]`` bool.
        mass: ``[batch head query 2 or more]``, masses on source and target.
        exact: Whether the kernel knows fp32.

    Returns:
        ``(among, whole, some)``: the change of logits that leaves the target alone (None beside
        earlier edits of weights, which would not show in it), what the answer's weights sum to
        ``[batch head query]``, and the rows with any ``[batch query head 1]``.
    """
    tiny = torch.finfo(arguments(call)[0]["value"].dtype).smallest_normal
    if getattr(call[0], "recipe", {}).get("weights"):
        whole = mass[..., 1]
        return None, whole.clamp(min=1e-30), (whole > max(tiny, 1e-30)).transpose(1, 2)[..., None]
    among = bias_keys(torch.zeros(target.shape, device=target.device).masked_fill(~target, MASKED))
    some, _ = gate_of(call, target, live, None, None, False)
    whole = torch.ones_like(mass[..., 1])
    if learned_sink(call):
        # The sink's logit competes with the target's here too, and takes a share that is no key's.
        alone = with_change(call, "logits", some, among)
        whole = weigh_values(alone, target[..., None].float(), float32=exact)[..., 0].float()
        some = some & (whole > max(tiny, 1e-30)).transpose(1, 2)[..., None]
    return among, whole.clamp(min=1e-30), some


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

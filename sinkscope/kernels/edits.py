"""Edits of the model's own attention call, exact under its kernel, mask, window and scaling.

An edit wraps the attention *function*: the model then calls the wrapped one, and so do the probes of
the same pass, which therefore measure the edited attention. Every wrapper ends in one
``where(gate, edited, plain)``, so rows and heads that were not selected stay bitwise what they were,
and in one forward pass nothing is written in place.

A wrapper carries ``plain``, the model's own function (nulls are asked of it), and ``place``, the part
of the sequence that the next call covers: a packed tower calls once per window.

Parameters that all wrappers share, prepared once per site by `gate_of`:

* ``keys`` ``[batch key]`` bool: the edited keys;
* ``gate`` ``[batch query head 1]`` bool: rows and heads that are edited.
"""

from __future__ import annotations

import math

import torch

from sinkscope.kernels.attention import NAMES, arguments, ask, fit_keys, weigh_values

MASKED = -1.0e4


def named_call(function, named, rest):
    """A call of the transformers attention interface from named arguments."""
    return function(*[named[name] for name in NAMES], **rest)


def plain_of(function):
    """The model's own function behind any number of wrappers."""
    return getattr(function, "plain", function)


def keys_seen(call, keys, live):
    """Which live rows see an edited key, and which see nothing else.

    The uniform attention of the plain call (``q = 0``) gives the edited share of the visible keys.

    Args:
        call: The plain call.
        keys: ``[batch key]`` bool.
        live: ``[batch query]`` bool.

    Returns:
        ``(sees, only)``, bool ``[batch query]``.
    """
    plain = (plain_of(call[0]), *call[1:])
    share = weigh_values(plain, keys[..., None].float(), null=True, float32=True)[:, 0, :, 0]
    return (share > 0) & live, (share > 1 - 1e-5) & live


def head_mask(call, heads, like):
    """Selected heads as ``[1 1 head 1]`` bool, all if ``heads`` is None."""
    count = arguments(call)[0]["query"].shape[1]
    chosen = torch.ones(count, dtype=torch.bool, device=like.device)
    if heads is not None:
        chosen = torch.zeros_like(chosen)
        chosen[heads] = True
    return chosen[None, None, :, None]


def wrap(function, change, gate):
    """A function that answers ``change`` where ``gate`` holds and the inner one elsewhere.

    Args:
        function: The inner function, plain or wrapped.
        change: ``change(function, named, rest) -> edited output``.
        gate: ``[batch query head 1]`` bool.

    Returns:
        The wrapped function. It returns no attention weights, because the plain ones would lie.
    """

    def edited(*args, **kwargs):
        named, rest = arguments((None, args, kwargs))
        before = named_call(function, named, rest)[0]
        after = change(function, named, rest)
        return torch.where(gate, after.to(before.dtype), before), None

    edited.plain = plain_of(function)
    return edited


def scale_keys(call, keys, factor):
    """``q (s k)``: multiplies the *logits* of the chosen keys (LSG, Choi et al. 2604.03316).

    A factor below 1 raises the weight of a key whose logit is negative, and 0 gives logit 0.

    Args:
        call: The call; only its shapes are used.
        keys: ``[batch key]`` bool.
        factor: A number, or ``[batch key]``.
    """

    def change(function, named, rest):
        scale = torch.where(keys, torch.as_tensor(factor, device=keys.device), 1.0)
        scaled = named["key"] * scale[:, None, :, None].to(named["key"].dtype)
        return named_call(function, {**named, "key": scaled}, rest)[0]

    return change


def bias_keys(call, bias):
    """Logits plus ``bias`` ``[batch key]``: a mask if very negative, a factor ``s`` if ``log s``.

    The bias rides in extra head dimensions, so the call stays on its fused kernel. Two of them hold
    a high and a low part, which keeps bf16 exact to 16 bits. Under a soft-cap or beyond 256
    dimensions it becomes an explicit mask instead.
    """

    def change(function, named, rest):
        width = named["query"].shape[-1]
        if rest.get("softcap") is not None or width + 8 > 256:
            return named_call(
                function, {**named, "attention_mask": masked(named, rest, bias)}, rest
            )[0]
        scaling = rest.get("scaling")
        scaling = width**-0.5 if scaling is None else scaling
        # A power of two, so that only the keys' side is rounded.
        size = 2.0 ** round(math.log2(max(1.0, float(bias.abs().max()) / scaling)) / 2)
        query, key, value = named["query"], named["key"], named["value"]
        wanted = bias / (size * scaling)
        high = wanted.to(key.dtype)
        low = (wanted - high.float()).to(key.dtype)
        extra_k = torch.zeros(*key.shape[:3], 8, dtype=key.dtype, device=key.device)
        extra_k[..., 0] = high[:, None]
        extra_k[..., 1] = low[:, None]
        extra_q = torch.zeros(*query.shape[:3], 8, dtype=query.dtype, device=query.device)
        extra_q[..., :2] = size
        wider = {
            **named,
            "query": torch.cat([query, extra_q], dim=-1),
            "key": torch.cat([key, extra_k], dim=-1),
            "value": torch.cat([value, torch.zeros_like(extra_k).to(value.dtype)], dim=-1),
        }
        out = named_call(function, wider, {**rest, "scaling": scaling})[0]
        return out[..., : value.shape[-1]]

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
            allowed = allowed.tril(n_key - n_query)
            window = rest.get("sliding_window")
            if window is not None:
                allowed = allowed & ~allowed.tril(n_key - n_query - window)
        mask = allowed[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(
            ~mask, lowest
        )
    return (mask[..., :n_key] + bias[:, None, None].to(mask.dtype)).clamp(min=lowest)


def scale_outputs(call, keys, factor):
    """``A v + (s - 1) A (1_g v)``: weights of the chosen keys times ``s``, not renormalised."""

    def change(function, named, rest):
        chosen = named["value"] * keys[:, None, :, None].to(named["value"].dtype)
        plain = named_call(function, named, rest)[0]
        part = named_call(function, {**named, "value": chosen}, rest)[0]
        return plain + (factor - 1) * part

    return change


def redistribute(call, source, target, recycle, mass):
    """Take a share of the weight on ``source`` and give it to ``target`` in proportion.

    ``out - r A 1_s v + (r m_s / m_t) A 1_t v`` with the masses ``m`` of the row and head.

    Args:
        call: The call; only its shapes are used.
        source: ``[batch key]`` bool.
        target: ``[batch key]`` bool, disjoint from the source.
        recycle: Share ``r`` taken from the source, 0 to 1.
        mass: ``[batch head query 2]`` masses on source and target.
    """
    ratio = recycle * mass[..., 0] / mass[..., 1].clamp(min=1e-30)
    ratio = ratio.transpose(1, 2)[..., None]

    def change(function, named, rest):
        value = named["value"]
        plain = named_call(function, named, rest)[0]
        taken = named_call(function, {**named, "value": value * column(source, value)}, rest)[0]
        given = named_call(function, {**named, "value": value * column(target, value)}, rest)[0]
        return plain.float() - recycle * taken.float() + ratio * given.float()

    return change


def column(keys, value):
    """``[batch key]`` as a factor for values ``[batch kv_head key d_head]``."""
    return keys[:, None, :, None].to(value.dtype)


def replace_values(call, keys, replacement):
    """Other values at the chosen keys, wherever the model's own values are attended.

    Probes substitute values of their own to ask for masses; those are left alone, because the
    attention weights do not change.

    Args:
        call: The call whose values are the model's own.
        keys: ``[batch key]`` bool.
        replacement: Broadcastable to ``[batch kv_head key d_head]``.
    """
    own = arguments(call)[0]["value"]

    def change(function, named, rest):
        value = named["value"]
        if value is own:
            value = torch.where(keys[:, None, :, None], replacement.to(value), value)
        return named_call(function, {**named, "value": value}, rest)[0]

    return change


def here(x, span, n_keys, state):
    """The part of ``[batch key]`` that a call covers, with keys generated since the prompt unset.

    A sliding cache holds the last keys only, so the last ones are taken.
    """
    if x is None:
        return None
    if span is not None:
        return x[:, span[0] : span[1]]
    return fit_keys(x[..., None], n_keys, state.get("step", 0))[..., 0]


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
    sees, only = keys_seen(call, keys, live)
    chosen = sees if rows is None else sees & rows
    empty = chosen & only if spare_empty else torch.zeros_like(chosen)
    gate = (chosen & ~empty)[:, :, None, None] & head_mask(call, heads, chosen)
    return gate, empty


def effect_of(before, after, gate, keys, empty, measure):
    """What an edit did: rows touched, rows left empty, attention on the keys before and after.

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


def finish(call, change, keys, gate, empty, measure):
    """The edited call and what the edit did."""
    after = (wrap(call[0], change, gate), *call[1:])
    return after, effect_of(call, after, gate, keys, empty, measure)


def prepared(call, state, span, keys, live, rows):
    """Masks of the part of the sequence that a call covers."""
    named, _ = arguments(call)
    n_query, n_key = named["query"].shape[2], named["key"].shape[2]
    if span is not None:
        live, rows = (
            live[:, span[0] : span[1]],
            None if rows is None else rows[:, span[0] : span[1]],
        )
    elif live.shape[1] != n_query:
        live = torch.ones(live.shape[0], n_query, dtype=torch.bool, device=live.device)
    return here(keys, span, n_key, state), live, rows


def edit_keys(
    call, state, span, keys, live, how, factor, rows=None, heads=None, measure=True, factors=None
):
    """Scale or bias the logits of chosen keys.

    Args:
        call: The attention call.
        state: The run's scratch space.
        span: Part of a packed sequence that the call covers, or None.
        keys: ``[batch key]`` bool.
        live: ``[batch query]`` bool.
        how: ``"scale"`` (logit times factor), ``"weight"`` (weight times factor, renormalised),
            ``"weight without renormalising"`` or ``"mask"``.
        factor: The factor.
        rows: ``[batch query]`` bool or None.
        heads: Query heads or None.
        measure: Whether to measure the attention before and after.
        factors: ``[batch key]`` instead of one factor, for ``"scale"``.

    Returns:
        The edited call and its effect.
    """
    keys, live, rows = prepared(call, state, span, keys, live, rows)
    masks = how == "mask" or (how == "weight" and factor == 0)
    gate, empty = gate_of(call, keys, live, rows, heads, masks)
    if how == "scale":
        if factors is not None:
            factor = here(factors, span, keys.shape[1], state)
        change = scale_keys(call, keys, factor)
    elif how == "weight without renormalising":
        change = scale_outputs(call, keys, factor)
    else:
        bias = torch.zeros(keys.shape, device=keys.device)
        change = bias_keys(call, bias.masked_fill(keys, MASKED if masks else math.log(factor)))
    return finish(call, change, keys, gate, empty, measure)


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
        call: The attention call.
        state: The run's scratch space.
        span: Part of a packed sequence that the call covers, or None.
        source: ``[batch key]`` bool.
        target: ``[batch key]`` bool.
        live: ``[batch query]`` bool.
        recycle: Share of the source's weight to move, 0 to 1.
        rows: ``[batch query]`` bool or None.
        heads: Query heads or None.
        measure: Whether to measure the attention before and after.
        visual: ``[batch key]`` bool, for the image-centric rule, or None for no rule.
        visual_sinks: ``[batch key]`` bool.
        least_visual: Rows and heads with less mass on the image are left alone.
        most_sink_share: Those where visual sinks hold more of it are left alone.

    Returns:
        The edited call and its effect.
    """
    keys, live, rows = prepared(call, state, span, source, live, rows)
    n_key = keys.shape[1]
    target = here(target, span, n_key, state)
    gate, empty = gate_of(call, keys, live, rows, heads, False)
    columns = [keys, target]
    if visual is not None:
        columns += [here(visual, span, n_key, state), here(visual_sinks, span, n_key, state)]
    mass = weigh_values(call, torch.stack(columns, dim=-1).float()).float()
    gate = gate & (mass[..., 1] > 0).transpose(1, 2)[..., None]
    if visual is not None:
        share = mass[..., 3] / (mass[..., 2] + 1e-6 * columns[2].sum(-1)[:, None, None])
        centric = (mass[..., 2] >= least_visual) & (share <= most_sink_share)
        gate = gate & centric.transpose(1, 2)[..., None]
    change = redistribute(call, keys, target, recycle, mass[..., :2])
    return finish(call, change, keys, gate, empty, measure)


def edit_values(
    call,
    state,
    span,
    keys,
    live,
    how,
    donors=None,
    tensor=None,
    rows=None,
    heads=None,
    measure=False,
):
    """Replace the values of chosen keys; attention weights stay.

    Args:
        call: The attention call.
        state: The run's scratch space.
        span: Part of a packed sequence that the call covers, or None.
        keys: ``[batch key]`` bool.
        live: ``[batch query]`` bool.
        how: ``"zero"``, ``"mean"`` (of the donors), ``"resample"`` (a donor each) or ``"tensor"``.
        donors: For the mean ``[batch key]`` bool; for resampling ``[batch key]`` int positions.
        tensor: ``[batch kv_head key d_head]`` or broadcastable, for ``"tensor"``.
        rows: ``[batch query]`` bool or None.
        heads: Query heads or None.
        measure: Whether to measure attention, which this edit does not change.

    Returns:
        The edited call and its effect.
    """
    named, rest = arguments(call)
    value, n_prompt = named["value"], keys.shape[1]
    keys, live, rows = prepared(call, state, span, keys, live, rows)
    gate, empty = gate_of(call, keys, live, rows, heads, False)
    if how == "zero":
        new = torch.zeros_like(value)
    elif how == "mean":
        weight = here(donors, span, keys.shape[1], state)[:, None, :, None].float()
        total = (value.float() * weight).sum(2, keepdim=True)
        new = (total / weight.sum(2, keepdim=True).clamp(min=1)).to(value).expand_as(value)
    elif how == "resample":
        at = torch.arange(value.shape[2], device=value.device).expand(value.shape[0], -1).clone()
        at[:, :n_prompt] = donors
        new = value.gather(2, at[:, None, :, None].expand_as(value))
    else:
        new = value.clone()
        new[:, :, :n_prompt] = tensor.to(value)
    edited = torch.where(keys[:, None, :, None], new, value)
    if rows is None and heads is None:
        after = call_with_value(call, edited)
        return after, effect_of(call, after, gate, keys, empty, False)
    return finish(call, replace_values(call, keys, new), keys, gate, empty, False)


def call_with_value(call, value):
    """The same call on other values."""
    function, args, kwargs = call
    if "value" in kwargs:
        return function, args, {**kwargs, "value": value}
    return function, (*args[:3], value, *args[4:]), kwargs


def state_effect(mask):
    """The effect of an edit of states: how many tokens it touched."""
    zero = torch.zeros(mask.shape[0], dtype=torch.long, device=mask.device)
    count = mask.sum(1)
    return {"rows": count, "empty": zero, "tokens": count, "count": count}


def token_mask(mask, states, layout):
    """``[image pos]`` or ``[batch pos]`` as a mask over the states of a tower, packed or not."""
    if layout is None:
        return mask
    flat = torch.zeros(states.shape[-2], dtype=torch.bool, device=states.device)
    flat[layout[layout >= 0]] = mask[layout >= 0]
    return flat[None] if states.ndim == 3 else flat


def edit_channels(states, state, mask, dims, how, value=None, layout=None):
    """Set chosen channels of chosen tokens.

    Args:
        states: ``[batch pos d_model]``, or ``[packed d_model]``.
        state: The run's scratch space.
        mask: ``[batch pos]`` bool.
        dims: Channel indices.
        how: ``"zero"``, ``"mean"`` (over the other live tokens: ``value`` is their mask), ``"set"``
            (to ``value``, a number) or ``"clamp"`` (magnitude at most ``value``).
        value: See ``how``.
        layout: Packed layout or None.

    Returns:
        The edited states and the effect.
    """
    places = token_mask(mask, states, layout)[..., None]
    part = states[..., dims]
    if how == "zero":
        new = torch.zeros_like(part)
    elif how == "mean":
        weight = token_mask(value, states, layout)[..., None].to(part.dtype)
        axis = states.ndim - 2
        new = (part * weight).sum(axis, keepdim=True) / weight.sum(axis, keepdim=True).clamp(min=1)
        new = new.expand_as(part)
    elif how == "clamp":
        new = part.clamp(min=-value, max=value)
    else:
        new = torch.full_like(part, value)
    out = states.clone()
    out[..., dims] = torch.where(places, new, part)
    return out, state_effect(mask)


def edit_states(states, state, mask, donor, layout=None):
    """Overwrite chosen tokens with donor states ``[batch pos d_model]``."""
    if layout is None:
        out = torch.where(mask[..., None], donor.to(states), states)
        return out, state_effect(mask)
    flat = states.reshape(-1, states.shape[-1]).clone()
    at = layout[mask]
    flat[at] = donor[mask].to(states)
    return flat.reshape(states.shape), state_effect(mask)


def scale_states(states, state, mask, factor):
    """Multiply chosen tokens by a factor, ``[batch pos]`` mask (DIYSink's reweighting)."""
    scale = torch.where(mask, factor, 1.0).to(states.dtype)[..., None]
    return torch.where(mask[..., None], states * scale, states), state_effect(mask)


def permute_states(states, state, order):
    """Reorder tokens: position ``i`` gets the token at ``order[i]``, ``[batch pos]``."""
    moved = order != torch.arange(order.shape[1], device=order.device)
    out = states.gather(1, order[..., None].expand_as(states))
    return torch.where(moved[..., None], out, states), state_effect(moved)

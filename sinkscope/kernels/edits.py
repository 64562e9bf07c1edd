"""Edits of attention, exact under the model's kernel, mask, window and scaling.

All take ``span``, the part of a packed sequence that the call covers, or None; ``live`` and ``rows``,
``[batch query]`` bool, the live and the selected queries (None for all); ``heads``, the selected query heads;
and ``measure``, whether to measure the attention on the keys. Other masks are ``[batch key]`` bool of the
prompt. All return the edited call and its effect.
"""

import math

import torch

from sinkscope.kernels.attention import (
    EXTRA,
    WRITTEN,
    arguments,
    fit_keys,
    is_causal,
    learned_sink,
    weigh_values,
)
from sinkscope.kernels.edited_call import (
    column,
    effect_of,
    head_mask,
    keys_of_call,
    knowing,
    knows_float32,
    located,
    made_at_once,
    prepared,
    reach,
    totals,
    uniform,
    weights_by_key,
    with_change,
)

MASKED = -1.0e4
WIDEST = 256
FEW = 2**16  # logits of one head that may as well be written down


def edit_keys(call, state, span, keys, live, factor, rows=None, heads=None, measure=True):
    """Multiply what the stage is about, at chosen keys, by a factor.

    At ``"keys"`` that is the logit, ``q (s k)`` (LSG, Choi et al. 2604.03316): below 1 the weight of a key
    with a negative logit rises, and 0 gives logit 0. There the factor may be ``[batch key]``. At ``"logits"``
    it is the weight, renormalised: 0 masks, and rows that see nothing else stay as they are. At
    ``"weights"`` it is the weight alone.
    """
    stage = state["stage"]
    masks, measure = stage == "logits" and factor == 0, measure and state.get("measure", True)
    found = located(call, state, span, keys, live, rows, heads, masks)
    keys, gate, empty, whole, told = found
    if stage == "logits":
        return edit_logits(call, state, span, found, factor, measure)
    if torch.is_tensor(factor):
        factor = keys_of_call(factor, span, keys.shape[1], state)

    def weigh(ask, value, output):  # A v + (s - 1) A (1_g v)
        return output + (factor - 1) * ask(value * column(keys, value)).float()

    def multiply(named, rest):
        scale = torch.where(keys, torch.as_tensor(factor, device=keys.device), 1.0)
        scaled = named["key"] * scale[:, None, :, None]
        return {**named, "key": scaled.to(named["key"].dtype)}, rest

    if stage == "weights":
        after = with_change(call, state, gate, weigh)
        return after, told | weighed(call, keys, gate, lambda mass: factor * mass, measure)
    after = with_change(call, state, None if whole else gate, multiply)
    return after, effect_of(call, after, gate, keys, empty, measure)


def edit_logits(call, state, span, found, factor, measure):
    """Multiply the weights of keys by a factor and renormalise: a bias of the logits; ``found`` is of `located`.

    A mass ``m`` becomes ``s m / (1 + (s - 1) m)``, and the sum of exponentials ``1 + (s - 1) m`` of what it
    was: from that `made_at_once` knows the mass, else it is asked for.
    """
    keys, gate, _, whole, told = found
    bias = MASKED if factor == 0 else math.log(factor)
    mark = ("bias", id(keys), bias)
    if mark not in state:
        row = torch.zeros(keys.shape, device=keys.device).masked_fill(keys, bias)
        explicit = getattr(call[0], "__name__", "") in WRITTEN
        state[mark] = bias_keys(row, abs(bias), explicit), keys
    change = state[mark][0]
    after = with_change(call, state, None if whole else gate, change)

    # Near 1 the quotient says little about the mass.
    fast = measure and abs(factor - 1) >= 0.1
    both = made_at_once(call, state, gate, whole, change) if fast else None
    if both is None:
        return after, told | weighed(
            call, keys, gate, lambda mass: renormalised(factor, mass), measure
        )
    output, less = both
    if span is None:  # the sums over rows and heads wait for those of other layers
        state.setdefault("late", {})[id(less)] = (gate, factor)
        return knowing(after, output), told | {"less": less}
    return knowing(after, output), told | totals_of(gate, *masses(less, factor))


def masses(less, factor):
    """Attention before and after a factor that made the log-sum-exp of the logits so much ``less``."""
    mass = torch.expm1(-less).div_(factor - 1).clamp_(0, 1)
    return mass, renormalised(factor, mass)


def renormalised(factor, mass):
    """What becomes of a mass whose weights are multiplied by a factor, where rows sum to one again."""
    return factor * mass / (1 + (factor - 1) * mass).clamp(min=1e-30)


def settle(out, state):
    """Put attention before and after into the effects that wait for it, of all layers at once."""
    waiting, late = {}, state.pop("late", {})
    for found in (out[slot] for slot in out if isinstance(slot, tuple)) if late else ():
        for effect in (effect for effect in found.values() if "less" in effect):
            gate, factor = late[id(effect["less"])]
            waiting.setdefault((id(gate), factor, effect["less"].device), []).append(effect)
    for effects in waiting.values():
        gate, factor = late[id(effects[0]["less"])]
        less = torch.stack([effect.pop("less") for effect in effects])
        told = totals_of(gate, *masses(less, factor))
        for at, effect in enumerate(effects):
            effect |= {name: total[at] for name, total in told.items()}


def weighed(call, keys, gate, scaled, measure):
    """Attention on the keys before and after an edit that makes of each mass what ``scaled`` says."""
    if not measure:
        return {}
    mass = weigh_values(call, keys[..., None])[..., 0].float()
    return totals_of(gate, mass, scaled(mass))


def totals_of(gate, before, after):
    """Attention ``[batch head query]`` before and after, as an effect has it."""
    return {"before": totals(gate, before), "after": totals(gate, after)}


def bias_keys(bias, largest=None, explicit=False):
    """Logits plus ``bias`` ``[batch key]``: a mask if very negative, a factor ``s`` if ``log s``.

    The bias rides in extra head dimensions, so the call stays on its fused kernel; a high and a low part
    keep bf16 exact to 16 bits. Under a soft-cap or beyond 256 dimensions it is an explicit mask, rounded to
    the mask's dtype. So it is where few logits are to be biased, if ``explicit`` masks are allowed and lose
    nothing. ``largest`` is the largest size of the bias.
    """
    largest, made = float(bias.abs().max()) if largest is None else largest, {}

    def change(named, rest):
        query, mask = named["query"], named["attention_mask"]
        width, scaling = query.shape[-1], rest.get("scaling")
        sizes = (query.shape[2], named["key"].shape[2])
        lossless = query.dtype == torch.float32 or largest == -MASKED
        if explicit and lossless and math.prod(sizes) <= FEW:
            key = (id(mask), sizes, query.dtype, rest.get("sliding_window"), is_causal(named, rest))
            if key not in made:
                made[key] = masked(named, rest, bias), mask
            return {**named, "attention_mask": made[key][0]}, rest
        if rest.get("softcap") is not None or width + EXTRA > WIDEST:
            return {**named, "attention_mask": masked(named, rest, bias)}, rest
        scaling = width**-0.5 if scaling is None else scaling
        # A power of two, so that only the keys' side is rounded.
        size = 2.0 ** round(math.log2(max(1.0, largest / scaling)) / 2)
        names, pad = ("query", "key", "value"), torch.nn.functional.pad
        wider = {**named, **{name: pad(named[name], (0, EXTRA)) for name in names}}
        key, wanted = wider["key"], bias / (size * scaling)
        high = wanted.to(key.dtype)
        key[..., width] = high[:, None]
        key[..., width + 1] = (wanted - high).to(key.dtype)[:, None]
        wider["query"][..., width : width + 2] = size
        return wider, {**rest, "scaling": scaling}

    return change


def masked(named, rest, bias):
    """The model's own mask, made explicit where it is implied, plus a bias on the keys."""
    query, mask = named["query"], named["attention_mask"]
    n_query, n_key = query.shape[2], named["key"].shape[2]
    lowest = torch.finfo(query.dtype).min
    if mask is not None and not torch.is_tensor(mask):  # flex attention's, which holds a function
        options = mask.mask_mod, len(query), 1, n_query, n_key
        mask = torch.nn.attention.flex_attention.create_mask(*options, device=query.device)
    if mask is None:
        mask = torch.ones(1, 1, n_query, n_key, dtype=torch.bool, device=query.device)
        if is_causal(named, rest) and n_query > 1:
            mask, window = mask.tril(), rest.get("sliding_window")
            mask = mask if window is None else mask & ~mask.tril(-window)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    return (mask[..., :n_key] + bias[:, None, None].to(mask.dtype)).clamp(min=lowest)


def divide_queries(call, state, span, keys, live, temperature, rows=None, heads=None):
    """Divide the queries of chosen rows; ``keys`` ``[batch key]`` are the live keys of the prompt."""
    _, live, rows = prepared(call, state, span, keys, live, rows)
    n_key = arguments(call)[0]["key"].shape[2]
    keys = keys_of_call(keys, span, n_key, state, fill=True) & (temperature != 1.0)
    gate, empty = reach(call, keys, live, rows, heads, spare_empty=False)

    def change(named, rest):
        return {**named, "query": named["query"] / temperature}, rest

    after = with_change(call, state, gate, change)
    return after, effect_of(call, after, gate, keys, empty, state.get("measure", True))


def edit_mass(call, state, span, source, target, live, recycle, rows=None, heads=None, **rule):
    """Move the share ``recycle`` of attention from source to target keys (VAR, 2503.03321).

    ``A v - r A 1_s v + r m_s A_t v``, where ``A_t`` is attention among the target keys alone. It is
    asked with all others masked: the quotient ``A 1_t v / A 1_t`` is 0 / 0 beside a real sink.
    With the masks ``visual`` and ``visual_sinks`` rows and heads with less mass than ``least_visual`` on the
    image, or more than ``most_sink_share`` of that on visual sinks, are left alone (the image-centric rule),
    and with ``needs_sink`` batch rows without any visual sink. What gives does not receive.
    """
    if rule.get("needs_sink"):
        source = source & rule["visual_sinks"].any(dim=1, keepdim=True)
    target = target & ~source
    keys, live, rows = prepared(call, state, span, source, live, rows)
    gate, empty = reach(call, keys, live, rows, heads, False)
    masks = [target, *(rule[name] for name in ("visual", "visual_sinks") if name in rule)]
    masks = [keys, *(keys_of_call(x, span, keys.shape[1], state) for x in masks)]
    # Flash kernels know no fp32; the others get it, because these masses become coefficients.
    exact = knows_float32(call)
    mass = weigh_values(call, torch.stack(masks, dim=-1), float32=exact).float()
    among, whole = None, mass[..., 1]
    # A change of logits that leaves the target alone would not show in earlier edits of weights.
    if not getattr(call[0], "recipe", {}).get("weights"):
        bias = torch.zeros(keys.shape, device=keys.device).masked_fill(~masks[1], MASKED)
        among, whole = bias_keys(bias), torch.ones_like(whole)
        some, _ = reach(call, masks[1], live, None, None, False)
        gate = gate & some
        if learned_sink(call):
            # The sink's logit competes with the target's here too, and takes a share that is no key's.
            alone = with_change(call, {"stage": "logits"}, some, among)
            whole = weigh_values(alone, masks[1][..., None], float32=exact)[..., 0].float()
    least = max(torch.finfo(arguments(call)[0]["value"].dtype).smallest_normal, 1e-30)
    gate = gate & (whole > least).transpose(1, 2)[..., None]
    budget = (recycle * mass[..., 0] / whole.clamp(min=1e-30)).transpose(1, 2)[..., None]
    if "visual" in rule:
        # The released code adds 1e-6 to the weight of every image token.
        share = mass[..., 3] / (mass[..., 2] + 1e-6 * masks[2].sum(-1)[:, None, None])
        centric = (mass[..., 2] >= rule["least_visual"]) & (share <= rule["most_sink_share"])
        gate = gate & centric.transpose(1, 2)[..., None]

    def change(ask, value, output):
        taken = ask(value * column(keys, value)).float()
        given = ask(value * column(masks[1], value), among)
        return output - recycle * taken + budget * given

    after = with_change(call, state, gate, change)
    measure = rule.get("measure", True) and state.get("measure", True)
    return after, effect_of(call, after, gate, keys, empty, measure)


def evict_keys(call, state, span, live, start, recent, measure=True):
    """Attention to the first ``start`` live keys and the last ``recent`` ones only (2309.17453).
    The effect's tokens are keys that the last query has lost; the attention is that of every row on the keys
    that it has lost. The mask differs by query, so it is explicit. Packed towers have no cache."""
    named, _ = arguments(call)
    n_query, n_key = named["query"].shape[2], named["key"].shape[2]
    # Ranks are counted over the whole sequence and cut afterwards: a sliding cache holds the last keys.
    alive = torch.nn.functional.pad(live, (0, state.get("step", 0)), value=True)
    rank, rows = alive.cumsum(1) - 1, alive[:, -n_query:]
    distance = rank[:, -n_query:, None] - rank[:, None, -n_key:]
    out = (rank[:, None, -n_key:] >= start) & (distance >= recent) & alive[:, None, -n_key:]
    parts = weights_by_key(uniform(call), knows_float32(call))
    lost = out & torch.cat([(part > 0).any(dim=1) for _, part in parts], dim=-1)
    gate = (rows & lost.any(-1))[:, :, None, None] & head_mask(call, None, rows)

    def change(named, rest):
        mask = masked(named, rest, torch.zeros(out.shape[0], n_key, device=out.device))
        mask = mask.masked_fill(out[:, None], torch.finfo(mask.dtype).min)
        return {**named, "attention_mask": mask}, rest

    after = with_change(call, state, gate, change)
    measure = measure and state.get("measure", True)
    return after, effect_of(call, after, gate, lost, torch.zeros_like(rows), measure)


def edit_values(call, state, span, keys, live, how, given=None, rows=None, heads=None):
    """Replace the values of chosen keys; attention weights stay.

    Donors are the model's own values, before any edit of this layer, so edits of different keys do not
    depend on their order. Batch rows in which no value changes are untouched. ``how`` is ``"zero"``,
    ``"mean"`` (of the keys ``given``, ``[batch key]`` bool), ``"resample"`` (from the position ``given`` for
    each, ``[batch key]`` int) or ``"tensor"`` (``given``, ``[batch kv_head key d_head]`` of the prompt).
    """
    value = arguments(call)[0]["value"]
    if how == "mean":  # a live rule leaves open what it flags; of no others there is no mean
        given = given & ~keys
        keys = keys & given.any(dim=1, keepdim=True)
    keys, live, rows = prepared(call, state, span, keys, live, rows)
    if how == "zero":
        new = torch.zeros_like(value)
    elif how != "tensor":
        new = from_donors(call, state, span, how, given)
    elif span is None:
        new = fit_keys(given.to(value.dtype), value.shape[2], state.get("step", 0))
    else:
        new = given.to(value.dtype)[:, :, slice(*span)]
    differ = keys & (new != value).any(dim=-1).any(dim=1)  # rows given what they have are untouched
    gate, empty = reach(call, keys & differ.any(dim=1, keepdim=True), live, rows, heads, False)

    def change(value):
        return torch.where(keys[:, None, :, None], new, value)

    after = with_change(call, state, gate, change)
    if rows is None and heads is None and not getattr(call[0], "recipe", {}).get("values"):
        function, args, kwargs = call
        if "value" in kwargs:
            after = function, args, {**kwargs, "value": change(value)}
        else:
            after = function, (*args[:3], change(value), *args[4:]), kwargs
    return after, effect_of(call, after, gate, keys, empty, False)


def from_donors(call, state, span, how, donors):
    """Values made of other values of the prompt, remembered where a sliding cache drops them."""
    named, rest = arguments(state.get("unedited", call))
    value, n_key = named["value"], named["value"].shape[2]
    place, memory, step = state.get("edit"), state.get("memory", {}), state.get("step", 0)
    if span is None and step and n_key < donors.shape[1] + step:
        if place not in memory:
            raise ValueError(
                f"Got replacement={how!r} at a decode step of a layer with a sliding window, whose "
                "cache no longer holds the donors; expected steps='all' or 'prefill', which remembers "
                "them, or replacement='zero' or a tensor."
            )
        return fit_keys(memory[place], n_key, step)
    if how == "mean":
        weight = keys_of_call(donors, span, n_key, state)[:, None, :, None]
        total = (value.float() * weight).sum(2, keepdim=True)
        new = (total / weight.sum(2, keepdim=True).clamp(min=1)).to(value.dtype).expand_as(value)
    else:
        at = torch.arange(n_key, device=value.device).expand(value.shape[0], -1).clone()
        at[:, : donors.shape[1]] = donors
        new = value.gather(2, at[:, None, :, None].expand_as(value))
    if not step and rest.get("sliding_window") is not None:
        memory[place] = new
    return new

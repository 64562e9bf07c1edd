"""An edited attention function: the model's own one, and a recipe of changes in forward order.

::

    keys ----> logits ----> weights ----> values
    scale      bias, mask   scale, move   replace

Whatever the order in which they were asked for, keys are scaled first and values replaced last;
inside one stage the order of the list holds. Every change has a gate ``[batch query head 1]``:
where it is False the output is what it was without the change, bit for bit, because the same call
is made and the results are joined by ``where``. Nothing is written in place.

The edited function stands where the model binds its own one. The model calls it, and so do the
probes of the same pass, which therefore measure the edited attention. It carries

* ``plain``, the model's own function: nulls are asked of it;
* ``attends``, the same without value changes: attention weights are asked of it;
* ``base`` and ``recipe``, from which the next edit builds its function.
"""

from __future__ import annotations

import torch

from sinkscope.kernels.attention import NAMES, arguments, fit_keys, one_head, weigh_values

STAGES = ("keys", "logits", "weights", "values")


def with_change(call, stage, gate, change):
    """The call with one more change of its function.

    Args:
        call: The call, plain or edited.
        stage: One of `STAGES`.
        gate: ``[batch query head 1]`` bool: where the change holds.
        change: ``change(named, rest) -> (named, rest)`` for keys and logits,
            ``change(ask, value, output) -> output`` for weights, where ``ask(value)`` is what is
            attended so far, ``output = ask(value)``, and ``ask(value, among)`` is attention before
            any change of weights with one more change of logits, ``among``; ``change(value) ->
            value`` for values.
    """
    function = call[0]
    recipe = getattr(function, "recipe", None) or dict.fromkeys(STAGES, ())
    recipe = {**recipe, stage: (*recipe[stage], (gate, change))}
    return (attend(getattr(function, "base", function), recipe), *call[1:])


def without(call, *stages):
    """The call without the changes of some stages."""
    function = call[0]
    recipe = getattr(function, "recipe", None)
    if recipe is None or not any(recipe[stage] for stage in stages):
        return call
    return (attend(function.base, {**recipe, **dict.fromkeys(stages, ())}), *call[1:])


def attend(base, recipe):
    """The function that a recipe makes of ``base``.

    It returns no attention weights, because the plain ones would lie. One more keyword than the
    model's own function is known: ``keep``, ``[batch key]``, weighs the values after they were
    replaced; so one asks what chosen keys really write.
    """

    def edited(*args, **kwargs):
        keep = kwargs.pop("keep", None)
        named, rest = arguments((None, args, kwargs))
        return replaced(base, recipe, named, rest, keep), None

    edited.base, edited.recipe = base, recipe
    edited.plain = getattr(base, "plain", base)
    edited.attends = attend(base, {**recipe, "values": ()}) if recipe["values"] else edited
    return edited


def replaced(base, recipe, named, rest, keep, at=0):
    """The output with value changes from number ``at`` on; a later one overrides an earlier one."""
    if at == len(recipe["values"]):
        if keep is not None:
            named = {**named, "value": named["value"] * column(keep, named["value"])}
        return weighed(base, recipe, named, rest, len(recipe["weights"]))
    gate, change = recipe["values"][at]
    plain = replaced(base, recipe, named, rest, keep, at + 1)
    other = {**named, "value": change(named["value"])}
    return torch.where(gate, replaced(base, recipe, other, rest, keep, at + 1), plain)


def weighed(base, recipe, named, rest, many):
    """The output with the first ``many`` changes of weights; the last sees what those before left."""
    if not many:
        return biased(base, (*recipe["keys"], *recipe["logits"]), named, rest)
    gate, change = recipe["weights"][many - 1]

    def ask(value, among=None):
        asked = {**named, "value": value}
        if among is None:
            return weighed(base, recipe, asked, rest, many - 1)
        steps = (*recipe["keys"], *recipe["logits"], (None, among))
        return biased(base, steps, asked, rest)[..., : value.shape[-1]]

    plain = ask(named["value"])
    return torch.where(gate, change(ask, named["value"], plain).to(plain.dtype), plain)


def biased(base, steps, named, rest, at=0):
    """The output with changes of keys and logits from number ``at`` on; no gate is everywhere."""
    if at == len(steps):
        return base(*[named[name] for name in NAMES], **rest)[0]
    gate, change = steps[at]
    other = biased(base, steps, *change(named, rest), at + 1)
    if gate is None:
        return other
    plain = biased(base, steps, named, rest, at + 1)
    # A bias rides in extra head dimensions, which the output does not keep.
    return torch.where(gate, other[..., : plain.shape[-1]], plain)


def column(keys, value):
    """``[batch key]`` as a factor for values ``[batch kv_head key d_head]``."""
    return keys[:, None, :, None].to(value.dtype)


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


def edit_values(
    call, state, span, keys, live, how, donors=None, tensor=None, rows=None, heads=None
):
    """Replace the values of chosen keys; attention weights stay.

    Donors are the model's own values, whatever other edits of this layer have replaced: so edits of
    different keys do not depend on their order, nor on which heads and queries they name.

    Args:
        call: The attention call.
        state: The run's scratch space; ``"unedited"`` is the call before any edit of this layer.
        span: Part of a packed sequence that the call covers, or None.
        keys: ``[batch key]`` bool.
        live: ``[batch query]`` bool.
        how: ``"zero"``, ``"mean"`` (of the donors), ``"resample"`` (a donor each) or ``"tensor"``.
        donors: For the mean ``[batch key]`` bool; for resampling ``[batch key]`` int positions.
        tensor: ``[batch kv_head key d_head]`` of the prompt, for ``"tensor"``.
        rows: ``[batch query]`` bool or None.
        heads: Query heads or None.

    Returns:
        The edited call and its effect. Batch rows in which no value became another count as untouched.
    """
    value = arguments(call)[0]["value"]
    keys, live, rows = prepared(call, state, span, keys, live, rows)
    if how == "zero":
        new = torch.zeros_like(value)
    elif how == "tensor":
        new = tensor.to(value.dtype)
        new = last_keys(new, value.shape[2], state) if span is None else new[:, :, slice(*span)]
    else:
        new = from_donors(call, state, span, how, donors)
    # Where every key of a row is given what it has, nothing is touched.
    differ = keys & (new != value).any(dim=-1).any(dim=1)
    gate, empty = gate_of(call, keys & differ.any(dim=1, keepdim=True), live, rows, heads, False)

    def change(value):
        return torch.where(keys[:, None, :, None], new, value)

    everywhere = rows is None and heads is None
    if everywhere and not getattr(call[0], "recipe", {}).get("values"):
        after = call_with_value(call, change(value))
    else:
        after = with_change(call, "values", gate, change)
    return after, effect_of(call, after, gate, keys, empty, False)


def from_donors(call, state, span, how, donors):
    """Values made of the prompt's other values, ``[batch kv_head key d_head]``.

    A sliding cache drops donors after the prompt, so what they gave is remembered.

    Raises:
        ValueError: If they were dropped and nothing is remembered.
    """
    named, rest = arguments(state.get("unedited", call))
    value, n_key = named["value"], named["value"].shape[2]
    place, memory, step = state.get("edit"), state.get("memory", {}), state.get("step", 0)
    if span is None and step and n_key < donors.shape[1] + step:
        if place not in memory:
            raise ValueError(
                f"Got replacement={how!r} at a decode step of a layer with a sliding window, whose "
                "cache no longer holds the donors; expected steps='all' or 'prefill', which "
                "remembers them, or replacement='zero' or a tensor."
            )
        return last_keys(memory[place], n_key, state)
    if how == "mean":
        weight = here(donors, span, n_key, state)[:, None, :, None].float()
        total = (value.float() * weight).sum(2, keepdim=True)
        new = (total / weight.sum(2, keepdim=True).clamp(min=1)).to(value.dtype).expand_as(value)
    else:
        at = torch.arange(n_key, device=value.device).expand(value.shape[0], -1).clone()
        at[:, : donors.shape[1]] = donors
        new = value.gather(2, at[:, None, :, None].expand_as(value))
    if not step and rest.get("sliding_window") is not None:
        memory[place] = new
    return new


def last_keys(new, n_key, state):
    """``[batch kv_head key d_head]`` of the prompt, brought to the keys that a call really has."""
    missing = max(state.get("step", 0), n_key - new.shape[2])
    return torch.nn.functional.pad(new, (0, 0, 0, missing))[:, :, -n_key:]


def call_with_value(call, value):
    """The same call on other values."""
    function, args, kwargs = call
    if "value" in kwargs:
        return function, args, {**kwargs, "value": value}
    return function, (*args[:3], value, *args[4:]), kwargs

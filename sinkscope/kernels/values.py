"""Replace what is read from keys; how much they are attended stays."""

from __future__ import annotations

import torch

from sinkscope.kernels.attention import arguments
from sinkscope.kernels.gates import effect_of, gate_of, here, prepared
from sinkscope.kernels.recipe import with_change


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

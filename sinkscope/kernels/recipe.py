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

from sinkscope.kernels.attention import NAMES, arguments

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

"""An edited attention function: the model's own one, and changes in the order of their stages.

::

    keys ----> logits ----> weights ----> values
    scale      bias, mask   scale, move   replace

A kernel of attention fits its masks to the call (`prepared`), finds the rows and heads in which the
change holds (`reach`), puts it into the call (`with_change`) and reports what it did (`effect_of`).

Where the gate of a change, ``[batch query head 1]``, is False, the output is bit for bit what it was: the
same call is made, and the results are joined by ``where``. The model and the probes of the pass call the
edited function. It has ``plain``, the model's own function, for nulls; ``attends``, without value changes,
for attention; and ``base`` and ``recipe`` (stage -> pairs of gate and change).
"""

import torch

from sinkscope.kernels.attention import (
    NAMES,
    arguments,
    ask,
    fit_keys,
    is_causal,
    learned_sink,
    one_head,
    takes_sink,
    weigh_values,
    weights_on,
)
from sinkscope.kernels.logsumexp import fused, kernel_for

TAKES = {"keys": "named, rest", "logits": "named, rest"}
TAKES |= {"weights": "ask, value, output", "values": "value"}  # what the change of a stage takes
STAGES = tuple(TAKES)


def prepared(call, state, span, keys, live, rows):
    """Fit the masks of the prompt to one call, plain or edited: ``(keys, live, rows)``.

    ``state`` knows the step; ``span`` is the part of a packed sequence that the call covers, or None.
    ``keys`` ``[batch key]`` bool are False at generated keys; ``live`` and ``rows`` (or None) are
    ``[batch query]`` bool, and the query of a decode step is live.
    """
    named, _ = arguments(call)
    n_query, n_key = named["query"].shape[2], named["key"].shape[2]
    if span is not None:
        live, rows = (None if x is None else x[:, slice(*span)] for x in (live, rows))
    elif live.shape[1] != n_query:
        live = torch.ones(live.shape[0], n_query, dtype=torch.bool, device=live.device)
    return keys_of_call(keys, span, n_key, state), live, rows


def keys_of_call(x, span, n_keys, state, fill=0):
    """The part of ``[batch key]`` that a call covers; keys generated since the prompt get ``fill``."""
    if span is not None:
        return x[:, slice(*span)]
    return fit_keys(x[..., None], n_keys, state.get("step", 0), fill)[..., 0]


def reach(call, keys, live, rows, heads, spare_empty):
    """Find the rows and heads that see an edited key, bool ``[batch query head 1]``, and the empty rows.
    ``keys``, ``live`` and ``rows`` are those of `prepared`, ``heads`` the selected query heads, or None. With
    ``spare_empty`` rows that see edited keys only, ``[batch query]``, are left as they are."""
    # In fp32 where the kernel knows it: in fp16 a key that an earlier edit made light weighs nothing.
    columns = torch.stack([keys, ~keys], dim=-1)
    share = weigh_values(uniform(call), columns, float32=knows_float32(call)).transpose(1, 2) > 0
    mask = head_mask(call, heads, live)
    share = share if share.shape[2] == mask.shape[2] else share[:, :, :1]
    chosen = live if rows is None else live & rows
    wanted = chosen[:, :, None, None] & share[..., :1] & mask
    if not spare_empty or learned_sink(call):
        return wanted, torch.zeros_like(wanted[:, :, 0, 0])
    empty = wanted & ~share[..., 1:]
    return wanted & ~empty, empty[..., 0].any(dim=2)


def with_change(call, state, gate, change):
    """Add a change to the call's function, at the stage that ``state`` names; ValueError if it is of another.

    ``gate`` ``[batch query head 1]`` bool tells where it holds. A change is ``change(named, rest) -> (named,
    rest)`` for keys and logits, ``change(value) -> value`` for values, and for weights ``change(ask, value,
    output) -> output``, where ``ask(value)`` is what is attended so far, ``output = ask(value)``, and
    ``ask(value, among)`` attention before any change of weights with one more change of logits, ``among``.
    """
    function, stage = call[0], state["stage"]
    many = getattr(getattr(change, "__code__", None), "co_argcount", None)
    if many not in (None, TAKES[stage].count(",") + 1):
        raise ValueError(
            f"Got an Edit with stage={stage!r} whose kernel makes a change of {many} arguments; expected "
            f"change({TAKES[stage]}). Write the stage that the kernel changes, one of {STAGES}."
        )
    recipe = getattr(function, "recipe", dict.fromkeys(STAGES, ()))
    recipe = {**recipe, stage: (*recipe[stage], (gate, change))}
    return (attend(getattr(function, "base", function), recipe), *call[1:])


def located(call, state, span, keys, live, rows, heads, spare_empty):
    """What `prepared` and `reach` give, ``(keys, gate, empty)``, whether the gate holds everywhere, and the
    `counts` of it; once per pass for calls whose queries see the same keys."""
    named, rest = arguments(call)
    mask, shapes = named["attention_mask"], tuple(named[name].shape for name in ("query", "key"))
    sees = (id(mask), rest.get("sliding_window"), is_causal(named, rest), takes_sink(named, rest))
    given = (
        *map(id, (keys, live, rows)),
        span,
        heads if heads is None else tuple(heads),
        spare_empty,
    )
    others = tuple(x for x in rest.values() if torch.is_tensor(x))
    key = ("reach", *given, *sees, *shapes, *map(id, others))
    if key not in state or hasattr(call[0], "recipe"):
        fitted = prepared(call, state, span, keys, live, rows)
        gate, empty = reach(call, *fitted, heads, spare_empty)
        # The tensors are kept so that their ids cannot be given to others.
        found = fitted[0], gate, empty, bool(gate.all()), counts(gate, fitted[0], empty)
        state[key] = found, (keys, live, rows, mask, others)
    return state[key][0]


def made_at_once(call, state, gate, whole, change):
    """Make a call plain and with a change of keys or logits, where a fused kernel gives both log-sum-exps.

    ``(output, less)``: what the edited function gives, joined by the ``gate`` unless it holds everywhere, and
    ``[batch head query]``, by how much the log-sum-exp of the logits fell; None where no kernel gives it, or a
    graph is kept. The first plain output of each shape in a pass is compared with the model's own, bit for bit.
    """
    if hasattr(call[0], "recipe") or torch.is_grad_enabled():
        return None
    named, rest = arguments(call)
    mask = named["attention_mask"]
    own = ("fused", named["query"].shape, named["key"].shape, None if mask is None else mask.shape)
    if not state.get(own, True):
        return None
    new, rest = change(named, rest)
    if not kernel_for(new["query"], new["attention_mask"]) or (plain := fused(call)) is None:
        return None
    if own not in state:
        state[own] = torch.equal(plain.output, ask(call))
    if not state[own]:
        return None
    same = new["query"] is named["query"]  # the change is a mask
    other = plain.under(new["attention_mask"]) if same else fused((call[0], (), {**new, **rest}))
    if other is None:
        return None
    output = other.output[..., : plain.output.shape[-1]]
    return output if whole else torch.where(gate, output, plain.output), plain.lse - other.lse


def knowing(call, output):
    """The edited call with its output, which is then not computed again."""
    named, _ = arguments(call)
    call[0].known.append((named["query"], named["key"], named["value"], output))
    return call


def counts(gate, keys, empty):
    """What `effect_of` reports without attention."""
    return {
        "rows": gate.any(dim=2)[..., 0].sum(1),
        "empty": empty.sum(1),
        "tokens": (keys if keys.ndim == 2 else keys[:, -1]).sum(1),
        "count": gate.sum(dim=(1, 2, 3)),
    }


def totals(gate, mass):
    """Attention ``[... batch head query]`` summed over the rows and heads where an edit holds, ``[... batch]``."""
    return torch.where(gate[..., 0].transpose(1, 2), mass, 0.0).sum(dim=(-2, -1))


def effect_of(before, after, gate, keys, empty, measure):
    """Report an edit: rows touched, rows left empty, attention on the keys before and after.

    ``before`` is the call as it came, ``after`` the edited one; ``gate`` and ``empty`` come from
    `reach`; ``keys`` are ``[batch key]`` bool, or ``[batch query key]`` if rows differ. ``[batch]`` each:
    ``"rows"``, ``"empty"``, ``"tokens"`` (of the last row), ``"count"`` of touched (row, head) pairs, and
    with ``measure`` the attention on the keys summed over those pairs, ``"before"`` and ``"after"``.
    """
    out = counts(gate, keys, empty)
    for name, call in (("before", before), ("after", after)) if measure else ():
        if keys.ndim == 2:
            mass = weigh_values(call, keys[..., None])[..., 0].float()
        else:
            each = weights_by_key(call, False)
            mass = sum((part * keys[:, None, :, at]).sum(-1) for at, part in each)
        out[name] = totals(gate, mass)
    return out


def uniform(call):
    """The call with ``q = 0`` under earlier masks, of one head unless heads may differ."""
    recipe = getattr(call[0], "recipe", {})
    if any(recipe.get(stage) for stage in ("weights", "values")):
        call = (attend(call[0].base, {**recipe, "weights": (), "values": ()}), *call[1:])
    named, rest = arguments(call if hasattr(call[0], "recipe") else one_head(call))
    return call[0], (), {**named, **rest, "query": torch.zeros_like(named["query"])}


def head_mask(call, heads, like):
    """Selected heads as ``[1 1 head 1]`` bool, all if ``heads`` is None."""
    count = arguments(call)[0]["query"].shape[1]
    chosen = torch.full((count,), heads is None, device=like.device)
    if heads is not None:
        chosen[heads] = True
    return chosen[None, None, :, None]


def knows_float32(call):
    """Whether the model's kernel takes fp32; flash kernels do not."""
    return "flash" not in getattr(getattr(call[0], "plain", call[0]), "__name__", "")


def weights_by_key(call, float32):
    """Attention weights, some keys at a time: ``(slice of keys, [batch head query key])``."""
    n_key, width = arguments(call)[0]["value"].shape[2:]
    for at in range(0, n_key, width):
        yield slice(at, at + width), weights_on(call, at, at + width, float32=float32).float()


def attend(base, recipe):
    """The function that a recipe makes of ``base``; it takes `ask`'s ``keep`` and returns no weights."""
    known = []  # by itself: a function that names itself is freed late, and what it holds with it

    def edited(*args, **kwargs):
        keep = kwargs.pop("keep", None)
        named, rest = arguments((None, args, kwargs))
        asked = (named["query"], named["key"], named["value"])
        if known and all(a is b for a, b in zip(asked, known[0], strict=False)):
            return known.pop()[-1], None
        return replaced(base, recipe, named, rest, keep), None

    edited.base, edited.recipe, edited.known = base, recipe, known
    edited.plain = getattr(base, "plain", base)
    if recipe["values"]:
        edited.attends = attend(base, {**recipe, "values": ()})
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
    steps = (*recipe["keys"], *recipe["logits"])
    if not many:
        return biased(base, steps, named, rest)
    gate, change = recipe["weights"][many - 1]

    def ask(value, among=None):
        asked = {**named, "value": value}
        if among is None:
            return weighed(base, recipe, asked, rest, many - 1)
        return biased(base, (*steps, (None, among)), asked, rest)

    plain = ask(named["value"])
    return torch.where(gate, change(ask, named["value"], plain).to(plain.dtype), plain)


def biased(base, steps, named, rest, at=0):
    """The output with changes of keys and logits from number ``at`` on; no gate is everywhere."""
    if at == len(steps):
        return base(*[named[name] for name in NAMES], **rest)[0]
    gate, change = steps[at]
    # A bias rides in extra head dimensions, which the output does not keep.
    other = biased(base, steps, *change(named, rest), at + 1)[..., : named["value"].shape[-1]]
    if gate is None:
        return other
    return torch.where(gate, other, biased(base, steps, named, rest, at + 1))


def column(keys, value):
    """``[batch key]`` as a factor for values ``[batch kv_head key d_head]``."""
    return keys[:, None, :, None].to(value.dtype)

"""Checks of what every probe and every intervention must keep, for those of the library and your own."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 3  # tokens that are generated to compare the cache with one pass
# How far a cached step may be from one pass, as a share of the largest logit; fp32: 2e-5.
CACHE = {torch.float16: 2e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True, eq=False)
class Wrapped:
    """An intervention of the edits that a function makes."""

    edits: Callable[[Any], list[Any]]
    steps: str = "all"
    allow_noop: bool = True
    tower: str = "language"


@dataclass(frozen=True)
class Seen:
    """What one call of one kernel did."""

    site: Any
    wrote: bool  # into anything it was given
    beyond_heads: bool  # a head that was not selected has another output
    beyond_tokens: bool  # a row or token that was not selected is another one
    more: bool  # more rows or tokens differ than the kernel told
    silent: bool  # all that comes out is 0


class ContractError(AssertionError):
    """A probe or an intervention breaks a promise that the library makes for all of them."""


def require(holds: bool, promise: str) -> None:
    """Raise `ContractError` unless the promise holds."""
    if not holds:
        raise ContractError(promise)


def check_probe(probe: Any, lvlm: Any, sample: Any, *, remote: bool = True) -> None:
    """Run a probe through the promises that hold for all of them; a broken one is a `ContractError`.

    It is a frozen record; its result is one too, has tensors and a tidy table; it changes no bit of the
    logits; it gives the same twice, next to its equal, and with ``remote`` (which needs a processor) through
    the remote path; probes of the language tower also work at decode steps. Prefer a padded batch.
    """
    require(is_frozen(probe), "a probe is a frozen dataclass: parameters only, no state")
    twin, plain = replace(probe), lvlm.run(sample)
    run = lvlm.run(sample, probes=[probe, twin])
    result = run[probe]
    require(is_frozen(result), "a result is a frozen dataclass")
    require(bool(tensors_of(result)), "a result holds at least one tensor")
    require(len(result.to_dataframe()) > 0, "a result has a table with at least one line")
    require(same(run.logits, plain.logits), "a probe changes no bit of the logits")
    require(same_results(result, run[twin]), "two equal probes of one run give the same")
    again = lvlm.run(sample, probes=[probe])[probe]
    require(same_results(result, again), "the same run gives the same result")
    if remote:
        there = lvlm.run(sample, probes=[probe], remote="local", logits="all")
        require(same_results(result, there[probe]), "the remote path gives the same result")
    if probe.tower == "language":
        out = lvlm.generate(sample, probes=[probe], max_new_tokens=2, min_new_tokens=2)
        require(len(out.steps) == 2, "generation runs a prompt pass and a decode step")
        require(bool(tensors_of(out.steps[1][probe])), "a decode step has a result")


def check_intervention(
    make: Callable[[], Any],
    lvlm: Any,
    sample: Any,
    *,
    neutral: Callable[[], Any] | None = None,
    remote: bool = True,
) -> None:
    """Run an intervention through the promises that hold for all of them; a broken one is a `ContractError`.

    - It is a frozen record, or a module if it learns. Its kernels never write in place.
    - It changes the logits. ``run.effects`` counts all rows and tokens that differ; others stay bitwise.
    - What its fields ``tokens`` (at sites of states), ``queries`` and ``heads`` (at attention) do not
      select stays bitwise, at every site; so does what an earlier edit of an attention site did.
    - The plain model is bitwise itself afterwards, also after an exception in the middle of a pass;
      the same edit gives the same twice, and with ``remote`` (which needs a processor) there too.
    - An edit of attention with ``steps="all"`` and no ``queries`` gives the same in ``generate`` with
      the cache as in one pass over prompt and answer.
    - At its neutral setting, which ``neutral`` builds if there is one, it changes no bit.

    ``make`` builds the intervention. Use a sample with a row that the selection leaves empty.
    """
    it = make()
    kinds = "an intervention is a frozen dataclass (parameters only) or a module that learns"
    require(is_frozen(it) or isinstance(it, nn.Module), kinds)
    plain, run = lvlm.run(sample).logits, lvlm.run(sample, interventions=[it])
    again, sites = check_kernels(make(), lvlm, sample)
    require(not same(run.logits, plain), "an intervention changes the logits")
    require(it in run.effects, "run.effects tells what an intervention did")
    touched = run.effects[it].touched
    require(bool(touched.any()), "the effect names the rows that were touched")
    if len(touched) == len(plain):
        kept = same(run.logits[~touched], plain[~touched])
        require(kept, "rows that were not touched stay bitwise")
    require(same(lvlm.run(sample).logits, plain), "the next plain run is bitwise the original")
    require(same(again, run.logits), "the same edit gives the same logits")
    if any(site.name == "attention" for site in sites):
        check_beside(make(), lvlm, sample, run.logits)
    if remote:
        there = lvlm.run(sample, interventions=[make()], remote="local", logits="all")
        require(same(there.logits, run.logits), "the remote path gives the same logits")
    decodes = all((site.tower, site.name) == ("language", "attention") for site in sites)
    if it.steps == "all" and getattr(it, "queries", None) is None and decodes:
        check_cache(make, lvlm, sample)
    check_clean_after_error(make(), lvlm, sample, plain)
    if neutral is not None:
        logits = lvlm.run(sample, interventions=[neutral()]).logits
        require(same(logits, plain), "the neutral setting changes no bit")


def check_kernels(it: Any, lvlm: Any, sample: Any) -> tuple[Tensor, set[Any]]:
    """Watch every kernel of an intervention in one pass; the logits and the sites that were edited."""
    seen: list[Seen] = []
    logits = lvlm.run(sample, interventions=[watched(it, seen)]).logits
    promises = {
        "wrote": "a kernel never writes in place, neither into what it is given nor into its parameters",
        "beyond_heads": "heads that were not selected keep every bit",
        "beyond_tokens": "tokens and queries that were not selected keep every bit",
        "more": "no more rows or tokens change than the kernel tells",
    }
    for one, (name, promise) in product(seen, promises.items()):
        require(not getattr(one, name), f"{promise} ({one.site})")
    return logits, {one.site for one in seen}


def check_beside(it: Any, lvlm: Any, sample: Any, alone: Tensor) -> None:
    """An edit of attention keeps what an earlier edit of the site did; ``alone`` are its own logits."""
    promise = "an edit keeps what earlier edits of its site did"
    seen: list[Seen] = []
    both = lvlm.run(sample, interventions=[watched(it, seen, beside=True)]).logits
    require(not any(one.beyond_heads or one.beyond_tokens or one.more for one in seen), promise)
    # Where attention writes nothing any more, nothing of an earlier edit could show.
    require(not same(both, alone) or all(one.silent for one in seen), promise)


def check_cache(make: Callable[[], Any], lvlm: Any, sample: Any) -> None:
    """An edit of attention holds at every decode step: the cache gives what one pass gives.

    That pass runs over prompt and answer with the edits of the prompt, told that so many tokens were generated.
    """
    steps: dict[str, Any] = {"max_new_tokens": STEPS, "min_new_tokens": STEPS}
    steps["suppress_tokens"] = [lvlm.anatomy.image_token_id]
    out = lvlm.generate(sample, interventions=[make()], **steps)
    prompt, more = sample.tokens.live.shape[1], STEPS - 1
    inputs = dict(sample.inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == sample.tokens.live.shape:
            inputs[name] = nn.functional.pad(value, (0, more), value=name == "attention_mask")
    inputs["input_ids"] = out.sequences[:, : prompt + more]
    grown, it = lvlm.prepare(inputs=inputs), make()

    def later(kernel: Any, call: Any, state: Any, span: Any, /, **parameters: Any) -> Any:
        return kernel(call, {**state, "step": more}, span, **parameters)

    def edits(context: Any) -> list[Any]:
        asked = it.edits(replace(context, tokens=sample.tokens))
        return [replace(edit, kernel=partial(later, edit.kernel)) for edit in asked]

    once = lvlm.run(grown, interventions=[Wrapped(edits)])
    want = once.logits[:, prompt - 1 :].float()
    got = torch.cat([step.logits for step in out.steps], dim=1).float()
    off = float((got - want).abs().max() / want.abs().max())
    promise = "with steps='all' an answer with the cache is what one pass without it gives"
    close = off <= CACHE.get(out.steps[0].logits.dtype, 2e-5)
    require(close, f"{promise} (logits are {off:.2g} of the largest one away)")


def check_clean_after_error(it: Any, lvlm: Any, sample: Any, plain: Tensor) -> None:
    """An exception after the first edit of a pass leaves the model as it was."""

    class MidwayError(Exception):
        pass

    def throw(*args: Any, **kwargs: Any) -> Any:
        raise MidwayError

    def edits(context: Any) -> list[Any]:
        *first, last = it.edits(context)
        return [*first, replace(last, kernel=throw)]

    try:
        lvlm.run(sample, interventions=[Wrapped(edits)])
        raise ContractError("an exception inside a kernel reaches the user with its own type")
    except MidwayError:
        promise = "the plain run after an exception in the middle of a pass is bitwise the original"
        require(same(lvlm.run(sample).logits, plain), promise)


def is_frozen(record: Any) -> bool:
    """Whether it is an object of a frozen dataclass."""
    return getattr(getattr(type(record), "__dataclass_params__", None), "frozen", False)


def tensors_of(result: Any) -> dict[str, Tensor]:
    """The tensors of a result record, by field."""
    given = {field.name: getattr(result, field.name) for field in fields(result)}
    return {name: value for name, value in given.items() if isinstance(value, Tensor)}


def same(one: Tensor, other: Tensor) -> bool:
    """Bitwise equality in which NaN equals NaN."""
    return one.shape == other.shape and one.dtype == other.dtype and not differs(one, other).any()


def same_results(one: Any, other: Any) -> bool:
    """Whether two results hold the same tensors."""
    first, second = tensors_of(one), tensors_of(other)
    return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)


def watched(inner: Any, seen: list[Seen], beside: bool = False) -> Wrapped:
    """The same edits, whose calls add to ``seen``; with ``beside`` `double_all` comes first at attention sites."""

    def edits(context: Any) -> list[Any]:
        asked = list(inner.edits(context))
        first = {e.site: e for e in asked if beside and e.site.name == "attention"}
        double: Any = {"kernel": double_all, "parameters": {}, "stage": "keys"}  # puts it first
        own = [replace(e, kernel=partial(noting, e, context)) for e in asked]
        return [*(replace(e, **double) for e in first.values()), *own]

    def noting(edit: Any, context: Any, value: Any, /, *args: Any, **parameters: Any) -> Any:
        given = list(tensors_in((value, parameters)))
        copies, before = [x.clone() for x in given], outputs(value)
        after, effect = edit.kernel(value, *args, **parameters)
        span, result = args[1] if len(args) > 1 else None, outputs(after)
        wrote = any(differs(one, other).any() for one, other in zip(given, copies, strict=True))
        told = torch.zeros(len(before)) if effect is None else effect["rows"]
        look = attention_differs if edit.site.name == "attention" else states_differ
        whose = None if edit.look else inner  # a look changes nothing, whatever was selected
        beyond = look(before, result, whose, context, edit.site, span, told)
        seen.append(Seen(edit.site, bool(wrote), *beyond, not result.any()))
        return after, effect

    return Wrapped(edits)


def attention_differs(
    before: Tensor, after: Tensor, inner: Any, context: Any, site: Any, span: Any, told: Tensor
) -> tuple[bool, bool, bool]:
    """Whether live rows or heads differ that should not: see `Seen`."""
    part = slice(*span) if span is not None else slice(None)
    live = context.pack(site.tower, context.live(site.tower), dim=1)[:, part]
    other = differs(before, after).any(-1)
    if live.shape == other.shape[:2]:
        other = other & live[..., None]
    heads, queries = getattr(inner, "heads", None), getattr(inner, "queries", None)
    kept = torch.full((other.shape[2],), heads is not None)
    kept[list(heads or ())] = False
    rows, beyond = other.any(-1), False
    if queries is not None and context.step == 0:
        chosen = context.pack(site.tower, context.select(site.tower, queries), dim=1)[:, part]
        beyond = bool((rows & ~chosen).any())
    return bool(other[:, :, kept].any()), beyond, bool((rows.sum(1) > told).any())


def states_differ(
    before: Tensor, after: Tensor, inner: Any, context: Any, site: Any, span: Any, told: Tensor
) -> tuple[bool, bool, bool]:
    """Whether tokens differ that should not: see `Seen`; where states only change places, more of them may."""
    if before.shape != after.shape:
        return False, False, False
    other = differs(before, after).any(-1)
    other = other if other.ndim == 2 else other[None]
    more = other.sum(1) > told if len(told) == len(other) else other.sum() > told.sum()
    beyond = False
    if getattr(inner, "tokens", None) is not None:
        mask = context.select(site.tower, inner.tokens)
        mask = mask[:, site.layer] if mask.ndim == 3 else mask
        mask = context.pack(site.tower, mask, dim=1)
        beyond = mask.shape == other.shape and bool((other & ~mask).any())
        rows = zip(before, after, strict=True)
        beyond = beyond and not all(torch.equal(a.unique(dim=0), b.unique(dim=0)) for a, b in rows)
    return False, beyond, bool(more.any())


def double_all(call: Any, state: Any, span: Any) -> tuple[Any, None]:
    """An edit that doubles queries and values, whose function carries what those of the library carry."""
    plain, everywhere = call[0], torch.ones(1, 1, 1, 1, dtype=torch.bool)
    keys = ((everywhere, lambda named, rest: ({**named, "query": 2 * named["query"]}, rest)),)
    values = ((everywhere, lambda value: 2 * value),)
    attends, both = doubled(plain, 1), doubled(plain, 2)
    for function, last in ((attends, ()), (both, values)):
        recipe = {"keys": keys, "logits": (), "weights": (), "values": last}
        vars(function).update(plain=plain, base=plain, recipe=recipe, attends=attends)
    return (both, *call[1:]), None


def doubled(plain: Any, factor: int) -> Any:
    """Attention with queries times 2 and values times ``factor``; ``keep`` weighs the values."""

    def function(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **rest: Any
    ) -> Any:
        keep, value = rest.pop("keep", None), factor * value
        if keep is not None:
            value = value * keep[:, None, :, None].to(value.dtype)
        return plain(module, 2 * query, key, value, attention_mask, **rest)[0], None

    return function


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def outputs(value: Any) -> Tensor:
    """States as they are; of an attention call what it gives, ``[batch query head d_head]``."""
    if isinstance(value, Tensor):
        return value.clone()
    function, args, kwargs = value
    return function(*args, **kwargs)[0]


def differs(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors of one shape differ in a bit; NaN equals NaN."""
    out = one != other
    return out & ~(one.isnan() & other.isnan()) if one.is_floating_point() else out

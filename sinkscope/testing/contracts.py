"""What every probe and every intervention must keep: run these on your own before you trust it.

A watched intervention asks the same edits with the same parameters. Around every kernel stands one
that keeps a copy of what goes in, and notes afterwards what differs.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one call of one kernel did.

    Attributes:
        site: The `Site`.
        wrote: Whether anything it was given is not what it was.
        beyond_heads: Whether a head that was not selected has another output.
        beyond_tokens: Whether a row or token that was not selected is another one.
        more: Whether more rows or tokens differ than the kernel told.
        silent: Whether all that comes out is 0.
    """

    site: Any
    wrote: bool
    beyond_heads: bool
    beyond_tokens: bool
    more: bool
    silent: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Watched:
    """An intervention whose kernels are watched.

    Args:
        inner: The intervention.
        seen: Takes one `Seen` per call of a kernel.
        beside: Whether another edit, `double_all`, comes first at every attention site.
    """

    inner: Any
    seen: list[Seen]
    beside: bool = False
    steps: str = "all"
    allow_noop: bool = True
    tower: str = "language"

    def edits(self, context: Any) -> list[Any]:
        """The edits of the inner one, watched."""
        edits = list(self.inner.edits(context))
        out = [
            dataclasses.replace(edit, kernel=watched(edit, self.inner, context, self.seen))
            for edit in edits
        ]
        if self.beside:
            sites = {e.site: e for e in edits if e.site.name == "attention"}
            # The stage puts it first.
            change = {"kernel": double_all, "parameters": {}, "stage": "keys"}
            out = [*(dataclasses.replace(e, **change) for e in sites.values()), *out]
        return out


def watched(edit: Any, inner: Any, context: Any, seen: list[Seen]) -> Any:
    """The kernel of an edit, which also notes what it did."""
    look = attention_differs if edit.site.name == "attention" else states_differ

    def kernel(value: Any, /, *args: Any, **parameters: Any) -> Any:
        given = list(tensors_in((value, parameters)))
        copies = [x.clone() for x in given]
        before = outputs(value)
        after, effect = edit.kernel(value, *args, **parameters)
        span = args[1] if len(args) > 1 else None
        result = outputs(after)
        wrote = any(differs(one, other).any() for one, other in zip(given, copies, strict=True))
        told = torch.zeros(len(before)) if effect is None else effect["rows"]
        beyond = look(before, result, inner, context, edit.site, span, told)
        seen.append(Seen(edit.site, bool(wrote), *beyond, not result.any()))
        return after, effect

    return kernel


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
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
    if one.is_floating_point():
        out = out & ~(one.isnan() & other.isnan())
    return out


def attention_differs(
    before: Tensor, after: Tensor, inner: Any, context: Any, site: Any, span: Any, told: Tensor
) -> tuple[bool, bool, bool]:
    """Whether live rows or heads differ that should not: see `Seen`."""
    part = slice(*span) if span is not None else slice(None)
    live = context.pack(site.tower, context.live(site.tower), dim=1)[:, part]
    other = differs(before, after).any(-1)
    if live.shape == other.shape[:2]:
        other = other & live[..., None]
    heads, rows = getattr(inner, "heads", None), other.any(-1)
    kept = torch.ones(other.shape[2], dtype=torch.bool)
    kept[list(range(other.shape[2]) if heads is None else heads)] = False
    beyond = False
    queries = getattr(inner, "queries", None)
    if queries is not None and context.step == 0:
        chosen = context.pack(site.tower, context.select(site.tower, queries), dim=1)[:, part]
        beyond = bool((rows & ~chosen).any())
    return bool(other[:, :, kept].any()), beyond, bool((rows.sum(1) > told).any())


def states_differ(
    before: Tensor, after: Tensor, inner: Any, context: Any, site: Any, span: Any, told: Tensor
) -> tuple[bool, bool, bool]:
    """Whether tokens differ that should not: see `Seen`.

    Where tokens only change places (`moved`), those that make room differ too.
    """
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
        fits = mask.shape == other.shape
        beyond = fits and bool((other & ~mask).any()) and not moved(before, after)
    return False, beyond, bool(more.any())


def moved(before: Tensor, after: Tensor) -> bool:
    """Whether the same states only stand at other places."""
    return all(
        torch.equal(one.unique(dim=0), other.unique(dim=0))
        for one, other in zip(before, after, strict=True)
    )


ARGUMENTS = ("module", "query", "key", "value", "attention_mask")


def double_all(call: Any, state: Any, span: Any) -> tuple[Any, None]:
    """An edit that doubles queries and values, in the form of the library's own edits.

    Its function carries what theirs do: ``plain`` is without the change, ``attends`` with that of
    attention only, and the next edit builds its function from ``base`` and ``recipe``.
    """
    plain = call[0]
    everywhere = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    recipe = {
        "keys": ((everywhere, lambda named, rest: ({**named, "query": 2 * named["query"]}, rest)),),
        "logits": (),
        "weights": (),
        "values": ((everywhere, lambda value: 2 * value),),
    }
    attends = doubled(plain, 1)
    carry(attends, plain, {**recipe, "values": ()}, attends)
    both = doubled(plain, 2)
    carry(both, plain, recipe, attends)
    return (both, *call[1:]), None


def doubled(plain: Any, factor: int) -> Any:
    """Attention with queries times 2 and values times ``factor``; ``keep`` weighs the values."""

    def function(*args: Any, **kwargs: Any) -> Any:
        keep = kwargs.pop("keep", None)
        named = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        rest = {name: value for name, value in named.items() if name not in ARGUMENTS}
        value = factor * named["value"]
        if keep is not None:
            value = value * keep[:, None, :, None].to(value.dtype)
        mask = named.get("attention_mask")
        return plain(named["module"], 2 * named["query"], named["key"], value, mask, **rest)[
            0
        ], None

    return function


def carry(function: Any, plain: Any, recipe: Any, attends: Any) -> None:
    """Put the names on a function that edited attention carries."""
    vars(function).update(plain=plain, base=plain, recipe=recipe, attends=attends)


@dataclasses.dataclass(frozen=True, eq=False)
class OnGrown:
    """The prompt's edits of attention on a pass over the prompt and ``grown`` tokens more."""

    inner: Any
    tokens: Any  # of the prompt
    grown: int
    steps: str = "all"
    allow_noop: bool = True
    tower: str = "language"

    def edits(self, context: Any) -> list[Any]:
        """The edits of the inner one for the prompt, whose kernels are told of so many steps."""

        def told(kernel: Any) -> Any:
            def later(call: Any, state: Any, span: Any, /, **parameters: Any) -> Any:
                return kernel(call, {**state, "step": self.grown}, span, **parameters)

            return later

        edits = self.inner.edits(dataclasses.replace(context, tokens=self.tokens))
        return [dataclasses.replace(edit, kernel=told(edit.kernel)) for edit in edits]


STEPS = 3
"""Tokens that are generated to compare the cache with one pass."""
CACHE = {torch.float16: 2e-2, torch.bfloat16: 2e-1}
"""How far a cached step may be from one pass, as a share of the largest logit; fp32: 2e-5."""


class ContractError(AssertionError):
    """A probe or an intervention breaks a promise that the library makes for all of them."""


def require(holds: bool, promise: str) -> None:
    """Raise `ContractError` with the broken promise unless it holds."""
    if not holds:
        raise ContractError(promise)


def is_frozen(record: Any) -> bool:
    """Whether something is an object of a frozen dataclass."""
    params = getattr(type(record), "__dataclass_params__", None)
    return params is not None and params.frozen


def tensors_of(result: Any) -> dict[str, Tensor]:
    """The tensors of a result record, by field."""
    return {k: v for k, v in vars(result).items() if isinstance(v, Tensor)}


def same(one: Tensor, other: Tensor) -> bool:
    """Bitwise equality in which NaN equals NaN."""
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and not differs(one, other).any()


def same_results(one: Any, other: Any) -> bool:
    """Whether two results hold the same tensors."""
    first, second = tensors_of(one), tensors_of(other)
    return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)


def check_probe(probe: Any, lvlm: Any, sample: Any, *, remote: bool = True) -> None:
    """Run a probe through the promises that hold for all of them.

    It is a frozen record; its result is one too, has tensors and a tidy table; it changes no bit of
    the logits; it gives the same twice and beside itself; through the remote path it gives the same;
    probes of the language tower also work at decode steps.

    Args:
        probe: The probe.
        lvlm: Any model it fits.
        sample: A sample of it, better a padded batch.
        remote: Whether to run the remote path too (it needs a processor).

    Raises:
        ContractError: If a promise is broken; the message is the promise.
    """
    require(is_frozen(probe), "a probe is a frozen dataclass: parameters only, no state")
    twin = dataclasses.replace(probe)
    plain = lvlm.run(sample)
    run = lvlm.run(sample, probes=[probe, twin])
    result = run[probe]
    require(is_frozen(result), "a result is a frozen dataclass")
    require(bool(tensors_of(result)), "a result holds at least one tensor")
    require(len(result.to_dataframe()) > 0, "a result has a table with at least one line")
    require(same(run.logits, plain.logits), "a probe changes no bit of the logits")
    require(same_results(result, run[twin]), "two equal probes of one run give the same")
    again = lvlm.run(sample, probes=[probe])
    require(same_results(result, again[probe]), "the same run gives the same result")
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
    """Run an intervention through the promises that hold for all of them.

    - It is a frozen record, or a module if it learns.
    - Its kernels never write in place, neither into what they are given nor into their parameters.
    - It changes the logits and says so in ``run.effects``: no more rows or tokens differ than it
      told, and batch rows in which nothing was touched stay bitwise.
    - What its fields ``tokens`` (at sites of states), ``queries`` and ``heads`` (at attention) do
      not select stays bitwise, at every site.
    - Beside another edit of an attention site it keeps what the other one did.
    - The plain model is bitwise itself afterwards, also after an exception in the middle of a pass;
      the same edit gives the same twice, and through the remote path.
    - An edit of attention with ``steps="all"`` and no ``queries`` gives the same in ``generate`` with
      the cache as in one pass over prompt and answer; see `check_cache`.
    - At its neutral setting it changes no bit.

    Args:
        make: Builds the intervention.
        lvlm: Any model it fits.
        sample: A sample of it, better one with a row that the selection leaves empty.
        neutral: Builds it with the setting that changes nothing, or None if there is none.
        remote: Whether to run the remote path too (it needs a processor).

    Raises:
        ContractError: If a promise is broken; the message is the promise.
    """
    it = make()
    require(
        is_frozen(it) or isinstance(it, nn.Module),
        "an intervention is a frozen dataclass (parameters only, no state) or a module that learns",
    )
    plain = lvlm.run(sample).logits
    run = lvlm.run(sample, interventions=[it])
    again, sites = check_kernels(make(), lvlm, sample)
    require(not same(run.logits, plain), "an intervention changes the logits")
    require(it in run.effects, "run.effects tells what an intervention did")
    effect = run.effects[it]
    require(bool(effect.touched.any()), "the effect names the rows that were touched")
    if effect.touched.shape[0] == plain.shape[0]:
        quiet = ~effect.touched
        require(same(run.logits[quiet], plain[quiet]), "rows that were not touched stay bitwise")
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
    check_clean_after_error(make, lvlm, sample, plain)
    if neutral is not None:
        logits = lvlm.run(sample, interventions=[neutral()]).logits
        require(same(logits, plain), "the neutral setting changes no bit")


def check_kernels(it: Any, lvlm: Any, sample: Any) -> tuple[Tensor, set[Any]]:
    """Watch every kernel of an intervention in one pass; the logits and the sites that were edited."""
    seen: list[Seen] = []
    logits = lvlm.run(sample, interventions=[Watched(it, seen)]).logits
    for one in seen:
        require(
            not one.wrote,
            f"a kernel never writes in place, neither into what it is given nor into its parameters "
            f"({one.site})",
        )
        require(not one.beyond_heads, f"heads that were not selected keep every bit ({one.site})")
        require(
            not one.beyond_tokens,
            f"tokens and queries that were not selected keep every bit ({one.site})",
        )
        require(not one.more, f"no more rows or tokens change than the kernel tells ({one.site})")
    return logits, {one.site for one in seen}


def check_beside(it: Any, lvlm: Any, sample: Any, alone: Tensor) -> None:
    """An edit of attention keeps what an earlier edit of the site did; ``alone`` are its own logits."""
    promise = "an edit keeps what earlier edits of its site did"
    seen: list[Seen] = []
    both = lvlm.run(sample, interventions=[Watched(it, seen, beside=True)]).logits
    require(not any(one.beyond_heads or one.beyond_tokens or one.more for one in seen), promise)
    # Where attention writes nothing any more, nothing of an earlier edit could show.
    require(not same(both, alone) or all(one.silent for one in seen), promise)


def check_cache(make: Callable[[], Any], lvlm: Any, sample: Any) -> None:
    """An edit of attention holds at every decode step: the cache gives what one pass gives.

    The pass without a cache runs over the prompt and the answer's tokens, with the edits of the
    prompt, whose kernels are told that so many tokens were generated.
    """
    out = lvlm.generate(
        sample,
        interventions=[make()],
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        suppress_tokens=[lvlm.anatomy.image_token_id],
    )
    prompt, more = sample.tokens.live.shape[1], STEPS - 1
    inputs = dict(sample.inputs)
    for name, value in sample.inputs.items():
        if isinstance(value, Tensor) and value.shape == sample.tokens.live.shape:
            inputs[name] = nn.functional.pad(value, (0, more), value=name == "attention_mask")
    inputs["input_ids"] = out.sequences[:, : prompt + more]
    grown = lvlm.prepare(inputs=inputs)
    once = OnGrown(make(), sample.tokens, more)
    want = lvlm.run(grown, interventions=[once]).logits[:, prompt - 1 :].float()
    got = torch.cat([step.logits for step in out.steps], dim=1).float()
    off = float((got - want).abs().max() / want.abs().max())
    require(
        off <= CACHE.get(out.steps[0].logits.dtype, 2e-5),
        f"with steps='all' an answer with the cache is what one pass without it gives (logits are "
        f"{off:.2g} of the largest one away)",
    )


class _MidwayError(Exception):
    """Thrown on purpose."""


def check_clean_after_error(make: Callable[[], Any], lvlm: Any, sample: Any, plain: Tensor) -> None:
    """An exception after the first edit of a pass leaves the model as it was."""

    def throw(*args: Any, **kwargs: Any) -> Any:
        raise _MidwayError

    @dataclasses.dataclass(frozen=True, eq=False)
    class Broken:
        inner: Any
        steps: str = "all"
        allow_noop: bool = False
        tower: str = "language"

        def edits(self, context: Any) -> list[Any]:
            edits = list(self.inner.edits(context))
            return [*edits[:-1], dataclasses.replace(edits[-1], kernel=throw)]

    broken = Broken(make())
    try:
        lvlm.run(sample, interventions=[broken])
    except _MidwayError:
        pass
    else:
        raise ContractError("an exception inside a kernel reaches the user with its own type")
    require(
        same(lvlm.run(sample).logits, plain),
        "after an exception in the middle of a pass the next plain run is bitwise the original",
    )

"""An intervention under watch: what its kernels are given, and what becomes of it.

A watched intervention asks the same edits with the same parameters. Around every kernel stands one
that keeps a copy of what goes in, and notes afterwards what differs.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


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
        before = value.clone() if isinstance(value, Tensor) else outputs(value)
        after, effect = edit.kernel(value, *args, **parameters)
        span = args[1] if len(args) > 1 else None
        result = after if isinstance(after, Tensor) else outputs(after)
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


def outputs(call: Any) -> Tensor:
    """What an attention call gives, ``[batch query head d_head]``."""
    function, args, kwargs = call
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
    carried = {"plain": plain, "base": plain, "recipe": recipe, "attends": attends}
    for name, value in carried.items():
        setattr(function, name, value)


@dataclasses.dataclass(frozen=True, eq=False)
class OnGrown:
    """The prompt's edits of attention on a pass over the prompt and ``grown`` tokens more.

    Args:
        inner: The intervention.
        tokens: The prompt's tokens.
        grown: How many tokens more; kernels are told of so many steps.
    """

    inner: Any
    tokens: Any
    grown: int
    steps: str = "all"
    allow_noop: bool = True
    tower: str = "language"

    def edits(self, context: Any) -> list[Any]:
        """The edits of the inner one for the prompt."""
        of_prompt = dataclasses.replace(context, tokens=self.tokens)
        return [
            dataclasses.replace(edit, kernel=told_steps(edit.kernel, self.grown))
            for edit in self.inner.edits(of_prompt)
        ]


def told_steps(kernel: Any, steps: int) -> Any:
    """The kernel, told that so many tokens were generated."""

    def later(call: Any, state: Any, span: Any, /, **parameters: Any) -> Any:
        return kernel(call, {**state, "step": steps}, span, **parameters)

    return later

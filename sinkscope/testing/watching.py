"""Interventions whose kernels are watched: a copy is kept of what goes in, and what differs afterwards."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Wrapped:
    """An intervention of the edits that a function makes."""

    edits: Callable[[Any], list[Any]]
    steps: str = "all"
    allow_noop: bool = True
    tower: str = "language"


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one call of one kernel did."""

    site: Any
    wrote: bool  # into anything it was given
    beyond_heads: bool  # a head that was not selected has another output
    beyond_tokens: bool  # a row or token that was not selected is another one
    more: bool  # more rows or tokens differ than the kernel told
    silent: bool  # all that comes out is 0


def watched(inner: Any, seen: list[Seen], beside: bool = False) -> Wrapped:
    """The same edits, whose calls add to ``seen``; with ``beside`` `double_all` comes first at attention sites."""

    def edits(context: Any) -> list[Any]:
        asked, change = list(inner.edits(context)), dataclasses.replace
        first = {e.site: e for e in asked if beside and e.site.name == "attention"}
        double: Any = {"kernel": double_all, "parameters": {}, "stage": "keys"}  # puts it first
        own = [change(e, kernel=watched_kernel(e, inner, context, seen)) for e in asked]
        return [*(change(e, **double) for e in first.values()), *own]

    return Wrapped(edits)


def watched_kernel(edit: Any, inner: Any, context: Any, seen: list[Seen]) -> Any:
    """The kernel of an edit, which also notes what it did."""
    look = attention_differs if edit.site.name == "attention" else states_differ

    def kernel(value: Any, /, *args: Any, **parameters: Any) -> Any:
        given = list(tensors_in((value, parameters)))
        copies, before = [x.clone() for x in given], outputs(value)
        after, effect = edit.kernel(value, *args, **parameters)
        span, result = args[1] if len(args) > 1 else None, outputs(after)
        wrote = any(differs(one, other).any() for one, other in zip(given, copies, strict=True))
        told = torch.zeros(len(before)) if effect is None else effect["rows"]
        beyond = look(before, result, inner, context, edit.site, span, told)
        seen.append(Seen(edit.site, bool(wrote), *beyond, not result.any()))
        return after, effect

    return kernel


def attention_differs(
    before: Tensor, after: Tensor, inner: Any, context: Any, site: Any, span: Any, told: Tensor
) -> tuple[bool, bool, bool]:
    """Whether live rows or heads differ that should not: see `Seen`."""
    part = slice(*span) if span is not None else slice(None)
    live = context.pack(site.tower, context.live(site.tower), dim=1)[:, part]
    other = differs(before, after).any(-1)
    if live.shape == other.shape[:2]:
        other = other & live[..., None]
    rows, heads = other.any(-1), getattr(inner, "heads", None)
    queries = getattr(inner, "queries", None)
    kept = torch.ones(other.shape[2], dtype=torch.bool)
    kept[list(range(other.shape[2]) if heads is None else heads)] = False
    beyond = False
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

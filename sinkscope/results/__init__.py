"""Results: frozen records with named axes, their tables, what is printed of them, and their files."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from sinkscope.checks import is_whole, typed
from sinkscope.errors import LayerError
from sinkscope.results.saving import Record, find, load, load_run, names_of, same, write
from sinkscope.sites import Site, in_order

__all__ = ["Record", "Result", "find", "load", "load_run", "mask_padding", "names_of", "same"]
__all__ += ["stack_layers", "tidy"]

TITLES = {"k": "rank", "d_model": "channel", "d_head": "dim"}
AXES = re.compile(r"""Tensor, ["']([^"']+)["']\]""")


class Result(Record):
    """A frozen dataclass of tensors whose jaxtyping annotations name the axes.

    ``positions``, ``queries`` or ``rows`` hold the position of every query, -1 where there is none, or None
    for 0, 1, 2, ... ``columns`` is column of the table -> field, given as ``class NormResult(Result,
    columns={"norm": "norms"})``; the first field gives the axes, and without any it is the first with axes.
    """

    columns: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, *, columns: Mapping[str, str] | None = None) -> None:
        super().__init_subclass__()
        cls.columns = cls.columns if columns is None else columns
        cls.__repr__ = cls.__repr__  # so that @dataclass writes none, which would print all numbers

    def to_dataframe(self) -> pd.DataFrame:
        """One line per entry that is not NaN; a result without axes has one line per part."""
        return self._table()

    @typed
    def save(self, path: str | Path) -> Path:
        """Write the result to one file, which `sinkscope.results.load` reads, and give its path.

        It replaces a file that was there, whole or not at all. InputError for a result with what no file can
        hold, such as a picture; CheckpointError if it cannot be written there.
        """
        return write(self, Path(path))

    def __repr__(self) -> str:
        axes, known, said = axes_of(type(self)), set(), []
        for f in fields(self):  # type: ignore[arg-type]  # a subclass is a dataclass
            value = getattr(self, f.name)
            if isinstance(value, Tensor) and f.name in axes:  # each axis once
                sizes = zip(axes[f.name], value.shape, strict=False)
                new = [f"{axis} {size}" for axis, size in sizes if axis not in known]
                known.update(axes[f.name])
                said.append(f"{f.name} [{', '.join(new)}]" if new else f.name)
            elif value is not None and not (isinstance(value, (Mapping, tuple)) and not value):
                said.append(f"{f.name} {short(value)}")
        text = f"{type(self).__name__}({', '.join(said)})"
        return text if len(text) <= 200 else f"{text[:196]}...)"

    def _repr_html_(self) -> str:
        own = type(self).to_dataframe is not Result.to_dataframe
        table = self.to_dataframe().head(20) if own else self._table(20)
        return f"<pre>{html.escape(repr(self))}</pre>{table.to_html(index=False, border=0)}"

    def _table(self, head: int | None = None) -> pd.DataFrame:
        axes = axes_of(type(self))
        columns = self.columns or {name: name for name in list(axes)[:1]}
        columns = {c: name for c, name in columns.items() if getattr(self, name) is not None}
        if not columns:
            lines: list[tuple[str, str]] = []
            for f in fields(self):  # type: ignore[arg-type]
                value = getattr(self, f.name)
                if isinstance(value, Mapping):
                    named = zip(names_of(value), value.values(), strict=True)
                    lines += [(f"{f.name}[{name!r}]", str(one)) for name, one in named]
                else:
                    lines.append((f.name, short(value)))
            return pd.DataFrame(lines, columns=["part", "content"])
        first = next(iter(columns.values()))
        shape, values = getattr(self, first).shape, {}
        for column, name in columns.items():
            index = [slice(None) if axis in axes[name] else None for axis in axes[first]]
            values[column] = getattr(self, name)[tuple(index)].expand(shape)
        # Labels are from an int field ``[batch axis]``, else from a tuple ``axes``.
        labels = {axis: getattr(self, f"{axis}s", None) for axis in axes[first]}
        labels = {axis: value for axis, value in labels.items() if isinstance(value, tuple)}
        for name in {*axes} - {*self.columns.values()}:
            value = getattr(self, name)
            if len(axes[name]) == 2 and getattr(value, "dtype", None) == torch.long:
                labels[axes[name][1]] = value
        return tidy(values, [TITLES.get(axis, axis) for axis in axes[first]], labels, head)


def axes_of(cls: Any) -> dict[str, tuple[str, ...]]:
    """The axes of every field with a jaxtyping annotation."""
    out = {}
    for f in fields(cls):
        found = getattr(f.type, "dim_str", None) or (AXES.findall(str(f.type)) or [""])[0]
        if found:
            out[f.name] = tuple(found.split())
    return out


def short(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, Mapping):
        return f"{{{', '.join(names_of(value))}}}"
    if isinstance(value, tuple) and value and isinstance(value[0], Record):
        return f"{len(value)} x {type(value[0]).__name__}"
    whole = isinstance(value, tuple) and all(type(one) is int for one in value)
    if whole and len(value) > 2 and value == tuple(range(value[0], value[-1] + 1)):
        return f"{value[0]}-{value[-1]}"
    text = type(value).__name__ if isinstance(value, Record) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def in_layers(result: Any, layers: Sequence[int]) -> Any:
    """The same result in some of its layers."""
    if wrong := [x for x in layers if not is_whole(x) or x not in result.layers]:
        raise LayerError(
            f"Got layer {wrong[0]!r}; expected some of {result.layers}, which were read."
        )
    if tuple(layers) == result.layers:
        return result
    at = [result.layers.index(layer) for layer in layers]
    stacked = [name for name, axes in axes_of(type(result)).items() if axes[1:2] == ("layer",)]
    some = {n: getattr(result, n)[:, at] for n in stacked if getattr(result, n) is not None}
    return replace(result, layers=tuple(map(int, layers)), **some)


def in_rows(result: Any, rows: Sequence[int]) -> Any:
    """The same result of some rows of the batch, or some images of the vision tower."""
    axes, some = axes_of(type(result)), {}
    for f in fields(result):
        value = getattr(result, f.name)
        if isinstance(value, Result):
            some[f.name] = in_rows(value, rows)
        elif value is not None and axes.get(f.name, ("",))[0] in ("batch", "image"):
            some[f.name] = value[list(rows)]
    return replace(result, **some)


def over_layers(result: Any, layers: Sequence[int]) -> Any:
    """The same result in all of some layers: NaN, -1 or False in those that it lacks."""
    if result.layers == tuple(layers):
        return result
    at, made = [tuple(layers).index(layer) for layer in result.layers], {}
    for name, axes in axes_of(type(result)).items():
        if axes[1:2] == ("layer",) and (old := getattr(result, name)) is not None:
            fill = (
                float("nan")
                if old.is_floating_point()
                else False
                if old.dtype == torch.bool
                else -1
            )
            made[name] = old.new_full((len(old), len(layers), *old.shape[2:]), fill)
            made[name][:, at] = old
    return replace(result, layers=tuple(layers), **made)


def stack_layers(
    answers: Mapping[Site, Any], part: str | None = None, axis: int = -1, keys: int = 0
) -> Tensor:
    """Per-site answers, or one ``part`` of each, as one tensor ``[batch layer ...]`` in forward order.
    ``axis`` is that of keys, counted from the end, and ``keys`` how many there are, if any."""
    sites = in_order(answers)
    values = [answers[site] if part is None else answers[site][part] for site in sites]
    longest = max(keys, *(value.shape[axis] for value in values))
    after = (0, 0) * (-1 - axis)
    for i, value in enumerate(values):
        if more := longest - value.shape[axis]:  # a sliding cache holds the last keys only
            values[i] = nn.functional.pad(value, (*after, more, 0), value=float("nan"))
    shapes = {tuple(value.shape): site.layer for site, value in zip(sites, values, strict=True)}
    if len(shapes) > 1:
        got = f"Got layers that give tensors of different shapes, {[*shapes]}; expected one shape to stack"
        raise LayerError(
            f"{got}. Write layers={[*shapes.values()][:1]}, and ask the other kinds apart."
        )
    return wide(torch.stack(values, dim=1))


def wide(values: Tensor) -> Tensor:
    """Whole numbers as int64 and floats as fp32: kernels send them in the smallest type that holds them."""
    if values.is_floating_point():
        return values.float()
    return values if values.dtype == torch.bool else values.long()


def mask_padding(values: Tensor, live: Tensor, dim: int) -> Tensor:
    """NaN (index -1, mask False) where ``live`` ``[batch pos]`` is False along ``dim``; the same tensor if that
    is nowhere."""
    live = live[:, -values.shape[dim] :]
    if bool(live.all()):
        return values
    shape = [live.shape[0]] + [1] * (values.ndim - 1)
    shape[dim] = live.shape[1]
    integer = False if values.dtype == torch.bool else -1
    fill = float("nan") if values.is_floating_point() else integer
    return values.masked_fill(~live.reshape(shape), fill)


def tidy(
    values: Mapping[str, Tensor],
    axes: Sequence[str],
    labels: Mapping[str, Sequence[Any] | Tensor | None],
    head: int | None = None,
) -> pd.DataFrame:
    """Tensors of one shape as a table, one line per entry that is not NaN, nor -1 in an index.

    ``values`` is column -> tensor, ``axes`` a name per axis, the first is the row. ``labels`` has for an
    axis the label of every index, or int ``[row index]`` if rows differ; other axes are numbered. ``head``
    is how many lines to make, or None for all.
    """
    keep = torch.ones_like(next(iter(values.values())), dtype=torch.bool)
    for tensor in values.values():
        if tensor.is_floating_point():
            keep &= ~tensor.isnan()
        elif tensor.dtype != torch.bool:
            keep &= tensor >= 0
    if head is not None:  # the rest is left out before anything is made of it
        flat = keep.view(-1)
        flat[int(flat.byte().argmax()) + 100 * head if flat.numel() else 0 :] = False
    places = keep.nonzero()[:head]
    table: dict[str, Any] = {}
    for i, axis in enumerate(axes):
        column, known = places[:, i], labels.get(axis)
        if isinstance(known, Tensor):
            table[axis] = known[places[:, 0], column].numpy()
        else:
            index = column.numpy()
            table[axis] = index if known is None else np.asarray(list(known))[index]
    for name, tensor in values.items():
        table[name] = tensor[tuple(places.T)].numpy()
    return pd.DataFrame(table)


def kl_of_next(base: Tensor, other: Tensor) -> Tensor:
    """``KL(base || other)`` of the next token in nats, ``[batch]``, from logits ``[batch pos vocab]``."""
    p, q = (logits[:, -1].float().log_softmax(-1) for logits in (base, other))
    return (p.exp() * (p - q)).sum(-1)

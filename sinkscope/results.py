"""Helpers that every probe result shares: stacking layers, masking padding, tidy tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from sinkscope.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.sites import Site


class Result:
    """A record without a format of its own. nnsight gives every object a `.save` that is about traces."""

    def save(self, *given: Any, **options: Any) -> NoReturn:
        """Say how to keep it.

        Raises:
            InputError: Always.
        """
        table = "x.to_dataframe().to_csv(path) for its table, or " * hasattr(self, "to_dataframe")
        raise InputError(
            f"Got save(...) on a {type(self).__name__}, which has none (nnsight's is for values inside "
            f"a trace); expected pickle. Write {table}pickle.dump(x, open(path, 'wb')) for all of it."
        )


def stack_layers(
    answers: Mapping[Site, Any], part: str | None = None, axis: int = -1, keys: int = 0
) -> Tensor:
    """Per-site answers as one tensor ``[batch layer ...]``, in forward order.

    Args:
        answers: ``{site: tensor or dict of tensors}``.
        part: Which entry of the dict.
        axis: The axis of keys, counted from the end.
        keys: How many keys there are, if there is such an axis.
    """
    sites = sorted(answers)
    values = [answers[site] if part is None else answers[site][part] for site in sites]
    longest = max(keys, *(value.shape[axis] for value in values))
    if any(value.shape[axis] < longest for value in values):
        # A sliding cache holds the last keys only: those before it are out of reach.
        behind = (0, 0) * (-1 - axis)
        values = [
            torch.nn.functional.pad(
                value, (*behind, longest - value.shape[axis], 0), value=float("nan")
            )
            for value in values
        ]
    return torch.stack(values, dim=1)


def mask_padding(values: Tensor, live: Tensor, dim: int) -> Tensor:
    """NaN (index -1, mask False) where ``live`` ``[batch pos]`` is False along ``dim``."""
    live = live[:, -values.shape[dim] :]
    shape = [live.shape[0]] + [1] * (values.ndim - 1)
    shape[dim] = live.shape[1]
    fill: Any = float("nan")
    if not values.is_floating_point():
        fill = False if values.dtype == torch.bool else -1
    return values.masked_fill(~live.reshape(shape), fill)


def tidy(
    values: Mapping[str, Tensor],
    axes: Sequence[str],
    names: Mapping[str, Sequence[Any] | Tensor | None],
) -> pd.DataFrame:
    """Tensors of one shape as a table, one line per entry that is not NaN.

    Args:
        values: Column name -> tensor; all of one shape.
        axes: A name per axis, in order; the first is the row.
        names: Axis name -> the label of every index, or int ``[row index]`` if rows differ; axes not
            named, or None, are numbered.

    Returns:
        Columns ``axes`` and ``values``.
    """
    import numpy as np
    import pandas as pd

    first = next(iter(values.values()))
    keep = torch.ones_like(first, dtype=torch.bool)
    for tensor in values.values():
        if tensor.is_floating_point():
            keep &= ~tensor.isnan()
        elif tensor.dtype != torch.bool:
            keep &= tensor >= 0
    places = keep.nonzero().numpy()
    table: dict[str, Any] = {}
    for i, axis in enumerate(axes):
        column, known = places[:, i], names.get(axis)
        if isinstance(known, torch.Tensor):
            column = known.numpy()[places[:, 0], column]
        elif known is not None:
            column = np.asarray(list(known))[column]
        table[axis] = column
    for name, tensor in values.items():
        table[name] = tensor[keep].numpy()
    return pd.DataFrame(table)


def kl_of_next(base: Tensor, other: Tensor) -> Tensor:
    """``KL(base || other)`` of the next token in nats, ``[batch]``, from logits ``[batch pos vocab]``."""
    p, q = (logits[:, -1].float().log_softmax(-1) for logits in (base, other))
    return (p.exp() * (p - q)).sum(-1)

"""Helpers that every probe result shares: stacking layers, masking padding, tidy tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.sites import Site


def stack_layers(answers: Mapping[Site, Any], part: str | None = None, axis: int = -1) -> Tensor:
    """Per-site answers as one tensor ``[batch layer ...]``, in forward order.

    Args:
        answers: ``{site: tensor or dict of tensors}``.
        part: Which entry of the dict.
        axis: The axis of keys, counted from the end.
    """
    sites = sorted(answers)
    values = [answers[site] if part is None else answers[site][part] for site in sites]
    longest = max(value.shape[axis] for value in values)
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
    values: Mapping[str, Tensor], axes: Sequence[str], names: Mapping[str, Sequence[Any]]
) -> pd.DataFrame:
    """Tensors of one shape as a table, one line per entry that is not NaN.

    Args:
        values: Column name -> tensor; all of one shape.
        axes: A name per axis, in order.
        names: Axis name -> the label of every index; axes not named are numbered.

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
        column = places[:, i]
        table[axis] = np.asarray(list(names[axis]))[column] if axis in names else column
    for name, tensor in values.items():
        table[name] = tensor[keep].numpy()
    return pd.DataFrame(table)


def at_positions(table: pd.DataFrame, axis: str, positions: Tensor) -> pd.DataFrame:
    """The table with an axis' index replaced by the position it stands for.

    Args:
        table: From `tidy`, with a column ``batch`` and a column named ``axis``.
        axis: The axis.
        positions: Int ``[batch index]``.
    """
    batch, index = (torch.tensor(table[name].to_numpy(copy=True)) for name in ("batch", axis))
    return table.assign(**{axis: positions[batch, index].numpy()})

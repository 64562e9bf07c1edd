"""Whether a value is the kind of number that an argument needs; the caller raises its own error."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, TypeGuard


def is_whole(value: Any, least: int | None = None) -> TypeGuard[int]:
    """Whether it is a whole number, of ``least`` or more; True and False are none."""
    value = _plain(value)
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and (least is None or int(value) >= least)


def is_number(
    value: Any, least: float = -math.inf, *, above: float = -math.inf, below: float = math.inf
) -> TypeGuard[float]:
    """Whether it is a finite real number, True and False left out.

    Args:
        value: Anything.
        least: The least that counts.
        above: What it must exceed.
        below: What it must stay under.
    """
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond any float
        return False
    return math.isfinite(number) and number >= least and above < number < below


def _plain(value: Any) -> Any:
    """A number of numpy or torch as one of Python; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value

"""Whether a value is the number or the switch that an argument needs."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, TypeGuard

from sinkscope.errors import InputError


def is_whole(value: Any, least: int | None = None) -> TypeGuard[int]:
    """Whether it is a whole number, of ``least`` or more; True and False are none."""
    value = plain(value)
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
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond any float
        return False
    return math.isfinite(number) and number >= least and above < number < below


def plain(value: Any) -> Any:
    """A number of numpy or torch as one of Python; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def check_flags(**given: object) -> None:
    """Refuse what is not True or False: of the text ``"False"``, Python says that it is true.

    Raises:
        InputError: If one is something else, a text, a number or None.
    """
    for name, value in given.items():
        if not isinstance(value, bool):
            raise InputError(
                f"Got {name}={value!r}; expected True or False, without quotes. Write {name}=False, or "
                "leave it out."
            )


def check_whole(least: int, **given: object) -> None:
    """Refuse what is no int of at least ``least``.

    Raises:
        InputError: If one is something else, such as True, 2.0 or a text.
    """
    for name, value in given.items():
        if not (isinstance(value, int) and is_whole(value, least)):  # it may be written as JSON
            raise InputError(f"Got {name}={value!r}; expected an int of at least {least}.")

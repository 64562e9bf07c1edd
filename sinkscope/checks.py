"""Checks of single values, each said once: whole numbers, real numbers, switches and choices."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, TypeGuard

from sinkscope.errors import InputError, SinkscopeError, nearest

Refusal = type[SinkscopeError]


def is_whole(value: Any, least: int | None = None, most: int | None = None) -> TypeGuard[int]:
    """Whether it is a whole number from ``least`` to ``most``; True and False are none."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return (least is None or int(value) >= least) and (most is None or int(value) <= most)


def is_number(
    value: Any, least: float = -math.inf, *, above: float = -math.inf, below: float = math.inf
) -> TypeGuard[float]:
    """Whether it is a finite real number, at least ``least``, over ``above`` and under ``below``."""
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
    """Refuse with an InputError what is not True or False; Python takes the text ``"False"`` for true."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise InputError(
                f"Got {name}={value!r}; expected True or False, without quotes. Write {name}=False, or "
                "leave it out."
            )


def check_whole(
    least: int,
    most: int | None = None,
    *,
    error: Refusal = InputError,
    hint: str = "",
    **given: Any,
) -> None:
    """Refuse what is no int from ``least`` to ``most``, such as True, 2.0 or a text.

    ``given`` is name -> value, ``error`` what to raise, and ``hint`` a sentence behind the message.
    """
    wanted = f"an int of at least {least}" if most is None else f"an int from {least} to {most}"
    for name, value in given.items():
        if not (isinstance(value, int) and is_whole(value, least, most)):  # JSON must hold it
            raise error(f"Got {name}={value!r}; expected {wanted}. {hint}".rstrip())


def check_number(
    least: float = -math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    error: Refusal = InputError,
    hint: str = "",
    **given: Any,
) -> None:
    """Refuse what is no finite real number in the range; see `is_number` and `check_whole`."""
    limits = (("of at least", least), ("above", above), ("below", below))
    wanted = " and ".join(f"{word} {limit:g}" for word, limit in limits if math.isfinite(limit))
    for name, value in given.items():
        if not is_number(value, least, above=above, below=below):
            text = f"Got {name}={value!r}; expected a finite number {wanted}".rstrip()
            raise error(f"{text}. {hint}".rstrip())


def check_choice(
    options: Iterable[Any], *, error: Refusal = InputError, hint: str = "", **given: Any
) -> None:
    """Refuse what is none of ``options``, and name the nearest; see `check_whole`."""
    known = tuple(options)
    for name, value in given.items():
        if not any(value is option or value == option for option in known):
            close = hint or nearest(str(value), [str(option) for option in known])
            raise error(f"Got {name}={value!r}; expected one of {known}. {close}".rstrip())

"""Checks of single values, each said once: whole numbers, real numbers, switches and choices."""

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Number, Real
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    Literal,
    NoReturn,
    TypeGuard,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from sinkscope.errors import CheckpointError, InputError, SinkscopeError, nearest

Refusal = type[SinkscopeError]
F = TypeVar("F", bound=Callable[..., Any])


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


def check_path(**given: Any) -> None:
    """Refuse with a CheckpointError a path that no file can have: empty, with a NUL, or too long."""
    for name, path in given.items():
        if not isinstance(path, (str, os.PathLike)):
            continue
        problem = "" if os.fspath(path) else "it is empty"
        try:
            os.lstat(os.path.expanduser(path))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            pass  # it may be made, or whoever reads it says so
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or str(error)
        if problem:
            got = f"Got {name}={os.fspath(path)[:60]!r}, which no file can be called ({problem})"
            raise CheckpointError(f"{got}; expected a path, such as 'folder/name'.")


def check_paths(given: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Check the arguments that an annotation calls a path; see `check_path`."""
    check_path(**{name: path for name, path in given.items() if Path in get_args(hints.get(name))})


ADVICE = {  # class that was expected -> what to write
    "LVLM": "Write lvlm = ss.LVLM(model, processor).",
    "Model": "Write lvlm = ss.LVLM(model, processor).",
    "Sample": "Write sample = lvlm.prepare(images=image, text='...').",
    "SinkTrace": "Write trace = ss.trace_sinks(lvlm, sample).",
    "Detection": "Write ss.detect(lvlm, sample, detector).",
    "Detector": "Write a rule such as ss.detectors.Norm(100.0).",
    "Calibration": "Write ss.calibrate(lvlm, samples).",
    "LSG": "Write gate = ss.LSG.for_model(lvlm, layer=10).",
    "Path": "Write the path of a file or folder.",
}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says; of collections the kind alone is looked at."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, (str, TypeVar)) or getattr(hint, "array_type", None):
        return True  # shapes have checks of their own
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(value is part or (isinstance(value, str) and value == part) for part in parts)
    kind = type(None) if hint is None else origin or hint
    if not isinstance(kind, type):
        return True
    if isinstance(value, str) and kind in (Sequence, Iterable):
        return False
    return isinstance(value, (kind, Number) if kind in (int, float) else kind)


def refuse_type(name: str, value: Any, hint: Any, error: Refusal) -> NoReturn:
    """Say what came, what was expected and what to write."""
    parts = [hint] if get_origin(hint) not in (Union, UnionType) else [*get_args(hint)]
    kinds = [get_origin(part) or part for part in parts]
    names = [getattr(kind, "__name__", str(kind)).replace("NoneType", "None") for kind in kinds]
    came = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    write = next((ADVICE[one] for one in names if one in ADVICE), "")
    raise error(f"Got {name} of type {came}; expected {' or '.join(names)}. {write}".rstrip())


def check_fields(record: Any, error: Refusal = InputError) -> None:
    """Refuse a field of a dataclass that is not of its annotated kind; see `fits`."""
    hints = hints_of(type(record))
    for field in fields(record):
        value, hint = plain(getattr(record, field.name)), hints.get(field.name, Any)
        if not fits(value, hint):
            refuse_type(field.name, value, hint, error)


def typed(function: F) -> F:
    """Refuse arguments of the wrong kind with an InputError, before any work is done; see `fits`.

    A plain model where an `LVLM` is expected, or a text where there should be a list, would else fail deep
    inside. Numbers, choices and shapes have checks of their own.
    """
    known = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given, hints = known.bind(*args, **kwargs).arguments, hints_of(function)
        for name, value in given.items():
            collected = known.parameters[name].kind in (
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            )
            if not collected and name in hints and not fits(plain(value), hints[name]):
                refuse_type(name, value, hints[name], InputError)
        check_paths(given, hints)
        return function(*args, **kwargs)

    return cast("F", call)


@functools.cache
def hints_of(what: Any) -> dict[str, Any]:
    """The annotations of a function or class; none where one cannot be resolved."""
    try:
        return get_type_hints(what)
    except (NameError, TypeError):
        return {}

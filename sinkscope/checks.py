"""Checks of single values, each said once: whole numbers, real numbers, switches and choices."""

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
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


def among(value: Any, options: Iterable[Any]) -> bool:
    """Whether it is one of the options; an array or a table is none, and compares with none."""
    single = isinstance(value := plain(value), (str, Real, tuple))
    return any(value is option or (single and value == option) for option in options)


def check_choice(
    options: Iterable[Any], *, error: Refusal = InputError, hint: str = "", **given: Any
) -> None:
    """Refuse what is none of ``options``, and name the nearest; see `check_whole`."""
    known = tuple(options)
    for name, value in given.items():
        if not among(value, known):
            close = hint or nearest(str(value), [str(option) for option in known])
            raise error(f"Got {name}={value!r}; expected one of {known}. {close}".rstrip())


WORDS: dict[Any, str] = {
    type(None): "None",
    bool: "True or False",
    str: "a text",
    int: "an int",
    float: "a number",
    Mapping: "a dict",
    Sequence: "a list",
    Iterable: "a list",
    Callable: "a function",
}
RAW = (TypeError, AttributeError, LookupError, ValueError, ArithmeticError, RuntimeError, OSError)


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
    origin, parts, value = get_origin(hint), get_args(hint), plain(value)
    if hint is Any or isinstance(hint, (str, TypeVar)) or getattr(hint, "array_type", None):
        return True  # shapes have checks of their own
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(value is part or (isinstance(value, str) and value == part) for part in parts)
    kind = type(None) if hint is None else origin or hint
    if kind is int:
        return is_whole(value)
    if kind in (Sequence, Iterable):  # an array or the values of a dict will do
        once = kind is Sequence and isinstance(value, Iterator)
        return isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and not once
    if not isinstance(kind, type) or getattr(kind, "_is_runtime_protocol", True) is False:
        return True  # a protocol that nothing can be asked for
    return isinstance(value, (Real, bool) if kind is float else kind)


def kinds_of(hint: Any) -> list[str]:
    """The kinds that an annotation allows, in the words of an error."""
    if get_origin(hint) in (Union, UnionType):
        return [word for part in get_args(hint) for word in kinds_of(part)]
    if get_origin(hint) is Literal:
        return [repr(option) for option in get_args(hint)]
    kind = get_origin(hint) or hint
    return [WORDS.get(kind, getattr(kind, "__name__", str(kind)))]


def refuse_type(name: str, value: Any, hint: Any, error: Refusal) -> NoReturn:
    """Say what came, what was expected and what to write."""
    kinds = list(dict.fromkeys(kinds_of(hint)))
    came = f" of type {type(value).__name__}"
    if isinstance(value, (str, int, float, type(None))):
        came = f"={repr(value)[:60]}"
    elif isinstance(value, type):
        came = f"={value.__name__}, a class"
    write = next((ADVICE[one] for one in kinds if one in ADVICE), "")
    raise error(f"Got {name}{came}; expected {' or '.join(kinds)}. {write}".rstrip())


def check_fields(record: Any, error: Refusal = InputError) -> None:
    """Refuse a field of a dataclass that is not of its annotated kind; see `fits`."""
    hints = hints_of(type(record))
    for field in fields(record):
        value, hint = plain(getattr(record, field.name)), hints.get(field.name, Any)
        if not fits(value, hint):
            refuse_type(field.name, value, hint, error)


def check_switches(
    given: Mapping[str, Any], hints: Mapping[str, Any], error: Refusal = InputError
) -> None:
    """Refuse what is not True or False where an annotation says bool; Python takes any text for true."""
    for name, value in given.items():
        if hints.get(name) in (bool, bool | None) and not fits(value, hints[name]):
            refuse_type(name, value, hints[name], error)


def typed(function: F) -> F:
    """Name the argument of the wrong kind where a call fails for it, as an InputError; see `fits`.

    A plain model where an `LVLM` is expected, or None for a data set, fails deep inside, in words of another
    library. Arguments that have checks of their own are refused by them, and what works is left alone.
    Switches are looked at before the call.
    """
    known = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given, hints = known.bind(*args, **kwargs).arguments, hints_of(function)
        check_switches(given, hints)
        check_paths(given, hints)
        try:
            return function(*args, **kwargs)
        except SinkscopeError:
            raise
        except RAW as error:
            explain(given, hints, error)
            raise

    return cast("F", call)


def explain(given: Mapping[str, Any], hints: Mapping[str, Any], error: Exception) -> None:
    """Refuse, because of an error of Python, the first argument or field that is not of its kind, if any."""
    for name, value in given.items():
        if name in hints and not fits(value, hints[name]):
            try:
                refuse_type(name, value, hints[name], InputError)
            except InputError as refusal:
                raise refusal from error
    for value in given.values():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if is_dataclass(one) and not isinstance(one, type):  # such as one of the probes
                explain(vars(one), hints_of(type(one)), error)


@functools.cache
def hints_of(what: Any) -> dict[str, Any]:
    """The annotations of a function or class; none where one cannot be resolved."""
    try:
        return get_type_hints(what)
    except (NameError, TypeError):
        return {}

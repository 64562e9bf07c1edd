"""A digest of a score function: a folder is not continued with another one of the same name."""

from __future__ import annotations

import dis
import functools
import hashlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from sinkscope.errors import InputError

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))
LIBRARIES = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))


def digest_function(function: Callable[..., Any]) -> str:
    """A digest of what a function computes: bytecode, constants, defaults and what it refers to.

    Values of its closure and of the module-level names it uses count as well, and functions and
    classes among them in the same way. Of modules, built-in functions and what belongs to an
    installed library the name is taken. Other versions of Python compile to other bytecode, so the
    version is part of the digest.

    Args:
        function: A function, a method, a ``functools.partial`` or an object with ``__call__``.

    Returns:
        The interpreter's tag and 32 hexadecimal digits.

    Raises:
        InputError: If it refers to a value whose content cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(function, "the score function", ()):
        digest.update(f"{len(part)} ".encode() + part)
    return f"{sys.implementation.cache_tag} {digest.hexdigest()}"


def _parts(value: Any, where: str, above: tuple[int, ...]) -> Iterator[bytes]:
    """The content of a value as bytes, each part with its kind; ``above`` are the values around it."""
    if isinstance(value, PLAIN):
        yield f"{type(value).__name__} {value!r}".encode()
    elif id(value) in above:  # a function that calls itself
        yield b"again"
    elif isinstance(value, (Tensor, np.ndarray, np.generic)):
        array = np.asarray(value.detach().cpu().double() if isinstance(value, Tensor) else value)
        yield f"array {array.dtype} {array.shape} ".encode() + array.tobytes()
    elif isinstance(value, (set, frozenset)):
        yield b"set".join(sorted(b" ".join(_parts(each, where, above)) for each in value))
    elif above and _of_a_library(value):
        name = getattr(value, "__qualname__", getattr(value, "__name__", ""))
        yield f"named {getattr(value, '__module__', '')} {name}".encode()
    else:
        yield type(value).__qualname__.encode()
        for name, inner in _inside(value, where):
            yield name.encode()
            yield from _parts(inner, f"{name} of {where}", (*above, id(value)))


def _of_a_library(value: Any) -> bool:
    """Whether a name says it all: modules, and functions and classes of what is installed."""
    if isinstance(value, (ModuleType, np.ufunc)):
        return True
    if isinstance(value, BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, (ModuleType, type))
    if not isinstance(value, (FunctionType, type)):
        return False
    top = value.__module__.partition(".")[0]
    if top in ("sinkscope", *sys.builtin_module_names):
        return True
    file = getattr(sys.modules.get(value.__module__), "__file__", None)
    return file is not None and any(folder in Path(file).parents for folder in LIBRARIES)


def _inside(value: Any, where: str) -> list[tuple[str, Any]]:
    """What a value consists of, by name.

    Raises:
        InputError: If that cannot be told.
    """
    if isinstance(value, CodeType):  # where its lines stood does not matter
        names = ("co_code", "co_names", "co_varnames", "co_freevars", "co_argcount", "co_consts")
        return [(name, getattr(value, name)) for name in names]
    if isinstance(value, FunctionType):
        cells = (cell.cell_contents for cell in value.__closure__ or ())
        return [
            ("code", value.__code__),
            ("defaults", value.__defaults__),
            ("keywords", value.__kwdefaults__),
            *zip(value.__code__.co_freevars, cells, strict=True),
            *((name, value.__globals__[name]) for name in _globals(value)),
        ]
    if isinstance(value, (tuple, list)):
        return [(str(i), each) for i, each in enumerate(value)]
    if isinstance(value, Mapping):
        return [(repr(key), each) for key, each in value.items()]
    if isinstance(value, type):
        return [("bases", value.__bases__), *_members(value)]
    if isinstance(value, BuiltinFunctionType):
        return [("name", value.__name__), ("object", value.__self__)]
    if isinstance(value, MethodType):
        own = value.__self__
        return [("function", value.__func__), ("class", type(own)), *_fields(own)]
    if isinstance(value, functools.partial):
        return [("function", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, re.Pattern):
        return [("pattern", value.pattern), ("flags", int(value.flags))]
    if isinstance(value, Enum):
        return [("member", value.name), ("value", value.value)]
    if isinstance(getattr(value, "__wrapped__", None), FunctionType):
        return [("function", value.__wrapped__)]
    if callable(value) and not _of_a_library(type(value)):
        return [("class", type(value)), *_fields(value)]
    raise InputError(
        f"Got {where}, of type {type(value).__name__}, whose content cannot be read; expected numbers, "
        "texts, tensors, lists of these or functions. Without that out= cannot tell when a sweep is "
        "continued with another score. Let the function use such values only, or write out=None."
    )


def _fields(value: Any) -> list[tuple[str, Any]]:
    """What an object holds."""
    return sorted(getattr(value, "__dict__", {}).items())


def _members(value: type) -> list[tuple[str, Any]]:
    """The functions of a class, and its values without those that Python adds."""
    out = []
    for name, member in sorted(vars(value).items()):
        member = getattr(member, "__func__", getattr(member, "fget", member))
        if isinstance(member, FunctionType) or not name.startswith("__"):
            out.append((name, member))
    return out


def _globals(function: FunctionType) -> list[str]:
    """Module-level names that a function and the functions inside it use."""
    found: set[str] = set()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        found |= {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return sorted(found & function.__globals__.keys())

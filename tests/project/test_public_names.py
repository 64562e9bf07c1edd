"""Every public name has a docstring and a place in the API reference."""

from __future__ import annotations

import importlib
import inspect
import re
from types import ModuleType

import pytest

import sinkscope
from tests.project.repository import ROOT

PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
SHOWN = [
    name
    for page in PAGES
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]
PUBLIC = [name for name in sinkscope.__all__ if not name.startswith("__")]


def module_of(name: str) -> ModuleType | None:
    """The module of that name, or None if it names something in a module."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def has_docstring(value: object) -> bool:
    """Whether somebody wrote a docstring; the signature that a dataclass gives itself is none."""
    text = inspect.getdoc(value)
    own = value.__doc__ if inspect.isclass(value) else text
    return bool(text and own and not own.startswith(f"{getattr(value, '__name__', '')}("))


def is_shown(name: str, value: object) -> bool:
    """Whether a page of the reference renders this value.

    A page renders what a module lists in `__all__`, or, where there is none, what it defines.
    """
    if isinstance(value, ModuleType):
        return value.__name__ in SHOWN
    for shown in SHOWN:
        module = module_of(shown)
        if module is None:
            if shown.rpartition(".")[2] == name:
                return True
        elif getattr(module, name, None) is value:
            listed = getattr(module, "__all__", None)
            if name in listed if listed is not None else value.__module__ == module.__name__:
                return True
    return False


@pytest.mark.parametrize("name", PUBLIC)
def test_documented(name: str) -> None:
    value = getattr(sinkscope, name)
    assert has_docstring(value), f"sinkscope.{name} has no docstring"
    assert is_shown(name, value), f"no page in docs/api shows sinkscope.{name}"


def test_public_names_are_listed_once() -> None:
    assert len(sinkscope.__all__) == len(set(sinkscope.__all__))


@pytest.mark.parametrize("shown", SHOWN)
def test_modules_in_the_reference_are_documented(shown: str) -> None:
    module = module_of(shown)
    if module is None:
        return
    assert has_docstring(module), f"{shown} has no docstring"
    for name in getattr(module, "__all__", []):
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert has_docstring(value), f"{shown}.{name} has no docstring"


def test_a_missing_docstring_is_noticed() -> None:
    assert not has_docstring(lambda: None)
    assert not has_docstring(type("Bare", (), {}))
    assert not is_shown("open", open)

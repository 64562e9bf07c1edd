"""Every public name has a docstring and a place in the API reference."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
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
ROOMS = [name for name in PUBLIC if isinstance(getattr(sinkscope, name), ModuleType)]


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
    """Whether a page of the reference renders this value."""
    if isinstance(value, ModuleType):
        return value.__name__ in SHOWN
    return any(renders(shown, name, value) for shown in SHOWN)


def renders(shown: str, name: str, value: object) -> bool:
    """Whether the directive `::: shown` renders the value of that name.

    A module's directive renders what the module lists in `__all__`, or, where there is none, what it
    defines. But the reference is made from the source: a submodule hides a function of its own name, and
    a constant without a docstring below it is left out. Both need a directive of their own.
    """
    module = module_of(shown)
    if module is None:
        home = importlib.import_module(shown.rpartition(".")[0])
        return shown.rpartition(".")[2] == name and getattr(home, name, None) is value
    listed = getattr(module, "__all__", None)
    if getattr(module, name, None) is not value or name not in (listed or vars(module)):
        return False
    if module_of(f"{shown}.{name}") is not None:
        return False
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return is_explained(name, module)
    return listed is not None or value.__module__ == module.__name__


def is_explained(name: str, module: ModuleType) -> bool:
    """Whether a string stands below the constant, in the module or where it imports it from."""
    body = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
    for node, after in pairwise([*body, ast.Pass()]):
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return is_explained(name, importlib.import_module(node.module))
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if name in {getattr(target, "id", None) for target in targets}:
            return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return False


@pytest.mark.parametrize("name", PUBLIC)
def test_documented(name: str) -> None:
    value = getattr(sinkscope, name)
    assert has_docstring(value), f"sinkscope.{name} has no docstring"
    assert is_shown(name, value), f"no page in docs/api shows sinkscope.{name}"


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_of_a_public_room_is_shown(room: str) -> None:
    module = getattr(sinkscope, room)
    listed = getattr(module, "__all__", None)
    if listed is None:
        listed = [name for name, value in vars(module).items() if _defined_in(value, module)]
    assert listed
    missing = [name for name in listed if not is_shown(name, getattr(module, name))]
    assert not missing, f"no page in docs/api shows {missing} of sinkscope.{room}"


def _defined_in(value: object, module: ModuleType) -> bool:
    return has_docstring(value) and getattr(value, "__module__", None) == module.__name__


def test_public_names_are_listed_once() -> None:
    assert len(sinkscope.__all__) == len(set(sinkscope.__all__))


def test_a_name_of_a_room_says_where_it_is() -> None:
    with pytest.raises(AttributeError, match=r"write sinkscope\.lsg\.GateConfig$"):
        getattr(sinkscope, "GateConfig")  # noqa: B009
    with pytest.raises(AttributeError, match=r"has no attribute 'nowhere'$"):
        getattr(sinkscope, "nowhere")  # noqa: B009


def test_importing_the_package_imports_no_model_library() -> None:
    heavy = "{'torch', 'transformers', 'nnsight', 'pandas', 'matplotlib'}"
    code = f"import sys, sinkscope; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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


def test_what_the_reference_leaves_out_is_noticed() -> None:
    from sinkscope import detectors, experiments

    assert renders("sinkscope.experiments", "trace_sinks", experiments.trace_sinks)
    assert renders("sinkscope.experiments", "sweep", experiments.sweep)
    assert renders("sinkscope.detectors", "SATURATION", detectors.SATURATION)
    assert not renders("sinkscope.detectors", "KNOWN", detectors.KNOWN)  # no string below it

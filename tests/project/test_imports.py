"""The rooms of the package: who may import whom. docs/architecture.md has the same table."""

from __future__ import annotations

import re
import sys
from itertools import chain
from pathlib import Path

import pytest

from scripts.count_code import circles, imports_of, names_of
from tests.project.repository import PACKAGE, ROOT, imports, tree_of

MODULES = names_of(PACKAGE)
KERNELS = sorted((PACKAGE / "kernels").rglob("*.py"))
KERNEL_IMPORTS = {"torch", "math", "typing", "__future__"}  # a server without sinkscope has these

# A room may import itself and the rooms above it in this list, and no other.
ROOMS = [
    "errors",
    "checks",
    "files",
    "sites",
    "tokens",
    "results",
    "kernels",
    "anatomy",
    "protocols",
    "viz",
    "probes",
    "interventions",
    "models",
    "bundled",
    "example",
    "detectors",
    "data",
    "training",
    "lsg",
    "scale",
    "experiments",
    "published",
    "cli",
    "lmms_eval",
]
ENTRIES = {"__init__", "__main__"}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


GRAPH = {name: imports_of(tree_of(path), MODULES) for name, path in MODULES.items()}


def test_every_room_is_listed() -> None:
    assert {room_of(module) for module in MODULES} == {*ROOMS, *ENTRIES, "testing"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_look_only_upwards(room: str) -> None:
    allowed = {*ROOMS[: ROOMS.index(room) + 1]}
    if room == "cli":
        allowed.add("testing")
    found = {
        f"{module} imports {other}"
        for module in MODULES
        if room_of(module) == room
        for other in GRAPH[module]
        if room_of(other) not in allowed
    }
    assert not found, "\n".join(sorted(found))


def test_no_circle() -> None:
    assert circles(GRAPH) == []


def test_what_checks_depends_on_nothing_that_is_checked() -> None:
    """Only `check_model` uses what it checks; what it compares with is plain torch and transformers."""
    used = {m: GRAPH[m] for m in MODULES if room_of(m) == "testing"}
    assert used["sinkscope.testing.references"] == set()
    for name in ("checking", "claims"):
        used.pop(f"sinkscope.testing.{name}")
    others = {o for few in used.values() for o in few if room_of(o) != "testing"}
    assert others == {"sinkscope.checks", "sinkscope.errors", "sinkscope.models.loading"}


def test_nnsight_stays_in_models() -> None:
    users = {m for m, path in MODULES.items() if "nnsight" in roots(path)}
    assert users, "nobody imports nnsight: imports are read wrongly"
    assert {room_of(m) for m in users} == {"models"}


def test_kernels_import_what_every_server_has() -> None:
    assert KERNELS
    for path in KERNELS:
        other = {name for name in imports(path) if not name.startswith("sinkscope.kernels")}
        unknown = {name.partition(".")[0] for name in other} - KERNEL_IMPORTS
        assert not unknown, f"{path.name} imports {unknown}, which a server may lack."


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == [["b", "c"]]


def roots(path: Path) -> set[str]:
    """The top-level packages that a file imports."""
    return {name.partition(".")[0] for name in imports(path)}


def test_what_is_imported_is_declared() -> None:
    """Every package that some module imports is a dependency, or part of an extra."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    declared = {re.split(r"[\[<>=! ]", one)[0].lower().replace("-", "_") for one in listed}
    named = {"PIL": "pillow", "sklearn": "scikit_learn", "yaml": "pyyaml"}
    found = set().union(*(roots(path) for path in MODULES.values()))
    others = found - set(sys.stdlib_module_names) - {"sinkscope"}
    assert {named.get(name, name) for name in others} <= declared

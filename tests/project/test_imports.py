"""The rooms of the package: who may import whom. docs/architecture.md has the whole table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.project.repository import PACKAGE, imports

FILES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((PACKAGE / "kernels").rglob("*.py"))
KERNEL_IMPORTS = {"torch", "math", "typing", "__future__"}  # a server without sinkscope has these

# room -> rooms it may import; rooms that are not listed may import more
ROOMS = {
    "errors": set(),
    "sites": {"errors"},
    "tokens": {"errors"},
    "folders": {"errors"},
    "bundled": {"bundled", "errors", "models"},
    "example": {"errors", "example", "folders", "models"},
    "testing": {
        "testing",
        "models",
    },  # of models only `processors`, which imports transformers alone
}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def roots(path: Path) -> set[str]:
    """The top-level packages that a file imports."""
    return {name.partition(".")[0] for name in imports(path)}


def test_nnsight_stays_in_models() -> None:
    users = {path for path in FILES if "nnsight" in roots(path)}
    assert users, "nobody imports nnsight: imports are read wrongly"
    outside = [name_of(path) for path in users if not path.is_relative_to(PACKAGE / "models")]
    assert not outside, f"{outside} import nnsight; only sinkscope/models may know it."


def test_kernels_import_what_every_server_has() -> None:
    assert KERNELS
    for path in KERNELS:
        other = {name for name in imports(path) if not name.startswith("sinkscope.kernels")}
        unknown = {name.partition(".")[0] for name in other} - KERNEL_IMPORTS
        assert not unknown, f"{name_of(path)} imports {unknown}, which a server may lack."


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_look_only_downwards(room: str) -> None:
    files = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in (room, f"{room}.py")]
    assert files
    for path in files:
        own = {name for name in imports(path) if name.startswith("sinkscope.")}
        rooms = {name.split(".")[1] for name in own}
        assert rooms <= ROOMS[room], f"{name_of(path)} imports {sorted(own)}"

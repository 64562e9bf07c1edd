"""Every tutorial runs from its first cell to its last, on models that need no hub."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.project.repository import ROOT
from tests.real_model import example_folder

TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
SECONDS_PER_CELL = 300


def test_there_are_tutorials() -> None:
    assert TUTORIALS


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_no_cell_fails(path: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, as_version=4)
    if any("load_example" in cell.source for cell in notebook.cells):
        example_folder()
    client = NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_the_saved_tutorial_was_executed(path: Path) -> None:
    """The site shows what is saved in the file."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), f"execute {path.name} from the top and save it"
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]

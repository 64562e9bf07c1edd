"""The code of the how-to pages runs, page by page, as it is printed."""

import linecache
from pathlib import Path

import pytest

from tests.project.repository import blocks

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [*sorted((DOCS / "how-to").glob("*.md")), DOCS / "paper.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page):
    found = list(blocks(page, "python"))
    assert found
    scope = {"__name__": f"how_to_{page.stem}"}
    code = "\n".join(code for code, runs in found if runs)
    name = f"<{page.name}>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    exec(compile(code, name, "exec"), scope)

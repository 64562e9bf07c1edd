"""The code of the how-to pages runs, page by page, as it is printed."""

import linecache
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [*sorted((DOCS / "how-to").glob("*.md")), DOCS / "paper.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    scope = {"__name__": f"how_to_{page.stem}"}
    code = "\n".join(blocks)
    name = f"<{page.name}>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    exec(compile(code, name, "exec"), scope)

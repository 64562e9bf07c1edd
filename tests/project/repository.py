"""Where the repository's files are, and what the documents in it show."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sinkscope"
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
    flags=re.DOTALL | re.MULTILINE,
)
INLINE = re.compile(r"`(sinkscope [a-z][^`\n]*)`")


def documents() -> list[Path]:
    """Every Markdown document that is written by hand."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path: Path, language: str) -> Iterator[tuple[str, bool]]:
    """The code blocks of a document in one language, and whether they are meant to be run."""
    for match in FENCE.finditer(path.read_text(encoding="utf-8")):
        if match["language"] == language:
            yield match["code"], match["reason"] is None


def commands(path: Path) -> Iterator[str]:
    """The shell commands of a document, from blocks and from `sinkscope ...` in the text."""
    for code, _ in blocks(path, "bash"):
        for line in code.splitlines():
            command = line.split("#")[0].strip()
            if command:
                yield command
    yield from INLINE.findall(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """The modules that a file imports when it runs; what only type checkers import is left out."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))
    return found


def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))

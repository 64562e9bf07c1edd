"""Count the package and its tests: files, lines by kind, import circles, public names, test functions.

    python scripts/count_code.py                   this checkout
    python scripts/count_code.py OTHER/CHECKOUT    another one, such as an older commit

Standard library only: nothing is imported from what is counted. Imports inside functions and for type
checkers count as imports.
"""

import argparse
import ast
import json
import statistics
from collections import Counter
from pathlib import Path


def names_of(package: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(tree: ast.AST, modules: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports anywhere."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules}
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if alias.name != "__version__":
                    found.add(full if full in modules else node.module)
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another, directly or through others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting.extend(graph[module])
        return seen

    reach = {module: reached(module) for module in graph}
    groups = {
        tuple(sorted({other for other in reach[module] if module in reach[other]}))
        for module in graph
        if module in reach[module]
    }
    return [list(group) for group in sorted(groups)]


def lines_of(text: str, tree: ast.Module) -> Counter:
    """Lines by kind: docstrings, blank, comments, imports, code."""
    lines = text.splitlines()
    docstrings: set[int] = set()
    imports: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for one in body:  # texts below constants are documentation too
                if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant):
                    docstrings.update(range(one.lineno, (one.end_lineno or 0) + 1))
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.update(range(node.lineno, (node.end_lineno or 0) + 1))
    kinds: Counter = Counter(files=1, lines=len(lines))
    for number, line in enumerate(lines, 1):
        bare = line.strip()
        kind = "code"
        if number in docstrings:
            kind = "docstrings"
        elif not bare:
            kind = "blank"
        elif bare.startswith("#"):
            kind = "comments"
        elif number in imports:
            kind = "imports"
        kinds[kind] += 1
    return kinds


def public_names(package: Path) -> int:
    """How many names the top level exports, by its stub or, in older checkouts, by ``_public.py``."""
    stub = package / "__init__.pyi"
    path = stub if stub.exists() else package / "_public.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return len(ast.literal_eval(node.value))
    return 0


def count(root: Path) -> dict[str, object]:
    """All counts of a checkout."""
    modules = names_of(root / "sinkscope")
    total: Counter = Counter()
    rooms: dict[str, Counter] = {}
    sizes: dict[str, int] = {}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        kinds = lines_of(text, tree)
        parts = path.relative_to(root / "sinkscope").parts
        rooms.setdefault(parts[0] if len(parts) > 1 else ".", Counter()).update(kinds)
        total.update(kinds)
        sizes[name] = kinds["lines"]
        graph[name] = imports_of(tree, modules)
    largest = max(sizes, key=lambda name: sizes[name])
    tests = [path.read_text(encoding="utf-8") for path in (root / "tests").rglob("*.py")]
    return {
        **total,
        "median file": statistics.median(sizes.values()),
        "largest file": f"{largest} ({sizes[largest]})",
        "over 350 lines": sorted(name for name, size in sizes.items() if size > 350),
        "circles": circles(graph),
        "public names": public_names(root / "sinkscope"),
        "test lines": sum(len(text.splitlines()) for text in tests),
        "test functions": sum(text.count("\ndef test_") for text in tests),
        "rooms": {room: dict(kinds) for room, kinds in sorted(rooms.items())},
    }


def main() -> None:
    """Print the counts as a table, or as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    found = count(arguments.root)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    rooms = found.pop("rooms")
    for name, value in found.items():
        print(f"{name:16} {value}")
    assert isinstance(rooms, dict)
    print("\nroom            files  lines   code  docstrings")
    for room, kinds in rooms.items():
        shown = [kinds.get(kind, 0) for kind in ("files", "lines", "code", "docstrings")]
        print(f"{room:16}{shown[0]:5}{shown[1]:7}{shown[2]:7}{shown[3]:12}")


if __name__ == "__main__":
    main()

"""Change one thing in a kernel at a time, and see whether the tests notice.

    python scripts/mutate_kernels.py --out mutants.json --seed 7            120 mutants drawn with seed 7
    python scripts/mutate_kernels.py --out mutants.json --seed 7 --jobs 2   two at a time; continues what is there

Each mutant is one small change of ``sinkscope/kernels`` in a copy of the package: a number, an operator, a
comparison, a negation, a call left out, a keyword left out, a branch turned round. A mutant is killed if a test
fails. Only tests that execute its statement are run, in two rounds: a few of every file, then the quickest, up to
`BUDGET` seconds. Which tests execute which statement is found first, and kept beside ``--out`` for as long as
neither the package nor the tests change. Tests that fail without any change kill nothing.

Survivors are printed as differences. Those listed in ``equivalent_mutants.json``, each with the reason why no
test can notice it, are neither run nor counted. The exit code is 1 if fewer than 90 % of the others are killed.
"""

import argparse
import ast
import copy
import difflib
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a process with a pool of threads cannot be forked

import forked_tests

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/kernels", "tests/probes", "tests/interventions", "tests/lsg/test_gate.py",
         "tests/lsg/test_attached_passes.py", "tests/experiments/test_sweep_groups.py")  # fmt: skip
EACH, QUICKEST, BUDGET = 2, 40, 40.0  # tests per file, then in all, then seconds of the rest
ENOUGH = 0.9
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}  # fmt: skip


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every node that can be changed, and how; docstrings and annotations are left alone."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
            yield node, "operator"
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield node, "comparison"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node, "number"
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, "flag"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.Invert, ast.USub)):
            yield node, "negation"
        elif isinstance(node, ast.IfExp):
            yield node, "branch"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node, "call"
            if node.keywords:
                yield node, "keyword"


def source_of(kernel: str) -> str:
    """The text of a kernel module as Python writes it, without comments."""
    text = (ROOT / "sinkscope" / "kernels" / f"{kernel}.py").read_text("utf-8")
    return ast.unparse(ast.parse(text))


def mutant(kernel: str, number: int) -> dict[str, Any] | None:
    """The kernel with its place of that number changed; None if that is no other program.

    ``name`` tells the change by its text and function, ``marks`` the statement to be executed, or the module.
    """
    source = source_of(kernel)
    tree = ast.parse(source)
    node, how = list(places(tree))[number]
    new: Any = copy.deepcopy(node)
    if how == "operator":
        new.op = SWAPS[type(new.op)]()
    elif how == "comparison":
        new.ops[0] = SWAPS[type(new.ops[0])]()
    elif how == "number":
        new.value = new.value + 1 if isinstance(new.value, int) else new.value * 2 + 1e-3
    elif how == "flag":
        new.value = not new.value
    elif how == "negation":
        new = new.operand
    elif how == "branch":
        new.body, new.orelse = new.orelse, new.body
    elif how == "call":
        new = new.func.value  # x.float() -> x
    else:
        new.keywords = new.keywords[:-1]

    function, line = around(tree, node)

    class Replace(ast.NodeTransformer):
        def visit(self, at: ast.AST) -> ast.AST:
            return new if at is node else self.generic_visit(at)

    text = ast.unparse(ast.fix_missing_locations(Replace().visit(tree)))
    before, after = source.splitlines(), text.splitlines()
    lines = list(difflib.unified_diff(before, after, "", "", "", "", 2, ""))[3:]
    if not lines:
        return None
    name = [kernel, function, *(x[0] + x[1:].strip() for x in lines if x[0] in "-+")]
    diff = "\n".join(lines)
    return {
        "kernel": kernel,
        "place": number,
        "text": text,
        "name": name,
        "diff": diff,
        "line": line,
    }


def around(tree: ast.AST, wanted: ast.AST) -> tuple[str, int | None]:
    """The function and the line of the statement that hold a node; no line for what is run at import."""
    found: tuple[str, int | None] = ("", None)

    def search(node: ast.AST, function: str, line: int | None) -> None:
        nonlocal found
        if node is wanted:
            found = function, line
        for name, part in ast.iter_fields(node):
            for child in part if isinstance(part, list) else [part]:
                if isinstance(child, ast.stmt) and name in ("body", "orelse", "finalbody"):
                    inside = not isinstance(node, ast.Module)
                    search(child, function, child.lineno if inside else None)
                elif isinstance(child, ast.AST):
                    search(child, function, line)

    for statement in tree.body if isinstance(tree, ast.Module) else ():
        search(statement, getattr(statement, "name", ""), None)
    return found


def draw(count: int, seed: int) -> list[dict[str, Any]]:
    """Mutants, drawn without putting back, from all places of all kernels."""
    known = []
    for file in sorted((ROOT / "sinkscope" / "kernels").glob("*.py")):
        many = len(list(places(ast.parse(source_of(file.stem)))))
        known += [(file.stem, number) for number in range(many)]
    order = random.Random(seed).sample(known, len(known))
    good = (one for each in order if (one := mutant(*each)) is not None)
    return [one for one, _ in zip(good, range(count), strict=False)]


def base_copy(folder: Path) -> Path:
    """A copy of what the tests need, whose kernels are written as those of mutants are."""
    tree = folder / "base"
    for name in ("sinkscope", "tests", "scripts"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    for file in (tree / "sinkscope" / "kernels").glob("*.py"):
        file.write_text(source_of(file.stem), "utf-8")
    return tree


def digests(tree: Path) -> dict[str, str]:
    """Every test file with a digest of it, of what tests share, and of the package."""
    shared = hashlib.sha256()
    tests = sorted((tree / "tests").rglob("*.py"))
    common = [file for file in tests if not file.name.startswith("test_")]
    for file in (*sorted((tree / "sinkscope").rglob("*.py")), *common, tree / "pyproject.toml"):
        shared.update(file.read_bytes())
    out = {}
    for name in TESTS:
        path = tree / name
        for file in sorted(path.glob("test_*.py")) if path.is_dir() else (path,):
            own = hashlib.sha256(file.read_bytes() + shared.digest()).hexdigest()
            out[str(file.relative_to(tree))] = own
    return out


def tests_of(tree: Path, kept: Path, jobs: int) -> dict[str, dict[str, Any]]:
    """Every test with its seconds, whether it passes, and the statements of kernels that it executes."""
    known = json.loads(kept.read_text("utf-8")) if kept.exists() else {"files": {}, "modules": []}
    now, files = digests(tree), known["files"]
    missing = [name for name, own in now.items() if files.get(name, {}).get("digest") != own]
    forked_tests.preload(known["modules"])
    chunks = [missing[at : at + 5] for at in range(0, len(missing), 5)]
    running: dict[int, Any] = {}
    while chunks or running:
        while chunks and len(running) < jobs:
            chunk = chunks.pop(0)
            made = tree.parent / f"marks-{len(chunks)}.json"
            running[forked_tests.fork(forked_tests.note_marks, tree, chunk, made)] = chunk, made
        (chunk, made), code = forked_tests.finished(running, 1200)
        if code or not made.exists():
            raise RuntimeError(f"exit {code}: {(tree / 'log.txt').read_text('utf-8')[-3000:]}")
        got = json.loads(made.read_text("utf-8"))
        for name in chunk:
            mine = {k: one for k, one in got["tests"].items() if k.split("::")[0] == name}
            files[name] = {"digest": now[name], "tests": mine}
            print(f"{name}: {len(mine)} tests", flush=True)
        known["modules"] = list(dict.fromkeys([*known["modules"], *got["modules"]]))
        kept.write_text(json.dumps(known), "utf-8")
    forked_tests.preload(known["modules"])
    return {k: one for name in now for k, one in files[name]["tests"].items()}


def order_of(one: dict[str, Any], tests: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The tests that may notice a mutant, in the order in which they are run, with their seconds."""
    mark = f"{one['kernel']}:" + ("" if one["line"] is None else str(one["line"]))
    able = {
        name: test["seconds"]
        for name, test in tests.items()
        if test["passed"]
        and any(
            hit == mark or (one["line"] is None and hit.startswith(mark)) for hit in test["hits"]
        )
    }
    quick = sorted(able, key=lambda name: able[name])
    rounds: list[list[str]] = [[], [], []]
    spent, of_file = 0.0, {}
    for name in quick:
        file = name.split("::")[0]
        of_file[file] = of_file.get(file, 0) + 1
        if of_file[file] <= EACH:
            rounds[0].append(name)
        elif len(rounds[1]) < QUICKEST:
            rounds[1].append(name)
        elif (spent := spent + able[name]) < BUDGET:
            rounds[2].append(name)
    ordered = [name for part in rounds for name in sorted(part)]  # fixtures of a file are made once
    return {name: able[name] for name in ordered}


def mutated_copy(tree: Path, one: dict[str, Any], number: int) -> Path:
    """The tree with one kernel changed; all other files are the same on disk."""
    made = tree.parent / f"mutant-{number}"
    shutil.copytree(tree, made, copy_function=os.link)
    for cache in (made / "sinkscope" / "kernels").glob("__pycache__"):
        shutil.rmtree(cache)
    for name in ("log.txt", f"sinkscope/kernels/{one['kernel']}.py"):
        (made / name).unlink(missing_ok=True)
    (made / "sinkscope" / "kernels" / f"{one['kernel']}.py").write_text(one["text"], "utf-8")
    return made


def judge_all(
    mutants: list[dict[str, Any]], tree: Path, tests: dict[str, dict[str, Any]], jobs: int
) -> Iterator[dict[str, Any]]:
    """Each mutant with its ``killer``, a test, or None; as many side by side as asked."""
    running: dict[int, Any] = {}
    todo = list(enumerate(mutants))
    while todo or running:
        while todo and len(running) < jobs:
            number, one = todo.pop(0)
            order, start = order_of(one, tests), time.monotonic()
            if not order:
                yield {**one, "killer": None, "seconds": 0.0, "tests": 0}
                continue
            made = mutated_copy(tree, one, number)
            child = forked_tests.fork(forked_tests.run_chosen, made, order)
            running[child] = one, made, start, len(order)
        if not running:
            continue
        (one, made, start, count), code = forked_tests.finished(running, 900)
        notes, log = made / "notes.txt", made / "log.txt"
        if code in (5, forked_tests.BROKEN):
            raise RuntimeError(f"exit {code}: {log.read_text('utf-8')[-3000:]}")
        said = notes.read_text("utf-8") if notes.exists() else f"nothing runs, exit {code}"
        shutil.rmtree(made)
        seconds = time.monotonic() - start
        yield {**one, "killer": said if code else None, "seconds": seconds, "tests": count}


def main() -> int:
    """Judge the mutants of a seed, and keep what is known in a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file; those killed there are not judged again"
    )
    asked = parser.parse_args()
    found = json.loads(asked.out.read_text("utf-8")) if asked.out.exists() else []
    killed = {tuple(one["name"]): one for one in found if one["killer"]}
    listed = json.loads(Path(__file__).with_name("equivalent_mutants.json").read_text("utf-8"))
    reasons = {tuple(one["change"]): one["why"] for one in listed}
    drawn = draw(asked.count, asked.seed)
    equivalent = [one for one in drawn if tuple(one["name"]) in reasons]
    counted = [one for one in drawn if tuple(one["name"]) not in reasons]
    fresh = [one for one in counted if tuple(one["name"]) not in killed]
    print(f"seed {asked.seed}: {len(drawn)} drawn, {len(fresh)} to be judged", flush=True)
    alive, start = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = base_copy(Path(folder))
        tests = tests_of(tree, asked.out.with_suffix(".tests.json"), asked.jobs)
        failing = [name for name, one in tests.items() if not one["passed"]]
        print(f"{len(tests)} tests, not used, because they fail unchanged: {failing}", flush=True)
        for at, one in enumerate(judge_all(fresh, tree, tests, asked.jobs), 1):
            alive += [one] if one["killer"] is None else []
            del one["text"]
            found = [old for old in found if old["name"] != one["name"]] + [one]
            asked.out.write_text(json.dumps(found, indent=1), "utf-8")
            said = one["killer"] or f"SURVIVED {one['tests']} tests"
            where = f"{one['kernel']}:{one['place']}"
            print(f"{at}/{len(fresh)} {where} {one['seconds']:.0f} s {said}", flush=True)
    for one in alive:
        print(f"\nsurvivor {one['kernel']}:{one['place']} {one['name'][1]}\n{one['diff']}")
    for one in equivalent:
        print(f"\nequivalent {one['name']}: {reasons[tuple(one['name'])]}")
    score = 1 - len(alive) / max(1, len(counted))
    print(
        f"\nseed {asked.seed}: of {len(drawn)} drawn {len(equivalent)} are equivalent; of the other "
        f"{len(counted)}, {len(counted) - len(alive)} were killed, {score:.1%}, "
        f"in {time.monotonic() - start:.0f} s"
    )
    return int(score < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())

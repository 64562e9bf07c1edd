"""Change one thing in a kernel at a time, and see whether the tests notice.

    python scripts/mutate_kernels.py --out mutants.json                120 mutants drawn with seed 0
    python scripts/mutate_kernels.py --out mutants.json --jobs 2       two at a time; continues what is there

Each mutant is one small change of ``sinkscope/kernels`` in a copy of the package: a number, an operator, a
comparison, a negation, a call left out, a keyword left out, an index moved. A mutant is killed if a test fails.
The tests run in the order of `TESTS`, nearest first, and stop at the first failure. Survivors are printed as
differences, to be read: each is a hole in the tests, or equivalent.
"""

import argparse
import ast
import concurrent.futures
import copy
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/kernels", "tests/probes", "tests/interventions", "tests/lsg/test_gate.py",
         "tests/lsg/test_attached_passes.py", "tests/experiments/test_sweep_groups.py")  # fmt: skip
FIRST = {  # kernel -> tests that are run before `TESTS`
    "gating": ("tests/lsg/test_gate.py", "tests/lsg/test_attached_passes.py"),
    "edits": ("tests/interventions/test_exact.py", "tests/interventions/test_together.py"),
    "edited_call": ("tests/interventions/test_exact.py", "tests/interventions/test_together.py"),
    "writes": ("tests/probes/test_writes.py",),
    "residual": ("tests/probes/test_residual.py", "tests/interventions/test_states.py"),
    "states": ("tests/interventions/test_states.py", "tests/interventions/test_registers.py"),
}
SECONDS = 900  # a run of tests that takes longer is killed: the mutant hangs
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


def changed(source: str, number: int) -> str | None:
    """The source with its place of that number changed; None if that is no other program."""
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

    class Replace(ast.NodeTransformer):
        def visit(self, at: ast.AST) -> ast.AST:
            return new if at is node else self.generic_visit(at)

    text = ast.unparse(ast.fix_missing_locations(Replace().visit(tree)))
    return None if text == ast.unparse(ast.parse(source)) else text


def draw(count: int, seed: int) -> list[tuple[str, int]]:
    """Mutants, drawn without putting back, from all places of all kernels: file and place."""
    files = sorted((ROOT / "sinkscope" / "kernels").glob("*.py"))
    known = []
    for file in files:
        many = len(list(places(ast.parse(file.read_text("utf-8")))))
        known += [(file.stem, number) for number in range(many)]
    order = random.Random(seed).sample(known, len(known))
    good = ((kernel, n) for kernel, n in order if changed(source_of(kernel), n) is not None)
    return [mutant for mutant, _ in zip(good, range(count), strict=False)]


def source_of(kernel: str) -> str:
    """The text of a kernel module."""
    return (ROOT / "sinkscope" / "kernels" / f"{kernel}.py").read_text("utf-8")


def judge(mutant: tuple[str, int]) -> dict[str, Any]:
    """Run the tests on one mutant: whether they noticed, which did, and the difference."""
    kernel, number = mutant
    before, after = ast.unparse(ast.parse(source_of(kernel))), changed(source_of(kernel), number)
    lines = difflib.unified_diff(
        before.splitlines(), str(after).splitlines(), kernel, kernel, "", "", 2, ""
    )
    start, killer = time.time(), None
    with tempfile.TemporaryDirectory(prefix="mutant-") as made:
        for name in ("sinkscope", "tests", "pyproject.toml"):
            copy_ = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy_(ROOT / name, Path(made) / name)
        (Path(made) / "sinkscope" / "kernels" / f"{kernel}.py").write_text(str(after), "utf-8")
        environment = {**os.environ, "PYTHONPATH": made, "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--no-header",
        ]
        command += dict.fromkeys((*FIRST.get(kernel, ()), *TESTS))
        try:
            done = subprocess.run(
                command, cwd=made, env=environment, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            killer = "it hangs"
        else:
            lines_ = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
            killer = (lines_ or [f"exit {done.returncode}"])[0][:160] if done.returncode else None
    diff = "\n".join(list(lines)[3:])
    return {
        "kernel": kernel,
        "place": number,
        "killer": killer,
        "diff": diff,
        "seconds": time.time() - start,
    }


def main() -> int:
    """Judge mutants one after the other or side by side, and keep what is known in a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file; what it has is not judged again"
    )
    asked = parser.parse_args()
    found = json.loads(asked.out.read_text("utf-8")) if asked.out.exists() else []
    known = {(one["kernel"], one["place"]) for one in found}
    mutants = [mutant for mutant in draw(asked.count, asked.seed) if mutant not in known]
    with concurrent.futures.ThreadPoolExecutor(asked.jobs) as pool:
        for done in concurrent.futures.as_completed([pool.submit(judge, each) for each in mutants]):
            found.append(one := done.result())
            asked.out.write_text(json.dumps(found, indent=1), "utf-8")
            state = one["killer"] or "SURVIVED"
            print(
                f"{len(found)}/{asked.count} {one['kernel']}:{one['place']} {one['seconds']:.0f} s {state}",
                flush=True,
            )
    alive = [one for one in found if one["killer"] is None]
    for one in alive:
        print(f"\nsurvivor {one['kernel']}:{one['place']}\n{one['diff']}")
    print(f"\nseed {asked.seed}: {len(found) - len(alive)} of {len(found)} killed")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())

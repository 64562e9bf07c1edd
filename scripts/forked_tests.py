"""Tests in forked processes: the heavy libraries are imported once, sinkscope anew in every child.

A child runs pytest on a copy of the tree. It may mark which statements of the kernels each test executes, or run
chosen tests in a given order until one fails.
"""

import ast
import builtins
import contextlib
import faulthandler
import gc
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HEAVY = ("beartype", "torch", "transformers", "nnsight", "pandas", "matplotlib", "sklearn")
BROKEN = 99  # exit code of a child that failed itself


def preload(names: list[str]) -> None:
    """Import what tests need and is not under test, so that children have it. No thread may be started."""
    # Plugins first: nnsight gives every object an attribute, which anyio's would stumble on later.
    plugins = [one.module for one in importlib.metadata.entry_points(group="pytest11")]
    for name in (*plugins, *HEAVY, *names):
        with contextlib.suppress(ImportError, AttributeError, RuntimeError, ValueError):
            importlib.import_module(name)


def libraries() -> list[str]:
    """The names of all imported modules that are installed, in the order of their import."""
    found = [(name, getattr(module, "__file__", None)) for name, module in sys.modules.items()]
    return [name for name, file in found if file and "site-packages" in file]


class Marks:
    """Plugin of pytest: per test its seconds, whether it passed, and the kernel statements it executed.
    What a fixture executes counts for every test that uses it."""

    def __init__(self, kernels: Path) -> None:
        self.kernels, self.hits, self.of_fixture = kernels, set(), {}
        self.tests: dict[str, dict[str, Any]] = {}
        builtins._executed_ = lambda mark: self.hits.add(mark)  # type: ignore[attr-defined]
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Kernels are compiled with marks; their source stays what it is."""
        package, _, stem = name.rpartition(".")
        if package != "sinkscope.kernels":
            return None
        file = str(self.kernels / f"{stem}.py")
        return importlib.util.spec_from_file_location(name, file, loader=Marking(name, file))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        """Keep apart what a fixture executes."""
        outside, self.hits = self.hits, set()
        try:
            return (yield)
        finally:
            self.of_fixture.setdefault(fixturedef.argname, set()).update(self.hits)
            self.hits = outside

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        """Note what one test executes."""
        self.hits, start = set(), time.perf_counter()
        one = self.tests[item.nodeid] = {"passed": True}
        answer = yield
        hits = self.hits.union(*(self.of_fixture.get(name, ()) for name in item.fixturenames))
        one |= {"seconds": time.perf_counter() - start, "hits": sorted(hits)}
        return answer

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note whether a test failed."""
        if report.failed:
            self.tests[report.nodeid]["passed"] = False


class Marking(importlib.machinery.SourceFileLoader):
    """Compiles a module so that every statement of its functions is noted when it is executed."""

    def get_code(self, fullname: str) -> Any:
        """Never from a cache, and never into it."""
        tree = ast.parse(Path(self.path).read_text("utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            for part in ast.walk(node):
                for name in ("body", "orelse", "finalbody"):
                    block = getattr(part, name, None)
                    if isinstance(block, list) and not hasattr(part, f"marked_{name}"):
                        setattr(part, name, self.marked(block, Path(self.path).stem))
                        setattr(part, f"marked_{name}", True)
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)

    @staticmethod
    def marked(block: list[ast.stmt], stem: str) -> list[ast.stmt]:
        """A block with a mark before every statement but its docstring."""
        out: list[ast.stmt] = []
        for at, statement in enumerate(block):
            text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if not (at == 0 and text):
                mark = ast.parse(f"_executed_('{stem}:{statement.lineno}')").body[0]
                out.append(ast.copy_location(mark, statement))
            out.append(statement)
        return out


class Chosen:
    """Plugin of pytest: run the tests of ``seconds`` in its order, and write down how it goes.
    A test that takes ten times as long as it should, and 20 seconds more, ends the process."""

    def __init__(self, seconds: dict[str, float], notes: Path) -> None:
        self.seconds, self.notes = seconds, notes

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Leave out and sort."""
        rank = {name: at for at, name in enumerate(self.seconds)}
        items[:] = sorted(
            (item for item in items if item.nodeid in rank), key=lambda item: rank[item.nodeid]
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Start the clock."""
        self.notes.write_text(f"hangs or crashes in {nodeid}", "utf-8")
        faulthandler.dump_traceback_later(20 + 10 * self.seconds[nodeid], exit=True)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note the failure."""
        if report.failed:
            self.notes.write_text(f"{report.when} of {report.nodeid}", "utf-8")

    def pytest_sessionfinish(self) -> None:
        """Stop the clock."""
        faulthandler.cancel_dump_traceback_later()


def run_pytest(tree: Path, files: list[str], plugin: Any, *options: str) -> int:
    """Pytest on a copy of the tree, in this process, with its output in ``log.txt`` there."""
    os.setsid()
    log = os.open(tree / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = str(tree)
    code = pytest.main(["-q", "-p", "no:cacheprovider", *options, *files], plugins=[plugin])
    if not str(sys.modules["sinkscope"].__file__).startswith(str(tree)):
        raise RuntimeError(f"sinkscope is that of {sys.modules['sinkscope'].__file__}")
    return int(code)


def note_marks(tree: Path, files: list[str], out: Path) -> int:
    """Child: the marks of all tests in ``files``, and the libraries they imported."""
    marks = Marks(tree / "sinkscope" / "kernels")
    code = run_pytest(tree, files, marks)
    out.write_text(json.dumps({"tests": marks.tests, "modules": libraries()}), "utf-8")
    return int(code not in (0, 1))  # failed tests are known by name


def run_chosen(tree: Path, seconds: dict[str, float]) -> int:
    """Child: the tests of ``seconds`` until one fails; ``notes.txt`` in the tree tells which."""
    files = list(dict.fromkeys(name.split("::")[0] for name in seconds))
    return run_pytest(tree, files, Chosen(seconds, tree / "notes.txt"), "-x")


def fork(child: Callable[..., int], *args: Any) -> int:
    """Start ``child(*args)`` in a process of its own, whose number is given."""
    sys.stdout.flush()
    gc.freeze()  # what the libraries hold is not searched again by every child
    number = os.fork()
    if number:
        return number
    code = BROKEN
    try:
        code = child(*args)
    except (Exception, SystemExit):  # noqa: BLE001  the parent reads it in the log
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def finished(running: dict[int, Any], seconds: float) -> tuple[Any, int]:
    """Wait for one of the children: what was kept under its number, and its exit code."""
    limit = time.monotonic() + seconds
    while True:
        number, status = os.waitpid(-1, os.WNOHANG)
        if number in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(number, signal.SIGKILL)  # what it started
            return running.pop(number), os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            for one in running:
                os.killpg(one, signal.SIGKILL)
            limit += seconds
        time.sleep(0.05)

"""What the documents show works: commands exist, code runs, links and versions agree."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import matplotlib
import pytest

import sinkscope
from sinkscope.cli import app
from tests.project.repository import FENCE, ROOT, blocks, commands, documents
from tests.real_model import example_folder

README = ROOT / "README.md"
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")

COMMANDS = sorted({tuple(shlex.split(line)) for path in documents() for line in commands(path)})


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_has_one_command_for_the_main_job_and_one_for_the_tests() -> None:
    shown = [command for command in commands(README) if "bootstrap" in command]
    assert shown == ["python3 scripts/bootstrap.py demo", "python3 scripts/bootstrap.py test"]


def test_bootstrap_commands_name_jobs(bootstrap) -> None:
    shown = [words for words in COMMANDS if words[0] == "python3"]
    assert shown
    for _, script, job, *_ in shown:
        assert (ROOT / script).is_file(), script
        assert job in bootstrap.JOBS, job


def test_sinkscope_commands_are_understood() -> None:
    shown = [words for words in COMMANDS if words[0] == "sinkscope"]
    assert {words[1] for words in shown} >= {"demo", "trace", "doctor"}
    for words in shown:
        app.parse_args(words[1:], exit_on_error=False)  # an error if it does not know them


def test_python_blocks_parse() -> None:
    for path in documents():
        for code, _ in blocks(path, "python"):
            compile(code, name_of(path), "exec")


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/quickstart.md",
        "docs/detectors.md",
        "docs/published.md",
        "docs/api/results.md",
    ],
)
def test_python_blocks_run(name: str, monkeypatch, tmp_path) -> None:
    """In order, in one namespace, on models that need no hub; nothing may be left undefined."""
    if any("load_example" in code for code, runs in blocks(ROOT / name, "python") if runs):
        example_folder()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    namespace: dict = {}
    ran = 0
    for code, runs in blocks(ROOT / name, "python"):
        if runs:
            exec(compile(code, name, "exec"), namespace)
            ran += 1
    assert ran


def test_fences_are_found() -> None:
    """Else the tests above would pass because they read documents wrongly."""
    text = "a\n<!-- not run: why -->\n```python\nx\n```\n\n```bash\ny\n```\n"
    found = [(m["language"], m["code"], m["reason"]) for m in FENCE.finditer(text)]
    assert found == [("python", "x\n", "why"), ("bash", "y\n", None)]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_between_files_lead_somewhere(name: str) -> None:
    """The site's own links are checked by `mkdocs build --strict`."""
    for target in LINK.findall((ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), f"{name} links to {target}"


def test_one_version() -> None:
    stated = re.search(r'^version = "(.+)"$', _read("pyproject.toml"), flags=re.MULTILINE)[1]
    assert sinkscope.__version__ == stated
    assert f"\n## {stated}" in _read("CHANGELOG.md")
    assert f"\nversion: {stated}\n" in _read("CITATION.cff")


def test_ruff_has_one_version() -> None:
    pinned = re.search(r'"ruff==(.+?)"', _read("pyproject.toml"))[1]
    assert f"rev: v{pinned} " in _read(".pre-commit-config.yaml")


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")

"""`scripts/bootstrap.py` without its slow parts: when it installs, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import subprocess

import pytest

from tests.project.repository import ROOT


@pytest.fixture
def bootstrap(monkeypatch, tmp_path):
    """The script on a repository of its own; commands are recorded instead of run."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_text("a")
    (tmp_path / "constraints.txt").write_text("b")
    module.ran, module.status = [], 0

    def record(command, **options):
        module.ran.append(command)
        return module.status

    monkeypatch.setattr(module, "ROOT", str(tmp_path))
    monkeypatch.setattr(subprocess, "call", record)
    return module


def test_installs_once(bootstrap, tmp_path) -> None:
    bootstrap.install("python", str(tmp_path), ("dev",))
    bootstrap.install("python", str(tmp_path), ("dev",))
    bootstrap.install("python", str(tmp_path), ())
    assert len(bootstrap.ran) == 1
    assert bootstrap.ran[0][-2:] == ["-e", f"{tmp_path}[dev]"]
    assert str(tmp_path / "constraints.txt") in bootstrap.ran[0]


def test_installs_again_for_other_extras_or_other_versions(bootstrap, tmp_path) -> None:
    bootstrap.install("python", str(tmp_path), ("dev",))
    bootstrap.install("python", str(tmp_path), ("docs",))
    assert bootstrap.ran[-1][-1] == f"{tmp_path}[dev,docs]"
    (tmp_path / "constraints.txt").write_text("torch==3")
    bootstrap.install("python", str(tmp_path), ("docs",))
    assert len(bootstrap.ran) == 3


def test_a_failed_install_does_not_look_finished(bootstrap, tmp_path) -> None:
    bootstrap.install("python", str(tmp_path), ())
    bootstrap.status = 1
    with pytest.raises(SystemExit, match="pip failed"):
        bootstrap.install("python", str(tmp_path), ("dev",))
    bootstrap.status = 0
    bootstrap.install("python", str(tmp_path), ())
    assert len(bootstrap.ran) == 3
    assert json.loads((tmp_path / "sinkscope-installed.json").read_text())["extras"] == []


def test_never_clears_a_folder_that_is_no_environment(bootstrap, tmp_path) -> None:
    with pytest.raises(SystemExit, match="holds other things"):
        bootstrap.make_environment(str(tmp_path))
    assert bootstrap.ran == []


def test_says_what_to_do_without_the_venv_module(bootstrap, tmp_path) -> None:
    bootstrap.status = 1
    with pytest.raises(SystemExit, match="apt install python3-venv"):
        bootstrap.make_environment(str(tmp_path / "new"))


def test_runs_everything_and_names_what_failed(bootstrap, tmp_path) -> None:
    bootstrap.status = 1
    commands = [[bootstrap.PYTHON, "-m", "ruff"], [bootstrap.SINKSCOPE, "demo"]]
    failed = bootstrap.run(commands, "py", str(tmp_path), str(tmp_path))
    assert failed == ["ruff", "sinkscope demo"]
    assert bootstrap.ran[0] == ["py", "-m", "ruff"]


def test_refuses_an_old_python(bootstrap, monkeypatch) -> None:
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 8, 0))
    with pytest.raises(SystemExit, match=r"needs Python 3\.10 or newer and this is 3\.8"):
        bootstrap.main()


@pytest.mark.parametrize("job", ["demo", "test", "docs"])
def test_the_example_is_fetched_for_the_jobs_that_use_it(
    bootstrap, monkeypatch, tmp_path, job
) -> None:
    monkeypatch.setattr(bootstrap, "make_environment", lambda folder: "py")
    monkeypatch.setattr(bootstrap.sys, "argv", ["bootstrap.py", "--venv", str(tmp_path), job])
    bootstrap.main()
    fetching = ["py", "-m", "sinkscope.example"]
    assert bootstrap.ran.count(fetching) == (job != "docs")
    if job != "docs":  # after the install and before the job
        assert bootstrap.ran.index(fetching) == len(bootstrap.ran) - 2 == 1


def test_it_goes_on_without_the_example(bootstrap, capsys) -> None:
    bootstrap.status = 1
    bootstrap.fetch_example("py")
    assert "could not be fetched; the reason is above. Going on" in capsys.readouterr().out
    bootstrap.status = 0
    bootstrap.fetch_example("py")
    assert capsys.readouterr().out == ""

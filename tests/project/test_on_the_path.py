"""The package works from its folder, without being installed."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import sinkscope
from sinkscope.files import version_of

HIDDEN = """
import importlib.metadata as metadata

real = metadata.Distribution.from_name.__func__

def hidden(cls, name):
    if name == "sinkscope":
        raise metadata.PackageNotFoundError(name)
    return real(cls, name)

metadata.Distribution.from_name = classmethod(hidden)
try:
    metadata.version("sinkscope")
except metadata.PackageNotFoundError:
    print("hidden")

import sinkscope as ss

lvlm = ss.load_bundled()
items = list(ss.bundled.scene_questions(2, 4))
rule = ss.detectors.NoSinks("none")
made = ss.sweep(lvlm, items, layers=[1], grid=[(0.5, 0.5)], v_detector=rule)
print(made.settings["versions"]["sinkscope"])
print(dict(ss.testing.check_model(lvlm).facts)["versions"])
"""


def test_a_sweep_needs_no_installed_package(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(sinkscope.__file__).parents[1])}
    how = {"capture_output": True, "text": True, "env": env, "cwd": tmp_path, "check": False}
    made = subprocess.run([sys.executable, "-c", HIDDEN], **how)
    assert made.returncode == 0, made.stderr
    lines = made.stdout.splitlines()
    assert lines[:2] == ["hidden", sinkscope.__version__]
    assert lines[2].startswith(f"sinkscope {sinkscope.__version__}, torch ")


def test_versions_are_those_of_the_metadata_or_else_of_the_source(monkeypatch):
    import torch

    def none(package):
        raise PackageNotFoundError(package)

    before = version_of("torch")
    monkeypatch.setattr("sinkscope.files.metadata.version", none)
    assert version_of("torch") == before == str(torch.__version__)
    assert version_of("colorsys") == "not installed"  # has none
    with pytest.raises(ModuleNotFoundError):
        version_of("no_such_package")

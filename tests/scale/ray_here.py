"""Ray for tests: skipped with the reason where it is not installed; in CI that is a failure."""

import importlib.util
import os

import pytest


def need_ray():
    if importlib.util.find_spec("ray") is None and os.environ.get("CI", "").lower() not in (
        "true",
        "1",
    ):
        pytest.skip("ray is not installed: pip install 'sinkscope[ray]'", allow_module_level=True)

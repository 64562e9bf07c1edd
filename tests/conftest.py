import beartype  # noqa: F401  nnsight must be imported after beartype, never before

import os
import warnings

import pytest
import torch

warnings.filterwarnings("ignore", message=".*requires torchvision.*")

os.environ["SINKSCOPE_KEEP_ANATOMY"] = "0"  # every model is measured; test_kept.py keeps
torch.set_num_threads(1)  # tests run side by side; more threads only fight

import sinkscope as ss  # noqa: E402
from sinkscope.models import runs  # noqa: E402
from sinkscope.testing import TINY, random_image  # noqa: E402

FAMILIES = tuple(TINY)


def pytest_addoption(parser):
    parser.addoption("--engine", choices=("hooks", "nnsight"), default="hooks", help="of runs here")


def pytest_configure(config):
    runs.DEFAULT = config.getoption("--engine")


@pytest.fixture(scope="session")
def tiny():
    """``tiny(family, attn_implementation="sdpa") -> LVLM``, built once per session."""
    made = {}

    def get(family, attn_implementation="sdpa", dtype=torch.float32):
        key = (family, attn_implementation, dtype)
        if key not in made:
            model, processor = TINY[family](attn_implementation=attn_implementation, dtype=dtype)
            made[key] = ss.LVLM(model, processor)
        return made[key]

    return get


@pytest.fixture(scope="session")
def batch():
    """``batch(lvlm)``: two rows of unequal length, the second with two images of other shapes."""

    def make(lvlm):
        return lvlm.prepare(
            images=[random_image(96, 120, 0), [random_image(70, 64, 1), random_image(120, 60, 2)]],
            text=["what is it", "how many red shapes are in the two pictures ?"],
        )

    return make

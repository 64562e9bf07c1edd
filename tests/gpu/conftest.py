"""Where the checks run: on a CUDA device, else skipped, or rehearsed on the CPU with SINKSCOPE_GPU_REHEARSAL=1."""

import os
from dataclasses import replace

import pytest
import torch

import sinkscope as ss
from sinkscope.testing import TINY

REASON = "needs a CUDA device; SINKSCOPE_GPU_REHEARSAL=1 runs the same checks on the CPU"


@pytest.fixture(scope="session")
def device():
    if not torch.cuda.is_available():
        if not os.environ.get("SINKSCOPE_GPU_REHEARSAL"):
            pytest.skip(REASON)
        yield torch.device("cpu")
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # convolutions of fp32 as on a CPU
    yield torch.device("cuda", 0)
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session")
def on(device):
    """``on(family, dtype, kernel="sdpa") -> LVLM`` on the device, built once per session."""
    made = {}

    def get(family="llava-clip-llama", dtype=torch.float32, kernel="sdpa"):
        if (family, dtype) not in made:
            module, processor = TINY[family](dtype=dtype)
            module.generation_config.eos_token_id = None  # so that every row grows to the end
            made[family, dtype] = ss.LVLM(module.to(device), processor, verify=False)
        made[family, dtype].module.set_attn_implementation(kernel)
        return made[family, dtype]

    return get


@pytest.fixture
def moved(device):
    """``moved(sample)``: the same sample with its inputs on the device, as a plain pass wants them."""

    def move(sample):
        inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in sample.inputs.items()}
        return replace(sample, inputs=inputs)

    return move

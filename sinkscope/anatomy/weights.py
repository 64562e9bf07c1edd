"""Where the weights of a part are, where and in which dtype it computes, and whether it rounds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sinkscope.errors import ModelError
from sinkscope.kernels.writes import quantised


def hooks_of(part: nn.Module) -> list[Any]:
    """The hooks by which accelerate moves the weights of a part and what it is given, in their order."""
    hook = getattr(part, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if one is not None]


def device_of(part: nn.Module) -> torch.device:
    """Where a part computes; offloaded weights lie elsewhere between two passes."""
    for one in hooks_of(part):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(part.parameters()).device


def dtype_of(part: nn.Module) -> torch.dtype:
    """The dtype in which a part computes: that of its first weights that are no integers."""
    return next(p.dtype for p in part.parameters() if p.is_floating_point())


def rounds(part: nn.Module) -> bool:
    """Whether a part has quantised weights, whose maps may round what they read."""
    return any(map(quantised, part.parameters()))


def check_graph(module: nn.Module) -> None:
    """Refuse a model with weights through which no gradient passes, for it would be wrong and nothing said so.

    These are 4-bit ones of bitsandbytes on a CPU with a kernel for them, into whose order they are packed.
    """
    for path, part in module.named_modules():
        weight, kernel = getattr(part, "weight", None), "support_avx512bf16_for_cpu"
        four_bit = getattr(weight, "quant_state", None) is not None and getattr(part, kernel, False)
        if isinstance(weight, torch.Tensor) and four_bit and weight.device.type == "cpu":
            got = f"Got 4-bit weights at {path} on a CPU whose kernel passes no gradient; expected"
            write = "Load the model in 8 bit, without quantisation, or on a GPU."
            raise ModelError(f"{got} weights that pass one. {write}")


@contextmanager
def fetched(part: nn.Module) -> Iterator[None]:
    """Have the weights of a part where it computes, also those that accelerate offloads, until the block ends."""
    offloading = [hook for hook in hooks_of(part) if getattr(hook, "offload", False)]
    for hook in offloading[:1]:  # those of a chain all put the same weights there
        hook.pre_forward(part)
    try:
        yield
    finally:
        for hook in offloading[:1]:
            hook.post_forward(part, None)

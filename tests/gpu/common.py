"""What the checks of a device share."""

import torch

from sinkscope.testing import random_image

FAMILIES = ("llava-clip-llama", "llava-siglip-qwen3", "qwen2.5-vl", "gemma3")
GROUPS = {"image": "image", "text": "text", "first": "first"}


def single(lvlm):
    """One row without padding, for which kernels need no mask."""
    return lvlm.prepare(random_image(96, 120, 3), "what is it")


def plain(lvlm, sample):
    with torch.no_grad():
        return lvlm.module(**sample.inputs).logits


def far(got, want, where=None):
    """The largest difference, of what is nowhere NaN in one of them only."""
    got, want = got.float().cpu(), want.float().cpu()
    assert got.shape == want.shape
    if where is not None:
        got, want = (x[where.expand_as(x)] for x in (got, want))
    assert torch.equal(got.isnan(), want.isnan())
    return float((got - want).abs().nan_to_num().max())


def tensors(thing):
    """All tensors in a result or a run, whatever holds them."""
    if torch.is_tensor(thing):
        yield thing
    parts = thing.values() if isinstance(thing, dict) else getattr(thing, "__dict__", {}).values()
    for part in thing if isinstance(thing, list | tuple) else parts:
        yield from tensors(part)

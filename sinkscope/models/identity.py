"""Which model this is: layout, sizes and a digest of the weights that is cheap to take."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM

SAMPLES = 32
"""Values read of every tensor, evenly spaced."""


@torch.no_grad()
def weights_digest(module: nn.Module, samples: int = SAMPLES) -> str:
    """A digest of names, shapes, dtypes and a few values of every parameter and buffer.

    Another checkpoint of the same architecture has another digest. It is no proof against a change
    of single weights: only some of them are read.

    Args:
        module: The model.
        samples: Values read of every tensor.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        if flat.numel():
            at = torch.linspace(
                0, flat.numel() - 1, min(samples, flat.numel()), dtype=torch.float64
            )
            values = flat[at.round().long().to(flat.device)].double().cpu()
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def identity_of(lvlm: LVLM) -> dict[str, Any]:
    """What must agree for two runs to be runs of one model, as plain values.

    Args:
        lvlm: The model.
    """
    anatomy = lvlm.anatomy
    return {
        "class": type(lvlm.module).__name__,
        "layout": [list(x) if isinstance(x, tuple) else x for x in anatomy.fingerprint],
        "kernels": [anatomy.vision.kernel, anatomy.language.kernel],
        "weights": weights_digest(lvlm.module),
    }

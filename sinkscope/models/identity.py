"""Which model this is: layout, sizes, and digests of weights and preparation that are cheap to take."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from PIL import Image
from torch import Tensor, nn

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM

SAMPLES = 32
"""Values read of every tensor, evenly spaced."""
ASKED = "What is it, and how many are there: 0, 1 or 23?"
"""A question that is prepared to see what the template and the tokenizer make of one."""


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
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        with align_module_device(part):  # which fetches offloaded weights
            flat = getattr(part, leaf).detach().reshape(-1)
        if flat.numel():
            at = torch.linspace(
                0, flat.numel() - 1, min(samples, flat.numel()), dtype=torch.float64
            )
            values = flat[at.round().long().to(flat.device)].double().cpu()
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def preparation_digest(lvlm: LVLM) -> str | None:
    """A digest of how images and questions become model inputs; None without a processor.

    It takes the settings of the image processor (sizes, means, resampling), the token ids of a fixed
    question about a fixed image, with the chat template around it, and the shapes of what comes out.
    Pixels themselves are not taken: their last bits may differ between machines.

    Args:
        lvlm: The model.

    Returns:
        32 hexadecimal digits.
    """
    if lvlm.processor is None:
        return None
    processor: Any = lvlm.processor
    images = getattr(processor, "image_processor", None)
    sample = lvlm.prepare(images=Image.new("RGB", (112, 90), (200, 120, 40)), text=ASKED)
    shapes = {
        name: [list(value.shape), str(value.dtype)]
        for name, value in sample.inputs.items()
        if isinstance(value, Tensor)
    }
    parts = {
        "classes": [type(x).__name__ for x in (processor, images, lvlm.tokenizer)],
        "images": None if images is None else images.to_dict(),
        "ids": sample.tokens.ids.tolist(),
        "shapes": shapes,
    }
    text = json.dumps(parts, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


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
        "preparation": preparation_digest(lvlm),
    }

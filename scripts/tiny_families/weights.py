"""Random weights under which a tiny model behaves like a trained one in one respect: its attention is not uniform."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

_GATE = re.compile(r"(.*_)?gate|alpha_.*|.*_alpha")
_WIDTHS_LAST = ("experts", "embed", "position", "latent", "quer")  # stacks of matrices or rows


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter of a model random values that keep states near size 1.

    Embeddings have size 1, matrices a gain of about 1.6, and vectors such as norm weights and biases keep the value
    they are initialised with, plus a tenth. Learned sinks and the gates of cross-attention start at 0 in
    `transformers`, where they would hide what they do; here they do not.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        kind = name.rsplit(".", 1)[-1]
        if kind == "sinks":
            parameter.copy_(noise)
        elif _GATE.fullmatch(kind):
            parameter.copy_(0.7 + 0.2 * noise)
        elif parameter.ndim < 2:
            start = torch.where(parameter.isfinite(), parameter, 0.0)
            parameter.copy_(start + 0.1 * noise)
        elif parameter.ndim == 2 and "embed" in name:
            parameter.copy_(noise)
        else:
            stacked = any(word in name for word in _WIDTHS_LAST)
            width = parameter.shape[-1] if stacked else parameter[0].numel()
            parameter.copy_(noise * (1.6 / math.sqrt(width)))

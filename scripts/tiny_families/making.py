"""The last step of building: a model of a class, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from tiny_families.weights import randomize


def made(kind: type[nn.Module], config: PreTrainedConfig, attn: str) -> Any:
    """Make a model of a class and give it random weights."""
    config._attn_implementation = attn
    torch.manual_seed(0)
    model = kind(config)
    randomize(model)
    return model.eval()

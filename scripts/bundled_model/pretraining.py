"""Stage 1 of the bundled model's training: what the vision tower learns before it meets words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bundled_model.packing import patch_truth, pixels_of
from sinkscope.bundled.scenes import BACKGROUNDS, COLOURS, GRID, MAX_OBJECTS, SHAPES, Scene


class VisionHeads(nn.Module):
    """What stage 1 asks of the tower: patches at block -2, the whole image at CLS."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {"colour": 1 + len(COLOURS), "shape": 1 + len(SHAPES), "row": GRID, "column": GRID}
        self.patch = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.count = nn.Linear(width, MAX_OBJECTS + 1)
        self.background = nn.Linear(width, len(BACKGROUNDS))


def patch_loss(heads: VisionHeads, patches: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Which place each patch lies in and what stands there; `patches` is `[batch patch d_model]`."""
    truths = [patch_truth(scene) for scene in scenes]
    states, loss = patches.flatten(0, 1), patches.new_zeros((), dtype=torch.float32)
    for name, head in heads.patch.items():
        wanted = torch.from_numpy(np.stack([truth[name] for truth in truths])).flatten()
        weight = 3.0 if name == "shape" else 1.0  # by far the slowest to learn
        loss = loss + weight * cross_entropy(head(states).float(), wanted.to(states.device))
    return loss


def vision_loss(tower: nn.Module, heads: VisionHeads, scenes: Sequence[Scene]) -> Tensor:
    """Sum of the stage-1 losses, a scalar."""
    device = heads.count.weight.device
    output = tower(pixels_of(scenes).to(device), output_hidden_states=True)
    summary = output.pooler_output
    counts = torch.tensor([scene.count for scene in scenes], device=device)
    grounds = torch.tensor([list(BACKGROUNDS).index(s.background) for s in scenes], device=device)
    loss = patch_loss(heads, output.hidden_states[-2][:, 1:], scenes)
    loss = loss + cross_entropy(heads.count(summary).float(), counts)
    return loss + cross_entropy(heads.background(summary).float(), grounds)

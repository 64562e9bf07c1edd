"""What an image processor would make of images of several shapes, by hand: one maker for each form of input.

A maker takes a model's config and the number of a shape and gives a `Pictures`, or None where the type has no such shape:

0. one image; not square where the type lets images keep their shape
1. one image of another shape: another grid of patches, or several tiles
2. two images in one row of text, of different shapes where the type lets them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIDE = 48  # pixels of a fixed image or of a tile
PATCH = 8
GRIDS = (
    [(4, 6)],
    [(8, 4)],
    [(4, 6), (6, 8)],
)  # rows and columns of patches of each image, per shape
SIZES = ([(40, 90)], [(90, 40)], [(40, 90), (90, 90)])  # pixels before tiling: 2, 2, 2 and 4 tiles


@dataclass(frozen=True)
class Pictures:
    """The image side of a model's inputs.

    Attributes:
        tensors: What the model's forward pass takes.
        runs: In how many runs of image tokens the row of text holds them.
        tokens: How many image tokens each run has; None where the model's image features tell.
    """

    tensors: dict[str, Any]
    runs: int = 1
    tokens: tuple[int, ...] | None = None


Maker = Callable[[Any, int], Pictures | None]


def noise(*shape: int) -> Tensor:
    """Make pixels of normal noise, the same for the same shape."""
    seed = sum(size * (place + 1) for place, size in enumerate(shape))
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

"""From the pixels of the user's image to the patch grid that the model sees, and back.

Boxes are ``x0 y0 x1 y1`` with the origin at the top left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.errors import InputError


@dataclass(frozen=True)
class Frame:
    """How one image lies on its patch grid.

    Attributes:
        rows: Patch rows.
        columns: Patch columns.
        patch: Patch side in model-input pixels.
        scale: Original pixels per input pixel, ``(x, y)``.
        offset: Original pixel at the input's top left corner, ``(x, y)``.
        original: Whether scale and offset lead to the user's image (else to the model's input).
    """

    rows: int
    columns: int
    patch: int
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    original: bool = False

    def boxes(self) -> Float[Tensor, "row column 4"]:
        """The pixel box of every patch."""
        size = torch.tensor([self.patch * s for s in self.scale])
        start = torch.tensor(self.offset)
        x0 = start[0] + torch.arange(self.columns) * size[0]
        y0 = start[1] + torch.arange(self.rows) * size[1]
        grid_y, grid_x = torch.meshgrid(y0, x0, indexing="ij")
        return torch.stack([grid_x, grid_y, grid_x + size[0], grid_y + size[1]], dim=-1)


Sizes = Sequence[tuple[int, int]] | None
FrameReader = Callable[[Any, Any, Mapping[str, Tensor], Sizes], list[Frame]]
"""``(config, image_processor, inputs, original (width, height) sizes or None) -> frames``."""


def resized_and_cropped(
    config: Any, image_processor: Any, inputs: Mapping[str, Tensor], sizes: Sizes
) -> list[Frame]:
    """Frames of images that were resized, perhaps padded to a square, perhaps centre-cropped."""
    pixels = inputs["pixel_values"]
    if pixels.ndim != 4:
        raise InputError(
            f"Got pixel_values of shape {tuple(pixels.shape)}; expected [image channel height "
            "width]. Write processor(images=..., text=..., return_tensors='pt')."
        )
    height, width = pixels.shape[-2:]
    patch = config.vision_config.patch_size
    rows, columns = height // patch, width // patch
    if sizes is None or image_processor is None:
        return [Frame(rows, columns, patch) for _ in range(pixels.shape[0])]
    frames = []
    for w, h in sizes:
        shift_x = shift_y = 0.0
        if getattr(image_processor, "do_pad", False) and w != h:
            side = max(w, h)
            shift_x, shift_y, w, h = -(side - w) / 2, -(side - h) / 2, side, side
        new_w, new_h = _resized(w, h, getattr(image_processor, "size", None), (width, height))
        scale = (w / new_w, h / new_h)
        left, top = (new_w - width) // 2, (new_h - height) // 2
        offset = (left * scale[0] + shift_x, top * scale[1] + shift_y)
        frames.append(Frame(rows, columns, patch, scale, offset, True))
    return frames


def _resized(w: int, h: int, size: Any, crop: tuple[int, int]) -> tuple[int, int]:
    """The size after resizing to ``size``, a dict or an object: shortest edge or both edges fixed."""
    read = size.get if hasattr(size, "get") else lambda name: getattr(size, name, None)
    shortest = read("shortest_edge")
    if shortest is None:
        return int(read("width") or crop[0]), int(read("height") or crop[1])
    if w <= h:
        return int(shortest), int(int(shortest) * h / w)
    return int(int(shortest) * w / h), int(shortest)


def smart_resized(
    config: Any, image_processor: Any, inputs: Mapping[str, Tensor], sizes: Sizes
) -> list[Frame]:
    """Frames of images resized to a multiple of the patch grid, one grid per image."""
    if "image_grid_thw" not in inputs:
        raise InputError(
            "Got pixel_values without image_grid_thw; expected both. Pass the processor's whole "
            "output: lvlm.prepare(inputs=processor(...))."
        )
    patch = config.vision_config.patch_size
    grids = [(rows, columns) for _, rows, columns in inputs["image_grid_thw"].tolist()]
    if sizes is None:
        return [Frame(rows, columns, patch) for rows, columns in grids]
    return [
        Frame(rows, columns, patch, (w / (columns * patch), h / (rows * patch)), original=True)
        for (rows, columns), (w, h) in zip(grids, sizes, strict=True)
    ]

"""Pictures of images that keep their shape, as grids of patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiny_families.pictures import GRIDS, PATCH, Maker, Pictures, noise


def packed(*, channels_first: bool = False, frames: int | None = None, **more: list[int]) -> Maker:
    """The patches of all images in one sequence, and the grid of each image.

    Args:
        channels_first: Whether a patch keeps its dimensions `[3 patch patch]` instead of one.
        frames: How often a patch repeats its image; the config's `temporal_patch_size` by default.
        more: Further fields with one value for each image.
    """

    def make(config: Any, shape: int) -> Pictures:
        grids = GRIDS[shape]
        vision = config.vision_config
        count = sum(rows * columns for rows, columns in grids)
        depth = frames or getattr(vision, "temporal_patch_size", None) or 1
        size = vision.patch_size
        pixels = (
            noise(count, 3, size, size) if channels_first else noise(count, 3 * depth * size * size)
        )
        tensors = {
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([(1, rows, columns) for rows, columns in grids]),
        }
        tensors |= {name: torch.tensor(values * len(grids)) for name, values in more.items()}
        return Pictures(tensors, runs=len(grids))

    return make


def merged(config: Any, shape: int) -> Pictures:
    """Squares of 2 x 2 patches, channels last, and the grid of each image in such squares."""
    grids = [(rows // 2, columns // 2) for rows, columns in GRIDS[shape]]
    count = sum(rows * columns for rows, columns in grids)
    side = 2 * config.vision_config.patch_size
    tensors = {
        "pixel_values": noise(count, side, side, 3),
        "image_grid_thw": torch.tensor([(1, rows, columns) for rows, columns in grids]),
    }
    return Pictures(tensors, runs=len(grids))


def patch_grids(config: Any, shape: int) -> Pictures:
    """Flattened patches of all images in one sequence, and rows and columns of each image."""
    grids = GRIDS[shape]
    count = sum(rows * columns for rows, columns in grids)
    pixels = noise(count, 3 * config.vision_config.patch_size**2)
    return Pictures({"pixel_values": pixels, "image_grid_hw": torch.tensor(grids)}, runs=len(grids))


def each_patch(config: Any, shape: int) -> Pictures:
    """Patches that no other patch sees: `[patch frame height width 3]`, one token each."""
    vision = config.vision_config
    counts = tuple(rows * columns for rows, columns in GRIDS[shape])
    pixels = noise(sum(counts), vision.temporal_patch_size, vision.patch_size, vision.patch_size, 3)
    return Pictures({"pixel_values": pixels}, len(counts), counts)


def strips(config: Any, shape: int) -> Pictures:
    """All patches side by side in one strip of pixels; grids are multiples of 4, which a merger of windows needs."""
    grids = ([(4, 8)], [(8, 4)], [(4, 8), (8, 8)])[shape]
    size = config.vision_config.patch_size
    count = sum(rows * columns for rows, columns in grids)
    tensors = {"pixel_values": noise(1, 3, size, size * count), "target_sizes": torch.tensor(grids)}
    return Pictures(tensors, runs=len(grids))


def padded_pixels(config: Any, shape: int) -> Pictures:
    """Images of any shape up to 48 x 48 pixels, padded to the largest."""
    sizes = ([(32, 48)], [(48, 16)], [(32, 48), (48, 16)])[shape]
    pixels = torch.zeros(
        len(sizes), 3, max(size[0] for size in sizes), max(size[1] for size in sizes)
    )
    for image, (height, width) in enumerate(sizes):
        pixels[image, :, :height, :width] = noise(3, height, width)
    return Pictures({"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, runs=len(sizes))


def padded_patches(config: Any, shape: int) -> Pictures:
    """Flattened patches of each image, padded to the image with most."""
    grids = GRIDS[shape]
    counts = [rows * columns for rows, columns in grids]
    there = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    pixels = (
        noise(len(grids), max(counts), 3 * config.vision_config.patch_size**2) * there[..., None]
    )
    tensors = {
        "pixel_values": pixels,
        "spatial_shapes": torch.tensor(grids),
        "pixel_attention_mask": there.long(),
    }
    return Pictures(tensors, runs=len(grids))


def placed_patches(size: int = PATCH, pool: int = 2) -> Maker:
    """Flattened patches with their x and y, padded with places of -1 to the image with most."""

    def make(config: Any, shape: int) -> Pictures:
        grids = [(rows * 2 // pool, columns * 2 // pool) for rows, columns in GRIDS[shape]]
        grids = grids if pool == 2 else [(rows // 2, columns // 2) for rows, columns in grids]
        most = max(rows * columns for rows, columns in grids)
        places = torch.full((len(grids), most, 2), -1)
        pixels = noise(len(grids), most, 3 * size * size).abs().clamp(0, 1)
        for image, (rows, columns) in enumerate(grids):
            count = rows * columns
            places[image, :count] = torch.cartesian_prod(
                torch.arange(rows), torch.arange(columns)
            ).flip(-1)
            pixels[image, count:] = 0
        counts = tuple(rows * columns // pool**2 for rows, columns in grids)
        return Pictures({"pixel_values": pixels, "image_position_ids": places}, len(grids), counts)

    return make


def codes(config: Any, shape: int) -> Pictures:
    """Images for a tokenizer of pixels that halves them once, of any shape."""
    sizes = ([(16, 24)], [(24, 16)], [(16, 16), (16, 16)])[shape]
    pixels = noise(len(sizes), 3, *sizes[0])
    return Pictures({"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, runs=len(sizes))


def raw_patches(config: Any, shape: int) -> Pictures | None:
    """Patches of pixels that enter the decoder as they are."""
    if shape == 2:
        return None
    rows, columns = ((2, 3), (3, 2))[shape]
    count = rows * columns
    return Pictures({"image_patches": noise(1, count, config.patch_size**2 * 3)}, 1, (count,))


def pooled_crops(config: Any, shape: int) -> Pictures:
    """Crops of 6 x 6 patches, and for each token the four patches that it pools.

    Shape 1 is an image in small and, in two crops side by side, in large.
    """
    cells = [_cells(0, 6, 6)]
    grids = [(3, 3, 0, 0)]
    if shape == 1:
        large = torch.cat([torch.arange(36).reshape(6, 6) + start for start in (36, 72)], dim=1)
        cells.append(_quads(large))
        grids = [(3, 3, 3, 6)]
    if shape == 2:
        cells.append(_cells(36, 6, 6))
        grids = [(3, 3, 0, 0)] * 2
    crops = (1, 3, 2)[shape]
    tensors = {
        "pixel_values": noise(crops, 36, 3 * PATCH * PATCH),
        "image_token_pooling": torch.cat(cells),
        "image_grids": torch.tensor(grids),
        "image_num_crops": torch.tensor([3] if shape == 1 else [1] * len(grids)),
    }
    return Pictures(tensors, runs=len(grids))


def _cells(start: int, rows: int, columns: int) -> Tensor:
    return _quads(torch.arange(rows * columns).reshape(rows, columns) + start)


def _quads(grid: Tensor) -> Tensor:
    rows, columns = grid.shape
    return grid.reshape(rows // 2, 2, columns // 2, 2).permute(0, 2, 1, 3).reshape(-1, 4)

"""Pictures of images that an image processor brings to one size, alone or cut into tiles."""

from __future__ import annotations

from typing import Any

import torch

from tiny_families.pictures import GRIDS, SIDE, SIZES, Maker, Pictures, noise


def fixed(
    name: str = "pixel_values", side: int = SIDE, tiles: bool = False, several: bool = True
) -> Maker:
    """Square images of one size; shape 1 is an image cut into three tiles, if the type has tiles."""

    def make(config: Any, shape: int) -> Pictures | None:
        count = (1, 3 if tiles else 0, 2 if several else 0)[shape]
        return Pictures({name: noise(count, 3, side, side)}, runs=count) if count else None

    return make


def blip(tokens: int, several: bool = True) -> Maker:
    """Square images of one size that a fixed number of queries reads."""

    def make(config: Any, shape: int) -> Pictures | None:
        count = (1, 0, 2 if several else 0)[shape]
        return (
            Pictures({"pixel_values": noise(count, 3, SIDE, SIDE)}, count, (tokens,) * count)
            if count
            else None
        )

    return make


def hybrid(config: Any, shape: int) -> Pictures | None:
    """Each image in two sizes, for the two towers."""
    count = (1, 0, 2)[shape]
    pixels = {
        "pixel_values": noise(count, 3, SIDE, SIDE),
        "high_res_pixel_values": noise(count, 3, 64, 64),
    }
    return Pictures(pixels, count, (36,) * count) if count else None


def frames(config: Any, shape: int) -> Pictures | None:
    """A video of two or three frames; each gives one set of queries."""
    count = (2, 3, 0)[shape]
    return (
        Pictures({"pixel_values": noise(1, count, 3, SIDE, SIDE)}, 1, (5 * count,))
        if count
        else None
    )


def latent(config: Any, shape: int) -> Pictures | None:
    """Flattened patches with their row and column in front, at most one image a row."""
    if shape == 2:
        return None
    rows, columns = GRIDS[shape][0]
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    patches = torch.cat(
        [places, noise(rows * columns, config.vision_config.patch_embed_hidden_size)], -1
    )[None]
    return Pictures({"flattened_patches": patches}, 1, (config.latent_query_num,))


def stacked(mask: str | None = None) -> Maker:
    """Tiles or images as `[batch tile 3 height width]`; `mask` says which are there: by "pixel" or by "tile"."""

    def make(config: Any, shape: int) -> Pictures | None:
        count = (1, 3, 2)[shape]
        tensors: dict[str, Any] = {"pixel_values": noise(1, count, 3, SIDE, SIDE)}
        if mask == "tile":
            tensors["pixel_attention_mask"] = torch.ones(1, count, dtype=torch.bool)
        if mask == "pixel":
            seen = torch.ones(1, count, SIDE, SIDE, dtype=torch.bool)
            seen[:, 0, 32:] = False  # the first image is wide: its lower third is padding
            tensors["pixel_attention_mask"] = seen
            tensors["pixel_values"] = tensors["pixel_values"] * seen[:, :, None]
        return Pictures(tensors, runs=count)

    return make


def anyres(config: Any, shape: int) -> Pictures:
    """Tiles of whole images and the image itself in small, padded to the image with most tiles; newlines end rows."""
    sizes = SIZES[shape]
    tiles = [1 + (-(-height // SIDE)) * (-(-width // SIDE)) for height, width in sizes]
    pixels = noise(len(sizes), max(tiles), 3, SIDE, SIDE)
    for image, count in enumerate(tiles):
        pixels[image, count:] = 0
    return Pictures({"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, runs=len(sizes))


def crossed(config: Any, shape: int) -> Pictures:
    """Two tiles an image for cross-attention; the text has one token for an image."""
    count = (1, 1, 2)[shape]
    ratio = (2, 3, 2)[shape]  # ids of [1, 2] and [2, 1] tiles
    tensors = {
        "pixel_values": noise(1, count, 2, 3, SIDE, SIDE),
        "aspect_ratio_ids": torch.full((1, count), ratio),
        "aspect_ratio_mask": torch.ones(1, count, 2, dtype=torch.long),
    }
    return Pictures(tensors, count, (1,) * count)


def gated(config: Any, shape: int) -> Pictures | None:
    """Images for gated cross-attention; the text has one token for an image."""
    count = (1, 0, 2)[shape]
    return (
        Pictures({"pixel_values": noise(1, count, 3, SIDE, SIDE)}, count, (1,) * count)
        if count
        else None
    )


def local_views(side: int, grid: bool = False) -> Maker:
    """A global view of each image and, for shape 1, two local views of it in a list of their own."""

    def make(config: Any, shape: int) -> Pictures:
        count = (1, 1, 2)[shape]
        tensors: dict[str, Any] = {"pixel_values": noise(count, 3, SIDE, SIDE)}
        if shape == 1:
            tensors |= {"pixel_values_local": noise(2, 3, side, side), "num_local_patches": [2]}
            if grid:
                tensors["patches_grid"] = [[2, 1]]
        return Pictures(tensors, runs=count)

    return make

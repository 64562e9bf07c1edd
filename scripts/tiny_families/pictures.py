"""What an image processor would make of images of several shapes, by hand: one maker for each form of input.

A maker takes a model's config and the number of a shape and gives a `Pictures`, or None where the type has no such shape:

0. one image; not square where the type lets images keep their shape
1. one image of another shape: another grid of patches, or several tiles
2. two images in one row of text, of different shapes where the type lets them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
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


# images of one size


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


# tiles that stand in a dimension of their own


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


# images that keep their shape


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


def none(config: Any, shape: int) -> Pictures | None:
    """No image: a decoder of text."""
    return Pictures({}, 0, ()) if shape == 0 else None


_NAMES: dict[Maker, str] = {
    fixed(): "aria blip-2 deepseek_vl janus llava ovis2 paligemma t5gemma2 vipllava",
    fixed(side=64): "fast_vlm gemma3n",
    fixed(tiles=True): "aya_vision cohere2_vision gemma3 shieldgemma2 internvl qianfan_ocr llama4",
    fixed(side=64, tiles=True): "got_ocr2 pp_chart2table",
    fixed("pixel_values_images"): "video_llava",
    fixed(side=16): "chameleon",
    blip(0, several=False): "blip git",
    blip(5): "instructblip kosmos-2",
    blip(37, several=False): "florence2",
    hybrid: "deepseek_vl_hybrid",
    frames: "instructblipvideo",
    latent: "kosmos-2.5",
    stacked(): "idefics3 smolvlm perception_lm",
    stacked("pixel"): "idefics2",
    stacked("tile"): "granite_docling",
    anyres: "llava_next llava_next_video llava_onevision granite4_vision",
    crossed: "mllama",
    gated: "idefics",
    local_views(32): "step3p7 deepseek_ocr2",
    local_views(SIDE, grid=True): "unlimited_ocr",
    packed(): """qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe qwen4_exp
        glm4v glm46v glmga glm4v_moe glm_ocr glm5_next ernie4_5_vl_moe exaone4_5 cohere_compass
        cosmos3_edge cosmos3_omni hyperclovax_vision_v2 hunyuan_vl minimax_m3_vl lfm3_vl
        qwen2_5_omni_thinker qwen3_omni_moe_thinker dots3_note""",
    packed(frames=2): "muse_glimmer muse_spark",
    packed(channels_first=True): "kimi_k25 paddleocr_vl",
    packed(image_merge_sizes=[2]): "video_llama_3",
    merged: "inkling2",
    patch_grids: "nemotron_h_omni",
    each_patch: "inkling_mm_model",
    strips: "minicpmv4_6 minicpmv4_7 minicpm_ocr",
    padded_pixels: "mistral3 lighton_ocr mistral_large4 llava+pixtral",
    padded_patches: "lfm2_vl",
    placed_patches(): "gemma4 diffusion_gemma",
    placed_patches(size=2 * PATCH, pool=1): "gemma4_unified",
    codes: "emu3",
    raw_patches: "fuyu",
    pooled_crops: "molmo2",
    none: "mistral4",
}
MAKERS: dict[str, Maker] = {
    name: maker for maker, names in _NAMES.items() for name in names.split()
}

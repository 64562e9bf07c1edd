"""What the module tree of a model does not say: one row of data per family, and how patches lie. Boxes are
``x0 y0 x1 y1`` with the origin at the top left."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.errors import InputError, ModelError, nearest


@dataclass(frozen=True)
class PatchGrid:
    """How one image lies on its grid of patches, whose side is ``patch`` pixels of the model's input.

    ``scale`` is original pixels per input pixel and ``offset`` the original pixel at the input's top left
    corner, both ``(x, y)``; if not ``original``, they lead to the model's input and not to the user's image.
    """

    rows: int
    columns: int
    patch: int
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    original: bool = False

    def boxes(self) -> Float[Tensor, "row column 4"]:
        """The pixel box of every patch."""
        width, height = torch.tensor([self.patch * s for s in self.scale])
        left, top = torch.tensor(self.offset)
        x, y = left + torch.arange(self.columns) * width, top + torch.arange(self.rows) * height
        y, x = torch.meshgrid(y, x, indexing="ij")
        return torch.stack([x, y, x + width, y + height], dim=-1)


Sizes = Sequence[tuple[int, int]] | None
GridReader = Callable[[Any, Any, Mapping[str, Tensor], Sizes], list[PatchGrid]]
"""``(config, image_processor, inputs, original (width, height) sizes or None) -> grids``."""


def resized_and_cropped(
    config: Any, image_processor: Any, inputs: Mapping[str, Tensor], sizes: Sizes
) -> list[PatchGrid]:
    """Grids of images that were resized, perhaps padded to a square, perhaps centre-cropped."""
    pixels = inputs["pixel_values"]
    if pixels.ndim != 4:
        raise InputError(
            f"Got pixel_values of shape {tuple(pixels.shape)}; expected [image channel height "
            "width]. Write processor(images=..., text=..., return_tensors='pt')."
        )
    (height, width), patch = pixels.shape[-2:], config.vision_config.patch_size
    whole = PatchGrid(height // patch, width // patch, patch)
    if sizes is None or image_processor is None:
        return [whole] * len(pixels)
    grids = []
    for w, h in sizes:
        shift_x = shift_y = 0.0
        if getattr(image_processor, "do_pad", False) and w != h:
            side = max(w, h)
            shift_x, shift_y, w, h = (w - side) / 2, (h - side) / 2, side, side
        new_w, new_h = _resized(w, h, getattr(image_processor, "size", None), (width, height))
        scale = (w / new_w, h / new_h)
        left, top = (new_w - width) // 2, (new_h - height) // 2
        offset = (left * scale[0] + shift_x, top * scale[1] + shift_y)
        grids.append(replace(whole, scale=scale, offset=offset, original=True))
    return grids


def _resized(w: int, h: int, size: Any, crop: tuple[int, int]) -> tuple[int, int]:
    """The size after resizing to ``size``, a dict or an object: shortest edge or both edges fixed."""
    read = size.get if hasattr(size, "get") else lambda name: getattr(size, name, None)
    shortest = read("shortest_edge")
    if shortest is None:
        return int(read("width") or crop[0]), int(read("height") or crop[1])
    short = int(shortest)
    return (short, int(short * h / w)) if w <= h else (int(short * w / h), short)


def smart_resized(
    config: Any, image_processor: Any, inputs: Mapping[str, Tensor], sizes: Sizes
) -> list[PatchGrid]:
    """Grids of images resized to a multiple of the patch grid, one grid per image."""
    if "image_grid_thw" not in inputs:
        got = "Got pixel_values without image_grid_thw; expected all that the processor makes"
        raise InputError(f"{got}. Write lvlm.prepare(inputs=processor(...)).")
    vision, grid, pixels = config.vision_config, inputs["image_grid_thw"], inputs["pixel_values"]
    patch, size = vision.patch_size, 3 * vision.temporal_patch_size * vision.patch_size**2
    fits = grid.shape[1:] == (3,) and not bool((grid < 1).any())
    if not fits or pixels.numel() != size * int(grid.prod(dim=1).sum()):
        got = f"Got image_grid_thw {grid.tolist()} and pixel_values of shape {tuple(pixels.shape)}"
        wanted = f"[time, rows, columns] of every image, and {size} numbers per patch"
        raise InputError(f"{got}; expected {wanted}. Write lvlm.prepare(inputs=processor(...)).")
    sides = grid.tolist()
    grids = [PatchGrid(rows, columns, patch) for _, rows, columns in sides]
    if sizes is None:
        return grids
    return [
        replace(one, scale=(w / (one.columns * patch), h / (one.rows * patch)), original=True)
        for one, (w, h) in zip(grids, sizes, strict=True)
    ]


@dataclass(frozen=True)
class Family:
    """What sinkscope must be told about a family; ``config`` is that of the model."""

    name: str
    merge: Callable[[Any], int]  # config -> patches per side that become one LLM token
    grids: GridReader = resized_and_cropped
    # Paths of the projector; the first that exists is taken.
    projector: tuple[str, ...] = ("model.multi_modal_projector", "multi_modal_projector")
    packed: bool = False  # whether all images share one sequence of the tower, without a batch axis
    # (config, n_vision_layers) -> blocks whose output feeds the projector, in the order it reads them
    feed_layers: Callable[[Any, int], tuple[int, ...]] = lambda config, n_layers: (n_layers - 1,)
    drops: Callable[[Any], int] = lambda config: 0  # leading ViT tokens the projector does not see
    prefix: Callable[[Any], tuple[str, ...]] = lambda config: ()  # kinds of leading ViT tokens
    # (config, grids [image 3]) -> packed index of every ViT token in the processor's order, if another
    order: Callable[[Any, Tensor], Tensor] | None = None
    image_inputs: tuple[str, ...] = ("pixel_values",)  # outputs of the processor that are no text
    # Whether patches stay in raster order and the projector pools merge x merge neighbours; else the
    # tower's order is block by block, as Qwen's processor makes it.
    pooled: bool = False
    types: str = ""  # the input that is 1 at image tokens: attention or positions follow it
    feed_norm: str = ""  # path of the norm between the feeding block and the projector


def _llava_feed(config: Any, n_layers: int) -> tuple[int, ...]:
    """``vision_feature_layer`` counts hidden states: -1 is the last block's output."""
    chosen = config.vision_feature_layer
    indices = [chosen] if isinstance(chosen, int) else chosen  # several are concatenated in order
    blocks = tuple((i if i >= 0 else n_layers + 1 + i) - 1 for i in indices)
    if not blocks or min(blocks) < 0 or max(blocks) >= n_layers:
        raise ModelError(
            f"Got vision_feature_layer={chosen!r} with {n_layers} vision blocks; expected hidden "
            f"states from 1 to {n_layers}, or -1 to -{n_layers}."
        )
    return blocks


def _gemma_pool(config: Any) -> int:
    """Patches per side that Gemma 3's projector averages into one token."""
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size) // int(config.mm_tokens_per_image**0.5)


def _qwen_order(config: Any, grids: Tensor) -> Tensor:
    """Where each ViT token of the processor's order lies after the windows' permutation."""
    from transformers.vision_utils import get_vision_window_index

    vision, names = config.vision_config, ("spatial_merge_size", "window_size", "patch_size")
    sizes = {name: getattr(vision, name) for name in names}
    window, _ = get_vision_window_index(grids, **sizes)
    unit = vision.spatial_merge_size**2
    from_processor = (window[:, None] * unit + torch.arange(unit)).reshape(-1)
    return torch.argsort(from_processor)


CLS_FIRST = ("clip_vision_model", "clip_vision", "dinov2")  # these prepend a CLS token
LLAVA = Family(
    name="llava",
    merge=lambda config: 1,
    feed_layers=_llava_feed,
    drops=lambda config: int(config.vision_feature_select_strategy == "default"),  # CLS or not
    prefix=lambda config: ("cls",) * (config.vision_config.model_type in CLS_FIRST),
)
QWEN2_5_VL = Family(
    name="qwen2.5-vl",
    merge=lambda config: config.vision_config.spatial_merge_size,
    grids=smart_resized,
    projector=("model.visual.merger", "visual.merger"),
    packed=True,
    order=_qwen_order,
    image_inputs=("pixel_values", "image_grid_thw"),
    types="mm_token_type_ids",
)
GEMMA3 = Family(
    name="gemma3",
    merge=_gemma_pool,
    pooled=True,
    types="token_type_ids",
    feed_norm="model.vision_tower.post_layernorm",
)
FAMILIES: dict[str, Family] = {"llava": LLAVA, "qwen2_5_vl": QWEN2_5_VL, "gemma3": GEMMA3}


def family_of(model_type: str) -> Family:
    """The row of a ``config.model_type``; ModelError if no row exists yet."""
    if model_type not in FAMILIES:
        got = f"Got model_type {model_type!r}; expected one of {tuple(FAMILIES)}."
        hint = "A new family is one row of a table: see the contributing page."
        raise ModelError(f"{got} {nearest(model_type, FAMILIES)} {hint}")
    return FAMILIES[model_type]

"""One row of data per model family: what the module tree alone does not say.

Everything else (blocks, attention calls, head sizes, CLS) is found structurally.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkscope.anatomy import patch_map as geometry
from sinkscope.errors import ModelError, nearest


@dataclass(frozen=True)
class Family:
    """What sinkscope must be told about a family.

    Attributes:
        name: How we call it.
        projector: Where its projector may lie; the first path that exists is taken.
        packed: Whether the vision tower packs all images into one sequence without a batch axis.
        feed_layers: ``(config, n_vision_layers) -> vision blocks whose output feeds the projector``,
            in the order in which it reads them.
        drops: ``config -> leading ViT tokens that the projector does not see``.
        merge: ``config -> patches per side that become one LLM token``.
        prefix: ``config -> kinds of the leading ViT tokens``, such as ``("cls",)``.
        frames: Geometry of the processed images; see `sinkscope.anatomy.patch_map`.
        order: ``(config, grids [image 3]) -> packed index of every ViT token in processor order``,
            or None where the tower keeps the processor's order.
        image_inputs: Processor outputs that belong to the image rather than to the text.
        pooled: Whether the tower keeps patches in raster order and the projector pools merge x merge
            neighbours; else the tower's order is block by block, as Qwen's processor makes it.
        feed_norm: Path of the norm between the feeding block and the projector, "" if there is none.
    """

    name: str
    projector: tuple[str, ...]
    packed: bool
    feed_layers: Callable[[Any, int], tuple[int, ...]]
    drops: Callable[[Any], int]
    merge: Callable[[Any], int]
    prefix: Callable[[Any], tuple[str, ...]]
    frames: geometry.FrameReader
    order: Callable[[Any, Tensor], Tensor] | None = None
    image_inputs: tuple[str, ...] = ("pixel_values",)
    pooled: bool = False
    feed_norm: str = ""


def _llava_feed(config: Any, n_layers: int) -> tuple[int, ...]:
    """``vision_feature_layer`` counts hidden states: -1 is the last block's output."""
    chosen = config.vision_feature_layer
    indices = [chosen] if isinstance(chosen, int) else list(chosen)
    # Several are concatenated in the order in which they are named.
    blocks = tuple((i if i >= 0 else n_layers + 1 + i) - 1 for i in indices)
    if not blocks or min(blocks) < 0 or max(blocks) >= n_layers:
        raise ModelError(
            f"Got vision_feature_layer={chosen!r} with {n_layers} vision blocks; expected hidden "
            f"states from 1 to {n_layers}, or -1 to -{n_layers}."
        )
    return blocks


def _has_cls(config: Any) -> bool:
    """Whether the vision model prepends a CLS token: CLIP does, SigLIP does not."""
    return config.vision_config.model_type in ("clip_vision_model", "clip_vision", "dinov2")


def _llava_drops(config: Any) -> int:
    """LLaVA drops the first ViT token under the strategy "default", CLS or not."""
    return 1 if config.vision_feature_select_strategy == "default" else 0


def _gemma_pool(config: Any) -> int:
    """Patches per side that Gemma 3's projector averages into one token."""
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size) // int(config.mm_tokens_per_image**0.5)


def _qwen_order(config: Any, grids: Tensor) -> Tensor:
    """Where each ViT token of the processor's order lies after the windows' permutation."""
    from transformers.vision_utils import get_vision_window_index

    vision = config.vision_config
    window, _ = get_vision_window_index(
        grids,
        spatial_merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        patch_size=vision.patch_size,
    )
    unit = vision.spatial_merge_size**2
    from_processor = (window[:, None] * unit + torch.arange(unit)).reshape(-1)
    return torch.argsort(from_processor)


LLAVA = Family(
    name="llava",
    projector=("model.multi_modal_projector", "multi_modal_projector"),
    packed=False,
    feed_layers=_llava_feed,
    drops=_llava_drops,
    merge=lambda config: 1,
    prefix=lambda config: ("cls",) if _has_cls(config) else (),
    frames=geometry.resized_and_cropped,
)
QWEN2_5_VL = Family(
    name="qwen2.5-vl",
    projector=("model.visual.merger", "visual.merger"),
    packed=True,
    feed_layers=lambda config, n_layers: (n_layers - 1,),
    drops=lambda config: 0,
    merge=lambda config: config.vision_config.spatial_merge_size,
    prefix=lambda config: (),
    frames=geometry.smart_resized,
    order=_qwen_order,
    image_inputs=("pixel_values", "image_grid_thw"),
)
GEMMA3 = Family(
    name="gemma3",
    projector=("model.multi_modal_projector", "multi_modal_projector"),
    packed=False,
    feed_layers=lambda config, n_layers: (n_layers - 1,),
    drops=lambda config: 0,
    merge=_gemma_pool,
    prefix=lambda config: (),
    frames=geometry.resized_and_cropped,
    pooled=True,
    feed_norm="model.vision_tower.post_layernorm",
)
FAMILIES: dict[str, Family] = {"llava": LLAVA, "qwen2_5_vl": QWEN2_5_VL, "gemma3": GEMMA3}


def family_of(model_type: str) -> Family:
    """The row of a ``config.model_type``.

    Raises:
        ModelError: If no row exists yet.
    """
    if model_type not in FAMILIES:
        raise ModelError(
            f"Got model_type {model_type!r}; expected one of {tuple(FAMILIES)}. "
            f"{nearest(model_type, FAMILIES)} A new family is one row in "
            "sinkscope/anatomy/families.py: see the contributing page."
        )
    return FAMILIES[model_type]

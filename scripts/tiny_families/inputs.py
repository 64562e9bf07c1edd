"""Inputs for a tiny model as its processor would make them: text, image tokens, more text."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tiny_families.makers import MAKERS
from tiny_families.pictures import Pictures
from tiny_families.sizes import IMAGE_TOKEN

TEXT_TOKENS = 12
_ENCODER_DECODERS = ("florence2", "t5gemma2")
_CANVAS = 6  # tokens that a diffusion model refines at once
# tokens that stand before and after each run, where the model's positions or embeddings depend on them
_AROUND = {"ovis2": (20, 21), "qwen2_5_omni_thinker": (12, 13), "qwen3_omni_moe_thinker": (12, 13)}


def inputs_of(model_type: str, model: nn.Module, shape: int = 0) -> dict[str, Any] | None:
    """Make the inputs of one row of text with images in it.

    Args:
        model_type: The type, one of `TYPES`.
        model: A model of this type as `build` makes it.
        shape: Which images: 0 for one image, 1 for one of another shape or of several tiles, 2 for two images.

    Returns:
        Keyword arguments of the model's forward pass; None where the type has no such shape.
    """
    config = model.config
    pictures = MAKERS[model_type](config, shape)
    if pictures is None:
        return None
    tokens = pictures.tokens if pictures.tokens is not None else _tokens(model, pictures)
    image = _image_token(config)
    ids = _row(tokens, image, *_AROUND.get(model_type, ()))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures.tensors}
    return inputs | _more(model_type, model, ids == image, pictures)


def _image_token(config: Any) -> int:
    """The token that images replace."""
    for name in ("image_token_id", "image_token_index", "video_token_index"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return IMAGE_TOKEN


def _tokens(model: nn.Module, pictures: Pictures) -> tuple[int, ...]:
    """How many tokens each run of image tokens has, from the model's image features."""
    owner: Any = model if hasattr(model, "get_image_features") else model.model
    inner = owner.model if hasattr(getattr(owner, "model", None), "get_image_features") else owner
    known = inspect.signature(inner.get_image_features).parameters
    given = {name: value for name, value in pictures.tensors.items() if name in known}
    with torch.no_grad():
        out = inner.get_image_features(**given)
    if getattr(out, "pooler_output", None) is not None:
        parts = list(out.pooler_output)
    elif getattr(out, "deepstack_features", None) is not None:
        _, parts = out.deepstack_features[0]  # a decoder layer and its features of each image
    else:
        parts = list(out.last_hidden_state)
    counts = tuple(part.numel() // part.shape[-1] for part in parts)
    if len(counts) == pictures.runs:
        return counts
    each, rest = divmod(sum(counts), pictures.runs)
    assert rest == 0, f"{sum(counts)} image tokens do not fill {pictures.runs} equal runs"
    return (each,) * pictures.runs


def _row(runs: tuple[int, ...], image: int, *around: int) -> Tensor:
    """One row of ids: text, runs of image tokens with a token of text between them, text.

    An image of one token stands at an odd position, because checks edit every second token.
    """
    before, after = around or (None, None)
    text = torch.randint(
        30, 90, (TEXT_TOKENS,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    row = [1, *text[:4]]
    for place, count in enumerate(runs):
        row += [before] * bool(around) + [image] * count + [after] * bool(around) + [90 + place]
    return torch.tensor([row + text[4:]])


def _more(model_type: str, model: nn.Module, image: Tensor, pictures: Pictures) -> dict[str, Any]:
    """The other tensors that a processor adds, which say where images are."""
    known = inspect.signature(type(model).forward).parameters
    more: dict[str, Any] = {}
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in known:
            more[name] = image.long()
    if "token_type_ids" in known:  # PaliGemma's are 0 in the prompt, Gemma 3's are 1 at images
        more["token_type_ids"] = image.long() * (model_type != "paligemma")
    if "qformer_input_ids" in known:
        images = pictures.tensors["pixel_values"].shape[0]
        more["qformer_input_ids"] = torch.tensor([[3, 4, 5]] * images)
        more["qformer_attention_mask"] = torch.ones(images, 3, dtype=torch.long)
    if "image_embeds_position_mask" in known:
        more["image_embeds_position_mask"] = image.long()
    if "cross_attention_mask" in known:
        tiles = pictures.tensors["aspect_ratio_mask"].shape[-1]
        more["cross_attention_mask"] = _latest(image)[..., None].repeat(1, 1, 1, tiles)
    if "image_attention_mask" in known:
        more["image_attention_mask"] = _latest(image)
    if model_type in _ENCODER_DECODERS:
        more["decoder_input_ids"] = torch.tensor([[2, 40, 41, 42]])
    if model_type == "diffusion_gemma":
        more["decoder_input_ids"] = torch.arange(40, 40 + _CANVAS)[None]
    return more


def _latest(image: Tensor) -> Tensor:
    """The latest image before each position as 0 or 1, `[1 pos image]`, where an image is one token of text."""
    count = image.cumsum(1)
    return (count[..., None] == torch.arange(1, int(count.max()) + 1)).long()

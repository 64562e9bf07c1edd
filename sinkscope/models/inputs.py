"""From images and text to model inputs, with every mistake named before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sinkscope.anatomy.towers import Anatomy
from sinkscope.errors import InputError
from sinkscope.models.identity import layout_of
from sinkscope.models.prompts import as_rows, render
from sinkscope.models.token_map import build_token_map
from sinkscope.tokens import TokenMap


@dataclass(frozen=True, eq=False)
class Sample:
    """A prepared batch.

    Attributes:
        inputs: What the model is called with.
        tokens: What every position is.
        images: The images of every row, as people see them; None if only processor output was given.
        texts: The prompt of every row after the chat template; None likewise.
        made_for: The layout of the model it was prepared for (`identity.layout_of`).
    """

    inputs: Mapping[str, Any]
    tokens: TokenMap
    images: tuple[tuple[Image.Image, ...], ...] | None = None
    texts: tuple[str, ...] | None = None
    made_for: tuple[Any, ...] | None = None

    def __len__(self) -> int:
        return int(self.tokens.ids.shape[0])


PER_POSITION = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "mm_token_type_ids",
)
"""Inputs with an entry for every position."""


def check_processor(processor: Any, rows: int) -> None:
    """Refuse a processor that lacks what a batch needs.

    Raises:
        InputError: If there is none, or it has no part, setting or token for this.
    """
    if processor is None:
        raise InputError(
            "Got images and text, but this LVLM has no processor; expected one. Write "
            "ss.LVLM(model, processor), or lvlm.prepare(inputs=...) with inputs you made yourself."
        )
    name = type(processor).__name__
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise InputError(
                f"Got a {name} as processor, which has no {part}; expected the model's whole processor. "
                "Write ss.LVLM(model, transformers.AutoProcessor.from_pretrained(...))."
            )
    for setting in ("patch_size", "vision_feature_select_strategy"):
        if getattr(processor, setting, "") is None:
            raise InputError(
                f"Got a {name} without {setting}; expected the model's, or nobody knows how many tokens "
                "an image has. Write processor.patch_size = model.config.vision_config.patch_size, "
                "processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy, "
                "and processor.num_additional_image_tokens = 1 if the vision tower has a CLS token."
            )
    if rows > 1 and processor.tokenizer.pad_token is None:
        raise InputError(
            f"Got {rows} rows and a tokenizer without a pad token; expected one, or a single row. Write "
            "processor.tokenizer.pad_token = processor.tokenizer.eos_token: padding is masked."
        )


def process(
    processor: Any, images: Any, text: Any, *, rendered: Any = False
) -> tuple[dict, list, list[str]]:
    """Run the processor, left-padded; see `LVLM.prepare`.

    Returns:
        Model inputs, images by row, prompts by row.

    Raises:
        InputError: If there is no processor or the inputs do not fit one another.
    """
    rows, asked = as_rows(images, text)
    check_processor(processor, len(rows))
    if not isinstance(rendered, bool) or (rendered and not all(isinstance(a, str) for a in asked)):
        raise InputError(
            f"Got rendered={rendered!r} and {type(asked[0]).__name__} as text; expected True for "
            "finished prompts, each a str, or False."
        )
    prompts = [
        render(processor, len(row), one, rendered=rendered, row=i)
        for i, (row, one) in enumerate(zip(rows, asked, strict=True))
    ]
    tokenizer = processor.tokenizer
    bos = getattr(tokenizer, "bos_token", None)
    doubled = bool(bos) and all(prompt.startswith(bos) for prompt in prompts)
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        encoded = processor(
            images=rows if len(rows) > 1 else rows[0],
            text=prompts,
            padding=len(rows) > 1,
            return_tensors="pt",
            add_special_tokens=not doubled,
        )
    except (ValueError, TypeError, IndexError) as error:
        sizes = [image.size for row in rows for image in row]
        raise InputError(
            f"The model's processor refuses images of {sizes} pixels (width, height) with "
            f"{len(prompts)} prompts ({type(error).__name__}: {error}); expected what it was made for. "
            "See its settings in lvlm.processor."
        ) from error
    finally:
        tokenizer.padding_side = side
    return dict(encoded), rows, prompts


def check_inputs(
    inputs: Any, vocab: int, image_token_id: int, video_token_id: int | None = None
) -> dict[str, Any]:
    """Check processor output, whoever made it.

    Args:
        inputs: Processor output.
        vocab: How many token ids the model has embeddings for.
        image_token_id: The id of image positions, which may lie beyond.
        video_token_id: The id of video positions, or None if the model takes no videos.

    Raises:
        InputError: If there is a video, or ids or pixels are missing, of the wrong rank, out of range or not finite.
    """
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"Got inputs of type {type(inputs).__name__}; expected the processor's output, a dict. "
            "Write lvlm.prepare(inputs=processor(images=..., text=..., return_tensors='pt'))."
        )
    refuse_videos(inputs, video_token_id)
    missing = [name for name in ("input_ids", "pixel_values") if inputs.get(name) is None]
    if missing:
        raise InputError(
            f"Got inputs with {sorted(inputs)}; expected at least 'input_ids' and 'pixel_values', "
            f"missing {missing}. Pass the processor's whole output."
        )
    for name in ("input_ids", "pixel_values", "attention_mask"):
        if inputs.get(name) is not None and not isinstance(inputs[name], Tensor):
            raise InputError(
                f"Got {name} of type {type(inputs[name]).__name__}; expected a tensor. Write "
                "return_tensors='pt'."
            )
    ids = inputs["input_ids"]
    if ids.ndim != 2:
        raise InputError(
            f"Got input_ids of shape {tuple(ids.shape)}; expected a tensor [batch pos]. Write "
            "input_ids[None] for a single row."
        )
    out = {name: value for name, value in inputs.items() if value is not None}
    mask = out.setdefault("attention_mask", torch.ones_like(ids))
    check_ids(ids, mask, vocab, image_token_id)
    if not torch.isfinite(out["pixel_values"]).all():
        raise InputError("Got NaN or infinite pixel_values; expected finite pixels.")
    return out


def check_names(inputs: Mapping[str, Any], known: set[str]) -> None:
    """Refuse inputs that no processor makes: a filled cache, or how a pass is to run.

    Raises:
        InputError: If there are any.
    """
    strange = sorted(set(inputs) - known)
    if strange:
        raise InputError(
            f"Got the inputs {strange}; expected some of {sorted(known)}. A pass is measured whole, from "
            "the first token and pixel on, and as the model is configured: leave the others out. Settings "
            "of decoding go to lvlm.generate(...)."
        )


def refuse_videos(inputs: Mapping[str, Any], video_token_id: int | None) -> None:
    """Refuse videos, alone or beside images: the tower runs once more for them, and that is not read.

    Raises:
        InputError: If there are any.
    """
    ids = inputs.get("input_ids")
    found = 0
    if video_token_id is not None and isinstance(ids, Tensor):
        found = int((ids == video_token_id).sum())
    pixels = inputs.get("pixel_values_videos") is not None
    if found or pixels:
        raise InputError(
            f"Got {found} video tokens (id {video_token_id}) and {'' if pixels else 'no '}"
            "pixel_values_videos; expected still images, whose tokens alone are mapped to vision tokens "
            "and pixels. Write the frames as images: lvlm.prepare(images=[frame, ...], text='...')."
        )


def check_ids(ids: Tensor, mask: Tensor, vocab: int, image_token_id: int) -> None:
    """Check ids and their mask.

    Raises:
        InputError: If the shapes differ, a row is empty, or an id is unknown.
    """
    if tuple(mask.shape) != tuple(ids.shape):
        raise InputError(
            f"Got an attention_mask of shape {tuple(mask.shape)} and input_ids of shape "
            f"{tuple(ids.shape)}; expected the same shape."
        )
    other = mask[(mask != 0) & (mask != 1)].unique()
    if len(other):
        raise InputError(
            f"Got an attention_mask with the values {other[:3].tolist()}; expected 1 for tokens and 0 for "
            "padding. Write one text per row."
        )
    empty = (~mask.bool()).all(dim=1).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"Got rows {empty} with nothing but padding; expected at least one token per row."
        )
    strange = ids[(ids < 0) | (ids >= vocab) & (ids != image_token_id)]
    if len(strange):
        raise InputError(
            f"Got the token id {int(strange[0])}; expected 0 to {vocab - 1}. These inputs were made "
            "by another model's processor: use the one that belongs to this model."
        )


def make_sample(
    module: Any,
    processor: Any,
    anatomy: Anatomy,
    images: Any,
    text: Any,
    inputs: Any,
    *,
    rendered: Any = False,
) -> Sample:
    """Inputs and their TokenMap; see `LVLM.prepare`.

    Raises:
        InputError: If something is missing or does not fit.
    """
    if inputs is not None and (images is not None or text is not None):
        raise InputError(
            "Got inputs together with images or text; expected either. Write "
            "lvlm.prepare(inputs=...) or lvlm.prepare(images=..., text=...)."
        )
    raw, rows, prompts = inputs, None, None
    if inputs is None:
        raw, rows, prompts = process(processor, images, text, rendered=rendered)
    known = module.get_input_embeddings().weight.shape[0]
    video = getattr(module.config, "video_token_id", None)
    ready = check_inputs(raw, known, anatomy.image_token_id, video)
    if inputs is not None:
        made = getattr(processor, "model_input_names", None) or ()
        check_names(ready, {*PER_POSITION, *anatomy.family.image_inputs, *made})
    sizes = None if rows is None else [image.size for row in rows for image in row]
    image_processor = getattr(processor, "image_processor", None)
    frames = anatomy.family.frames(module.config, image_processor, ready, sizes)
    tokenizer = getattr(processor, "tokenizer", None)
    return Sample(
        inputs=ready,
        tokens=build_token_map(anatomy, module.config, ready, frames, tokenizer),
        images=None if rows is None else tuple(tuple(row) for row in rows),
        texts=None if prompts is None else tuple(prompts),
        made_for=layout_of(anatomy),
    )

"""From images and text to model inputs, with every mistake named before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sinkscope.errors import InputError
from sinkscope.models.anatomy import Anatomy
from sinkscope.models.mapping import build_token_map
from sinkscope.models.pictures import open_image
from sinkscope.tokens import TokenMap


@dataclass(frozen=True, eq=False)
class Sample:
    """A prepared batch.

    Attributes:
        inputs: What the model is called with.
        tokens: What every position is.
        images: The images of every row, as people see them (`open_image`); None if only processor output was given.
        texts: The prompt of every row after the chat template; None likewise.
        made_for: The layout of the model it was prepared for (`Anatomy.fingerprint`).
    """

    inputs: Mapping[str, Any]
    tokens: TokenMap
    images: tuple[tuple[Image.Image, ...], ...] | None = None
    texts: tuple[str, ...] | None = None
    made_for: tuple[Any, ...] | None = None

    def __len__(self) -> int:
        return int(self.tokens.ids.shape[0])


def as_rows(images: Any, text: Any) -> tuple[list[list[Image.Image]], list[str]]:
    """Images and texts as one list of images and one text per batch row.

    Raises:
        InputError: If there is no image, no text, or their numbers differ.
    """
    if images is None or (isinstance(images, Sequence) and len(images) == 0):
        raise InputError(
            "Got no image; expected at least one. Write lvlm.prepare(images=image, text='...'). For "
            "text alone there is no visual sink to look for."
        )
    if text is None or (isinstance(text, Sequence) and len(text) == 0):
        raise InputError(
            "Got no text; expected a question. Write lvlm.prepare(images=image, text='What is it?')."
        )
    if isinstance(text, str):
        many = isinstance(images, (list, tuple))
        row = [open_image(image) for image in (images if many else [images])]
        return [row], [text]
    texts = list(text) if isinstance(text, Sequence) else [text]
    for entry in texts:
        if not isinstance(entry, str):
            raise InputError(
                f"Got a text of type {type(entry).__name__}; expected a str, or a list with a str "
                "per row."
            )
    if not isinstance(images, (list, tuple)) or len(images) != len(texts):
        count = len(images) if isinstance(images, (list, tuple)) else 1
        raise InputError(
            f"Got {count} image entries for {len(texts)} texts; expected one entry per row. Write "
            "images=[a, b], text=['...', '...'], or images=[[a, b], [c]] for several images in a row."
        )
    rows = [
        [open_image(i) for i in (entry if isinstance(entry, (list, tuple)) else [entry])]
        for entry in images
    ]
    for i, row in enumerate(rows):
        if not row:
            raise InputError(f"Got no image in row {i}; expected at least one image per row.")
    return rows, texts


def render(processor: Any, images: list[list[Image.Image]], texts: list[str]) -> list[str]:
    """The full prompt of every row: through the chat template, or with image tokens put in front.

    A text that already holds image tokens is taken as it is.

    Raises:
        InputError: If a text holds another number of image tokens than its row has images.
    """
    marker = getattr(processor, "image_token", None) or "<image>"
    template = getattr(processor, "chat_template", None)
    template = template or getattr(processor.tokenizer, "chat_template", None)
    prompts = []
    for row, (pictures, text) in enumerate(zip(images, texts, strict=True)):
        found = text.count(marker)
        if found and found != len(pictures):
            raise InputError(
                f"Got {found} {marker!r} tokens and {len(pictures)} images in row {row}; expected as "
                f"many. Write one {marker!r} per image, or none: then they are put in front."
            )
        if found:
            prompts.append(text)
        elif template:
            content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
            prompts.append(
                processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    chat_template=template,
                    add_generation_prompt=True,
                    tokenize=False,
                )
            )
        else:
            prompts.append(marker * len(pictures) + "\n" + text)
    return prompts


def process(processor: Any, images: Any, text: Any) -> tuple[dict, list, list[str]]:
    """Run the processor, left-padded.

    Returns:
        Model inputs, images by row, prompts by row.

    Raises:
        InputError: If there is no processor or the inputs do not fit one another.
    """
    if processor is None:
        raise InputError(
            "Got images and text, but this LVLM has no processor; expected one. Write "
            "ss.LVLM(model, processor), or lvlm.prepare(inputs=...) with inputs you made yourself."
        )
    rows, texts = as_rows(images, text)
    prompts = render(processor, rows, texts)
    tokenizer = processor.tokenizer
    bos = getattr(tokenizer, "bos_token", None)
    doubled = bool(bos) and all(prompt.startswith(bos) for prompt in prompts)
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        encoded = processor(
            images=rows if len(rows) > 1 else rows[0],
            text=prompts,
            padding=True,
            return_tensors="pt",
            add_special_tokens=not doubled,
        )
    except (ValueError, TypeError, IndexError) as error:
        sizes = [image.size for row in rows for image in row]
        raise InputError(
            f"Got images of {sizes} pixels (width, height) and {len(prompts)} prompts, which the "
            f"model's processor refuses ({type(error).__name__}: {error}); expected images and "
            "prompts that fit one another."
        ) from error
    finally:
        tokenizer.padding_side = side
    return dict(encoded), rows, prompts


def check_inputs(inputs: Any, vocab: int, image_token_id: int) -> dict[str, Any]:
    """Check processor output, whoever made it.

    Args:
        inputs: Processor output.
        vocab: How many token ids the model has embeddings for.
        image_token_id: The id of image positions, which may lie beyond.

    Raises:
        InputError: If ids or pixels are missing, of the wrong rank, out of range or not finite.
    """
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"Got inputs of type {type(inputs).__name__}; expected the processor's output, a dict. "
            "Write lvlm.prepare(inputs=processor(images=..., text=..., return_tensors='pt'))."
        )
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
    out = dict(inputs)
    mask = out.setdefault("attention_mask", torch.ones_like(ids))
    check_ids(ids, mask, vocab, image_token_id)
    if not torch.isfinite(out["pixel_values"]).all():
        raise InputError("Got NaN or infinite pixel_values; expected finite pixels.")
    return out


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
    module: Any, processor: Any, anatomy: Anatomy, images: Any, text: Any, inputs: Any
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
        raw, rows, prompts = process(processor, images, text)
    known = module.get_input_embeddings().weight.shape[0]
    ready = check_inputs(raw, known, anatomy.image_token_id)
    sizes = None if rows is None else [image.size for row in rows for image in row]
    image_processor = getattr(processor, "image_processor", None)
    frames = anatomy.family.frames(module.config, image_processor, ready, sizes)
    tokenizer = getattr(processor, "tokenizer", None)
    return Sample(
        inputs=ready,
        tokens=build_token_map(anatomy, module.config, ready, frames, tokenizer),
        images=None if rows is None else tuple(tuple(row) for row in rows),
        texts=None if prompts is None else tuple(prompts),
        made_for=anatomy.fingerprint,
    )

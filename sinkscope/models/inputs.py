"""From images and text to model inputs, every mistake named before any work, and to decoder inputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sinkscope.anatomy.towers import Anatomy
from sinkscope.errors import InputError, ModelError
from sinkscope.models.identity import layout_of
from sinkscope.models.prompts import as_rows, render
from sinkscope.models.token_map import build_token_map
from sinkscope.models.wrapping import lent, on_device, undisturbed
from sinkscope.tokens import TokenMap

Given = dict[str, Any]
"""Keyword arguments of the decoder."""
DROPPED = ("past_key_values", "use_cache", "cache_position", "return_dict")
TYPES = ("token_type_ids", "mm_token_type_ids")
PER_POSITION = ("input_ids", "attention_mask", "position_ids", *TYPES)
"""Inputs with an entry for every position."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A prepared batch: ``inputs`` for the model, and ``tokens``, what every position is.

    Attributes:
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


def make_sample(
    module: Any, processor: Any, anatomy: Anatomy, *given: Any, rendered: Any = False
) -> Sample:
    """Inputs and their TokenMap, of ``given`` images, text and inputs; see `LVLM.prepare`."""
    images, text, inputs = given
    config, family = module.config, anatomy.family
    if inputs is not None and (images is not None or text is not None):
        raise InputError(
            "Got inputs together with images or text; expected either. Write prepare(inputs=...) or "
            "prepare(images=..., text=...)."
        )
    raw, rows, prompts, sizes = inputs, None, None, None
    if inputs is None:
        raw, rows, prompts = process(processor, images, text, rendered=rendered)
        sizes = [image.size for row in rows for image in row]
    known = module.get_input_embeddings().weight.shape[0]
    ids = (anatomy.image_token_id, getattr(config, "video_token_id", None))
    ready = check_inputs(raw, known, *ids)
    if inputs is not None:
        made = getattr(processor, "model_input_names", None) or ()
        wanted = {*PER_POSITION, *family.image_inputs, *made}
        if strange := sorted(set(ready) - wanted):  # a filled cache, or how a pass is to run
            raise InputError(
                f"Got the inputs {strange}; expected some of {sorted(wanted)}: leave the others out. "
                "Settings of decoding go to lvlm.generate(...)."
            )
    grids = family.grids(config, getattr(processor, "image_processor", None), ready, sizes)
    tokenizer = getattr(processor, "tokenizer", None)
    return Sample(
        inputs=ready,
        tokens=build_token_map(anatomy, config, ready, grids, tokenizer),
        images=None if rows is None else tuple(map(tuple, rows)),
        texts=None if prompts is None else tuple(prompts),
        made_for=layout_of(anatomy),
    )


def process(
    processor: Any, images: Any, text: Any, *, rendered: Any = False
) -> tuple[dict, list, list[str]]:
    """Model inputs, left-padded, images by row and prompts by row; see `LVLM.prepare`."""
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
    bos, side = getattr(tokenizer, "bos_token", None), tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        encoded = processor(
            images=rows if len(rows) > 1 else rows[0],
            text=prompts,
            padding=len(rows) > 1,
            return_tensors="pt",
            add_special_tokens=not (bos and all(prompt.startswith(bos) for prompt in prompts)),
        )
    except (ValueError, TypeError, IndexError) as error:
        sizes = [image.size for row in rows for image in row]
        raise InputError(
            f"The processor refuses images of {sizes} pixels (width, height) and {len(prompts)} prompts "
            f"({type(error).__name__}: {error}); expected what fits the settings of lvlm.processor."
        ) from error
    finally:
        tokenizer.padding_side = side
    return dict(encoded), rows, prompts


def check_processor(processor: Any, rows: int) -> None:
    """Refuse a processor that lacks what a batch needs: a part, a setting or a pad token."""
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


def check_inputs(
    inputs: Any, vocab: int, image_token_id: int, video_token_id: int | None = None
) -> dict[str, Any]:
    """Check processor output and give it a mask; of ids ``vocab`` have embeddings, beside images."""
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"Got inputs of type {type(inputs).__name__}; expected the processor's output, a dict. "
            "Write lvlm.prepare(inputs=processor(images=..., text=..., return_tensors='pt'))."
        )
    out = {name: value for name, value in inputs.items() if value is not None}
    ids, pixels, found = out.get("input_ids"), "pixel_values_videos" in out, 0
    if video_token_id is not None and isinstance(ids, Tensor):
        found = int((ids == video_token_id).sum())
    if found or pixels:  # for videos the tower runs once more, and that is not read
        raise InputError(
            f"Got {found} video tokens (id {video_token_id}) and {'' if pixels else 'no '}"
            "pixel_values_videos; expected still images. Write the frames as images=[frame, ...]."
        )
    if missing := [name for name in ("input_ids", "pixel_values") if name not in out]:
        raise InputError(
            f"Got inputs with {sorted(inputs)}; expected at least 'input_ids' and 'pixel_values', "
            f"missing {missing}. Pass the processor's whole output."
        )
    for name in ("input_ids", "pixel_values", "attention_mask"):
        if name in out and not isinstance(out[name], Tensor):
            got = f"Got {name} of type {type(out[name]).__name__}"
            raise InputError(f"{got}; expected a tensor. Write return_tensors='pt'.")
    mask = out.setdefault("attention_mask", torch.ones_like(out["input_ids"]))
    if problem := _wrong_ids(out["input_ids"], mask, vocab, image_token_id):
        raise InputError(f"Got {problem}")
    if not torch.isfinite(out["pixel_values"]).all():
        raise InputError("Got NaN or infinite pixel_values; expected finite pixels.")
    return out


def _wrong_ids(ids: Tensor, mask: Tensor, vocab: int, image_token_id: int) -> str:
    """What is wrong with ids and their mask, or ""."""
    if ids.ndim != 2:
        shape = f"input_ids of shape {tuple(ids.shape)}"
        return f"{shape}; expected a tensor [batch pos]. Write input_ids[None] for a single row."
    if mask.shape != ids.shape:
        shapes = f"{tuple(mask.shape)} and input_ids of shape {tuple(ids.shape)}"
        return f"an attention_mask of shape {shapes}; expected the same shape."
    if len(other := mask[(mask != 0) & (mask != 1)].unique()):
        return (
            f"an attention_mask with the values {other[:3].tolist()}; expected 1 for tokens and 0 for "
            "padding. Write one text per row."
        )
    if empty := (~mask.bool()).all(dim=1).nonzero().flatten().tolist():
        return f"rows {empty} with nothing but padding; expected at least one token per row."
    if len(strange := ids[(ids < 0) | (ids >= vocab) & (ids != image_token_id)]):
        return (
            f"the token id {int(strange[0])}; expected 0 to {vocab - 1}. These inputs were made "
            "by another model's processor: use the one that belongs to this model."
        )
    return ""


class Ended(Exception):  # noqa: N818  it ends a pass; nothing went wrong
    """Leaves a forward pass where nothing more of it is wanted."""


def decoder_inputs(lvlm: Any, inputs: Mapping[str, Any], features: Any = None) -> tuple[Given, Any]:
    """The decoder's keyword arguments for a batch, and the image features, None if there are none.

    ``features`` of the same images in the same order spare the vision tower. ModelError if the decoder
    is called with something that cannot be cut into rows.
    """
    module, base = lvlm.module, lvlm.module.base_model
    calls: list[tuple[tuple, Given]] = []
    seen: list[Any] = []

    def stop(decoder: Any, args: tuple, given: Given) -> None:
        calls.append((args, given))
        raise Ended

    def answer(*args: Any, **options: Any) -> Any:  # the model's own call for image features
        seen.append(compute(*args, **options) if features is None else features)
        return seen[-1]

    compute: Any = getattr(base, "get_image_features", None)
    loans = [] if compute is None else [(base, {"get_image_features": answer})]
    with ExitStack() as stack:
        hook = module.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
        stack.callback(hook.remove)
        stack.enter_context(suppress(Ended))
        stack.enter_context(undisturbed(module))
        stack.enter_context(lent(loans))
        base(**on_device(inputs, lvlm.device), use_cache=False)
    if not calls or calls[0][0]:
        raise ModelError(
            f"{type(module).__name__} called its decoder {len(calls)} times, or with positional "
            "arguments; expected one call per pass, with keywords only. Please report this class."
        )
    return checked(calls[0][1]), seen[-1] if seen else features


def checked(given: Mapping[str, Any]) -> Given:
    """The arguments without those of the cache; all others can be cut into rows."""
    out = {k: v for k, v in given.items() if k not in DROPPED and v is not None}
    known = ("inputs_embeds", "attention_mask", "position_ids")
    plain = (type(None), bool, int, float, str)
    strange = [k for k, v in out.items() if k not in known and not isinstance(v, plain)]
    if strange or not isinstance(out.get("inputs_embeds"), Tensor):
        raise ModelError(
            f"The decoder is called with {sorted(out)}; expected inputs_embeds, attention_mask, "
            f"position_ids and plain options; cannot cut {strange} into rows. Please report this class."
        )
    return out

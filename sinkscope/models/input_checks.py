"""Refuse inputs that a model does not take, or takes and computes something else."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sinkscope.errors import InputError
from sinkscope.models.pictures import not_scaled
from sinkscope.models.wrapping import Inputs

TYPES = ("token_type_ids", "mm_token_type_ids")
PER_POSITION = ("input_ids", "attention_mask", "position_ids", *TYPES)
WHOLE = ("input_ids", "position_ids", *TYPES, "image_grid_thw")
SETTINGS = {
    "past_key_values",
    "inputs_embeds",
    "labels",
    "use_cache",
    "logits_to_keep",
    "return_dict",
}
SETTINGS |= {
    "mm_encoder_outputs",
    "output_attentions",
    "output_hidden_states",
    "cache_position",
    "output_router_logits",
}
SETTINGS |= {
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "encoder_outputs",
    "rope_deltas",
}
"""What a forward takes beside inputs: sorted out, because it fills a cache or changes the pass."""


def types_of(module: Any) -> str:
    """The input that is 1 at image tokens, which attention or positions follow; "" for none."""
    if module.config.model_type in ("gemma3", "shieldgemma2"):
        return "token_type_ids"
    takes = inspect.signature(type(module).forward).parameters
    return "mm_token_type_ids" if "mm_token_type_ids" in takes else ""


def check_names(ready: Inputs, module: Any, processor: Any) -> None:
    """Refuse inputs that the model does not take, and those that are no inputs."""
    made = getattr(processor, "model_input_names", None) or ()
    takes = set(inspect.signature(type(module).forward).parameters) - {"self", "kwargs"}
    wanted = {*PER_POSITION, *made, *takes} - SETTINGS
    if strange := sorted(set(ready) - wanted):  # a filled cache, or how a pass is to run
        got = f"Got the inputs {strange}; expected some of {sorted(wanted)}: leave the others out"
        raise InputError(f"{got}. Settings of decoding go to lvlm.generate(...).")


def check_inputs(
    inputs: Any, vocab: int, image_id: int, video_id: int | None, *, images: bool = True
) -> dict[str, Any]:
    """Check processor output and give it a mask; ``vocab`` ids have embeddings, and the image's may.
    ``images`` is whether the model takes any."""
    if not isinstance(inputs, Mapping):
        got = f"Got inputs of type {type(inputs).__name__}; expected the processor's output, a dict"
        made = "processor(images=..., text=..., return_tensors='pt')"
        raise InputError(f"{got}. Write lvlm.prepare(inputs={made}).")
    out = {name: value for name, value in inputs.items() if value is not None}
    ids, pixels, found = out.get("input_ids"), "pixel_values_videos" in out, 0
    if video_id is not None and isinstance(ids, Tensor):
        found = int((ids == video_id).sum())
    if found or pixels:  # for videos the tower runs once more, and that is not read
        got = f"Got {found} video tokens (id {video_id}) and {'' if pixels else 'no '}"
        write = "Write the frames as images=[frame, ...]."
        raise InputError(f"{got}pixel_values_videos; expected still images. {write}")
    needed = ("input_ids", "pixel_values")[: 1 + images]
    planes = [name for name in out if any(word in name for word in ("pixel_values", "patches"))]
    if missing := [
        name
        for name in needed
        if name not in (*out, *["pixel_values"] * bool(planes or _of_words(ids, image_id)))
    ]:
        got = f"Got inputs with {sorted(inputs)}; expected at least {needed}, missing {missing}"
        raise InputError(f"{got}. Pass the processor's whole output.")
    for name in {*PER_POSITION, *WHOLE, *needed} & out.keys():
        if not isinstance(out[name], Tensor):
            got = f"Got {name} of type {type(out[name]).__name__}"
            raise InputError(f"{got}; expected a tensor. Write return_tensors='pt'.")
        dtype, wanted = out[name].dtype, ""
        if name in WHOLE and dtype not in (torch.int64, torch.int32):
            wanted = f"int64. Write {name}.long()"
        elif name == "pixel_values" and not dtype.is_floating_point:
            wanted = "floats, normalised as by this model's image processor"
        if wanted or dtype.is_complex:
            raise InputError(f"Got {name} of {dtype}; expected {wanted or '0 and 1'}.")
    mask = out.setdefault("attention_mask", torch.ones_like(out["input_ids"]))
    if problem := _wrong_ids(out["input_ids"], mask, vocab, image_id):
        raise InputError(f"Got {problem}")
    for name in planes:
        if isinstance(out[name], Tensor) and not torch.isfinite(out[name]).all():
            raise InputError(f"Got NaN or infinite {name}; expected finite pixels.")
    return out


def check_given(
    ready: Any,
    masked: bool,
    processor: Any,
    types: str,
    image_id: int,
    *,
    gridded: bool,
    planes: bool,
) -> None:
    """Refuse inputs that run and give wrong logits; ``types`` is what `types_of` says, and ``gridded``
    whether the model takes a grid of patches for every image, ``planes`` whether it convolves images."""
    ids, pixels, got = ready["input_ids"], ready.get("pixel_values", torch.zeros(0)), ""
    marks, position = ready.get(types), ready.get("position_ids", ids)
    if span := not_scaled(pixels, getattr(processor, "image_processor", None)):
        got = f"pixel_values from {span}, as before normalising; expected normalised ones"
    elif planes and pixels.ndim == 4 and pixels.shape[1] > 4 > pixels.shape[3]:
        got = "channels last; expected them in front. Write pixel_values.permute(0, 3, 1, 2)"
    elif wrong := _wrong_grid(ready, pixels, needed=gridded):
        got = wrong
    elif types and (marks is None or not torch.equal(marks == 1, ids == image_id)):
        got = f"{types} that are {'missing' if marks is None else 'not 1 at image tokens alone'}"
        got += "; expected 1 there and 0 elsewhere, or images are read as text"
    elif position.shape[-2:] != ids.shape or position.shape[:-2] not in ((), (3,), (4,)):
        got = f"position_ids of shape {tuple(position.shape)}; expected that of input_ids"
    elif not masked and _padded(ids, getattr(processor, "tokenizer", None)):
        got = "padding in input_ids and no attention_mask; expected 1 for tokens, 0 for padding"
    if got:
        raise InputError(f"Got {got}. Pass all that this model's processor makes.")


def _wrong_grid(ready: Any, pixels: Tensor, *, needed: bool) -> str:
    """What is wrong with the grids of packed patches, or ""; ``needed`` is whether the model takes them."""
    grid = ready.get("image_grid_thw")
    if grid is None:
        bare = needed and pixels.numel()
        return (
            "pixel_values without image_grid_thw; expected the grid of every image" if bare else ""
        )
    if pixels.ndim not in (2, 4):
        return ""
    fits = grid.ndim == 2 and grid.shape[1] == 3 and not bool((grid < 1).any())
    if fits and len(pixels) == int(grid.prod(dim=1).sum()):
        return ""
    got = f"image_grid_thw {grid.tolist()} and pixel_values of shape {tuple(pixels.shape)}"
    return f"{got}; expected [time, rows, columns] of every image, and a line of pixels per patch"


def _padded(ids: Tensor, tokenizer: Any) -> bool:
    """Whether a row begins or ends with padding; of a token with another use, with two."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    pad, bos, eos = (getattr(tokenizer, name, None) for name in names)
    edges = ids[:, : 1 + (pad == bos)], ids[:, -1 - (pad == eos) :]
    return pad is not None and any(bool((e == pad).all(dim=1).any()) for e in edges)


def _of_words(ids: Any, image_id: Any) -> bool:
    """Whether a prompt shows no image, by the token that images replace."""
    known = isinstance(ids, Tensor) and isinstance(image_id, int) and image_id >= 0
    return known and not bool((ids == image_id).any())


def _wrong_ids(ids: Tensor, mask: Tensor, vocab: int, image_id: int) -> str:
    if ids.ndim != 2:
        shape = f"input_ids of shape {tuple(ids.shape)}"
        return f"{shape}; expected a tensor [batch pos]. Write input_ids[None] for a single row."
    if not ids.numel():
        return f"input_ids of shape {tuple(ids.shape)}; expected a row and a token at least."
    if mask.shape != ids.shape:
        shapes = f"{tuple(mask.shape)} and input_ids of shape {tuple(ids.shape)}"
        return f"an attention_mask of shape {shapes}; expected the same shape."
    if len(other := mask[(mask != 0) & (mask != 1)].unique()):
        got = f"an attention_mask with the values {other[:3].tolist()}"
        return f"{got}; expected 1 for tokens and 0 for padding. Write one text per row."
    if empty := (~mask.bool()).all(dim=1).nonzero().flatten().tolist():
        return f"rows {empty} with nothing but padding; expected at least one token per row."
    if len(strange := ids[(ids < 0) | (ids >= vocab) & (ids != image_id)]):
        got = f"the token id {int(strange[0])}; expected 0 to {vocab - 1}. These inputs were made"
        return f"{got} by another model's processor: use the one that belongs to this model."
    return ""

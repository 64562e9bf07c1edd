"""From images and text to model inputs, and to the map of what every position of a batch is."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sinkscope.anatomy.towers import Anatomy
from sinkscope.errors import InputError
from sinkscope.models.pictures import not_scaled
from sinkscope.models.prompts import as_rows, render
from sinkscope.models.token_map import build_token_map, original_boxes, see, vision_map
from sinkscope.models.wrapping import Inputs
from sinkscope.tokens import TokenMap

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
SETTINGS |= {"output_attentions", "output_hidden_states", "cache_position", "output_router_logits"}
SETTINGS |= {
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "encoder_outputs",
    "rope_deltas",
}
"""What a forward takes beside inputs: sorted out, because it fills a cache or changes the pass."""
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError)
"""What models of transformers raise on inputs that do not fit."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A prepared batch: ``inputs`` for the model, and ``tokens``, what every position is.

    Attributes:
        images: The images of every row, as people see them; None if only processor output was given.
        texts: The prompt of every row after the chat template; None likewise.
        made_for: The layout of the model it was prepared for (`layout_of`).
    """

    inputs: Inputs
    tokens: TokenMap
    images: tuple[tuple[Image.Image, ...], ...] | None = None
    texts: tuple[str, ...] | None = None
    made_for: tuple[Any, ...] | None = None

    def __len__(self) -> int:
        return int(self.tokens.ids.shape[0])


def layout_of(anatomy: Anatomy) -> tuple[Any, ...]:
    """What a sample must agree with: family, ids and sizes, whatever kernel and weights."""
    towers = ((tower.n_layers, tower.d_model) for tower in (anatomy.vision, anatomy.language))
    ids = (anatomy.image_token_id, anatomy.vocab, anatomy.drops, anatomy.merge)
    return (anatomy.model_type, *ids, *towers)


def make_sample(lvlm: Any, *given: Any, rendered: Any = False) -> Sample:
    """Inputs and their TokenMap, of ``given`` images, text and inputs; see `LVLM.prepare`."""
    images, text, inputs = given
    module, processor = lvlm.module, lvlm.processor
    if inputs is not None and (images is not None or text is not None):
        got = "Got inputs together with images or text; expected either"
        raise InputError(f"{got}. Write prepare(inputs=...) or prepare(images=..., text=...).")
    raw, rows, prompts = inputs, [], []
    if inputs is None:
        raw, rows, prompts = process(processor, images, text, rendered=rendered)
    sizes = [image.size for row in rows for image in row] or None
    known, image_id = module.get_input_embeddings().weight.shape[0], lvlm.anatomy.image_token_id
    ready = check_inputs(raw, known, image_id, getattr(module.config, "video_token_id", None))
    if inputs is not None:
        _check_names(ready, module, processor)
        masked = inputs.get("attention_mask") is not None
        _check_given(ready, masked, processor, types_of(module), image_id)
    shown = tuple(map(tuple, rows)) or None, tuple(prompts) or None
    tokens = token_map(lvlm, ready, sizes)
    return Sample(ready, tokens, *shown, layout_of(lvlm.anatomy))


def token_map(lvlm: Any, ready: Inputs, sizes: Any = None) -> TokenMap:
    """What every position of checked inputs is; where ViT tokens go is measured, once per shape."""
    ids, live = ready["input_ids"].cpu(), ready["attention_mask"].cpu().bool()
    visual = (ids == lvlm.anatomy.image_token_id) & live
    processor, found, seen, packed = lvlm.processor, None, [], False
    try:
        found = lvlm._mapped(ready, visual)
    except REFUSALS as error:
        first = str(error).strip().partition("\n")[0][:300]
        raise InputError(
            f"The model does not take these inputs ({type(error).__name__}: {first}); expected all that its "
            "own processor makes of these images and this text, with as many image tokens. Was the prompt "
            "truncated? Write lvlm.prepare(inputs=processor(...))."
        ) from error
    vision = getattr(lvlm.module.config, "vision_config", None)
    side = getattr(vision, "patch_size", 1) if vision else 1
    if found is not None:
        seen, packed = see(found, ready, side[0] if isinstance(side, (list, tuple)) else side)
    settings = getattr(processor, "image_processor", None)
    grids = original_boxes(seen, packed, settings, ready, sizes)
    own = bool(grids) and grids[0].original
    return build_token_map(
        (ids, live, visual),
        found,
        vision_map(found, seen, packed, grids, lvlm.anatomy.prefix),
        seen,
        _groups(ready, len(seen), sizes),
        "original" if own else "input",
        getattr(processor, "tokenizer", processor),
        lvlm.anatomy.vision.missing,
    )


def _groups(ready: Inputs, many: int, sizes: Any) -> list[int]:
    """The image of every picture of the tower: tiles of one image stand in one row of the pixels."""
    images = [len(sizes)] if sizes else [len(x) for n, x in ready.items() if n == "image_sizes"]
    if images and many % images[0] == 0 and many > images[0]:
        five = [x.shape for x in ready.values() if isinstance(x, Tensor) and x.ndim == 5]
        if five and five[0][0] == images[0]:
            return [i // (many // images[0]) for i in range(many)]
    return list(range(many))


def types_of(module: Any) -> str:
    """The input that is 1 at image tokens, which attention or positions follow; "" for none."""
    if module.config.model_type in ("gemma3", "shieldgemma2"):
        return "token_type_ids"
    takes = inspect.signature(type(module).forward).parameters
    return "mm_token_type_ids" if "mm_token_type_ids" in takes else ""


def _check_names(ready: Inputs, module: Any, processor: Any) -> None:
    """Refuse inputs that the model does not take, and those that are no inputs."""
    made = getattr(processor, "model_input_names", None) or ()
    takes = set(inspect.signature(type(module).forward).parameters) - {"self", "kwargs"}
    wanted = {*PER_POSITION, *made, *takes} - SETTINGS
    if strange := sorted(set(ready) - wanted):  # a filled cache, or how a pass is to run
        got = f"Got the inputs {strange}; expected some of {sorted(wanted)}: leave the others out"
        raise InputError(f"{got}. Settings of decoding go to lvlm.generate(...).")


def process(
    processor: Any, images: Any, text: Any, *, rendered: Any = False
) -> tuple[dict, list, list[str]]:
    """Model inputs, left-padded, images by row and prompts by row; see `LVLM.prepare`."""
    rows, asked = as_rows(images, text)
    check_processor(processor, len(rows))
    if not isinstance(rendered, bool) or (rendered and not all(isinstance(a, str) for a in asked)):
        got = f"Got rendered={rendered!r} and {type(asked[0]).__name__} as text"
        raise InputError(f"{got}; expected True for finished prompts, each a str, or False.")
    pairs = enumerate(zip(rows, asked, strict=True))
    prompts = [render(processor, len(r), one, rendered=rendered, row=i) for i, (r, one) in pairs]
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
        got = "Got images and text, but this LVLM has no processor; expected one. Write"
        raise InputError(f"{got} ss.LVLM(model, processor), or prepare(inputs=...) with your own.")
    name = type(processor).__name__
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            got = f"Got a {name} as processor, which has no {part}; expected the model's whole"
            write = "ss.LVLM(model, transformers.AutoProcessor.from_pretrained(...))"
            raise InputError(f"{got} processor. Write {write}.")
    strategy = "vision_feature_select_strategy"
    for setting, place in (("patch_size", "vision_config.patch_size"), (strategy, strategy)):
        if getattr(processor, setting, "") is None:
            got = f"Got a {name} without {setting}; expected the model's, to count image tokens"
            write = f"Write processor.{setting} = model.config.{place}, and"
            more = "processor.num_additional_image_tokens = 1 if the vision tower has a CLS token"
            raise InputError(f"{got}. {write} {more}.")
    if rows > 1 and processor.tokenizer.pad_token is None:
        got = f"Got {rows} rows and a tokenizer without a pad token; expected one, or a single row"
        write = "processor.tokenizer.pad_token = processor.tokenizer.eos_token"
        raise InputError(f"{got}. Write {write}: padding is masked.")


def check_inputs(inputs: Any, vocab: int, image_id: int, video_id: int | None) -> dict[str, Any]:
    """Check processor output and give it a mask; ``vocab`` ids have embeddings, and the image's may."""
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
    needed = ("input_ids", *["pixel_values"] * (image_id is not None))
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


def _check_given(ready: Any, masked: bool, processor: Any, types: str, image_id: int) -> None:
    """Refuse inputs that run and give wrong logits; ``types`` is `Family.types`."""
    ids, pixels, got = ready["input_ids"], ready.get("pixel_values", torch.zeros(0)), ""
    marks, position = ready.get(types), ready.get("position_ids", ids)
    if span := not_scaled(pixels, getattr(processor, "image_processor", None)):
        got = f"pixel_values from {span}, as before normalising; expected normalised ones"
    elif pixels.ndim == 4 and pixels.shape[1] > 4 > pixels.shape[3]:
        got = "channels last; expected them in front. Write pixel_values.permute(0, 3, 1, 2)"
    elif types and (marks is None or not torch.equal(marks == 1, ids == image_id)):
        got = f"{types} that are {'missing' if marks is None else 'not 1 at image tokens alone'}"
        got += "; expected 1 there and 0 elsewhere, or images are read as text"
    elif position.shape[-2:] != ids.shape or position.shape[:-2] not in ((), (3,), (4,)):
        got = f"position_ids of shape {tuple(position.shape)}; expected that of input_ids"
    elif not masked and _padded(ids, getattr(processor, "tokenizer", None)):
        got = "padding in input_ids and no attention_mask; expected 1 for tokens, 0 for padding"
    if got:
        raise InputError(f"Got {got}. Pass all that this model's processor makes.")


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

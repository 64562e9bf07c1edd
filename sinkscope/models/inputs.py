"""From images and text to model inputs, and to the map of what every position of a batch is."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor, nn

from sinkscope.anatomy.towers import Anatomy
from sinkscope.errors import InputError
from sinkscope.models.input_checks import check_given, check_inputs, check_names, types_of
from sinkscope.models.patch_grid import Seen, original_boxes, ramp, read_tiles, see
from sinkscope.models.patch_map import PatchMap
from sinkscope.models.prompts import as_rows, render
from sinkscope.models.token_map import build_token_map, vision_map
from sinkscope.models.wrapping import Inputs
from sinkscope.tokens import TokenMap

REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, KeyError)
REFUSALS += (AttributeError, ImportError, AssertionError)
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


class Processed(NamedTuple):
    """What `process` makes of images and text, which `LVLM.prepare` takes as images."""

    inputs: dict[str, Any]  # of the model, left-padded
    rows: list[list[Image.Image]]  # images by row
    prompts: list[str]  # after the chat template, by row


def positions_for(module: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with positions that count from the first live token of a row, where padding moves it."""
    # Qwen-VL derives positions from mask and image grid itself
    computed = callable(getattr(module.base_model, "get_rope_index", None))
    if computed or bool(inputs["attention_mask"].all()):
        return dict(inputs)
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


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
    if isinstance(images, Processed):
        raw, rows, prompts = images
    elif inputs is None and reads_words_only(module):
        raw, prompts = process_words(processor, images, text, rendered=rendered)
    elif inputs is None:
        raw, rows, prompts = process(processor, images, text, rendered=rendered)
    sizes = [image.size for row in rows for image in row] or None
    known, image_id = module.get_input_embeddings().weight.shape[0], lvlm.anatomy.image_token_id
    video = getattr(module.config, "video_token_id", None)
    video = None if video == image_id else video
    ready = check_inputs(raw, known, image_id, video, images=not reads_words_only(module))
    if inputs is not None:
        check_names(ready, module, processor)
        masked = inputs.get("attention_mask") is not None
        gridded = "image_grid_thw" in inspect.signature(type(module).forward).parameters
        planes = any(isinstance(part, nn.Conv2d) for part in module.modules())
        parts = dict(gridded=gridded, planes=planes)
        check_given(ready, masked, processor, types_of(module), image_id, **parts)
    shown = tuple(map(tuple, rows)) or None, tuple(prompts) or None

    def ramps() -> dict[str, Any]:
        numbers = iter(range(len(sizes or ())))
        drawn = [[ramp(image.size, next(numbers)) for image in row] for row in rows]
        return encode(processor, drawn, prompts)

    tokens = token_map(lvlm, ready, sizes, ramps if rows else None)
    return Sample(ready, tokens, *shown, layout_of(lvlm.anatomy))


def token_map(
    lvlm: Any, ready: Inputs, sizes: Any = None, ramps: Callable[[], Inputs] | None = None
) -> TokenMap:
    """What every position of checked inputs is; where ViT tokens go is measured, once per shape."""
    ids, live = ready["input_ids"].cpu(), ready["attention_mask"].cpu().bool()
    visual = (ids == lvlm.anatomy.image_token_id) & live
    processor, found, seen, packed = lvlm.processor, None, [], False
    try:
        found = lvlm._mapped(ready, visual)
    except REFUSALS as error:
        first = str(error).strip().partition("\n")[0][:300]
        got = [int(row.sum()) for row in visual]
        raise InputError(
            f"Got {got} image tokens per row, and the model does not take these inputs "
            f"({type(error).__name__}: {first}); expected all that its own processor makes of these images and "
            "this text, its patch_size and num_additional_image_tokens being those of the vision tower. Was the "
            "prompt truncated? Write lvlm.prepare(inputs=processor(...))."
        ) from error
    vision = getattr(lvlm.module.config, "vision_config", None)
    side = getattr(vision, "patch_size", 1) if vision else 1
    if found is not None:
        seen, packed = see(found, ready, side[0] if isinstance(side, (list, tuple)) else side)
    settings = getattr(processor, "image_processor", None)
    grids = original_boxes(seen, packed, settings, ready, sizes)
    groups, whole = _groups(ready, len(seen), sizes), [False] * len(seen)
    if found is not None and sizes and len(seen) > len(sizes) and not packed and ramps:
        tiles = _tiles(found, seen, ramps(), sizes, settings)
        if None not in tiles:
            groups, whole = [one.image for one in tiles], [one.whole for one in tiles]
            grids = [
                replace(grid, scale=one.scale, offset=one.offset, original=True)
                for grid, one in zip(grids, tiles, strict=True)
            ]
    own = bool(grids) and all(grid.original for grid in grids)
    tokens = build_token_map(
        (ids, live, visual),
        found,
        vision_map(found, seen, packed, grids, lvlm.anatomy.prefix, lvlm.anatomy.suffix),
        seen,
        groups,
        "original" if own else "input",
        getattr(processor, "tokenizer", processor),
        lvlm.anatomy.vision.missing,
        [whole[i] and groups.count(groups[i]) > 1 for i in range(len(seen))],
    )
    for one in tokens.image_index[tokens.image_index >= 0].unique():
        rows = (tokens.image_index == one).any(dim=1).nonzero().flatten().tolist()
        if len(rows) > 1:
            got = f"Got {[int(row.sum()) for row in visual]} image tokens per row, so that those of image"
            wanted = "the tokens of an image in one row. Was a prompt truncated?"
            raise InputError(f"{got} {int(one)} are in the rows {rows}; expected {wanted}")
    return tokens


def _tiles(
    found: PatchMap, seen: Sequence[Seen], made: Inputs, sizes: Any, settings: Any
) -> list[Any]:
    """Where every row of ViT tokens lies in its image, as a processor shows with ramps."""
    planes = next((x for x in made.values() if isinstance(x, Tensor) and x.ndim > 3), None)
    if planes is None or planes.shape[-3] != 3:
        return [None]
    tiles = read_tiles(planes, sizes, settings)
    pictures = [int(found.pixels[one.tokens, 0].amax()) for one in seen]
    return [tiles[at] if 0 <= at < len(tiles) else None for at in pictures]


def _groups(ready: Inputs, many: int, sizes: Any) -> list[int]:
    """The image of every picture of the tower: tiles of one image stand in one row of the pixels."""
    images = [len(sizes)] if sizes else [len(x) for n, x in ready.items() if n == "image_sizes"]
    if images and many % images[0] == 0 and many > images[0]:
        five = [x.shape for x in ready.values() if isinstance(x, Tensor) and x.ndim == 5]
        if five and five[0][0] == images[0]:
            return [i // (many // images[0]) for i in range(many)]
    return list(range(many))


def process(processor: Any, images: Any, text: Any, *, rendered: Any = False) -> Processed:
    """Open images and make model inputs of them and of text; see `LVLM.prepare`. No model is run."""
    rows, asked = as_rows(images, text)
    check_processor(processor, len(rows))
    if not isinstance(rendered, bool) or (rendered and not all(isinstance(a, str) for a in asked)):
        got = f"Got rendered={rendered!r} and {type(asked[0]).__name__} as text"
        raise InputError(f"{got}; expected True for finished prompts, each a str, or False.")
    pairs = enumerate(zip(rows, asked, strict=True))
    prompts = [render(processor, len(r), one, rendered=rendered, row=i) for i, (r, one) in pairs]
    return Processed(encode(processor, rows, prompts), rows, prompts)


def encode(processor: Any, rows: list[list[Any]], prompts: list[str]) -> dict[str, Any]:
    """What a processor makes of the images of every row and their prompts."""
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
    return dict(encoded)


def reads_words_only(module: Any) -> bool:
    """Whether a model's forward takes no pixels at all."""
    takes = inspect.signature(type(module).forward).parameters
    return not any("pixel" in name or "image" in name for name in takes)


def process_words(
    tokenizer: Any, images: Any, text: Any, *, rendered: Any = False
) -> tuple[dict, list[str]]:
    """Inputs of a text-only model, left-padded, and the prompts; see `LVLM.prepare`."""
    if images is not None or text is None:
        got = "Got images for a text-only model" if images is not None else "Got no text"
        raise InputError(f"{got}; expected text alone. Write lvlm.prepare(text='...').")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is None:
        got = "Got text, but this LVLM has no tokenizer; expected one. Write"
        raise InputError(f"{got} ss.LVLM(model, tokenizer), or prepare(inputs=...) with your own.")
    texts = [text] if isinstance(text, str) else list(text)
    if not texts or not all(isinstance(one, str) and one for one in texts):
        raise InputError(f"Got text={text!r}; expected a question, or a list of them, not empty.")
    if len(texts) > 1 and tokenizer.pad_token is None:
        got = f"Got {len(texts)} rows and a tokenizer without a pad token; expected one"
        raise InputError(f"{got}. Write tokenizer.pad_token = tokenizer.eos_token.")
    if not rendered and tokenizer.chat_template:
        turns = ([{"role": "user", "content": one}] for one in texts)
        options = dict(add_generation_prompt=True, tokenize=False)
        texts = [str(tokenizer.apply_chat_template(turn, **options)) for turn in turns]
    bos = tokenizer.bos_token
    return dict(
        tokenizer(
            texts,
            padding=len(texts) > 1,
            padding_side="left",
            return_tensors="pt",
            return_token_type_ids=False,
            add_special_tokens=not (bos and all(one.startswith(bos) for one in texts)),
        )
    ), texts


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

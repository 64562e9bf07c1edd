"""From images and text to model inputs, and to the map of what every position of a batch is."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sinkscope.anatomy.families import PatchGrid
from sinkscope.anatomy.towers import Anatomy
from sinkscope.errors import InputError
from sinkscope.models.pictures import not_scaled
from sinkscope.models.prompts import as_rows, render
from sinkscope.models.wrapping import Inputs
from sinkscope.tokens import KINDS, VISION_KINDS, TokenMap, VisionMap

TYPES = ("token_type_ids", "mm_token_type_ids")
PER_POSITION = ("input_ids", "attention_mask", "position_ids", *TYPES)
WHOLE = ("input_ids", "position_ids", *TYPES, "image_grid_thw")
BROKEN = "\ufffd"  # what a tokenizer writes for bytes that are no character


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


def make_sample(
    module: Any, processor: Any, anatomy: Anatomy, *given: Any, rendered: Any = False
) -> Sample:
    """Inputs and their TokenMap, of ``given`` images, text and inputs; see `LVLM.prepare`."""
    images, text, inputs = given
    config, family = module.config, anatomy.family
    if inputs is not None and (images is not None or text is not None):
        got = "Got inputs together with images or text; expected either"
        raise InputError(f"{got}. Write prepare(inputs=...) or prepare(images=..., text=...).")
    raw, rows, prompts = inputs, [], []
    if inputs is None:
        raw, rows, prompts = process(processor, images, text, rendered=rendered)
    sizes = [image.size for row in rows for image in row] or None
    known, video = module.get_input_embeddings().weight.shape[0], "video_token_id"
    ready = check_inputs(raw, known, anatomy.image_token_id, getattr(config, video, None))
    made = getattr(processor, "model_input_names", None) or ()
    wanted = {*PER_POSITION, *family.image_inputs, *made}
    strange = sorted(set(ready) - wanted)  # a filled cache, or how a pass is to run
    if inputs is not None and strange:
        got = f"Got the inputs {strange}; expected some of {sorted(wanted)}: leave the others out"
        raise InputError(f"{got}. Settings of decoding go to lvlm.generate(...).")
    if inputs is not None:
        masked = inputs.get("attention_mask") is not None
        _check_given(ready, masked, processor, family.types, anatomy.image_token_id)
    grids = family.grids(config, getattr(processor, "image_processor", None), ready, sizes)
    tokens = build_token_map(anatomy, config, ready, grids, getattr(processor, "tokenizer", None))
    shown = tuple(map(tuple, rows)) or None, tuple(prompts) or None
    return Sample(ready, tokens, *shown, layout_of(anatomy))


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
    needed = ("input_ids", "pixel_values")
    if missing := [name for name in needed if name not in out]:
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
    if not torch.isfinite(out["pixel_values"]).all():
        raise InputError("Got NaN or infinite pixel_values; expected finite pixels.")
    return out


def _check_given(ready: Any, masked: bool, processor: Any, types: str, image_id: int) -> None:
    """Refuse inputs that run and give wrong logits; ``types`` is `Family.types`."""
    ids, pixels, got = ready["input_ids"], ready["pixel_values"], ""
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


def words_of(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of every token of a row, special ones too, with its blanks; see `TokenMap.words`."""

    def text(some: Sequence[int]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return tokenizer.decode(list(some), **options)

    def word(token: int) -> str:  # a blank that begins a text is dropped: then the piece is shown
        piece = tokenizer.convert_ids_to_tokens(token)
        return text([token]) or (piece or f"token {token}").replace("▁", " ")

    known = {token: word(token) for token in set(ids)}
    words = [known[token] for token in ids]
    for at, size in itertools.product(range(len(words)), (2, 3, 4)):  # bytes of a character
        if words[at].endswith(BROKEN) and at + size <= len(ids):
            whole = text(ids[at : at + size]).strip(" ")
            if BROKEN not in whole:
                words[at : at + size] = [f"{whole} {i + 1}/{size}" for i in range(size)]
    return tuple(words)


def build_token_map(
    anatomy: Anatomy, config: Any, inputs: Inputs, grids: Sequence[PatchGrid], tokenizer: Any
) -> TokenMap:
    """What every position of the batch is."""
    ids = inputs["input_ids"].cpu()
    live = inputs["attention_mask"].cpu().bool()
    visual = (ids == anatomy.image_token_id) & live
    prefix, unit = anatomy.family.prefix(config), anatomy.merge**2
    # What the projector sees of an image, merged: CLS too where it is not dropped.
    counts = [(len(prefix) + g.rows * g.columns - anatomy.drops) // unit for g in grids]
    batch_rows, image, index, rank = _place_images(visual, counts)
    vision = _vision_map(anatomy, config, inputs, grids, batch_rows)
    sources = rank[..., None] * unit + torch.arange(unit)
    if anatomy.family.pooled:
        for i, grid in enumerate(grids):
            down, right = _blockwise(grid, anatomy.merge)
            sources[index == i] = (down * grid.columns + right)[sources[index == i]]
    sources = (sources + anatomy.drops).masked_fill(~visual[..., None], -1)
    picked = (index.clamp(min=0)[..., None], sources.clamp(min=0))
    box = vision.box[picked]
    box = torch.cat([box[..., :2].amin(-2), box[..., 2:].amax(-2)], dim=-1)
    firsts = (patch[picked][..., 0] for patch in (vision.row, vision.column))
    row, column = (torch.where(visual & (x >= 0), x // anatomy.merge, -1) for x in firsts)
    kind = torch.where(live, KINDS.index("text"), KINDS.index("pad"))
    special = torch.tensor(getattr(tokenizer, "all_special_ids", None) or [], dtype=torch.long)
    kind[torch.isin(ids, special) & live] = KINDS.index("special")
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None:  # only at a row's first live position
        first = torch.arange(live.shape[1]) == live.int().argmax(dim=1)[:, None]
        kind[first & live & (ids == bos)] = KINDS.index("bos")
    kind[visual] = KINDS.index("image")
    words = () if tokenizer is None else (words_of(tokenizer, line) for line in ids.tolist())
    return TokenMap(
        ids=ids,
        live=live,
        kind=kind,
        image=image,
        image_index=index,
        row=row,
        column=column,
        sources=sources,
        box=box.masked_fill(~visual[..., None], float("nan")),
        box_unit="original" if grids and grids[0].original else "input",
        vision=vision,
        words=tuple(words) or None,
    )


def _place_images(visual: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """Batch row of every image, by filling rows' image positions in order; and where its tokens are.

    Image of the row, image of the batch, and token of the image, int ``[batch pos]``, -1 elsewhere.
    """
    images, sizes, found = torch.arange(len(counts)), torch.tensor(counts), visual.sum(1)
    ends, stops, wanted = found.cumsum(0), sizes.cumsum(0), ""
    rows = torch.searchsorted(ends, stops - sizes, right=True)
    short = stops > ends[rows.clamp(max=len(ends) - 1)]
    if short.any():
        at = int(short.int().argmax())
        wanted = f"the row of image {at} to hold {counts[at]} more. Was the prompt truncated?"
    elif int(ends[-1]) > sum(counts):
        wanted = "as many as the images have. Pass one image per group of image tokens."
    if wanted:
        raise InputError(
            f"Got {found.tolist()} image tokens per row for {len(counts)} images of {counts} tokens; "
            f"expected {wanted} Pass the whole output of the model's own processor for these images; "
            "its patch_size and num_additional_image_tokens must be those of the vision tower."
        )
    index = images.repeat_interleave(sizes)
    order = images - torch.searchsorted(rows, rows)  # images of a row follow one another
    rank = torch.cat([torch.arange(count) for count in counts])
    empty = torch.full(visual.shape, -1)
    return rows, *(empty.masked_scatter(visual, x) for x in (order[index], index, rank))


def _vision_map(
    anatomy: Anatomy, config: Any, inputs: Inputs, grids: Sequence[PatchGrid], batch_row: Tensor
) -> VisionMap:
    prefix = anatomy.family.prefix(config)
    counts = [g.rows * g.columns + len(prefix) for g in grids]
    n, most, start = len(grids), max(counts), len(prefix)
    kind = torch.zeros(n, most, dtype=torch.long)
    row, column, layout = (torch.full((n, most), -1) for _ in range(3))
    box = torch.full((n, most, 4), float("nan"))
    kind[:, :start] = torch.tensor([VISION_KINDS.index(name) for name in prefix], dtype=torch.long)
    for i, (grid, stop) in enumerate(zip(grids, counts, strict=True)):
        kind[i, start:stop] = VISION_KINDS.index("patch")
        cells = _blockwise(grid, 1 if anatomy.family.pooled else anatomy.merge)
        row[i, start:stop], column[i, start:stop] = cells
        box[i, start:stop] = grid.boxes()[cells].float()
    if anatomy.vision.packed:
        order, place = anatomy.family.order, torch.arange(sum(counts))
        layout[kind > 0] = order(config, inputs["image_grid_thw"].cpu()) if order else place
    shape = torch.tensor([[g.rows, g.columns] for g in grids])
    packed = layout if anatomy.vision.packed else None
    return VisionMap(kind, kind > 0, row, column, box, shape, packed, batch_row)


def _blockwise(grid: PatchGrid, merge: int) -> tuple[Tensor, Tensor]:
    """Row and column of every patch in merge blocks, then inside each; raster order for merge 1."""
    shape = (grid.rows // merge, grid.columns // merge, merge, merge)
    patches = torch.arange(grid.rows * grid.columns)
    block_row, block_column, inner_row, inner_column = torch.unravel_index(patches, shape)
    return block_row * merge + inner_row, block_column * merge + inner_column

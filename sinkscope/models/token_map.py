"""Token ids as words that a reader can recognise, one for every position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkscope.anatomy.patch_map import Frame
from sinkscope.anatomy.towers import Anatomy
from sinkscope.errors import InputError
from sinkscope.tokens import KINDS, VISION_KINDS, TokenMap, VisionMap

BROKEN = "\ufffd"

"""What a tokenizer writes for bytes that are no character."""

MOST_TOKENS = 4

"""A character of UTF-8 has at most four bytes, and a token at least one."""


def words_of(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of every token of a row.

    A character whose bytes lie in several tokens is written with each of them, and which part that
    token is: ``中 1/2``, ``中 2/2``. Bytes that make no character are ``�``.

    Args:
        tokenizer: A ``transformers`` tokenizer.
        ids: Token ids, with the special ones.

    Returns:
        One word per id, with its blanks.
    """
    known = {token: _word(tokenizer, token) for token in set(ids)}
    words = [known[token] for token in ids]
    at = 0
    while at < len(words):
        size, whole = _character(tokenizer, ids, words, at)
        if size > 1:
            words[at : at + size] = [f"{whole} {part + 1}/{size}" for part in range(size)]
        at += size
    return tuple(words)


def _word(tokenizer: Any, token: int) -> str:
    """One token alone. Tokenizers drop a blank that begins a text: then its piece is shown."""
    piece = tokenizer.convert_ids_to_tokens(token)
    return _text(tokenizer, [token]) or (piece or f"token {token}").replace("▁", " ")


def _character(tokenizer: Any, ids: Sequence[int], words: list[str], at: int) -> tuple[int, str]:
    """How many tokens from ``at`` on make whole characters, and the text of these."""
    if words[at].endswith(BROKEN):
        for size in range(2, MOST_TOKENS + 1):
            together = _text(tokenizer, list(ids[at : at + size]))
            if at + size <= len(ids) and BROKEN not in together:
                return size, together.strip(" ")
    return 1, words[at]


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


OTHER_SETTINGS = (
    "Pass the whole output of the model's own processor; its patch_size and num_additional_image_tokens "
    "must be those of the vision tower."
)


def build_token_map(
    anatomy: Anatomy,
    config: Any,
    inputs: Mapping[str, Any],
    frames: list[Frame],
    tokenizer: Any = None,
) -> TokenMap:
    """What every position of the batch is.

    Raises:
        InputError: If the image positions do not fit the images.
    """
    ids = inputs["input_ids"].cpu()
    live = inputs["attention_mask"].cpu().bool()
    visual = (ids == anatomy.image_token_id) & live
    prefix = anatomy.family.prefix(config)
    unit = anatomy.merge**2
    # What the projector sees of an image, merged: CLS too where it is not dropped.
    counts = [(len(prefix) + f.rows * f.columns - anatomy.drops) // unit for f in frames]
    rows_of_images = assign_images(visual, counts)
    vision = build_vision_map(anatomy, config, inputs, frames, rows_of_images)
    places = place_images(visual, counts, rows_of_images)
    sources = sources_of(places, frames, anatomy).masked_fill(~visual[..., None], -1)
    picked = (places.image_index.clamp(min=0)[..., None], sources.clamp(min=0))
    first = (picked[0][..., 0], picked[1][..., 0])
    box = vision.box[picked]
    box = torch.cat([box[..., :2].amin(-2), box[..., 2:].amax(-2)], dim=-1)
    words = None
    if tokenizer is not None:
        words = tuple(words_of(tokenizer, line) for line in ids.tolist())
    return TokenMap(
        ids=ids,
        live=live,
        kind=kinds_of(ids, live, visual, tokenizer),
        image=places.image,
        image_index=places.image_index,
        row=cells(vision.row[first], visual, anatomy.merge),
        column=cells(vision.column[first], visual, anatomy.merge),
        sources=sources,
        box=box.masked_fill(~visual[..., None], float("nan")),
        box_unit="original" if frames and frames[0].original else "input",
        vision=vision,
        words=words,
    )


def sources_of(places: Places, frames: Sequence[Frame], anatomy: Anatomy) -> Tensor:
    """Int ``[batch pos merge*merge]``: the ViT tokens of its image that feed each image position."""
    unit = anatomy.merge**2
    sources = places.rank[..., None] * unit + torch.arange(unit)
    if anatomy.family.pooled:
        for index, frame in enumerate(frames):
            row, column = blockwise_grid(frame, anatomy.merge)
            here = places.image_index == index
            sources[here] = (row * frame.columns + column)[sources[here]]
    return sources + anatomy.drops


def cells(patch: Tensor, visual: Tensor, merge: int) -> Tensor:
    """Rows or columns of merged cells from those of their first patches; -1 where there is none."""
    return torch.where(visual & (patch >= 0), patch // merge, -1)


class Places(NamedTuple):
    """Where the images lie in the batch; every tensor is Int ``[batch pos]``, -1 elsewhere."""

    image: Tensor
    """Which image of its row, from 0."""
    image_index: Tensor
    """Which image of the batch."""
    rank: Tensor
    """Which image token of its image, in order."""


def place_images(visual: Tensor, counts: Sequence[int], rows: Tensor) -> Places:
    """Hand out the image positions of every row to its images, in order.

    Args:
        visual: Bool ``[batch pos]``, True at image positions.
        counts: LLM tokens of every image.
        rows: The batch row of every image.
    """
    places = Places(*(torch.full(tuple(visual.shape), -1) for _ in range(3)))
    taken = dict.fromkeys(rows.tolist(), 0)
    order = dict.fromkeys(rows.tolist(), 0)
    for index, (count, row) in enumerate(zip(counts, rows.tolist(), strict=True)):
        here = visual[row].nonzero().flatten()[taken[row] : taken[row] + count]
        places.image[row, here], places.image_index[row, here] = order[row], index
        places.rank[row, here] = torch.arange(count)
        taken[row] += count
        order[row] += 1
    return places


def assign_images(visual: Tensor, counts: Sequence[int]) -> Tensor:
    """The batch row of every image, by filling rows' image positions in order.

    Raises:
        InputError: If the counts do not fit.
    """
    found = visual.sum(1).tolist()
    rows, left, row = [], list(found), 0
    for i, size in enumerate(counts):
        while row < len(left) and left[row] == 0:
            row += 1
        if row >= len(left) or left[row] < size:
            raise InputError(
                f"Got {found} image tokens per row for {len(counts)} images of {list(counts)} "
                f"tokens; expected the row of image {i} to hold {size} more. Was the prompt "
                f"truncated, or made for other images? {OTHER_SETTINGS}"
            )
        left[row] -= size
        rows.append(row)
    if any(left):
        raise InputError(
            f"Got {found} image tokens per row for {len(counts)} images of {list(counts)} tokens; "
            "expected as many tokens as the images have. Pass one image per group of image tokens. "
            f"{OTHER_SETTINGS}"
        )
    return torch.tensor(rows, dtype=torch.long)


def kinds_of(ids: Tensor, live: Tensor, visual: Tensor, tokenizer: Any) -> Tensor:
    """The kind of every position; BOS only at a row's first live position."""
    kind = torch.where(live, KINDS.index("text"), KINDS.index("pad"))
    special = set(getattr(tokenizer, "all_special_ids", None) or [])
    if special:
        kind[torch.isin(ids, torch.tensor(sorted(special))) & live] = KINDS.index("special")
    bos = getattr(tokenizer, "bos_token_id", None)
    first = live.int().argmax(dim=1)
    starts = torch.zeros_like(live)
    starts[torch.arange(live.shape[0]), first] = True
    if bos is not None:
        kind[starts & live & (ids == bos)] = KINDS.index("bos")
    kind[visual] = KINDS.index("image")
    return kind


def build_vision_map(
    anatomy: Anatomy,
    config: Any,
    inputs: Mapping[str, Any],
    frames: Sequence[Frame],
    rows: Tensor,
) -> VisionMap:
    """The ViT tokens of every image; ``rows`` are their batch rows."""
    prefix = anatomy.family.prefix(config)
    counts = [f.rows * f.columns + len(prefix) for f in frames]
    n, most, start = len(frames), max(counts), len(prefix)
    kind = torch.zeros(n, most, dtype=torch.long)
    row, column = torch.full((n, most), -1), torch.full((n, most), -1)
    box = torch.full((n, most, 4), float("nan"))
    kind[:, :start] = torch.tensor([VISION_KINDS.index(name) for name in prefix], dtype=torch.long)
    for i, (frame, stop) in enumerate(zip(frames, counts, strict=True)):
        kind[i, start:stop] = VISION_KINDS.index("patch")
        grid_row, grid_column = blockwise_grid(frame, 1 if anatomy.family.pooled else anatomy.merge)
        row[i, start:stop], column[i, start:stop] = grid_row, grid_column
        box[i, start:stop] = frame.boxes()[grid_row, grid_column].float()
    return VisionMap(
        kind=kind,
        live=kind > 0,
        row=row,
        column=column,
        box=box,
        grid=torch.tensor([[f.rows, f.columns] for f in frames]),
        layout=packed_layout(anatomy, config, inputs, counts) if anatomy.vision.packed else None,
        batch_row=rows,
    )


def packed_layout(
    anatomy: Anatomy, config: Any, inputs: Mapping[str, Any], counts: Sequence[int]
) -> Tensor:
    """Int ``[image pos]``: where every ViT token lies in the packed sequence, -1 at padding."""
    order = anatomy.family.order
    if order is None:
        place = torch.arange(sum(counts))
    else:
        place = order(config, inputs["image_grid_thw"].cpu())
    layout = torch.full((len(counts), max(counts)), -1)
    for i, part in enumerate(place.split(list(counts))):
        layout[i, : len(part)] = part
    return layout


def blockwise_grid(frame: Frame, merge: int) -> tuple[Tensor, Tensor]:
    """Row and column of every patch in the processor's order: merge blocks, then inside each.

    With ``merge == 1`` this is plain raster order.
    """
    places = torch.arange(frame.rows * frame.columns).reshape(
        frame.rows // merge, frame.columns // merge, merge, merge
    )
    block_row, block_column, inner_row, inner_column = torch.unravel_index(
        places.reshape(-1), places.shape
    )
    return block_row * merge + inner_row, block_column * merge + inner_column

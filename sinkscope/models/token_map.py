"""The TokenMap of a batch: token ids as words, images at their positions, ViT tokens in their cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sinkscope.anatomy.families import PatchGrid
from sinkscope.anatomy.towers import Anatomy
from sinkscope.errors import InputError
from sinkscope.tokens import KINDS, VISION_KINDS, TokenMap, VisionMap

BROKEN = "\ufffd"  # what a tokenizer writes for bytes that are no character


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
    for at in range(len(words)):
        if words[at].endswith(BROKEN):  # a character of UTF-8 has at most four bytes
            for size in range(2, min(4, len(ids) - at) + 1):
                whole = text(ids[at : at + size]).strip(" ")
                if BROKEN not in whole:
                    words[at : at + size] = [f"{whole} {i + 1}/{size}" for i in range(size)]
                    break
    return tuple(words)


def build_token_map(
    anatomy: Anatomy,
    config: Any,
    inputs: Mapping[str, Any],
    grids: Sequence[PatchGrid],
    tokenizer: Any = None,
) -> TokenMap:
    """What every position of the batch is."""
    ids = inputs["input_ids"].cpu()
    live = inputs["attention_mask"].cpu().bool()
    visual = (ids == anatomy.image_token_id) & live
    prefix, unit = anatomy.family.prefix(config), anatomy.merge**2
    # What the projector sees of an image, merged: CLS too where it is not dropped.
    counts = [(len(prefix) + g.rows * g.columns - anatomy.drops) // unit for g in grids]
    batch_rows = torch.tensor(_assign_images(visual, counts))
    vision = _vision_map(anatomy, config, inputs, grids, batch_rows)
    image, index, rank = _place_images(visual, counts, batch_rows)
    sources = rank[..., None] * unit + torch.arange(unit)
    if anatomy.family.pooled:
        for i, grid in enumerate(grids):
            row, column = _blockwise(grid, anatomy.merge)
            sources[index == i] = (row * grid.columns + column)[sources[index == i]]
    sources = (sources + anatomy.drops).masked_fill(~visual[..., None], -1)
    picked = (index.clamp(min=0)[..., None], sources.clamp(min=0))
    box = vision.box[picked]
    box = torch.cat([box[..., :2].amin(-2), box[..., 2:].amax(-2)], dim=-1)

    def cell(patch: Tensor) -> Tensor:
        first = patch[picked][..., 0]
        return torch.where(visual & (first >= 0), first // anatomy.merge, -1)

    words = () if tokenizer is None else (words_of(tokenizer, line) for line in ids.tolist())
    return TokenMap(
        ids=ids,
        live=live,
        kind=_kinds_of(ids, live, visual, tokenizer),
        image=image,
        image_index=index,
        row=cell(vision.row),
        column=cell(vision.column),
        sources=sources,
        box=box.masked_fill(~visual[..., None], float("nan")),
        box_unit="original" if grids and grids[0].original else "input",
        vision=vision,
        words=tuple(words) or None,
    )


def _assign_images(visual: Tensor, counts: Sequence[int]) -> list[int]:
    """The batch row of every image, by filling rows' image positions in order."""
    found = visual.sum(1).tolist()
    rows, left, row, wanted = [], list(found), 0, ""
    for i, size in enumerate(counts):
        while row < len(left) and left[row] == 0:
            row += 1
        if row == len(left) or left[row] < size:
            wanted = f"the row of image {i} to hold {size} more. Was the prompt truncated?"
            break
        left[row] -= size
        rows.append(row)
    if not wanted and any(left):
        wanted = "as many as the images have. Pass one image per group of image tokens."
    if wanted:
        raise InputError(
            f"Got {found} image tokens per row for {len(counts)} images of {list(counts)} tokens; "
            f"expected {wanted} Pass the whole output of the model's own processor for these images; "
            "its patch_size and num_additional_image_tokens must be those of the vision tower."
        )
    return rows


def _place_images(visual: Tensor, counts: Sequence[int], rows: Tensor) -> tuple[Tensor, ...]:
    """Image of the row, image of the batch, and token of the image, int ``[batch pos]``, -1 elsewhere."""
    images = torch.arange(len(counts))
    index = images.repeat_interleave(torch.tensor(counts))
    order = images - torch.searchsorted(rows, rows)  # images of a row follow one another
    rank = torch.cat([torch.arange(count) for count in counts])
    empty = torch.full(visual.shape, -1)
    return tuple(empty.masked_scatter(visual, found) for found in (order[index], index, rank))


def _kinds_of(ids: Tensor, live: Tensor, visual: Tensor, tokenizer: Any) -> Tensor:
    """The kind of every position; BOS only at a row's first live position."""
    kind = torch.where(live, KINDS.index("text"), KINDS.index("pad"))
    special = torch.tensor(getattr(tokenizer, "all_special_ids", None) or [], dtype=torch.long)
    kind[torch.isin(ids, special) & live] = KINDS.index("special")
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None:
        first = torch.arange(live.shape[1]) == live.int().argmax(dim=1)[:, None]
        kind[first & live & (ids == bos)] = KINDS.index("bos")
    kind[visual] = KINDS.index("image")
    return kind


def _vision_map(
    anatomy: Anatomy,
    config: Any,
    inputs: Mapping[str, Any],
    grids: Sequence[PatchGrid],
    batch_row: Tensor,
) -> VisionMap:
    """The ViT tokens of every image."""
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

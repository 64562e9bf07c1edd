"""The map of a sample: what every position of the batch is, and where ViT tokens lie in their images. Boxes
are ``x0 y0 x1 y1`` with the origin at the top left."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sinkscope.models.patch_grid import PatchGrid, Seen
from sinkscope.models.patch_map import PatchMap
from sinkscope.tokens import KINDS, PARTS, VISION_KINDS, TokenMap, VisionMap, words_of

SEVERAL = "an image token is made of ViT tokens of several tiles"


def vision_map(
    found: PatchMap | None,
    seen: Sequence[Seen],
    packed: bool,
    grids: Sequence[PatchGrid],
    names: Sequence[str],
    last: Sequence[str] = (),
) -> VisionMap:
    """Describe the ViT tokens of every image or tile; `build_token_map` fills in their batch rows."""
    many, most = len(seen), max((len(one.tokens) for one in seen), default=0)
    kind = torch.zeros(many, most, dtype=torch.long)
    row, column, layout = (torch.full((many, most), -1) for _ in range(3))
    box = torch.full((many, most, 4), float("nan"))
    pixels = found.pixels if found else torch.full((0, 5), -1)
    fed = torch.zeros(len(pixels) + 1, dtype=torch.bool)
    fed[found.sources if found else []] = True
    for i, (one, grid) in enumerate(zip(seen, grids, strict=True)):
        stop, reads = len(one.tokens), pixels[one.tokens, 0] >= 0
        first = int(reads.int().argmax()) if reads.any() else stop
        special = [*names, *["register"] * first][:first]
        kind[i, :first] = torch.tensor(
            [VISION_KINDS.index(name) for name in special], dtype=torch.long
        )
        rest = torch.where(reads, VISION_KINDS.index("patch"), VISION_KINDS.index("register"))
        ended = reads.flip(0).cumsum(0).flip(0) == 0  # behind the last patch
        rest[ended & ~fed[one.tokens]] = VISION_KINDS.index("pad")
        behind = ended.nonzero().flatten()[: len(last)]
        rest[behind] = torch.tensor([VISION_KINDS.index(n) for n in last[: len(behind)]]).to(rest)
        kind[i, first:stop] = rest[first:].masked_fill(~one.live[first:], VISION_KINDS.index("pad"))
        row[i, :stop], column[i, :stop], layout[i, :stop] = one.row, one.column, one.tokens
        placed = (one.row >= 0) & (one.column >= 0) & one.live
        box[i, :stop][placed] = grid.boxes()[one.row[placed], one.column[placed]].float()
    live = kind > 0
    layout = layout.masked_fill(~live, -1)
    shape = torch.tensor([[g.rows, g.columns] for g in grids], dtype=torch.long).reshape(-1, 2)
    none = torch.zeros(many, dtype=torch.long)
    length = len(pixels) if packed else 0
    return VisionMap(kind, live, row, column, box, shape, layout if packed else None, none, length)


def build_token_map(
    places: tuple[Tensor, Tensor, Tensor],
    found: PatchMap | None,
    vision: VisionMap,
    seen: Sequence[Seen],
    groups: Sequence[int],
    unit: str,
    tokenizer: Any,
    missing: str = "",
    whole: Sequence[bool] = (),
) -> TokenMap:
    """What every position of the batch is.

    ``places`` are ids, live positions and image tokens, ``[batch pos]``; ``groups`` the number of the image
    that every row of the vision map belongs to; ``missing`` is why there is no vision tower; ``whole`` are
    rows that show the whole of an image that has others too.
    """
    ids, live, visual = places
    widest = found.sources.shape[1] if found else 1
    sources = torch.full((*ids.shape, widest), -1)
    index, image, row, column, part = (torch.full(ids.shape, -1) for _ in range(5))
    box = torch.full((*ids.shape, 4), float("nan"))
    why = found.why if found else missing
    if found is None or not seen:
        opens = visual & ~visual.roll(1, dims=1) | visual & (torch.arange(visual.shape[1]) == 0)
        image[visual] = (opens.cumsum(dim=1) - 1)[visual]  # every run of image tokens is one
    if found is not None and len(seen):
        own, place = (torch.full((len(found.pixels) + 1,), -1) for _ in "ab")
        for i, one in enumerate(seen):
            own[one.tokens], place[one.tokens] = i, torch.arange(len(one.tokens))
        rows, made = own[found.sources], found.sources >= 0
        first = torch.where(made, rows, len(seen)).amin(dim=1)
        if bool((made & (rows != first[:, None])).any()):
            why = SEVERAL
        at = _carried(first.masked_fill(first == len(seen), -1), visual)
        sources[visual], index[visual] = place[found.sources], at
        numbers = torch.tensor([*groups, 0])
        image[visual] = numbers[at]
        batch = visual.nonzero()[:, 0]
        vision.batch_row[at[at >= 0]] = batch[at >= 0]
        start = torch.full((len(ids),), int(numbers.max()) + 1)
        start = start.scatter_reduce(0, batch, image[visual], "amin")
        image[visual] -= start[batch]
        picked = (at.clamp(min=0)[:, None], place[found.sources].clamp(min=0))
        corners = vision.box[picked].masked_fill(~made[..., None], float("nan"))
        low = corners[..., :2].nan_to_num(float("inf")).amin(1)
        high = corners[..., 2:].nan_to_num(float("-inf")).amax(1)
        box[visual] = torch.cat([low, high], dim=-1)
        box[~torch.isfinite(box)] = float("nan")
        for cells, out in ((vision.row, row), (vision.column, column)):
            out[visual] = _ranks(torch.where(made, cells[picked], 1 << 30).amin(1), at)
        kinds = vision.kind[picked].masked_fill(~made, 0).amax(1)
        patch = torch.where(
            kinds == VISION_KINDS.index("cls"), PARTS.index("cls"), PARTS.index("patch")
        )
        small = torch.tensor([*whole, *[False] * (len(seen) + 1 - len(whole))])[at]
        patch[small & (patch == PARTS.index("patch"))] = PARTS.index("thumbnail")
        part[visual] = torch.where(found.fills, patch, PARTS.index("newline"))
    kind = torch.where(live, KINDS.index("text"), KINDS.index("pad"))
    special = torch.tensor(getattr(tokenizer, "all_special_ids", None) or [], dtype=torch.long)
    kind[torch.isin(ids, special) & live] = KINDS.index("special")
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None:  # only at a row's first live position
        opening = torch.arange(live.shape[1]) == live.int().argmax(dim=1)[:, None]
        kind[opening & live & (ids == bos)] = KINDS.index("bos")
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
        sources=sources.masked_fill(torch.tensor(bool(why)), -1),
        box=box,
        box_unit=unit,
        vision=vision,
        words=tuple(words) or None,
        part=part,
        unmapped=why,
    )


def _carried(rows: Tensor, visual: Tensor) -> Tensor:
    """The vision row of every image token; one that none fills belongs to the token before it, or behind."""
    out, batch = rows.tolist(), visual.nonzero()[:, 0].tolist()
    for step, order in ((-1, range(1, len(out))), (1, range(len(out) - 2, -1, -1))):
        for i in order:
            if out[i] < 0 and batch[i] == batch[i + step]:
                out[i] = out[i + step]
    return torch.tensor(out, dtype=torch.long)


def _ranks(cells: Tensor, rows: Tensor) -> Tensor:
    """Rows or columns of image tokens in their own grid, from those of their first patches; -1 for none."""
    out = torch.full_like(cells, -1)
    for one in rows.unique():
        mine = (rows == one) & (cells >= 0) & (cells < 1 << 30)
        out[mine] = cells[mine].unique(return_inverse=True)[1]
    return out

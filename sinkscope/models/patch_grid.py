"""Where the ViT tokens of every image lie: in their grid, in the tower's sequence, and in pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sinkscope.models.patch_map import PatchMap

STEP = 6  # of blue from one image to the next
WHOLE = 0.05  # share of an image that a picture of the whole may lack at an edge
NORMAL = (("mean", (0.5, 0.5, 0.5)), ("std", (0.5, 0.5, 0.5)))

Sizes = Sequence[tuple[int, int]] | None
"""Width and height of every image in pixels, before the processor."""


@dataclass(frozen=True)
class PatchGrid:
    """How one image lies on its grid of patches, whose side is ``patch`` pixels of the model's input.

    ``scale`` is original pixels per input pixel and ``offset`` the original pixel at the input's top left
    corner, both ``(x, y)``; if not ``original``, they lead to the model's input and not to the user's image.
    """

    rows: int
    columns: int
    patch: int
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    original: bool = False

    def boxes(self) -> Float[Tensor, "row column 4"]:
        """The pixel box of every patch."""
        width, height = torch.tensor([self.patch * s for s in self.scale])
        left, top = torch.tensor(self.offset)
        x, y = left + torch.arange(self.columns) * width, top + torch.arange(self.rows) * height
        y, x = torch.meshgrid(y, x, indexing="ij")
        return torch.stack([x, y, x + width, y + height], dim=-1)


@dataclass(frozen=True)
class Seen:
    """The ViT tokens of one image or tile, in the order of the image processor.

    ``tokens`` are indices into the flattened states; ``row`` and ``column`` place patches in their grid, -1
    for other tokens and where that is unknown; ``live`` is False at padding.
    """

    tokens: Tensor
    row: Tensor
    column: Tensor
    live: Tensor
    patch: int

    @property
    def grid(self) -> PatchGrid:
        """The grid of patches, in pixels of the model's input."""
        rows, columns = (int(x.max()) + 1 if len(x) else 0 for x in (self.row, self.column))
        return PatchGrid(max(rows, 1), max(columns, 1), self.patch)


def see(found: PatchMap, inputs: Mapping[str, Any], patch: int) -> tuple[list[Seen], bool]:
    """The ViT tokens of every image or tile, and whether all share one packed sequence.

    ``patch`` is the side of a patch in pixels, where the inputs are patches and not pictures.
    """
    if not len(found.pixels):  # the tower runs several times, and cannot be read
        return [], False
    picture = found.pixels[:, 0]
    if _strip(found):  # one picture in which patches stand side by side
        picture = torch.where(picture < 0, -1, found.pixels[:, 2].unique(return_inverse=True)[1])
    reads, many = picture >= 0, int(picture.max()) + 1 if len(picture) else 0
    alone = bool(reads.any()) and int(picture[reads].bincount().max()) == 1 and many > 1
    packed = len(found.shape) == 1 or (
        found.shape[0] == 1 and many > 1 and not _padded(found, inputs)
    )
    length = len(picture) // (1 if len(found.shape) == 1 else found.shape[0])
    if packed and alone:  # patches, image after image
        sizes = _grids(inputs, int(reads.sum())) or [(1, int(reads.sum()))]
        groups = picture.masked_fill(~reads, many).argsort()[: int(reads.sum())]
        parts = groups.split([rows * columns for rows, columns in sizes])
    elif packed:  # pictures in one sequence, each in raster order
        y, x = found.pixels[:, 1], found.pixels[:, 2]
        rank = (picture * (int(y.max()) + 1) + y) * (int(x.max()) + 1) + x
        order = rank.masked_fill(~reads, int(rank.max()) + 1).argsort()[: int(reads.sum())]
        parts = order.split(picture[reads].bincount(minlength=many).tolist())
        sizes = []
    else:
        parts = torch.arange(len(picture)).split(length)
        sizes = _grids(inputs, None) if alone else []
    seen = []
    for i, tokens in enumerate(parts):
        size = sizes[i] if i < len(sizes) else None
        seen.append(_place(found, tokens, size, inputs, patch, i))
    return seen, packed


def _padded(found: PatchMap, inputs: Mapping[str, Any]) -> bool:
    """Whether patches stand in rows by image, ``[image patch ...]``, so that the first axis is no patch."""
    tensors = (x for x in inputs.values() if torch.is_tensor(x) and x.is_floating_point())
    return any(x.ndim == 3 and x.shape[1] == found.shape[-1] for x in tensors)


def _strip(found: PatchMap) -> bool:
    """Whether the pictures are strips of patches."""
    reads = found.pixels[found.pixels[:, 0] >= 0]
    return len(reads) > 1 and not reads[:, :2].any() and len(reads[:, 2].unique()) == len(reads)


def _grids(inputs: Mapping[str, Any], patches: int | None) -> list[tuple[int, int]]:
    """Rows and columns of every image, where an input tells them (frames of a video as more rows)."""
    for name, x in inputs.items():
        whole = torch.is_tensor(x) and not x.is_floating_point() and x.ndim == 2
        if (
            whole
            and x.shape[1] in (2, 3)
            and any(word in name for word in ("grid", "shape", "target"))
        ):
            sizes = [
                (rows[-2] * (rows[0] if len(rows) == 3 else 1), rows[-1]) for rows in x.tolist()
            ]
            if patches is None or sum(rows * columns for rows, columns in sizes) == patches:
                return sizes
    return []


def _place(
    found: PatchMap,
    tokens: Tensor,
    size: tuple[int, int] | None,
    inputs: Mapping[str, Any],
    patch: int,
    image: int,
) -> Seen:
    """Rows and columns of the patches of one image: by their pixels, or by the grid and what is merged."""
    pixels = found.pixels[tokens]
    reads = pixels[:, 0] >= 0
    live, place = (
        torch.ones(len(tokens), dtype=torch.bool),
        [torch.full((len(tokens),), -1) for _ in "yx"],
    )
    places = [x for x in inputs.values() if torch.is_tensor(x) and x.ndim == 3 and x.shape[-1] == 2]
    if places and not places[0].is_floating_point() and places[0].shape[1] == len(tokens):
        column, row = places[0][image].cpu().unbind(-1)  # written with every patch, -1 for padding
        return Seen(tokens, row, column, (row >= 0) & (column >= 0), patch)
    if size is None:
        for axis in (0, 1):
            place[axis][reads] = pixels[reads, 1 + axis].unique(return_inverse=True)[1]
        sides = (pixels[reads, 3] - pixels[reads, 1]).tolist()
        return Seen(
            tokens,
            place[0],
            place[1],
            _unmasked(live, reads, pixels, inputs),
            max(sides, default=patch),
        )
    rows, columns = size
    count = min(rows * columns, int(reads.sum()))
    inside = reads.nonzero().flatten()[:count]
    live[reads.nonzero().flatten()[count:]] = False
    feeds = _merged(found, tokens[inside])
    for merge in sorted({1, round(feeds.shape[1] ** 0.5) or 1}) if len(feeds) else (1,):
        if rows % merge or columns % merge or rows * columns != count:
            continue
        cells = _blockwise(rows, columns, merge)
        if all(_square(axis[feeds], len(feeds)) for axis in cells):
            place[0][inside], place[1][inside] = cells
            break
    return Seen(tokens, place[0], place[1], live, patch)


def _unmasked(live: Tensor, reads: Tensor, pixels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Without the patches whose pixels a mask hides; tokens behind the last patch are padding too."""
    for x in inputs.values():
        if torch.is_tensor(x) and not x.is_floating_point() and x.ndim > 2 and reads.any():
            planes, (picture, y, left, *_) = x.flatten(0, -3).cpu(), pixels[reads].unbind(-1)
            tops = (picture.max() + 1, y.max() + 1, left.max() + 1)
            if all(int(top) <= size for top, size in zip(tops, planes.shape, strict=True)):
                live[reads] &= planes[picture, y, left].bool()
    return live


def _merged(found: PatchMap, tokens: Tensor) -> Tensor:
    """Which of an image's patches make each image token, int ``[image token, patch]``; empty if unknown."""
    back = torch.full((len(found.pixels) + 1,), -1)
    back[tokens] = torch.arange(len(tokens))
    own = back[found.sources]  # -1 leads to the last entry, which is -1
    own = own[(own >= 0).any(dim=1)]
    return own if len(own) and bool((own >= 0).all()) else own[:0]


def _square(axis: Tensor, count: int) -> bool:
    """Whether the merged patches are neighbours on an axis: each group is as wide as its count allows."""
    side = round(axis.shape[1] ** 0.5) if count else 1
    return not count or bool((axis.amax(1) - axis.amin(1) == side - 1).all())


def _blockwise(rows: int, columns: int, merge: int) -> tuple[Tensor, Tensor]:
    """Row and column of every patch in merge blocks, then inside each; raster order for merge 1."""
    shape = (rows // merge, columns // merge, merge, merge)
    block_row, block_column, row, column = torch.unravel_index(torch.arange(rows * columns), shape)
    return block_row * merge + row, block_column * merge + column


def _resized(w: int, h: int, size: Any, crop: tuple[int, int]) -> tuple[int, int]:
    """The size after resizing to ``size``, a dict or an object: shortest edge or both edges fixed."""
    read = size.get if hasattr(size, "get") else lambda name: getattr(size, name, None)
    shortest = read("shortest_edge")
    if shortest is None:
        return int(read("width") or crop[0]), int(read("height") or crop[1])
    short = int(shortest)
    return (short, int(short * h / w)) if w <= h else (int(short * w / h), short)


def original_boxes(
    seen: Sequence[Seen], packed: bool, processor: Any, inputs: Mapping[str, Any], sizes: Sizes
) -> list[PatchGrid]:
    """The grids, in pixels of the user's images where one row of ViT tokens is one image."""
    grids = [one.grid for one in seen]
    if sizes is None or len(sizes) != len(grids):
        return grids
    pixels = next((x for x in inputs.values() if torch.is_tensor(x) and x.ndim == 4), None)
    if pixels is None or packed:  # resized to a whole number of patches
        return [
            replace(
                one,
                scale=(w / (one.columns * one.patch), h / (one.rows * one.patch)),
                original=True,
            )
            for one, (w, h) in zip(grids, sizes, strict=True)
        ]
    height, width = pixels.shape[-2:]
    for i, (w, h) in enumerate(
        sizes
    ):  # resized, perhaps padded to a square, perhaps centre-cropped
        shift_x = shift_y = 0.0
        if getattr(processor, "do_pad", False) and w != h:
            side = max(w, h)
            shift_x, shift_y, w, h = (w - side) / 2, (h - side) / 2, side, side
        new_w, new_h = _resized(w, h, getattr(processor, "size", None), (width, height))
        scale = (w / new_w, h / new_h)
        left, top = (new_w - width) // 2, (new_h - height) // 2
        offset = (left * scale[0] + shift_x, top * scale[1] + shift_y)
        grids[i] = replace(grids[i], scale=scale, offset=offset, original=True)
    return grids


@dataclass(frozen=True)
class Tile:
    """Where one picture of the pixels lies: the number of its image, ``scale`` and ``offset`` as in `PatchGrid`,
    and whether it shows the whole image."""

    image: int
    scale: tuple[float, float]
    offset: tuple[float, float]
    whole: bool


def ramp(size: tuple[int, int], number: int) -> Image.Image:
    """An image of a size whose red is the share of the width, green that of the height, and blue its number."""
    width, height = size
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    pixels[..., 2] = 255 - STEP * (number % 20)
    return Image.fromarray(pixels)


def read_tiles(
    pixels: Tensor, sizes: Sequence[tuple[int, int]], settings: Any
) -> list[Tile | None]:
    """Where the pictures ``[... channel height width]`` that a processor makes of ramps lie; None for one of
    padding. ``sizes`` are those of the ramps."""
    flat = pixels.reshape(-1, *pixels.shape[-3:]).float()
    if getattr(settings, "do_normalize", True):
        mean, std = (torch.tensor(getattr(settings, f"image_{n}", v)) for n, v in NORMAL)
        flat = flat * std[:, None, None] + mean[:, None, None]
    found: list[Tile | None] = []
    for red, green, blue in flat:
        seen = blue > 0.5
        along = [_line(red, seen, 0), _line(green, seen, 1)]
        if not seen.any() or None in along:
            found.append(None)
            continue
        number = round(float((1 - blue[seen].median()) * 255 / STEP))
        (start_x, step_x), (start_y, step_y) = (one or (0.0, 0.0) for one in along)
        width, height = sizes[min(number, len(sizes) - 1)]
        ends = (
            start_x,
            start_y,
            1 - start_x - step_x * red.shape[1],
            1 - start_y - step_y * len(red),
        )
        scale, offset = (step_x * width, step_y * height), (start_x * width, start_y * height)
        found.append(Tile(number, scale, offset, max(ends) < WHOLE))
    return found


def _line(share: Tensor, seen: Tensor, axis: int) -> tuple[float, float] | None:
    """Where a share of the width (axis 0) or height begins at the picture's edge, and its step by pixel."""
    share, seen = (share, seen) if axis == 0 else (share.T, seen.T)
    columns = seen.any(dim=0).nonzero().flatten()
    if len(columns) < 4:
        return None
    first, last = (int(columns[len(columns) * part // 4]) for part in (1, 3))
    low, high = (float(share[:, c][seen[:, c]].mean()) for c in (first, last))
    step = (high - low) / (last - first)
    return (low - step * (first + 0.5), step) if step > 0 else None

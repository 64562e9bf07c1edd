"""TokenMap: what every position is, which image and patch it shows, and which pixels.

::

    position   0      1 ... 16                17 ...            N-1
    kind       bos    image                   text              text
    image      -1     0                       -1                -1
    row,col    -1     (0,0) ... (3,3)         -1                -1
    sources    -      ViT tokens of image 0   -                 -
    box        -      x0 y0 x1 y1 in pixels   -                 -
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.errors import SelectionError, nearest

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("pad", "bos", "text", "image", "special")
VISION_KINDS = ("pad", "cls", "register", "patch")
Selection = Any
"""A mask ``[batch pos]``, a per-layer mask ``[batch layer pos]`` or a name."""


def as_mask(selection: Any, shape: tuple[int, int], n_layers: int, what: str) -> Tensor:
    """Check a mask given by the user.

    Args:
        selection: Anything that is not a name.
        shape: ``(batch, pos)`` of the sample.
        n_layers: Layers of the tower.
        what: Where the mask is used, for the message.

    Returns:
        Bool ``[batch pos]`` or ``[batch layer pos]``.

    Raises:
        SelectionError: If it is no boolean mask of this batch.
    """
    if not isinstance(selection, Tensor):
        raise SelectionError(
            f"Got a selection of type {type(selection).__name__} in {what}; expected a boolean "
            "tensor [batch pos], [batch layer pos] or a name such as 'image'. Write "
            "torch.zeros(batch, pos, dtype=torch.bool) and set the positions you mean."
        )
    if selection.dtype != torch.bool:
        raise SelectionError(
            f"Got a selection of dtype {selection.dtype} in {what}; expected torch.bool. Indices "
            "are ambiguous in a padded batch: write mask = torch.zeros(batch, pos, "
            "dtype=torch.bool); mask[row, index] = True."
        )
    batch, pos = shape
    fits = tuple(selection.shape) in ((batch, pos), (batch, n_layers, pos))
    if not fits:
        raise SelectionError(
            f"Got a mask of shape {tuple(selection.shape)} in {what}; expected ({batch}, {pos}) or "
            f"({batch}, {n_layers}, {pos}) for this sample. A mask belongs to the sample it was made "
            "from: take it from this sample's trace or sample.tokens.select(...)."
        )
    return selection.cpu()


MERGES = ("max", "mean", "any")


def check_merge(merge: str) -> None:
    """Refuse an unknown way to join ViT tokens.

    Raises:
        SelectionError: If it is unknown.
    """
    if merge not in MERGES:
        raise SelectionError(
            f"Got merge={merge!r}; expected 'max', 'mean' or 'any'. {nearest(str(merge), MERGES)}"
        )


@dataclass(frozen=True, eq=False)
class VisionMap:
    """The ViT tokens of every image, in the order of the image processor.

    Attributes:
        kind: Int ``[image pos]``, index into `VISION_KINDS`.
        live: Bool ``[image pos]``, False where an image has fewer tokens than the largest.
        row: Int ``[image pos]``, patch row, -1 for CLS and registers.
        column: Int ``[image pos]``, patch column.
        box: Float ``[image pos 4]``, ``x0 y0 x1 y1`` in pixels of the original image (see `TokenMap`).
        grid: Int ``[image 2]``, patch rows and columns.
        layout: Int ``[image pos]`` index in the packed sequence of a packed tower, -1 at padding;
            None for a tower with one row per image.
        batch_row: Int ``[image]``, the batch row each image belongs to.
    """

    kind: Int[Tensor, "image pos"]
    live: Bool[Tensor, "image pos"]
    row: Int[Tensor, "image pos"]
    column: Int[Tensor, "image pos"]
    box: Float[Tensor, "image pos 4"]
    grid: Int[Tensor, "image 2"]
    layout: Int[Tensor, "image pos"] | None
    batch_row: Int[Tensor, " image"]

    def select(self, selection: Selection, n_layers: int = 0) -> Tensor:
        """A selection of ViT tokens as a mask.

        Args:
            selection: ``"all"``, ``"cls"``, ``"register"``, ``"patch"``, or a bool mask
                ``[image pos]`` or ``[image layer pos]``.
            n_layers: Layers of the vision tower, to recognise per-layer masks.

        Returns:
            Bool mask.

        Raises:
            SelectionError: If the name is unknown or the mask is of another batch.
        """
        if isinstance(selection, str):
            if selection == "all":
                return self.live
            if selection not in VISION_KINDS[1:]:
                raise SelectionError(
                    f"Got the vision selection {selection!r}; expected one of 'all', 'cls', "
                    f"'register', 'patch' or a mask. {nearest(selection, VISION_KINDS[1:])}"
                )
            return self.live & (self.kind == VISION_KINDS.index(selection))
        shape = (self.live.shape[0], self.live.shape[1])
        return as_mask(selection, shape, n_layers, "the vision tower")


@dataclass(frozen=True, eq=False)
class TokenMap:
    """What every position of a sample is.

    Attributes:
        ids: Int ``[batch pos]`` token ids.
        live: Bool ``[batch pos]``, False at padding.
        kind: Int ``[batch pos]``, index into `KINDS`.
        image: Int ``[batch pos]``, which image of its row a position shows, from 0; -1 elsewhere.
        image_index: Int ``[batch pos]``, the same counted over the whole batch: the row of `vision`.
        row: Int ``[batch pos]``, row of the image token in its grid, -1 elsewhere.
        column: Int ``[batch pos]``, column in its grid.
        sources: Int ``[batch pos source]``, positions in `vision` that feed the token, -1 padded.
        box: Float ``[batch pos 4]``, ``x0 y0 x1 y1`` that the token's patches cover, NaN elsewhere.
        box_unit: ``"original"`` pixels of the image given to ``prepare``, or ``"input"`` pixels as
            the model sees them, if only processor output was given.
        vision: The ViT tokens.
        words: The text of every token, or None without a tokenizer. A character whose bytes lie in several
            tokens is written with each of them, as ``中 1/2`` and ``中 2/2``.
    """

    ids: Int[Tensor, "batch pos"]
    live: Bool[Tensor, "batch pos"]
    kind: Int[Tensor, "batch pos"]
    image: Int[Tensor, "batch pos"]
    image_index: Int[Tensor, "batch pos"]
    row: Int[Tensor, "batch pos"]
    column: Int[Tensor, "batch pos"]
    sources: Int[Tensor, "batch pos source"]
    box: Float[Tensor, "batch pos 4"]
    box_unit: str
    vision: VisionMap
    words: tuple[tuple[str, ...], ...] | None = None

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """The last prompt position of every row."""
        places = torch.arange(self.live.shape[1])
        return torch.where(self.live, places, -1).amax(dim=1)

    @property
    def first(self) -> Int[Tensor, " batch"]:
        """The first live position of every row: BOS where the tokenizer has one."""
        return self.live.int().argmax(dim=1)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `select` knows for this sample."""
        images = int(self.image.max().item()) + 1 if self.image.numel() else 0
        return (
            "all",
            "bos",
            "first",
            "text",
            "special",
            "image",
            "last",
            *(f"image:{i}" for i in range(images)),
        )

    def select(self, selection: Selection, n_layers: int = 0) -> Tensor:
        """A selection as a mask.

        Args:
            selection: A name from `names`, or a bool mask ``[batch pos]`` / ``[batch layer pos]``.
                ``"text"`` are all live positions that are neither image, BOS nor special tokens;
                ``"bos"`` is empty where the tokenizer adds no BOS: use ``"first"`` there.
            n_layers: Layers of the tower, to recognise per-layer masks.

        Returns:
            Bool ``[batch pos]`` or ``[batch layer pos]``, False at padding.

        Raises:
            SelectionError: If the name is unknown or the mask is of another batch.
        """
        if not isinstance(selection, str):
            shape = (self.live.shape[0], self.live.shape[1])
            mask = as_mask(selection, shape, n_layers, "the language tower")
            return mask & (self.live if mask.ndim == 2 else self.live[:, None])
        if selection not in self.names:
            raise SelectionError(
                f"Got the selection {selection!r}; expected one of {self.names} or a boolean mask. "
                f"{nearest(selection, self.names)}"
            )
        places = torch.arange(self.live.shape[1])
        if selection == "all":
            return self.live
        if selection in ("last", "first"):
            at = self.last if selection == "last" else self.first
            return self.live & (places == at[:, None])
        if selection.startswith("image:"):
            return self.image == int(selection.removeprefix("image:"))
        return self.live & (self.kind == KINDS.index(selection))

    def from_vision(self, scores: Float[Tensor, "image pos"], merge: str = "max") -> Tensor:
        """Carry scores of ViT tokens to the LLM positions they feed.

        Args:
            scores: One score per ViT token.
            merge: ``"max"``, ``"mean"`` or ``"any"`` (max of ``score > 0``) over the ViT tokens
                that merge into one position.

        Returns:
            Float ``[batch pos]``, NaN where no image token is.

        Raises:
            SelectionError: If ``merge`` is unknown, or the scores are of other images.
        """
        check_merge(merge)
        if scores.shape != self.vision.live.shape:
            raise SelectionError(
                f"Got scores of shape {tuple(scores.shape)}; expected "
                f"{tuple(self.vision.live.shape)}, one per image and ViT token of this sample."
            )
        visual = self.image_index >= 0
        picked = scores[self.image_index.clamp(min=0)[..., None], self.sources.clamp(min=0)]
        gone = self.sources < 0
        if merge == "mean":
            count = (~gone).sum(-1).clamp(min=1)
            out = picked.masked_fill(gone, 0.0).sum(-1) / count
        else:
            picked = (picked > 0).to(scores.dtype) if merge == "any" else picked
            out = picked.masked_fill(gone, float("-inf")).amax(-1)
        return out.masked_fill(~visual, float("nan"))

    def to_dataframe(self) -> pd.DataFrame:
        """One line per live position: kind, image, grid cell, ViT tokens, pixel box, word."""
        import pandas as pd

        lines: list[Mapping[str, Any]] = []
        for b, p in self.live.nonzero().tolist():
            sources = [int(s) for s in self.sources[b, p] if s >= 0]
            x0, y0, x1, y1 = self.box[b, p].tolist()
            lines.append(
                {
                    "batch": b,
                    "pos": p,
                    "id": int(self.ids[b, p]),
                    "word": self.words[b][p] if self.words else None,
                    "kind": KINDS[int(self.kind[b, p])],
                    "image": int(self.image[b, p]),
                    "row": int(self.row[b, p]),
                    "column": int(self.column[b, p]),
                    "vit_tokens": sources,
                    "x0": x0,
                    "y0": y0,
                    "x1": x1,
                    "y1": y1,
                }
            )
        return pd.DataFrame(lines)

"""TokenMap: what every position is, which image and patch it shows, and which pixels.

::

    position   0      1 ... 16                17 ...            N-1
    kind       bos    image                   text              text
    image      -1     0                       -1                -1
    row,col    -1     (0,0) ... (3,3)         -1                -1
    sources    -      ViT tokens of image 0   -                 -
    box        -      x0 y0 x1 y1 in pixels   -                 -
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import east_asian_width

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.checks import check_choice, is_whole
from sinkscope.errors import SelectionError, nearest

KINDS = ("pad", "bos", "text", "image", "special")
VISION_KINDS = ("pad", "cls", "register", "patch")
PARTS = ("patch", "cls", "newline", "thumbnail")
BROKEN = "\ufffd"  # what a tokenizer writes for bytes that are no character
Selection = Any
"""A name, words of the prompt, positions, or a mask ``[batch pos]`` or ``[batch layer pos]``."""


def mask_of(selection: Any, live: Tensor, n_layers: int, what: str) -> Tensor:
    """Positions or a mask of the tower ``what`` as a bool mask ``[batch pos]`` or ``[batch layer pos]``."""
    batch, pos = live.shape
    if not isinstance(selection, Tensor):
        mask = torch.zeros_like(live)
        mask[:, positions_of(selection, live, what)] = True
        return mask
    if selection.dtype != torch.bool:
        raise SelectionError(
            f"Got a selection of dtype {selection.dtype} in {what}; expected torch.bool. Indices are "
            "ambiguous in a padded batch: write mask[row, index] = True, or a list of positions."
        )
    if tuple(selection.shape) not in ((batch, pos), (batch, n_layers, pos)):
        raise SelectionError(
            f"Got a mask of shape {tuple(selection.shape)} in {what}; expected ({batch}, {pos}) or "
            f"({batch}, {n_layers}, {pos}) for this sample. A mask belongs to the sample it was made "
            "from: take it from this sample's trace or sample.tokens.select(...)."
        )
    return selection.cpu()


def positions_of(given: Any, live: Tensor, what: str) -> list[int]:
    """Positions, counted with padding, of tokens that every row has; else SelectionError."""
    pos = live.shape[1]
    wanted = list(given) if isinstance(given, (list, tuple, range)) else [given]
    if isinstance(given, slice):
        ends = (given.start or 0, pos if given.stop is None else given.stop, given.step or 1)
        wanted = list(range(*ends)) if all(map(is_whole, ends)) else []
    if not wanted or not all(map(is_whole, wanted)):
        raise SelectionError(
            f"Got a selection of type {type(given).__name__} in {what}, {given!r}; expected a name such "
            "as 'image' or 'last', words of the prompt, positions such as [0, 5] or slice(0, 4), or a "
            "boolean tensor [batch pos] or [batch layer pos]."
        )
    for p in wanted:
        if not 0 <= p < pos:
            raise SelectionError(
                f"Got position {p} in {what}; expected 0 to {pos - 1}, never negative. The last token of "
                "every row of the prompt is called 'last'."
            )
        if not live[:, p].all():
            raise SelectionError(
                f"Got position {p} in {what}, which is padding in row {int(live[:, p].int().argmin())}; "
                "expected a token in every row, because positions count padding. Write a name such as "
                "'first', or a mask."
            )
    return wanted


def check_merge(merge: str) -> None:
    """Refuse an unknown way to join ViT tokens: SelectionError."""
    check_choice(("max", "mean", "any"), error=SelectionError, merge=merge)


@dataclass(frozen=True, eq=False)
class VisionMap:
    """Describe the ViT tokens of every image, in the order of the image processor.

    ``kind`` is an index into `VISION_KINDS`; ``live`` is False where an image has fewer tokens than the
    largest; ``row`` and ``column`` place a patch, -1 for CLS and registers; ``box`` is ``x0 y0 x1 y1`` in
    pixels of the original image (see `TokenMap`); ``grid`` is patch rows and columns; ``layout`` is the index
    in the sequence of a packed tower, -1 at padding, None for a tower with one row per image; ``length`` is
    how long that sequence is, 0 for as many as are live; ``batch_row`` is the batch row each image belongs to.
    """

    kind: Int[Tensor, "image pos"]
    live: Bool[Tensor, "image pos"]
    row: Int[Tensor, "image pos"]
    column: Int[Tensor, "image pos"]
    box: Float[Tensor, "image pos 4"]
    grid: Int[Tensor, "image 2"]
    layout: Int[Tensor, "image pos"] | None
    batch_row: Int[Tensor, " image"]
    length: int = 0

    def select(self, selection: Selection, n_layers: int = 0) -> Tensor:
        """A selection of ViT tokens as a bool mask; SelectionError if it does not fit.

        ``"all"``, ``"cls"``, ``"register"``, ``"patch"``, positions, or a bool mask ``[image pos]`` or,
        with ``n_layers`` of the vision tower, ``[image layer pos]``.
        """
        if not isinstance(selection, str):
            return mask_of(selection, self.live, n_layers, "the vision tower")
        if selection == "all":
            return self.live
        if selection not in VISION_KINDS[1:]:
            raise SelectionError(
                f"Got the vision selection {selection!r}; expected one of 'all', 'cls', "
                f"'register', 'patch', positions or a mask. {nearest(selection, VISION_KINDS[1:])}"
            )
        return self.live & (self.kind == VISION_KINDS.index(selection))


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Describe every position of a sample; ``live`` is False at padding, and ``kind`` an index into `KINDS`.

    Attributes:
        image: Which image of its row a position shows, from 0; -1 elsewhere.
        image_index: The same counted over the whole batch: the row of `vision`.
        row: Row of the image token in its grid, -1 elsewhere; ``column`` likewise.
        sources: Positions in `vision` that feed the token, -1 padded.
        box: ``x0 y0 x1 y1`` that the token's patches cover, NaN elsewhere.
        box_unit: ``"original"`` pixels of the image given to ``prepare``, or ``"input"`` pixels as
            the model sees them, if only processor output was given.
        part: What an image token is, an index into `PARTS`, -1 elsewhere: of patches, of CLS, a newline that
            the tower's output does not fill, or of a small copy of the whole image.
        unmapped: Why no image token has ``sources``, or "".
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
    part: Int[Tensor, "batch pos"] | None = None
    unmapped: str = ""

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """The last prompt position of every row."""
        return torch.where(
            self.live, torch.arange(self.live.shape[1], device=self.live.device), -1
        ).amax(dim=1)

    @property
    def first(self) -> Int[Tensor, " batch"]:
        """The first live position of every row: BOS where the tokenizer has one."""
        return self.live.int().argmax(dim=1)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `select` knows for this sample."""
        images = int(self.image.max().item()) + 1 if self.image.numel() else 0
        fixed = ("all", "bos", "first", "text", "special", "image", "last")
        parts = (
            () if self.part is None else [n for i, n in enumerate(PARTS) if (self.part == i).any()]
        )
        return (*fixed, *(f"image:{i}" for i in range(images)), *parts)

    def select(self, selection: Selection, n_layers: int = 0) -> Tensor:
        """Turn a selection into a mask, bool ``[batch pos]`` or ``[batch layer pos]``, False at padding.

        A selection is a name from `names`; other words, looked for in the text of every row as whole words
        (all tokens of all places that hold them); a position, a list of positions or a slice, counted as
        here, with padding; or a bool mask ``[batch pos]`` or, with ``n_layers`` of the tower,
        ``[batch layer pos]``. ``"text"`` are all live positions that are neither image, BOS nor special
        tokens; ``"bos"`` is empty where the tokenizer adds no BOS: use ``"first"`` there. SelectionError if a
        row does not hold the words or the position, or the mask is of another batch.
        """
        if not isinstance(selection, str):
            mask = mask_of(selection, self.live, n_layers, "the language tower")
            return mask & (self.live if mask.ndim == 2 else self.live[:, None])
        if selection not in self.names:
            return self._holding(selection)
        if selection == "all":
            return self.live
        if selection in ("last", "first"):
            at = getattr(self, selection)
            return self.live & (torch.arange(self.live.shape[1]) == at[:, None])
        if selection.startswith("image:"):
            return self.image == int(selection.removeprefix("image:"))
        if self.part is not None and selection in PARTS:
            return self.part == PARTS.index(selection)
        return self.live & (self.kind == KINDS.index(selection))

    def _holding(self, text: str) -> Tensor:
        """The text tokens of every place that holds some words."""
        mask, textual = torch.zeros_like(self.live), self.select("text").tolist()
        for row, words in enumerate(self.words or ()):
            line, owners, at = "", [], 0  # what is no text interrupts the line with a zero
            while at < len(words):
                word = words[at] if textual[row][at] else "\0"
                parts, many = re.fullmatch(r"(.+) 1/([2-9])", word, flags=re.DOTALL), 1
                if parts and words[at + 1 : at + 2] == (f"{parts[1]} 2/{parts[2]}",):
                    word, many = parts[1], int(parts[2])
                line, owners = line + word, owners + [range(at, at + many)] * len(word)
                at += many
            start = line.find(text) if text.strip() else -1
            while start >= 0:
                stop = start + len(text)
                if not (_inside_word(line, start) or _inside_word(line, stop)):
                    mask[row, sorted(set().union(*owners[start:stop]))] = True
                start = line.find(text, start + 1)
        if not mask.any():
            why = "has no such whole words" if self.words else "is unknown without a tokenizer"
            raise SelectionError(
                f"Got the selection {text!r}; expected one of {self.names} or a boolean mask. "
                f"{nearest(text, self.names)} The text of the prompt {why}: write words as "
                "sample.tokens.words shows them, or positions such as [0, 5]."
            )
        if lacking := (~mask.any(dim=1)).nonzero().flatten().tolist():
            raise SelectionError(
                f"Got the selection {text!r}, which the text of rows {lacking} does not hold; expected "
                "words of every row. Prepare those rows apart, or write a mask."
            )
        return mask

    def from_vision(self, scores: Float[Tensor, "image pos"], merge: str = "max") -> Tensor:
        """Carry scores of ViT tokens to the LLM positions they feed, NaN where no image token is.
        ``merge`` joins those of one position: ``"max"``, ``"mean"`` or ``"any"`` (max of ``score > 0``)."""
        check_merge(merge)
        if self.unmapped:
            got = f"Got scores of ViT tokens for a sample in which {self.unmapped}; expected image tokens"
            raise SelectionError(f"{got} with sources. Write a rule for tokens of the decoder.")
        if scores.shape != self.vision.live.shape:
            raise SelectionError(
                f"Got scores of shape {tuple(scores.shape)}; expected "
                f"{tuple(self.vision.live.shape)}, one per image and ViT token of this sample."
            )
        gone = self.sources < 0
        picked = scores[self.image_index.clamp(min=0)[..., None], self.sources.clamp(min=0)]
        picked = (picked > 0).to(scores.dtype) if merge == "any" else picked
        out = picked.masked_fill(gone, float("-inf")).amax(-1)
        if merge == "mean":
            out = picked.masked_fill(gone, 0.0).sum(-1) / (~gone).sum(-1).clamp(min=1)
        return out.masked_fill((self.image_index < 0) | gone.all(dim=-1), float("nan"))

    def to_dataframe(self) -> pd.DataFrame:
        """One line per live position: kind, image, grid cell, ViT tokens, pixel box, word."""
        live, places = self.live, self.live.nonzero().tolist()
        table: dict[str, Any] = {"batch": [b for b, _ in places], "pos": [p for _, p in places]}
        table["id"] = self.ids[live].tolist()
        table["word"] = [self.words[b][p] if self.words else None for b, p in places]
        table["kind"] = [KINDS[kind] for kind in self.kind[live].tolist()]
        table |= {name: getattr(self, name)[live].tolist() for name in ("image", "row", "column")}
        table["vit_tokens"] = [[s for s in few if s >= 0] for few in self.sources[live].tolist()]
        table |= zip(("x0", "y0", "x1", "y1"), self.box[live].T.tolist(), strict=True)
        return pd.DataFrame(table)


def _inside_word(line: str, at: int) -> bool:
    """Whether letters or digits stand on both sides of a place; scripts without blanks do not count."""
    pair = line[at - 1 : at + 1] if at else ""
    return len(pair) == 2 and all(c.isalnum() and east_asian_width(c) not in "WF" for c in pair)


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

"""What a probe may know about the model and the sample: numbers, masks and paths, never modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkscope.anatomy.towers import Anatomy, TowerAnatomy
from sinkscope.errors import ProbeError, SelectionError
from sinkscope.tokens import Selection, TokenMap, VisionMap


@dataclass(frozen=True, eq=False)
class Context:
    """The model's anatomy and the sample's tokens at one step: 0 for the prompt, 1, 2, ... for decode steps.
    ``ended``, bool ``[batch]``, are rows whose answer ended before this step, None while unknown."""

    anatomy: Anatomy
    tokens: TokenMap
    step: int = 0
    ended: Tensor | None = None

    def tower(self, name: str) -> TowerAnatomy:
        """One tower's anatomy."""
        return self.anatomy.tower(name)

    def layers(self, tower: str, layers: Any) -> tuple[int, ...]:
        """Checked, ascending layers of a tower."""
        return self.tower(tower).layers(layers)

    @property
    def vision(self) -> VisionMap:
        """The ViT tokens; ModelError without a vision tower, SelectionError for a sample without images."""
        self.tower("vision")
        if not len(self.tokens.vision.live):
            raise SelectionError(
                "Got the vision tower for a sample in which no token is known to show an image, so that its "
                "ViT tokens have no place; expected image tokens. Probes of the language tower work here."
            )
        return self.tokens.vision

    def live(self, tower: str) -> Tensor:
        """Live query positions, bool ``[row pos]``; one position per row at a decode step."""
        if tower == "vision":
            return self.vision.live
        return self._going[:, None] if self.step else self.tokens.live

    def live_keys(self, tower: str) -> Tensor:
        """Live key positions, bool ``[row key]``, with the tokens generated so far."""
        if tower == "vision":
            return self.vision.live
        grown = torch.ones(self.tokens.live.shape[0], self.step, dtype=torch.bool)
        return torch.cat([self.tokens.live, grown], dim=1) & self._going[:, None]

    def positions(self, tower: str, selection: Selection | None = None) -> Tensor:
        """Positions of all or selected queries, or the newest token, int ``[row query]``, -1 for none."""
        if selection is not None and not self.step:
            return indices_of(self.flat(tower, selection))
        live = self.live(tower)
        first = self.tokens.live.shape[1] + self.step - 1 if self.step else 0
        return torch.where(live, torch.arange(live.shape[1]) + first, -1)

    @property
    def _going(self) -> Tensor:
        """Rows whose answer has not ended, bool ``[batch]``."""
        return torch.ones(len(self.tokens.live)).bool() if self.ended is None else ~self.ended

    def layout(self, tower: str) -> Tensor | None:
        """The packed layout of the vision tower, or None."""
        return self.vision.layout if tower == "vision" else None

    def select(self, tower: str, selection: Selection) -> Tensor:
        """A selection as a bool mask ``[row pos]`` or ``[row layer pos]``."""
        chosen = self.vision if tower == "vision" else self.tokens
        return chosen.select(selection, self.tower(tower).n_layers)

    def flat(self, tower: str, selection: Selection) -> Tensor:
        """A selection of queries or rows, bool ``[row pos]``, without a layer axis and not empty."""
        mask = self.select(tower, selection)
        if isinstance(selection, str) and not mask.any():
            raise SelectionError(
                f"Got the selection {selection!r} as queries or rows, which stands for no token of "
                "this sample; expected at least one. Where 'bos' is empty, write 'first'."
            )
        if mask.ndim != 2:
            raise ProbeError(
                f"Got a per-layer mask of shape {tuple(mask.shape)} as queries or rows; expected "
                "one mask for all layers, [batch pos]. Write mask.any(dim=1) or choose a layer."
            )
        return mask

    def groups(self, tower: str, groups: Any) -> Tensor:
        """Token groups as columns, bool ``[row layer|1 pos group]``; ProbeError if it is no dict of them."""
        if not isinstance(groups, Mapping) or not groups:
            raise ProbeError(
                f"Got groups={groups!r}; expected a dict of names and selections, such as "
                "{'image': 'image', 'text': 'text'}."
            )
        if strange := [name for name in groups if not isinstance(name, str)]:
            raise ProbeError(
                f"Got the group names {strange}; expected strings, such as {{'image': 'image'}}."
            )
        masks = [self.select(tower, selection) for selection in groups.values()]
        many = self.tower(tower).n_layers if any(mask.ndim == 3 for mask in masks) else 1
        masks = [m if m.ndim == 3 else m[:, None].expand(-1, many, -1) for m in masks]
        return torch.stack(masks, dim=-1)

    def pack(self, tower: str, x: Tensor, dim: int) -> Tensor:
        """Per-image values in the layout of a packed tower, else ``x`` itself:
        ``[image ... pos ...] -> [1 ... packed ...]``, with positions at ``dim``."""
        if (layout := self.layout(tower)) is None:
            return x
        flat = x.movedim(dim, 1)[layout >= 0]
        length = max(self.tokens.vision.length, len(flat))  # tokens of no image stand for nothing
        packed = flat.new_zeros(length, *flat.shape[1:])
        packed[layout[layout >= 0]] = flat
        return packed[None].movedim(1, dim)

    def packed_rows(self, tower: str, mask: Tensor) -> Tensor:
        """Positions of a mask ``[row pos]`` in the model's layout, int ``[row|1 chosen]``, -1 padded."""
        if (layout := self.layout(tower)) is None:
            return indices_of(mask)
        chosen = layout[mask][None]
        return chosen if chosen.shape[1] else torch.full((1, 1), -1)


def indices_of(mask: Tensor) -> Tensor:
    """The True positions of every row, ``[row chosen]``, padded with -1 at the end."""
    rows = [line.nonzero().flatten() for line in mask]
    out = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    return out if out.shape[1] else torch.full((mask.shape[0], 1), -1)

"""AblateValues: what is attended stays, what is read from it changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.errors import InterventionError
from sinkscope.interventions.protocol import (
    Edit,
    at_layer,
    check_decodes,
    check_heads,
    rows_at,
    runs_now,
    selected,
)
from sinkscope.kernels.values import edit_values
from sinkscope.sites import Site, Tower
from sinkscope.tokens import Selection

if TYPE_CHECKING:
    from sinkscope.models.context import Context

REPLACEMENTS = ("zero", "mean", "resample")


@dataclass(frozen=True, eq=False)
class AblateValues:
    """Replace the value vectors of tokens; what is attended stays, what is read from it changes.

    Report several replacements side by side: zeroing alone can mislead (2604.14433).

    Args:
        tokens: The keys.
        replacement: ``"zero"``; ``"mean"`` of the row's other live prompt tokens; ``"resample"``: each
            takes the value of a random other prompt token (of the image, for image tokens); or a
            tensor that broadcasts to ``[batch kv_head pos d_head]``, the same in all layers.
        layers: Block indices, or None for all.
        heads: Query heads, or None for all.
        queries: Prompt positions, or None for all.
        steps: ``"all"``, ``"prefill"`` or ``"decode"``.
        tower: ``"language"``, or ``"vision"`` where it is not packed.
        seed: For resampling.
        allow_noop: Whether touching nothing is fine.
    """

    tokens: Selection
    replacement: str | Tensor = "zero"
    layers: Any = None
    heads: Sequence[int] | None = None
    queries: Selection | None = None
    steps: str = "all"
    tower: Tower = "language"
    seed: int = 0
    allow_noop: bool = False

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        tower, how = self.tower, self._how(context)
        mask = selected(context, tower, self.tokens, "AblateValues", self.allow_noop)
        heads = check_heads(self.heads, context.tower(tower).heads)
        rows = rows_at(context, tower, self.queries, "AblateValues", self.allow_noop)
        layers = context.layers(tower, self.layers)
        check_decodes(self.steps, self.queries)
        if not runs_now(self.steps, context, tower) or (context.step and rows is not None):
            return []
        shared = {
            "live": context.pack(tower, context.live(tower), dim=1),
            "how": how,
            "tensor": self._tensor(context, mask) if how == "tensor" else None,
            "rows": rows,
            "heads": heads,
        }
        return [
            Edit(
                Site(tower, "attention", layer),
                edit_values,
                {
                    **shared,
                    "keys": context.pack(tower, at_layer(mask, layer), dim=1),
                    "donors": self._donors(context, at_layer(mask, layer), how),
                },
                "values",
            )
            for layer in layers
        ]

    def _how(self, context: Context) -> str:
        """The kind of replacement.

        Raises:
            InterventionError: If it is unknown, or the tower's layout does not allow it.
        """
        how = "tensor" if isinstance(self.replacement, Tensor) else self.replacement
        if how not in (*REPLACEMENTS, "tensor"):
            raise InterventionError(
                f"Got replacement={how!r}; expected one of {REPLACEMENTS} or a tensor."
            )
        if context.layout(self.tower) is not None and how != "zero":
            raise InterventionError(
                f"Got replacement={how!r} in a packed vision tower; expected 'zero'. It attends "
                "window by window, and other tokens' values may lie in another window."
            )
        return how

    def _donors(self, context: Context, mask: Tensor, how: str) -> Tensor | None:
        """Who the mean is over, or which token each takes its value from."""
        tokens = context.tokens
        live = tokens.vision.live if self.tower == "vision" else tokens.live
        if how == "mean":
            return others(live, mask, "AblateValues")
        if how != "resample":
            return None
        visual = tokens.image >= 0 if self.tower == "language" else live
        return random_donors(mask, live, visual, self.seed)

    def _tensor(self, context: Context, mask: Tensor) -> Tensor:
        """The given values, checked to broadcast and to be finite where they are used."""
        tower, given = context.tower(self.tower), self.replacement
        wanted = (mask.shape[0], tower.kv_heads, mask.shape[2], tower.d_head)
        assert isinstance(given, Tensor)
        try:
            values = given.detach().cpu().expand(wanted)
        except RuntimeError as error:
            raise InterventionError(
                f"Got values of shape {tuple(given.shape)}; expected something that "
                f"broadcasts to [batch kv_head pos d_head] = {wanted}."
            ) from error
        used = mask.any(dim=1)[:, None, :, None]
        if not torch.isfinite(values.masked_fill(~used, 0.0)).all():
            raise InterventionError(
                "Got NaN or infinite values at edited tokens; expected finite ones. They would "
                "spread to every live token of the row."
            )
        return values.nan_to_num()


def others(live: Tensor, mask: Tensor, what: str) -> Tensor:
    """The live tokens that are not edited, whose mean replaces the edited ones, ``[batch pos]``.

    Raises:
        InterventionError: If some row has none.
    """
    rest = live & ~mask
    alone = (mask.any(dim=1) & ~rest.any(dim=1)).nonzero().flatten().tolist()
    if alone:
        raise InterventionError(
            f"Got a selection that holds every token of rows {alone} for the mean of {what}; "
            "expected some left to average over. Write replacement='zero'."
        )
    return rest


def random_donors(mask: Tensor, live: Tensor, visual: Tensor, seed: int) -> Tensor:
    """For every selected position a random unselected one of its row; itself for the others.

    Args:
        mask: Bool ``[batch pos]`` selected positions.
        live: Bool ``[batch pos]``.
        visual: Bool ``[batch pos]``: image tokens draw from image tokens, the others from the rest.
        seed: Of the draw.

    Returns:
        Int ``[batch pos]``.

    Raises:
        InterventionError: If there is no unselected token of the kind.
    """
    generator = torch.Generator().manual_seed(seed)
    out = torch.arange(mask.shape[1]).expand(mask.shape[0], -1).clone()
    for b in range(mask.shape[0]):
        for kind in (visual[b], ~visual[b]):
            takers = (mask[b] & kind & live[b]).nonzero().flatten()
            pool = (~mask[b] & kind & live[b]).nonzero().flatten()
            if not len(takers):
                continue
            if not len(pool):
                raise InterventionError(
                    f"Got a selection that holds every token of its kind in row {b}; expected some "
                    "left to resample from. Write replacement='zero' or a tensor."
                )
            out[b, takers] = pool[torch.randint(len(pool), (len(takers),), generator=generator)]
    return out

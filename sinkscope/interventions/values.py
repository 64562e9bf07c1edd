"""AblateValues: what is attended stays, what is read from it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sinkscope.errors import InterventionError, nearest
from sinkscope.interventions.base import (
    at_layer,
    check_decodes,
    check_heads,
    rows_at,
    runs_now,
    selected,
)
from sinkscope.interventions.donors import VALUES, Holder, check_finite, donated, live_prompt
from sinkscope.kernels.edits import edit_values
from sinkscope.probes.writes import AttentionValueResult
from sinkscope.protocols import Edit
from sinkscope.sites import Site, Tower
from sinkscope.tokens import Selection

if TYPE_CHECKING:
    from sinkscope.anatomy.context import Context

REPLACEMENTS = ("zero", "mean", "resample")


@dataclass(frozen=True, eq=False)
class AblateValues:
    """Replace the value vectors of tokens; what is attended stays, what is read from it changes.

    Report several replacements side by side: zeroing alone can mislead (2604.14433). What a mean or a
    resampled token takes are the model's own values, before any edit of the layer: of two edits of
    different tokens neither sees the other.

    Args:
        tokens: The keys.
        replacement: ``"zero"``; ``"mean"`` of the row's other live prompt tokens; ``"resample"``: each
            takes the value of a random other prompt token (of the image, for image tokens); a
            tensor that broadcasts to ``[batch kv_head pos d_head]``, the same in all layers, or to
            ``[batch layer kv_head pos d_head]``, one per layer given; or a run of a prompt of this
            shape that holds `AttentionValues`, or that result.
        layers: Block indices, or None for all.
        heads: Query heads, or None for all.
        queries: Prompt positions, or None for all.
        steps: ``"all"``, ``"prefill"`` or ``"decode"``.
        tower: ``"language"`` or ``"vision"``; a packed one knows no ``"mean"`` and no ``"resample"``.
        seed: For resampling.
        allow_noop: Whether touching nothing is fine.
    """

    needs: ClassVar[str] = "packed_values"

    tokens: Selection
    replacement: Any = "zero"
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
        values = self._values(context, how, mask, layers)
        if not runs_now(self.steps, context, tower) or (context.step and rows is not None):
            return []
        return value_edits(context, tower, layers, mask, how, values, rows, heads)

    def _how(self, context: Context) -> str:
        """The kind of replacement.

        Raises:
            InterventionError: If it is unknown, or the tower's layout does not allow it.
        """
        given = self.replacement
        if isinstance(given, Tensor | AttentionValueResult | Holder):
            return "tensor"
        if given not in REPLACEMENTS:
            came = repr(given) if isinstance(given, str) else type(given).__name__
            raise InterventionError(
                f"Got replacement={came}; expected one of {REPLACEMENTS} or a tensor, or a run that "
                f"holds ss.probes.AttentionValues. {nearest(str(given), REPLACEMENTS)}"
            )
        if context.layout(self.tower) is not None and given != "zero":
            raise InterventionError(
                f"Got replacement={given!r} in a packed vision tower; expected 'zero', a tensor or "
                "a run. It attends window by window, and other tokens' values may lie in another "
                "window."
            )
        return given

    def _values(
        self, context: Context, how: str, mask: Tensor, layers: tuple[int, ...]
    ) -> list[dict[str, Any]]:
        """What the kernel needs in every layer to make the new values."""
        if how != "tensor":
            return [{"donors": self._donors(context, at_layer(mask, at), how)} for at in layers]
        given = self.replacement
        if isinstance(given, Tensor):
            given = broadcast(given, context, self.tower, len(layers))
        else:
            given = donated(given, context, self.tower, VALUES, layers)
        return [{"tensor": one} for one in ready_values(context, self.tower, given, mask, layers)]

    def _donors(self, context: Context, mask: Tensor, how: str) -> Tensor | None:
        """Who the mean is over, or which token each takes its value from."""
        live = live_prompt(context, self.tower)
        if how == "mean":
            return others(live, mask, "AblateValues")
        if how != "resample":
            return None
        visual = context.tokens.image >= 0 if self.tower == "language" else live
        return random_donors(mask, live, visual, self.seed)


def value_edits(
    context: Context,
    tower: Tower,
    layers: tuple[int, ...],
    mask: Tensor,
    how: str,
    values: Sequence[Mapping[str, Any]],
    rows: Tensor | None = None,
    heads: list[int] | None = None,
) -> list[Edit]:
    """One edit per layer that replaces the values of the tokens in ``mask``.

    Args:
        context: The sample and the step.
        tower: The tower.
        layers: The layers.
        mask: Bool ``[batch layer|1 pos]``.
        how: See `sinkscope.kernels.edits.edit_values`.
        values: Its ``donors`` or its ``tensor``, per layer.
        rows: Selected query rows in the model's layout, or None.
        heads: Selected query heads, or None.
    """
    shared = {
        "live": context.pack(tower, context.live(tower), dim=1),
        "how": how,
        "rows": rows,
        "heads": heads,
    }
    return [
        Edit(
            Site(tower, "attention", layer),
            edit_values,
            {**shared, "keys": context.pack(tower, at_layer(mask, layer), dim=1), **one},
            "values",
        )
        for layer, one in zip(layers, values, strict=True)
    ]


def broadcast(given: Tensor, context: Context, tower: str, n_layers: int) -> Tensor:
    """Given values as ``[batch layer kv_head pos d_head]``.

    Raises:
        InterventionError: If they do not broadcast to it.
    """
    anatomy, live = context.tower(tower), live_prompt(context, tower)
    wanted = (live.shape[0], n_layers, anatomy.kv_heads, live.shape[1], anatomy.d_head)
    of_all = wanted[:1] + wanted[2:]
    try:
        if given.ndim <= 4:
            return given.detach().cpu().expand(of_all)[:, None].expand(wanted)
        return given.detach().cpu().expand(wanted)
    except RuntimeError as error:
        raise InterventionError(
            f"Got values of shape {tuple(given.shape)}; expected something that broadcasts to "
            f"[batch kv_head pos d_head] = {of_all}, or to [batch layer kv_head pos d_head] = "
            f"{wanted}, one per layer given."
        ) from error


def ready_values(
    context: Context, tower: str, values: Tensor, mask: Tensor, layers: tuple[int, ...]
) -> list[Tensor]:
    """Values per layer in the model's layout, after a look for NaN.

    Args:
        context: The sample.
        tower: The tower.
        values: ``[batch layer kv_head pos d_head]``.
        mask: Bool ``[batch layer|1 pos]``: the tokens that take them.
        layers: The layers.

    Returns:
        Per layer ``[batch kv_head pos d_head]``, or ``[1 kv_head packed d_head]``.
    """
    check_finite(values, mask, layers, 3)
    return [context.pack(tower, values[:, i].nan_to_num(), dim=2) for i in range(len(layers))]


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

"""Interventions on values and states: ablate, clamp, patch, scale and move tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.errors import InterventionError
from sinkscope.interventions.attention import check_factor, check_neutral
from sinkscope.interventions.protocol import (
    Edit,
    at_layer,
    check_heads,
    rows_at,
    runs_now,
    selected,
)
from sinkscope.kernels import edits as kernels
from sinkscope.probes.residual import check_dims, check_site
from sinkscope.sites import Site, Tower
from sinkscope.tokens import Selection

if TYPE_CHECKING:
    from sinkscope.models.context import Context


@dataclass(frozen=True, eq=False)
class AblateValues:
    """Replace the value vectors of tokens; what is attended stays, what is read from it changes.

    Report several replacements side by side: zeroing alone can mislead (2604.14433).

    Args:
        tokens: The keys.
        replacement: ``"zero"``; ``"mean"`` of the row's other live tokens; ``"resample"``: each takes
            the value of a random other token (of the image, for image tokens); or a tensor that
            broadcasts to ``[batch kv_head pos d_head]``.
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
        how = "tensor" if isinstance(self.replacement, Tensor) else self.replacement
        if how not in ("zero", "mean", "resample", "tensor"):
            raise InterventionError(
                f"Got replacement={how!r}; expected 'zero', 'mean', 'resample' or a tensor."
            )
        tower = self.tower
        if context.layout(tower) is not None and how != "zero":
            raise InterventionError(
                f"Got replacement={how!r} in a packed vision tower; expected 'zero'."
            )
        mask = selected(context, tower, self.tokens, "AblateValues", self.allow_noop)
        heads = check_heads(self.heads, context.tower(tower).heads)
        rows = rows_at(context, tower, self.queries)
        if not runs_now(self.steps, context, tower) or (context.step and rows is not None):
            return []
        live = context.tokens.vision.live if tower == "vision" else context.tokens.live
        return [
            Edit(
                Site(tower, "attention", layer),
                kernels.edit_values,
                {
                    "keys": context.pack(tower, at_layer(mask, layer), dim=1),
                    "live": context.pack(tower, context.live(tower), dim=1),
                    "how": how,
                    "donors": self._donors(context, at_layer(mask, layer), live, how),
                    "tensor": self._tensor(context, live) if how == "tensor" else None,
                    "rows": rows,
                    "heads": heads,
                },
            )
            for layer in context.layers(tower, self.layers)
        ]

    def _donors(self, context: Context, mask: Tensor, live: Tensor, how: str) -> Tensor | None:
        """Who the mean is over, or which token each takes its value from."""
        if how == "mean":
            return live & ~mask
        if how != "resample":
            return None
        visual = context.tokens.image >= 0 if self.tower == "language" else live
        return random_donors(mask, live, visual, self.seed)

    def _tensor(self, context: Context, live: Tensor) -> Tensor:
        """The given values, checked to broadcast."""
        tower = context.tower(self.tower)
        wanted = (live.shape[0], tower.kv_heads, live.shape[1], tower.d_head)
        assert isinstance(self.replacement, Tensor)
        try:
            return self.replacement.expand(wanted)
        except RuntimeError as error:
            raise InterventionError(
                f"Got values of shape {tuple(self.replacement.shape)}; expected something that "
                f"broadcasts to [batch kv_head pos d_head] = {wanted}."
            ) from error


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


@dataclass(frozen=True, eq=False)
class AblateActivations:
    """Set channels of tokens: what massive activations do (Sun et al. 2402.17762).

    Args:
        dims: Channel indices.
        tokens: The tokens.
        replacement: ``"zero"``; ``"mean"`` of the same channel over the row's other live tokens;
            ``"clamp"`` to at most ``value`` in magnitude; or a number.
        layers: Block indices, or None for all.
        value: The bound of ``"clamp"``.
        site: ``"resid_pre"``, ``"attn_out"``, ``"mlp_out"`` or ``"resid_post"``.
        tower: ``"language"`` or ``"vision"``.
        allow_noop: Whether touching nothing is fine.
    """

    dims: Sequence[int]
    tokens: Selection
    replacement: str | float = "zero"
    layers: Any = None
    value: float | None = None
    site: str = "resid_post"
    tower: Tower = "language"
    allow_noop: bool = False
    steps: str = "prefill"

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer; prompt tokens exist in the first pass only."""
        how = "set" if isinstance(self.replacement, (int, float)) else self.replacement
        if how not in ("zero", "mean", "clamp", "set"):
            raise InterventionError(
                f"Got replacement={how!r}; expected 'zero', 'mean', 'clamp' or a number."
            )
        if how == "clamp" and not (self.value is not None and self.value >= 0):
            raise InterventionError(
                f"Got value={self.value!r} for 'clamp'; expected a magnitude of 0 or more."
            )
        dims = check_dims(self.dims, context.tower(self.tower).d_model, self.tower)
        mask = selected(context, self.tower, self.tokens, "AblateActivations", self.allow_noop)
        if not runs_now(self.steps, context, self.tower) or context.step:
            return []
        live = context.live(self.tower)
        site = check_site(self.site)
        out = []
        for layer in context.layers(self.tower, self.layers):
            chosen = at_layer(mask, layer)
            value = {"mean": live & ~chosen, "set": self.replacement}.get(how, self.value)
            parameters = {"mask": chosen, "dims": dims, "how": how, "value": value}
            parameters["layout"] = context.layout(self.tower)
            out.append(Edit(Site(self.tower, site, layer), kernels.edit_channels, parameters))
        return out


@dataclass(frozen=True, eq=False)
class PatchActivations:
    """Put states of another run in place: the causal test of what tokens carry.

    Args:
        states: Float ``[batch layer pos d_model]`` from a `ResidualStates` probe of the other run, or
            that probe's result; layers must be those given here.
        tokens: The tokens to overwrite.
        layers: Block indices, or None for all.
        site: As the states were read.
        tower: ``"language"`` or ``"vision"``.
        allow_noop: Whether touching nothing is fine.
    """

    states: Any
    tokens: Selection
    layers: Any = None
    site: str = "resid_post"
    tower: Tower = "language"
    allow_noop: bool = False
    steps: str = "prefill"

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        layers = context.layers(self.tower, self.layers)
        states = getattr(self.states, "states", self.states)
        live = context.live(self.tower) if not context.step else context.tokens.live
        wanted = (live.shape[0], len(layers), live.shape[1], context.tower(self.tower).d_model)
        if not isinstance(states, Tensor) or tuple(states.shape) != wanted:
            shape = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise InterventionError(
                f"Got states of shape {shape}; expected [batch layer pos d_model] = {wanted}: those "
                "of a run with a prompt of the same shape. Read them with "
                "ss.ResidualStates(layers, site=...)."
            )
        mask = selected(context, self.tower, self.tokens, "PatchActivations", self.allow_noop)
        if context.step:
            return []
        filled = states.nan_to_num()
        return [
            Edit(
                Site(self.tower, check_site(self.site), layer),
                kernels.edit_states,
                {
                    "mask": at_layer(mask, layer) & live,
                    "donor": filled[:, i],
                    "layout": context.layout(self.tower),
                },
            )
            for i, layer in enumerate(layers)
        ]


@dataclass(frozen=True, eq=False)
class ScaleTokens:
    """Multiply image tokens as they enter the LLM (the ReW weights of DIYSink, 2510.08510).

    RMSNorm removes most of a token's scale inside the first block, so what changes is how much the
    token weighs against what the blocks add to it.

    Args:
        tokens: Positions; usually ``trace.v_sinks`` or image tokens.
        factor: The multiplier.
        allow_noop: Whether touching nothing is fine.
    """

    tokens: Selection
    factor: float
    allow_noop: bool = False
    steps: str = "prefill"
    tower: Tower = "language"

    def edits(self, context: Context) -> list[Edit]:
        """One edit of the embeddings."""
        factor = check_factor("factor", self.factor)
        check_neutral("ScaleTokens", factor, 1.0, self.allow_noop)
        mask = selected(context, "language", self.tokens, "ScaleTokens", self.allow_noop)
        if context.step:
            return []
        parameters = {"mask": at_layer(mask, 0), "factor": torch.tensor(factor)}
        return [Edit(Site("language", "resid_pre", 0), kernels.scale_states, parameters)]


@dataclass(frozen=True, eq=False)
class SinkToFront:
    """Move image tokens to the start of their image block (sink-to-the-front, DIYSink 2510.08510).

    The embeddings are reordered and the LLM's positions stay where they are: a moved token takes
    the position, and so the RoPE angle, of its new place.

    Args:
        tokens: Image tokens to move; their order among themselves is kept.
        allow_noop: Whether moving nothing is fine.
    """

    tokens: Selection
    allow_noop: bool = False
    steps: str = "prefill"
    tower: Tower = "language"

    def edits(self, context: Context) -> list[Edit]:
        """One edit of the embeddings."""
        mask = selected(context, "language", self.tokens, "SinkToFront", self.allow_noop)
        mask = at_layer(mask, 0)
        image = context.tokens.image
        if (mask & (image < 0)).any():
            raise InterventionError(
                "Got text tokens to move to the front; expected image tokens only. Write "
                "tokens & (sample.tokens.image >= 0)."
            )
        if context.step:
            return []
        order = torch.arange(mask.shape[1]).expand(mask.shape[0], -1).clone()
        for b in range(mask.shape[0]):
            for index in range(int(image[b].max()) + 1):
                block = (image[b] == index).nonzero().flatten()
                front = mask[b, block]
                order[b, block] = torch.cat([block[front], block[~front]])
        return [
            Edit(Site("language", "resid_pre", 0), kernels.permute_states, {"order": order})
        ]

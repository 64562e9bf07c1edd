"""Interventions on attention: mask, scale, knock out, redistribute; exact under the model's kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.errors import InterventionError, NoEffectError
from sinkscope.interventions.protocol import (
    Edit,
    at_layer,
    check_heads,
    rows_at,
    runs_now,
    selected,
)
from sinkscope.kernels import edits as kernels
from sinkscope.sites import Site, Tower
from sinkscope.tokens import Selection

if TYPE_CHECKING:
    from sinkscope.experiments.trace import SinkTrace
    from sinkscope.models.context import Context


def key_edits(intervention: Any, context: Context, how: str, factor: float) -> list[Edit]:
    """One edit per layer of an intervention with tokens, layers, heads, queries and steps."""
    it, tower = intervention, intervention.tower
    anatomy = context.tower(tower)
    layers, heads = context.layers(tower, it.layers), check_heads(it.heads, anatomy.heads)
    mask = selected(context, tower, it.tokens, type(it).__name__, it.allow_noop)
    rows = rows_at(context, tower, it.queries)
    # Queries are prompt positions: none of them is the query of a decode step.
    if not runs_now(it.steps, context, tower) or (context.step and rows is not None):
        return []
    live = context.pack(tower, context.live(tower), dim=1)
    return [
        Edit(
            Site(tower, "attention", layer),
            kernels.edit_keys,
            {
                "keys": context.pack(tower, at_layer(mask, layer), dim=1),
                "live": live,
                "how": how,
                "factor": factor,
                "rows": rows,
                "heads": heads,
            },
        )
        for layer in layers
    ]


@dataclass(frozen=True, eq=False)
class MaskKeys:
    """Make keys unreachable: their attention becomes 0 and the rest is renormalised.

    A row that sees masked keys only (row 0, if BOS is masked) keeps its unedited output and is
    counted in ``run.effects``. The cache stays clean, and the mask holds at every decode step.

    Args:
        tokens: The keys.
        layers: Block indices, or None for all.
        heads: Query heads, or None for all.
        queries: Prompt positions whose attention is edited, or None for all; decode steps are
            edited only with None.
        steps: ``"all"``, ``"prefill"`` or ``"decode"``.
        tower: ``"language"`` or ``"vision"``.
        allow_noop: Whether touching nothing is fine.
    """

    tokens: Selection
    layers: Any = None
    heads: Sequence[int] | None = None
    queries: Selection | None = None
    steps: str = "all"
    tower: Tower = "language"
    allow_noop: bool = False

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        return key_edits(self, context, "mask", 0.0)


def check_factor(name: str, factor: Any, least: float = float("-inf")) -> float:
    """A finite number.

    Raises:
        InterventionError: If it is none, or below ``least``.
    """
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor != factor:
        raise InterventionError(f"Got {name}={factor!r}; expected a number.")
    if abs(factor) == float("inf") or factor < least:
        bound = "a finite number" if least == float("-inf") else f"a finite number, {least} or more"
        raise InterventionError(f"Got {name}={factor!r}; expected {bound}.")
    return float(factor)


def check_neutral(name: str, factor: float, neutral: float, allow_noop: bool) -> None:
    """Refuse a setting that changes nothing.

    Raises:
        NoEffectError: If it is neutral and that was not allowed.
    """
    if factor == neutral and not allow_noop:
        raise NoEffectError(
            f"{name} with {neutral:g} changes nothing; expected another value. Write "
            "allow_noop=True if that is meant, for instance as the base of a sweep."
        )


@dataclass(frozen=True, eq=False)
class ScaleKeys:
    """Multiply keys: every *logit* to them is multiplied (LSG, Choi et al. 2604.03316).

    Not a scaling of attention: a factor below 1 raises the weight of keys with a negative logit, and
    0 gives logit 0, not absence; ``run.effects`` shows the sign. It comes after RoPE and after any
    k-norm, and is repeated at every decode step on a clean cache.

    Args:
        tokens: The keys.
        factor: The multiplier.
        layers: See `MaskKeys`, as for the rest.
    """

    tokens: Selection
    factor: float
    layers: Any = None
    heads: Sequence[int] | None = None
    queries: Selection | None = None
    steps: str = "all"
    tower: Tower = "language"
    allow_noop: bool = False

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        factor = check_factor("factor", self.factor)
        check_neutral("ScaleKeys", factor, 1.0, self.allow_noop)
        return key_edits(self, context, "scale", factor)


@dataclass(frozen=True, eq=False)
class ScaleAttention:
    """Multiply attention weights on tokens.

    With ``renormalize=True`` the rows sum to one again (a logit bias of ``log factor``; factor 0 is
    `MaskKeys`). Without, the rest of the row keeps its weights and the sum changes.

    Args:
        tokens: The keys.
        factor: The multiplier, at least 0 if renormalised.
        layers: See `MaskKeys`, as for the rest.
        renormalize: Whether rows sum to one again.
    """

    tokens: Selection
    factor: float
    layers: Any = None
    renormalize: bool = True
    heads: Sequence[int] | None = None
    queries: Selection | None = None
    steps: str = "all"
    tower: Tower = "language"
    allow_noop: bool = False

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        least = 0.0 if self.renormalize else float("-inf")
        factor = check_factor("factor", self.factor, least)
        check_neutral("ScaleAttention", factor, 1.0, self.allow_noop)
        how = "weight" if self.renormalize else "weight without renormalising"
        return key_edits(self, context, how, factor)


@dataclass(frozen=True, eq=False)
class AttentionKnockout:
    """Cut attention from a set of queries to a set of keys in a window of layers.

    ``MaskKeys`` with queries, in the order in which knockouts are written (Geva et al. 2304.14767).

    Args:
        queries: Prompt positions that may no longer see the keys; ``"last"`` for the last one.
        keys: The keys.
        layers: Block indices, or None for all.
        heads: Query heads, or None for all.
        tower: ``"language"`` or ``"vision"``.
        allow_noop: Whether touching nothing is fine.
    """

    queries: Selection
    keys: Selection
    layers: Any = None
    heads: Sequence[int] | None = None
    tower: Tower = "language"
    allow_noop: bool = False
    steps: str = "prefill"

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        same = MaskKeys(
            self.keys, self.layers, self.heads, self.queries, self.steps, self.tower,
            self.allow_noop,
        )
        return same.edits(context)


@dataclass(frozen=True, eq=False)
class ImageCentric:
    """The selection rule of VAR (Kang et al. 2503.03321): which rows and heads look at the image.

    A (layer, head, query) is edited if at least ``least_visual`` of its attention lies on the image
    and at most ``most_sink_share`` of that on visual sinks.

    Args:
        visual_sinks: The visual sinks, ``[batch pos]`` or ``[batch layer pos]``.
        least_visual: 0.2 in paper and code.
        most_sink_share: ``rho`` of the code, 0.5; the paper's rho bounds the non-sink share from
            below, so it is one minus this.
    """

    visual_sinks: Selection
    least_visual: float = 0.2
    most_sink_share: float = 0.5


def after_image(context: Context) -> Tensor:
    """Live positions after the row's last image token."""
    visual = context.tokens.image >= 0
    places = torch.arange(visual.shape[1])
    last = torch.where(visual, places, -1).amax(dim=1)
    return context.tokens.live & (places > last[:, None])


@dataclass(frozen=True, eq=False)
class Redistribute:
    """Move attention from source tokens to target tokens in proportion (VAR, ACT).

    Over selected rows and heads the source keeps ``1 - recycle`` of its weight, and what was taken
    goes to the target in proportion to its weights. The presets name the two readings of VAR.

    Args:
        source: Keys that give.
        target: Keys that receive; must not overlap the source.
        recycle: Share taken from the source, 0 to 1. The paper's formula takes ``p = 0.6``; the
            released code keeps ``p = 0.6`` and so takes 0.4.
        layers: Block indices, or None for all.
        select: Which rows and heads; None for all.
        queries: ``"after image"`` for prompt positions after the last image token (and every decode
            step), a selection of prompt positions, or None for all.
        heads: Query heads, or None for all.
        steps: ``"all"``, ``"prefill"`` or ``"decode"``.
        allow_noop: Whether touching nothing is fine.
    """

    source: Selection
    target: Selection
    recycle: float
    layers: Any = None
    select: ImageCentric | None = None
    queries: Selection | None = None
    heads: Sequence[int] | None = None
    steps: str = "all"
    allow_noop: bool = False
    tower: Tower = "language"

    @classmethod
    def var_paper(
        cls, trace: SinkTrace, layers: Any = None, *, p: float = 0.6, rho: float = 0.8
    ) -> Redistribute:
        """VAR as its paper writes it: recycle ``p``, non-sink share at least ``rho``."""
        return cls._var(trace, layers, p, 1 - rho)

    @classmethod
    def var_code(
        cls, trace: SinkTrace, layers: Any = None, *, p: float = 0.6, rho: float = 0.5
    ) -> Redistribute:
        """VAR as its code does it: keep ``p``, sink share at most ``rho``."""
        return cls._var(trace, layers, 1 - p, rho)

    @classmethod
    def _var(cls, trace: SinkTrace, layers: Any, recycle: float, share: float) -> Redistribute:
        """All sinks give, visual non-sinks receive; from layer 2 on, as published."""
        rule = trace.l_detection.mask
        visual = (trace.sample.tokens.image >= 0)[:, None]
        chosen = tuple(range(2, trace.n_layers)) if layers is None else layers
        return cls(
            source=rule,
            target=visual & ~rule,
            recycle=recycle,
            layers=chosen,
            select=ImageCentric(rule & visual, 0.2, share),
            queries="after image",
            allow_noop=not bool((rule & visual).any()),
        )

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        recycle = check_factor("recycle", self.recycle, 0.0)
        if recycle > 1:
            raise InterventionError(f"Got recycle={recycle}; expected a share from 0 to 1.")
        check_neutral("Redistribute", recycle, 0.0, self.allow_noop)
        what = "Redistribute"
        source = selected(context, self.tower, self.source, what, self.allow_noop)
        target = selected(context, self.tower, self.target, what, self.allow_noop)
        if (source & target).any():
            raise InterventionError(
                f"Got {int((source & target).sum())} tokens in both source and target; expected "
                "disjoint sets. Write target & ~source."
            )
        if isinstance(self.queries, str) and self.queries == "after image":
            rows = None if context.step else after_image(context)
        else:
            rows = rows_at(context, self.tower, self.queries)
            if context.step and rows is not None:
                return []
        if not runs_now(self.steps, context, self.tower):
            return []
        heads = check_heads(self.heads, context.tower(self.tower).heads)
        return [
            Edit(
                Site(self.tower, "attention", layer),
                kernels.edit_mass,
                {
                    "source": at_layer(source, layer),
                    "target": at_layer(target, layer),
                    "live": context.live(self.tower),
                    "recycle": recycle,
                    "rows": rows,
                    "heads": heads,
                    **self._rule(context, layer),
                },
            )
            for layer in context.layers(self.tower, self.layers)
        ]

    def _rule(self, context: Context, layer: int) -> dict[str, Any]:
        """The parameters of the image-centric rule at one layer."""
        if self.select is None:
            return {}
        sinks = selected(context, self.tower, self.select.visual_sinks, "ImageCentric", True)
        return {
            "visual": context.tokens.image >= 0,
            "visual_sinks": at_layer(sinks, layer),
            "least_visual": self.select.least_visual,
            "most_sink_share": self.select.most_sink_share,
        }

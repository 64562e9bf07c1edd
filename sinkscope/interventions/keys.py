"""Interventions on keys: mask, scale, knock out; exact under the model's own kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from sinkscope.errors import InterventionError, NoEffectError
from sinkscope.interventions.base import (
    at_layer,
    check_decodes,
    check_heads,
    check_maskable,
    check_tower,
    needs_a_mask,
    rows_at,
    runs_now,
    selected,
)
from sinkscope.kernels import edits as kernels
from sinkscope.kernels.edits import evict_keys
from sinkscope.protocols import Edit
from sinkscope.sites import Site, Tower
from sinkscope.tokens import Selection

if TYPE_CHECKING:
    from sinkscope.anatomy.context import Context

STAGE_OF = MappingProxyType(
    {
        "scale": "keys",
        "mask": "logits",
        "weight": "logits",
        "weight without renormalising": "weights",
    }
)


def key_edits(
    it: Any, context: Context, tokens: Selection, how: str, factor: float, neutral: float | None
) -> list[Edit]:
    """One edit per layer of an intervention with layers, heads, queries and steps.

    Args:
        it: The intervention.
        context: The model's anatomy and the sample's tokens.
        tokens: The keys.
        how: See `sinkscope.kernels.edits.edit_keys`.
        factor: The factor.
        neutral: The factor that changes nothing: then no key is edited.
    """
    tower, name = it.tower, type(it).__name__
    if STAGE_OF[how] == "logits":
        check_maskable(context.tower(tower), needs_a_mask(context.tower(tower)), name)
    layers, heads = (
        context.layers(tower, it.layers),
        check_heads(it.heads, context.tower(tower).heads),
    )
    mask = selected(context, tower, tokens, name, it.allow_noop)
    rows = rows_at(context, tower, it.queries, name, it.allow_noop)
    check_decodes(it.steps, it.queries)
    # Queries are prompt positions: none of them is the query of a decode step.
    if not runs_now(it.steps, context, tower) or (context.step and rows is not None):
        return []
    if factor == neutral:
        mask = mask & False
    live = context.pack(tower, context.live(tower), dim=1)
    return [
        Edit(
            Site(tower, "attention", layer),
            kernels.edit_keys,
            {
                "keys": context.pack(tower, at_layer(mask, layer), dim=1),
                "live": live,
                "factor": factor,
                "rows": rows,
                "heads": heads,
            },
            STAGE_OF[how],
        )
        for layer in layers
    ]


@dataclass(frozen=True, eq=False)
class MaskKeys:
    """Make keys unreachable: their attention becomes 0 and the rest is renormalised.

    A row that sees masked keys only (row 0, if BOS is masked) keeps its unedited output and is
    counted in ``run.effects``; where the model has a learned sink, which takes attention too, it
    reads nothing instead. The cache stays clean, and the mask holds at every decode step.

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

    needs: ClassVar[str] = "bias"

    tokens: Selection
    layers: Any = None
    heads: Sequence[int] | None = None
    queries: Selection | None = None
    steps: str = "all"
    tower: Tower = "language"
    allow_noop: bool = False

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        return key_edits(self, context, self.tokens, "mask", 0.0, None)


def check_factor(name: str, factor: Any, least: float = float("-inf")) -> float:
    """A finite number.

    Raises:
        InterventionError: If it is none, or below ``least``.
    """
    number = isinstance(factor, Real) and not isinstance(factor, bool)
    if not number or not math.isfinite(factor) or factor < least:
        bound = "" if least == float("-inf") else f", {least:g} or more"
        raise InterventionError(f"Got {name}={factor!r}; expected a finite number{bound}.")
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

    needs: ClassVar[str] = "weights"

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
        return key_edits(self, context, self.tokens, "scale", factor, 1.0)


@dataclass(frozen=True, eq=False)
class ScaleAttention:
    """Multiply attention weights on tokens.

    With ``renormalize=True`` the rows sum to one again (a logit bias of ``log factor``; factor 0 is
    `MaskKeys`). Without, the rest of the row keeps its weights and the sum changes. The bias is exact
    to 16 bits in bf16; under a soft-cap or with heads of more than 248 dimensions it is rounded to
    the model's dtype (in bf16 the factor is then good to 0.4 % of its logarithm).

    Args:
        tokens: The keys.
        factor: The multiplier, at least 0 if renormalised.
        layers: See `MaskKeys`, as for the rest.
        renormalize: Whether rows sum to one again.
    """

    needs: ClassVar[str] = "bias"

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
        return key_edits(self, context, self.tokens, how, factor, 1.0)


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

    needs: ClassVar[str] = "bias"

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
            self.keys,
            self.layers,
            self.heads,
            self.queries,
            self.steps,
            self.tower,
            self.allow_noop,
        )
        return same.edits(context)


@dataclass(frozen=True, eq=False)
class EvictKeys:
    """Keep the first ``start`` keys and the ``recent`` last ones, as StreamingLLM does (2309.17453).

    Dropping the first keys (``start=0``) is what breaks a model whose sink they are. Two differences
    to a streaming cache: positions keep their angle instead of being renumbered inside the cache,
    and the keys stay in memory, so this measures quality, not speed. The mask is explicit.

    Args:
        start: First live keys to keep; 4 in the paper.
        recent: Recent keys to keep, the query's own among them.
        layers: Block indices, or None for all.
        steps: ``"all"``, ``"prefill"`` or ``"decode"``.
        allow_noop: Whether evicting nothing (a short prompt) is fine.
    """

    needs: ClassVar[str] = "eviction"

    start: int = 4
    recent: int = 512
    layers: Any = None
    steps: str = "all"
    allow_noop: bool = False
    tower: Tower = "language"

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        check_tower(self.tower, "language", "EvictKeys")
        for name, value, least in (("start", self.start, 0), ("recent", self.recent, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InterventionError(
                    f"Got {name}={value!r}; expected an int of {least} or more."
                )
        differs = "what is evicted differs by query"
        check_maskable(context.tower("language"), differs, "EvictKeys")
        if not runs_now(self.steps, context, "language"):
            return []
        parameters = {"live": context.tokens.live, "start": self.start, "recent": self.recent}
        return [
            Edit(Site("language", "attention", layer), evict_keys, parameters, "logits")
            for layer in context.layers("language", self.layers)
        ]

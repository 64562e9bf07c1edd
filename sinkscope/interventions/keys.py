"""Edits of logits: mask, scale, knock out, temperature; exact under the model's own kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sinkscope.anatomy.context import Context
from sinkscope.checks import check_number, check_whole
from sinkscope.errors import InterventionError
from sinkscope.interventions import base
from sinkscope.interventions.base import AttentionEdit, BaseEdit, attention_edits, check_factor
from sinkscope.kernels.edits import divide_queries, edit_keys, evict_keys
from sinkscope.protocols import Edit
from sinkscope.sites import Site
from sinkscope.tokens import Selection

SHARED = ("layers", "heads", "queries", "steps", "tower", "allow_noop")


def key_edits(
    it: Any, context: Context, stage: str, factor: float, neutral: float | None = 1.0
) -> list[Edit]:
    """Edits that multiply what a stage is about by a factor, see `edit_keys`; none if it is neutral."""
    if neutral is not None:
        base.check_neutral(it, factor, neutral)
    if stage == "logits":
        base.check_maskable(it, context)
    mask = base.selected_by(it, context, it.tokens) & (factor != neutral)
    return attention_edits(it, context, edit_keys, stage, {"keys": mask}, factor=factor)


@dataclass(frozen=True, eq=False)
class MaskKeys(AttentionEdit, needs="bias"):
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

    tokens: Selection
    layers: Any = None

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        return key_edits(self, context, "logits", 0.0, None)


@dataclass(frozen=True, eq=False)
class ScaleKeys(AttentionEdit, needs="weights"):
    """Multiply keys: every *logit* to them is multiplied (LSG, Choi et al. 2604.03316).

    Not a scaling of attention: a factor below 1 raises the weight of keys with a negative logit, and
    0 gives logit 0, not absence; ``run.effects`` shows the sign. It comes after RoPE and after any
    k-norm, and is repeated at every decode step on a clean cache.

    Args:
        factor: The multiplier.
        layers: See `MaskKeys`, as for the rest.
    """

    tokens: Selection
    factor: float
    layers: Any = None

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        return key_edits(self, context, "keys", check_factor("factor", self.factor))


@dataclass(frozen=True, eq=False)
class ScaleAttention(AttentionEdit, needs="bias"):
    """Multiply attention weights on tokens.

    With ``renormalize=True`` the rows sum to one again (a logit bias of ``log factor``; factor 0 is
    `MaskKeys`). Without, the rest of the row keeps its weights and the sum changes. The bias is exact
    to 16 bits in bf16; under a soft-cap or with heads of more than 248 dimensions it is rounded to
    the model's dtype (in bf16 the factor is then good to 0.4 % of its logarithm).

    Args:
        factor: The multiplier, at least 0 if renormalised.
        layers: See `MaskKeys`, as for the rest.
        renormalize: Whether rows sum to one again.
    """

    tokens: Selection
    factor: float
    layers: Any = None
    renormalize: bool = True

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        least, stage = (0.0, "logits") if self.renormalize else (float("-inf"), "weights")
        return key_edits(self, context, stage, check_factor("factor", self.factor, least))


@dataclass(frozen=True, eq=False)
class AttentionKnockout(AttentionEdit, needs="bias"):
    """Cut attention from queries to keys in a window of layers (Geva et al. 2304.14767).

    Args:
        queries: Prompt positions that may no longer see the keys; ``"last"`` for the last one.
        layers: See `MaskKeys`, as for the rest.
    """

    queries: Selection
    keys: Selection
    layers: Any = None
    steps: str = field(default="prefill", kw_only=True)

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        same = {name: getattr(self, name) for name in SHARED}
        return MaskKeys(self.keys, **same).edits(context)


@dataclass(frozen=True, eq=False)
class EvictKeys(BaseEdit, needs="eviction"):
    """Keep the first ``start`` keys and the ``recent`` last ones, as StreamingLLM does (2309.17453).

    Dropping the first keys (``start=0``) is what breaks a model whose sink they are. Two differences
    to a streaming cache: positions keep their angle instead of being renumbered inside the cache,
    and the keys stay in memory, so this measures quality, not speed. The mask is explicit.

    Args:
        start: First live keys to keep; 4 in the paper.
        recent: Recent keys to keep, the query's own among them.
        layers: See `MaskKeys`, as for the rest.
    """

    start: int = 4
    recent: int = 512
    layers: Any = None
    steps: str = field(default="all", kw_only=True)

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        base.check_tower(self, "language")
        check_whole(0, error=InterventionError, start=self.start)
        check_whole(1, error=InterventionError, recent=self.recent)
        base.check_maskable(self, context, "what is evicted differs by query")
        if not base.runs_now(self.steps, context, "language"):
            return []
        parameters = {"live": context.tokens.live, "start": self.start, "recent": self.recent}
        return [
            Edit(Site("language", "attention", layer), evict_keys, parameters, "logits")
            for layer in context.layers("language", self.layers)
        ]


@dataclass(frozen=True, eq=False)
class AttentionTemperature(AttentionEdit, needs="weights"):
    """Divide the logits of chosen rows by a temperature: ``softmax(z / T)``.

    Queries are divided, and keys and the cache stay as they are. So under a soft-cap it is the logit
    before the cap that is divided, and the logit of a learned sink is not: its share changes with the
    others' sharpness. A bias of another edit (`MaskKeys`, `ScaleAttention`) is added behind it. The
    effect's mass is that on all live keys: 1, unless there is a learned sink.

    Args:
        temperature: Above 0; below 1 sharpens, above 1 flattens.
        layers: See `MaskKeys`, as for the rest.
    """

    temperature: float
    layers: Any = None

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        check_number(above=0.0, error=InterventionError, temperature=self.temperature)
        heat = float(self.temperature)
        base.check_neutral(self, heat)
        masks = {"keys": base.selected_by(self, context, "all")}
        return attention_edits(self, context, divide_queries, "keys", masks, temperature=heat)

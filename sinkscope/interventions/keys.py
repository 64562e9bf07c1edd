"""Edits of attention: mask, scale, knock out, evict, temperature, redistribute; exact in every kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sinkscope.anatomy.context import Context
from sinkscope.checks import check_choice, check_number, check_whole
from sinkscope.errors import InterventionError
from sinkscope.interventions import base
from sinkscope.interventions.base import AttentionEdit, BaseEdit, attention_edits, check_factor
from sinkscope.interventions.live import RULES, LiveRule
from sinkscope.kernels.edits import divide_queries, edit_keys, edit_mass, evict_keys
from sinkscope.protocols import Edit
from sinkscope.sites import Site
from sinkscope.tokens import Selection

AFTER_IMAGE = "after image"


def key_edits(
    it: Any, context: Context, tokens: Selection, stage: str, factor: float
) -> list[Edit]:
    """Edits that multiply what a stage is about by a factor, see `edit_keys`; none if that is 1."""
    base.check_neutral(it, factor)
    if stage == "logits":
        base.check_maskable(it, context)
    mask, of = base.selected_by(it, context, tokens, live=True) & (factor != 1.0), {"keys": tokens}
    return attention_edits(it, context, edit_keys, stage, {"keys": mask}, of=of, factor=factor)


@dataclass(frozen=True, eq=False)
class MaskKeys(AttentionEdit, needs="bias"):
    """Make keys unreachable: their attention becomes 0 and the rest is renormalised.

    A row that sees masked keys only (row 0, if BOS is masked) keeps its unedited output and is counted in
    ``run.effects``; where the model has a learned sink, it reads nothing instead. The cache stays clean, and
    the mask holds at every decode step.

    Args:
        tokens: The keys; also a `LiveRule`, which finds them in the edited pass, layer by layer.
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
        return key_edits(self, context, self.tokens, "logits", 0.0)


@dataclass(frozen=True, eq=False)
class ScaleKeys(AttentionEdit, needs="weights"):
    """Multiply keys: every *logit* to them is multiplied (LSG, Choi et al. 2604.03316).

    Not a scaling of attention: a ``factor`` below 1 raises the weight of keys with a negative logit, and 0
    gives logit 0, not absence; ``run.effects`` shows the sign. It comes after RoPE and any k-norm, and is
    repeated at every decode step on a clean cache. The other fields are those of `MaskKeys`.
    """

    tokens: Selection
    factor: float
    layers: Any = None

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        return key_edits(self, context, self.tokens, "keys", check_factor("factor", self.factor))


@dataclass(frozen=True, eq=False)
class ScaleAttention(AttentionEdit, needs="bias"):
    """Multiply attention weights on tokens by a ``factor``.

    With ``renormalize`` the rows sum to one again (a logit bias of ``log factor``, at least 0; factor 0 is
    `MaskKeys`). Without, the rest of the row keeps its weights and the sum changes. The bias is exact
    to 16 bits in bf16; under a soft-cap or with heads of more than 248 dimensions it is rounded to
    the model's dtype (in bf16 the factor is then good to 0.4 % of its logarithm). The other fields are those
    of `MaskKeys`.
    """

    tokens: Selection
    factor: float
    layers: Any = None
    renormalize: bool = True

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        least, stage = (0.0, "logits") if self.renormalize else (float("-inf"), "weights")
        factor = check_factor("factor", self.factor, least)
        return key_edits(self, context, self.tokens, stage, factor)


@dataclass(frozen=True, eq=False)
class AttentionKnockout(BaseEdit, needs="bias"):
    """Cut attention from queries to keys in a window of layers (Geva et al. 2304.14767).

    ``queries`` are prompt positions, ``"last"`` for the last one. The other fields are those of `MaskKeys`.
    """

    queries: Selection
    keys: Selection
    layers: Any = None
    heads: Sequence[int] | None = field(default=None, kw_only=True)

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        return key_edits(self, context, self.keys, "logits", 0.0)


@dataclass(frozen=True, eq=False)
class EvictKeys(BaseEdit, needs="eviction"):
    """Keep the first ``start`` keys and the ``recent`` last ones, as StreamingLLM does (2309.17453).

    Dropping the first keys (``start=0``; the paper keeps 4) breaks a model whose sink they are. ``recent``
    includes the query's own key. Unlike in a streaming cache positions keep their angle, and the keys stay in
    memory: this measures quality, not speed. The mask is explicit. The other fields are those of `MaskKeys`.
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
        given = {"live": context.tokens.live, "start": self.start, "recent": self.recent}
        runs = base.runs_now(self.steps, context, "language")
        return [
            Edit(Site("language", "attention", layer), evict_keys, given, "logits")
            for layer in (context.layers("language", self.layers) if runs else ())
        ]


@dataclass(frozen=True, eq=False)
class AttentionTemperature(AttentionEdit, needs="weights"):
    """Divide the logits of chosen rows by a temperature: ``softmax(z / T)``; below 1 sharpens, above 1
    flattens.

    Queries are divided, and keys and the cache stay as they are. So under a soft-cap it is the logit
    before the cap that is divided, and the logit of a learned sink is not: its share changes with the
    others' sharpness. A bias of another edit (`MaskKeys`, `ScaleAttention`) is added behind it. The
    effect's mass is that on all live keys: 1, unless there is a learned sink. The other fields are those of
    `MaskKeys`.
    """

    temperature: float
    layers: Any = None

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        check_number(above=0.0, error=InterventionError, temperature=self.temperature)
        base.check_neutral(self, heat := float(self.temperature))
        masks = {"keys": base.selected_by(self, context, "all")}
        return attention_edits(self, context, divide_queries, "keys", masks, temperature=heat)


@dataclass(frozen=True, eq=False)
class ImageCentric:
    """Select, as VAR does (Kang et al. 2503.03321), the rows and heads that look at the image.

    At least ``least_visual`` of their attention lies on it (0.2 in paper and code), at most
    ``most_sink_share`` of that on visual sinks.

    Args:
        visual_sinks: The visual sinks, ``[batch pos]`` or ``[batch layer pos]``.
        most_sink_share: ``rho`` of the code; one minus the paper's rho, which bounds the non-sink share.
        needs_sink: Whether a batch row without any visual sink in a layer is left alone there, as the
            code does; by the paper's formula text sinks give there too.
    """

    visual_sinks: Selection
    least_visual: float = 0.2
    most_sink_share: float = 0.5
    needs_sink: bool = False


@dataclass(frozen=True, eq=False)
class Redistribute(AttentionEdit, needs="redistribution"):
    """Move attention from source tokens to target tokens in proportion (VAR, ACT).

    Over selected rows and heads the source keeps ``1 - recycle`` of its weight, and what was taken
    goes to the target in proportion to its weights, however small they are beside a sink's. Rows
    that see no target are left alone. The presets name the two readings of VAR.

    Args:
        source: Keys that give.
        target: Keys that receive; must not overlap the source. Where one is a `LiveRule`, what gives does
            not receive.
        recycle: Share taken from the source, 0 to 1. The paper's formula takes ``p = 0.6``; the
            released code keeps ``p = 0.6`` and so takes 0.4.
        layers: As for the rest see `MaskKeys`.
        select: Which rows and heads; None for all.
        queries: ``"after image"`` for prompt positions after the last image token (and every decode
            step), a selection of prompt positions, or None for all.
    """

    source: Selection
    target: Selection
    recycle: float
    layers: Any = None
    select: ImageCentric | None = None

    @classmethod
    def var_paper(
        cls,
        trace: Any,
        layers: Any = None,
        *,
        p: float = 0.6,
        rho: float = 0.8,
        rule: str = "frozen",
    ) -> Redistribute:
        """VAR of a `SinkTrace` as its paper writes it: recycle ``p``, non-sink share at least ``rho``.

        ``layers`` None are all from 2 on. ``rule="frozen"`` takes the sinks of the trace, an unedited pass;
        ``"live"`` asks the trace's L rule anew in every layer of the edited pass, see `LiveRule`.
        """
        return cls._var(trace, layers, rule, p, 1 - rho, False)

    @classmethod
    def var_code(
        cls,
        trace: Any,
        layers: Any = None,
        *,
        p: float = 0.6,
        rho: float = 0.5,
        rule: str = "frozen",
    ) -> Redistribute:
        """VAR of a `SinkTrace` as its code does it: keep ``p``, sink share at most ``rho``.

        ``layers`` and ``rule`` are those of `var_paper`. The released code decides the sinks as ``"live"``
        does, and edits the last layer too: its option to leave that out has no effect.
        """
        return cls._var(trace, layers, rule, 1 - p, rho, True)

    @classmethod
    def _var(
        cls, trace: Any, layers: Any, rule: str, recycle: float, *rule_of_rows: Any
    ) -> Redistribute:
        """All sinks give, visual non-sinks receive; from layer 2 on, as published."""
        check_choice(RULES, error=InterventionError, rule=rule)
        source, visual = trace.l_detection.mask, (trace.sample.tokens.image >= 0)[:, None]
        target, sinks = visual & ~source, source & visual
        without = not bool(sinks.any())
        if rule == "live":
            source, target = LiveRule.of_trace(trace, trace.sample.tokens.live), visual[:, 0]
            sinks = replace(source, among=target)
        return cls(
            source=source,
            target=target,
            recycle=recycle,
            layers=tuple(range(2, trace.n_layers)) if layers is None else layers,
            select=ImageCentric(sinks, 0.2, *rule_of_rows),
            queries=AFTER_IMAGE,
            allow_noop=without,
        )

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        recycle = check_factor("recycle", self.recycle, 0.0)
        if recycle > 1:
            raise InterventionError(f"Got recycle={recycle}; expected a share from 0 to 1.")
        base.check_neutral(self, recycle, 0.0)
        base.check_maskable(self, context)
        of: dict[str, Any] = {"source": self.source, "target": self.target}
        source, target = (base.selected_by(self, context, x, live=True) for x in of.values())
        live = any(isinstance(x, LiveRule) for x in of.values())
        if (both := source & target).any() and not live:
            raise InterventionError(
                f"Got {int(both.any(dim=1).sum())} tokens in both source and target; expected "
                "disjoint sets. Write target & ~source."
            )
        masks = {"source": source & (recycle != 0), "target": target}
        given: dict[str, Any] = {"recycle": recycle}
        it, rule = self._checked_queries(context), self.select
        if rule is not None:
            of["visual_sinks"], given["needs_sink"] = rule.visual_sinks, rule.needs_sink
            lax = replace(self, allow_noop=True)
            masks["visual_sinks"] = base.selected_by(lax, context, rule.visual_sinks, live=True)
            for name in ("least_visual", "most_sink_share"):
                given[name] = check_factor(name, getattr(rule, name))
            given["visual"] = context.tokens.image >= 0
        return attention_edits(it, context, edit_mass, "weights", masks, of=of, **given)

    def _checked_queries(self, context: Context) -> Redistribute:
        """The same with a mask of queries instead of ``"after image"``; every decode step is after it."""
        if self.select is not None and not isinstance(self.select, ImageCentric):
            came = repr(self.select) if isinstance(self.select, str) else type(self.select).__name__
            raise InterventionError(
                f"Got select={came}; expected an ImageCentric rule, or None for all rows and heads. "
                "Write select=ss.interventions.ImageCentric(trace.l_sinks()); tokens go to source, "
                "target and queries."
            )
        after = isinstance(self.queries, str) and self.queries == AFTER_IMAGE
        if self.tower != "language" and (after or self.select is not None):
            what = f"queries={AFTER_IMAGE!r}" if after else "select=ImageCentric(...)"
            raise InterventionError(
                f"Got {what} in the {self.tower} tower; expected it in the decoder only, where "
                "image and text meet. Write tower='language', or leave it out."
            )
        if not after:
            return self
        behind = None
        if not context.step and self.steps != "decode":
            visual = context.tokens.image >= 0
            behind = context.tokens.live & (visual.flip(1).cumsum(1).flip(1) == 0)
        return replace(self, queries=behind, allow_noop=True)

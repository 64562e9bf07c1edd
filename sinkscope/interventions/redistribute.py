"""Redistribute: move attention from sinks to where it may do more (VAR, Kang et al. 2503.03321)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sinkscope.anatomy.context import Context
from sinkscope.errors import InterventionError
from sinkscope.interventions import base
from sinkscope.interventions.base import AttentionEdit, check_factor, selected_by
from sinkscope.kernels.edits import edit_mass
from sinkscope.protocols import Edit
from sinkscope.tokens import Selection

AFTER_IMAGE = "after image"


@dataclass(frozen=True, eq=False)
class ImageCentric:
    """Select, as VAR does (Kang et al. 2503.03321), the rows and heads that look at the image.

    At least ``least_visual`` of their attention lies on it, at most ``most_sink_share`` of that on
    visual sinks.

    Args:
        visual_sinks: The visual sinks, ``[batch pos]`` or ``[batch layer pos]``.
        least_visual: 0.2 in paper and code.
        most_sink_share: ``rho`` of the code, 0.5; the paper's rho bounds the non-sink share from
            below, so it is one minus this.
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
        target: Keys that receive; must not overlap the source.
        recycle: Share taken from the source, 0 to 1. The paper's formula takes ``p = 0.6``; the
            released code keeps ``p = 0.6`` and so takes 0.4.
        layers: See `MaskKeys`, as for the rest.
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
        cls, trace: Any, layers: Any = None, *, p: float = 0.6, rho: float = 0.8
    ) -> Redistribute:
        """VAR of a `SinkTrace` as its paper writes it: recycle ``p``, non-sink share at least ``rho``."""
        return cls._var(trace, layers, p, 1 - rho, False)

    @classmethod
    def var_code(
        cls, trace: Any, layers: Any = None, *, p: float = 0.6, rho: float = 0.5
    ) -> Redistribute:
        """VAR of a `SinkTrace` as its code does it: keep ``p``, sink share at most ``rho``."""
        return cls._var(trace, layers, 1 - p, rho, True)

    @classmethod
    def _var(cls, trace: Any, layers: Any, recycle: float, *rule_of_rows: Any) -> Redistribute:
        """All sinks give, visual non-sinks receive; from layer 2 on, as published."""
        rule = trace.l_detection.mask
        visual = (trace.sample.tokens.image >= 0)[:, None]
        return cls(
            source=rule,
            target=visual & ~rule,
            recycle=recycle,
            layers=tuple(range(2, trace.n_layers)) if layers is None else layers,
            select=ImageCentric(rule & visual, 0.2, *rule_of_rows),
            queries=AFTER_IMAGE,
            allow_noop=not bool((rule & visual).any()),
        )

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        recycle = check_factor("recycle", self.recycle, 0.0)
        if recycle > 1:
            raise InterventionError(f"Got recycle={recycle}; expected a share from 0 to 1.")
        base.check_neutral(self, recycle, 0.0)
        base.check_maskable(self, context)
        source, target = (selected_by(self, context, one) for one in (self.source, self.target))
        both = source & target
        if both.any():
            raise InterventionError(
                f"Got {int(both.any(dim=1).sum())} tokens in both source and target; expected "
                "disjoint sets. Write target & ~source."
            )
        masks = {"source": source & (recycle != 0), "target": target}
        given: dict[str, Any] = {"recycle": recycle}
        it = self._checked_queries(context)
        if self.select is not None:
            tokens = self.select.visual_sinks
            sinks = base.selected(context, self.tower, tokens, "ImageCentric", allow_empty=True)
            if self.select.needs_sink:
                masks["source"] = masks["source"] & sinks.any(dim=2, keepdim=True)
            for name in ("least_visual", "most_sink_share"):
                given[name] = check_factor(name, getattr(self.select, name))
            given["visual"], masks["visual_sinks"] = context.tokens.image >= 0, sinks
        return base.attention_edits(it, context, edit_mass, "weights", masks, **given)

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

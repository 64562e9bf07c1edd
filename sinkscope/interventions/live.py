"""LiveRule: tokens that a rule finds in the very pass that is edited, in every layer anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.errors import InterventionError
from sinkscope.kernels.gating import edit_flagged, note_flags
from sinkscope.protocols import Edit
from sinkscope.sites import Site
from sinkscope.tokens import Selection

RULES = ("frozen", "live")
"""Whose decision an edit takes: that of a trace, from an unedited pass, or that of the edited pass itself."""
INSIDE = "SinkDimensions, Massive, Limits (what ss.calibrate finds), Norm with a number, or NoSinks"


@dataclass(frozen=True, eq=False)
class LiveRule:
    """Select the prompt tokens that meet a rule in the edited pass itself, for edits of attention.

    In layer l the rule is asked about what block l reads, after all edits of earlier layers and of that
    state. Decode steps reuse the prompt's decision, as VAR's released code does (Kang et al. 2503.03321).
    Give it where `MaskKeys`, `ScaleKeys`, `ScaleAttention`, `AttentionKnockout` (its keys), `AblateValues`,
    `Redistribute` or `ImageCentric` takes tokens of the decoder; edits of states refuse it.

    The effect's ``extra`` then has, int ``[batch site]``: ``"live"``, how many tokens are flagged, and if
    ``frozen`` was given ``"frozen"``, how many that has there, ``"entered"``, those flagged live only, and
    ``"left"``, those of ``frozen`` only.

    Args:
        detector: A rule that judges a token by its state alone: SinkDimensions, Massive, Limits, Norm
            with a number. InterventionError for the gap rule and for rules on attention.
        among: The tokens that may be selected; the rule itself is asked about all live tokens.
        frozen: The decision of an unedited pass to compare with, bool ``[batch layer pos]``, or None.
    """

    detector: Any
    among: Selection = "all"
    frozen: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of_trace(cls, trace: Any, among: Tensor) -> LiveRule:
        """The L rule of a `SinkTrace`, among tokens ``[batch pos]``, compared with its decision.

        InterventionError if the masks of the trace are not its rule's, as those of a random control.
        """
        found, rule = trace.l_detection, trace.rules.l_rule
        if found.detector != repr(rule):
            raise InterventionError(
                f"Got a trace whose masks are of {found.detector}, for rule='live'; expected those of its "
                f"rule {rule!r}, which is asked again in the edited pass. Write rule='frozen' for a random "
                "control."
            )
        return cls(rule, among, found.mask)

    def mask(self, context: Context, tower: str) -> Tensor:
        """The tokens that may be selected, bool ``[batch pos]`` or ``[batch layer pos]``."""
        if tower != "language":
            raise InterventionError(
                f"Got a LiveRule in the {tower} tower; expected it in the decoder, where a layer's attention "
                "reads what the rule is asked about. Write a mask of ViT tokens."
            )
        return context.select(tower, self.among)

    def slot(self, layer: int) -> tuple[int, int]:
        """Where the decision of a layer is kept during a pass."""
        return id(self.detector), layer

    def looks(self, context: Context, layers: Sequence[int]) -> list[Edit]:
        """One look per layer: an edit that changes nothing and notes what the rule flags."""
        rules: dict[int, Any] = dict.fromkeys(layers)
        if hasattr(self.detector, "in_pass") and not isinstance(self.detector, type):
            self.detector.probe("language", layers, context.tower("language")).reads(context)
            rules = {layer: self.detector.in_pass(layer) for layer in layers}
        if None in rules.values():
            raise InterventionError(
                f"Got {self.detector!r} to be judged live; expected a rule that judges every token by its "
                f"state, because it runs inside the pass: {INSIDE}. The gap rule and rules on attention need "
                "the whole pass. Write ss.trace_sinks(lvlm, sample, l_detector=ss.calibrate(lvlm, "
                "samples).l_detector), or rule='frozen'."
            )
        return [
            Edit(
                Site("language", "resid_pre", layer),
                note_flags,
                {"slot": self.slot(layer), "rule": rule, "live": context.tokens.live},
                look=True,
            )
            for layer, rule in rules.items()
        ]


def judged(edits: Sequence[Edit], rules: Mapping[str, LiveRule], context: Context) -> list[Edit]:
    """Edits of attention whose masks named in ``rules`` hold where the rule flags; the first is reported."""
    first, out = next(iter(rules.values())).frozen, []
    before = None if first is None else context.select("language", first)
    for edit in edits:
        layer = edit.site.layer
        frozen = before if before is None or before.ndim == 2 else before[:, layer]
        given = {"kernel": edit.kernel, "frozen": frozen}
        given["slots"] = {name: rule.slot(layer) for name, rule in rules.items()}
        out.append(replace(edit, kernel=edit_flagged, parameters={**edit.parameters, **given}))
    return out

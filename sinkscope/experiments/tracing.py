"""trace_sinks: which tokens are sinks, of which kind, since which layer, and what they do.

V-sinks are decided in the vision tower, on the states that feed the projector, and carried through
the projector to LLM positions. L-sinks are visual tokens that meet the L rule on what a layer's
attention reads. V wins over L; the overlap is reported. Text sinks (BOS, delimiters) are listed
beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.checks import is_number, is_whole
from sinkscope.detectors.calibration import Calibration
from sinkscope.detectors.choice import SinkRules, known_for
from sinkscope.detectors.detection import Detection, decided
from sinkscope.detectors.gap import DRAWS, Gap
from sinkscope.detectors.rules import STATE_SITE, Detector
from sinkscope.errors import DetectorError, SelectionError
from sinkscope.experiments.candidates import Candidate, candidates_of, outcomes_of
from sinkscope.experiments.sink_records import (
    SinkRecord,
    attended_throughout,
    collect_records,
    measured,
)
from sinkscope.models.inputs import Sample
from sinkscope.models.lvlm import LVLM
from sinkscope.probes import (
    EvidenceResult,
    HeadWrites,
    MassiveActivations,
    SinkEvidence,
    TokenNorms,
)
from sinkscope.protocols import Probe
from sinkscope.results import Result
from sinkscope.sites import Tower
from sinkscope.tokens import check_merge

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class SinkTrace(Result):
    """The sinks of one sample.

    Attributes:
        sample: The sample.
        rules: The rules that decided, and where they are from.
        v_detection: What the V rule flags in the vision tower, in every block.
        l_detection: What the L rule flags in the LLM, in every layer (all tokens).
        v_sinks: Bool ``[batch pos]``: V-sinks at their LLM positions.
        attended: Bool ``[batch pos]``: image tokens to which the vision tower attends throughout and
            that are no V-sinks, at their LLM positions: attention without a spike.
        records: One `SinkRecord` per sink, and per token of ``attended`` that is no L-sink.
        feeds: Vision blocks whose output feeds the projector, ascending: where the V rule counts.
        vision: Spikes and attention of every ViT token.
        language: Spikes and attention of every token of the prompt.
        draws: The least attention beyond uniform that counts as drawing.
        warnings: What a reader must know.
    """

    sample: Sample
    rules: SinkRules
    v_detection: Detection
    l_detection: Detection
    v_sinks: Bool[Tensor, "batch pos"]
    attended: Bool[Tensor, "batch pos"]
    records: tuple[SinkRecord, ...]
    feeds: tuple[int, ...]
    vision: EvidenceResult
    language: EvidenceResult
    draws: float
    warnings: tuple[str, ...] = field(default=())

    @property
    def chosen(self) -> str:
        """How the rules came about: given, published, the gap rule, or the generic definition."""
        return self.rules.chosen

    @property
    def calibration(self) -> Calibration | None:
        """The calibration that the rules are from, if there is one."""
        return self.rules.calibration

    @property
    def received(self) -> Float[Tensor, "batch layer head key"]:
        """Attention received in the LLM (Gu et al. 2410.10781); see `ReceivedAttention`."""
        return self.language.received.received

    @property
    def null(self) -> Float[Tensor, "batch layer key"]:
        """The same under uniform attention."""
        null = self.language.received.null
        assert null is not None
        return null

    @property
    def vit_spikes(self) -> Float[Tensor, "image layer"]:
        """Largest ``|h|`` over the median of every vision block's output."""
        return self.vision.medians().nan_to_num().amax(dim=2)

    @property
    def llm_spikes(self) -> Float[Tensor, "batch layer"]:
        """Largest ``|h|`` over the median of every LLM layer's input."""
        return self.language.medians().nan_to_num().amax(dim=2)

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """The most attended tokens and the largest spikes of each tower, and why they are no sinks."""
        return candidates_of(self)

    @cached_property
    def outcomes(self) -> dict[Tower, str]:
        """For a tower in which nothing is flagged: what spikes, what draws, in one sentence."""
        return outcomes_of(self)

    @property
    def n_layers(self) -> int:
        """Layers of the LLM."""
        return len(self.l_detection.layers)

    def _rule(self, layer: int | None) -> Tensor:
        """The L rule on all tokens, ``[batch pos]`` or ``[batch layer pos]``."""
        if layer is None:
            return self.l_detection.mask
        if not is_whole(layer) or not 0 <= layer < self.n_layers:
            raise SelectionError(
                f"Got layer {layer!r}; expected 0 to {self.n_layers - 1}: l_sinks(l) is decided on "
                "what block l reads."
            )
        return self.l_detection.mask[:, layer]

    def _like(self, mask: Tensor, layer: int | None) -> Tensor:
        """A ``[batch pos]`` mask shaped like ``_rule(layer)``."""
        return mask if layer is not None else mask[:, None]

    def l_sinks(self, layer: int | None = None) -> Tensor:
        """Visual tokens that meet the L rule, V-sinks removed.

        Args:
            layer: A 0-based layer, decided on what it reads; None for all.

        Returns:
            Bool ``[batch pos]``, or ``[batch layer pos]`` for all layers.

        Raises:
            SelectionError: If there is no such layer.
        """
        visual = self.sample.tokens.image >= 0
        return self._rule(layer) & self._like(visual & ~self.v_sinks, layer)

    def overlap(self, layer: int | None = None) -> Tensor:
        """V-sinks that also meet the L rule; shapes as in `l_sinks`."""
        return self._rule(layer) & self._like(self.v_sinks, layer)

    def text_sinks(self, layer: int | None = None) -> Tensor:
        """Tokens outside the image that meet the L rule (BOS, delimiters); shapes as in `l_sinks`."""
        text = (self.sample.tokens.image < 0) & self.sample.tokens.live
        return self._rule(layer) & self._like(text, layer)

    def ordinary(self, layer: int | None = None) -> Tensor:
        """Visual tokens that are neither V- nor L-sinks nor attended throughout; with None, at no layer.

        What controls are drawn from: ``[batch pos]``.
        """
        visual = (self.sample.tokens.image >= 0) & ~self.v_sinks & ~self.attended
        if layer is None:
            return visual & ~self._rule(None).any(dim=1)
        return visual & ~self._rule(layer)

    @property
    def groups(self) -> dict[str, Tensor]:
        """A partition of all live tokens for `AttentionMass`, by layer where it differs.

        V-sinks, L-sinks, ordinary visual tokens, text sinks and other text.
        """
        n = self.n_layers
        text = (self.sample.tokens.image < 0) & self.sample.tokens.live
        visual = self.sample.tokens.image >= 0
        rule = self.l_detection.mask
        v = self.v_sinks
        return {
            "V-sinks": v[:, None].expand(-1, n, -1),
            "L-sinks": self.l_sinks(),
            "ordinary": (visual & ~v)[:, None] & ~rule,
            "text sinks": self.text_sinks(),
            "text": text[:, None] & ~rule,
        }

    def overlap_table(self) -> pd.DataFrame:
        """Per layer: V-sinks, L-sinks, V-sinks that meet the L rule too, text sinks; summed over rows."""
        import pandas as pd

        counts = {
            "V": self.v_sinks[:, None].expand(-1, self.n_layers, -1),
            "L": self.l_sinks(),
            "V and L rule": self.overlap(),
            "text": self.text_sinks(),
        }
        table = {name: mask.sum(dim=(0, 2)).tolist() for name, mask in counts.items()}
        return pd.DataFrame({"layer": list(self.l_detection.layers), **table})

    def to_dataframe(self) -> pd.DataFrame:
        """One line per sink: the records."""
        import pandas as pd

        names = list(SinkRecord.__dataclass_fields__)
        return pd.DataFrame([record.to_dict() for record in self.records], columns=names)

    def to_json(self, path: str | Path | None = None) -> str:
        """The trace as JSON: detectors, warnings, overlap table and records.

        Args:
            path: Where to write it too, or None.
        """
        body = {
            "detectors": {
                "V": self.v_detection.detector,
                "L": self.l_detection.detector,
                "chosen": self.chosen,
            },
            "outcomes": self.outcomes,
            "warnings": list(self.warnings),
            "overlap": self.overlap_table().to_dict(orient="list"),
            "sinks": [record.to_dict() for record in self.records],
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }
        text = json.dumps(body, indent=2, default=str)
        if path is not None:
            Path(path).write_text(text)
        return text

    def summary(self) -> str:
        """The trace in a few lines, for a terminal."""
        from sinkscope.viz.tables import trace_summary

        return trace_summary(self)

    def _repr_html_(self) -> str:
        """The same table for a notebook."""
        from sinkscope.viz.tables import trace_html

        return trace_html(self)

    def plot(self, row: int = 0) -> Figure:
        """Sinks over the image, attention by layer and kind, and spike sizes in both towers.

        Args:
            row: The row of the batch.

        Returns:
            A matplotlib figure.
        """
        from sinkscope.viz.layers import plot_trace

        return plot_trace(self, row)

    def __repr__(self) -> str:
        kinds = [record.kind for record in self.records]
        return (
            f"SinkTrace({kinds.count('V')} V-sinks, {kinds.count('L')} L-sinks, "
            f"{kinds.count('text')} text sinks, {kinds.count('attention')} attended without a spike; "
            f"{self.chosen})"
        )


@dataclass(frozen=True, eq=False)
class Probes:
    """The probes of a trace."""

    v: Any
    low: Any
    vision: SinkEvidence
    language: SinkEvidence
    vit_halves: Mapping[str, MassiveActivations]
    vit_norms: TokenNorms
    llm_halves: Mapping[str, MassiveActivations]
    llm_norms: TokenNorms
    writes: HeadWrites | None

    def all(self) -> list[Probe]:
        """Every probe once."""
        single: list[Any] = [self.vision, self.language, self.vit_norms, self.llm_norms]
        if self.writes is not None:
            single.append(self.writes)
        own = [probe for probe in (self.v, self.low) if probe not in single]
        return [*single, *own, *self.vit_halves.values(), *self.llm_halves.values()]


def make_probes(lvlm: LVLM, rules: SinkRules) -> Probes:
    """Everything a trace measures, in one forward pass; the gap rule needs no probe of its own."""
    a = lvlm.anatomy
    many = min(16, a.vision.d_model, a.language.d_model)
    vision, language = SinkEvidence(tower="vision"), SinkEvidence()
    own_v = rules.v.probe("vision", None, a.vision)
    own_l = rules.l_rule.probe("language", None, a.language)
    return Probes(
        v=vision if isinstance(rules.v, Gap) else own_v,
        low=language if isinstance(rules.l_rule, Gap) else own_l,
        vision=vision,
        language=language,
        vit_halves=halves_of(a.vision, many),
        vit_norms=TokenNorms(None, "vision", STATE_SITE["vision"]),
        llm_halves=halves_of(a.language, many),
        llm_norms=TokenNorms([0], "language", STATE_SITE["language"]),
        writes=HeadWrites(a.language.writing) if a.language.writing else None,
    )


def halves_of(tower: Any, many: int) -> dict[str, MassiveActivations]:
    """What attention and MLP add, in the blocks of which that is known."""
    if not tower.adding:
        return {}
    sites = ("attn_out", "mlp_out")
    return {site: MassiveActivations(tower.adding, tower.tower, many, site) for site in sites}


def trace_sinks(
    lvlm: LVLM,
    sample: Sample,
    v_detector: Detector | None = None,
    l_detector: Detector | None = None,
    *,
    calibration: Calibration | None = None,
    merge: str = "max",
    draws: float = DRAWS,
    remote: bool | str | None = None,
) -> SinkTrace:
    """Trace the sinks of a sample from the ViT through the projector into the LLM, in one pass.

    Args:
        lvlm: The model.
        sample: From ``lvlm.prepare``.
        v_detector: The rule for V-sinks, applied to the states that feed the projector. None: published
            constants of this very checkpoint, else the gap rule on this sample (`detectors.Gap`), else
            the generic definition of massive activations; ``trace.chosen`` says which.
        l_detector: The rule for L-sinks, applied to what each LLM layer reads; None likewise.
        calibration: Of `calibrate` on other images; its rules come after given and published ones.
        merge: How scores of several ViT tokens join where they become one LLM token: ``"max"``,
            ``"mean"`` (the mean passes, and the rule flags one of them) or ``"any"``.
        draws: What some head must give a token beyond uniform attention, counting other tokens'
            queries only, for it to draw attention: a share between 0 and 1.
        remote: See `LVLM.run`.

    Returns:
        The trace.

    Raises:
        DetectorError: If a detector cannot work on this model, or ``draws`` is no share.
        SelectionError: If ``merge`` is unknown.
    """
    check_merge(merge)
    if not is_number(draws, above=0, below=1):
        raise DetectorError(
            f"Got draws={draws!r}; expected a share of attention between 0 and 1, such as {DRAWS}."
        )
    if calibration is None:
        rules = SinkRules.on_sample(lvlm, sample, v_detector, l_detector, draws)
    else:
        given = (v_detector, l_detector)
        rules = SinkRules.on_others(lvlm, lambda: (), *given, calibration=calibration)
    probes = make_probes(lvlm, rules)
    run = lvlm.run(sample, probes.all(), logits="last", remote=remote)
    v_detection = decided(rules.v, run, probes.v, lvlm, sample)
    l_detection = decided(rules.l_rule, run, probes.low, lvlm, sample)
    feeds = [v_detection.layers.index(layer) for layer in lvlm.anatomy.feed_layers]
    v_sinks = carry(sample, v_detection, feeds, merge)
    m = measured(lvlm, sample, run, probes, v_detection, l_detection, draws)
    throughout = attended_throughout(m.vision, m.last, draws).float()
    attended = (sample.tokens.from_vision(throughout).nan_to_num() > 0) & ~v_sinks
    return SinkTrace(
        sample=sample,
        rules=rules,
        v_detection=v_detection,
        l_detection=l_detection,
        v_sinks=v_sinks,
        attended=attended,
        records=collect_records(m, v_sinks, attended),
        feeds=lvlm.anatomy.feed_layers,
        vision=m.vision,
        language=m.language,
        draws=draws,
        warnings=_warnings(v_detection, l_detection, lvlm, feeds),
    )


def carry(sample: Sample, detection: Detection, feeds: list[int], merge: str) -> Tensor:
    """V-sinks at their LLM positions: the rule on every state that feeds the projector.

    One of the ViT tokens that merge must be flagged, so that all of the rule holds for it. With
    ``merge="mean"`` their mean score must pass the threshold too.
    """
    tokens = sample.tokens
    flagged = torch.zeros_like(tokens.live)
    for feed in feeds:
        passed = tokens.from_vision(detection.mask[:, feed].float()).nan_to_num() > 0
        if merge == "mean":
            score = tokens.from_vision(detection.scores[:, feed].nan_to_num(), "mean")
            limit = detection.threshold[:, feed][tokens.image_index.clamp(min=0)]
            passed &= score > limit if detection.strict else score >= limit
        flagged |= passed
    return flagged & (tokens.image >= 0)


def _warnings(v: Detection, low: Detection, lvlm: LVLM, feeds: list[int]) -> tuple[str, ...]:
    """Warnings that concern what was decided: the feeding blocks, and every LLM layer."""
    out = []
    if bool((v.fraction[:, feeds] > 0.2).any()):
        out.extend(v.warnings)
    out.extend(low.warnings)
    known = known_for(lvlm)
    if known is not None and not known.default:
        out.append(
            f"Channels {known.l_dims} were reported for {known.name} ({known.source}); they are not "
            "used unasked."
        )
    return tuple(out)

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.detectors.calibrate import Calibration, calibrate
from sinkscope.detectors.constants import known_for
from sinkscope.detectors.detection import Detection
from sinkscope.detectors.rules import STATE_SITE, Detector
from sinkscope.detectors.run import check_detector, decided
from sinkscope.errors import SelectionError
from sinkscope.experiments.records import SinkRecord
from sinkscope.models.lvlm import LVLM, Run
from sinkscope.models.prepare import Sample
from sinkscope.probes import (
    HeadWrites,
    MassiveActivations,
    ReceivedAttention,
    TokenNorms,
)
from sinkscope.probes.protocol import Probe

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class SinkTrace:
    """The sinks of one sample.

    Attributes:
        sample: The sample.
        v_detection: What the V rule flags in the vision tower, in every block.
        l_detection: What the L rule flags in the LLM, in every layer (all tokens).
        v_sinks: Bool ``[batch pos]``: V-sinks at their LLM positions.
        records: One `SinkRecord` per sink.
        received: Float ``[batch layer head key]`` in the LLM, with its ``null`` ``[batch layer key]``.
        null: See ``received``.
        vit_spikes: Float ``[image layer]``: largest ``|h|`` over the median of every vision block's
            output; ``llm_spikes`` ``[batch layer]`` likewise, on every layer's input.
        llm_spikes: See ``vit_spikes``.
        chosen: How the detectors came about: given, known constants or calibrated.
        calibration: The calibration, if there was one.
        warnings: What a reader must know.
    """

    sample: Sample
    v_detection: Detection
    l_detection: Detection
    v_sinks: Bool[Tensor, "batch pos"]
    records: tuple[SinkRecord, ...]
    received: Float[Tensor, "batch layer head key"]
    null: Float[Tensor, "batch layer key"]
    vit_spikes: Float[Tensor, "image layer"]
    llm_spikes: Float[Tensor, "batch layer"]
    chosen: str
    calibration: Calibration | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def n_layers(self) -> int:
        """Layers of the LLM."""
        return len(self.l_detection.layers)

    def _rule(self, layer: int | None) -> Tensor:
        """The L rule on all tokens, ``[batch pos]`` or ``[batch layer pos]``."""
        if layer is None:
            return self.l_detection.mask
        if not 0 <= layer < self.n_layers:
            raise SelectionError(
                f"Got layer {layer}; expected 0 to {self.n_layers - 1}: l_sinks(l) is decided on "
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
        """Visual tokens that are neither V- nor L-sinks; with None, at no layer: ``[batch pos]``."""
        visual = (self.sample.tokens.image >= 0) & ~self.v_sinks
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
            "warnings": list(self.warnings),
            "overlap": self.overlap_table().to_dict(orient="list"),
            "sinks": [record.to_dict() for record in self.records],
        }
        text = json.dumps(body, indent=2, default=str)
        if path is not None:
            Path(path).write_text(text)
        return text

    def summary(self) -> str:
        """The trace in a few lines, for a terminal."""
        from sinkscope.viz.text import trace_summary

        return trace_summary(self)

    def _repr_html_(self) -> str:
        """The same table for a notebook."""
        from sinkscope.viz.html import trace_html

        return trace_html(self)

    def plot(self, row: int = 0) -> Figure:
        """Sinks over the image, attention by layer and kind, and spike sizes in both towers.

        Args:
            row: The row of the batch.

        Returns:
            A matplotlib figure.
        """
        from sinkscope.viz.trace import plot_trace

        return plot_trace(self, row)

    def __repr__(self) -> str:
        kinds = [record.kind for record in self.records]
        return (
            f"SinkTrace({kinds.count('V')} V-sinks, {kinds.count('L')} L-sinks, "
            f"{kinds.count('text')} text sinks; {self.chosen})"
        )


def choose_detectors(
    lvlm: LVLM,
    sample: Sample,
    v: Detector | None,
    low: Detector | None,
    remote: Any,
    *,
    what: str = "this sample",
) -> tuple[Detector, Detector, str, Calibration | None]:
    """The detectors of a trace: given, known constants, else calibrated on the sample (``what``)."""
    known = known_for(lvlm)
    if known is not None and known.default:
        source = f"known constants of {known.name}"
        chosen_v, chosen_l, calibration = v or known.v_detector, low or known.l_detector, None
    else:
        source, chosen_v, chosen_l, calibration = "", v, low, None
    if chosen_v is None or chosen_l is None:
        calibration = calibrate(lvlm, [sample], remote=remote)
        chosen_v = chosen_v or calibration.v_detector
        chosen_l = chosen_l or calibration.l_detector
        found = {
            name: "none found" if tower.tau is None else f"confidence {tower.confidence:.2f}"
            for name, tower in (("V", calibration.vision), ("L", calibration.language))
        }
        source = f"calibrated on {what} (V: {found['V']}, L: {found['L']})"
    if v is not None and low is not None:
        source = "given"
    return check_detector(chosen_v), check_detector(chosen_l), source, calibration


@dataclass(frozen=True, eq=False)
class Probes:
    """The probes of a trace and what they brought back."""

    v: Any
    low: Any
    vit_massive: MassiveActivations
    vit_halves: Mapping[str, MassiveActivations]
    vit_norms: TokenNorms
    llm_massive: MassiveActivations
    llm_halves: Mapping[str, MassiveActivations]
    llm_norms: TokenNorms
    received: ReceivedAttention
    writes: HeadWrites

    def all(self) -> list[Probe]:
        """Every probe once."""
        single = [self.v, self.low, self.vit_massive, self.vit_norms, self.llm_massive]
        rest = [self.llm_norms, self.received, self.writes]
        return [*single, *rest, *self.vit_halves.values(), *self.llm_halves.values()]


def make_probes(lvlm: LVLM, v: Detector, low: Detector) -> Probes:
    """Everything a trace measures, in one forward pass."""
    a = lvlm.anatomy
    halves = ("attn_out", "mlp_out")
    many = min(16, a.vision.d_model, a.language.d_model)
    return Probes(
        v=v.probe("vision", None, a.vision),
        low=low.probe("language", None, a.language),
        vit_massive=MassiveActivations(None, "vision", 4, STATE_SITE["vision"]),
        vit_halves={site: MassiveActivations(None, "vision", many, site) for site in halves},
        vit_norms=TokenNorms(None, "vision", STATE_SITE["vision"]),
        llm_massive=MassiveActivations(None, "language", 4, STATE_SITE["language"]),
        llm_halves={site: MassiveActivations(None, "language", many, site) for site in halves},
        llm_norms=TokenNorms([0], "language", STATE_SITE["language"]),
        received=ReceivedAttention(),
        writes=HeadWrites(),
    )


def trace_sinks(
    lvlm: LVLM,
    sample: Sample,
    v_detector: Detector | None = None,
    l_detector: Detector | None = None,
    *,
    merge: str = "max",
    draw: float = 3.0,
    remote: bool | str | None = None,
) -> SinkTrace:
    """Trace the sinks of a sample from the ViT through the projector into the LLM.

    Args:
        lvlm: The model.
        sample: From ``lvlm.prepare``.
        v_detector: The rule for V-sinks, applied to the states that feed the projector; None for
            published constants of this model, else a calibration on this very sample.
        l_detector: The rule for L-sinks, applied to what each LLM layer reads; None likewise.
        merge: How scores of several ViT tokens join where they become one LLM token: ``"max"``,
            ``"mean"`` or ``"any"``.
        draw: How many times its null a token must receive in some head to count as drawing
            attention.
        remote: See `LVLM.run`.

    Returns:
        The trace.

    Raises:
        DetectorError: If a detector cannot work on this model.
        SelectionError: If ``merge`` is unknown.
    """
    v, low, chosen, calibration = choose_detectors(lvlm, sample, v_detector, l_detector, remote)
    probes = make_probes(lvlm, v, low)
    run = lvlm.run(sample, probes.all(), logits="last", remote=remote)
    v_detection = decided(v, run, probes.v, lvlm, sample)
    l_detection = decided(low, run, probes.low, lvlm, sample)
    feeds = [v_detection.layers.index(layer) for layer in lvlm.anatomy.feed_layers]
    v_sinks = carry(sample, v_detection, feeds, merge)
    from sinkscope.experiments.evidence import collect_records

    received = run[probes.received]
    records = collect_records(lvlm, sample, run, probes, v_detection, l_detection, v_sinks, draw)
    return SinkTrace(
        sample=sample,
        v_detection=v_detection,
        l_detection=l_detection,
        v_sinks=v_sinks,
        records=records,
        received=received.received,
        null=received.null,
        vit_spikes=spike_sizes(run, probes.vit_massive),
        llm_spikes=spike_sizes(run, probes.llm_massive),
        chosen=chosen,
        calibration=calibration,
        warnings=_warnings(v_detection, l_detection, lvlm, feeds),
    )


def carry(sample: Sample, detection: Detection, feeds: list[int], merge: str) -> Tensor:
    """V-sinks at their LLM positions: the rule on every state that feeds the projector.

    With ``merge="mean"`` the mean score of the merged ViT tokens must pass the threshold; else one
    flagged token suffices.
    """
    tokens = sample.tokens
    flagged = torch.zeros_like(tokens.live)
    for feed in feeds:
        if merge == "mean":
            score = tokens.from_vision(detection.scores[:, feed].nan_to_num(), "mean")
            limit = detection.threshold[:, feed][tokens.image_index.clamp(min=0)]
            flagged |= score.nan_to_num() >= limit
        else:
            flags = detection.mask[:, feed].float()
            flagged |= tokens.from_vision(flags, merge).nan_to_num() > 0
    return flagged & (tokens.image >= 0)


def spike_sizes(run: Run, probe: MassiveActivations) -> Tensor:
    """Largest ``|h|`` over the median, ``[batch layer]``."""
    return run[probe].ratio().nan_to_num().amax(dim=2)


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

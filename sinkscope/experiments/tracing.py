"""trace_sinks: which tokens are sinks, of which kind, since which layer, and what they do."""

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from sinkscope.checks import check_choice, check_number, is_whole, typed
from sinkscope.detectors import Calibration, Detection, Detector, SinkRules, known_for
from sinkscope.detectors.gap import DRAWS
from sinkscope.errors import CheckpointError, DetectorError, SelectionError
from sinkscope.experiments.candidates import Candidate, candidates_of, outcome
from sinkscope.experiments.measuring import Measured, SinkRecord, carry, placed
from sinkscope.files import write_whole
from sinkscope.models import LVLM, Sample
from sinkscope.probes import EvidenceResult
from sinkscope.results import Result
from sinkscope.sites import Tower
from sinkscope.tokens import check_merge
from sinkscope.viz.layers import plot_trace
from sinkscope.viz.tables import trace_html, trace_summary


@dataclass(frozen=True, eq=False)
class SinkTrace(Result):
    """The sinks of one sample.

    V-sinks are decided on the states that feed the projector. L-sinks are visual tokens that meet the L rule
    on what a layer's attention reads and are no V-sinks. Text sinks are listed with them.

    Attributes:
        v_detection: What the V rule of ``rules`` flags in the vision tower, in every block.
        l_detection: What the L rule flags in the LLM, in every layer (all tokens).
        attended: Image tokens to which the vision tower attends throughout and that are no V-sinks: attention
            without a spike. They are at their LLM positions, as ``v_sinks``.
        records: One `SinkRecord` per sink, and per token of ``attended`` that is no L-sink.
        feeds: Vision blocks whose output feeds the projector, ascending: where the V rule counts.
        vision: Spikes and attention of every ViT token; ``language``: of every token of the prompt.
        draws: The least attention beyond uniform at which a token counts as attended.
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
        """Attention received in the LLM (Gu et al. 2410.10781); see `ReceivedAttention`. ProbeError with
        ``detail="sinks"``, which has it of few keys: see `ReceivedSummary`."""
        return self.language.received.received

    @property
    def null(self) -> Float[Tensor, "batch layer key"] | None:
        """Attention received under uniform attention."""
        return self.language.received.null

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
        return (*candidates_of(self, "vision"), *candidates_of(self, "language"))

    @cached_property
    def outcomes(self) -> dict[Tower, str]:
        """For a tower in which nothing is flagged: what spikes, what draws, in one sentence."""
        found: dict[Tower, Tensor] = {"vision": self.v_sinks, "language": self.l_detection.mask}
        return {tower: outcome(self, tower) for tower, mask in found.items() if not mask.any()}

    def outcomes_of(self, row: int) -> dict[Tower, str]:
        """The `outcomes` of one row of the batch; positions count from its first token."""
        images = (self.sample.tokens.vision.batch_row == row).nonzero().flatten().tolist()
        found: Any = {"vision": (self.v_sinks, images), "language": (self.l_detection.mask, [row])}
        left = {tower: rows for tower, (mask, rows) in found.items() if not mask[row].any()}
        return {tower: outcome(self, tower, rows) for tower, rows in left.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the model or the sample could not be looked at, and what follows."""
        tokens, notes = self.sample.tokens, []
        if why := tokens.unmapped or ("" if self.feeds else "no token is known to show an image"):
            notes.append(f"{why}: no token of the LLM is known to be a V-sink.")
        for tower, seen in (("vision tower", self.vision), ("LLM", self.language)):
            null: Any = seen.received.null  # as large as one head, and NaN where nothing is read
            unread = null.isnan().all(dim=2).all(dim=0)
            if blocks := unread.nonzero().flatten().tolist():
                notes.append(
                    f"Blocks {blocks} of the {tower} have no attention that is read: its numbers are NaN."
                )
        return tuple(notes)

    @property
    def n_layers(self) -> int:
        """Layers of the LLM."""
        return len(self.l_detection.layers)

    def _meeting(self, tokens: Tensor, layer: int | None, rule: bool = True) -> Tensor:
        """Those of ``tokens`` ``[batch pos]`` that meet the L rule, or do not."""
        meets = self.l_detection.mask == rule
        if layer is None:
            return tokens[:, None] & meets
        if is_whole(layer, 0, self.n_layers - 1):
            return tokens & meets[:, layer]
        wanted = f"0 to {self.n_layers - 1}: l_sinks(l) is decided on what block l reads"
        raise SelectionError(f"Got layer {layer!r}; expected {wanted}.")

    @typed
    def l_sinks(self, layer: int | None = None) -> Tensor:
        """L-sinks on what ``layer`` reads, ``[batch pos]``; None: of every layer, ``[batch layer pos]``."""
        return self._meeting((self.sample.tokens.image >= 0) & ~self.v_sinks, layer)

    def overlap(self, layer: int | None = None) -> Tensor:
        """V-sinks that also meet the L rule; shapes as in `l_sinks`."""
        return self._meeting(self.v_sinks, layer)

    def text_sinks(self, layer: int | None = None) -> Tensor:
        """Tokens outside the image that meet the L rule (BOS, delimiters); shapes as in `l_sinks`."""
        return self._meeting((self.sample.tokens.image < 0) & self.sample.tokens.live, layer)

    def ordinary(self, layer: int | None = None) -> Tensor:
        """Visual tokens that are neither V- nor L-sinks (None: at no layer) nor attended, ``[batch pos]``."""
        visual = (self.sample.tokens.image >= 0) & ~self.v_sinks & ~self.attended
        left = self._meeting(visual, layer, rule=False)
        return left if left.ndim == 2 else left.all(dim=1)

    @property
    def groups(self) -> dict[str, Tensor]:
        """A partition of all live tokens, ``[batch layer pos]``, for `AttentionMass`."""
        visual, live = self.sample.tokens.image >= 0, self.sample.tokens.live
        return {
            "V-sinks": self.v_sinks[:, None].expand(-1, self.n_layers, -1),
            "L-sinks": self.l_sinks(),
            "ordinary": self._meeting(visual & ~self.v_sinks, None, rule=False),
            "text sinks": self.text_sinks(),
            "text": self._meeting(live & ~visual, None, rule=False),
        }

    def overlap_table(self) -> pd.DataFrame:
        """Per layer: V-sinks, L-sinks, V-sinks that meet the L rule too, text sinks; summed over rows."""
        v, low, _, text, _ = self.groups.values()
        masks = {"V": v, "L": low, "V and L rule": self.overlap(), "text": text}
        table = {name: mask.sum(dim=(0, 2)).tolist() for name, mask in masks.items()}
        return pd.DataFrame({"layer": list(self.l_detection.layers), **table})

    def to_dataframe(self) -> pd.DataFrame:
        """One line per sink: the records."""
        lines = [record.to_dict() for record in self.records]
        return pd.DataFrame(lines, columns=list(SinkRecord.__dataclass_fields__))

    @typed
    def to_json(self, path: str | Path | None = None) -> str:
        """The trace as JSON; written to ``path`` too."""
        v, low = self.v_detection.detector, self.l_detection.detector
        rules = {"V": v, "L": low, "chosen": self.chosen}
        body: Any = {"detectors": rules, "outcomes": self.outcomes, "warnings": self.warnings}
        body |= {"overlap": self.overlap_table().to_dict(orient="list")}
        body |= {"sinks": [record.to_dict() for record in self.records]}
        body |= {"candidates": [asdict(candidate) for candidate in self.candidates]}
        text = json.dumps(body, indent=2, default=str)
        if path is not None:
            try:
                write_whole(Path(path), text)
            except (OSError, ValueError) as error:  # the last: a name that no file can have
                what = f"Got path={str(path)[:200]!r}, which cannot be written ({error})"
                raise CheckpointError(f"{what}; expected the name of a file.") from error
        return text

    def summary(self) -> str:
        """The trace in a few lines, for a terminal."""
        return trace_summary(self)

    def _repr_html_(self) -> str:
        return trace_html(self)

    def plot(self, row: int = 0) -> Figure:
        """Sinks of a row over the image, attention by layer and kind, and spike sizes in both towers."""
        return plot_trace(self, row)

    def __repr__(self) -> str:
        kinds, attended = [record.kind for record in self.records], "attended without a spike"
        words = {"V": "V-sinks", "L": "L-sinks", "text": "text sinks", "attention": attended}
        said = ", ".join(f"{kinds.count(kind)} {noun}" for kind, noun in words.items())
        return f"SinkTrace({said}; {self.chosen})"


@typed
def trace_sinks(
    lvlm: LVLM,
    sample: Sample,
    v_detector: Detector | None = None,
    l_detector: Detector | None = None,
    *,
    calibration: Calibration | None = None,
    merge: str = "max",
    draws: float = DRAWS,
    detail: Literal["sinks", "full"] | None = None,
    remote: bool | str | None = None,
    job: str | None = None,
) -> SinkTrace:
    """Trace the sinks of a sample from the ViT through the projector into the LLM, in one pass.

    DetectorError if a detector cannot work on this model, or ``draws`` is no share.

    Args:
        lvlm: The model.
        sample: From ``lvlm.prepare``; ``remote`` and ``job`` are as in `LVLM.run`.
        v_detector: The rule for V-sinks, applied to the states that feed the projector. None: published
            constants of this very checkpoint, else the gap rule on this sample (`detectors.Gap`), else
            the generic definition of massive activations; ``trace.chosen`` says which.
        l_detector: The rule for L-sinks, applied to what each LLM layer reads; None likewise.
        calibration: Of `calibrate` on other images; its rules come after given and published ones.
        merge: How scores of several ViT tokens join where they become one LLM token: ``"max"``,
            ``"mean"`` (the mean passes, and the rule flags one of them) or ``"any"``.
        draws: What some head must give a token beyond uniform attention, counting other tokens'
            queries only, for it to count as attended: a share between 0 and 1.
        detail: ``"full"`` keeps what every key receives by head, ``trace.received`` among it, and the 16
            largest channels in every layer. ``"sinks"`` reduces them in the pass, so that under 1 MB comes
            back of a 7B model: by head of the 16 tokens that draw most, numbers over heads of the others.
            Sinks, records, candidates and what is printed are the same. None is ``"full"`` here and
            ``"sinks"`` on remote runs.
    """
    check_merge(merge)
    check_number(above=0, below=1, error=DetectorError, hint=f"Write {DRAWS}.", draws=draws)
    given = (v_detector, l_detector)
    if calibration is None:
        rules = SinkRules.on_sample(lvlm, sample, *given, draws)
    else:
        rules = SinkRules.on_others(lvlm, lambda: (), *given, calibration=calibration)
    check_choice(("sinks", "full", None), error=DetectorError, detail=detail)
    full = detail == "full" if detail else not lvlm._places.choose(remote)
    m = Measured(lvlm, sample, rules, draws, full, {"remote": remote, "job": job})
    v_sinks = carry(sample, m.v, m.feeds, merge)
    attended = (placed(sample, m.attended.float()) > 0) & ~v_sinks
    # What concerns the decision: the feeding blocks, and every LLM layer.
    saturated, known = bool((m.v.fraction[:, m.feeds] > 0.2).any()), known_for(lvlm)
    warnings = (*(m.v.warnings if saturated else ()), *m.low.warnings)
    if known is not None and not known.default:
        text = f"Channels {known.l_dims} were reported for {known.name} ({known.source}); they are not "
        warnings = (*warnings, text + "used unasked.")
    found = v_sinks, attended, m.records(v_sinks, attended), m.feeds
    return SinkTrace(sample, rules, m.v, m.low, *found, m.vision, m.language, draws, warnings)

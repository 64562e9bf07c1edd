"""trace_sinks: which tokens are sinks, of which kind, since which layer, and what they do."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from sinkscope.checks import check_choice, check_number, is_whole, typed
from sinkscope.detectors import Calibration, Detection, Detector, Gap, NoSinks, SinkRules, known_for
from sinkscope.detectors.gap import DRAWS, outcome_of
from sinkscope.errors import CheckpointError, DetectorError, SelectionError
from sinkscope.experiments.measuring import Candidate, Measured, SinkRecord, carry, named, placed
from sinkscope.files import write_whole
from sinkscope.models import LVLM, Sample
from sinkscope.probes import EvidenceResult
from sinkscope.results import Result, in_rows
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
        return (*self._candidates("vision"), *self._candidates("language"))

    @cached_property
    def outcomes(self) -> dict[Tower, str]:
        """For a tower in which nothing is flagged: what spikes, what draws, in one sentence."""
        found: dict[Tower, Tensor] = {"vision": self.v_sinks, "language": self.l_detection.mask}
        return {tower: self._outcome(tower) for tower, mask in found.items() if not mask.any()}

    def outcomes_of(self, row: int) -> dict[Tower, str]:
        """The `outcomes` of one row of the batch; positions count from its first token."""
        images = (self.sample.tokens.vision.batch_row == row).nonzero().flatten().tolist()
        found: Any = {"vision": (self.v_sinks, images), "language": (self.l_detection.mask, [row])}
        left = {tower: rows for tower, (mask, rows) in found.items() if not mask[row].any()}
        return {tower: self._outcome(tower, rows) for tower, rows in left.items()}

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

    def _outcome(self, tower: Tower, rows: Sequence[int] | None = None) -> str:
        rule, seen, found, layers = self._judged(tower)
        places = range(len(found.mask)) if rows is None else rows
        if len(places) < len(found.mask):
            seen, found = in_rows(seen, places), in_rows(found, places)
        if tower == "vision" and (self.sample.tokens.unmapped or not layers):
            many = int(found.mask[:, layers].any(dim=1).sum())
            told = (
                f"; the rule flags {many} ViT tokens, whose places in the LLM are unknown"
                * bool(many)
            )
            return self.notes[0].partition(": ")[0] + told
        if isinstance(rule, NoSinks):
            return rule.reason
        rule = rule if isinstance(rule, Gap) else Gap(draws=self.draws)
        whose = " of image" if tower == "vision" else " of row"

        def called(_: int, at: int, pos: int) -> str:
            row, name = places[at], named(self, tower, places[at], pos)
            if rows is not None and tower == "language":  # the padding of other rows does not count
                first = int(self.sample.tokens.live[row].int().argmax())
                name = f"{pos - first}{name.removeprefix(str(pos))}"
            return name + f"{whose} {row}" * (len(places) > 1)

        return outcome_of(rule, [seen.at(layers)], tower, called)

    def _judged(self, tower: Tower) -> tuple[Any, EvidenceResult, Detection, list[int]]:
        """The rule of a tower, what was measured there, what is flagged, and the layers where it counts."""
        if tower == "vision":
            return self.rules.v, self.vision, self.v_detection, [*self.feeds]
        return self.rules.l_rule, self.language, self.l_detection, [*self.l_detection.layers]

    def _candidates(self, tower: Tower) -> Iterator[Candidate]:
        """Three tokens per row for their attention and three for their spike, the most attended first."""
        _, evidence, detection, layers = self._judged(tower)
        if not layers:
            return
        tokens, head = self.sample.tokens, evidence.by_key.head
        live = tokens.vision.live if tower == "vision" else tokens.live
        large = evidence.prominence()[:, layers].nan_to_num(-1.0)
        known = evidence.drawn()
        attention = known.nan_to_num(-2.0).amax(dim=1)
        for row, drawing in enumerate(attention):
            few, size = min(3, len(drawing)), large[row].amax(dim=0)
            most = [*drawing.topk(few).indices.tolist(), *size.topk(few).indices.tolist()]
            best = dict.fromkeys(pos for pos in most if bool(live[row, pos]))
            for pos in sorted(best, key=lambda pos, drawing=drawing: -float(drawing[pos])):
                times, given = large[row, :, pos], known[row, :, pos]
                layer, at, drawn = layers[int(times.argmax())], None, float("nan")
                if not bool(given.isnan().all()):
                    most = int(given.nan_to_num(-2.0).argmax())
                    at, drawn = (most, int(head[row, most, pos])), float(given[most])
                flagged = bool(detection.mask[row, layers, pos].any())
                reason = "flagged" if flagged else self._why_not(tower, row, pos)
                where = tower, row, pos, named(self, tower, row, pos)
                spike = float(evidence.medians()[row, layer, pos]), float(times.max()), layer
                yield Candidate(*where, *spike, drawn, at, flagged, reason)

    def _why_not(self, tower: Tower, row: int, pos: int) -> str:
        """Why the rule of a tower flags a token in no layer."""
        rule, evidence, detection, layers = self._judged(tower)
        if isinstance(rule, NoSinks):
            return "there is no rule for this tower"
        if not isinstance(rule, Gap):
            scores, limits = detection.scores[row, :, pos], detection.threshold[row]
            layer = int((scores / limits).nan_to_num(-1.0).argmax())
            return f"score {scores[layer]:.3g} of {limits[layer]:.3g} (layer {layer})"
        if not bool(evidence.judged[row, pos]):
            return "no patch: a kind of its own, listed apart"
        at = (row, layers, pos)
        times, known = evidence.prominence()[at].nan_to_num(-1.0), evidence.drawn()[at]
        large = (times >= rule.gap) & (evidence.medians()[at] >= rule.medians)
        draws = bool(rule.draws_in(evidence)[at].any())
        if not bool(large.any()):
            said = f"no spike: {float(times.max()):.1f} of {rule.gap:g} upper quartiles"
            return said if draws else f"{said}; draws nothing"
        if not bool((large & (evidence.growth()[at] >= rule.growth)).any()):
            return "its spike came with the embeddings"
        if draws:
            return "spikes and draws attention, but never in the same layer"
        if bool(known.isnan().all()):
            return "spikes; fewer than 8 tokens see it"
        return f"spikes and draws nothing: {float(known.nan_to_num(-1.0).max()):.3f} beyond uniform"

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
) -> SinkTrace:
    """Trace the sinks of a sample from the ViT through the projector into the LLM, in one pass.

    DetectorError if a detector cannot work on this model, or ``draws`` is no share.

    Args:
        lvlm: The model.
        sample: From ``lvlm.prepare``; ``remote`` is as in `LVLM.run`.
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
    m = Measured(lvlm, sample, rules, draws, remote, full)
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

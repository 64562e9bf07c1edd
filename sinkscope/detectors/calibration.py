"""Calibration: thresholds and sink channels of one model, from what spikes and draws in samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.anatomy.towers import TowerAnatomy
from sinkscope.checks import is_whole
from sinkscope.detectors.detection import Detector, expected_peak
from sinkscope.detectors.gap import DRAWS, MEDIANS, Gap, Limits, one_number, outcome_of
from sinkscope.detectors.rules import STATE_SITE, NoSinks
from sinkscope.errors import CalibrationError
from sinkscope.models.inputs import Sample
from sinkscope.models.lvlm import LVLM
from sinkscope.probes import ChannelValues, EvidenceResult, SinkEvidence, TokenNorms
from sinkscope.results import Record, Result

TOWERS = ("vision", "language")
DISTINCT = 1.5  # the least gap at which a score separates
MISSED = 0.05  # share of the sinks that may fall below a limit, or be joined by other tokens
CANDIDATES = 8  # channels that are looked at
Looks = dict[Any, "_Look"]  # by tower


@dataclass(frozen=True)
class TowerCalibration(Record):
    """What was found in one tower.

    Attributes:
        detector: The rule, `NoSinks` if none was found; ``reason`` says why.
        score: The score that separates best.
        dims: Sink channels, strongest first, if the score is ``"channels"``.
        tau: The threshold, if one number serves all layers; else None (see ``detector.limits``).
        lowest_sink: The score that 95 % of the sinks reach, in the layer with the narrowest gap.
        highest_other: The score that (nearly) no other token reaches there.
        confidence: ``1 - highest_other / lowest_sink`` there, in [0, 1].
        instances: How many (sample, layer, token) instances spiked and drew.
        layers: Layers in which the score separates them.
        gaps: Score -> narrowest gap over the layers with sinks; below 1.5 it does not separate there.
    """

    tower: str
    detector: Detector
    score: str | None = None
    dims: tuple[int, ...] = ()
    tau: float | None = None
    lowest_sink: float = float("nan")
    highest_other: float = float("nan")
    confidence: float = 0.0
    instances: int = 0
    layers: tuple[int, ...] = ()
    gaps: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def found(self) -> bool:
        """Whether there is a rule."""
        return self.score is not None


@dataclass(frozen=True)
class Calibration(Result):
    """Detectors for one model: ``vision`` is what was found in the ViT, on the states that feed the
    projector, and ``language`` in the decoder, on what its attention reads.
    """

    vision: TowerCalibration
    language: TowerCalibration
    n_samples: int

    @property
    def v_detector(self) -> Detector:
        """The rule for V-sinks."""
        return self.vision.detector

    @property
    def l_detector(self) -> Detector:
        """The rule for L-sinks."""
        return self.language.detector

    @property
    def confidence(self) -> float:
        """The lower of the two towers' confidences."""
        return min(self.vision.confidence, self.language.confidence)

    def to_dataframe(self) -> pd.DataFrame:
        """One line per tower."""
        return pd.DataFrame([vars(self.vision), vars(self.language)]).drop(columns="detector")

    def __repr__(self) -> str:
        return (
            f"Calibration(V {self.v_detector!s:.70}, L {self.l_detector!s:.70}; {self.n_samples} "
            f"samples, confidence {self.confidence:.2f})"
        )


@dataclass(frozen=True, eq=False)
class _Look:
    """One sample in one tower: its evidence, its sinks, and in a second pass the candidates' scores."""

    evidence: EvidenceResult
    sinks: Tensor  # [row layer pos]
    scores: Tensor | None = None  # [row layer pos channel]

    def peaks(self, order: list[int]) -> Tensor:
        """The largest score on some of the candidate channels, ``[row layer pos]``."""
        assert self.scores is not None
        return self.scores[..., order].amax(dim=-1)


def calibrate(
    lvlm: LVLM,
    samples: Sequence[Sample],
    *,
    draws: float = DRAWS,
    spike: float = MEDIANS,
    max_dims: int = 4,
    towers: Sequence[str] = ("vision", "language"),
    remote: bool | str | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Find this model's thresholds, and its sink channels where channels separate best.

    Two forward passes per sample, or one where no token is a sink.

    Args:
        samples: With different images, better of different kinds; six to eight are customary.
        draws: See `detectors.Gap`.
        spike: Least multiple of the layer's median ``|h|``, `Gap`'s ``medians``.
        max_dims: The most channels to keep per tower.
        towers: The towers to look at; another one has no rule then.
        remote: See `LVLM.run`.
        progress: Whether to show a progress bar; None shows it from four samples on.

    CalibrationError if there is no sample or no such tower, or ``max_dims`` is no positive number;
    DetectorError if another number is impossible.
    """
    if not isinstance(samples, Sequence) or not len(samples):
        what = "no samples" if isinstance(samples, Sequence) else f"a {type(samples).__name__}"
        raise CalibrationError(
            f"Got {what}; expected a list with at least one prepared sample. "
            "Write ss.calibrate(lvlm, [lvlm.prepare(images=a, text='...'), ...])."
        )
    if not is_whole(max_dims, 1):
        raise CalibrationError(f"Got max_dims={max_dims!r}; expected a whole number from 1 on.")
    if not towers or not set(towers) <= set(TOWERS):
        raise CalibrationError(
            f"Got towers={towers!r}; expected 'vision', 'language' or both. Write towers=['vision']."
        )
    rule = Gap(draws=draws, medians=spike)
    hidden = len(samples) < 4 if progress is None else not progress
    bar = tqdm(samples, desc="calibrating: spikes and attention", disable=hidden, leave=False)
    first = [_first_look(lvlm, sample, rule, towers, remote) for sample in bar]
    channels = {tower: _candidates([looks[tower] for looks in first]) for tower in first[0]}
    if any(channels.values()):
        bar = tqdm(samples, desc="calibrating: channels", disable=hidden, leave=False)
        both = zip(bar, first, strict=True)
        first = [_second_look(lvlm, sample, channels, looks, remote) for sample, looks in both]
    unseen = NoSinks("this tower was not looked at")
    found = {tower: TowerCalibration(tower, unseen, reason=unseen.reason) for tower in TOWERS}
    for tower in channels:
        looks = [looks[tower] for looks in first]
        found[tower] = _conclude(lvlm.anatomy.tower(tower), rule, channels[tower], looks, max_dims)
    return Calibration(**found, n_samples=len(samples))


def _judged_layers(lvlm: LVLM, tower: str) -> tuple[int, ...] | None:
    """V-sinks are judged where the projector reads; L-sinks everywhere."""
    return lvlm.anatomy.feed_layers if tower == "vision" else None


def _first_look(lvlm: LVLM, sample: Sample, rule: Gap, towers: Any, remote: Any) -> Looks:
    """Spikes and attention of each tower, and the tokens that have both."""
    probes = {tower: SinkEvidence(_judged_layers(lvlm, tower), tower) for tower in towers}
    run = lvlm.run(sample, list(probes.values()), logits="last", remote=remote)
    found = {tower: run[probe] for tower, probe in probes.items()}
    return {t: _Look(seen, rule.spikes_in(seen) & rule.also(seen)) for t, seen in found.items()}


def _candidates(looks: list[_Look]) -> list[int]:
    """The largest channels of the sinks, those that are largest in medians first."""
    best: dict[int, float] = {}
    for look in looks:
        massive = look.evidence.massive
        sizes = (massive.values.abs() / massive.median[..., None, None])[look.sinks].flatten()
        at = massive.channels[look.sinks].flatten().tolist()
        for channel, size in zip(at, sizes.tolist(), strict=True):
            best[channel] = max(best.get(channel, 0.0), size)
    return sorted(best, key=lambda channel: -best[channel])[:CANDIDATES]


def _second_look(lvlm: LVLM, sample: Sample, channels: Any, looks: Looks, remote: Any) -> Looks:
    """RMS scores of the candidate channels at every token, in both towers."""
    probes = {}
    for tower in filter(channels.get, channels):
        site, layers = STATE_SITE[tower], _judged_layers(lvlm, tower)
        values = ChannelValues(channels[tower], layers, tower, (site,))
        probes[tower] = values, TokenNorms(layers, tower, site)
    every = [probe for pair in probes.values() for probe in pair]
    run, out = lvlm.run(sample, every, logits="last", remote=remote), dict(looks)
    for tower, (values, norms) in probes.items():
        scale = lvlm.anatomy.tower(tower).d_model ** 0.5
        scores = run[values].values[:, :, 0].abs() * scale / run[norms].norms[..., None]
        out[tower] = replace(looks[tower], scores=scores)
    return out


@dataclass(frozen=True)
class _Separation:
    """How one score separates sinks from others in every layer that has sinks."""

    low: dict[int, float]
    high: dict[int, float]
    elsewhere: float  # the highest score in layers without sinks
    gaps: dict[int, float]

    @property
    def clear(self) -> tuple[int, ...]:
        return tuple(layer for layer, gap in self.gaps.items() if gap >= DISTINCT)

    @property
    def quality(self) -> tuple[int, float]:
        """Layers that are separated, then the narrowest gap among them."""
        return len(self.clear), min((self.gaps[layer] for layer in self.clear), default=0.0)


def separation(looks: list[_Look], scores: list[Tensor], floor: float) -> _Separation:
    """Robust lowest score of the sinks and highest of the others, by layer.

    Scores are ``[row layer pos]`` of every sample; others are never taken for less than ``floor``.
    """
    low, high, elsewhere = {}, {}, floor
    both = list(zip(scores, looks, strict=True))
    for i, layer in enumerate(looks[0].evidence.layers):
        sinks = torch.cat([s[:, i][look.sinks[:, i]] for s, look in both])
        others = torch.cat([s[:, i][look.evidence.judged & ~look.sinks[:, i]] for s, look in both])
        allowed = int(MISSED * len(sinks))
        highest = max([floor, *others.sort(descending=True).values[allowed : allowed + 1].tolist()])
        if len(sinks):
            low[layer], high[layer] = float(sinks.sort().values[allowed]), highest
        else:
            elsewhere = max(elsewhere, highest)
    gaps = {layer: low[layer] / max(high[layer], 1e-30) for layer in low}
    return _Separation(low, high, elsewhere, gaps)


def _conclude(
    anatomy: TowerAnatomy, rule: Gap, channels: list[int], looks: list[_Look], max_dims: int
) -> TowerCalibration:
    """The score that separates best, with its limits."""
    tower, evidence = anatomy.tower, [look.evidence for look in looks]
    if not (count := sum(int(look.sinks.sum()) for look in looks)):
        text = outcome_of(rule, evidence, tower)
        return TowerCalibration(tower, NoSinks(text), reason=text)
    order = _separating_channels(looks, max_dims)
    scores = {"channels": [look.peaks(order) for look in looks]} if order else {}
    scores["ratio"] = [seen.medians() for seen in evidence]
    scores["absolute"] = [seen.massive.values[..., 0].abs() for seen in evidence]
    floors = {"channels": expected_peak(max(1, len(order)))}
    found = {one: separation(looks, s, floors.get(one, 0.0)) for one, s in scores.items()}
    gaps = {score: min(one.gaps.values()) for score, one in found.items()}
    score = max(found, key=lambda one: found[one].quality)
    best = found[score]
    if not best.clear:
        listed = ", ".join(f"{one} by {gap:.2f}" for one, gap in gaps.items())
        text = (
            f"{count} instances spike and draw attention, but no score separates them from the other "
            f"tokens by a factor of {DISTINCT}: {listed}"
        )
        return TowerCalibration(tower, NoSinks(text), instances=count, gaps=gaps, reason=text)
    dims = tuple(channels[i] for i in order) if score == "channels" else ()
    at = min(best.clear, key=lambda layer: best.gaps[layer])
    detector, tau = _rule(score, dims, best, anatomy.n_layers)
    low, high = best.low[at], best.high[at]
    reason = (
        f"{count} instances spike and draw attention; {score} separate them in {len(best.clear)} of "
        f"{len(best.low)} layers, by a factor of {low / high:.2f} in the narrowest (layer {at}): the "
        f"lowest scores {low:.2f}, the highest other token {high:.2f}"
    )
    measured = (score, dims, tau, low, high, max(0.0, 1 - high / low))
    return TowerCalibration(tower, detector, *measured, count, best.clear, gaps, reason)


def _separating_channels(looks: list[_Look], most: int) -> list[int]:
    """Candidates that separate by themselves, best first, as many as still do so together."""
    if looks[0].scores is None:
        return []

    def separated(order: list[int]) -> _Separation:
        peaks = [look.peaks(order) for look in looks]
        return separation(looks, peaks, expected_peak(len(order)))

    alone = {i: separated([i]) for i in range(looks[0].scores.shape[-1])}
    kept = sorted(alone, key=lambda i: alone[i].quality, reverse=True)[:most]
    kept = [i for i in kept if alone[i].clear]
    while len(kept) > 1 and len(separated(kept).clear) < len(alone[kept[0]].clear):
        kept.pop()
    return kept


def _rule(
    score: str, dims: tuple[int, ...], best: _Separation, n_layers: int
) -> tuple[Detector, float | None]:
    """One threshold if it serves every layer, else one per layer."""
    low = min(best.low[layer] for layer in best.clear)
    high = max(*best.high.values(), best.elsewhere)
    tau = (low * high) ** 0.5
    if low >= DISTINCT * high:
        return one_number(score, dims, tau), tau
    means = {layer: (best.low[layer] * best.high[layer]) ** 0.5 for layer in best.clear}
    limits = tuple(means.get(layer, float("inf")) for layer in range(n_layers))
    return Limits(score, limits, dims), None

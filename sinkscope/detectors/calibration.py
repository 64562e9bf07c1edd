"""Calibration: thresholds and sink channels of one model, from what spikes and draws in samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.anatomy.towers import TowerAnatomy
from sinkscope.checks import among, is_whole, typed
from sinkscope.detectors.detection import Detector, expected_peak, unseen
from sinkscope.detectors.gap import DRAWS, MEDIANS, Gap, Limits, one_number, outcome_of
from sinkscope.detectors.rules import STATE_SITE, NoSinks
from sinkscope.errors import CalibrationError
from sinkscope.models.inputs import Sample
from sinkscope.models.lvlm import LVLM, Run
from sinkscope.probes import ChannelValues, EvidenceResult, SinkEvidence, TokenNorms
from sinkscope.results import Record, Result

TOWERS = ("vision", "language")
DISTINCT = 1.5  # the least gap at which a score separates
MISSED = 0.05  # share of the sinks that may fall below a limit, or be joined by other tokens
CANDIDATES = 8  # channels that are looked at


@dataclass(frozen=True)
class TowerCalibration(Record):
    """What was found in one tower; ``reason`` says it in words.

    ``score`` separates best: with the sink channels ``dims``, strongest first, if it is ``"channels"``, and
    with one threshold ``tau``, None if that differs by layer (see ``detector.limits``). In the layer with the
    narrowest gap 95 % of the sinks reach ``lowest_sink`` and (nearly) no other token ``highest_other``;
    ``confidence`` is ``1 - highest_other / lowest_sink``, in [0, 1], on the samples that the limits are from:
    other samples may be worse, and from one instance it is one ratio of two tokens. ``instances`` counts the
    (row, layer, token) that spiked and drew; ``layers`` are those in which the score separates them.
    ``gaps`` is score -> narrowest gap over the layers with sinks; below 1.5 it does not separate there.
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
    projector, and ``language`` in the decoder, on what its attention reads. ``n_samples`` are the rows of the
    samples."""

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
        """The lower of the two towers' confidences; see `TowerCalibration` for what it does not say."""
        return min(self.vision.confidence, self.language.confidence)

    def to_dataframe(self) -> pd.DataFrame:
        """One line per tower."""
        return pd.DataFrame([vars(self.vision), vars(self.language)]).drop(columns="detector")

    def __repr__(self) -> str:
        least = min((self.vision, self.language), key=lambda tower: tower.confidence)
        return (
            f"Calibration(V {self.v_detector!s:.60}, L {self.l_detector!s:.60}; {self.n_samples} "
            f"samples, confidence {self.confidence:.2f} on them, from {instances(least.instances)})"
        )


def instances(count: int) -> str:
    """``1 instance``, ``7 instances``."""
    return f"{count} instance{'s' * (count != 1)}"


@dataclass(frozen=True, eq=False)
class _Look:
    """One sample in one tower: its evidence, its sinks, and in a second pass the candidates' scores."""

    evidence: EvidenceResult
    sinks: Tensor  # [row layer pos]
    scores: Any = None  # [row layer pos channel]

    def peaks(self, order: list[int]) -> Tensor:
        """The largest score on some of the candidate channels, ``[row layer pos]``."""
        return self.scores[..., order].amax(dim=-1)


@typed
def calibrate(
    lvlm: LVLM,
    samples: Sequence[Sample],
    *,
    draws: float = DRAWS,
    spike: float = MEDIANS,
    max_dims: int = 4,
    towers: Sequence[str] = TOWERS,
    remote: bool | str | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Find this model's thresholds, and its sink channels where channels separate best.

    Two forward passes per sample, or one where no token is a sink. ``samples`` have different images, better
    of different kinds; six to eight are customary. A sample may have several rows, which run together and
    count like samples of one row. Trace others: on these the rule finds what it was made of.
    ``draws`` is that of `detectors.Gap` and ``spike`` its ``medians``; ``max_dims`` are the most channels to
    keep per tower. A tower not in ``towers`` has no rule then. ``progress`` shows a bar of rows, None from
    four on; for ``remote`` see `LVLM.run`.

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
    if not isinstance(towers, Sequence) or not towers or not all(among(x, TOWERS) for x in towers):
        raise CalibrationError(
            f"Got towers={towers!r}; expected 'vision', 'language' or both. Write towers=['vision']."
        )
    rule, skipped = Gap(draws=draws, medians=spike), NoSinks("this tower was not looked at")
    hidden = sum(map(len, samples)) < 4 if progress is None else not progress
    found = {tower: TowerCalibration(tower, skipped, reason=skipped.reason) for tower in TOWERS}
    for anatomy in (lvlm.anatomy.vision, lvlm.anatomy.language):
        why = unseen(anatomy, samples) or (
            "" if anatomy.attending else "none of its blocks attends"
        )
        if why and anatomy.tower in towers:
            found[anatomy.tower] = TowerCalibration(anatomy.tower, NoSinks(why), reason=why)
            towers = [tower for tower in towers if tower != anatomy.tower]
    for tower, (looks, channels) in _look(lvlm, samples, rule, towers, remote, hidden).items():
        found[tower] = _conclude(lvlm.anatomy.tower(tower), rule, channels, looks, max_dims)
    return Calibration(**found, n_samples=sum(map(len, samples)))


def _look(
    lvlm: LVLM, samples: Sequence[Sample], rule: Gap, towers: Any, remote: Any, hidden: bool
) -> dict[str, tuple[list[_Look], list[int]]]:
    """By tower, what is seen in every sample, and the candidate channels. V-sinks are judged where the
    projector reads; L-sinks everywhere."""

    def passes(probes: Sequence[Any], what: str) -> Iterator[Run]:
        rows = sum(map(len, samples))
        with tqdm(total=rows, desc=f"calibrating: {what}", disable=hidden, leave=False) as bar:
            for sample in samples:
                some = [x for x in probes if x.tower != "vision" or len(sample.tokens.vision.live)]
                if some:  # there is something to see in this sample
                    yield lvlm.run(sample, some, logits="last", remote=remote)
                bar.update(len(sample))

    a = lvlm.anatomy
    layers = {"vision": a.reaching, "language": None}
    evidence = {tower: SinkEvidence(layers[tower], tower) for tower in towers}
    looks: dict[Any, list[_Look]] = {tower: [] for tower in towers}
    for run in passes([*evidence.values()], "spikes and attention"):
        for tower, seen in ((x.tower, run[x]) for x in run.results):
            looks[tower].append(_Look(seen, rule.spikes_in(seen) & rule.also(seen)))
    channels = {tower: _candidates(of) for tower, of in looks.items()}
    probes, scores = {}, {tower: [] for tower in towers}
    for tower in filter(channels.get, channels):
        values = ChannelValues(channels[tower], layers[tower], tower, (STATE_SITE[tower],))
        probes[tower] = values, TokenNorms(layers[tower], tower, STATE_SITE[tower])
    every = [probe for pair in probes.values() for probe in pair]
    for run in passes(every, "channels") if every else ():
        for tower, (values, norms) in probes.items():
            if norms in run.results:
                sizes = run[values].values[:, :, 0].abs() * a.tower(tower).d_model ** 0.5
                scores[tower].append(sizes / run[norms].norms[..., None])
    for tower in probes:
        both = zip(looks[tower], scores[tower], strict=True)
        looks[tower] = [replace(look, scores=score) for look, score in both]
    return {tower: (looks[tower], channels[tower]) for tower in looks}


def _candidates(looks: list[_Look]) -> list[int]:
    """The largest channels of the sinks, those that are largest in medians first."""
    best: dict[int, float] = {}
    for look in looks:
        massive = look.evidence.massive
        sizes = (massive.values.abs() / massive.median[..., None, None])[look.sinks].flatten()
        at = massive.channels[look.sinks].flatten()
        for channel, size in zip(at.tolist(), sizes.tolist(), strict=True):
            best[channel] = max(best.get(channel, 0.0), size)
    return sorted(best, key=lambda channel: -best[channel])[:CANDIDATES]


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
    """Robust lowest score of the sinks and highest of the others, by layer. Scores are ``[row layer pos]`` of
    every sample; others are never taken for less than ``floor``."""
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
            f"{instances(count)} with a spike and attention, but no score separates them from the other "
            f"tokens by a factor of {DISTINCT}: {listed}"
        )
        return TowerCalibration(tower, NoSinks(text), instances=count, gaps=gaps, reason=text)
    dims = tuple(channels[i] for i in order) if score == "channels" else ()
    at = min(best.clear, key=lambda layer: best.gaps[layer])
    detector, tau = _rule(score, dims, best, anatomy.n_layers)
    low, high = best.low[at], best.high[at]
    reason = (
        f"{instances(count)} with a spike and attention; {score} separate them in {len(best.clear)} of "
        f"{len(best.low)} layers, by a factor of {low / high:.2f} in the narrowest (layer {at}): the "
        f"lowest scores {low:.2f}, the highest other token {high:.2f}. These are the samples that the limits "
        "are from; check the rule on others"
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

"""Find a model's own sink dimensions and thresholds from a few samples, and say how sure that is.

A sink is a token that spikes *and* draws attention. Calibration therefore looks for channels that
separate the tokens which do both from all others, so that a spike without attention (a decoy) and
attention without a spike teach it nothing:

1. a token **draws** in a layer if some head gives it at least ``draw`` times its null, and it is
   among the tokens that draw there or in a later layer;
2. a token **spikes** in channel d of a layer if ``|h_d|`` is at least ``spike`` times the layer's
   median ``|h|``; in the decoder the channel must have doubled its RMS score since the embeddings,
   so that V-sinks, which arrive large in channels of their own, do not count;
3. channels are kept if the lowest score of instances that do both is at least ``distinct`` times
   the highest of all others (never taken below what an isotropic state shows), strongest first; tau
   is the geometric mean of the two; the confidence is how far they lie apart, 0 if they touch and
   towards 1 as the gap widens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.detectors.detection import expected_peak
from sinkscope.detectors.rules import STATE_SITE, Detector, NoSinks, SinkDimensions
from sinkscope.errors import CalibrationError
from sinkscope.probes import ChannelValues, MassiveActivations, ReceivedAttention, TokenNorms
from sinkscope.sites import Tower

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.prepare import Sample


@dataclass(frozen=True)
class TowerCalibration:
    """What was found in one tower.

    Attributes:
        tower: ``"language"`` or ``"vision"``.
        detector: The rule, `NoSinks` if no token both spikes and draws.
        dims: Sink channels, strongest first.
        tau: Threshold on the RMS score, or None.
        lowest_sink: The lowest score of a token that spikes and draws.
        highest_other: The highest score of any other token in the same layers.
        confidence: ``1 - highest_other / lowest_sink`` in [0, 1].
        instances: How many (sample, layer, token) instances spiked and drew.
        reason: One sentence.
    """

    tower: Tower
    detector: Detector
    dims: tuple[int, ...] = ()
    tau: float | None = None
    lowest_sink: float = float("nan")
    highest_other: float = float("nan")
    confidence: float = 0.0
    instances: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Calibration:
    """Detectors for one model, with the evidence.

    Attributes:
        vision: What was found in the ViT, on the states that feed the projector.
        language: What was found in the decoder, on what its attention reads.
        n_samples: How many samples were used.
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
        import pandas as pd

        columns = [f for f in TowerCalibration.__dataclass_fields__ if f != "detector"]
        return pd.DataFrame(
            [{c: getattr(t, c) for c in columns} for t in (self.vision, self.language)]
        )


@dataclass(frozen=True, eq=False)
class _Evidence:
    """One sample in one tower: RMS scores of candidate channels, and who draws."""

    scores: Tensor  # [row layer pos channel]
    sizes: Tensor  # [row layer pos channel]: |h| over the layer's median
    start: Tensor  # [row 1 pos channel]: the same in the tower's first state
    draws: Tensor  # [row layer pos]: draws in this layer or later
    live: Tensor  # [row pos]


@dataclass(frozen=True)
class _Rules:
    """The constants of the module docstring, the same for every model."""

    draw: float = 3.0
    spike: float = 20.0
    distinct: float = 1.5
    candidates: int = 8
    dims: int = 4


def calibrate(
    lvlm: LVLM,
    samples: Sequence[Sample],
    *,
    draw: float = 3.0,
    spike: float = 20.0,
    max_dims: int = 4,
    remote: bool | str | None = None,
    progress: bool | None = None,
) -> Calibration:
    """This model's sink dimensions and thresholds.

    Args:
        lvlm: The model.
        samples: A few samples with different images, better of different kinds; six to eight is
            customary.
        draw: How many times its null a token must receive in some head to count as drawing.
        spike: How many times the layer's median ``|h|`` a channel must show to count as a spike.
        max_dims: The most channels to keep per tower.
        remote: See `LVLM.run`.
        progress: Whether to show a progress bar; None shows it from four samples on.

    Returns:
        Detectors with the evidence they rest on.

    Raises:
        CalibrationError: If there is no sample.
    """
    if not isinstance(samples, Sequence) or len(samples) == 0:
        raise CalibrationError(
            f"Got {type(samples).__name__} of no samples; expected at least one prepared sample. "
            "Write ss.calibrate(lvlm, [lvlm.prepare(images=a, text='...'), ...])."
        )
    rules = _Rules(draw=draw, spike=spike, dims=max_dims)
    hidden = len(samples) < 4 if progress is None else not progress
    found = {}
    for tower in ("vision", "language"):
        bar = tqdm(samples, desc=f"calibrating {tower}", disable=hidden, leave=False)
        firsts = [_first_look(lvlm, sample, tower, remote) for sample in bar]
        channels = _candidates(firsts, rules)
        evidence = [
            _second_look(lvlm, sample, tower, channels, drawn, rules, remote)
            for sample, (_, drawn) in zip(samples, firsts, strict=True)
        ]
        found[tower] = _conclude(tower, channels, evidence, rules)
    return Calibration(found["vision"], found["language"], len(samples))


def _layers(lvlm: LVLM, tower: str) -> tuple[int, ...] | None:
    """V-sinks are judged where the projector reads; L-sinks everywhere."""
    return lvlm.anatomy.feed_layers if tower == "vision" else None


def _first_look(lvlm: LVLM, sample: Sample, tower: Any, remote: Any) -> tuple[Any, Tensor]:
    """The largest channels of every token, and how many times its null each receives."""
    massive = MassiveActivations(_layers(lvlm, tower), tower, 8, STATE_SITE[tower])
    received = ReceivedAttention(tower=tower)
    run = lvlm.run(sample, [massive, received], logits="last", remote=remote)
    return run[massive], run[received].over_null().amax(dim=2)


def _candidates(firsts: list, rules: _Rules) -> list[int]:
    """Channels that stand out in some token that draws somewhere."""
    votes: dict[int, float] = {}
    for massive, over in firsts:
        drawing = (over >= rules.draw).any(dim=1)[:, None, :, None]
        values = massive.values.abs() / massive.median[..., None, None]
        values = torch.where(drawing.expand_as(values), values, torch.zeros_like(values))
        for channel, value in zip(
            massive.channels.flatten().tolist(),
            values.nan_to_num().flatten().tolist(),
            strict=True,
        ):
            if channel >= 0 and value > 0:
                votes[channel] = max(votes.get(channel, 0.0), value)
    ranked = sorted(votes, key=lambda channel: -votes[channel])
    return ranked[: rules.candidates]


def _second_look(
    lvlm: LVLM,
    sample: Sample,
    tower: Any,
    channels: list[int],
    over: Tensor,
    rules: _Rules,
    remote: Any,
) -> _Evidence | None:
    """RMS scores of the candidate channels at every token."""
    if not channels:
        return None
    anatomy = lvlm.anatomy.tower(tower)
    site = STATE_SITE[tower]
    judged = anatomy.layers(_layers(lvlm, tower))
    values = ChannelValues(channels, judged, tower, (site,))
    norms = TokenNorms(judged, tower, site)
    first_values = ChannelValues(channels, [0], tower, ("resid_pre",))
    first_norms = TokenNorms([0], tower, "resid_pre")
    massive = MassiveActivations(judged, tower, 1, site)
    probes = [values, norms, massive, first_values, first_norms]
    run = lvlm.run(sample, probes, logits="last", remote=remote)
    scale = anatomy.d_model**0.5
    size = run[values].values[:, :, 0].abs()
    scores = size * scale / run[norms].norms[..., None]
    start = run[first_values].values[:, :, 0].abs() * scale / run[first_norms].norms[..., None]
    drawing = over.nan_to_num() >= rules.draw
    if tower == "vision":
        drawing = drawing.any(dim=1, keepdim=True).expand(-1, len(judged), -1)
    else:
        drawing = drawing.flip(1).cummax(dim=1).values.flip(1)
    live = ~run[norms].norms.isnan()[:, 0]
    return _Evidence(scores, size / run[massive].median[..., None, None], start, drawing, live)


def _spikes(evidence: _Evidence, rules: _Rules, tower: str) -> Tensor:
    """Which instances spike in which candidate channel, ``[row layer pos channel]``."""
    out = evidence.sizes >= rules.spike
    if tower == "language":
        out &= evidence.scores >= 2 * evidence.start
    return out & evidence.live[:, None, :, None]


def _conclude(
    tower: Any, channels: list[int], evidence: list[_Evidence | None], rules: _Rules
) -> TowerCalibration:
    """Channels that separate the tokens which spike and draw, and the threshold between."""
    seen = [e for e in evidence if e is not None]
    nothing = "no token both spikes and draws attention"
    if not seen:
        return TowerCalibration(tower, NoSinks(nothing), reason=nothing)
    kept: list[tuple[float, int]] = []
    for i in range(len(channels)):
        low, high, count = _separation(seen, [i], rules, tower)
        if count and low >= rules.distinct * high:
            kept.append((low / high, i))
    if not kept:
        return TowerCalibration(tower, NoSinks(nothing), reason=nothing)
    order = [i for _, i in sorted(kept, reverse=True)][: rules.dims]
    low, high, count = _separation(seen, order, rules, tower)
    while len(order) > 1 and low <= high:
        order.pop()
        low, high, count = _separation(seen, order, rules, tower)
    dims = tuple(channels[i] for i in order)
    tau = (low * high) ** 0.5
    confidence = max(0.0, 1 - high / low)
    reason = (
        f"{count} instances spike and draw; the lowest scores {low:.2f}, the highest other token "
        f"{high:.2f}"
    )
    detector = SinkDimensions(dims, tau, "rms")
    return TowerCalibration(tower, detector, dims, tau, low, high, confidence, count, reason)


def _separation(
    seen: list[_Evidence], order: list[int], rules: _Rules, tower: str
) -> tuple[float, float, int]:
    """Lowest score of spiking and drawing instances, highest of all others, and their number.

    The highest other score is never below what an isotropic state shows.
    """
    low, high, count = float("inf"), expected_peak(len(order)), 0
    for e in seen:
        peak = e.scores[..., order].amax(dim=-1)
        both = _spikes(e, rules, tower)[..., order].any(dim=-1) & e.draws
        others = ~both & e.live[:, None]
        if both.any():
            low = min(low, float(peak[both].min()))
            count += int(both.sum())
        if others.any():
            high = max(high, float(peak[others].max()))
    return low, high, count

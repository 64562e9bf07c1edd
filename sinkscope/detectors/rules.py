"""Detectors: published rules that turn scores into sink tokens.

Each is a frozen record with two methods: ``probe(tower, layers, tower_anatomy)`` says what to
measure and ``decide(result, ...)`` flags tokens. All can be used alone (``detect``) or inside
`sinkscope.trace_sinks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sinkscope.checks import is_number, is_whole
from sinkscope.detectors.detection import Detection, expected_peak, saturation_warning
from sinkscope.errors import DetectorError
from sinkscope.probes import (
    CosineToFirst,
    MassiveActivations,
    Probe,
    ReceivedAttention,
    SinkDimensionScores,
    TokenNorms,
)
from sinkscope.probes.evidence import SITES as STATE_SITE
from sinkscope.sites import Tower

if TYPE_CHECKING:
    from sinkscope.anatomy.towers import TowerAnatomy


@runtime_checkable
class Detector(Protocol):
    """Anything that flags tokens."""

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """What to measure; raises if the parameters cannot work on this tower."""
        ...

    def scores(self, result: Any) -> Tensor:
        """The scores ``[batch layer pos]`` of a result."""
        ...

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """The threshold of every row and layer, ``[batch layer]``."""
        ...

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """The score to expect without any sink."""
        ...


def decide(
    detector: Any,
    result: Any,
    visual: Tensor,
    live: Tensor,
    tower: Tower,
    anatomy: TowerAnatomy,
) -> Detection:
    """Flag tokens of a result.

    Args:
        detector: The detector whose probe made the result.
        result: The probe's result.
        visual: Bool ``[batch pos]`` image tokens.
        live: Bool ``[batch pos]``.
        tower: The tower.
        anatomy: Its anatomy.

    Returns:
        The detection, with a warning if it is saturated.
    """
    scores = detector.scores(result)
    limit = detector.thresholds(result, scores)
    strict = getattr(detector, "strict", False)
    above = scores > limit[..., None] if strict else scores >= limit[..., None]
    extra = getattr(detector, "also", None)
    if extra is not None:
        above = above & extra(result)
    detection = Detection(
        detector=repr(detector),
        tower=tower,
        layers=result.layers,
        mask=above & live[:, None],
        scores=scores,
        threshold=limit,
        null=detector.null(result, anatomy),
        visual=visual,
        strict=strict,
    )
    return saturation_warning(detection)


def check_strict(detector: Any) -> None:
    """Refuse a ``strict`` that is no bool.

    Raises:
        DetectorError: If so.
    """
    if not isinstance(detector.strict, bool):
        raise DetectorError(f"Got strict={detector.strict!r}; expected True or False.")


def constant(scores: Tensor, value: float) -> Tensor:
    """One threshold for every row and layer."""
    return torch.full(scores.shape[:2], float(value))


@dataclass(frozen=True)
class SinkDimensions:
    """Tokens whose sink-dimension value exceeds tau (Kang et al. 2503.03321; Choi et al. 2604.03316).

    Null: the expected score of an isotropic state (with RMS), or 0 (raw, which has no scale).

    Args:
        dims: Channel indices of this model.
        tau: Threshold. With RMS the score is at most sqrt(D): 20 suits LLaMA-2-7B (D = 4096), is
            known to flag 83-100 % of the image tokens of most recent LVLMs (2609.32808), and is
            refused where it cannot be reached.
        normalize: ``"rms"`` or ``"none"``.
        strict: Whether a score equal to tau is no sink. VAR's code is strict, LSG writes ``>=``.
    """

    dims: Sequence[int]
    tau: float
    normalize: str = "rms"
    strict: bool = True

    def __post_init__(self) -> None:
        dims = () if isinstance(self.dims, (str, Real)) else tuple(self.dims)
        if not dims or not all(is_whole(dim, 0) for dim in dims):
            raise DetectorError(f"Got dims={self.dims!r}; expected channels, such as [1415, 2533].")
        if not is_number(self.tau, above=0):
            raise DetectorError(f"Got tau={self.tau!r}; expected a positive threshold, such as 20.")
        if self.normalize not in ("rms", "none"):
            raise DetectorError(f"Got normalize={self.normalize!r}; expected 'rms' or 'none'.")
        check_strict(self)

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """Sink-dimension scores.

        Raises:
            DetectorError: If tau is above sqrt(D).
        """
        bound = anatomy.d_model**0.5
        if self.normalize == "rms" and self.tau >= bound:
            raise DetectorError(
                f"Got tau={self.tau} with RMS normalisation in the {tower} tower of width "
                f"{anatomy.d_model}; expected less than sqrt({anatomy.d_model}) = {bound:.1f}, the "
                "largest possible score. Published thresholds belong to wide models: run "
                "ss.calibrate(lvlm, samples) for this one."
            )
        return SinkDimensionScores(
            tuple(self.dims), layers, tower, self.normalize, STATE_SITE[tower]
        )

    def scores(self, result: Any) -> Tensor:
        """The probe's scores."""
        return result.scores

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """Tau everywhere."""
        return constant(scores, self.tau)

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """``E max of |dims| half-normals``."""
        return expected_peak(len(self.dims)) if self.normalize == "rms" else 0.0


@dataclass(frozen=True)
class Massive:
    """Massive activations: ``|h| > absolute`` and at least ``ratio`` layer medians (2402.17762).

    The score is ``max |h|``; the null is the peak-to-median ratio of an isotropic state times the
    layer's median.

    Args:
        absolute: Least magnitude.
        ratio: Least multiple of the median ``|h|`` of the layer.
    """

    absolute: float = 100.0
    ratio: float = 1000.0
    strict: bool = True

    def __post_init__(self) -> None:
        if not (is_number(self.absolute, 0) and is_number(self.ratio, 0)):
            raise DetectorError(
                f"Got absolute={self.absolute!r}, ratio={self.ratio!r}; expected two numbers from 0 on, "
                "such as absolute=100, ratio=1000."
            )
        check_strict(self)

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """The largest channel of every token."""
        return MassiveActivations(layers, tower, 1, STATE_SITE[tower])

    def scores(self, result: Any) -> Tensor:
        """``max |h|``."""
        return result.values[..., 0].abs()

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """The absolute limit; the ratio is checked beside it."""
        return constant(scores, self.absolute)

    def also(self, result: Any) -> Tensor:
        """Whether the ratio holds too."""
        return result.ratio() >= self.ratio

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """Peak over median of D half-normals, times the mean median."""
        return expected_peak(anatomy.d_model) / 0.6745 * float(result.median.nanmean())


@dataclass(frozen=True)
class Norm:
    """High-norm tokens, as in ViT registers (2309.16588) and DIYSink's CLIP rule (2510.08510).

    The score is the L2 norm; the null is the median norm.

    Args:
        tau: A number (100 for CLIP ViT-L in LLaVA-1.5, 150 for DINOv2), ``"valley"`` for the widest
            gap among the sorted log norms above the median, or ``"3sigma"`` for mean + 3 standard
            deviations of the row.
        gap: The least ratio across a valley; below it nothing is flagged.
    """

    tau: float | str = "valley"
    gap: float = 1.5
    strict: bool = False

    def __post_init__(self) -> None:
        if self.tau not in ("valley", "3sigma") and not is_number(self.tau, above=0):
            raise DetectorError(
                f"Got tau={self.tau!r}; expected a positive number, 'valley' or '3sigma'."
            )
        if not is_number(self.gap, least=1):
            raise DetectorError(f"Got gap={self.gap!r}; expected a ratio from 1 on, such as 1.5.")
        check_strict(self)

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """Token norms."""
        return TokenNorms(layers, tower, STATE_SITE[tower])

    def scores(self, result: Any) -> Tensor:
        """The norms."""
        return result.norms

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """A constant, or one per row and layer."""
        if not isinstance(self.tau, str):
            return constant(scores, self.tau)
        rule = self._valley if self.tau == "valley" else _three_sigma
        return torch.stack(
            [torch.stack([rule(line[~line.isnan()]) for line in row]) for row in scores]
        )

    def _valley(self, norms: Tensor) -> Tensor:
        """The middle, on the log scale, of the widest gap above the median."""
        upper = norms.log().sort().values[(len(norms) - 1) // 2 :]
        if len(upper) < 2:
            return torch.tensor(float("inf"))
        gaps = upper[1:] - upper[:-1]
        at = int(gaps.argmax())
        if gaps[at] < torch.tensor(self.gap).log():
            return torch.tensor(float("inf"))
        return ((upper[at] + upper[at + 1]) / 2).exp()

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """The median norm."""
        return float(result.norms.nanmedian())


def _three_sigma(norms: Tensor) -> Tensor:
    """Mean plus three standard deviations (2506.08010)."""
    return norms.mean() + 3 * norms.std()


@dataclass(frozen=True)
class Received:
    """Tokens that receive more than epsilon of the attention of the queries that see them.

    Gu et al. (2410.10781) use 0.3 per head. The score depends on the prompt's length: under uniform
    causal attention key 0 of T already receives about ln(T)/T. Null: the mean null of the layer.

    Args:
        eps: Least received attention, own query included, as published.
        times_null: Instead, a multiple of each token's own null (5 in ACT, 2406.15765), counting what
            other tokens give, where at least 8 of them see the token.
        heads: ``"max"`` over heads (some head sinks here) or ``"mean"``.
    """

    eps: float = 0.3
    times_null: float | None = None
    heads: str = "max"
    strict: bool = True

    def __post_init__(self) -> None:
        if self.heads not in ("max", "mean"):
            raise DetectorError(f"Got heads={self.heads!r}; expected 'max' or 'mean'.")
        if not is_number(self.eps, above=0, below=1):
            raise DetectorError(f"Got eps={self.eps!r}; expected a share between 0 and 1.")
        if self.times_null is not None and not is_number(self.times_null, above=0):
            raise DetectorError(
                f"Got times_null={self.times_null!r}; expected a positive multiple of uniform attention, "
                "such as 5."
            )
        check_strict(self)

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """Received attention."""
        return ReceivedAttention(layers, tower=tower, others=self.times_null is not None)

    def scores(self, result: Any) -> Tensor:
        """Received attention (or its multiple of the null), joined over heads."""
        got = result.received if self.times_null is None else result.times_null()
        return got.amax(dim=2) if self.heads == "max" else got.mean(dim=2)

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """Epsilon, or the multiple."""
        return constant(scores, self.eps if self.times_null is None else self.times_null)

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """The mean null, or 1 if scores are multiples of it."""
        return 1.0 if self.times_null is not None else float(result.null.nanmean())


@dataclass(frozen=True)
class CosineToBOS:
    """Tokens whose state points the way of the first token's (secondary sinks).

    The first token itself is always flagged. Null: ``E |cos|`` of random directions.

    Args:
        threshold: Least absolute cosine.
    """

    threshold: float = 0.9
    strict: bool = True

    def __post_init__(self) -> None:
        if not is_number(self.threshold, above=0, below=1):
            raise DetectorError(f"Got threshold={self.threshold!r}; expected between 0 and 1.")
        check_strict(self)

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """Cosine to the first token."""
        return CosineToFirst(layers, tower, STATE_SITE[tower])

    def scores(self, result: Any) -> Tensor:
        """The cosines."""
        return result.scores

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """The threshold everywhere."""
        return constant(scores, self.threshold)

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """``sqrt(2 / (pi D))``."""
        return (2 / (torch.pi * anatomy.d_model)) ** 0.5


@dataclass(frozen=True)
class NoSinks:
    """Flags nothing: what calibration returns for a tower in which it found no sink.

    Args:
        reason: Why.
    """

    reason: str = "no sink found"
    strict: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str):
            raise DetectorError(f"Got reason={self.reason!r}; expected text.")
        check_strict(self)

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """Token norms, only to have scores to show."""
        return TokenNorms(layers, tower, STATE_SITE[tower])

    def scores(self, result: Any) -> Tensor:
        """The norms."""
        return result.norms

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """Infinity."""
        return constant(scores, float("inf"))

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """The median norm."""
        return float(result.norms.nanmedian())

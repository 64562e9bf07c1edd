"""Published rules that turn scores into sink tokens, alone (`detect`) or in `sinkscope.trace_sinks`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sinkscope.checks import check_choice, check_number, is_whole
from sinkscope.detectors.detection import Detector as Detector
from sinkscope.detectors.detection import decide as decide
from sinkscope.detectors.detection import expected_peak
from sinkscope.errors import DetectorError
from sinkscope.kernels.gating import reaches
from sinkscope.probes import (
    CosineToFirst,
    MassiveActivations,
    Probe,
    ReceivedAttention,
    SinkDimensionScores,
    TokenNorms,
)
from sinkscope.probes.evidence import SITES as STATE_SITE
from sinkscope.results import Record
from sinkscope.sites import Tower

if TYPE_CHECKING:
    from sinkscope.anatomy.towers import TowerAnatomy


class Rule(Record):
    """The base of the detectors of this room: one field of a probe's result against one number.

    Attributes:
        score_field: The field of the result.
        limit_field: The field of the rule with the threshold.
    """

    score_field: ClassVar[str] = "scores"
    limit_field: ClassVar[str] = "tau"

    def __post_init__(self) -> None:
        strict = getattr(self, "strict", False)
        if not isinstance(strict, bool):
            raise DetectorError(f"Got strict={strict!r}; expected True or False.")

    def scores(self, result: Any) -> Tensor:
        """The scores ``[batch layer pos]`` of a result."""
        return getattr(result, self.score_field)

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """The threshold of every row and layer, ``[batch layer]``."""
        return torch.full(scores.shape[:2], self._limit())

    def _limit(self) -> float:
        """The one threshold."""
        return float(getattr(self, self.limit_field))

    def _plain(self) -> dict[str, Any] | None:
        """The rule as `sinkscope.kernels.gating` takes it; None if tokens are not judged alone."""
        return None


@dataclass(frozen=True)
class SinkDimensions(Rule):
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
        check_number(above=0, tau=self.tau, error=DetectorError)
        check_choice(("rms", "none"), normalize=self.normalize, error=DetectorError)
        super().__post_init__()

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
        site = STATE_SITE[tower]
        return SinkDimensionScores(tuple(self.dims), layers, tower, self.normalize, site)

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """``E max of |dims| half-normals``."""
        return expected_peak(len(self.dims)) if self.normalize == "rms" else 0.0

    def _plain(self) -> dict[str, Any]:
        rms, dims = self.normalize == "rms", [int(dim) for dim in self.dims]
        tau = float(self.tau)
        return {"how": "dims", "dims": dims, "tau": tau, "rms": rms, "strict": self.strict}


@dataclass(frozen=True)
class Massive(Rule):
    """Massive activations: ``|h| > absolute`` and at least ``ratio`` layer medians (2402.17762).

    The score is ``max |h|``; the null is the peak-to-median ratio of an isotropic state times the
    layer's median.

    Args:
        absolute: Least magnitude.
        ratio: Least multiple of the median ``|h|`` of the layer.
    """

    limit_field: ClassVar[str] = "absolute"
    absolute: float = 100.0
    ratio: float = 1000.0
    strict: bool = True

    def __post_init__(self) -> None:
        check_number(0, absolute=self.absolute, ratio=self.ratio, error=DetectorError)
        super().__post_init__()

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """The largest channel of every token."""
        return MassiveActivations(layers, tower, 1, STATE_SITE[tower])

    def scores(self, result: Any) -> Tensor:
        """``max |h|``."""
        return result.values[..., 0].abs()

    def also(self, result: Any) -> Tensor:
        """Whether the ratio holds too."""
        return reaches(result.ratio(), self.ratio)

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """Peak over median of D half-normals, times the mean median."""
        return expected_peak(anatomy.d_model) / 0.6745 * float(result.median.nanmean())

    def _plain(self) -> dict[str, Any]:
        limits = {"absolute": float(self.absolute), "ratio": float(self.ratio)}
        return {"how": "massive", **limits, "strict": self.strict}


class NormRule(Rule):
    """A rule on token norms; the null is the median norm."""

    score_field: ClassVar[str] = "norms"

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """Token norms."""
        return TokenNorms(layers, tower, STATE_SITE[tower])

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """The median norm."""
        return float(result.norms.nanmedian())


@dataclass(frozen=True)
class Norm(NormRule):
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
        if self.tau not in ("valley", "3sigma"):
            hint = "Or write 'valley' or '3sigma'."
            check_number(above=0, tau=self.tau, error=DetectorError, hint=hint)
        check_number(1, gap=self.gap, error=DetectorError)
        super().__post_init__()

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """A constant, or one per row and layer."""
        if not isinstance(self.tau, str):
            return super().thresholds(result, scores)
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

    def _plain(self) -> dict[str, Any] | None:
        if isinstance(self.tau, str):
            return None
        return {"how": "norm", "tau": float(self.tau), "strict": self.strict}


def _three_sigma(norms: Tensor) -> Tensor:
    """Mean plus three standard deviations (2506.08010)."""
    return norms.mean() + 3 * norms.std()


@dataclass(frozen=True)
class Received(Rule):
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
        check_choice(("max", "mean"), heads=self.heads, error=DetectorError)
        check_number(above=0, below=1, eps=self.eps, error=DetectorError)
        if self.times_null is not None:
            check_number(above=0, times_null=self.times_null, error=DetectorError)
        super().__post_init__()

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """Received attention."""
        return ReceivedAttention(layers, tower=tower, others=self.times_null is not None)

    def scores(self, result: Any) -> Tensor:
        """Received attention (or its multiple of the null), joined over heads."""
        got = result.received if self.times_null is None else result.times_null()
        return got.amax(dim=2) if self.heads == "max" else got.mean(dim=2)

    def _limit(self) -> float:
        return float(self.eps if self.times_null is None else self.times_null)

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """The mean null, or 1 if scores are multiples of it."""
        return 1.0 if self.times_null is not None else float(result.null.nanmean())


@dataclass(frozen=True)
class CosineToBOS(Rule):
    """Tokens whose state points the way of the first token's (secondary sinks).

    The first token itself is always flagged. Null: ``E |cos|`` of random directions.

    Args:
        threshold: Least absolute cosine.
    """

    limit_field: ClassVar[str] = "threshold"
    threshold: float = 0.9
    strict: bool = True

    def __post_init__(self) -> None:
        check_number(above=0, below=1, threshold=self.threshold, error=DetectorError)
        super().__post_init__()

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """Cosine to the first token."""
        return CosineToFirst(layers, tower, STATE_SITE[tower])

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """``sqrt(2 / (pi D))``."""
        return (2 / (torch.pi * anatomy.d_model)) ** 0.5


@dataclass(frozen=True)
class NoSinks(NormRule):
    """Flags nothing: what calibration returns for a tower in which it found no sink.

    Args:
        reason: Why.
    """

    reason: str = "no sink found"
    strict: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str):
            raise DetectorError(f"Got reason={self.reason!r}; expected text.")
        super().__post_init__()

    def _limit(self) -> float:
        return float("inf")

    def _plain(self) -> dict[str, Any]:
        return {"how": "none"}

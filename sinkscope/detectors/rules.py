"""Published rules that turn scores into sink tokens, alone (`detect`) or in `sinkscope.trace_sinks`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from sinkscope import probes
from sinkscope.anatomy.towers import TowerAnatomy
from sinkscope.checks import (
    among,
    check_choice,
    check_fields,
    check_number,
    fits,
    is_number,
    is_whole,
)
from sinkscope.detectors.detection import Detector as Detector
from sinkscope.detectors.detection import decide as decide
from sinkscope.detectors.detection import expected_peak
from sinkscope.errors import DetectorError
from sinkscope.kernels.gating import reaches
from sinkscope.probes.attention import STATE_SITE
from sinkscope.protocols import Probe
from sinkscope.results import Record
from sinkscope.sites import Tower

LARGEST = 3.4e38  # of a float32, in which scores are compared


class Rule(Record):
    """The base of detectors: one field of a probe's result, ``score_field``, against one number.

    That is the rule's ``limit_field``. ``measured`` makes the probe from ``layers``, ``tower`` and ``site``.
    ``ranges`` is field -> what `check_number` asks of it, ``choices`` field -> what it may be.
    """

    measured: ClassVar[Callable[..., Any]] = probes.TokenNorms
    score_field: ClassVar[str] = "scores"
    limit_field: ClassVar[str] = "tau"
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    choices: ClassVar[Mapping[str, Sequence[Any]]] = {}

    def __post_init__(self) -> None:
        for name, wanted in self.ranges.items():
            check_number(**wanted, **{name: getattr(self, name)}, error=DetectorError)
        for name, options in self.choices.items():
            check_choice(options, **{name: getattr(self, name)}, error=DetectorError)
        check_fields(self, DetectorError)
        for name, value in vars(self).items():
            if is_number(value) and abs(value) > LARGEST:
                what = f"at most {LARGEST:g}, the largest number of a float32"
                raise DetectorError(f"Got {name}={value!r}; expected {what}.")

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """What to measure."""
        return type(self).measured(layers=layers, tower=tower, site=STATE_SITE[tower])

    def scores(self, result: Any) -> Tensor:
        """The scores ``[batch layer pos]`` of a result."""
        return getattr(result, self.score_field)

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """The threshold of every row and layer, ``[batch layer]``."""
        return torch.full(scores.shape[:2], self._limit())

    def in_pass(self, layer: int) -> dict[str, Any] | None:
        """The rule of a decoder layer as plain data for `sinkscope.kernels.gating`, which asks it inside a
        pass; None if it does not judge every token by its state alone."""
        return self._plain()

    def _limit(self) -> float:
        return float(getattr(self, self.limit_field))

    def _plain(self) -> dict[str, Any] | None:
        """The rule as `sinkscope.kernels.gating` takes it; None if tokens are not judged alone."""
        return None


@dataclass(frozen=True)
class SinkDimensions(Rule):
    """Tokens whose sink-dimension value exceeds tau (Kang et al. 2503.03321; Choi et al. 2604.03316).

    ``dims`` are channels of this model. With ``normalize="rms"`` (else ``"none"``) the score is at most
    sqrt(D): ``tau=20`` suits LLaMA-2-7B (D = 4096), is known to flag 83-100 % of the image tokens of most
    recent LVLMs (2609.32808), and above sqrt(D) is refused. If ``strict``, a score equal to tau is no sink:
    VAR's code is strict, LSG writes ``>=``.
    """

    ranges: ClassVar[Any] = {"tau": {"above": 0}}
    choices: ClassVar[Any] = {"normalize": ("rms", "none")}
    dims: Sequence[int]
    tau: float
    normalize: str = "rms"
    strict: bool = True

    def __post_init__(self) -> None:
        dims = tuple(self.dims) if fits(self.dims, Sequence) else ()
        if not dims or not all(is_whole(dim, 0) for dim in dims):
            raise DetectorError(f"Got dims={self.dims!r}; expected channels, such as [1415, 2533].")
        super().__post_init__()

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """Sink-dimension scores; DetectorError if tau is above sqrt(D)."""
        width = anatomy.d_model
        if self.normalize == "rms" and self.tau >= width**0.5:
            raise DetectorError(
                f"Got tau={self.tau} with RMS normalisation in the {tower} tower; expected less than "
                f"sqrt({width}) = {width**0.5:.1f}, the largest possible score. Published thresholds "
                "belong to wide models: run ss.calibrate(lvlm, samples) for this one."
            )
        given = tuple(self.dims), layers, tower, self.normalize
        return probes.SinkDimensionScores(*given, STATE_SITE[tower])

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """The score of an isotropic state, ``E max of |dims| half-normals``; 0 without a scale."""
        return expected_peak(len(self.dims)) if self.normalize == "rms" else 0.0

    def _plain(self) -> dict[str, Any]:
        limit = {"dims": [int(dim) for dim in self.dims], "tau": float(self.tau)}
        return {"how": "dims", **limit, "rms": self.normalize == "rms", "strict": self.strict}


@dataclass(frozen=True)
class Massive(Rule):
    """Massive activations: ``|h| > absolute`` and at least ``ratio`` layer medians (2402.17762)."""

    measured: ClassVar[Any] = partial(probes.MassiveActivations, k=1)
    limit_field: ClassVar[str] = "absolute"
    ranges: ClassVar[Any] = {"absolute": {"least": 0}, "ratio": {"least": 0}}
    absolute: float = 100.0
    ratio: float = 1000.0
    strict: bool = True

    def scores(self, result: Any) -> Tensor:
        """``max |h|``."""
        return result.values[..., 0].abs()

    def also(self, result: Any) -> Tensor:
        """Whether the ratio holds too."""
        return reaches(result.ratio(), self.ratio)

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """The peak-to-median ratio of an isotropic state, D half-normals, times the mean median."""
        return expected_peak(anatomy.d_model) / 0.6745 * float(result.median.nanmean())

    def _plain(self) -> dict[str, Any]:
        limits = {"absolute": float(self.absolute), "ratio": float(self.ratio)}
        return {"how": "massive", **limits, "strict": self.strict}


class NormRule(Rule):
    """A rule on token norms."""

    score_field: ClassVar[str] = "norms"

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """The median norm."""
        return float(result.norms.nanmedian())


@dataclass(frozen=True)
class Norm(NormRule):
    """High-norm tokens, as in ViT registers (2309.16588) and DIYSink's CLIP rule (2510.08510).

    The score is the L2 norm. ``tau`` is a number (100 for CLIP ViT-L in LLaVA-1.5, 150 for DINOv2),
    ``"valley"`` for the widest gap among the sorted log norms above the median, or ``"3sigma"`` for mean + 3
    standard deviations. ``gap`` is the least ratio across a valley; below it nothing is flagged.
    """

    ranges: ClassVar[Any] = {"gap": {"least": 1}}
    tau: float | str = "valley"
    gap: float = 1.5
    strict: bool = False

    def __post_init__(self) -> None:
        if not among(self.tau, ("valley", "3sigma")):
            hint = "Or write 'valley' or '3sigma'."
            check_number(above=0, tau=self.tau, error=DetectorError, hint=hint)
        super().__post_init__()

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """A constant, or one per row and layer."""
        if not isinstance(self.tau, str):
            return super().thresholds(result, scores)
        lines = [self._of_line(line[~line.isnan()]) for line in scores.flatten(0, 1)]
        return torch.stack(lines).view(scores.shape[:2])

    def _of_line(self, norms: Tensor) -> Tensor:
        """Three deviations over the mean, or the log middle of the widest gap above the median."""
        if self.tau == "3sigma":
            return norms.mean() + 3 * norms.std()
        upper = norms.log().sort().values[(len(norms) - 1) // 2 :]
        gaps = upper.diff()
        if not len(gaps) or gaps.max() < torch.tensor(self.gap).log():
            return torch.tensor(float("inf"))
        return ((upper[gaps.argmax()] + upper[gaps.argmax() + 1]) / 2).exp()

    def _plain(self) -> dict[str, Any] | None:
        if isinstance(self.tau, str):
            return None
        return {"how": "norm", "tau": float(self.tau), "strict": self.strict}


@dataclass(frozen=True)
class ZScore(NormRule):
    """Norms more than ``z`` standard deviations above the mean of the layer's live tokens, per row.

    Of n tokens none lies more than ``(n - 1) / sqrt(n)`` (sample) deviations above the mean: ``z=3`` takes 11
    tokens. Large norms raise the deviation that they are judged by; ``Norm("valley")`` does not have that.
    """

    ranges: ClassVar[Any] = {"z": {"above": 0}}
    z: float = 3.0
    strict: bool = True

    def thresholds(self, result: Any, scores: Tensor) -> Tensor:
        """Mean plus ``z`` deviations of every row and layer; infinite for fewer than two tokens."""
        count, mean = (~scores.isnan()).sum(dim=-1), scores.nanmean(dim=-1)
        square = (scores - mean[..., None]).pow(2).nansum(dim=-1)
        deviation = (square / (count - 1).clamp(min=1)).sqrt()
        return (mean + self.z * deviation).masked_fill(count < 2, float("inf"))


@dataclass(frozen=True)
class Received(Rule):
    """Tokens that receive more than epsilon of the attention of the queries that see them.

    ``eps`` is the least received attention, own query included; Gu et al. (2410.10781) use 0.3 per head. It
    depends on the prompt's length: under uniform causal attention key 0 of T already receives about ln(T)/T.
    Their measure is the share of heads above it at T = 64, `sinkscope.published.sink_rate`, and flags no token.
    ``times_null`` is instead a multiple of each token's own null (5 in ACT, 2406.15765), counting what other
    tokens give, where at least 8 of them see it. ``heads`` is ``"max"`` (some head sinks here) or ``"mean"``.
    """

    ranges: ClassVar[Any] = {"eps": {"above": 0, "below": 1}}
    choices: ClassVar[Any] = {"heads": ("max", "mean")}
    eps: float = 0.3
    times_null: float | None = None
    heads: str = "max"
    strict: bool = True

    def __post_init__(self) -> None:
        if self.times_null is not None:
            check_number(above=0, times_null=self.times_null, error=DetectorError)
        super().__post_init__()

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """Received attention."""
        others = self.times_null is not None
        return probes.ReceivedAttention(layers, tower=tower, others=others)

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
    """Tokens whose state has at least this absolute cosine to the first token's (secondary sinks), and that
    token itself."""

    measured: ClassVar[Any] = probes.CosineToFirst
    limit_field: ClassVar[str] = "threshold"
    ranges: ClassVar[Any] = {"threshold": {"above": 0, "below": 1}}
    threshold: float = 0.9
    strict: bool = True

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """``E |cos|`` of random directions, ``sqrt(2 / (pi D))``."""
        return (2 / (torch.pi * anatomy.d_model)) ** 0.5


@dataclass(frozen=True)
class NoSinks(NormRule):
    """Flags nothing: what calibration returns for a tower in which it found no sink, and why."""

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

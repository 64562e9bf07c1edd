"""Probes of the residual stream: massive activations, norms, sink dimensions, cosines, states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.checks import check_choice, is_whole
from sinkscope.errors import ProbeError
from sinkscope.kernels import residual as kernels
from sinkscope.probes.per_layer import LayerProbe
from sinkscope.results import Result
from sinkscope.sites import STATE_SITES, Site, Tower
from sinkscope.tokens import Selection


def check_site(site: str) -> str:
    """A site that holds states; raises ProbeError if there is none of that name."""
    check_choice(STATE_SITES, site=site, error=ProbeError)
    return site


def check_dims(dims: Any, d_model: int, tower: str) -> list[int]:
    """Channel indices of a tower; raises ProbeError if there is none, or one is out of range."""
    if not isinstance(dims, Iterable) or isinstance(dims, str):
        raise ProbeError(
            f"Got dimensions {dims!r}; expected a list of channel indices. Write [{dims}]."
        )
    wanted = list(dims)
    if not wanted:
        raise ProbeError("Got no dimensions; expected at least one channel index, such as [1415].")
    for dim in wanted:
        if not is_whole(dim, 0, d_model - 1):
            raise ProbeError(
                f"Got dimension {dim!r} in the {tower} tower; expected 0 to {d_model - 1}. Sink "
                "dimensions belong to one model: run ss.calibrate(lvlm, samples) for this one."
            )
    return [int(dim) for dim in wanted]


def check_count(k: Any, most: int, what: str) -> int:
    """How many of something to keep; raises ProbeError if it is no int from 1 to ``most``."""
    if not is_whole(k, 1, most):
        raise ProbeError(f"Got k={k!r}; expected 1 to {most} {what}.")
    return int(k)


@dataclass(frozen=True, eq=False)
class MassiveResult(Result, columns={"value": "values", "channel": "channels"}):
    """The largest channels of every token; values NaN and channels -1 at padding.

    Attributes:
        values: Signed, largest magnitude first.
        median: The median of ``|h|`` over live positions and all channels.
    """

    values: Float[Tensor, "batch layer pos k"]
    channels: Int[Tensor, "batch layer pos k"]
    median: Float[Tensor, "batch layer"]
    layers: tuple[int, ...]
    site: str
    positions: Int[Tensor, "batch pos"] | None = None

    def ratio(self) -> Float[Tensor, "batch layer pos"]:
        """Every token's largest ``|h|`` over the layer's median."""
        return self.values[..., 0].abs() / self.median[..., None]

    def is_massive(self, absolute: float = 100.0, ratio: float = 1000.0) -> Tensor:
        """Massive by Sun et al. (2402.17762): ``|h| > absolute`` and at least ``ratio`` medians."""
        return (self.values[..., 0].abs() > absolute) & (self.ratio() >= ratio)


@dataclass(frozen=True, eq=False)
class MassiveActivations(LayerProbe, kernel=kernels.massive, result=MassiveResult):
    """The ``k`` largest channels of every token and the layer's median magnitude.

    Sun et al. (2402.17762) call ``|h_d|`` massive above 100 and about 1000 times the median. Reading
    ``site="attn_out"`` and ``"mlp_out"`` shows which of the two wrote a spike.
    """

    layers: Any = None
    tower: Tower = "language"
    k: int = 4
    site: str = "resid_post"

    def _parameters(self, context: Context) -> dict[str, Any]:
        most = context.tower(self.tower).d_model
        return {"live": context.live(self.tower), "k": check_count(self.k, most, "channels")}


@dataclass(frozen=True, eq=False)
class NormResult(Result, columns={"norm": "norms"}):
    """Token norms: NaN at padding. Fields as in `MassiveResult`."""

    norms: Float[Tensor, "batch layer pos"]
    layers: tuple[int, ...]
    site: str
    positions: Int[Tensor, "batch pos"] | None = None


@dataclass(frozen=True, eq=False)
class TokenNorms(LayerProbe, kernel=kernels.norms, result=NormResult):
    """L2 norm of every token (Darcet et al. 2309.16588 find ViT registers by it)."""

    layers: Any = None
    tower: Tower = "language"
    site: str = "resid_post"


@dataclass(frozen=True, eq=False)
class ScoreResult(Result, columns={"score": "scores"}):
    """One score per token, NaN at padding; ``bound`` is the largest possible one, or None."""

    scores: Float[Tensor, "batch layer pos"]
    layers: tuple[int, ...]
    bound: float | None = None
    positions: Int[Tensor, "batch pos"] | None = None


@dataclass(frozen=True, eq=False)
class SinkDimensionScores(LayerProbe, kernel=kernels.dimension_scores, result=ScoreResult):
    """The sink-dimension value of every token, on channels such as ``[1415, 2533]`` for LLaMA-2-7B.

    ``max_{d in dims} |h_d|``, divided by ``rms(h) = sqrt(mean_d h_d^2 + 1e-6)`` if
    ``normalize="rms"`` and not ``"none"`` (Kang et al. 2503.03321; Choi et al. 2604.03316 write it
    without). With RMS it is at most sqrt(D), and ``score^2 / D`` is that channel's share of the energy.
    """

    dims: Sequence[int]
    layers: Any = None
    tower: Tower = "language"
    normalize: str = "rms"
    site: str = "resid_pre"

    def _parameters(self, context: Context) -> dict[str, Any]:
        check_choice(("rms", "none"), normalize=self.normalize, error=ProbeError)
        dims = check_dims(self.dims, context.tower(self.tower).d_model, self.tower)
        return {"dims": dims, "rms": self.normalize == "rms"}

    def finish(self, answers: Mapping[Site, Any], context: Context) -> Any:
        """Stack the layers and mask the padding."""
        bound = context.tower(self.tower).d_model ** 0.5 if self.normalize == "rms" else None
        return replace(super().finish(answers, context), bound=bound)


@dataclass(frozen=True, eq=False)
class CosineToFirst(LayerProbe, kernel=kernels.cosine_to, result=ScoreResult):
    """Absolute cosine of every token with the row's first live token (BOS, or CLS in the ViT).

    Secondary sinks copy the direction of the first one. The result is a `ScoreResult` in [0, 1].
    At a decode step it is 1 by definition, because the one token is its own reference.
    """

    bound: ClassVar[float] = 1.0

    layers: Any = None
    tower: Tower = "language"
    site: str = "resid_pre"

    def _parameters(self, context: Context) -> dict[str, Any]:
        return {"anchor": context.live(self.tower).int().argmax(dim=1)}


@dataclass(frozen=True, eq=False)
class StateResult(Result, columns={"value": "states"}):
    """Whole states: NaN at padding and at tokens not chosen. Fields as in `MassiveResult`."""

    states: Float[Tensor, "batch layer pos d_model"]
    layers: tuple[int, ...]
    site: str
    tower: Tower
    positions: Int[Tensor, "batch pos"] | None = None


@dataclass(frozen=True, eq=False)
class ResidualStates(LayerProbe, kernel=kernels.keep, result=StateResult):
    """The states themselves, for patching into another run or training probes on them.

    The one probe whose result is large: ``batch x layers x positions x d_model`` numbers. ``tokens``
    selects which to keep.
    """

    tokens: Selection = "all"
    layers: Any = None
    tower: Tower = "language"
    site: str = "resid_post"

    def _parameters(self, context: Context) -> dict[str, Any]:
        context.flat(self.tower, self.tokens)
        return {}

    def _kept(self, context: Context) -> Tensor:
        live = context.live(self.tower)
        return live if context.step else live & context.flat(self.tower, self.tokens)

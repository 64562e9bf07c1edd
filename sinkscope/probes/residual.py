"""Probes of the residual stream: massive activations, norms, sink dimensions, cosines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.errors import ProbeError, nearest
from sinkscope.kernels import residual as kernels
from sinkscope.protocols import Read
from sinkscope.results import Result, mask_padding, stack_layers, tidy
from sinkscope.sites import STATE_SITES, Site, Tower
from sinkscope.tokens import Selection

if TYPE_CHECKING:
    import pandas as pd


def check_site(site: str) -> str:
    """A site that holds states.

    Raises:
        ProbeError: If there is none of that name.
    """
    if site not in STATE_SITES:
        raise ProbeError(
            f"Got site={site!r}; expected one of {STATE_SITES}. {nearest(site, STATE_SITES)}"
        )
    return site


def check_dims(dims: Any, d_model: int, tower: str) -> list[int]:
    """Channel indices of a tower.

    Raises:
        ProbeError: If there is none, or one is out of range.
    """
    if not isinstance(dims, Iterable) or isinstance(dims, str):
        raise ProbeError(
            f"Got dimensions {dims!r}; expected a list of channel indices. Write [{dims}]."
        )
    wanted = list(dims)
    if not wanted:
        raise ProbeError("Got no dimensions; expected at least one channel index, such as [1415].")
    for dim in wanted:
        whole = isinstance(dim, Integral) and not isinstance(dim, bool)
        if not whole or not 0 <= int(dim) < d_model:
            raise ProbeError(
                f"Got dimension {dim!r} in the {tower} tower; expected 0 to {d_model - 1}. Sink "
                "dimensions belong to one model: run ss.calibrate(lvlm, samples) for this one."
            )
    return [int(dim) for dim in wanted]


def check_count(k: Any, most: int, what: str) -> int:
    """How many of something to keep.

    Raises:
        ProbeError: If it is no int from 1 to ``most``.
    """
    whole = isinstance(k, Integral) and not isinstance(k, bool)
    if not whole or not 1 <= int(k) <= most:
        raise ProbeError(f"Got k={k!r}; expected 1 to {most} {what}.")
    return int(k)


@dataclass(frozen=True, eq=False)
class MassiveResult(Result):
    """The largest channels of every token.

    Attributes:
        values: Float ``[batch layer pos k]``, signed, largest magnitude first; NaN at padding.
        channels: Int ``[batch layer pos k]``; -1 at padding.
        median: Float ``[batch layer]``, median of ``|h|`` over live positions and all channels.
        layers: The block indices, in order.
        site: Which site was read.
        positions: Int ``[batch pos]``, -1 where there is none; None for 0, 1, 2, ...
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

    def to_dataframe(self) -> pd.DataFrame:
        """Columns batch, layer, pos, rank, value, channel."""
        axes = ("batch", "layer", "pos", "rank")
        columns = {"value": self.values, "channel": self.channels}
        return tidy(columns, axes, {"layer": self.layers, "pos": self.positions})


@dataclass(frozen=True, eq=False)
class MassiveActivations:
    """The ``k`` largest channels of every token and the layer's median magnitude.

    Sun et al. (2402.17762) call ``|h_d|`` massive above 100 and about 1000 times the median.
    Reading ``site="attn_out"`` and ``"mlp_out"`` shows which of the two wrote a spike.

    Args:
        layers: Block indices, or None for all.
        tower: ``"language"`` or ``"vision"``.
        k: How many channels per token.
        site: ``"resid_pre"``, ``"attn_out"``, ``"mlp_out"`` or ``"resid_post"``.
    """

    needs: ClassVar[str] = "states"

    layers: Any = None
    tower: Tower = "language"
    k: int = 4
    site: str = "resid_post"

    def reads(self, context: Context) -> list[Read]:
        """One read per layer."""
        parameters = {
            "live": context.live(self.tower),
            "k": check_count(self.k, context.tower(self.tower).d_model, "channels"),
            "layout": context.layout(self.tower),
        }
        site = check_site(self.site)
        return [
            Read(Site(self.tower, site, layer), kernels.massive, parameters)
            for layer in context.layers(self.tower, self.layers)
        ]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> MassiveResult:
        """Stack the layers and mask the padding."""
        live = context.live(self.tower)
        median = stack_layers(answers, "median")
        return MassiveResult(
            mask_padding(stack_layers(answers, "values"), live, 2),
            mask_padding(stack_layers(answers, "channels"), live, 2),
            median.masked_fill(~live.any(dim=1, keepdim=True), float("nan")),
            context.layers(self.tower, self.layers),
            self.site,
            context.positions(self.tower),
        )


@dataclass(frozen=True, eq=False)
class NormResult(Result):
    """Token norms.

    Attributes:
        norms: Float ``[batch layer pos]``; NaN at padding.
        layers: The block indices, in order.
        site: Which site was read.
        positions: Int ``[batch pos]``, -1 where there is none; None for 0, 1, 2, ...
    """

    norms: Float[Tensor, "batch layer pos"]
    layers: tuple[int, ...]
    site: str
    positions: Int[Tensor, "batch pos"] | None = None

    def to_dataframe(self) -> pd.DataFrame:
        """Columns batch, layer, pos, norm."""
        names = {"layer": self.layers, "pos": self.positions}
        return tidy({"norm": self.norms}, ("batch", "layer", "pos"), names)


@dataclass(frozen=True, eq=False)
class TokenNorms:
    """L2 norm of every token (Darcet et al. 2309.16588 find ViT registers by it).

    Args:
        layers: Block indices, or None for all.
        tower: ``"language"`` or ``"vision"``.
        site: See `MassiveActivations`.
    """

    needs: ClassVar[str] = "states"

    layers: Any = None
    tower: Tower = "language"
    site: str = "resid_post"

    def reads(self, context: Context) -> list[Read]:
        """One read per layer."""
        site, layout = check_site(self.site), context.layout(self.tower)
        return [
            Read(Site(self.tower, site, layer), kernels.norms, {"layout": layout})
            for layer in context.layers(self.tower, self.layers)
        ]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> NormResult:
        """Stack the layers and mask the padding."""
        norms = mask_padding(stack_layers(answers), context.live(self.tower), 2)
        layers = context.layers(self.tower, self.layers)
        return NormResult(norms, layers, self.site, context.positions(self.tower))


@dataclass(frozen=True, eq=False)
class ScoreResult(Result):
    """One score per token.

    Attributes:
        scores: Float ``[batch layer pos]``; NaN at padding.
        layers: The block indices, in order.
        bound: The largest possible score, or None.
        positions: Int ``[batch pos]``, -1 where there is none; None for 0, 1, 2, ...
    """

    scores: Float[Tensor, "batch layer pos"]
    layers: tuple[int, ...]
    bound: float | None = None
    positions: Int[Tensor, "batch pos"] | None = None

    def to_dataframe(self) -> pd.DataFrame:
        """Columns batch, layer, pos, score."""
        names = {"layer": self.layers, "pos": self.positions}
        return tidy({"score": self.scores}, ("batch", "layer", "pos"), names)


@dataclass(frozen=True, eq=False)
class SinkDimensionScores:
    """The sink-dimension value of every token.

    ``max_{d in dims} |h_d|``, divided by ``rms(h) = sqrt(mean_d h_d^2 + 1e-6)`` if
    ``normalize="rms"`` (Kang et al. 2503.03321; Choi et al. 2604.03316 write it without). With RMS
    the score is at most sqrt(D), and ``score^2 / D`` is that channel's share of the energy.

    Args:
        dims: Channel indices, such as ``[1415, 2533]`` for LLaMA-2-7B.
        layers: Block indices, or None for all.
        tower: ``"language"`` or ``"vision"``.
        normalize: ``"rms"`` or ``"none"``.
        site: See `MassiveActivations`; the default is what the block's attention reads.
    """

    needs: ClassVar[str] = "states"

    dims: Sequence[int]
    layers: Any = None
    tower: Tower = "language"
    normalize: str = "rms"
    site: str = "resid_pre"

    def reads(self, context: Context) -> list[Read]:
        """One read per layer."""
        if self.normalize not in ("rms", "none"):
            raise ProbeError(f"Got normalize={self.normalize!r}; expected 'rms' or 'none'.")
        parameters = {
            "dims": check_dims(self.dims, context.tower(self.tower).d_model, self.tower),
            "rms": self.normalize == "rms",
            "layout": context.layout(self.tower),
        }
        site = check_site(self.site)
        return [
            Read(Site(self.tower, site, layer), kernels.dimension_scores, parameters)
            for layer in context.layers(self.tower, self.layers)
        ]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> ScoreResult:
        """Stack the layers and mask the padding."""
        scores = mask_padding(stack_layers(answers), context.live(self.tower), 2)
        bound = None
        if self.normalize == "rms":
            bound = context.tower(self.tower).d_model ** 0.5
        layers = context.layers(self.tower, self.layers)
        return ScoreResult(scores, layers, bound, context.positions(self.tower))


@dataclass(frozen=True, eq=False)
class CosineToFirst:
    """Absolute cosine of every token with the row's first live token (BOS, or CLS in the ViT).

    Secondary sinks copy the direction of the first one. The result is a `ScoreResult` in [0, 1].
    At a decode step it is 1 by definition, because the one token is its own reference.

    Args:
        layers: Block indices, or None for all.
        tower: ``"language"`` or ``"vision"``.
        site: See `MassiveActivations`.
    """

    needs: ClassVar[str] = "states"

    layers: Any = None
    tower: Tower = "language"
    site: str = "resid_pre"

    def reads(self, context: Context) -> list[Read]:
        """One read per layer."""
        anchor = context.live(self.tower).int().argmax(dim=1)
        parameters = {"anchor": anchor, "layout": context.layout(self.tower)}
        site = check_site(self.site)
        return [
            Read(Site(self.tower, site, layer), kernels.cosine_to, parameters)
            for layer in context.layers(self.tower, self.layers)
        ]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> ScoreResult:
        """Stack the layers and mask the padding."""
        scores = mask_padding(stack_layers(answers), context.live(self.tower), 2)
        layers = context.layers(self.tower, self.layers)
        return ScoreResult(scores, layers, 1.0, context.positions(self.tower))


@dataclass(frozen=True, eq=False)
class StateResult(Result):
    """Whole states of chosen tokens.

    Attributes:
        states: Float ``[batch layer pos d_model]``; NaN at padding and at tokens not chosen.
        layers: The block indices, in order.
        site: Which site was read.
        tower: Which tower was read.
        positions: Int ``[batch pos]``, -1 where there is none; None for 0, 1, 2, ...
    """

    states: Float[Tensor, "batch layer pos d_model"]
    layers: tuple[int, ...]
    site: str
    tower: Tower
    positions: Int[Tensor, "batch pos"] | None = None

    def to_dataframe(self) -> pd.DataFrame:
        """Columns batch, layer, pos, channel, value: one line per number."""
        axes = ("batch", "layer", "pos", "channel")
        return tidy({"value": self.states}, axes, {"layer": self.layers, "pos": self.positions})


@dataclass(frozen=True, eq=False)
class ResidualStates:
    """The states themselves, for patching into another run or training probes on them.

    The one probe whose result is large: ``batch x layers x positions x d_model`` numbers.

    Args:
        tokens: Which tokens to keep.
        layers: Block indices, or None for all.
        tower: ``"language"`` or ``"vision"``.
        site: See `MassiveActivations`.
    """

    needs: ClassVar[str] = "states"

    tokens: Selection = "all"
    layers: Any = None
    tower: Tower = "language"
    site: str = "resid_post"

    def reads(self, context: Context) -> list[Read]:
        """One read per layer."""
        context.flat(self.tower, self.tokens)
        site, layout = check_site(self.site), context.layout(self.tower)
        return [
            Read(Site(self.tower, site, layer), kernels.keep, {"layout": layout})
            for layer in context.layers(self.tower, self.layers)
        ]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> StateResult:
        """Stack the layers and mask what was not chosen."""
        kept = context.live(self.tower)
        if not context.step:
            kept = kept & context.flat(self.tower, self.tokens)
        layers = context.layers(self.tower, self.layers)
        states = mask_padding(stack_layers(answers), kept, 2)
        return StateResult(states, layers, self.site, self.tower, context.positions(self.tower))

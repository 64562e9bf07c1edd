"""Probes of states: activations, norms, sink dimensions, cosines, channels, group means, the lens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.checks import check_choice, check_whole, is_whole
from sinkscope.errors import ModelError, ProbeError
from sinkscope.kernels import residual as kernels
from sinkscope.probes.per_layer import ByLayer, LayerProbe, chosen_of, spread
from sinkscope.results import Result
from sinkscope.sites import STATE_SITES, Site, Tower
from sinkscope.tokens import Selection


def check_site(site: str) -> str:
    """The site itself; ProbeError if it holds no states."""
    check_choice(STATE_SITES, site=site, error=ProbeError)
    return site


def check_dims(dims: Any, d_model: int, tower: str) -> list[int]:
    """Channel indices of a tower; ProbeError if there is none, or one is out of range."""
    if not isinstance(dims, Iterable) or isinstance(dims, str):
        raise ProbeError(
            f"Got dimensions {dims!r}; expected a list of channel indices. Write [{dims}]."
        )
    if not (wanted := list(dims)):
        raise ProbeError("Got no dimensions; expected at least one channel index, such as [1415].")
    if wrong := [dim for dim in wanted if not is_whole(dim, 0, d_model - 1)]:
        raise ProbeError(
            f"Got dimension {wrong[0]!r} in the {tower} tower; expected 0 to {d_model - 1}. Sink "
            "dimensions belong to one model: run ss.calibrate(lvlm, samples) for this one."
        )
    return [int(dim) for dim in wanted]


def check_count(k: Any, most: int, what: str) -> int:
    """How many of something to keep; ProbeError if it is no int from 1 to ``most``."""
    if not is_whole(k, 1, most):
        raise ProbeError(f"Got k={k!r}; expected 1 to {most} {what}.")
    return int(k)


@dataclass(frozen=True, eq=False)
class MassiveResult(Result, columns={"value": "values", "channel": "channels"}):
    """The largest channels of every token, largest magnitude first; values are signed, NaN and channels -1 at
    padding. ``median`` is that of ``|h|`` over live positions and all channels."""

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
    """The ``k`` largest channels of every token and the layer's median magnitude (Sun et al. 2402.17762).
    Reading ``site="attn_out"`` and ``"mlp_out"`` shows which of the two wrote a spike."""

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
    """L2 norm of every token (Darcet et al. 2309.16588 find ViT registers by it). ``resid_post`` of the last
    block is before the final norm, Hugging Face's ``hidden_states[-1]`` of a decoder behind it."""

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
    """Absolute cosine of every token with the row's first live token (BOS, or CLS in the ViT), in [0, 1].

    Secondary sinks copy the direction of the first one. At a decode step it is 1: the token is its own first.
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

    A large result; ``tokens`` selects which to keep. ``resid_post`` of the last block is before the final norm;
    Hugging Face's ``hidden_states[-1]`` of a decoder is behind it, and the others are `resid_pre`.
    """

    tokens: Selection = "all"
    layers: Any = None
    tower: Tower = "language"
    site: str = "resid_post"

    def _parameters(self, context: Context) -> dict[str, Any]:
        return {"chosen": chosen_of(context, self.tower, self.tokens)}

    def finish(self, answers: Mapping[Site, Any], context: Context) -> Any:
        """Stack the layers; NaN at all other tokens."""
        chosen = chosen_of(context, self.tower, self.tokens)
        return super().finish(spread(answers, chosen, context.live(self.tower), 1), context)

    def _kept(self, context: Context) -> Tensor:
        live = context.live(self.tower)
        return live if context.step else live & context.flat(self.tower, self.tokens)


@dataclass(frozen=True, eq=False)
class ChannelResult(Result, columns={"value": "values"}):
    """Values of chosen channels at chosen sites: signed, NaN at padding."""

    values: Float[Tensor, "batch layer site pos channel"]
    sites: tuple[str, ...]
    channels: tuple[int, ...]
    layers: tuple[int, ...]
    positions: Int[Tensor, "batch pos"] | None = None


@dataclass(frozen=True, eq=False)
class ChannelValues(LayerProbe, kernel=kernels.channels, result=ChannelResult):
    """Signed values of chosen channels before, in and after every block, at the sites asked for. ``resid_post
    - resid_pre`` is what the block wrote; ``attn_out`` and ``mlp_out`` are its halves."""

    channels: Sequence[int]
    layers: Any = None
    tower: Tower = "language"
    sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    site = "resid_pre"  # under which `finish` stacks; no field

    def _parameters(self, context: Context) -> dict[str, Any]:
        return {"index": check_dims(self.channels, context.tower(self.tower).d_model, self.tower)}

    def finish(self, answers: Mapping[Site, Any], context: Context) -> Any:
        """Stack layers and sites and mask the padding."""
        by_layer = {}
        for layer in self._layers(context):
            values = [answers[Site(self.tower, site, layer)] for site in self.sites]
            by_layer[Site(self.tower, self.site, layer)] = torch.stack(values, dim=1)
        return super().finish(by_layer, context)


@dataclass(frozen=True, eq=False)
class GroupMeansResult(Result, columns={"value": "means", "count": "count"}):
    """The mean state of every token group, over ``count`` tokens; NaN where a row has none."""

    means: Float[Tensor, "batch layer group d_model"]
    count: Int[Tensor, "batch layer group"]
    groups: tuple[str, ...]
    layers: tuple[int, ...]
    site: str


@dataclass(frozen=True, eq=False)
class GroupMeans(LayerProbe, kernel=kernels.group_means, result=GroupMeansResult):
    """The mean state of token groups: what a linear probe of a group is trained on.

    It is taken in fp32 inside the forward pass, so that no state of a token comes back. ``groups`` is
    name -> selection, such as ``{"sinks": trace.l_sinks(), "last": "last"}``; they may overlap, and masks may
    differ by layer. What was generated is in no group: at a decode step every group is empty.
    """

    groups: Mapping[str, Selection]
    layers: Any = None
    tower: Tower = "language"
    site: str = "resid_pre"

    def _parameters(self, context: Context) -> dict[str, Any]:
        masks = context.groups(self.tower, self.groups)
        if context.step:
            masks = torch.zeros(len(masks), 1, 1, masks.shape[-1], dtype=torch.bool)
        return {"groups": ByLayer(mask.contiguous() for mask in masks.unbind(1))}


@dataclass(frozen=True, eq=False)
class LensResult(Result, columns={"token": "tokens", "logprob": "logprobs"}):
    """What the LM head reads from intermediate states; ``logprobs``, ``entropy`` and ``scores`` in nats.
    ``tokens`` are ids, most likely first, -1 where there is none. ``scores`` are the log-probabilities of the
    tokens that were asked for, None if none was."""

    tokens: Int[Tensor, "batch layer row k"]
    logprobs: Float[Tensor, "batch layer row k"]
    entropy: Float[Tensor, "batch layer row"]
    positions: Int[Tensor, "batch row"]
    layers: tuple[int, ...]
    scores: Float[Tensor, "batch layer row option"] | None = None


@dataclass(frozen=True, eq=False)
class LogitLens(LayerProbe, kernel=kernels.lens, result=LensResult, needs="head", over="positions"):
    """The model's final norm and LM head applied to intermediate states of the decoder (nostalgebraist 2020).

    Args:
        positions: Which states.
        k: How many of the likeliest tokens to keep.
        score: Token ids whose log-probabilities to give too, such as those of two answers; or int
            ``[batch row option]``, other ones at every position, -1 for none (for prompts only).
    """

    positions: Selection = "last"
    layers: Any = None
    k: int = 5
    score: Any = None
    site: str = "resid_post"
    tower: Tower = "language"

    def _parameters(self, context: Context) -> dict[str, Any]:
        hint = "The vision tower has no LM head: follow its tokens to the LLM with ss.trace_sinks."
        check_choice(("language",), tower=self.tower, error=ProbeError, hint=hint)
        lens = context.anatomy.lens
        if lens.why:
            got = f"Got LogitLens on this model, but {lens.why}; expected the model's own logits"
            raise ModelError(
                f"{got} there. Write lvlm.run(sample).logits for those of the last block."
            )
        return {
            "scale": lens.scale,
            "cap": lens.cap,
            "norm": ("@module", lens.norm),
            "head": ("@module", context.anatomy.head),
            "positions": self._rows(context, self.positions),
            "k": check_count(self.k, context.anatomy.vocab, "tokens"),
            "wanted": None if self.score is None else self._wanted(context),
        }

    def _wanted(self, context: Context) -> Tensor:
        """The tokens of ``score``, ``[batch row option]`` or ``[1 1 option]``."""
        ids, vocab, hint = self.score, context.anatomy.vocab, "Write score=[5, 9]"
        if not isinstance(ids, Tensor):
            some = [*ids] if isinstance(ids, Iterable) and not isinstance(ids, str) else [ids]
            for token in some or [None]:
                check_whole(
                    0, vocab - 1, score=token, error=ProbeError, hint=f"{hint}, ids of tokens."
                )
            return torch.tensor(some)[None, None]
        shape = tuple(self._positions(context).shape)
        whole = not (ids.is_floating_point() or ids.dtype == torch.bool)
        inside = whole and ids.numel() and int(ids.min()) >= -1 and int(ids.max()) < vocab
        if context.step or not inside or ids.ndim != 3 or tuple(ids.shape[:2]) != shape:
            got = f"Got score of shape {tuple(ids.shape)} and dtype {ids.dtype}"
            got += " at a decode step" * bool(context.step)
            wanted = (
                f"ids below {vocab}, whole numbers [{shape[0]}, {shape[1]}, option], of a prompt"
            )
            raise ProbeError(f"{got}; expected {wanted}. {hint} for the same ones everywhere.")
        return ids

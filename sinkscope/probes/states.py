"""Probes of chosen channels, of the mean state of groups, and of what the LM head reads in states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.anatomy.context import Context, check_groups, indices_of
from sinkscope.errors import ProbeError
from sinkscope.kernels import residual as kernels
from sinkscope.probes.per_layer import ByLayer, LayerProbe
from sinkscope.probes.residual import check_count, check_dims, check_site
from sinkscope.protocols import Read
from sinkscope.results import Result
from sinkscope.sites import Site, Tower
from sinkscope.tokens import Selection


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
    """Signed values of chosen channels before, in and after every block, at the sites asked for.

    ``resid_post - resid_pre`` is what the block wrote; ``attn_out`` and ``mlp_out`` show which half
    of it did.
    """

    channels: Sequence[int]
    layers: Any = None
    tower: Tower = "language"
    sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    site = "resid_pre"  # under which `finish` stacks; no field

    def reads(self, context: Context) -> list[Read]:
        """One read per layer and site."""
        index = check_dims(self.channels, context.tower(self.tower).d_model, self.tower)
        parameters = {"index": index, "layout": context.layout(self.tower)}
        return [
            Read(Site(self.tower, check_site(site), layer), self.kernel, parameters)
            for layer in context.layers(self.tower, self.layers)
            for site in self.sites
        ]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> Any:
        """Stack layers and sites and mask the padding."""
        by_layer = {}
        for layer in context.layers(self.tower, self.layers):
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

    The mean is taken inside the forward pass in fp32, so that ``batch x layers x groups x d_model``
    numbers come back and no state of a token. Groups may overlap. What was generated is in no group:
    at a decode step every group is empty.

    ``groups`` is name -> selection, such as ``{"sinks": trace.l_sinks(), "last": "last"}``; masks may
    differ by layer.
    """

    groups: Mapping[str, Selection]
    layers: Any = None
    tower: Tower = "language"
    site: str = "resid_pre"

    def _parameters(self, context: Context) -> dict[str, Any]:
        check_groups(self.groups)
        masks = [context.select(self.tower, selection) for selection in self.groups.values()]
        if context.step:
            masks = [torch.zeros(len(mask), 1, dtype=torch.bool) for mask in masks]
        many = context.tower(self.tower).n_layers if any(m.ndim == 3 for m in masks) else 1
        by_layer = [[m if m.ndim == 2 else m[:, layer] for m in masks] for layer in range(many)]
        return {"groups": ByLayer(torch.stack(of_layer, dim=-1) for of_layer in by_layer)}


@dataclass(frozen=True, eq=False)
class LensResult(Result, columns={"token": "tokens", "logprob": "logprobs"}):
    """What the LM head reads from intermediate states; ``logprobs`` and ``entropy`` in nats.

    ``tokens`` are ids, most likely first, -1 where there is none.
    """

    tokens: Int[Tensor, "batch layer row k"]
    logprobs: Float[Tensor, "batch layer row k"]
    entropy: Float[Tensor, "batch layer row"]
    positions: Int[Tensor, "batch row"]
    layers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LogitLens(LayerProbe, kernel=kernels.lens, result=LensResult, needs="head", over="positions"):
    """The model's final norm and LM head applied to intermediate states of the decoder.

    nostalgebraist (2020). For visual tokens the lens shows what a sink would say. ``positions``
    selects the states, ``k`` is how many tokens to keep.
    """

    positions: Selection = "last"
    layers: Any = None
    k: int = 5
    site: str = "resid_post"
    tower: Tower = "language"

    def _parameters(self, context: Context) -> dict[str, Any]:
        if self.tower != "language":
            raise ProbeError(
                f"Got LogitLens(tower={self.tower!r}); expected 'language'. The vision tower has no "
                "LM head: follow its tokens through the projector with ss.trace_sinks."
            )
        rows = indices_of(context.flat("language", self.positions))
        return {
            "norm": ("@module", context.anatomy.final_norm),
            "head": ("@module", context.anatomy.head),
            "positions": None if context.step else rows,
            "k": check_count(self.k, context.anatomy.vocab, "tokens"),
        }

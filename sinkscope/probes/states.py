"""Values of chosen channels before, in and after every block: who wrote a spike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.anatomy.context import Context, check_groups, indices_of
from sinkscope.errors import ProbeError
from sinkscope.kernels import residual as kernels
from sinkscope.probes.residual import check_count, check_dims, check_site
from sinkscope.protocols import Read
from sinkscope.results import Result, mask_padding, stack_layers, tidy
from sinkscope.sites import Site, Tower
from sinkscope.tokens import Selection

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class ChannelResult(Result):
    """Values of chosen channels at chosen sites.

    Attributes:
        values: Float ``[batch layer site pos channel]``, signed; NaN at padding.
        sites: The site names, in order.
        channels: The channel indices, in order.
        layers: The block indices, in order.
        positions: Int ``[batch pos]``, -1 where there is none; None for 0, 1, 2, ...
    """

    values: Float[Tensor, "batch layer site pos channel"]
    sites: tuple[str, ...]
    channels: tuple[int, ...]
    layers: tuple[int, ...]
    positions: Int[Tensor, "batch pos"] | None = None

    def to_dataframe(self) -> pd.DataFrame:
        """Columns batch, layer, site, pos, channel, value."""
        axes = ("batch", "layer", "site", "pos", "channel")
        names = {
            "layer": self.layers,
            "site": self.sites,
            "pos": self.positions,
            "channel": self.channels,
        }
        return tidy({"value": self.values}, axes, names)


@dataclass(frozen=True, eq=False)
class ChannelValues:
    """Signed values of chosen channels before, in and after every block.

    ``resid_post - resid_pre`` is what the block wrote; ``attn_out`` and ``mlp_out`` show which half
    of it did.

    Args:
        channels: Channel indices.
        layers: Block indices, or None for all.
        tower: ``"language"`` or ``"vision"``.
        sites: Which sites to read.
    """

    needs: ClassVar[str] = "states"

    channels: Sequence[int]
    layers: Any = None
    tower: Tower = "language"
    sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out", "resid_post")

    def reads(self, context: Context) -> list[Read]:
        """One read per layer and site."""
        d_model = context.tower(self.tower).d_model
        parameters = {
            "index": check_dims(self.channels, d_model, self.tower),
            "layout": context.layout(self.tower),
        }
        return [
            Read(Site(self.tower, check_site(site), layer), kernels.channels, parameters)
            for layer in context.layers(self.tower, self.layers)
            for site in self.sites
        ]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> ChannelResult:
        """Stack layers and sites and mask the padding."""
        layers = context.layers(self.tower, self.layers)
        values = torch.stack(
            [
                torch.stack([answers[Site(self.tower, s, layer)] for s in self.sites], dim=1)
                for layer in layers
            ],
            dim=1,
        )
        values = mask_padding(values, context.live(self.tower), 3)
        sites, channels = tuple(self.sites), tuple(self.channels)
        return ChannelResult(values, sites, channels, layers, context.positions(self.tower))


@dataclass(frozen=True, eq=False)
class GroupMeansResult(Result):
    """The mean state of every token group.

    Attributes:
        means: Float ``[batch layer group d_model]``; NaN where a row has no token of the group.
        count: Int ``[batch layer group]``, how many tokens the mean is over.
        groups: The group names, in order.
        layers: The block indices, in order.
        site: Which site was read.
    """

    means: Float[Tensor, "batch layer group d_model"]
    count: Int[Tensor, "batch layer group"]
    groups: tuple[str, ...]
    layers: tuple[int, ...]
    site: str

    def to_dataframe(self) -> pd.DataFrame:
        """Columns batch, layer, group, channel, value, count; no lines for an empty group."""
        columns = {"value": self.means, "count": self.count[..., None].expand_as(self.means)}
        names = {"layer": self.layers, "group": self.groups}
        return tidy(columns, ("batch", "layer", "group", "channel"), names)


@dataclass(frozen=True, eq=False)
class GroupMeans:
    """The mean state of token groups: what a linear probe of a group is trained on.

    The mean is taken inside the forward pass in fp32, so that ``batch x layers x groups x d_model``
    numbers come back and no state of a token. Groups may overlap. What was generated is in no group:
    at a decode step every group is empty.

    Args:
        groups: Name -> selection, such as ``{"sinks": trace.l_sinks(), "last": "last"}``; masks may
            differ by layer.
        layers: Block indices, or None for all.
        tower: ``"language"`` or ``"vision"``.
        site: See `MassiveActivations`; the default is what the block's attention reads.
    """

    needs: ClassVar[str] = "states"

    groups: Mapping[str, Selection]
    layers: Any = None
    tower: Tower = "language"
    site: str = "resid_pre"

    def reads(self, context: Context) -> list[Read]:
        """One read per layer."""
        check_groups(self.groups)
        masks = [context.select(self.tower, selection) for selection in self.groups.values()]
        if context.step:
            masks = [torch.zeros(len(mask), 1, dtype=torch.bool) for mask in masks]
        site, layout = check_site(self.site), context.layout(self.tower)
        return [
            Read(
                Site(self.tower, site, layer),
                kernels.group_means,
                {"groups": _at(masks, layer), "layout": layout},
            )
            for layer in context.layers(self.tower, self.layers)
        ]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> GroupMeansResult:
        """Stack the layers."""
        return GroupMeansResult(
            stack_layers(answers, "means"),
            stack_layers(answers, "count"),
            tuple(self.groups),
            context.layers(self.tower, self.layers),
            self.site,
        )


def _at(masks: list[Tensor], layer: int) -> Tensor:
    """The masks of one layer, ``[row pos group]``."""
    return torch.stack([m if m.ndim == 2 else m[:, layer] for m in masks], dim=-1)


@dataclass(frozen=True, eq=False)
class LensResult(Result):
    """What the LM head reads from intermediate states.

    Attributes:
        tokens: Int ``[batch layer row k]`` token ids, most likely first; -1 padded.
        logprobs: Float ``[batch layer row k]``, in nats.
        entropy: Float ``[batch layer row]``, in nats.
        positions: Int ``[batch row]``, -1 padded.
        layers: The block indices, in order.
    """

    tokens: Int[Tensor, "batch layer row k"]
    logprobs: Float[Tensor, "batch layer row k"]
    entropy: Float[Tensor, "batch layer row"]
    positions: Int[Tensor, "batch row"]
    layers: tuple[int, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """Columns batch, layer, row (the position), rank, token, logprob."""
        axes = ("batch", "layer", "row", "rank")
        names = {"layer": self.layers, "row": self.positions}
        return tidy({"token": self.tokens, "logprob": self.logprobs}, axes, names)


@dataclass(frozen=True, eq=False)
class LogitLens:
    """The model's final norm and LM head applied to intermediate states of the decoder.

    nostalgebraist (2020). For visual tokens the lens shows what a sink would say.

    Args:
        positions: A selection of positions.
        layers: Block indices, or None for all.
        k: How many tokens to keep.
        site: See `MassiveActivations`.
    """

    needs: ClassVar[str] = "head"

    positions: Selection = "last"
    layers: Any = None
    k: int = 5
    site: str = "resid_post"
    tower: Tower = "language"

    def reads(self, context: Context) -> list[Read]:
        """One read per layer."""
        if self.tower != "language":
            raise ProbeError(
                f"Got LogitLens(tower={self.tower!r}); expected 'language'. The vision tower has no "
                "LM head: follow its tokens through the projector with ss.trace_sinks."
            )
        rows = indices_of(context.flat("language", self.positions))
        parameters = {
            "norm": ("@module", context.anatomy.final_norm),
            "head": ("@module", context.anatomy.head),
            "positions": None if context.step else rows,
            "k": check_count(self.k, context.anatomy.vocab, "tokens"),
        }
        site = check_site(self.site)
        return [
            Read(Site("language", site, layer), kernels.lens, parameters)
            for layer in context.layers("language", self.layers)
        ]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> LensResult:
        """Stack the layers."""
        rows = context.positions("language", self.positions)
        there = rows >= 0
        return LensResult(
            mask_padding(stack_layers(answers, "tokens"), there, 2),
            mask_padding(stack_layers(answers, "logprobs"), there, 2),
            mask_padding(stack_layers(answers, "entropy"), there, 2),
            rows,
            context.layers("language", self.layers),
        )

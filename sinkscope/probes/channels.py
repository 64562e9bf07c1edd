"""Values of chosen channels before, in and after every block: who wrote a spike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.kernels import residual as kernels
from sinkscope.models.context import Context
from sinkscope.probes.protocol import Read
from sinkscope.probes.residual import check_dims, check_site
from sinkscope.probes.results import Unsaved, mask_padding, tidy
from sinkscope.sites import Site, Tower

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class ChannelResult(Unsaved):
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

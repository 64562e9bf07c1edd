"""Mean states of token groups, taken inside the forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.kernels import residual as kernels
from sinkscope.models.context import Context, check_groups
from sinkscope.probes.protocol import Read
from sinkscope.probes.residual import check_site
from sinkscope.probes.results import Unsaved, stack_layers, tidy
from sinkscope.sites import Site, Tower
from sinkscope.tokens import Selection

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class GroupMeansResult(Unsaved):
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

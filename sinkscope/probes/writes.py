"""What heads write: per key through the output projection, and in how many directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from sinkscope.kernels import writes as kernels
from sinkscope.models.context import Context
from sinkscope.probes.protocol import Read
from sinkscope.probes.results import Unsaved, mask_padding, stack_layers, tidy
from sinkscope.sites import Site, Tower

if TYPE_CHECKING:
    import pandas as pd


def follow_heads(
    context: Context, tower: Tower, layer: int, kernel: Any, parameters: Mapping[str, Any]
) -> list[Read]:
    """What follows heads of a block into the stream, and compares the whole with what the block adds.

    Args:
        context: The model and the sample.
        tower: The tower.
        layer: The block.
        kernel: The kernel that is asked at the attention site.
        parameters: Its parameters, but for what it follows heads through.

    Raises:
        ModelError: If the way of that block could not be read.
    """
    projection, through = context.tower(tower).write(layer)
    shared = {
        "projection": ("@module", projection),
        "live": context.pack(tower, context.live(tower), dim=1),
    }
    asked = {
        **parameters,
        **shared,
        "layout": context.layout(tower),
        "parts": ("@modules", through),
    }
    attention = ("@module", context.tower(tower).attention[layer])
    return [
        Read(Site(tower, "attention", layer), kernel, asked),
        Read(Site(tower, "attn_out", layer), kernels.arrives, {**shared, "attention": attention}),
    ]


def at_attention(answers: Mapping[Site, Any]) -> dict[Site, Any]:
    """The answers of attention sites."""
    return {site: answer for site, answer in answers.items() if site.name == "attention"}


@dataclass(frozen=True, eq=False)
class WriteResult(Unsaved):
    """Writes of every key and head.

    Attributes:
        norms: Float ``[batch layer head key]``, ``||D W_O^h v_j||_2``; NaN at padding.
        stable_rank: Float ``[batch layer head]``, at least 1, of the head's outputs.
        layers: The block indices, in order.
    """

    norms: Float[Tensor, "batch layer head key"]
    stable_rank: Float[Tensor, "batch layer head"]
    layers: tuple[int, ...]

    def ratio(self) -> Float[Tensor, "batch layer head key"]:
        """Every key's write over the mean of the other live keys: ``ratio_out`` of 2606.08105."""
        live = ~self.norms.isnan()
        total = self.norms.nansum(dim=-1, keepdim=True)
        others = (live.sum(dim=-1, keepdim=True) - 1).clamp(min=1)
        return self.norms / ((total - self.norms) / others)

    def to_dataframe(self) -> pd.DataFrame:
        """Columns batch, layer, head, key, norm."""
        axes = ("batch", "layer", "head", "key")
        return tidy({"norm": self.norms}, axes, {"layer": self.layers})


@dataclass(frozen=True, eq=False)
class HeadWrites:
    """What every key would add to the residual stream, per head, were it fully attended.

    Tells a sink that writes next to nothing (NOP) from one that broadcasts its value, with the
    definitions of Fesser et al. (2606.08105), ``u = D W_O v``; see
    `sinkscope.experiments.nop_or_broadcast`. ``D`` is what lies between the output projection and the
    stream: a factor per channel (LayerScale in DINOv2), a number (Granite), or the weight of a norm
    (Gemma, OLMo 2). Such a norm also divides every query by the size of attention's whole output. That
    is one number for all keys of a query, so it is left out of `norms`, which are then to be compared
    among keys of one layer, as `ratio` does; `stable_rank` has it.

    Args:
        layers: Block indices, or None for all.
        tower: ``"language"`` or ``"vision"``.
    """

    layers: Any = None
    tower: Tower = "language"

    def reads(self, context: Context) -> list[Read]:
        """Two reads per layer: attention, and what it adds."""
        return [
            read
            for layer in context.layers(self.tower, self.layers)
            for read in follow_heads(context, self.tower, layer, kernels.head_writes, {})
        ]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> WriteResult:
        """Stack the layers and mask the padding."""
        answers = at_attention(answers)
        keys = context.live_keys(self.tower)
        norms = mask_padding(stack_layers(answers, "norms", keys=keys.shape[1]), keys, 3)
        live = context.live(self.tower).any(dim=1)
        rank = stack_layers(answers, "rank").masked_fill(~live[:, None, None], float("nan"))
        return WriteResult(norms, rank, context.layers(self.tower, self.layers))

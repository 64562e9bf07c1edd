"""What heads write: per key through the output projection, and in how many directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.kernels import attention as attention_kernels
from sinkscope.kernels import writes
from sinkscope.kernels import writes as kernels
from sinkscope.protocols import Read
from sinkscope.results import Result, mask_padding, stack_layers, tidy
from sinkscope.sites import Site, Tower
from sinkscope.tokens import Selection

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
class WriteResult(Result):
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

    needs: ClassVar[str] = "head_writes"

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


@dataclass(frozen=True, eq=False)
class ValueNormResult(Result):
    """Norms of the value vectors.

    Attributes:
        norms: Float ``[batch layer kv_head pos]``; NaN at padding.
        layers: The block indices, in order.
    """

    norms: Float[Tensor, "batch layer kv_head pos"]
    layers: tuple[int, ...]

    def ratio(self) -> Float[Tensor, "batch layer kv_head pos"]:
        """Every token's norm over the mean norm of the other live tokens of its row.

        ``ratio_head`` of Fesser et al. (2606.08105): at most 0.2 means that a sink writes next to
        nothing.
        """
        live = ~self.norms.isnan()
        total = self.norms.nansum(dim=-1, keepdim=True)
        others = (live.sum(dim=-1, keepdim=True) - 1).clamp(min=1)
        return self.norms / ((total - self.norms) / others)

    def to_dataframe(self) -> pd.DataFrame:
        """Columns batch, layer, kv_head, pos, norm."""
        axes = ("batch", "layer", "kv_head", "pos")
        return tidy({"norm": self.norms}, axes, {"layer": self.layers})


@dataclass(frozen=True, eq=False)
class ValueNorms:
    """L2 norm of every value vector, after the run's edits. With GQA there is one per key-value head.

    An edit of values for some heads or queries beside it is refused: there is not one value per key.

    Args:
        layers: Block indices, or None for all.
        tower: ``"language"`` or ``"vision"``.
    """

    needs: ClassVar[str] = "attention"

    layers: Any = None
    tower: Tower = "language"

    def reads(self, context: Context) -> list[Read]:
        """One read per layer."""
        layout = context.layout(self.tower)
        return [
            Read(
                Site(self.tower, "attention", layer),
                attention_kernels.value_norms,
                {"layout": layout},
            )
            for layer in context.layers(self.tower, self.layers)
        ]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> ValueNormResult:
        """Stack the layers and mask the padding."""
        live = context.live_keys(self.tower)
        norms = mask_padding(stack_layers(answers, keys=live.shape[1]), live, 3)
        return ValueNormResult(norms, context.layers(self.tower, self.layers))


@dataclass(frozen=True, eq=False)
class AttentionValueResult(Result):
    """Whole value vectors of chosen tokens.

    Attributes:
        values: Float ``[batch layer kv_head pos d_head]``; NaN at padding and at tokens not chosen.
        layers: The block indices, in order.
        tower: Which tower was read.
    """

    values: Float[Tensor, "batch layer kv_head pos d_head"]
    layers: tuple[int, ...]
    tower: Tower

    def to_dataframe(self) -> pd.DataFrame:
        """Columns batch, layer, kv_head, pos, dim, value: one line per number."""
        axes = ("batch", "layer", "kv_head", "pos", "dim")
        return tidy({"value": self.values}, axes, {"layer": self.layers})


@dataclass(frozen=True, eq=False)
class AttentionValues:
    """The value vectors that attention reads, for replacing or patching them in another run.

    With GQA there is one per key-value head. At a decode step they are those of every key in the
    cache, and NaN where a sliding cache has dropped it. They are read after the run's edits; an edit
    of values for some heads or queries beside this probe is refused, because then there is not one
    value per key. A large result: ``batch x layers x positions x kv_heads x d_head`` numbers.

    Args:
        layers: Block indices, or None for all.
        tokens: Which tokens of the prompt to keep.
        tower: ``"language"`` or ``"vision"``.
    """

    needs: ClassVar[str] = "attention"

    layers: Any = None
    tokens: Selection = "all"
    tower: Tower = "language"

    def reads(self, context: Context) -> list[Read]:
        """One read per layer."""
        context.flat(self.tower, self.tokens)
        layout = context.layout(self.tower)
        return [
            Read(Site(self.tower, "attention", layer), attention_kernels.values, {"layout": layout})
            for layer in context.layers(self.tower, self.layers)
        ]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> AttentionValueResult:
        """Stack the layers and mask what was not chosen."""
        kept = context.live_keys(self.tower).clone()
        chosen = context.flat(self.tower, self.tokens)
        kept[:, : chosen.shape[1]] &= chosen
        values = mask_padding(stack_layers(answers, axis=-2, keys=kept.shape[1]), kept, 3)
        layers = context.layers(self.tower, self.layers)
        return AttentionValueResult(values, layers, self.tower)


@dataclass(frozen=True, eq=False)
class ContributionResult(Result):
    """What each key group writes into the residual stream.

    Attributes:
        norms: Float ``[batch layer query group]``, L2 norm of the group's write over all heads.
        per_head: Float ``[batch layer head query group]``, the same for each head alone.
        groups: The group names.
        layers: The block indices, in order.
        positions: Int ``[batch query]`` position of every query, -1 where there is none.
    """

    norms: Float[Tensor, "batch layer query group"]
    per_head: Float[Tensor, "batch layer head query group"]
    groups: tuple[str, ...]
    layers: tuple[int, ...]
    positions: Int[Tensor, "batch query"]

    def to_dataframe(self) -> pd.DataFrame:
        """Columns batch, layer, query, group, norm."""
        axes = ("batch", "layer", "query", "group")
        names = {"layer": self.layers, "query": self.positions, "group": self.groups}
        return tidy({"norm": self.norms}, axes, names)


@dataclass(frozen=True, eq=False)
class ContributionNorms:
    """How much each group of keys adds to the residual stream through attention. Exact.

    ``|| D sum_h (A_h 1_g v_h) W_O^h ||_2``: attention alone does not say whether a sink writes
    anything (Kobayashi et al. 2020; Kang et al. 2503.03321 use it per head). ``D`` is what lies
    between the output projection and the stream: a factor per channel (LayerScale in DINOv2), a number
    (Granite), or a norm (Gemma, OLMo 2), which for one query multiplies by its weight and divides by
    the size of the whole output. The groups of a partition and the biases add up, as vectors, to
    ``attn_out``; the bias of the projection belongs to no group. One attention call per group and
    layer.

    Args:
        groups: Name -> selection.
        layers: Block indices, or None for all.
        tower: ``"language"`` or ``"vision"``.
    """

    needs: ClassVar[str] = "contributions"

    groups: Mapping[str, Selection]
    layers: Any = None
    tower: Tower = "language"

    def reads(self, context: Context) -> list[Read]:
        """Two reads per layer: attention, and what it adds."""
        _, onehot = context.groups(self.tower, self.groups)
        shared = onehot.shape[1] == 1
        return [
            read
            for layer in context.layers(self.tower, self.layers)
            for read in follow_heads(
                context,
                self.tower,
                layer,
                writes.contribution_norms,
                {"groups": onehot[:, 0 if shared else layer].contiguous()},
            )
        ]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> ContributionResult:
        """Stack the layers and mask the padding."""
        live, answers = context.live(self.tower), at_attention(answers)
        names, _ = context.groups(self.tower, self.groups)
        return ContributionResult(
            mask_padding(stack_layers(answers, "norms"), live, 2),
            mask_padding(stack_layers(answers, "per_head"), live, 3),
            names,
            context.layers(self.tower, self.layers),
            context.positions(self.tower),
        )

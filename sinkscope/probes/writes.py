"""What heads write: per key through the output projection, and in how many directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.kernels import attention, writes
from sinkscope.kernels.writes import over_others
from sinkscope.probes.per_layer import AttentionProbe, chosen_of, spread
from sinkscope.probes.residual import ScoreResult
from sinkscope.protocols import Read
from sinkscope.results import Record, Result, stack_layers
from sinkscope.sites import Site, Tower
from sinkscope.tokens import Selection


class WritingProbe(AttentionProbe):
    """A probe that follows heads of every block into the stream, and proves it on what the block adds."""

    def reads(self, context: Context) -> list[Read]:
        """Two reads per layer: attention, and what it adds."""
        name, reads = self.tower, []
        tower, live = context.tower(name), context.pack(name, context.live(name), dim=1)
        for read in super().reads(context):
            layer = read.site.layer
            projection, through = tower.write(layer)
            shared = {"projection": ("@module", projection), "live": live}
            asked = {**read.parameters, **shared, "parts": ("@modules", through)}
            whole = {**shared, "attention": ("@module", tower.attention[layer])}
            reads.append(Read(read.site, self.kernel, asked))
            reads.append(Read(Site(name, "attn_out", layer), writes.arrives, whole))
        return reads


@dataclass(frozen=True, eq=False)
class WriteResult(Result, columns={"norm": "norms"}):
    """Writes of every key and head: ``norms`` are ``||D W_O^h v_j||_2``, NaN at padding; ``stable_rank`` is
    that of the head's outputs, at least 1."""

    norms: Float[Tensor, "batch layer head key"]
    stable_rank: Float[Tensor, "batch layer head"]
    layers: tuple[int, ...]

    def ratio(self) -> Float[Tensor, "batch layer head key"]:
        """Every key's write over the mean of the other live keys: ``ratio_out`` of 2606.08105."""
        return over_others(self.norms)


@dataclass(frozen=True, eq=False)
class HeadWrites(
    WritingProbe, kernel=writes.head_writes, result=WriteResult, needs="head_writes", per_key=True
):
    """What every key would add to the residual stream, per head, were it fully attended.

    Tells a sink that writes next to nothing (NOP) from one that broadcasts its value (Fesser et al.,
    2606.08105), ``u = D W_O v``; see `sinkscope.experiments.nop_or_broadcast`. ``D`` lies between the output
    projection and the stream: a factor per channel (LayerScale in DINOv2), a number (Granite), or the weight
    of a norm (Gemma, OLMo 2). Such a norm also divides every query by the size of attention's whole output,
    one number for all its keys: `norms` leave it out, and are then to be compared among keys of one layer, as
    `ratio` does; `stable_rank` has it.
    """

    layers: Any = None
    tower: Tower = "language"


@dataclass(frozen=True, eq=False)
class ValueNormResult(Result, columns={"norm": "norms"}):
    """Norms of the value vectors, NaN at padding."""

    norms: Float[Tensor, "batch layer kv_head pos"]
    layers: tuple[int, ...]

    def ratio(self) -> Float[Tensor, "batch layer kv_head pos"]:
        """Every token's norm over the mean norm of the row's other live tokens: ``ratio_head`` of Fesser et
        al. (2606.08105). At most 0.2 means that a sink writes next to nothing."""
        return over_others(self.norms)


@dataclass(frozen=True, eq=False)
class ValueNorms(
    AttentionProbe, kernel=attention.value_norms, result=ValueNormResult, per_key=True
):
    """L2 norm of every value vector, after the run's edits; with GQA one per key-value head. Edits of values
    for some heads or queries in the same run are refused: there is not one value per key."""

    layers: Any = None
    tower: Tower = "language"


@dataclass(frozen=True, eq=False)
class AttentionValueResult(Result, columns={"value": "values"}):
    """Whole value vectors of chosen tokens; NaN at padding and at tokens not chosen."""

    values: Float[Tensor, "batch layer kv_head pos d_head"]
    layers: tuple[int, ...]
    tower: Tower


@dataclass(frozen=True, eq=False)
class AttentionValues(
    AttentionProbe, kernel=attention.values, result=AttentionValueResult, per_key=True
):
    """The value vectors that attention reads, for replacing or patching them in another run.

    With GQA there is one per key-value head; for edits of the same run see `ValueNorms`. At a decode step
    they are those of every key in the cache, NaN where a sliding cache has dropped it. ``tokens`` selects
    which tokens of the prompt to keep. A large result.
    """

    layers: Any = None
    tokens: Selection = "all"
    tower: Tower = "language"

    def _parameters(self, context: Context) -> dict[str, Any]:
        return {"chosen": chosen_of(context, self.tower, self.tokens)}

    def finish(self, answers: Mapping[Site, Any], context: Context) -> Any:
        """Stack the layers; NaN at all other tokens."""
        chosen = chosen_of(context, self.tower, self.tokens)
        return super().finish(spread(answers, chosen, context.live_keys(self.tower), 2), context)

    def _kept(self, context: Context) -> Tensor:
        kept, chosen = super()._kept(context).clone(), context.flat(self.tower, self.tokens)
        kept[:, : chosen.shape[1]] &= chosen
        return kept


@dataclass(frozen=True, eq=False)
class ContributionResult(Result, columns={"norm": "norms"}):
    """L2 norm of what each key group writes into the residual stream: over all heads, and of each alone."""

    norms: Float[Tensor, "batch layer query group"]
    per_head: Float[Tensor, "batch layer head query group"]
    groups: tuple[str, ...]
    layers: tuple[int, ...]
    positions: Int[Tensor, "batch query"]


@dataclass(frozen=True, eq=False)
class ContributionNorms(
    WritingProbe, kernel=writes.contribution_norms, result=ContributionResult, needs="contributions"
):
    """How much each group of keys adds to the residual stream through attention. Exact.

    ``|| D sum_h (A_h 1_g v_h) W_O^h ||_2``: attention alone does not say whether a sink writes anything
    (Kobayashi et al. 2020; Kang et al. 2503.03321 use it per head). ``D`` is as for `HeadWrites`, here with
    the size of the whole output. The groups of a partition and the biases add up, as vectors, to
    ``attn_out``; the bias of the projection belongs to no group. One attention call per group and layer.
    """

    groups: Mapping[str, Selection]
    layers: Any = None
    tower: Tower = "language"

    def _parameters(self, context: Context) -> dict[str, Any]:
        return {"groups": self._groups(context, self.groups)}


@dataclass(frozen=True, eq=False)
class BlockWriters(Record):
    """Which half of some LLM blocks writes more into every token's largest channel: positive scores are
    attention's. No block is the last one, whose output no attention reads."""

    halves: ClassVar[tuple[str, ...]] = ("attn_out", "mlp_out")
    blocks: Sequence[int]
    tower: Tower = "language"

    def reads(self, context: Context) -> list[Read]:
        """Both halves of every block, and what the next block reads."""
        reads = []
        for block in self.blocks:
            sites = {half: Site(self.tower, half, block) for half in self.halves}
            reads += [Read(at, writes.keep_half, {"half": half}) for half, at in sites.items()]
            after, halves = Site(self.tower, "resid_pre", block + 1), {"halves": self.halves}
            reads.append(Read(after, writes.more_written, halves))
        return reads

    def finish(self, answers: Mapping[Site, Any], context: Context) -> ScoreResult:
        """Stack the blocks."""
        told = {site: answer for site, answer in answers.items() if site.name == "resid_pre"}
        return ScoreResult(stack_layers(told), tuple(self.blocks))

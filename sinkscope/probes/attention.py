"""Attention probes: exact, under the model's own kernel, and never an N x N matrix at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.checks import check_choice
from sinkscope.errors import ProbeError
from sinkscope.kernels import attention as kernels
from sinkscope.kernels.received import received
from sinkscope.probes.per_layer import AttentionProbe
from sinkscope.probes.residual import MassiveActivations, MassiveResult
from sinkscope.protocols import Read
from sinkscope.results import Record, Result, in_layers, over_layers, stack_layers, tidy
from sinkscope.sites import Site, Tower
from sinkscope.tokens import Selection
from sinkscope.viz import plot_heads

ROUTED = 0.9  # the share of queries that must route to a key in a sink event (2606.08105)
LEAST_SEEING = 8  # other queries that must see a key for their mean to be worth comparing
# Where states are judged: what attention reads in the LLM, what the projector may read in the ViT.
STATE_SITE = {"language": "resid_pre", "vision": "resid_post"}


@dataclass(frozen=True, eq=False)
class MassResult(Result, columns={"mass": "mass", "null": "null"}):
    """Attention mass per key group, in [0, 1] and NaN at padding. ``null`` is that of uniform attention under
    the model's own mask, or None if it was not asked for."""

    mass: Float[Tensor, "batch layer head query group"]
    null: Float[Tensor, "batch layer query group"] | None
    groups: tuple[str, ...]
    layers: tuple[int, ...]
    queries: Int[Tensor, "batch query"]

    def group(self, name: str) -> Float[Tensor, "batch layer head query"]:
        """The mass on one group; ProbeError if there is none."""
        hint = "Name what you want to measure in AttentionMass(groups={...})."
        check_choice(self.groups, group=name, error=ProbeError, hint=hint)
        return self.mass[..., self.groups.index(name)]

    def by_layer(self) -> Float[Tensor, "layer group"]:
        """Mean mass over rows, heads and queries."""
        return self.mass.nanmean(dim=(0, 2, 3))

    def null_by_layer(self) -> Float[Tensor, "layer group"] | None:
        """Mean null over rows and queries."""
        return None if self.null is None else self.null.nanmean(dim=(0, 2))

    def plot_heads(self, group: str, row: int | None = None, *, query: int | None = None) -> Figure:
        """A layer x head map of the mass on a group, with the head that gives the most and its null, of a
        ``row`` of the batch and a ``query`` position; None for the mean over those measured."""
        return plot_heads(self, group, row, query=query)


@dataclass(frozen=True, eq=False)
class AttentionMass(
    AttentionProbe, kernel=kernels.group_mass, result=MassResult, needs="masses", over="queries"
):
    """How much attention each query pays to each group of keys, per head. Exact.

    ``mass[q, g] = sum_{k in g} A[q, k]``, computed as the model's own attention on one-hot values.
    ``groups`` is name -> selection, such as ``{"bos": "bos"}``; they may overlap, and masks may differ by
    layer. What is in no group (and, at decode steps, what was generated) is the rest. ``queries`` is a
    selection, or None for all; at a decode step the one query is used. ``null`` costs one more attention call
    per kind of mask. ``precision`` is ``"model"`` (in bf16 rounded by about 6e-3) or ``"float32"``.
    """

    groups: Mapping[str, Selection]
    layers: Any = None
    queries: Selection | None = None
    tower: Tower = "language"
    null: bool = True
    precision: str = "model"

    def _parameters(self, context: Context) -> dict[str, Any]:
        check_choice(("model", "float32"), precision=self.precision, error=ProbeError)
        float32 = self.precision == "float32"
        if float32:
            self._refuse_flash(context, "AttentionMass(precision='float32')")
        groups, rows = self._groups(context, self.groups), self._rows(context, self.queries)
        return {"groups": groups, "rows": rows, "null": self.null, "float32": float32}


@dataclass(frozen=True, eq=False)
class ReceivedResult(Result, columns={"received": "received", "null": "null"}):
    """Mean attention received by every key, in [0, 1]; NaN at padding. Nulls are uniform attention.

    ``received`` is the published measure: the token's own query counts, so the last token of a prompt
    receives what it gives itself. ``others`` is the mean over the queries of other tokens, if asked for;
    NaN where fewer than 8 of them see the key. With ``events``, ``sink`` is the key that takes most
    attention in a head, ``sink_mass`` the mean weight on it and ``routed`` the share of queries that give it
    at least half of theirs, both over the live queries that see it.
    """

    received: Float[Tensor, "batch layer head key"]
    null: Float[Tensor, "batch layer key"] | None
    layers: tuple[int, ...]
    others: Float[Tensor, "batch layer head key"] | None = None
    others_null: Float[Tensor, "batch layer key"] | None = None
    sink: Int[Tensor, "batch layer head"] | None = None
    sink_mass: Float[Tensor, "batch layer head"] | None = None
    routed: Float[Tensor, "batch layer head"] | None = None

    def at(self, layers: Sequence[int]) -> ReceivedResult:
        """The same in some of its layers."""
        return in_layers(self, layers)

    def sink_rate(self, epsilon: float = 0.3) -> Float[Tensor, "layer key"]:
        """The share of rows and heads in which a key receives more than ``epsilon``: ``Sink_k^eps`` of Gu et
        al. (2410.10781) by layer. It depends on the length of the prompt; theirs is of 64 tokens
        (`sinkscope.published.sink_rate`)."""
        above = (self.received > epsilon).float().masked_fill(self.received.isnan(), float("nan"))
        return above.nanmean(dim=(0, 2))

    def event(self, least: float = ROUTED) -> Bool[Tensor, "batch layer head"]:
        """Whether a head has a sink event: at least 90 % of the queries that see its dominant key give it at
        least 0.5 (Fesser et al., 2606.08105). ProbeError if it was not asked for."""
        if self.routed is None:
            raise ProbeError(
                "Got a result without sink events; expected them. Write ReceivedAttention(events=True); "
                "decode steps have one query and no events."
            )
        return self.routed >= least

    def excess(self) -> Float[Tensor, "batch layer head key"]:
        """What other tokens give beyond uniform attention, in [-1, 1]; ProbeError if it was not asked for.
        Tokens are ranked by it and not by `times_null`, which for a token that many see is never large."""
        others, null = self._of_others()
        return others - null

    def times_null(self) -> Float[Tensor, "batch layer head key"]:
        """What other tokens give as a multiple of uniform attention; raises as `excess` does."""
        others, null = self._of_others()
        return others / null

    def _of_others(self) -> tuple[Tensor, Tensor]:
        if self.others is None or self.others_null is None:
            raise ProbeError(
                "Got a result without the attention of other tokens and its null; expected both. "
                "Write ReceivedAttention(others=True)."
            )
        return self.others, self.others_null[:, :, None]


@dataclass(frozen=True, eq=False)
class ReceivedAttention(
    AttentionProbe, kernel=received, result=ReceivedResult, needs="gradients", per_key=True
):
    """Mean attention each key receives from the queries that can see it, per head. Exact.

    ``r_k = sum_i A_ik / #{i : i sees k}`` over live queries (Gu et al., 2410.10781, section 3), from log-sum-exps
    where torch's kernels give them (in half precision within 1e-4), else in fp32 as the gradient of attention by
    its values. ``queries`` is a selection, or None for all live ones. ``others`` asks for the mean over other
    tokens' queries too, for `ReceivedResult.excess`, and needs ``null``. ``events`` asks for the dominant key of
    every head and how many queries route to it, for `ReceivedResult.event`.
    """

    layers: Any = None
    queries: Selection | None = None
    tower: Tower = "language"
    null: bool = True
    others: bool = False
    events: bool = False

    def _parameters(self, context: Context) -> dict[str, Any]:
        self._refuse_flash(context)
        if self.others and not self.null:
            raise ProbeError("Got others=True, null=False; expected the null too. Write null=True.")
        live = context.live(self.tower)
        if self.queries is not None and not context.step:
            live = live & context.flat(self.tower, self.queries)
        events = self.events and not context.step
        asked = {"null": self.null, "others": self.others, "events": events}
        return {"live": context.pack(self.tower, live, dim=1), **asked}

    def finish(self, answers: Mapping[Site, Any], context: Context) -> ReceivedResult:
        """Stack the layers and mask the padding, and keys that fewer than 8 other tokens see."""
        found = super().finish(answers, context)
        if not self.others:
            return found
        few = stack_layers(answers, "seeing", keys=found.others_null.shape[2]) < LEAST_SEEING
        found.others.masked_fill_(few[:, :, None], float("nan"))
        found.others_null.masked_fill_(few, float("nan"))
        return found


@dataclass(frozen=True, eq=False)
class PatternResult(Result, columns={"attention": "patterns"}):
    """Attention weights of chosen queries; NaN where a row is absent or a key is padding. Rows sum to 1, or
    less where the model has a learned sink."""

    patterns: Float[Tensor, "batch layer head row key"]
    rows: Int[Tensor, "batch row"]
    layers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AttentionPatterns(
    AttentionProbe,
    kernel=kernels.patterns,
    result=PatternResult,
    needs="gradients",
    over="rows",
    per_key=True,
):
    """Attention weights of chosen queries, and only those. Exact. ``rows`` selects the queries, such as
    ``"last"``; at a decode step the one query is used."""

    rows: Selection = "last"
    layers: Any = None
    tower: Tower = "language"

    def _parameters(self, context: Context) -> dict[str, Any]:
        self._refuse_flash(context)
        rows = context.packed_rows(self.tower, context.flat(self.tower, self.rows))
        return {"rows": torch.zeros(len(rows), 1, dtype=torch.long) if context.step else rows}


@dataclass(frozen=True, eq=False)
class EvidenceResult(Result):
    """Spikes and attention of every token, in the LLM in ``layers``.

    In the vision tower ``received`` has all blocks. ``first`` are the largest channels in the LLM's
    embeddings, ``[batch 1 pos k]``, None in the vision tower; ``judged`` the tokens that are compared with
    one another: live tokens of the LLM, patches of the vision tower.
    """

    massive: MassiveResult
    received: ReceivedResult
    first: MassiveResult | None
    judged: Bool[Tensor, "batch pos"]
    layers: tuple[int, ...]

    def medians(self) -> Float[Tensor, "batch layer pos"]:
        """Every token's largest ``|h|`` over the layer's median; NaN at padding."""
        return self.massive.ratio()

    def upper_quartile(self) -> Float[Tensor, "batch layer"]:
        """The value of `medians` that a quarter of the judged tokens reaches, NaN where none is judged."""
        return self._quartile.clone()

    @cached_property
    def _quartile(self) -> Tensor:
        # Of n numbers that with the index ceil(0.75 (n - 1)) = 3n // 4; NaN counts as larger than all.
        ratios = self.medians().masked_fill(~self.judged[:, None], float("nan"))
        count, out = (~ratios.isnan()).sum(dim=-1), torch.full_like(ratios[..., 0], float("nan"))
        for n in set(count.unique().tolist()) - {0}:
            out[count == n] = ratios[count == n].kthvalue(3 * n // 4 + 1, dim=-1).values
        return out

    def prominence(self) -> Float[Tensor, "batch layer pos"]:
        """Every token's largest ``|h|`` over the layer's upper quartile of it: about 1 without spikes."""
        return self.medians() / self.upper_quartile()[..., None]

    def drawn(self) -> Float[Tensor, "batch layer pos"]:
        """The most that some head of the layer gives a token beyond uniform attention, in [-1, 1]: from other
        tokens only, NaN where fewer than 8 of them see it."""
        return self._drawn.clone()

    @cached_property
    def _drawn(self) -> Tensor:
        others, null = self.received._of_others()
        most = others.amax(dim=2)  # what is largest stays so when the null is taken away
        heads = others.movedim(2, -1)[odd := most.isnan()]  # NaN in some head or in all
        known = heads.nan_to_num(nan=-1.0).amax(dim=-1)
        most[odd] = known.masked_fill(heads.isnan().all(dim=-1), float("nan"))
        return most - null[:, :, 0]

    def growth(self) -> Float[Tensor, "batch layer pos"]:
        """By how much a token's largest channel grew since the embeddings, in medians of its layer; at least,
        where the channel was not among the 16 largest there. Infinite in the vision tower."""
        now = self.medians()
        if self.first is None:
            return torch.full_like(now, float("inf")).masked_fill(now.isnan(), float("nan"))
        before = self.first.values.abs() / self.first.median[..., None, None]
        same = self.first.channels == self.massive.channels[..., :1]
        there = torch.where(same, before, torch.zeros_like(before)).amax(dim=-1)
        return now / torch.where(same.any(dim=-1), there, before[..., -1].expand_as(there))

    def at(self, layers: Sequence[int]) -> EvidenceResult:
        """The same with the states of some layers only; a vision tower's attention stays whole."""
        massive = in_layers(self.massive, layers)
        received = self.received if self.first is None else self.received.at(layers)
        return replace(self, massive=massive, received=received, layers=tuple(layers))

    def to_dataframe(self) -> pd.DataFrame:
        """Columns batch, layer, pos, medians, prominence: one line per token and layer."""
        columns = {"medians": self.medians(), "prominence": self.prominence()}
        names = {"layer": self.layers, "pos": self.massive.positions}
        return tidy(columns, ("batch", "layer", "pos"), names)


@dataclass(frozen=True, eq=False)
class SinkEvidence(Record):
    """What tells a sink: how large its state is, and how much attention other tokens give it.

    Spikes are read at ``resid_pre`` in the LLM (what a block's attention reads) and at ``resid_post`` in the
    vision tower (what the projector may read). Attention is NaN in layers that have none.
    """

    needs: ClassVar[str] = "gradients"
    layers: Any = None
    tower: Tower = "language"

    def _parts(self, context: Context) -> tuple[MassiveActivations, ReceivedAttention]:
        layers, tower = context.layers(self.tower, self.layers), context.tower(self.tower)
        k, vision = min(16, tower.d_model), self.tower == "vision"  # k finds a spike in the first
        read = layers if vision else sorted({0, *layers})
        some = [i for i in tower.attending if vision or i in layers]  # those that attend
        massive = MassiveActivations(read, self.tower, k, STATE_SITE[self.tower])
        return massive, ReceivedAttention(some, None, self.tower, others=True, events=not vision)

    def reads(self, context: Context) -> list[Read]:
        """States and attention of every layer."""
        return [r for part in self._parts(context) if part.layers for r in part.reads(context)]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> EvidenceResult:
        """Both results, and the embeddings' channels apart."""
        massive, received = self._parts(context)
        attention = {site: answers[site] for site in answers if site.name == "attention"}
        layers, states = context.layers(self.tower, self.layers), massive.finish(answers, context)
        drawn = received.finish(attention, context) if received.layers else None
        drawn = _unread(self.tower, context) if drawn is None else drawn
        every = context.layers("vision", None) if self.tower == "vision" else layers
        drawn = over_layers(drawn, every)
        first, judged = in_layers(states, states.layers[:1]), context.live(self.tower)
        if self.tower == "vision":
            first, judged = None, context.tokens.vision.select("patch")
        return EvidenceResult(in_layers(states, layers), drawn, first, judged, layers)


def _unread(tower: Tower, context: Context) -> ReceivedResult:
    """What is received where no layer attends: a result without a layer."""
    rows, keys = context.live_keys(tower).shape
    heads = max(1, context.tower(tower).heads)
    by_head, by_key = torch.zeros(rows, 0, heads, keys), torch.zeros(rows, 0, keys)
    event = torch.zeros(rows, 0, heads) if tower == "language" and not context.step else None
    sink = None if event is None else event.long()
    return ReceivedResult(by_head, by_key, (), by_head, by_key, sink, event, event)

"""What tells sinks from other tokens, whole or reduced where the model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.kernels import closing
from sinkscope.probes.attention import (
    LEAST_SEEING,
    STATE_SITE,
    ReceivedAttention,
    ReceivedResult,
    ReceivedSummary,
)
from sinkscope.probes.residual import MassiveActivations, MassiveResult
from sinkscope.probes.writes import BlockWriters, HeadWrites
from sinkscope.protocols import Read
from sinkscope.results import Record, Result, in_layers, mask_padding, over_layers, tidy, wide
from sinkscope.sites import Site, Tower, in_order

KEPT = 16  # tokens whose attention by head is sent with detail="sinks"


@dataclass(frozen=True, eq=False)
class EvidenceResult(Result):
    """Spikes and attention of every token, in the LLM in ``layers``.

    In the vision tower ``received`` has all blocks. ``first`` are the largest channels in the LLM's
    embeddings, ``[batch 1 pos k]``, None in the vision tower; ``judged`` the tokens that are compared with
    one another: live tokens of the LLM, patches of the vision tower.
    """

    massive: MassiveResult
    received: ReceivedResult | ReceivedSummary
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
        return self.by_key.drawn - self.by_key.others_null

    @cached_property
    def by_key(self) -> ReceivedSummary:
        """What every key receives, reduced over heads."""
        return self.received.by_key()

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

    def parts(self, context: Context) -> tuple[MassiveActivations, ReceivedAttention]:
        """What it is made of: probes of states and of attention."""
        layers, tower = context.layers(self.tower, self.layers), context.tower(self.tower)
        k, vision = min(16, tower.d_model), self.tower == "vision"  # k finds a spike in the first
        read = layers if vision else sorted({0, *layers})
        some = [i for i in tower.attending if vision or i in layers]  # those that attend
        massive = MassiveActivations(read, self.tower, k, STATE_SITE[self.tower])
        return massive, ReceivedAttention(some, None, self.tower, others=True, events=not vision)

    def reads(self, context: Context) -> list[Read]:
        """States and attention of every layer."""
        return [r for part in self.parts(context) if part.layers for r in part.reads(context)]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> EvidenceResult:
        """Both results, and the embeddings' channels apart."""
        massive, received = self.parts(context)
        attention = {site: answers[site] for site in answers if site.name == "attention"}
        states = massive.finish(answers, context)
        drawn = received.finish(attention, context) if received.layers else None
        first = None if self.tower == "vision" else in_layers(states, states.layers[:1])
        return self.joined(states, drawn or _unread(self.tower, context), first, context)

    def joined(self, states: Any, drawn: Any, first: Any, context: Context) -> EvidenceResult:
        """The evidence of states and attention, in all layers asked for; see `EvidenceResult`."""
        layers, judged = context.layers(self.tower, self.layers), context.live(self.tower)
        every = layers
        if self.tower == "vision":
            every, judged = context.layers("vision", None), context.tokens.vision.select("patch")
        return EvidenceResult(
            in_layers(states, layers), over_layers(drawn, every), first, judged, layers
        )


def _unread(tower: Tower, context: Context) -> ReceivedResult:
    """What is received where no layer attends: a result without a layer."""
    rows, keys = context.live_keys(tower).shape
    heads = max(1, context.tower(tower).heads)
    by_head, by_key = torch.zeros(rows, 0, heads, keys), torch.zeros(rows, 0, keys)
    event = torch.zeros(rows, 0, heads) if tower == "language" and not context.step else None
    sink = None if event is None else event.long()
    return ReceivedResult(by_head, by_key, (), by_head, by_key, sink, event, event)


@dataclass(frozen=True, eq=False)
class Gathered(Record):
    """A probe whose answers stay where the model is, for a `Closing`; with ``full`` they are sent too.

    ``parts`` is site -> the name under which a `Closing` finds what is answered there.
    """

    probe: Any
    parts: Mapping[str, str]
    full: bool = False

    @property
    def tower(self) -> Tower:
        """That of the probe."""
        return self.probe.tower

    def reads(self, context: Context) -> list[Read]:
        """Those of the probe, wrapped."""
        reads = []
        for read in self.probe.reads(context):
            part, layer = self.parts.get(read.site.name, "unread"), read.site.layer
            own = {"kernel": read.kernel, "part": part, "at": layer, "full": self.full}
            reads.append(Read(read.site, closing.gathered, {**read.parameters, **own}))
        return reads

    def finish(self, answers: Mapping[Site, Any], context: Context) -> Any:
        """The probe's result, None if the answers stayed."""
        return self.probe.finish(answers, context) if self.full else None


@dataclass(frozen=True, eq=False)
class Closed(Result):
    """What a `Closing` found, rows being images in the vision tower.

    Attributes:
        values: The largest channels of every token, ``[batch pos k]``, in the LLM in the layer with its
            largest activation, else in the block asked for; ``channels``: which they are.
        wrote: Block -> ``[batch pos]``: whether attention writes more than the MLP into the largest channel.
        at_head: In the LLM, ``[batch pos]``: what the token ``received``, and ``norm``, ``ratio`` and ``rank``
            of its write, where others give it the most beyond uniform attention. Empty if none attends.
        evidence: What is kept of the evidence; None if all of it was sent, with the first of the probes.
    """

    values: Tensor
    channels: Tensor
    wrote: Mapping[int, Tensor]
    at_head: Mapping[str, Tensor]
    evidence: EvidenceResult | None


@dataclass(frozen=True, eq=False)
class Closing(Record):
    """Reduce what other probes of a tower gathered, at the last of their sites; it must stand behind them.

    ``parts`` are those probes, a `SinkEvidence` first, and ``blocks`` those that are told apart in halves.
    ``feed`` is the vision block whose largest channels are kept.
    """

    parts: Sequence[Gathered]
    blocks: tuple[int, ...] = ()
    feed: int = -1

    @property
    def tower(self) -> Tower:
        """That of the probes."""
        return self.parts[0].tower

    @classmethod
    def of(cls, evidence: SinkEvidence, anatomy: Any, full: bool, feed: int = -1) -> Closing:
        """With all that a trace reads of a tower beside the evidence, in blocks where that is known."""
        name, layers, tower = evidence.tower, evidence.layers, anatomy.tower(evidence.tower)
        sites = {STATE_SITE[name]: f"{name} states", "attention": f"{name} attention"}
        parts, blocks = [Gathered(evidence, sites, full)], tower.adding
        if name == "vision":
            blocks, k = [i for i in blocks if layers is None or i in layers], min(16, tower.d_model)
            halves = {x: MassiveActivations(blocks, name, k, x) for x in BlockWriters.halves}
            parts += [Gathered(probe, {site: site}) for site, probe in halves.items() if blocks]
        else:
            blocks = [i for i in blocks if i + 1 < tower.n_layers]
            parts += [Gathered(BlockWriters(blocks), {"resid_pre": "more"})] * bool(blocks)
            heads = Gathered(HeadWrites(tower.writing), {"attention": "writes"})
            parts += [heads] * bool(tower.writing)
        return cls(tuple(parts), tuple(blocks), feed)

    def reads(self, context: Context) -> list[Read]:
        """One, at the last site."""
        last = in_order([read.site for part in self.parts for read in part.reads(context)])[-1]
        given: dict[str, Any] = {"least": LEAST_SEEING, "full": self.parts[0].full}
        if self.tower == "vision":
            given |= {"feed": self.feed, "halves": BlockWriters.halves * bool(self.blocks)}
            return [Read(last, closing.close_vision, given)]
        given |= {"live": context.live("language"), "keep": KEPT}
        return [Read(last, closing.close_language, given)]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> Closed:
        """What was found, in the types that results have; evidence is NaN at padding."""
        (found,) = (widened(answer) for answer in answers.values())
        names = ("received", "norm", "ratio", "rank")
        at_head = {name: found[name] for name in names if name in found}
        wrote = found["wrote"].unbind(1) if self.blocks else ()
        told = found["values"], found["channels"], dict(zip(self.blocks, wrote, strict=True))
        seen = None if self.parts[0].full else self._evidence(found, context)
        return Closed(*told, at_head, seen)

    def _evidence(self, found: Mapping[str, Any], context: Context) -> EvidenceResult:
        """What is kept of the evidence: the largest channel of every token, and attention by key."""
        probe = self.parts[0].probe
        massive, _ = probe.parts(context)
        live, where = context.live(self.tower), context.positions(self.tower, None)

        def of_states(of: Mapping[str, Tensor], layers: Sequence[int]) -> MassiveResult:
            values, channels = (mask_padding(of[name], live, 2) for name in ("values", "channels"))
            median = of["median"].masked_fill(~live.any(dim=1)[:, None], float("nan"))
            told = tuple(layers), massive.site, where
            return MassiveResult(values, channels, median, *told)

        seen, first = found["spikes"], None
        one = {name: seen[name][..., None] for name in ("values", "channels")}
        states = of_states({**one, "median": seen["median"]}, massive.layers)
        if "first" in found:
            first = of_states({name: x[:, None] for name, x in found["first"].items()}, [0])
        attention = _unread(self.tower, context).by_key()
        if told := found.get("attention"):
            attention = self._received(dict(told), context)
        return probe.joined(states, attention, first, context)

    def _received(self, told: dict[str, Any], context: Context) -> ReceivedSummary:
        """Attention by key, in the layers that attend."""
        for name in ("null", "others_null"):
            told[name] = told[name]["values"][:, told[name]["which"]]
        live = context.live_keys(self.tower)
        for name in ("mean", "most", "drawn", "null", "others_null"):
            if name in told:
                told[name] = mask_padding(told[name], live, 2)
        return ReceivedSummary(**told, layers=tuple(self.parts[0].probe.parts(context)[1].layers))


def widened(answer: Any) -> Any:
    """An answer with its tensors `wide`."""
    if isinstance(answer, Mapping):
        return {name: widened(part) for name, part in answer.items()}
    return wide(answer)

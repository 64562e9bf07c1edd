"""SinkEvidence: the two halves of a sink, spikes and attention from other tokens, in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.probes.attention import ReceivedAttention, ReceivedResult
from sinkscope.probes.residual import MassiveActivations, MassiveResult
from sinkscope.protocols import Read
from sinkscope.results import Record, Result, in_layers, tidy
from sinkscope.sites import Site, Tower

# Where states are judged: what attention reads in the LLM, what the projector may read in the ViT.
SITES = {"language": "resid_pre", "vision": "resid_post"}


@dataclass(frozen=True, eq=False)
class EvidenceResult(Result):
    """Spikes and attention of every token.

    Attributes:
        massive: Largest channels of every token in the layers of ``layers``.
        received: Attention received in those layers (in the vision tower: in all blocks), with the
            part that other tokens give.
        first: Largest channels in the LLM's embeddings, ``[batch 1 pos k]``; None in the vision tower.
        judged: Tokens compared with one another: live tokens of the LLM, patches of the vision tower.
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
        """The value of `medians` that a quarter of the judged tokens reaches."""
        ratios = self.medians().masked_fill(~self.judged[:, None], float("nan"))
        return ratios.nanquantile(0.75, dim=-1, interpolation="higher")

    def prominence(self) -> Float[Tensor, "batch layer pos"]:
        """Every token's largest ``|h|`` over the layer's upper quartile of it: about 1 without spikes."""
        return self.medians() / self.upper_quartile()[..., None]

    def drawn(self) -> Float[Tensor, "batch layer pos"]:
        """The most that some head of the layer gives a token beyond uniform attention, in [-1, 1].

        From other tokens only; NaN where fewer than 8 of them see it.
        """
        excess = self.received.excess()
        gone = excess.isnan().all(dim=2)
        return excess.nan_to_num(nan=-2.0).amax(dim=2).masked_fill(gone, float("nan"))

    def growth(self) -> Float[Tensor, "batch layer pos"]:
        """By how much a token's largest channel grew since the embeddings, in medians of its layer.

        A lower bound where the channel was not among the 16 largest. Infinite in the vision tower.
        """
        now = self.medians()
        if self.first is None:
            return torch.full_like(now, float("inf")).masked_fill(now.isnan(), float("nan"))
        before = self.first.values.abs() / self.first.median[..., None, None]
        same = self.first.channels == self.massive.channels[..., :1]
        there = torch.where(same, before, torch.zeros_like(before)).amax(dim=-1)
        least = before[..., -1].expand_as(there)
        return now / torch.where(same.any(dim=-1), there, least)

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
    vision tower (what the projector may read).
    """

    needs: ClassVar[str] = "gradients"
    layers: Any = None
    tower: Tower = "language"

    def _parts(self, context: Context) -> tuple[MassiveActivations, ReceivedAttention]:
        layers = context.layers(self.tower, self.layers)
        read = sorted({0, *layers}) if self.tower == "language" else layers
        k = min(16, context.tower(self.tower).d_model)  # enough to find a spike in the first state
        attended = None if self.tower == "vision" else layers
        return (
            MassiveActivations(read, self.tower, k, SITES[self.tower]),
            ReceivedAttention(attended, tower=self.tower, others=True),
        )

    def reads(self, context: Context) -> list[Read]:
        """States and attention of every layer."""
        return [read for part in self._parts(context) for read in part.reads(context)]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> EvidenceResult:
        """Both results, and the embeddings' channels apart."""
        massive, received = self._parts(context)
        attention = {s: answer for s, answer in answers.items() if s.name == "attention"}
        states, vision = massive.finish(answers, context), self.tower == "vision"
        layers = context.layers(self.tower, self.layers)
        return EvidenceResult(
            massive=in_layers(states, layers),
            received=received.finish(attention, context),
            first=None if vision else in_layers(states, (0,)),
            judged=context.tokens.vision.select("patch") if vision else context.live("language"),
            layers=layers,
        )

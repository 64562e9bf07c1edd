"""Attention probes: exact, under the model's own kernel, and never an N x N matrix at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.checks import check_choice
from sinkscope.errors import ProbeError
from sinkscope.kernels import attention as kernels
from sinkscope.kernels.closing import by_key
from sinkscope.kernels.received import received
from sinkscope.probes.per_layer import AttentionProbe
from sinkscope.results import Result, in_layers, stack_layers
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

    def by_key(self) -> ReceivedSummary:
        """The same reduced over heads; raises as `excess` does."""
        others, null = self._of_others()
        told: Any = by_key(self.received, others, null[:, :, 0])
        shared = ("null", "others_null", "layers", "sink", "sink_mass", "routed")
        return ReceivedSummary(**told, **{name: getattr(self, name) for name in shared})

    def of_key(self, row: int, pos: int) -> Float[Tensor, "layer head"]:
        """What one key receives from every head."""
        return self.received[row, :, :, pos]


@dataclass(frozen=True, eq=False)
class ReceivedSummary(Result, columns={"drawn": "drawn", "null": "null"}):
    """What every key receives, reduced over heads where the model is; fields as in `ReceivedResult`.

    Attributes:
        drawn: What other tokens give in the ``head`` that gives most beyond uniform attention.
        mean: Mean over heads of what the key receives; ``most``: of the head that gives most,
            ``most_head``. None in the vision tower, where no record needs them.
        times: Mean over heads of what others give in multiples of uniform attention, in the layer where
            that is largest.
        kept: The keys with the largest ``drawn``, which have what they receive ``by_head``.
    """

    drawn: Float[Tensor, "batch layer key"]
    head: Int[Tensor, "batch layer key"]
    null: Float[Tensor, "batch layer key"] | None
    others_null: Float[Tensor, "batch layer key"]
    layers: tuple[int, ...]
    mean: Float[Tensor, "batch layer key"] | None = None
    most: Float[Tensor, "batch layer key"] | None = None
    most_head: Int[Tensor, "batch layer key"] | None = None
    times: Float[Tensor, "batch key"] | None = None
    sink: Int[Tensor, "batch layer head"] | None = None
    sink_mass: Float[Tensor, "batch layer head"] | None = None
    routed: Float[Tensor, "batch layer head"] | None = None
    kept: Int[Tensor, "batch kept"] | None = None
    by_head: Float[Tensor, "batch layer head kept"] | None = None

    at, event = ReceivedResult.at, ReceivedResult.event

    def by_key(self) -> ReceivedSummary:
        """Itself."""
        return self

    def of_key(self, row: int, pos: int) -> Float[Tensor, "layer head"]:
        """What one of the keys ``kept`` receives from every head; ProbeError for others."""
        kept = [] if self.kept is None else self.kept[row].tolist()
        if self.by_head is None or pos not in kept:
            raise self._absent(f"what the key at {pos} receives by head")
        return self.by_head[row, ..., kept.index(pos)]

    def __getattr__(self, name: str) -> Any:
        if name in ("received", "others", "excess", "times_null", "sink_rate"):
            raise self._absent(f"{name!r}, of every key by head")
        raise AttributeError(name)

    def _absent(self, what: str) -> ProbeError:
        some = [] if self.kept is None else self.kept.tolist()
        return ProbeError(
            f"Got a trace with detail='sinks', which has not {what}, only numbers over heads and the keys "
            f"{some} by head; expected all of it. Write ss.trace_sinks(lvlm, sample, detail='full')."
        )


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

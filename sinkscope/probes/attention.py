"""Attention probes: exact, under the model's own kernel, and never an N x N matrix at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from sinkscope.anatomy.context import Context, indices_of
from sinkscope.checks import check_choice
from sinkscope.errors import ProbeError
from sinkscope.kernels import attention as kernels
from sinkscope.kernels.received import received
from sinkscope.probes.per_layer import AttentionProbe, ByLayer
from sinkscope.results import Result, in_layers, stack_layers
from sinkscope.sites import Site, Tower
from sinkscope.tokens import Selection
from sinkscope.viz import plot_heads


def refuse_flash(context: Context, tower: str, what: str) -> None:
    """Raise ProbeError for what needs attention in fp32 if the tower attends through a flash kernel."""
    kernel = context.tower(tower).kernel
    if "flash" in kernel:
        raise ProbeError(
            f"Got {what} on the {tower} tower under {kernel!r}, which computes in half precision "
            "only; expected a kernel that can compute in fp32. Write "
            "lvlm.module.set_attn_implementation('sdpa'), or load with attn_implementation='sdpa'."
        )


def groups_by_layer(context: Context, tower: str, groups: Any) -> ByLayer:
    """One-hot groups ``[row key group]``, one tensor per layer or one for all that share it."""
    _, onehot = context.groups(tower, groups)
    return ByLayer(onehot[:, i].contiguous() for i in range(onehot.shape[1]))


def chosen_rows(probe: Any, context: Context) -> Tensor | None:
    """The selected queries of a prompt, ``[row query]``; None for all, and at decode steps."""
    if probe.queries is None or context.step:
        return None
    return indices_of(context.flat(probe.tower, probe.queries))


@dataclass(frozen=True, eq=False)
class MassResult(Result, columns={"mass": "mass", "null": "null"}):
    """Attention mass per key group, in [0, 1] and NaN at padding.

    ``null`` is uniform attention under the model's own mask, or None if it was not asked for.
    """

    mass: Float[Tensor, "batch layer head query group"]
    null: Float[Tensor, "batch layer query group"] | None
    groups: tuple[str, ...]
    layers: tuple[int, ...]
    queries: Int[Tensor, "batch query"]

    def group(self, name: str) -> Float[Tensor, "batch layer head query"]:
        """The mass on one group; ProbeError if there is none."""
        if name not in self.groups:
            raise ProbeError(
                f"Got the group {name!r}; expected one of {self.groups}. Name what you want to "
                "measure in AttentionMass(groups={...})."
            )
        return self.mass[..., self.groups.index(name)]

    def by_layer(self) -> Float[Tensor, "layer group"]:
        """Mean mass over rows, heads and queries."""
        return self.mass.nanmean(dim=(0, 2, 3))

    def null_by_layer(self) -> Float[Tensor, "layer group"] | None:
        """Mean null over rows and queries."""
        return None if self.null is None else self.null.nanmean(dim=(0, 2))

    def plot_heads(self, group: str, row: int | None = None, *, query: int | None = None) -> Figure:
        """A layer x head map of the mass on a group, with the head that gives the most and its null.

        ``row`` is a row of the batch and ``query`` a position, None for the mean over those measured.
        """
        return plot_heads(self, group, row, query=query)


@dataclass(frozen=True, eq=False)
class AttentionMass(
    AttentionProbe, kernel=kernels.group_mass, result=MassResult, needs="masses", over="queries"
):
    """How much attention each query pays to each group of keys, per head. Exact.

    ``mass[q, g] = sum_{k in g} A[q, k]``, computed as the model's own attention on one-hot values.
    Groups may overlap; what is in no group (and, at decode steps, what was generated) is the rest.

    Args:
        groups: Name -> selection, such as ``{"bos": "bos"}``; masks may differ by layer.
        queries: None for all. At a decode step the one query is used.
        null: One more attention call per kind of mask.
        precision: ``"model"`` for the model's dtype (in bf16 rounded by about 6e-3) or ``"float32"``.
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
            refuse_flash(context, self.tower, "AttentionMass(precision='float32')")
        groups = groups_by_layer(context, self.tower, self.groups)
        rows = chosen_rows(self, context)
        return {"groups": groups, "rows": rows, "null": self.null, "float32": float32}


LEAST_SEEING = 8  # other queries that must see a key for their mean to be worth comparing


@dataclass(frozen=True, eq=False)
class ReceivedResult(Result, columns={"received": "received", "null": "null"}):
    """Mean attention received by every key, in [0, 1]; NaN at padding. Nulls are uniform attention.

    ``received`` is the published measure: the token's own query counts, so the last token of a prompt
    receives what it gives itself. ``others`` is the mean over the queries of other tokens, if asked for;
    NaN where fewer than 8 of them see the key.
    """

    received: Float[Tensor, "batch layer head key"]
    null: Float[Tensor, "batch layer key"] | None
    layers: tuple[int, ...]
    others: Float[Tensor, "batch layer head key"] | None = None
    others_null: Float[Tensor, "batch layer key"] | None = None

    def at(self, layers: Sequence[int]) -> ReceivedResult:
        """The same in some of its layers."""
        return in_layers(self, layers)

    def sink_rate(self, epsilon: float = 0.3) -> Float[Tensor, "layer key"]:
        """The share of rows and heads in which a key receives more than ``epsilon``.

        ``Sink_k^eps`` of Gu et al. (2410.10781) by layer; it depends on the length of the prompt.
        """
        above = (self.received > epsilon).float().masked_fill(self.received.isnan(), float("nan"))
        return above.nanmean(dim=(0, 2))

    def excess(self) -> Float[Tensor, "batch layer head key"]:
        """What other tokens give beyond uniform attention: ``others - others_null``, in [-1, 1].

        The score by which tokens are ranked; ProbeError if it was not asked for. A multiple of the null is at
        most 1 / null, so the first token, which many see, could never have a large one.
        """
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

    ``r_k = sum_i A_ik / #{i : i sees k}`` over live queries (Gu et al., 2410.10781, section 3),
    computed in fp32 as the gradient of the model's own attention with respect to its values. ``queries``
    is a selection, or None for all live ones. ``others`` asks for the mean over other tokens' queries too,
    for `ReceivedResult.excess`: one more attention call per layer. It needs ``null``.
    """

    layers: Any = None
    queries: Selection | None = None
    tower: Tower = "language"
    null: bool = True
    others: bool = False

    def _parameters(self, context: Context) -> dict[str, Any]:
        refuse_flash(context, self.tower, "ReceivedAttention")
        if self.others and not self.null:
            raise ProbeError(
                "Got others=True and null=False; expected the null too. Write "
                "ReceivedAttention(others=True)."
            )
        live = context.live(self.tower)
        if self.queries is not None and not context.step:
            live = live & context.flat(self.tower, self.queries)
        live = context.pack(self.tower, live, dim=1)
        return {"live": live, "null": self.null, "others": self.others}

    def finish(self, answers: Mapping[Site, Any], context: Context) -> ReceivedResult:
        """Stack the layers and mask the padding, and keys that fewer than 8 other tokens see."""
        found = super().finish(answers, context)
        if not self.others:
            return found
        few = stack_layers(answers, "seeing", keys=found.others_null.shape[2]) < LEAST_SEEING
        others = found.others.masked_fill(few[:, :, None], float("nan"))
        null = found.others_null.masked_fill(few, float("nan"))
        return replace(found, others=others, others_null=null)


@dataclass(frozen=True, eq=False)
class PatternResult(Result, columns={"attention": "patterns"}):
    """Attention weights of chosen queries; NaN where a row is absent or a key is padding.

    Rows sum to 1, or less where the model has a learned sink.
    """

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
    """Attention weights of chosen queries, and only those. Exact.

    ``rows`` selects the queries, such as ``"last"``; at a decode step the one query is used.
    """

    rows: Selection = "last"
    layers: Any = None
    tower: Tower = "language"

    def _parameters(self, context: Context) -> dict[str, Any]:
        refuse_flash(context, self.tower, "AttentionPatterns")
        rows = context.packed_rows(self.tower, context.flat(self.tower, self.rows))
        return {"rows": torch.zeros(len(rows), 1, dtype=torch.long) if context.step else rows}

"""The protocol of an intervention: which sites it edits, with which kernel, and what it reports.

An intervention is a frozen dataclass of parameters with one method. Like a probe it never holds a
model: the runner asks what to edit and the kernel turns the old value into a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sinkscope.errors import InterventionError, NoEffectError, SelectionError, nearest
from sinkscope.kernels.edited_call import STAGES
from sinkscope.kernels.edits import EXTRA, WIDEST
from sinkscope.results import Unsaved
from sinkscope.sites import Site, Tower

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.anatomy.context import Context
    from sinkscope.anatomy.towers import TowerAnatomy
    from sinkscope.tokens import Selection

STEPS = ("all", "prefill", "decode")
TOLD = ("rows", "empty", "tokens", "count", "before", "after")
"""What every kernel tells of its edit."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit at one site.

    Attributes:
        site: Where.
        kernel: At an attention site ``kernel(call, state, span, **parameters) -> (call, effect)``,
            best made with `sinkscope.kernels.edited_call.with_change`; elsewhere
            ``kernel(states, state, **parameters) -> (states, effect)``. Never in place.
        parameters: Plain values and CPU tensors; ``("@module", path)`` stands for a module.
        stage: For an attention site, what is edited: ``"keys"``, ``"logits"``, ``"weights"`` or
            ``"values"``. The edits of one site apply in this order, and in list order inside a
            stage: a mask holds whatever is redistributed beside it. A kernel that changes another
            one is refused when it runs.

    Raises:
        InterventionError: If the stage is none.
    """

    site: Site
    kernel: Callable[..., Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    stage: str = "values"

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise InterventionError(
                f"Got stage={self.stage!r}; expected one of {STAGES}. "
                f"{nearest(str(self.stage), STAGES)}"
            )


@runtime_checkable
class Intervention(Protocol):
    """Anything the runner can apply."""

    @property
    def steps(self) -> str:
        """``"all"``, ``"prefill"`` or ``"decode"``."""
        ...

    @property
    def allow_noop(self) -> bool:
        """Whether touching nothing is fine; else it raises."""
        ...

    def edits(self, context: Context) -> Sequence[Edit]:
        """What to edit at this step; raises if the parameters do not fit the model or the sample."""
        ...


@dataclass(frozen=True, eq=False)
class Effect(Unsaved):
    """What one intervention did in one forward pass.

    Attributes:
        sites: Every site that was edited, in forward order.
        rows: Int ``[batch site]``: query rows touched in some head; for edits of states the tokens
            whose state became another. In the vision tower the first axis counts images; a packed
            tower has one row for all.
        empty: Int ``[batch site]``: rows left as they were in some head, because the edit would
            leave them no key to see.
        tokens: Int ``[batch site]``: edited keys (or tokens).
        mass_before: Float ``[batch site]``: mean attention of the touched rows and heads on the
            edited keys before; NaN where nothing was touched or masses do not change.
        mass_after: The same after.
        kl: Float ``[batch]``: KL(unedited || edited) of the next token, if it was asked for; all
            interventions of the run together.
        step: 0 for a prompt, 1, 2, ... for decode steps.
        extra: What the kernel told besides, by name, ``[batch site ...]``: a gate's
            ``"coefficients"`` ``[batch site group]``.
    """

    sites: tuple[Site, ...]
    rows: Tensor
    empty: Tensor
    tokens: Tensor
    mass_before: Tensor
    mass_after: Tensor
    kl: Tensor | None = None
    step: int = 0
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers in which some row was touched."""
        touched = self.rows.sum(0) > 0
        return tuple(
            sorted({s.layer for s, t in zip(self.sites, touched.tolist(), strict=True) if t})
        )

    @property
    def touched(self) -> Tensor:
        """Bool ``[batch]``: rows of the batch in which anything was touched."""
        return self.rows.sum(1) > 0

    def to_dataframe(self) -> pd.DataFrame:
        """One line per batch row and site."""
        import pandas as pd

        lines = [
            {
                "batch": b,
                "site": str(site),
                "layer": site.layer,
                "rows": int(self.rows[b, i]),
                "empty": int(self.empty[b, i]),
                "tokens": int(self.tokens[b, i]),
                "mass_before": float(self.mass_before[b, i]),
                "mass_after": float(self.mass_after[b, i]),
            }
            for b in range(self.rows.shape[0])
            for i, site in enumerate(self.sites)
        ]
        return pd.DataFrame(lines)


def effect_from(
    answers: Mapping[Site, Mapping[str, Tensor]], step: int, ended: Tensor | None = None
) -> Effect:
    """An `Effect` from the raw answers of one intervention's sites.

    Args:
        answers: What every site's kernel told.
        step: The step.
        ended: Bool ``[batch]``: rows whose answer had ended, in which nothing was touched.
    """
    sites = tuple(sorted(answers))

    def counts(name: str) -> Tensor:
        out = torch.stack([answers[s][name] for s in sites], dim=1)
        return out if ended is None else out.masked_fill(ended[:, None], 0)

    count = counts("count")

    def mean(name: str) -> Tensor:
        columns = []
        for s in sites:
            one = answers[s]
            nothing = torch.full(one["count"].shape, float("nan"))
            columns.append(one[name] / one["count"] if name in one else nothing)
        return torch.stack(columns, dim=1).masked_fill(count == 0, float("nan"))

    rows, empty, tokens = counts("rows"), counts("empty"), counts("tokens")
    more = set.intersection(*(set(answers[s]) for s in sites)) - set(TOLD)
    extra = {name: torch.stack([answers[s][name] for s in sites], dim=1) for name in sorted(more)}
    return Effect(sites, rows, empty, tokens, mean("before"), mean("after"), None, step, extra)


def check_steps(steps: str) -> str:
    """A known value of ``steps``.

    Raises:
        InterventionError: If it is none.
    """
    if steps not in STEPS:
        raise InterventionError(
            f"Got steps={steps!r}; expected one of {STEPS}. {nearest(str(steps), STEPS)}"
        )
    return steps


def runs_now(steps: str, context: Context, tower: str) -> bool:
    """Whether an intervention applies at this step; the vision tower runs on the prompt only.

    Args:
        steps: ``"all"``, ``"prefill"`` or ``"decode"``.
        context: What ``edits`` was given; its ``step`` is 0 for the prompt.
        tower: The tower that is edited.

    Raises:
        InterventionError: If ``steps`` is unknown.
    """
    check_steps(steps)
    if context.step == 0:
        return steps in ("all", "prefill")
    return steps in ("all", "decode") and tower == "language"


def selected(
    context: Context, tower: str, tokens: Selection, what: str, allow_empty: bool
) -> Tensor:
    """A selection as ``[batch layer|1 pos]`` in the sample's own layout.

    Args:
        context: What ``edits`` was given.
        tower: ``"language"`` or ``"vision"``.
        tokens: A name such as ``"image"``, or a bool mask ``[batch pos]`` or ``[batch layer pos]``.
        what: The intervention's name, for the message.
        allow_empty: Whether an empty selection is fine.

    Returns:
        A bool mask with one layer, or with as many as the tower has if the selection differs by
        layer; see `at_layer`. Padding is False.

    Raises:
        NoEffectError: If it is empty in every row.
    """
    mask = context.select(tower, tokens)
    mask = mask if mask.ndim == 3 else mask[:, None]
    if not mask.any() and not allow_empty:
        raise NoEffectError(
            f"{what} was given {named(tokens)} without any token; expected at least one in some "
            "row. Nothing would change: look at the selection, or write allow_noop=True."
        )
    return mask


def named(selection: Selection) -> str:
    """What to call a selection in a message."""
    if not isinstance(selection, str):
        return "a selection"
    hint = " (without a BOS token the first one is 'first')" if selection == "bos" else ""
    return f"the selection {selection!r}{hint}"


def at_layer(mask: Tensor, layer: int) -> Tensor:
    """One layer of what `selected` gives, ``[batch layer|1 pos]``, as ``[batch pos]``."""
    return mask[:, layer if mask.shape[1] > 1 else 0]


def check_heads(heads: Sequence[int] | None, count: int) -> list[int] | None:
    """Query heads of a tower.

    Raises:
        InterventionError: If there is none or one is out of range.
    """
    if heads is None:
        return None
    several = isinstance(heads, Iterable) and not isinstance(heads, str)
    wanted: list[Any] = list(heads) if several else [heads]
    if not wanted:
        raise InterventionError("Got no heads; expected at least one, or None for all.")
    for head in wanted:
        whole = isinstance(head, Integral) and not isinstance(head, bool)
        if not whole or not 0 <= int(head) < count:
            raise InterventionError(
                f"Got head {head!r}; expected query heads from 0 to {count - 1}. With grouped "
                "queries several query heads share a key-value head: these are query heads."
            )
    return sorted({int(head) for head in wanted})


def rows_at(
    context: Context, tower: str, queries: Selection | None, what: str, allow_empty: bool
) -> Tensor | None:
    """Selected query rows in the model's layout, or None for all.

    Raises:
        SelectionError: If the selection differs by layer.
        NoEffectError: If it is empty in every row.
    """
    if queries is None:
        return None
    mask = context.select(tower, queries)
    if mask.ndim != 2:
        raise SelectionError(
            f"Got queries of shape {tuple(mask.shape)}; expected one mask for all layers, "
            "[batch pos]. Write one intervention per layer, or mask.any(dim=1)."
        )
    if not mask.any() and not allow_empty:
        raise NoEffectError(
            f"{what} was given queries, {named(queries)}, without any position; expected at least "
            "one in some row, or None for all."
        )
    return context.pack(tower, mask, dim=1)


def check_decodes(steps: str, queries: Selection | None) -> None:
    """Refuse to edit prompt positions at decode steps only.

    Raises:
        InterventionError: If so.
    """
    if check_steps(steps) == "decode" and queries is not None:
        raise InterventionError(
            "Got queries together with steps='decode'; expected either. Queries are prompt "
            "positions and a decode step has one query, the newest token: write queries=None."
        )


def check_prompt_only(steps: str, what: str) -> None:
    """Refuse decode steps for an edit of prompt tokens' states.

    Raises:
        InterventionError: If so.
    """
    if check_steps(steps) == "decode":
        raise InterventionError(
            f"Got steps='decode' for {what}; expected 'prefill' or 'all', which mean the same here. "
            "It edits states of prompt tokens, which exist in the first pass only and live on in "
            "the cache."
        )


def check_tower(given: str, expected: Tower, what: str) -> None:
    """Refuse a tower in which an intervention is not defined.

    Raises:
        InterventionError: If it is another one.
    """
    if given != expected:
        raise InterventionError(
            f"Got tower={given!r} for {what}; expected {expected!r}, the only tower in which it is "
            f"defined. Write tower={expected!r}, or leave it out."
        )


def needs_a_mask(tower: TowerAnatomy) -> str:
    """Why a bias of logits cannot ride in extra head dimensions of a tower; "" if it can."""
    if tower.softcap:
        return "a soft-cap would bend a bias"
    if tower.d_head + EXTRA > WIDEST:
        return f"heads of {tower.d_head} leave no room for a bias"
    return ""


def check_maskable(tower: TowerAnatomy, reason: str, what: str) -> None:
    """Refuse an explicit mask under a flash kernel, which knows padding only.

    Args:
        tower: The tower.
        reason: Why there must be a mask; "" if there need not.
        what: The intervention.

    Raises:
        InterventionError: If so.
    """
    if reason and "flash" in tower.kernel:
        raise InterventionError(
            f"Got {what} in a tower that runs {tower.kernel!r}; expected 'sdpa' or 'eager', which take "
            f"an explicit mask: {reason}. Write attn_implementation='sdpa' where the model is loaded."
        )

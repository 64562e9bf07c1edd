"""The protocol of an intervention: which sites it edits, with which kernel, and what it reports.

An intervention is a frozen dataclass of parameters with one method. Like a probe it never holds a
model: the runner asks what to edit and the kernel turns the old value into a new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sinkscope.errors import InterventionError, NoEffectError, SelectionError, nearest
from sinkscope.kernels.edits import EXTRA, WIDEST
from sinkscope.sites import Tower

if TYPE_CHECKING:
    from sinkscope.anatomy.context import Context
    from sinkscope.anatomy.towers import TowerAnatomy
    from sinkscope.tokens import Selection

STEPS = ("all", "prefill", "decode")


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

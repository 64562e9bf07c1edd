"""What interventions share: steps, selections, heads, numbers, and one edit of attention per layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.anatomy.towers import TowerAnatomy
from sinkscope.checks import check_choice, check_number, is_whole
from sinkscope.errors import InterventionError, NoEffectError, SelectionError
from sinkscope.interventions.live import LiveRule, judged
from sinkscope.kernels.attention import EXTRA
from sinkscope.kernels.edits import WIDEST
from sinkscope.protocols import BaseIntervention, Edit
from sinkscope.sites import Site, Tower
from sinkscope.tokens import Selection

STEPS = ("all", "prefill", "decode")


@dataclass(frozen=True, eq=False, kw_only=True)
class BaseEdit(BaseIntervention):
    """The fields that all edits have; `MaskKeys` describes them."""

    steps: str = "prefill"
    tower: Tower = "language"
    allow_noop: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionEdit(BaseEdit):
    """The fields that edits of chosen heads and queries have; `MaskKeys` describes them."""

    heads: Sequence[int] | None = None
    queries: Selection | None = None
    steps: str = "all"


def runs_now(steps: str, context: Context, tower: str) -> bool:
    """Whether an intervention edits ``tower`` at this step; the vision tower runs on the prompt only."""
    check_choice(STEPS, error=InterventionError, steps=steps)
    now = "decode" if context.step else "prefill"
    return steps in ("all", now) and (now == "prefill" or tower == "language")


def selected(
    context: Context, tower: str, tokens: Selection, what: str, allow_empty: bool
) -> Tensor:
    """A selection (see `TokenMap.select`) as bool ``[batch layer pos]``, False at padding. There is one
    layer, or as many as the tower has if the selection differs by layer; see `at_layer`. NoEffectError, with
    the name ``what``, if it is empty in every row, unless ``allow_empty``."""
    if isinstance(tokens, LiveRule):
        raise InterventionError(
            f"Got a LiveRule for {what}; expected tokens that are known before the pass, such as a mask. "
            "Edits of attention judge inside it. Write trace.l_sinks() or trace.v_sinks."
        )
    mask = context.select(tower, tokens)
    if not mask.any() and not allow_empty:
        name = f"the selection {tokens!r}" if isinstance(tokens, str) else "a selection"
        hint = " (without a BOS token the first one is 'first')" if name.endswith("'bos'") else ""
        raise NoEffectError(
            f"{what} was given {name}{hint} without any token; expected at least one in some row. "
            "Nothing would change: look at the selection, or write allow_noop=True."
        )
    return mask if mask.ndim == 3 else mask[:, None]


def at_layer(mask: Tensor, layer: int) -> Tensor:
    """One layer of what `selected` gives, ``[batch layer|1 pos]``, as ``[batch pos]``."""
    return mask[:, layer if mask.shape[1] > 1 else 0]


def check_indices(given: Any, count: int, name: str, hint: str = "") -> list[int]:
    """Whole numbers below ``count``; InterventionError if there is none, or another."""
    several = isinstance(given, Iterable) and not isinstance(given, str)
    wanted: list[Any] = list(given) if several else [given]
    if not wanted:
        raise InterventionError(f"Got no {name}; expected at least one. {hint}")
    for one in wanted:
        if not is_whole(one, 0, count - 1):
            raise InterventionError(f"Got {one!r} as {name}; expected 0 to {count - 1}. {hint}")
    return [int(one) for one in wanted]


def rows_at(
    context: Context, tower: str, queries: Selection | None, what: str, allow_empty: bool
) -> Tensor | None:
    """Selected query rows in the model's layout, or None for all."""
    if queries is None:
        return None
    mask = context.select(tower, queries)
    if mask.ndim != 2:
        raise SelectionError(
            f"Got queries of shape {tuple(mask.shape)}; expected one mask for all layers, "
            "[batch pos]. Write one intervention per layer, or mask.any(dim=1)."
        )
    selected(context, tower, queries, f"{what} (queries)", allow_empty)
    return context.pack(tower, mask, dim=1)


def selected_by(it: Any, context: Context, tokens: Selection, live: bool = False) -> Tensor:
    """What `selected` gives for one of the selections of an intervention; if ``live``, also for a `LiveRule`,
    whose mask holds all tokens that it may flag."""
    if live and isinstance(tokens, LiveRule):
        tokens = tokens.mask(context, it.tower)
    return selected(context, it.tower, tokens, type(it).__name__, it.allow_noop)


def attention_edits(
    it: Any,
    context: Context,
    kernel: Callable[..., Any],
    stage: str,
    masks: Mapping[str, Tensor],
    each: Sequence[Mapping[str, Any]] | None = None,
    of: Mapping[str, Selection] | None = None,
    **shared: Any,
) -> list[Edit]:
    """One edit per layer of an `AttentionEdit`, if it runs at this step; ``stage`` is that of `Edit`. Kernels
    get ``masks`` from `selected`, what is ``shared`` and what ``each`` layer has, and ``live``, ``rows``,
    ``heads``. ``of`` are the selections that masks are of, where one may be a `LiveRule`; it looks at the
    prompt also for an edit of decode steps."""
    tower, heads = it.tower, it.heads
    layers, now = context.layers(tower, it.layers), runs_now(it.steps, context, tower)
    if heads is not None:
        hint = "Write query heads, of which several may share a key-value head, or None for all."
        many = context.tower(tower).size("heads", layers)
        heads = sorted(set(check_indices(heads, many, "query head", hint)))
    rows = rows_at(context, tower, it.queries, type(it).__name__, it.allow_noop)
    if it.steps == "decode" and it.queries is not None:
        raise InterventionError(
            "Got queries together with steps='decode'; expected either. Queries are prompt "
            "positions and a decode step has one query, the newest token: write queries=None."
        )
    rules = {name: one for name, one in (of or {}).items() if isinstance(one, LiveRule)}
    asked = {} if context.step else {id(rule.detector): rule for rule in rules.values()}
    looks = [look for rule in asked.values() for look in rule.looks(context, layers)]
    # Queries are prompt positions: none of them is the query of a decode step.
    if not now or (context.step and rows is not None):
        return looks
    shared |= {"heads": heads, "rows": rows}
    shared["live"] = context.pack(tower, context.live(tower), dim=1)
    # What is the same in all layers stays one tensor, so that it is moved to the device once.
    packed = {key: context.pack(tower, mask, dim=2).unbind(1) for key, mask in masks.items()}
    edits = []
    for layer, own in zip(layers, each or [{}] * len(layers), strict=True):
        given = {key: parts[layer if len(parts) > 1 else 0] for key, parts in packed.items()}
        given |= {**shared, **own}
        edits.append(Edit(Site(tower, "attention", layer), kernel, given, stage))
    return [*looks, *(judged(edits, rules, context) if rules else edits)]


def check_prompt_only(steps: str, what: str) -> None:
    """Refuse decode steps for an edit of prompt tokens' states."""
    check_choice(STEPS, error=InterventionError, steps=steps)
    if steps == "decode":
        raise InterventionError(
            f"Got steps='decode' for {what}; expected 'prefill' or 'all', which mean the same here: it "
            "edits states of prompt tokens, which exist in the first pass only and stay in the cache."
        )


def check_tower(it: Any, expected: Tower) -> None:
    """Refuse a tower in which an intervention is not defined."""
    if it.tower != expected:
        raise InterventionError(
            f"Got tower={it.tower!r} for {type(it).__name__}; expected {expected!r}, the only tower in "
            f"which it is defined. Write tower={expected!r}, or leave it out."
        )


def check_factor(name: str, factor: Any, least: float = float("-inf")) -> float:
    """A finite number of at least ``least``."""
    check_number(least, error=InterventionError, **{name: factor})
    return float(factor)


def check_neutral(it: Any, factor: float, neutral: float = 1.0) -> None:
    """Refuse a setting that changes nothing, unless that was allowed: NoEffectError."""
    if factor == neutral and not it.allow_noop:
        raise NoEffectError(
            f"{type(it).__name__} with {neutral:g} changes nothing; expected another value. Write "
            "allow_noop=True if that is meant, for instance as the base of a sweep."
        )


def needs_a_mask(tower: TowerAnatomy) -> str:
    """Why a bias of logits cannot ride in extra head dimensions of a tower; "" if it can."""
    widest = max([tower.d_head, *(proof.sizes[2] for proof in tower.proofs if proof.sizes)])
    narrow = "" if widest + EXTRA <= WIDEST else f"heads of {widest} leave no room for a bias"
    return "a soft-cap would bend a bias" if tower.softcap else narrow


def check_maskable(it: Any, context: Context, reason: str | None = None) -> None:
    """Refuse an explicit mask under a flash kernel; a bias needs one as `needs_a_mask` says."""
    tower = context.tower(it.tower)
    if "flash" in tower.kernel and (reason := reason or needs_a_mask(tower)):
        raise InterventionError(
            f"Got {type(it).__name__} in a tower that runs {tower.kernel!r}; expected 'sdpa' or 'eager', "
            f"which take an explicit mask: {reason}. Write attn_implementation='sdpa' where the model "
            "is loaded."
        )

"""What the runner asks of a list of interventions before and after a pass."""

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sinkscope.errors import InterventionError, NoEffectError
from sinkscope.protocols import Edit, Effect, Intervention, Model, Probe, as_list
from sinkscope.results import kl_of_next


def check_interventions(interventions: Any) -> list[Intervention]:
    """The interventions as a list; InterventionError if something else came."""
    such = "edits(), steps and allow_noop, such as ss.MaskKeys(trace.v_sinks, layers=[4])"
    out = as_list(interventions, Intervention, InterventionError, "interventions", such)
    if len({id(it) for it in out}) < len(out):
        raise InterventionError(
            "Got the same intervention object twice; expected each once, because its effect is found "
            "by the object. Write two objects with equal parameters."
        )
    return out


def allowing_noop(it: Any) -> Any:
    """The same dataclass, or object with a method of this name, for which touching nothing is fine."""
    if it.allow_noop:
        return it
    if hasattr(it, "allowing_noop"):
        return it.allowing_noop()
    if is_dataclass(it) and not isinstance(it, type):
        return replace(it, allow_noop=True)
    raise InterventionError(
        f"Got a {type(it).__name__} that may not touch nothing; expected a dataclass, or an object "
        "with a method allowing_noop() that gives its twin with allow_noop=True. Set allow_noop=True."
    )


def check_reach(it: Intervention, edits: Sequence[Edit], feeds: Sequence[int]) -> None:
    """Refuse edits of vision blocks behind the last of ``feeds``, which the projector reads: NoEffectError.
    Allowed are ``allow_noop``, and ``layers=None``, which edits them with the others for probes of the tower.
    """
    vision = {edit.site.layer for edit in edits if edit.site.tower == "vision"}
    behind = sorted(layer for layer in vision if layer > feeds[-1])
    everything = getattr(it, "layers", None) is None and len(behind) < len(vision)
    if behind and not everything and not it.allow_noop:
        raise NoEffectError(
            f"Got {type(it).__name__} in the vision blocks {behind}; expected blocks up to {feeds[-1]}: "
            f"the projector reads {list(feeds)}, and what later blocks do reaches no token of the "
            f"decoder. Write layers up to {feeds[-1]}, or allow_noop=True to probe the tower itself."
        )


def check_beside(interventions: Sequence[Intervention], probes: Sequence[Probe]) -> None:
    """Refuse probes and edits of a tower to which another edit adds positions."""
    for it in interventions:
        tower = getattr(it, "changes_positions_of", None)
        others = [other for other in (*probes, *interventions) if tower and other is not it]
        if clash := [type(o).__name__ for o in others if getattr(o, "tower", None) == tower]:
            raise InterventionError(
                f"Got {clash} of the {tower} tower beside {type(it).__name__}, which adds positions to "
                "that tower; expected those of the other one only. Run them in a pass of their own."
            )


def require_effects(
    interventions: Sequence[Intervention], steps: Sequence[Mapping[Intervention, Effect]]
) -> None:
    """Refuse an intervention that touched nothing in any pass, unless it may: NoEffectError."""
    for it in interventions:
        mine = [effects[it] for effects in steps if it in effects]
        if it.allow_noop or any(bool(effect.touched.any()) for effect in mine):
            continue
        why = (
            f"touched no row in {len(mine)} forward passes; expected at least one. No selected query sees "
            "the edited tokens: they come later, lie outside the window, are masked already, or were "
            "given what they have."
        )
        if not mine:
            why = (
                f"never ran in {len(steps)} forward passes; expected at least one at steps={it.steps!r}. "
                "The first token of an answer comes from the prompt's pass, so a decode-only edit needs "
                "max_new_tokens=2 or more."
            )
        elif not any(effect.extra.get("live", torch.ones(1)).any() for effect in mine):
            why = (
                "flagged no token in the edited pass, in none of its layers; expected at least one. A live "
                "rule is asked about the edited states: an earlier edit may have removed the sinks."
            )
        elif not any(site.name == "attention" for effect in mine for site in effect.sites):
            why = "left every token as it was; expected at least one to change."
        elif empty := sum(int(effect.empty.sum()) for effect in mine):
            why = (
                f"touched no row: the {empty} that see the edited keys see nothing else, and such a row "
                "keeps its unedited output. Leave some key to attend to."
            )
        name = type(it).__name__
        raise NoEffectError(f"{name} {why} Write allow_noop=True if nothing may happen.")


def with_kl(edited: Any, plain: Tensor, last: Tensor) -> Any:
    """Add ``KL(unedited || edited)`` of the next token, behind position ``last``, to all effects of a run."""
    logits = edited.logits.detach()
    if logits.shape[1] > 1:
        logits = logits[torch.arange(len(last)), last][:, None]
    kl = kl_of_next(plain, logits.cpu())
    return replace(edited, effects={it: replace(x, kl=kl) for it, x in edited.effects.items()})


class Edited:
    """Run and generate with edits on: what ``with lvlm.edited(interventions) as edited`` gives.

    The model's weights and the plain LVLM are untouched; masks among the ``interventions`` belong to
    samples of their own shape, names such as ``"image"`` to any.
    """

    def __init__(self, lvlm: Model, interventions: Sequence[Intervention]) -> None:
        self._lvlm, self._open = lvlm, True
        self._interventions = tuple(interventions)

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """What is on."""
        return self._interventions

    def close(self) -> None:
        """End the edits."""
        self._open = False

    def run(self, sample: Any, probes: Any = (), interventions: Any = (), **options: Any) -> Any:
        """`LVLM.run` with these interventions first, then further ones."""
        return self._model().run(sample, probes, (*self._interventions, *interventions), **options)

    def generate(
        self, sample: Any, probes: Any = (), interventions: Any = (), **options: Any
    ) -> Any:
        """`LVLM.generate` with these interventions first, then further ones."""
        every = (*self._interventions, *interventions)
        return self._model().generate(sample, probes, every, **options)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """`LVLM.prepare`."""
        return self._model().prepare(*args, **kwargs)

    def _model(self) -> Model:
        """The model, unless the block has ended."""
        if not self._open:
            raise InterventionError(
                "Got a run on a model whose edits have ended; expected it inside the block. Write "
                "with lvlm.edited([...]) as edited: edited.run(...)."
            )
        return self._lvlm

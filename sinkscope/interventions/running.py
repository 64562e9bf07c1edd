"""What the runner asks of a list of interventions before and after a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.errors import InterventionError, NoEffectError
from sinkscope.interventions.protocol import Effect, Intervention

if TYPE_CHECKING:
    from sinkscope.models.outputs import Run
    from sinkscope.probes.protocol import Probe


def check_interventions(interventions: Any) -> list[Intervention]:
    """The interventions as a list.

    Raises:
        InterventionError: If something else came.
    """
    if isinstance(interventions, Intervention) and not isinstance(interventions, (list, tuple)):
        raise InterventionError(
            f"Got one {type(interventions).__name__}; expected a list of interventions. Write "
            "interventions=[it]."
        )
    out = list(interventions)
    for it in out:
        if isinstance(it, type) or not isinstance(it, Intervention):
            raise InterventionError(
                f"Got {it!r} among the interventions; expected objects such as "
                "ss.MaskKeys(trace.v_sinks, layers=[4])."
            )
    if len({id(it) for it in out}) < len(out):
        raise InterventionError(
            "Got the same intervention object twice; expected each once, because its effect is found "
            "by the object. Write two objects with equal parameters."
        )
    return out


def check_beside(interventions: Sequence[Intervention], probes: Sequence[Probe]) -> None:
    """Refuse probes of a tower whose positions an intervention changes.

    Raises:
        InterventionError: If there is one.
    """
    for it in interventions:
        hidden = getattr(it, "changes_positions_of", None)
        for probe in probes:
            if hidden is not None and probe.tower == hidden:
                raise InterventionError(
                    f"Got {type(probe).__name__}(tower={hidden!r}) beside {type(it).__name__}, which "
                    f"adds positions to that tower; expected probes of the other tower. Run the "
                    "probe on a pass of its own."
                )


def require_effects(
    interventions: Sequence[Intervention], steps: Sequence[Mapping[Intervention, Effect]]
) -> None:
    """Refuse an intervention that touched nothing in any pass.

    Raises:
        NoEffectError: If there is one that may not.
    """
    for it in interventions:
        mine = [effects[it] for effects in steps if it in effects]
        if it.allow_noop or any(bool(effect.touched.any()) for effect in mine):
            continue
        name = type(it).__name__
        if not mine:
            raise NoEffectError(
                f"{name} never ran in {len(steps)} forward passes; expected at least one at "
                f"steps={it.steps!r}. A decode-only edit needs an answer of two tokens or more, and "
                "queries are prompt positions."
            )
        empty = sum(int(effect.empty.sum()) for effect in mine)
        raise NoEffectError(
            f"{name} touched no row in {len(mine)} forward passes ({empty} rows saw edited keys "
            "only); expected at least one. Are the tokens visible to the queries? Write "
            "allow_noop=True if nothing may happen."
        )


def with_kl(edited: Run, plain: Run, last: Tensor) -> Run:
    """The run with ``KL(unedited || edited)`` of the next token in every effect.

    Args:
        edited: The run with interventions.
        plain: A run without, ``logits="last"``.
        last: Int ``[batch]``, the last prompt position of every row.
    """
    logits = edited.logits
    if logits.shape[1] > 1:
        logits = logits[torch.arange(len(last)), last][:, None]
    p = plain.logits[:, -1].float().log_softmax(-1)
    q = logits[:, -1].float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    effects = {it: replace(effect, kl=kl) for it, effect in edited.effects.items()}
    return replace(edited, effects=effects)

"""What a forward pass and a generation bring back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sinkscope.errors import InterventionError, NonFiniteError, ProbeError
from sinkscope.interventions.protocol import Effect, Intervention, effect_from
from sinkscope.models.context import Context
from sinkscope.models.runner import Raw
from sinkscope.probes.protocol import Probe, Result
from sinkscope.probes.results import Unsaved


def same(one: Any, other: Any) -> bool:
    """Whether two objects are of one class and have equal parameters, tensors and weights."""
    if type(one) is not type(other):
        return False
    if is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, nn.Module):
        own, others = (
            {name: value for name, value in vars(module).items() if not name.startswith("_")}
            for module in (one, other)
        )
        return same(own, others) and same(one.state_dict(), other.state_dict())
    if isinstance(one, (Tensor, np.ndarray)):
        return torch.equal(*(torch.as_tensor(x).cpu() for x in (one, other)))
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class Effects(dict[Intervention, Effect]):
    """What every intervention did, found by the intervention object, else by the only equal one."""

    def __missing__(self, key: Any) -> Effect:
        equal = [it for it in self if same(it, key)]
        if len(equal) == 1:
            return self[equal[0]]
        what = type(key).__name__ if isinstance(key, Intervention) else repr(key)
        which = f"which {len(equal)} of them equal" if equal else "which did nothing in this pass"
        raise InterventionError(
            f"Got {what}, {which}; expected one of {[type(it).__name__ for it in self]}. Effects are found "
            "by the object itself, or by the only one with equal parameters: keep it in a variable and "
            "pass that one."
        )


@dataclass(frozen=True, eq=False)
class Run(Unsaved):
    """What one forward pass brought back.

    Attributes:
        logits: Float ``[batch pos vocab]``; one position, the last live one, if ``logits="last"``.
        results: Every probe's typed result; ``run[probe]`` is shorter.
        effects: What every intervention did in this pass, found by the intervention object.
        step: 0 for a prompt, 1, 2, ... for decode steps.
    """

    logits: Tensor
    results: Mapping[Probe, Result]
    effects: Mapping[Intervention, Effect] = field(default_factory=Effects)
    step: int = 0

    def __getitem__(self, probe: Probe) -> Any:
        """The result of a probe of this run: of the object itself, or of one with equal parameters.

        A run that was pickled and loaded has probes of its own, which equal those it was made with.

        Raises:
            ProbeError: If the probe did not run.
        """
        if isinstance(probe, Probe):
            if probe in self.results:
                return self.results[probe]
            for ran, result in self.results.items():
                if same(ran, probe):
                    return result
        what = type(probe).__name__ if isinstance(probe, Probe) else repr(probe)
        raise ProbeError(
            f"Got {what}, which did not run; expected one of this run's, "
            f"{[type(ran).__name__ for ran in self.results]}. Results are found by the probe object "
            "itself, or by one with equal parameters. Probes of the vision tower run on the prompt, "
            "not at decode steps."
        )


@dataclass(frozen=True, eq=False)
class Generation(Unsaved):
    """What a generation brought back.

    Attributes:
        sequences: Int ``[batch pos]``, prompt and answer.
        text: The answers, decoded without special tokens; None without a tokenizer.
        steps: One `Run` per forward pass: the prompt, then every decode step. Where a row has
            already ended, its results are NaN.
    """

    sequences: Tensor
    text: tuple[str, ...] | None
    steps: tuple[Run, ...] = field(default=())


def finish_run(
    raw: Raw,
    probes: Sequence[Probe],
    context: Context,
    interventions: Sequence[Intervention] = (),
    *,
    keep_all: bool = False,
) -> Run:
    """Typed results, after a look at the logits.

    Args:
        raw: What the forward pass brought back.
        probes: The probes, in the order of their slots.
        context: The sample and the step.
        interventions: The interventions, in the order of their slots.
        keep_all: Whether the logits are those of all positions.

    Raises:
        NonFiniteError: If live logits hold NaN or infinity.
    """
    live = context.live("language")
    live = live if keep_all else live.any(dim=1, keepdim=True)
    bad = ~torch.isfinite(raw.logits.detach()).all(dim=-1).cpu() & live
    if bad.any():
        raise NonFiniteError(
            f"Got NaN or infinite logits at {int(bad.sum())} of {int(live.sum())} live positions "
            f"(first in row {int(bad.any(1).nonzero()[0])}); expected finite ones. Load the model in "
            "bfloat16 or float32 and check the weights and the images."
        )
    results = {
        probe: probe.finish(raw.answers.get(slot, {}), context) for slot, probe in enumerate(probes)
    }
    # The prompt pass has no ended row, and its edits of the vision tower have rows of images.
    ended = context.ended if context.step else None
    effects = Effects(
        (it, effect_from(raw.answers["edit", slot], context.step, ended))
        for slot, it in enumerate(interventions)
        if ("edit", slot) in raw.answers
    )
    return Run(raw.logits, results, effects, context.step)

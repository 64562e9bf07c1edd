"""What a forward pass and a generation bring back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sinkscope.errors import InterventionError, NonFiniteError, ProbeError
from sinkscope.interventions.protocol import Effect, Intervention, effect_from
from sinkscope.models.context import Context
from sinkscope.models.runner import Raw
from sinkscope.probes.protocol import Probe, Result


class Effects(dict[Intervention, Effect]):
    """What every intervention did, found by the intervention object."""

    def __missing__(self, key: Any) -> Effect:
        raise InterventionError(
            f"Got {type(key).__name__} {key!r}, which did nothing in this pass; expected one of its "
            f"interventions, {[type(it).__name__ for it in self]}. Effects are found by the object "
            "itself: keep it in a variable and pass that one."
        )


@dataclass(frozen=True, eq=False)
class Run:
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
        """The result of a probe of this run.

        Raises:
            ProbeError: If the probe did not run.
        """
        if not isinstance(probe, Probe) or probe not in self.results:
            ran = [type(p).__name__ for p in self.results]
            what = type(probe).__name__ if isinstance(probe, Probe) else repr(probe)
            raise ProbeError(
                f"Got {what}, which did not run; expected one of this run's, {ran}. Results are found by "
                "the probe object itself: keep it in a variable and pass that one. Probes of the vision "
                "tower run on the prompt, not at decode steps."
            )
        return self.results[probe]


@dataclass(frozen=True, eq=False)
class Generation:
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

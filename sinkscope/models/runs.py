"""Run a plan on a model through nnsight: one trace for any number of probes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import nnsight
import torch
from torch import Tensor

import sinkscope
from sinkscope.anatomy.context import Context
from sinkscope.anatomy.towers import Anatomy
from sinkscope.errors import AttentionCallError, InterventionError, NonFiniteError, ProbeError
from sinkscope.kernels import walk as walking
from sinkscope.kernels.edited_call import STAGES
from sinkscope.models.wrapping import ByName, Wrapped
from sinkscope.protocols import Edit, Effect, Intervention, Probe, Read, effect_from
from sinkscope.results import Result, find, names_of
from sinkscope.sites import Site

Plan = list[dict[str, Any]]


def ship_kernels(*plans: Plan) -> None:
    """Have the kernels of a trace travel by source on remote runs: ours and the user's own.

    A user's kernel travels with the functions of its own module; what it imports from elsewhere must
    exist on the server.
    """
    nnsight.register(sinkscope)
    for step in (step for plan in plans for step in plan):
        for _, kernel, _ in (*step["reads"], *step["edits"]):
            home = sys.modules.get(kernel.__module__)
            if home is not None and kernel.__module__ != "__main__":
                nnsight.register(home)


def make_plan(
    anatomy: Anatomy,
    reads: Sequence[tuple[int, Read]],
    edits: Sequence[tuple[int, Edit]] = (),
) -> Plan:
    """Group all reads and edits by site and sort the sites in forward order.

    Args:
        anatomy: The model's anatomy.
        reads: ``(slot, read)``: the slot is the probe's number.
        edits: ``(slot, edit)``: the slot is the intervention's number. At one site they apply in the
            order of their stages, and in the order given inside a stage.

    Returns:
        The plan of `sinkscope.kernels.walk`.
    """
    by_site: dict[Site, tuple[list, list, list]] = {}
    staged = sorted(edits, key=lambda one: STAGES.index(one[1].stage))
    for kind, questions in enumerate((reads, staged)):
        for slot, one in questions:
            lists = by_site.setdefault(one.site, ([], [], []))
            lists[kind].append((slot, one.kernel, dict(one.parameters)))
            if isinstance(one, Edit):
                lists[2].append(one.stage)
    return [step_at(anatomy, site, *by_site[site]) for site in sorted(by_site)]


def step_at(anatomy: Anatomy, site: Site, reads: list, edits: list, stages: list) -> dict[str, Any]:
    """One step of the plan: where a site lies in this model."""
    step: dict[str, Any] = {
        "tower": site.tower,
        "name": site.name,
        "layer": site.layer,
        "reads": reads,
        "edits": edits,
        "stages": stages,
    }
    if site.tower == "projector":
        return step | {"path": anatomy.projector, "how": site.name}
    tower = anatomy.tower(site.tower)
    if site.name == "attention":
        call = tower.call(site.layer)
        return step | {
            "path": tower.attention[site.layer],
            "how": "attention",
            "bind": call.bind,
            "call": call.call,
            "fires": call.fires,
        }
    if site.name in ("attn_out", "mlp_out"):
        branch = tower.branch(site.name, site.layer)
        return step | {"path": branch.path, "how": "output", "factors": branch.factors}
    path, how = {
        "resid_pre": (tower.blocks[site.layer], "input"),
        "mlp_hidden": (tower.neurons[site.layer], "input"),
        "resid_post": (tower.blocks[site.layer], "output"),
    }[site.name]
    return step | {"path": path, "how": how}


@dataclass(frozen=True)
class Raw:
    """What one forward pass brought back: ``answers[slot][site] -> kernel result``, and logits."""

    answers: dict[Any, dict[Site, Any]]
    logits: torch.Tensor


@contextmanager
def ready_to_trace(model: Wrapped | ByName, *plans: Plan, grad: bool = False) -> Iterator[Any]:
    """No gradients, but tensors that may have them: kernels ask the attention call for gradients.

    Args:
        model: The wrapped model.
        plans: The plans of the trace.
        grad: Whether gradients are wanted all the same.

    Yields:
        nnsight's model.
    """
    ship_kernels(*plans)
    # Tensors made under inference_mode could never have a gradient, not even in a kernel of ours.
    steps = [step for plan in plans for step in plan]
    paths = {"", *(step["path"] for step in steps)}
    outputs = {step["path"] for step in steps if step["how"] == "output"}
    with (
        torch.inference_mode(mode=False),
        torch.set_grad_enabled(grad),
        model.on(paths, outputs) as traced,
    ):
        yield traced


def run_plan(
    model: Wrapped | ByName,
    inputs: Mapping[str, Any],
    plan: Plan,
    last: torch.Tensor | None,
    where: bool | str = False,
    grad: bool = False,
    **trace_options: Any,
) -> Raw:
    """One forward pass.

    Args:
        model: The wrapped model.
        inputs: Model inputs.
        plan: The plan.
        last: Int ``[batch]``, the position of every row whose logits to keep, or None for all.
        where: False to run here, else nnsight's ``remote``.
        grad: Whether the logits keep their graph.
        trace_options: Further options of the trace, such as ``backend=...``.

    Returns:
        The raw answers.
    """
    walk, last_logits, save = walking.walk, walking.last_logits, nnsight.save
    answers: Any = None
    logits: Any = None
    if where:
        trace_options["remote"] = where
    with (
        ready_to_trace(model, plan, grad=grad) as traced,
        traced.trace(**inputs, **trace_options) as tracer,
    ):
        answers = save(walk(traced, tracer, plan))
        logits = save(last_logits(traced.output.logits, last, grad))
    if logits is None:
        raise AttentionCallError(
            "The forward pass ended while a probe still waited for attention windows; expected the "
            "windows to cover the sequence. Please report this model: its anatomy is wrong."
        )
    return Raw(sited(answers), logits)


def run_until_read(
    model: Wrapped | ByName, inputs: Mapping[str, Any], plan: Plan
) -> dict[Any, dict[Site, Any]]:
    """A forward pass here that ends where the plan's last site is read: no logits.

    Args:
        model: The wrapped model.
        inputs: Model inputs.
        plan: The plan.

    Returns:
        ``answers[slot][site] -> kernel result``.
    """
    walk, save = walking.walk, nnsight.save
    answers: Any = None
    with ready_to_trace(model, plan) as traced, traced.trace(**inputs) as tracer:
        answers = save(walk(traced, tracer, plan))
        tracer.stop()
    return sited(answers)


def generate_plan(
    model: Wrapped | ByName,
    inputs: Mapping[str, Any],
    plans: tuple[Plan, Plan],
    options: Mapping[str, Any],
    where: bool | str = False,
    **trace_options: Any,
) -> tuple[list[Raw], torch.Tensor]:
    """Generate with the KV cache, running the first plan on the prompt and the second on every step.

    Args:
        model: The wrapped model.
        inputs: Model inputs.
        plans: The plan of the prompt and the plan of the decode steps.
        options: Options of ``generate``, such as ``max_new_tokens``.
        where: False to run here, else nnsight's ``remote``.
        trace_options: Further options of the trace, such as ``backend=...``.

    Returns:
        One `Raw` per forward pass, and the sequences ``[batch pos]`` with the prompt.
    """
    walk, last_logits, save = walking.walk, walking.last_logits, nnsight.save
    prompt_plan, step_plan = plans
    newest = torch.full((inputs["input_ids"].shape[0],), -1)
    # With some caches generate compiles the model of itself, and what is compiled has no sites.
    given: dict[str, Any] = {**options, **trace_options, "disable_compile": True}
    given |= {"remote": where} if where else {"fn": "generate"}
    with ready_to_trace(model, *plans) as traced, warnings.catch_warnings():
        # The open-ended loop below asks for one step more than the model makes.
        warnings.filterwarnings("ignore", message=".*was never reached.*", category=UserWarning)
        with (traced.generate if where else traced.trace)(**given) as tracer:
            steps, memory = save([]), {}
            with tracer.invoke(**inputs):
                for step in tracer.iter[:]:
                    plan = step_plan if step else prompt_plan
                    answers = walk(traced, tracer, plan, step, memory)
                    steps.append((answers, last_logits(traced.output.logits, newest)))
            with tracer.invoke():
                sequences = save(tracer.result)
    raws = [Raw(sited(answers), logits) for answers, logits in steps]
    made = sequences.shape[1] - inputs["input_ids"].shape[1]
    if len(raws) != made:
        raise AttentionCallError(
            f"Read {len(raws)} of {made} forward passes; expected all. A site was not reached at "
            "every decode step: probe this model with lvlm.run(...), or leave out the probe of that "
            "site."
        )
    return raws, sequences.detach().cpu()


def sited(answers: Mapping[Any, Mapping[tuple, Any]]) -> dict[Any, dict[Site, Any]]:
    """Answers keyed by `Site` instead of the plain tuples that travel."""
    return {
        slot: {Site(*key): value for key, value in of_probe.items()}
        for slot, of_probe in answers.items()
    }


class Effects(dict[Intervention, Effect]):
    """What every intervention did, found by the intervention object, else by the only equal one."""

    def __missing__(self, key: Any) -> Effect:
        equal = find(self, key)
        if len(equal) == 1:
            return equal[0]
        what = type(key).__name__ if isinstance(key, Intervention) else repr(key)
        which = f"which {len(equal)} of them equal" if equal else "which did nothing in this pass"
        raise InterventionError(
            f"Got {what}, {which}; expected one of {[type(it).__name__ for it in self]}. Effects are found "
            "by the object itself, or by the only one with equal parameters: keep it in a variable and "
            "pass that one."
        )


@dataclass(frozen=True, eq=False)
class Run(Result):
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "effects", Effects(self.effects))  # a file has a plain dict

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the results: the probes' classes, with ``_1``, ``_2`` where one ran twice."""
        return names_of(self.results)

    def __getitem__(self, probe: Probe | str) -> Any:
        """The result of a probe of this run: the object itself, its name, or one with equal parameters.

        A run that was loaded has probes of its own, which equal those it was made with.

        Raises:
            ProbeError: If the probe did not run.
        """
        found = find(self.results, probe)
        if found:
            return found[0]
        what = type(probe).__name__ if isinstance(probe, Probe) else repr(probe)
        raise ProbeError(
            f"Got {what}, which did not run; expected one of this run's, {list(self.names)}. Results are "
            "found by the probe object itself, by its name, or by one with equal parameters. Probes of "
            "the vision tower run on the prompt, not at decode steps."
        )


@dataclass(frozen=True, eq=False)
class Generation(Result):
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

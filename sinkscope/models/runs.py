"""Run a plan on a model through nnsight: one trace for any number of probes and interventions."""

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

from sinkscope.anatomy.context import Context
from sinkscope.anatomy.towers import Anatomy
from sinkscope.errors import AttentionCallError, InterventionError, NonFiniteError, ProbeError
from sinkscope.interventions.application import check_reach
from sinkscope.kernels import walk as walking
from sinkscope.kernels.edited_call import STAGES
from sinkscope.models.wrapping import ByName, Wrapped
from sinkscope.protocols import Edit, Effect, Intervention, Probe, Read, effect_from
from sinkscope.results import Result, find, names_of
from sinkscope.sites import Site

Plan = list[dict[str, Any]]


def plan_of(
    probes: Sequence[Probe], interventions: Sequence[Intervention], context: Context, model: Any
) -> Plan:
    """The plan of probes and interventions, which must be made for this model (an `LVLM`)."""
    reads = [(slot, read) for slot, probe in enumerate(probes) for read in probe.reads(context)]
    edits = []
    for slot, it in enumerate(interventions):
        check_fits = getattr(it, "check_fits", None)
        if check_fits is not None:
            check_fits(model)
        mine = it.edits(context)
        check_reach(it, mine, context.anatomy.feed_layers)
        edits += [(slot, edit) for edit in mine]
    return make_plan(context.anatomy, reads, edits)


def make_plan(
    anatomy: Anatomy, reads: Sequence[tuple[int, Read]], edits: Sequence[tuple[int, Edit]] = ()
) -> Plan:
    """Group all reads and edits by site and sort the sites in forward order.

    Slots are the numbers of probes and interventions. Edits of one site apply in the order of their
    stages, and in the order given inside a stage.

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


def step_at(
    anatomy: Anatomy, site: Site, reads: Sequence = (), edits: Sequence = (), stages: Sequence = ()
) -> dict[str, Any]:
    """One step of the plan: where a site lies in this model, and what is asked there."""
    step = {**vars(site), "reads": reads, "edits": edits, "stages": stages}
    if site.tower == "projector":
        return step | {"path": anatomy.projector, "how": site.name}
    tower, layer = anatomy.tower(site.tower), site.layer
    if site.name == "attention":
        call = tower.call(layer)
        return step | vars(call) | {"path": tower.attention[layer], "how": "attention"}
    if site.name in ("attn_out", "mlp_out"):
        branch = tower.branch(site.name, layer)
        return step | {"path": branch.path, "how": "output", "factors": branch.factors}
    path, how = {
        "resid_pre": (tower.blocks[layer], "input"),
        "mlp_hidden": (tower.neurons[layer], "input"),
        "resid_post": (tower.blocks[layer], "output"),
    }[site.name]
    return step | {"path": path, "how": how}


@dataclass(frozen=True)
class TraceOutput:
    """What one forward pass brought back: ``answers[slot][site] -> kernel result``, and logits."""

    answers: dict[Any, dict[Site, Any]]
    logits: Tensor


@contextmanager
def ready_to_trace(model: Wrapped | ByName, *plans: Plan, grad: bool = False) -> Iterator[Any]:
    """Lend nnsight what some plans look at; their kernels travel by source on remote runs.

    A user's kernel travels with the functions of its own module; what it imports from elsewhere must
    exist on the server.
    """
    nnsight.register(sys.modules["sinkscope"])
    steps = [step for plan in plans for step in plan]
    for _, kernel, _ in (one for step in steps for one in (*step["reads"], *step["edits"])):
        home = sys.modules.get(kernel.__module__)
        if home is not None and kernel.__module__ != "__main__":
            nnsight.register(home)
    paths = {"", *(step["path"] for step in steps)}
    outputs = {step["path"] for step in steps if step["how"] == "output"}
    with model.on(paths, outputs, grad) as traced:
        yield traced


def run_plan(
    model: Wrapped | ByName,
    inputs: Mapping[str, Any],
    plan: Plan,
    last: Tensor | None,
    where: bool | str = False,
    grad: bool = False,
) -> TraceOutput:
    """Run one forward pass.

    Args:
        model: The wrapped model.
        inputs: Model inputs.
        plan: The plan.
        last: Int ``[batch]``, the position of every row whose logits to keep, or None for all.
        where: False to run here, else nnsight's ``remote``.
        grad: Whether the logits keep their graph.
    """
    walk, last_logits, save = walking.walk, walking.last_logits, nnsight.save
    answers: Any = None
    logits: Any = None
    remote: dict[str, Any] = {"remote": where} if where else {}
    with (
        ready_to_trace(model, plan, grad=grad) as traced,
        traced.trace(**inputs, **remote) as tracer,
    ):
        answers = save(walk(traced, tracer, plan))
        logits = save(last_logits(traced.output.logits, last, grad))
    if logits is None:
        raise AttentionCallError(
            "The forward pass ended while a probe still waited for attention windows; expected the "
            "windows to cover the sequence. Please report this model: its anatomy is wrong."
        )
    return TraceOutput(sited(answers), logits)


def run_until_read(
    model: Wrapped | ByName, inputs: Mapping[str, Any], plan: Plan
) -> dict[Any, dict[Site, Any]]:
    """The answers of a forward pass here that ends where the plan's last site is read: no logits."""
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
) -> tuple[list[TraceOutput], Tensor]:
    """Generate with the KV cache, with a plan for the prompt and another for every decode step.

    Args:
        model: The wrapped model.
        inputs: Model inputs.
        plans: Both plans.
        options: Options of ``generate``, such as ``max_new_tokens``.
        where: False to run here, else nnsight's ``remote``.

    Returns:
        What every forward pass brought back, and the sequences ``[batch pos]`` with the prompt.
    """
    walk, last_logits, save = walking.walk, walking.last_logits, nnsight.save
    prompt_plan, step_plan = plans
    newest = torch.full((inputs["input_ids"].shape[0],), -1)
    # With some caches generate compiles the model of itself, and what is compiled has no sites.
    given: dict[str, Any] = {**options, "disable_compile": True}
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
    outputs = [TraceOutput(sited(answers), logits) for answers, logits in steps]
    made = sequences.shape[1] - inputs["input_ids"].shape[1]
    if len(outputs) != made:
        raise AttentionCallError(
            f"Read {len(outputs)} of {made} forward passes; expected all. A site was not reached at "
            "every decode step: probe this model with lvlm.run(...), or leave out the probe of that "
            "site."
        )
    return outputs, sequences.detach().cpu()


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
            f"Got {what}, {which}; expected one of {[type(it).__name__ for it in self]}. Effects are "
            "found by the object itself, or by the only one with equal parameters: keep it in a "
            "variable and pass that one."
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
    output: TraceOutput,
    probes: Sequence[Probe],
    context: Context,
    interventions: Sequence[Intervention] = (),
    *,
    keep_all: bool = False,
) -> Run:
    """Typed results of probes and interventions, in the order of their slots.

    ``keep_all`` says whether the logits are those of all positions.

    Raises:
        NonFiniteError: If live logits hold NaN or infinity.
    """
    live = context.live("language")
    live = live if keep_all else live.any(dim=1, keepdim=True)
    bad = ~torch.isfinite(output.logits.detach()).all(dim=-1).cpu() & live
    if bad.any():
        raise NonFiniteError(
            f"Got NaN or infinite logits at {int(bad.sum())} of {int(live.sum())} live positions "
            f"(first in row {int(bad.any(1).nonzero()[0])}); expected finite ones. Load the model in "
            "bfloat16 or float32 and check the weights and the images."
        )
    results = {
        probe: probe.finish(output.answers.get(slot, {}), context)
        for slot, probe in enumerate(probes)
    }
    # The prompt pass has no ended row, and its edits of the vision tower have rows of images.
    ended = context.ended if context.step else None
    effects = Effects(
        (it, effect_from(output.answers["edit", slot], context.step, ended))
        for slot, it in enumerate(interventions)
        if ("edit", slot) in output.answers
    )
    return Run(output.logits, results, effects, context.step)

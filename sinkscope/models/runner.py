"""Run a plan on a model through nnsight: one trace for any number of probes.

This is the only room that imports nnsight.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import httpx
import nnsight
import torch
from torch import nn

import sinkscope
from sinkscope.errors import AttentionCallError, CheckpointError
from sinkscope.interventions.protocol import Edit
from sinkscope.kernels import walk as walking
from sinkscope.kernels.recipe import STAGES
from sinkscope.models.anatomy import Anatomy
from sinkscope.probes.protocol import Read
from sinkscope.sites import Site

Plan = list[dict[str, Any]]


class LocalModel(nnsight.NNsight):
    """A module that is already here, traced with the keyword arguments of one prepared batch."""

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        return int("input_ids" in kwargs)

    def _batch(self, invokes: list, fn: Any) -> tuple:
        return invokes[0]


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


def wrap(module: nn.Module) -> LocalModel:
    """Trace a module that is already here."""
    return LocalModel(module)


def wrap_remote(source: Any, processor: Any, **options: Any) -> nnsight.TransformersModel:
    """A model for remote runs: a repository id (no weights here) or a module for ``remote="local"``."""
    task = "image-text-to-text"
    return nnsight.TransformersModel(source, task=task, processor=processor, **options)


def module_of(model: Any) -> nn.Module:
    """The module inside a wrapped model; without weights if it was wrapped by name."""
    return model._module


def check_reachable(model: nnsight.TransformersModel, name: str) -> None:
    """Ask the hub for the model's canonical name, as every remote run must.

    Raises:
        CheckpointError: If the hub does not know the model or cannot be reached.
    """
    try:
        model.to_model_key()
    except (OSError, ValueError, TypeError, httpx.HTTPError) as error:
        raise CheckpointError(
            f"The hub could not be asked for the canonical name of {name!r} ({type(error).__name__}), "
            "which a remote run needs; expected a public repository and a network. A model that only "
            "exists here cannot run there: write remote='local', or "
            "ss.LVLM.from_pretrained(repository, remote=True)."
        ) from error


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


ONE_AT_A_TIME = threading.RLock()
"""nnsight drives one pass through a model at a time; other threads wait for their turn."""


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Evaluation mode in every module, whatever mode each is in, and all as they were at the end.

    Modules are looked at one by one: an adapter comes in training mode into a model that is not.
    """
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def ready_to_trace(
    model: Any, where: bool | str, *plans: Plan, grad: bool = False
) -> Iterator[None]:
    """Evaluation mode without gradients, but with tensors that may have them: kernels ask for some.

    Args:
        model: What `wrap` or `wrap_remote` returned.
        where: Where the trace will run; runs on a server may overlap.
        plans: The plans of the trace.
        grad: Whether gradients are wanted all the same.
    """
    ship_kernels(*plans)
    turn = ONE_AT_A_TIME if where in (False, "local") else nullcontext()
    # Tensors made under inference_mode could never have a gradient, not even in a kernel of ours.
    no_inference = torch.inference_mode(mode=False)
    with turn, evaluated(module_of(model)), no_inference, torch.set_grad_enabled(grad):
        yield


def run_plan(
    model: Any,
    inputs: Mapping[str, Any],
    plan: Plan,
    last: torch.Tensor | None,
    where: bool | str = False,
    grad: bool = False,
    **trace_options: Any,
) -> Raw:
    """One forward pass.

    Args:
        model: What `wrap` or `wrap_remote` returned.
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
        ready_to_trace(model, where, plan, grad=grad),
        model.trace(**inputs, **trace_options) as tracer,
    ):
        answers = save(walk(model, tracer, plan))
        logits = save(last_logits(model.output.logits, last, grad))
    if logits is None:
        raise AttentionCallError(
            "The forward pass ended while a probe still waited for attention windows; expected the "
            "windows to cover the sequence. Please report this model: its anatomy is wrong."
        )
    return Raw(sited(answers), logits)


def run_until_read(model: Any, inputs: Mapping[str, Any], plan: Plan) -> dict[Any, dict[Site, Any]]:
    """A forward pass here that ends where the plan's last site is read: no logits.

    Args:
        model: What `wrap` returned.
        inputs: Model inputs.
        plan: The plan.

    Returns:
        ``answers[slot][site] -> kernel result``.
    """
    walk, save = walking.walk, nnsight.save
    answers: Any = None
    with ready_to_trace(model, False, plan), model.trace(**inputs) as tracer:
        answers = save(walk(model, tracer, plan))
        tracer.stop()
    return sited(answers)


def generate_plan(
    model: Any,
    inputs: Mapping[str, Any],
    plans: tuple[Plan, Plan],
    options: Mapping[str, Any],
    where: bool | str = False,
    **trace_options: Any,
) -> tuple[list[Raw], torch.Tensor]:
    """Generate with the KV cache, running the first plan on the prompt and the second on every step.

    Args:
        model: What `wrap` or `wrap_remote` returned.
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
    local = isinstance(model, LocalModel)
    begin: Any = model.trace if local else model.generate
    given: dict[str, Any] = {**options, **trace_options}
    if local:
        given["fn"] = "generate"
    if where:
        given["remote"] = where
    with ready_to_trace(model, where, *plans), warnings.catch_warnings():
        # The open-ended loop below asks for one step more than the model makes.
        warnings.filterwarnings("ignore", message=".*was never reached.*", category=UserWarning)
        with begin(**given) as tracer:
            steps, memory = save([]), {}
            with tracer.invoke(**inputs):
                for step in tracer.iter[:]:
                    plan = step_plan if step else prompt_plan
                    answers = walk(model, tracer, plan, step, memory)
                    steps.append((answers, last_logits(model.output.logits, newest)))
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

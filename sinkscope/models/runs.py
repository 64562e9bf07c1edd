"""Run a plan on a model: one pass for any number of probes and interventions, and what it brings back."""

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationMixin

from sinkscope import errors
from sinkscope.anatomy.context import Context
from sinkscope.checks import check_choice
from sinkscope.models import hooks
from sinkscope.models.remote import Call
from sinkscope.models.requests import Plan
from sinkscope.models.tracing import Model, generate_traced, run_traced
from sinkscope.models.wire import ServerError, read_traceback
from sinkscope.models.wrapping import Inputs, Wrapped
from sinkscope.protocols import Effect, Intervention, Probe, effect_from
from sinkscope.results import Result, find, names_of
from sinkscope.sites import Site

Answers = dict[Any, dict[Site, Any]]
"""Slot of a probe or an edit -> site -> what the kernel gave."""
Output = tuple[Answers, Tensor]
"""What one forward pass brought back: answers and logits."""


@contextmanager
def explained(*, moved: bool) -> Iterator[None]:
    """Errors of this library in the place of those that a kernel raises inside a pass, and, where edits have
    ``moved`` tokens, the model itself."""
    try:
        yield
    except ServerError as error:
        if ours := translated(*read_traceback(error.text), moved=moved):
            raise ours from error
        raise
    except (ValueError, RuntimeError, IndexError) as error:
        known = isinstance(error, (errors.SinkscopeError, torch.OutOfMemoryError))
        frames = [] if known else traceback.extract_tb(error.__traceback__)
        if ours := translated(type(error).__name__, str(error).strip(), frames, moved=moved):
            raise ours from error
        raise


def translated(
    kind: str, said: str, frames: Sequence[traceback.FrameSummary], *, moved: bool
) -> errors.SinkscopeError | None:
    """The error of this library for one raised inside a pass, here or on a server; None if it stays itself."""
    ours = [i for i, one in enumerate(frames) if f"{os.sep}sinkscope{os.sep}" in one.filename]
    last = frames[ours[-1] + 1 :] if ours else []
    inside = bool(ours) and "kernels" in frames[ours[-1]].filename
    theirs = any("site-packages" not in frame.filename for frame in last)  # a user's own kernel
    own = kind not in ("ValueError", "RuntimeError", "IndexError")
    if own or theirs or not frames or not (inside or moved):
        return None
    if not inside:
        got = f"The model fails on tokens that an edit has put in ({kind}: {said})"
        wanted = "a tower whose masks and positions follow the number of tokens"
        return errors.InterventionError(f"{got}; expected {wanted}.")
    if not str(frames[-1].line).startswith("raise"):
        got = f"{frames[ours[-1]].name} failed on what this model gives it ({kind}: {said})"
        return errors.ModelError(
            f"{got}; expected what its anatomy says. Please report this class."
        )
    return (errors.AttentionCallError if kind == "RuntimeError" else errors.ProbeError)(said)


def generator_of(module: Any) -> str:
    """The path of the part whose passes ``generate`` makes, "" for the model itself: some models embed the
    prompt and call ``generate`` of the language model inside. ModelError if there is none."""
    own = getattr(type(module), "generate", None)
    parts = [path for path, part in module.named_modules() if isinstance(part, GenerationMixin)]
    if own is None or not parts:
        got = f"Got a {type(module).__name__}, which has no generate of transformers"
        raise errors.ModelError(
            f"{got}; expected one. Write lvlm.run(sample, ...) for single passes."
        )
    usual: Any = GenerationMixin
    return next(filter(None, parts), "") if own is not usual.generate else ""


def moved_by(plan: Plan) -> bool:
    """Whether edits of a plan move tokens."""
    return any(step.get("moved") for step in plan)


ENGINES = ("hooks", "nnsight")
Engine = Literal["hooks", "nnsight"]
DEFAULT = "hooks"  # the test suite runs with either: pytest --engine nnsight


def choose_engine(engine: str | None, where: bool | str, module: Any, plans: Sequence[Plan]) -> str:
    """What runs some plans: `sinkscope.models.hooks` where the model is here, and nnsight elsewhere."""
    hint = "None is 'hooks' for runs here and 'nnsight' for remote ones."
    check_choice((None, *ENGINES), error=errors.InputError, hint=hint, engine=engine)
    fits = not where and all(hooks.fits(module, plan) for plan in plans)
    if engine == "hooks" and not fits:
        got, wanted = f"with remote={where!r}", "a run here"
        if not where:
            got, wanted = (
                "for attention that no registry gives",
                "transformers' attention interface",
            )
        raise errors.InputError(
            f"Got engine='hooks' {got}; expected {wanted}. Write engine='nnsight'."
        )
    return engine or (DEFAULT if fits else "nnsight")


def run_plan(
    model: Model,
    inputs: Inputs,
    plan: Plan,
    last: Tensor | None,
    call: Call | None,
    grad: bool,
    engine: str = "nnsight",
) -> Output:
    """Run one forward pass.

    ``last``, int ``[batch]``, is the position of every row whose logits to keep, None for all; ``call``
    carries it to a server, None to run here; ``grad`` keeps the graph of the logits.
    """
    with explained(moved=moved_by(plan)):
        if engine == "hooks" and isinstance(model, Wrapped):
            answers, logits = hooks.run_here(model, inputs, plan, last, grad)
        else:
            answers, logits = run_traced(model, inputs, plan, last, call, grad)
    return sited(answers), logits


def generate_plan(
    model: Model,
    inputs: Inputs,
    plans: Sequence[Plan],
    options: Inputs,
    call: Call | None,
    at: str = "",
    engine: str = "nnsight",
) -> tuple[list[Output], Tensor]:
    """Outputs of all passes and sequences ``[batch pos]``, with plans for the prompt and for a step, of the
    part ``at`` a path that `generator_of` gives."""
    # With some caches generate compiles the model of itself, and what is compiled has no sites.
    given: dict[str, Any] = {**options, "disable_compile": True}
    with explained(moved=any(map(moved_by, plans))):
        if engine == "hooks" and isinstance(model, Wrapped):
            steps, sequences = hooks.generate_here(model, inputs, plans, given, at)
        else:
            steps, sequences = generate_traced(model, inputs, plans, given, call, at)
    prompt, sequences = inputs["input_ids"].cpu(), sequences.detach().cpu()
    if not torch.equal(sequences[:, : prompt.shape[1]], prompt):
        got = "The model's generate changes the prompt that it is given; expected sequences that begin with it"
        raise errors.ModelError(f"{got}. Write lvlm.run(sample, ...) for single passes.")
    made = sequences.shape[1] - prompt.shape[1]
    if len(steps) != made:
        got = f"Read {len(steps)} of {made} forward passes; expected all. A site was not reached at"
        write = "write lvlm.run(...), or leave out the probe of that site."
        raise errors.AttentionCallError(f"{got} every decode step: {write}")
    return [(sited(answers), logits) for answers, logits in steps], sequences


def sited(answers: Mapping[Any, Mapping[tuple, Any]]) -> Answers:
    """Answers keyed by `Site` instead of the plain tuples that travel."""
    return {s: {Site(*key): value for key, value in few.items()} for s, few in answers.items()}


class Effects(dict[Intervention, Effect]):
    """What every intervention did, found by the intervention object, else by the only equal one."""

    def __missing__(self, key: Any) -> Effect:
        equal = find(self, key)
        if len(equal) == 1:
            return equal[0]
        got = f"Got {type(key).__name__ if isinstance(key, Intervention) else repr(key)}, which "
        got += f"{len(equal)} of them equal" if equal else "did nothing in this pass"
        known = f"one of {[type(it).__name__ for it in self]}, the object or the only equal one"
        raise errors.InterventionError(f"{got}; expected {known}.")


@dataclass(frozen=True, eq=False)
class Run(Result):
    """What one forward pass brought back: ``run[probe]`` is a probe's typed result.

    Attributes:
        logits: Float ``[batch pos vocab]``; one position, the last live one, if ``logits="last"``.
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
        """The result of a probe: the object itself, its name, or one with equal parameters."""
        if found := find(self.results, probe):
            return found[0]
        what = type(probe).__name__ if isinstance(probe, Probe) else repr(probe)
        got = f"Got {what}, which did not run; expected one of this run's, {list(self.names)}, by"
        hint = "Probes of the vision tower do not run at decode steps."
        raise errors.ProbeError(f"{got} object, name, or equal parameters. {hint}")


@dataclass(frozen=True, eq=False)
class Generation(Result):
    """What a generation brought back: ``sequences`` int ``[batch pos]``, prompt and answer.

    ``text`` has the answers without special tokens, None without a tokenizer; ``steps`` one `Run` for the
    prompt and for every decode step, NaN in rows that have ended.
    """

    sequences: Tensor
    text: tuple[str, ...] | None
    steps: tuple[Run, ...] = ()


def finish_run(
    output: Output, probes: Sequence[Probe], context: Context, interventions: Sequence[Intervention]
) -> Run:
    """Typed results of answers and logits; NonFiniteError if a live position has bad logits."""
    answers, logits = output
    live = context.live("language")
    live = live if logits.shape[1] == live.shape[1] else live.any(dim=1, keepdim=True)
    bad = ~torch.isfinite(logits.detach()).all(dim=-1).cpu() & live
    if bad.any():
        raise errors.NonFiniteError(
            f"Got NaN or infinite logits at {int(bad.sum())} of {int(live.sum())} live positions (first "
            f"in row {int(bad.any(1).nonzero()[0])}); expected finite ones. Load in bfloat16 or float32."
        )
    results = {p: p.finish(answers.get(i, {}), context) for i, p in enumerate(probes)}
    # The prompt pass has no ended row, and its edits of the vision tower have rows of images.
    ended = context.ended if context.step else None
    slots = ((("edit", slot), it) for slot, it in enumerate(interventions))
    told = {it: answers[slot] for slot, it in slots if slot in answers}
    effects = {it: effect_from(told[it], context.step, ended) for it in told}
    return Run(logits, results, effects, context.step)

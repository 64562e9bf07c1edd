"""Run a plan on a model through nnsight: one trace for any number of probes and interventions."""

import os
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import nnsight
import torch
from cloudpickle import list_registry_pickle_by_value, unregister_pickle_by_value
from torch import Tensor
from transformers import GenerationMixin

from sinkscope import errors
from sinkscope.anatomy.context import Context
from sinkscope.anatomy.towers import Anatomy
from sinkscope.checks import check_choice
from sinkscope.kernels.walk import last_logits, locate, read_site, walk
from sinkscope.models import hooks
from sinkscope.models.requests import Plan, step_at
from sinkscope.models.wrapping import ByName, Inputs, Wrapped
from sinkscope.protocols import Effect, Intervention, Probe, effect_from
from sinkscope.results import Result, find, names_of
from sinkscope.sites import Site, Tower

Model = Wrapped | ByName
Where = bool | str
Answers = dict[Any, dict[Site, Any]]
"""Slot of a probe or an edit -> site -> what the kernel gave."""
Output = tuple[Answers, Tensor]
"""What one forward pass brought back: answers and logits."""
TRAVELLING: Counter[str] = Counter()  # how many runs need a module that they have registered
REGISTERING = threading.Lock()


@contextmanager
def travelling(names: Iterable[str]) -> Iterator[None]:
    """Send modules to servers by their source until the block ends; what the user registered stays so."""
    with REGISTERING:
        known = list_registry_pickle_by_value()
        ours = [name for name in names if TRAVELLING[name] or name not in known]
        TRAVELLING.update(ours)
        for name in ours:
            nnsight.register(name)
    try:
        yield
    finally:
        with REGISTERING:
            TRAVELLING.subtract(ours)
            for name in list_registry_pickle_by_value().intersection(ours):
                if not TRAVELLING[name]:
                    unregister_pickle_by_value(ModuleType(name))  # the name alone is read


@contextmanager
def explained(*, moved: bool) -> Iterator[None]:
    """Errors of this library in the place of those that a kernel raises inside a pass, and, where edits have
    ``moved`` tokens, the model itself."""
    try:
        yield
    except (ValueError, RuntimeError, IndexError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if f"{os.sep}sinkscope{os.sep}" in frame.filename]
        said, known = str(error).strip(), (errors.SinkscopeError, torch.OutOfMemoryError)
        inside = bool(ours) and "kernels" in ours[-1].filename
        last = frames[frames.index(ours[-1]) + 1 :] if ours else []
        theirs = any("site-packages" not in frame.filename for frame in last)  # a user's own kernel
        own = type(error) not in (ValueError, RuntimeError, IndexError)
        if isinstance(error, known) or own or theirs or not (inside or moved):
            raise
        if not inside:
            got = f"The model fails on tokens that an edit has put in ({type(error).__name__}: {said})"
            wanted = "a tower whose masks and positions follow the number of tokens"
            raise errors.InterventionError(f"{got}; expected {wanted}.") from error
        if not str(frames[-1].line).startswith("raise"):
            got = f"{ours[-1].name} failed on what this model gives it ({type(error).__name__}: {said})"
            raise errors.ModelError(
                f"{got}; expected what its anatomy says. Please report this class."
            ) from error
        kind = errors.AttentionCallError if isinstance(error, RuntimeError) else errors.ProbeError
        raise kind(said) from error


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


@contextmanager
def ready_to_trace(
    model: Model, *plans: Plan, grad: bool = False, where: Where = False, at: str = ""
) -> Iterator[Any]:
    """Lend nnsight what some plans look at, and the part ``at`` a path; kernels travel to servers with their
    own module only."""
    steps = [step for plan in plans for step in plan]
    kernels = [one[1] for step in steps for one in (*step["reads"], *step["edits"])]
    homes = {"sinkscope", *(kernel.__module__ for kernel in kernels)} & sys.modules.keys()
    paths = {"", at, *(step["path"] for step in steps)}
    outputs = {step["path"] for step in steps if step["how"] == "output"}
    if where:
        nnsight.ndif.pull_env()  # what nnsight registers itself, once per process, is not ours
    homes = homes - {"__main__"} if where else set()
    with (
        explained(moved=any(map(moved_by, plans))),
        travelling(homes),
        model.on(paths, outputs, grad) as traced,
    ):
        yield traced


ENGINES = ("hooks", "nnsight")
Engine = Literal["hooks", "nnsight"]
DEFAULT = "hooks"  # the test suite runs with either: pytest --engine nnsight


def choose_engine(engine: str | None, where: Where, module: Any, plans: Sequence[Plan]) -> str:
    """What runs some plans: `sinkscope.models.hooks` where the model is here, and nnsight elsewhere."""
    hint = "None is 'hooks' for runs here and 'nnsight' for remote ones."
    check_choice((None, *ENGINES), error=errors.InputError, hint=hint, engine=engine)
    fits = not where and all(hooks.fits(module, plan) for plan in plans)
    if engine == "hooks" and not fits:
        got = f"Got engine='hooks' {f'with remote={where!r}' if where else 'for attention that no registry'}"
        wanted = "a run here" if where else " gives; expected attention of transformers' interface"
        got = f"{got}; expected {wanted}" if where else f"{got}{wanted}"
        raise errors.InputError(f"{got}. Write engine='nnsight'.")
    return engine or (DEFAULT if fits else "nnsight")


def run_plan(
    model: Model,
    inputs: Inputs,
    plan: Plan,
    last: Tensor | None,
    where: Where,
    grad: bool,
    engine: str = "nnsight",
) -> Output:
    """Run one forward pass.

    ``last``, int ``[batch]``, is the position of every row whose logits to keep, None for all; ``where``
    is False to run here, else nnsight's ``remote``; ``grad`` keeps the graph of the logits.
    """
    if engine == "hooks" and isinstance(model, Wrapped):
        with explained(moved=moved_by(plan)):
            answers, logits = hooks.run_here(model, inputs, plan, last, grad)
        return sited(answers), logits
    save, go, pick = nnsight.save, walk, last_logits  # a block that travels takes locals along
    answers: Any = None
    logits: Any = None
    remote: dict[str, Any] = {"remote": where} if where else {}
    with (
        ready_to_trace(model, plan, grad=grad, where=where) as traced,
        traced.trace(**inputs, **remote) as tracer,
    ):
        answers = save(go(traced, tracer, plan))
        logits = save(pick(traced.output.logits, last, grad))
    if logits is None:
        got = "The forward pass ended while a probe still waited for attention windows"
        wanted = "windows that cover the sequence. Please report this model: its anatomy is wrong"
        raise errors.AttentionCallError(f"{got}; expected {wanted}.")
    return sited(answers), logits


def generate_plan(
    model: Model,
    inputs: Inputs,
    plans: Sequence[Plan],
    options: Inputs,
    where: Where,
    at: str = "",
    engine: str = "nnsight",
) -> tuple[list[Output], Tensor]:
    """Outputs of all passes and sequences ``[batch pos]``, with plans for the prompt and for a step, of the
    part ``at`` a path that `generator_of` gives."""
    # With some caches generate compiles the model of itself, and what is compiled has no sites.
    given: dict[str, Any] = {**options, "disable_compile": True}
    if engine == "hooks" and isinstance(model, Wrapped):
        with explained(moved=any(map(moved_by, plans))):
            steps, sequences = hooks.generate_here(model, inputs, plans, given, at)
    else:
        steps, sequences = generate_traced(model, inputs, plans, given, where, at)
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


def generate_traced(
    model: Model, inputs: Inputs, plans: Sequence[Plan], options: Inputs, where: Where, at: str
) -> tuple[list[Any], Tensor]:
    """Answers and logits of all passes, and sequences, through nnsight."""
    save, go, pick, part = nnsight.save, walk, last_logits, locate
    prompt_plan, step_plan = plans
    newest = torch.full((inputs["input_ids"].shape[0],), -1)
    given = {**options, **({"remote": where} if where else {"fn": "generate"})}
    with ready_to_trace(model, *plans, where=where, at=at) as traced, warnings.catch_warnings():
        # The open-ended loop below asks for one step more than the model makes.
        warnings.filterwarnings("ignore", message=".*was never reached.*", category=UserWarning)
        with (traced.generate if where else traced.trace)(**given) as tracer:
            steps, memory = save([]), {}
            with tracer.invoke(**inputs):
                for step in tracer.iter[:]:
                    plan = step_plan if step else prompt_plan
                    answers = go(traced, tracer, plan, step, memory)
                    steps.append((answers, pick(part(traced, at).output.logits, newest)))
            with tracer.invoke():
                sequences = save(tracer.result)
    return steps, sequences


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


class OpenTrace:
    """A trace of the user's own: nnsight runs its block with this, and `LVLM.site` reads from it."""

    def __init__(self, model: Wrapped, anatomy: Anatomy, grad: bool = False) -> None:
        self._model, self._anatomy, self._grad = model, anatomy, grad
        self._root: Any = None
        self._tracer: Any = None
        self._outputs: set[str] = set()
        self._copies: dict[Site, tuple[Tensor, int]] = {}

    def __call__(self, tracer: Any) -> None:
        """Run the block; InterventionError if it edited in place what the model does not see."""
        try:
            with self._model.on(None, self._outputs, self._grad) as self._root:
                self._tracer = tracer
                tracer.execute(tracer.info.code)
            for site, (value, version) in self._copies.items():
                if value._version != version:
                    got = f"Got an edit in place of {site}, a copy that the model does not use"
                    write = f"lvlm.set_site({site.tower!r}, {site.layer}, {site.name!r}, new)"
                    raise errors.InterventionError(f"{got}; expected {write}.")
        finally:
            self._root = self._tracer = None
            self._copies = {}

    @property
    def root(self) -> Any:
        """The nnsight model; ProbeError if the block has ended, or not begun."""
        if self._root is None:
            got = "Got a site or nnsight's model outside of a trace; expected it in the block"
            write = "with lvlm.trace(sample): x = lvlm.site('language', 0, 'resid_post').save()"
            raise errors.ProbeError(f"{got}. Write {write}.")
        return self._root

    def site(self, tower: Tower, layer: int, name: str, **asked: Any) -> Any:
        """The value at a site that this model has, see `LVLM.site`; ``asked`` edits it."""
        root, site = self.root, Site(tower, name, layer)
        if tower == "projector":
            check_choice((0,), error=errors.LayerError, layer=layer)
        else:
            self._anatomy.tower(tower).layers(layer)
        step = step_at(self._anatomy, site, **asked)
        if not step["path"]:
            got = f"Got {site}, but that MLP has no last linear map; expected another site."
            raise errors.ModelError(got)
        if step["how"] == "output":
            self._outputs.add(step["path"])
        value: Any = read_site(root, self._tracer, step, {}, {})
        self._copies.pop(site, None)
        if step.get("factors") and not asked:
            self._copies[site] = (value, value._version)
        return value

    def set_site(self, tower: Tower, layer: int, name: str, value: Any) -> None:
        """Replace the value at a site: see `LVLM.set_site`."""
        if name == "attention":
            got = "Got set_site for the attention call, which is no tensor"
            wanted = "an edit in place of what lvlm.site gives, or one such as ss.ScaleKeys"
            raise errors.InterventionError(f"{got}; expected {wanted}.")

        def replaced(old: Tensor, state: Any) -> tuple[Tensor, None]:
            given = getattr(value, "shape", None), getattr(value, "dtype", None)
            if not torch.is_tensor(value) or given != (old.shape, old.dtype):
                got = f"Got {type(value).__name__} of shape {given[0]} and dtype {given[1]}"
                wanted = f"a tensor {tuple(old.shape)} of {old.dtype}. Write new.to(old.dtype)"
                raise errors.InterventionError(f"{got} for {name!r}; expected {wanted}.")
            return value.to(old.device), None

        self.site(tower, layer, name, edits=[(None, replaced, {})])

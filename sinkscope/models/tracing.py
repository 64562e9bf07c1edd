"""Run a plan on a model through nnsight, here or on a server, and lend the user a trace of their own."""

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import nnsight
import torch
from cloudpickle import list_registry_pickle_by_value, unregister_pickle_by_value
from torch import Tensor

from sinkscope import errors
from sinkscope.anatomy.towers import Anatomy
from sinkscope.checks import check_choice
from sinkscope.kernels.walk import last_logits, locate, read_site, walk
from sinkscope.models.remote import Call, Job
from sinkscope.models.requests import Plan, mark_of, step_at
from sinkscope.models.wrapping import ByName, Inputs, Wrapped
from sinkscope.sites import Site, Tower

Model = Wrapped | ByName
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
def ready_to_trace(
    model: Model, *plans: Plan, grad: bool = False, where: bool = False, at: str = ""
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
    with travelling(homes), model.on(paths, outputs, grad) as traced:
        yield traced


def run_traced(
    model: Model, inputs: Inputs, plan: Plan, last: Tensor | None, call: Call | None, grad: bool
) -> tuple[Any, Tensor]:
    """Answers and logits of one forward pass, through nnsight, and for ``call.plain_at`` one without edits."""
    save, go, pick = nnsight.save, walk, last_logits  # a block that travels takes locals along
    at = None if call is None else call.plain_at
    mark = marked(call, inputs, plan, last, at)
    answers: Any = None
    logits: Any = None
    plain: Any = None
    if call is None or call.job_id is None:
        with ready_to_trace(model, plan, grad=grad, where=call is not None) as traced:
            if at is None:
                with traced.trace(**inputs, **carried(call, traced)) as tracer:
                    answers = save([mark, go(traced, tracer, plan)])
                    logits = save(pick(traced.output.logits, last, grad))
            else:
                with traced.session(**carried(call, traced)):
                    with traced.trace(**inputs) as tracer:
                        answers = save([mark, go(traced, tracer, plan)])
                        logits = save(pick(traced.output.logits, last))
                    with traced.trace(**inputs):
                        plain = save(pick(traced.output.logits, at))
    if isinstance(call, Job):
        answers, logits, plain = call.wait("answers", "logits", "plain")
    if call is not None:
        call.plain = plain
    if logits is None:
        got = "The forward pass ended while a probe still waited for attention windows"
        wanted = "windows that cover the sequence. Please report this model: its anatomy is wrong"
        raise errors.AttentionCallError(f"{got}; expected {wanted}.")
    return answers[1], logits


def generate_traced(
    model: Model, inputs: Inputs, plans: Sequence[Plan], options: Inputs, call: Call | None, at: str
) -> tuple[list[Any], Tensor]:
    """Answers and logits of all passes, and sequences, through nnsight."""
    save, go, pick, part = nnsight.save, walk, last_logits, locate
    prompt_plan, step_plan = plans
    newest = torch.full((inputs["input_ids"].shape[0],), -1)
    mark = marked(call, inputs, plans, options)
    given = {**options, **({} if call else {"fn": "generate"})}
    if call is None or call.job_id is None:
        with (
            ready_to_trace(model, *plans, where=call is not None, at=at) as traced,
            warnings.catch_warnings(),
        ):
            # The open-ended loop below asks for one step more than the model makes.
            warnings.filterwarnings("ignore", message=".*was never reached.*", category=UserWarning)
            start = traced.generate if call else traced.trace
            with start(**given, **carried(call, traced)) as tracer:
                steps, memory = save([mark]), {}
                with tracer.invoke(**inputs):
                    for step in tracer.iter[:]:
                        plan = step_plan if step else prompt_plan
                        answers = go(traced, tracer, plan, step, memory)
                        steps.append((answers, pick(part(traced, at).output.logits, newest)))
                with tracer.invoke():
                    sequences = save(tracer.result)
    if isinstance(call, Job):
        steps, sequences = call.wait("steps", "sequences")
    return steps[1:], sequences  # type: ignore[reportPossiblyUnbound]  # the block's, or the job's


def marked(call: Call | None, *asked: Any) -> str:
    """A mark of what is asked, for a job to bring back; none is needed for a run here."""
    if isinstance(call, Job):
        call.mark = mark_of(*asked)
    return call.mark if call else ""


def carried(call: Call | None, traced: Any) -> dict[str, Any]:
    """What nnsight takes to run a trace elsewhere."""
    return {"backend": call.of(traced)} if call else {}


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

"""Run a plan on a model that is here: functions of our own around ``forward`` and around attention.

nnsight drives a pass from a thread of its own, and changes threads at every site. Here the model asks: what
a module is given and gives passes through `Pass.enter` and `Pass.leave`, and the function that an attention
module looks up through `Pass.attend`. Both ways read the same plan and give the same bits.
"""

import functools
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sinkscope.anatomy.attention_call import REGISTRY, globals_of, looks_up
from sinkscope.errors import AttentionCallError
from sinkscope.kernels.attention import query_of
from sinkscope.kernels.edits import settle
from sinkscope.kernels.walk import (
    Place,
    ask,
    brought,
    check_windows,
    edit_call,
    first_tensor,
    last_logits,
    read_states,
)
from sinkscope.kernels.writes import proven
from sinkscope.models.requests import Plan
from sinkscope.models.wrapping import STATE, Inputs, Wrapped, held, lent, part_at, without_nnsight

Answered = tuple[Any, Tensor]
"""What one pass brought back: answers by slot and site, and logits."""


class Registry:
    """Stands for a registry of attention functions: what is looked up passes through ``around``."""

    def __init__(self, registry: Any, around: Callable[[Any], Any]) -> None:
        self._registry, self._around = registry, around

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)

    def __contains__(self, name: object) -> bool:
        return name in self._registry

    def __getitem__(self, name: str) -> Any:
        return self._around(self._registry[name])

    def get(self, name: str, default: Any = None) -> Any:
        """A function, or the default."""
        return self._around(self._registry.get(name, default))

    def get_interface(self, *given: Any, **named: Any) -> Any:
        """A function of a name, or the default of a file."""
        return self._around(self._registry.get_interface(*given, **named))


class Pass:
    """The passes of one run, the prompt's and those of decode steps, and what was asked in them.

    ``plans`` are for the prompt and for a decode step; ``at`` is the part whose passes count; ``pick`` takes
    what to keep of its logits. A site is visited once per pass, as often as nnsight does it; passes of other
    threads are none of these.
    """

    def __init__(
        self, model: Wrapped, plans: Sequence[Plan], at: str, pick: Callable[[Tensor], Tensor]
    ) -> None:
        self._root, self._known, self._at, self._pick = model.module, model.parts, at, pick
        self._plans = [_by_place(plan) for plan in plans]
        self._asking, self._thread = False, threading.get_ident()
        self._memory: dict[Any, Any] = {}
        self._placed: dict[Any, Any] = {}
        self._waiting: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._windows: dict[str, tuple[int, list[Any]]] = {}
        self._state: dict[Any, Any] = {}
        self._out: dict[Any, Any] = {}
        self.made: list[Answered] = []
        self._begin()

    @contextmanager
    def on(self, outputs: Collection[str], grad: bool = False) -> Iterator[None]:
        """Watch the model until the block ends; see `held`."""
        steps = [step for plan in self._plans for some in plan.values() for step in some]
        attention = {step["path"] for step in steps if step["how"] == "attention"}
        # The forward of an attention that is called once says nothing that its call does not.
        near = {step["path"] for step in steps if step["how"] != "attention" or _per_window(step)}
        paths = {self._at, *near, *attention}
        with ExitStack() as stack:
            parts = stack.enter_context(held(self._root, paths, outputs, grad, self._known))
            # A user's own nnsight runs a copy of a forward, with names of its own.
            theirs = [part for part in parts.values() if STATE in vars(part)]
            stack.enter_context(lent((part, without_nnsight(part)) for part in theirs))
            forwards = {path: self._watched(path, parts[path]) for path in {self._at, *near}}
            loans = [(parts[path], {"forward": forward}) for path, forward in forwards.items()]
            stack.enter_context(lent(loans))
            around = functools.partial(self._around, {id(parts[path]): path for path in attention})
            files = {id(names): names for path in attention for names in [globals_of(parts[path])]}
            for names in files.values():
                registry = names[REGISTRY]
                stack.callback(names.__setitem__, REGISTRY, registry)
                names[REGISTRY] = Registry(registry, around)
            yield

    def _watched(self, path: str, part: nn.Module) -> Callable[..., Any]:
        """The ``forward`` of a part, as it is now, with what is asked before and behind it."""
        body = part.forward

        @functools.wraps(body)  # generate reads the names of its arguments
        def forward(*args: Any, **named: Any) -> Any:
            if self._away:
                return body(*args, **named)
            args, named = self._quietly(self.enter, path, args, named)
            out = self._quietly(self.leave, path, body(*args, **named))
            if path == self._at:
                self._end(out.logits)
            return out

        return forward

    def _around(self, modules: dict[int, str], function: Any) -> Any:
        """A function that was looked up, with what is asked of the calls of some modules."""
        if not callable(function):
            return function

        def attend(*args: Any, **named: Any) -> Any:
            path = modules.get(id(args[0] if args else named.get("module")))
            if path is None or self._away or (path, "attention") not in self._waiting:
                return function(*args, **named)
            edited, args, named = self._quietly(self.attend, path, (function, args, named))
            return edited(*args, **named)

        return attend

    @property
    def _away(self) -> bool:
        """Whether a kernel uses a module of the model, or another thread does."""
        return self._asking or threading.get_ident() != self._thread

    def _begin(self) -> None:
        """Wait for a pass; generate may run the vision tower before it calls the model."""
        number = len(self.made)
        self._waiting = dict(self._plans[min(number, len(self._plans) - 1)])
        self._state = {"step": number, "memory": self._memory, "placed": self._placed}
        self._windows, self._out = {}, {}

    def _end(self, logits: Tensor) -> None:
        if self._waiting:
            step = next(iter(self._waiting.values()))[0]
            got = f"The forward pass ended without {step['tower']}.{step['name']}({step['layer']})"
            wanted = f"expected {step['path']} to be called, as the anatomy says"
            raise AttentionCallError(f"{got}; {wanted}. Leave out what reads or edits that site.")
        proven(self._state)
        settle(self._out, self._state)
        self.made.append((brought(self._out), self._pick(logits)))
        self._begin()

    def enter(self, path: str, args: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """What a module is given, after the edits of its input."""
        steps = self._waiting.pop((path, "input"), ())
        first: Any = args[0] if args else next(iter(named.values()), None)
        if steps:
            place = Place(input=first)
            for step in steps:
                value = read_states(self._root, place, step, self._state, self._out)
                ask(self._root, step, value, self._state, self._out)
            if place.input is not first:
                args = (place.input, *args[1:]) if args else args
                named = named if args else {**named, next(iter(named)): place.input}
        if any(map(_per_window, self._waiting.get((path, "attention"), ()))):
            self._windows[path] = (first_tensor(first).shape[:-1].numel(), [])
        return args, named

    def leave(self, path: str, output: Any) -> Any:
        """What a module gives, after the edits of its output."""
        if path in self._windows:
            length, calls = self._windows.pop(path)
            check_windows(self._waiting[path, "attention"][0], covered_by(calls), length)
        place = Place(output=output)
        for step in self._waiting.pop((path, "output"), ()):
            value = read_states(self._root, place, step, self._state, self._out)
            ask(self._root, step, value, self._state, self._out)
        return place.output

    def attend(self, path: str, call: tuple) -> tuple:
        """The call that a module makes of attention, after its edits; asked once all windows are there."""
        (step,), span = self._waiting[path, "attention"], None
        length, calls = self._windows.get(path, (None, []))
        if length is not None:
            covered = covered_by(calls)
            span = (covered, covered + query_of(call).shape[2])
        call = edit_call(step, call, span, self._state, self._out)
        calls.append(call)
        if span is None or span[1] == length:
            del self._waiting[path, "attention"]
            self._windows.pop(path, None)
            ask(self._root, step, calls, self._state, self._out)
        return call

    def _quietly(self, work: Callable[..., Any], *given: Any) -> Any:
        """Call a function; modules of the model that it uses are not watched."""
        self._asking = True
        try:
            return work(*given)
        finally:
            self._asking = False


def fits(root: nn.Module, plan: Plan) -> bool:
    """Whether all attention that a plan looks at is looked up in a registry; nnsight finds the rest."""
    paths = {step["path"] for step in plan if step["how"] == "attention"}
    return all(looks_up(part_at(root, path)) for path in paths)


def run_here(
    model: Wrapped, inputs: Inputs, plan: Plan, last: Tensor | None, grad: bool
) -> Answered:
    """Run one forward pass; see `sinkscope.models.runs.run_plan`."""
    one = Pass(model, [plan], "", lambda logits: last_logits(logits, last, grad))
    with one.on(_outputs(plan), grad):
        model.module(**inputs)
    return one.made[0]


def generate_here(
    model: Wrapped, inputs: Inputs, plans: Sequence[Plan], options: Inputs, at: str
) -> tuple[list[Answered], Tensor]:
    """All passes of a generation, and its sequences; see `sinkscope.models.runs.generate_plan`."""
    newest = torch.full((inputs["input_ids"].shape[0],), -1)
    made = Pass(model, plans, at, lambda logits: last_logits(logits, newest))
    with made.on(set().union(*map(_outputs, plans))):
        sequences = cast("Any", model.module).generate(**inputs, **options)
    return made.made, sequences


def covered_by(calls: Sequence[tuple]) -> int:
    """How many tokens some windows cover."""
    return sum(query_of(call).shape[2] for call in calls)


def _per_window(step: dict[str, Any]) -> bool:
    return step["how"] == "attention" and step["fires"] != "once"


def _outputs(plan: Plan) -> set[str]:
    return {step["path"] for step in plan if step["how"] == "output"}


def _by_place(plan: Plan) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The steps of a plan by path and ``"input"``, ``"output"`` or ``"attention"``."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for step in plan:
        found.setdefault((step["path"], step["how"]), []).append(step)
    return found

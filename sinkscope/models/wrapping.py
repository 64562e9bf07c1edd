"""nnsight's model of a module, and attributes lent to modules: back as they were when a block ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import httpx
import nnsight
import torch
from torch import nn

from sinkscope.errors import CheckpointError, ModelError

ABSENT = object()
"""Stands for an attribute that the instance does not have."""
Loan = tuple[object, Mapping[str, Any]]
"""An object, such as a module, and what its instance attributes are to be."""
STATE = "__nnsight__"
NAMES = ("forward", STATE, "_persistent_id")
"""What nnsight sets on a module; the last is how a request to a server names it."""
ONE_AT_A_TIME = threading.RLock()
"""nnsight drives one pass through a model at a time; other threads wait for their turn."""


@contextmanager
def lent(loans: Iterable[Loan]) -> Iterator[None]:
    """Set instance attributes until the block ends, also if it ends in an error."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for thing, attributes in loans:
            before.append((vars(thing), own_of(thing, attributes)))
            _set(vars(thing), attributes)
        yield
    finally:
        for own, attributes in reversed(before):
            _set(own, attributes)


def own_of(thing: object, names: Iterable[str]) -> dict[str, Any]:
    """The instance attributes of some names."""
    return {name: vars(thing).get(name, ABSENT) for name in names}


def _set(own: dict[str, Any], attributes: Mapping[str, Any]) -> None:
    """Set or take off instance attributes, past what a class does when they are set."""
    for name, value in attributes.items():
        if value is not ABSENT:
            own[name] = value
        else:
            own.pop(name, None)


@contextmanager
def evaluated(module: Any) -> Iterator[None]:
    """Evaluation mode in every module, whatever mode each is in, and all as they were at the end.

    Modules are looked at one by one: an adapter comes in training mode into a model that is not.
    """
    with lent([(part, {"training": False}) for part in module.modules() if part.training]):
        yield


@contextmanager
def undisturbed(module: Any) -> Iterator[None]:
    """Run passes of a whole model in evaluation mode that leave a user's own alone.

    What ``torch.compile`` made of a part has no sites, so the part runs as it was written. Qwen keeps
    ``rope_deltas`` of its last prompt for the decode steps that follow; they stay the user's.
    """
    kept = [part for part in (module, module.base_model) if "rope_deltas" in vars(part)]
    with (
        evaluated(module),
        torch.compiler.set_stance("force_eager"),
        lent([(part, own_of(part, ["rope_deltas"])) for part in kept]),
    ):
        yield


class LocalModel(nnsight.NNsight):
    """A module that is already here, traced with the keyword arguments of one prepared batch."""

    @property
    def device(self) -> None:
        """None: inputs stay where `LVLM` has put them, for the first parameter may lie elsewhere."""

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        return int("input_ids" in kwargs)

    def _batch(self, invokes: list, fn: Any) -> tuple:
        return invokes[0]


class Wrapped:
    """A module and what ``make`` makes of it: nnsight's model.

    nnsight wraps for good: it gives every module a ``forward`` of its own, which ``torch.compile``
    cannot read. Here that is taken off again, and lent to the parts that are looked at for as long
    as a trace runs. A module that has changed since is wrapped anew.
    """

    def __init__(self, module: nn.Module, make: Callable[[nn.Module], Any] = LocalModel) -> None:
        self._module, self._make = module, make
        self._model: Any = None
        self._seen: list[tuple[nn.Module, Any, Any, dict[str, nn.Module | None]]] = []
        self._loans: dict[str, Loan] = {}

    @property
    def model(self) -> Any:
        """What nnsight made of the module as it is now; it is traced inside of `on`."""
        with ONE_AT_A_TIME:
            still = (
                vars(part).get("forward") is own
                and type(part).forward == of_class
                and part._modules == children
                for part, own, of_class, children in self._seen
            )
            if not (self._seen and all(still)):
                self._wrap()
        return self._model

    @contextmanager
    def on(
        self, paths: Collection[str] | None = None, outputs: Collection[str] = ()
    ) -> Iterator[Any]:
        """What nnsight traces, until the block ends.

        Args:
            paths: The parts that will be looked at, None for all; the fewer, the faster. A request to
                a server names all parts.
            outputs: Those whose outputs are read, which may still grow: hooks of the user's run
                behind that, and may look, but not replace.

        Raises:
            ModelError: If a part is gone, or a hook replaces such an output.
        """
        with ONE_AT_A_TIME:
            model = self.model
            wanted = self._loans if paths is None or self._make is not LocalModel else paths
            if not self._loans.keys() >= set(wanted):
                raise ModelError(
                    f"The model has no {sorted(set(wanted) - self._loans.keys())[0]!r} any more; "
                    "expected the parts it was loaded with. Write ss.LVLM(model, processor) anew."
                )
            parts = {path: self._loans[path] for path in wanted}
            with (
                undisturbed(self._module),
                looking_only({path: part for path, (part, _) in parts.items()}, outputs),
                lent(parts.values()),
            ):
                yield model

    def _wrap(self) -> None:
        """Wrap the module, and take off what that has set."""
        parts = dict(self._module.named_modules())
        self._seen = [
            (part, vars(part).get("forward"), type(part).forward, dict(part._modules))
            for part in parts.values()
        ]
        with lent([(part, unwrapped(part)) for part in parts.values()]):
            self._model = self._make(self._module)
            self._loans = {path: (part, own_of(part, NAMES)) for path, part in parts.items()}

    def __getstate__(self) -> dict[str, Any]:
        """A copy wraps its own module."""
        return vars(self) | {"_model": None, "_seen": [], "_loans": {}}


class ByName:
    """A module that nnsight made itself, without weights: remote runs may overlap."""

    def __init__(self, model: nnsight.TransformersModel) -> None:
        self.model = model

    def on(
        self, paths: Collection[str] | None = None, outputs: Collection[str] = ()
    ) -> AbstractContextManager[Any]:
        """What nnsight traces."""
        return nullcontext(self.model)


@contextmanager
def looking_only(parts: Mapping[str, Any], outputs: Collection[str]) -> Iterator[None]:
    """Hooks on the parts raise where they replace one of the outputs, which is read before they run."""

    def guard(path: str, hook: Any) -> Any:
        def looking(module: Any, *given: Any) -> Any:
            made = hook(module, *given)
            if path in outputs and made is not None and made is not given[-1]:
                raise ModelError(
                    f"Got a forward hook on {path!r} that replaces its output, which is read before "
                    "hooks run, so that numbers would be of another model; expected hooks that only "
                    "look. Remove it (handle.remove()), change the module itself, or write an "
                    "intervention, such as ss.PatchActivations."
                )
            return made

        return looking

    before = [
        (part._forward_hooks, key, hook, path)
        for path, part in parts.items()
        for key, hook in part._forward_hooks.items()
    ]
    try:
        for hooks, key, hook, path in before:
            hooks[key] = guard(path, hook)
        yield
    finally:
        for hooks, key, hook, _ in before:
            if key in hooks:
                hooks[key] = hook


def unwrapped(part: nn.Module) -> dict[str, Any]:
    """What a module has where nnsight puts its own, without the nnsight of a user's own traces."""
    own = vars(part)
    forward = own.get("forward", ABSENT)
    if STATE in own:
        forward = MethodType(own[STATE].original, part)
    return dict.fromkeys(NAMES, ABSENT) | {"forward": forward}


def wrap_remote(source: Any, processor: Any, **options: Any) -> nnsight.TransformersModel:
    """A model for remote runs: a repository id (no weights here) or a module for ``remote="local"``."""
    task = "image-text-to-text"
    return nnsight.TransformersModel(source, task=task, processor=processor, **options)


def module_of(model: nnsight.TransformersModel) -> nn.Module:
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

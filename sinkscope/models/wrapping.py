"""Where a model runs, and nnsight's model of it, which is lent its modules for one pass only."""

import copy
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import httpx
import nnsight
import torch
from torch import Tensor, nn

from sinkscope.anatomy.weights import check_graph, device_of
from sinkscope.errors import CheckpointError, InputError, ModelError

Inputs = Mapping[str, Any]
"""Arguments of a model or of its decoder, by name."""
ABSENT = object()  # stands for an attribute that the instance does not have
Loan = tuple[object, Mapping[str, Any]]
"""An object, such as a module, and what its instance attributes are to be."""
STATE = "__nnsight__"
NAMES = ("forward", STATE, "_persistent_id")  # what nnsight sets on a module
ONE_AT_A_TIME = threading.RLock()
"""nnsight drives one pass through a model at a time; other threads wait for their turn."""


@contextmanager
def lent(loans: Iterable[Loan]) -> Iterator[None]:
    """Set instance attributes until the block ends, past what a class does when they are set."""

    def put(own: dict[str, Any], attributes: Mapping[str, Any]) -> None:
        for name, value in attributes.items():
            own.pop(name, None) if value is ABSENT else own.update({name: value})

    with ExitStack() as stack:
        for thing, attributes in loans:
            stack.callback(put, vars(thing), own_of(thing, attributes))
            put(vars(thing), attributes)
        yield


def own_of(thing: object, names: Iterable[str]) -> dict[str, Any]:
    """The instance attributes of some names."""
    return {name: vars(thing).get(name, ABSENT) for name in names}


class Parts:
    """The parts of a model, their paths and classes, and what each is made of."""

    def __init__(self, module: nn.Module) -> None:
        self.names = tuple((path, type(part)) for path, part in module.named_modules())
        self.all = list(module.modules())
        self._made_of = [(part, type(part), (*part._modules.values(),)) for part in self.all]

    @property
    def same(self) -> bool:
        """Whether the model still has these very parts."""
        for part, kind, own in self._made_of:
            inner = part._modules  # empty in most parts
            if type(part) is not kind or ((inner or own) and (*inner.values(),) != own):
                return False
        return True


def part_at(module: nn.Module, path: str) -> nn.Module:
    """The part at a dotted path, "" for the module itself; ModelError if it is not there any more."""
    here = module
    for name in path.split(".") if path else ():
        if (here := here._modules.get(name)) is None:
            got = f"The model has no {path!r} any more; expected the parts it was loaded with"
            raise ModelError(f"{got}. Write ss.LVLM(model, processor) anew.")
    return here


def evaluated(module: Any, parts: Parts | None = None) -> AbstractContextManager[None]:
    """Evaluation mode in every module, one by one: an adapter may train in a model that does not."""
    every = module.modules() if parts is None else parts.all
    return lent([(part, {"training": False}) for part in every if part.training])


@contextmanager
def undisturbed(module: Any, parts: Parts | None = None) -> Iterator[None]:
    """Run passes of a whole model, of which the ``parts`` may be known, in evaluation mode that leave a
    user's own alone.

    A part that ``torch.compile`` made has no sites, so it runs as it was written. Qwen keeps
    ``rope_deltas`` of its last prompt for the decode steps that follow; they stay the user's.
    """
    name = "rope_deltas"
    kept = [part for part in (module, module.base_model) if name in vars(part)]
    with (
        evaluated(module, parts),
        torch.compiler.set_stance("force_eager"),
        lent([(part, {name: vars(part)[name]}) for part in kept]),
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

    nnsight gives every module a ``forward`` that ``torch.compile`` cannot read. It is taken off again,
    and lent while a trace runs. A module that has changed since is wrapped anew.
    """

    def __init__(self, module: nn.Module, make: Callable[[nn.Module], Any] = LocalModel) -> None:
        self.module, self._make, self.parts = module, make, Parts(module)
        self._model: Any = None
        self._seen: list[tuple[nn.Module, Any, Any, dict[str, nn.Module | None]]] = []
        self._loans: dict[str, Loan] = {}

    @property
    def model(self) -> Any:
        """What nnsight made of the module as it is now; it is traced inside of `on`."""
        with ONE_AT_A_TIME:
            parts = dict(self.module.named_modules())
            seen = [
                (part, vars(part).get("forward"), type(part).forward, dict(part._modules))
                for part in parts.values()
            ]
            if self._model is None or seen != self._seen:
                with lent([(part, without_nnsight(part)) for part in parts.values()]):
                    self._model = self._make(self.module)
                    self._loans = {at: (part, own_of(part, NAMES)) for at, part in parts.items()}
                self._seen = seen
        return self._model

    @contextmanager
    def on(
        self, paths: Collection[str] | None, outputs: Collection[str], grad: bool
    ) -> Iterator[Any]:
        """What nnsight traces, until the block ends; ``paths`` None are all parts, and the rest is for `held`."""
        with ONE_AT_A_TIME:
            model = self.model
            wanted = self._loans if paths is None or self._make is not LocalModel else paths
            with (
                held(self.module, wanted, outputs, grad),
                lent(self._loans[path] for path in wanted),
            ):
                yield model

    def __getstate__(self) -> dict[str, Any]:
        """A copy wraps its own module."""
        return vars(self) | {"_model": None, "_seen": [], "_loans": {}}


def without_nnsight(part: nn.Module) -> dict[str, Any]:
    """What a module has where nnsight puts its own, without the nnsight of a user's own traces."""
    own = vars(part)
    forward = MethodType(own[STATE].original, part) if STATE in own else own.get("forward", ABSENT)
    return dict.fromkeys(NAMES, ABSENT) | {"forward": forward}


@contextmanager
def held(
    module: nn.Module,
    paths: Collection[str],
    outputs: Collection[str],
    grad: bool,
    known: Parts | None = None,
) -> Iterator[Mapping[str, Any]]:
    """Hold a model for one pass, never in inference mode, which has no gradient.

    ``paths`` are the parts that will be looked at; hooks of the user's must not replace one of the
    ``outputs``, which may still grow; ``grad`` keeps the graph. It gives the parts by path.
    """
    parts = {path: part_at(module, path) for path in paths}
    with (
        ONE_AT_A_TIME,
        torch.inference_mode(mode=False),
        torch.set_grad_enabled(grad),
        undisturbed(module, known),
        looking_only(parts, outputs),
    ):
        yield parts


@contextmanager
def looking_only(parts: Mapping[str, Any], outputs: Collection[str]) -> Iterator[None]:
    """Hooks on the parts raise where they replace one of the outputs, which is read before they run."""

    def guarded(path: str, hook: Any, module: Any, *given: Any) -> Any:
        made = hook(module, *given)
        if path in outputs and made is not None and made is not given[-1]:
            got = f"Got a forward hook on {path!r} that replaces its output, which is read before;"
            write = "Remove it, or write ss.PatchActivations(...)."
            raise ModelError(f"{got} expected hooks that only look. {write}")
        return made

    def restore(hooks: dict[int, Any], key: int, hook: Any) -> None:
        if key in hooks:
            hooks[key] = hook

    with ExitStack() as stack:
        for path, part in parts.items():
            for key, hook in list(part._forward_hooks.items()):
                stack.callback(restore, part._forward_hooks, key, hook)
                part._forward_hooks[key] = partial(guarded, path, hook)
        yield


class ByName:
    """A module that nnsight made itself, without weights: remote runs may overlap."""

    def __init__(self, model: nnsight.TransformersModel) -> None:
        self.model = model

    def on(self, *given: Any) -> AbstractContextManager[Any]:
        """What nnsight traces; see `Wrapped.on`."""
        return nullcontext(self.model)


def wrap_remote(source: Any, processor: Any, **options: Any) -> nnsight.TransformersModel:
    """A model for remote runs: a repository id (no weights here) or a module for ``remote="local"``."""
    task = "image-text-to-text"
    return nnsight.TransformersModel(source, task=task, processor=processor, **options)


def check_remote(remote: Any) -> bool | str:
    """Where to run; InputError if that is no bool, ``"local"`` or address of a server."""
    address = isinstance(remote, str) and remote.startswith(("http://", "https://"))
    if address or isinstance(remote, bool) or remote == "local":
        return remote
    known = "True for NDIF, 'local' for the same path without a server, False, or an 'https://...'"
    raise InputError(f"Got remote={remote!r}; expected {known} address of a server.")


class Places:
    """Where a model can run: here, here as on a server, or there (``by_name``: nnsight's model)."""

    def __init__(
        self, module: Any, processor: Any, by_name: Any = None, usual: bool | str = False
    ) -> None:
        self._module, self._processor, self._usual = module, processor, usual
        self.here = Wrapped(module)
        self._there: Wrapped | ByName | None = None if by_name is None else ByName(by_name)

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return device_of(self._module.get_input_embeddings())

    def choose(self, remote: bool | str | None, grad: bool = False) -> bool | str:
        """Where to run, None being the usual place; InputError if that has no graph or no weights."""
        where = check_remote(self._usual if remote is None else remote)
        offloaded = next(self._module.parameters()).device.type == "meta"
        got, wrong = f"remote={where!r}", ""
        if grad and where:
            got, wrong = f"grad=True with {got}", "a run here, where the graph can be kept"
        elif self.device.type == "meta" and where in (False, "local"):
            got += " for a model without weights"
            wrong = "remote=True, or weights: ss.LVLM.from_pretrained(name)"
        elif offloaded and where == "local":
            got += " for a model whose weights are offloaded"
            wrong = "them in memory, as they are on a server. Write remote=False, or load it so"
        if wrong:
            raise InputError(f"Got {got}; expected {wrong}.")
        if grad:
            check_graph(self._module)
        return where

    def model(self, where: bool | str, name: str) -> Wrapped | ByName:
        """The wrapped model for a run there; a server's name for it is asked of the hub."""
        if not where:
            return self.here
        if self._there is None:
            if self._processor is None:
                got = "Got remote=... for a model without a processor; expected one."
                raise InputError(f"{got} Write ss.LVLM(model, processor).")
            own = copy.deepcopy(self._processor)  # nnsight sets padding on the tokenizer
            self._there = Wrapped(self._module, partial(wrap_remote, processor=own))
        if where != "local":
            try:
                self._there.model.to_model_key()
            except (OSError, ValueError, TypeError, httpx.HTTPError) as error:
                got = f"The hub gave no canonical name of {name!r} ({type(error).__name__})"
                write = "a public repository and a network. For a model here write remote='local'"
                raise CheckpointError(f"{got}; expected {write}.") from error
        return self._there

    def placed(self, inputs: Inputs) -> dict[str, Any]:
        """The inputs on the model's device; where there are no weights they stay where they are."""
        return dict(inputs) if self.device.type == "meta" else on_device(inputs, self.device)


def on_device(inputs: Inputs, device: torch.device) -> dict[str, Any]:
    """The inputs with their tensors on a device."""
    return {k: moved(v, device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def moved(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from the host to a GPU without a wait for what still runs there."""
    return value.to(device, non_blocking=device.type == "cuda" and value.device.type == "cpu")

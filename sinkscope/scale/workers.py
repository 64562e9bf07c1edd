"""Do work on Ray: Ray Data, with actors that hold one model each, and results that come back as they are done.

Ray Data reads from a `Shelf` in the cluster, to which the caller brings a few parts more than workers can hold.
It moves their numbers only; a worker takes the part itself from the shelf, which counts how often that happens.
So parts are read lazily, memory does not grow with their number, and what Ray repeats after a worker or a whole
machine died gives the same.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import is_dataclass
from functools import cached_property, partial
from itertools import count
from typing import Any, TypeVar

import cloudpickle
import pyarrow as pa
import ray
import torch
from ray import cloudpickle as pickling
from ray.data import DataContext
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import PreTrainedModel

from sinkscope.errors import InputError, SinkscopeError, WorkerError
from sinkscope.models.loading import identity_of
from sinkscope.models.lvlm import LVLM
from sinkscope.models.wrapping import ABSENT, evaluated, lent
from sinkscope.scale import shelf as by_value
from sinkscope.scale.shelf import Numbers, Shelf

K = TypeVar("K", bound=Hashable)
AHEAD = 3  # parts per worker that are read and not done
TRIES = 3  # workers that one part may take down
CORES = 4  # of a worker without a GPU, if nobody says otherwise
CAPTURED = "_output_capturing_hooks_installed"  # what transformers sets on a model with its hooks
RAYS = ("RAY_", "PYTHONBREAKPOINT")  # names of variables that Ray reads and sets
SILENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
UNPICKLED = (TypeError, ValueError, AttributeError, RuntimeError, ImportError, pickle.PicklingError)


def each_on_workers(
    lvlm: LVLM,
    work: Callable[[LVLM, Any], Any],
    parts: Iterable[tuple[K, Any]],
    *,
    workers: int | None,
    gpus: float | None,
    cpus: int | None,
    address: str | None,
    load: Callable[[], LVLM] | None,
) -> Generator[tuple[K, Any], None, None]:
    """What `each_part` gives, done on workers; for the options see `sinkscope.scale.Ray`."""
    packed, rest, sent, numbers = packed_as("the work", work), iter(parts), dict[int, K](), count()
    with running(address), quiet():
        many, size = sizes_of(workers, gpus, cpus)
        model = Model(lvlm, load, on_gpu=size["num_gpus"] > 0)
        node = ray.get_runtime_context().get_node_id()
        here: Any = NodeAffinitySchedulingStrategy(node, soft=True)
        shelf: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(Shelf).remote()

        def send() -> None:
            number = next(numbers)
            for key, part in rest:
                sent[number] = key
                shelf.put.remote(number, packed_as(f"the part {key!r}", part))
                return
            shelf.close.remote(number)

        try:
            for _ in range(AHEAD * many):
                send()
            how: Any = {"concurrency": many, "batch_format": "pyarrow", **size}
            how["fn_constructor_args"] = (shelf, model, packed, size["num_cpus"], TRIES)
            read = ray.data.read_datasource(Numbers(shelf), override_num_blocks=1, num_cpus=0)
            made: Any = read.map_batches(Worker, batch_size=1, **how)
            how = {"batch_size": None, "batch_format": "pyarrow", "prefetch_batches": 0}
            with closing(iter(made.iter_batches(**how))) as tables:
                for number, found in rows_of(tables):
                    if number in sent:  # else it was done twice, because a machine died
                        key = sent.pop(number)
                        value = unpacked(found, key)
                        shelf.drop.remote(number)
                        send()  # so that workers go on while the caller commits
                        yield key, value
        finally:
            ray.kill(shelf)
        if sent:
            raise WorkerError(f"Got no result of the parts {[*sent.values()]}; expected one each.")


class Model:
    """How workers make the model of the caller; they compare it with the caller's."""

    def __init__(self, lvlm: LVLM, load: Callable[[], LVLM] | None, on_gpu: bool) -> None:
        self.name, self.wire, self.on_gpu = lvlm.name, lvlm.wire, on_gpu
        self.known, self.stored = known_of(lvlm), None
        make = load or lvlm._made_by
        if make is None:
            self.stored = ray.put(packed_model(lvlm))
            make = partial(unpacked_model, verify=lvlm._verify)
        self.make = packed_as("load" if load else "how the model was made", make)

    def made(self) -> LVLM:
        """The model; InputError if it is another one."""
        stored = () if self.stored is None else (ray.get(self.stored),)
        lvlm = pickle.loads(self.make)(*stored)
        if not isinstance(lvlm, LVLM):
            got = f"Got load=..., which gave {type(lvlm).__name__}"
            raise InputError(f"{got}; expected an LVLM. Write return ss.LVLM(model, processor).")
        lvlm.name, lvlm.wire = self.name, self.wire
        found = known_of(lvlm)
        if other := [name for name, value in self.known.items() if found[name] != value]:
            raise InputError(
                f"Got a model on the worker that differs from yours in {other}; expected the same. If it "
                "was changed after it was loaded, write lvlm = ss.LVLM(lvlm.module, lvlm.processor), which "
                "travels as it is, or ss.scale.Ray(load=...), a function that makes the changed one."
            )
        if self.on_gpu and lvlm.device.type == "cpu" and torch.cuda.is_available():
            lvlm.module.to("cuda")
        return lvlm


class Worker:
    """Does the work on one part after the other; an actor of Ray Data, with a model of its own."""

    def __init__(self, shelf: Any, model: Model, work: bytes, threads: float, most: int) -> None:
        self.shelf, self.model, self.packed = shelf, model, work
        self.threads, self.most = int(threads), most

    @cached_property
    def ready(self) -> tuple[LVLM, Callable[[LVLM, Any], Any]]:
        """Model and work, made with the first part: a worker that dies of it is counted there."""
        torch.set_num_threads(self.threads)
        return self.model.made(), pickle.loads(self.packed)

    def __call__(self, table: pa.Table) -> pa.Table:
        """The results of the parts whose numbers came."""
        made = [self.done(number) for number in table["number"].to_pylist()]
        return pa.table({"number": table["number"], "made": pa.array(made, pa.large_binary())})

    def done(self, number: int) -> bytes:
        """What the work made of a part, or the error that it raised."""
        part, tries = ray.get(self.shelf.take.remote(number))
        if part is None:  # done before a machine died
            return b""
        try:
            if tries >= self.most:
                raise WorkerError(
                    f"This part took down {tries} workers, one after the other; expected one that ends it. Often "
                    "memory ran out, of which Ray and the system write a line: give workers more of it, as by "
                    "ss.scale.Ray(workers=...) with fewer, or a smaller batch."
                )
            lvlm, work = self.ready
            with evaluated(lvlm.module):
                return cloudpickle.dumps((work(lvlm, pickle.loads(part)), None))
        except SinkscopeError as error:
            return cloudpickle.dumps((None, error))


def rows_of(tables: Iterable[pa.Table]) -> Iterator[tuple[int, bytes]]:
    """Numbers and results as they come; what Ray raises as what was raised on the worker, or a WorkerError."""
    try:
        for table in tables:
            yield from zip(table["number"].to_pylist(), table["made"].to_pylist(), strict=True)
    except RayError as error:
        if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
            raise error.cause from error
        raise WorkerError(
            f"Ray stopped ({type(error).__name__}: {str(error).strip()[:300]}); expected it to run. What was "
            "done before stays: look at its nodes (ray status), and run the same call again."
        ) from error


def unpacked(found: bytes, key: Any) -> Any:
    """A result, or the error of its part."""
    value, error = pickle.loads(found)
    if error is not None:
        error.args = (f"{error} (On a worker, in part {key!r}.)", *error.args[1:])
        raise error
    return value


def packed_as(name: str, value: Any) -> bytes:
    """A value for another process; an InputError names the part of it that cannot travel."""
    try:
        return cloudpickle.dumps(value)
    except UNPICKLED as error:
        for inner, one in inside(value):
            packed_as(repr(inner), one)
        raise InputError(
            f"Got {name}, which cannot travel to a worker ({type(error).__name__}: {error}); expected what can be "
            "pickled: functions, numbers, texts, tensors. Let it hold no open file, lock or generator, or "
            "write engine='local'."
        ) from error


def inside(value: Any) -> Iterator[tuple[Any, Any]]:
    """Names and values in an option: of arguments, fields, keys, or conditions, which begin with theirs."""
    if isinstance(value, partial):
        yield from value.keywords.items()
    elif is_dataclass(value):
        yield from vars(value).items()
    elif isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from ((one[0], one[-1]) for one in value if isinstance(one, tuple))


def packed_model(lvlm: LVLM) -> bytes:
    """Module and processor, on whatever device they are; InputError if they cannot travel."""
    write = "Write ss.scale.Ray(load=...), a function that makes it on the worker"
    if any(one.device.type == "meta" for one in lvlm.module.parameters()):
        raise InputError(
            f"Got {lvlm!r}, of which weights are not in memory; expected all of them. {write}."
        )
    stream, loans = io.BytesIO(), []
    for part in lvlm.module.modules():  # hooks that transformers sets in a pass, and sets again
        hooks = {key: hook for key, hook in part._forward_hooks.items() if not of_others(hook)}
        loans.append((part, {"_forward_hooks": OrderedDict(hooks), CAPTURED: ABSENT}))
    try:
        with lent(loans):
            torch.save((lvlm.module, lvlm.processor), stream, pickle_module=cloudpickle)
    except UNPICKLED as error:
        got = f"Got {lvlm!r}, which cannot travel to a worker ({type(error).__name__}: {error})"
        raise InputError(f"{got}; expected a model that can be pickled. {write}.") from error
    return stream.getvalue()


def unpacked_model(stored: bytes, verify: bool | None) -> LVLM:
    """The model of `packed_model`, on the CPU."""
    module, processor = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=False)
    whole = next((one for one in module.modules() if isinstance(one, PreTrainedModel)), None)
    if whole is not None:  # transformers notes which states a class gives when one of it is built
        with torch.device("meta"):
            type(whole)(whole.config)
    return LVLM(module, processor, verify=verify)


def known_of(lvlm: LVLM) -> dict[str, Any]:
    """What must be the same on a worker: `identity_of`, if there are weights, and hooks of the user."""
    hooks = [
        (path, getattr(hook, "__qualname__", type(hook).__qualname__))
        for path, part in lvlm.module.named_modules()
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        if not of_others(hook)
    ]
    here = lvlm.device.type != "meta"
    return (identity_of(lvlm) if here else {}) | {"hooks": hooks}


def of_others(hook: Any) -> bool:
    """Whether a hook is one of the libraries'."""
    return str(getattr(hook, "__module__", "")).startswith(("transformers.", "accelerate."))


def sizes_of(
    workers: int | None, gpus: float | None, cpus: int | None
) -> tuple[int, dict[str, float]]:
    """How many workers there are, and cores and GPUs of each; WorkerError if no machine has room for one."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    share = gpus if gpus is not None else float(any(node.get("GPU") for node in nodes))
    fit = [
        node for node in nodes if node.get("CPU", 0) >= (cpus or 1) and node.get("GPU", 0) >= share
    ]
    if not fit:
        has = [{name: node.get(name, 0) for name in ("CPU", "GPU")} for node in nodes]
        raise WorkerError(
            f"Got a cluster with {has}; expected a machine with {cpus or 1} cores and {share:g} GPUs for a "
            "worker. Write smaller ss.scale.Ray(cpus=..., gpus=...)."
        )
    slots = [
        max(1, int(node["GPU"] / share if share else node["CPU"] // (cpus or CORES)))
        for node in fit
    ]
    many = workers or sum(slots)
    each = -(-many // len(fit))  # on a machine
    cores = cpus or max(1, int(min(node["CPU"] for node in fit)) // each)
    return many, {"num_cpus": cores, "num_gpus": share}


@contextmanager
def running(address: str | None) -> Iterator[None]:
    """Ray until the block ends: the one that runs, or one that is started, without dashboard and telemetry."""
    if ray.is_initialized():
        yield
        return
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    before, ended = dict(os.environ), signal.getsignal(signal.SIGTERM)
    os.environ.update(SILENT)
    quietly: Any = dict(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        try:
            ray.init(where, **quietly)
        except (ConnectionError, ValueError) as error:
            got = f"Got no Ray at {where!r} ({error})"
            write = "Start it with: ray start --head."
            raise WorkerError(f"{got}; expected a cluster. {write}") from error
        yield
    finally:
        ray.shutdown()
        for name in [name for name in os.environ if name.startswith(RAYS)]:  # what Ray sets, too
            os.environ.pop(name)
        os.environ.update({name: before[name] for name in before if name.startswith(RAYS)})
        if threading.current_thread() is threading.main_thread() and ended is not None:
            signal.signal(signal.SIGTERM, ended)


@contextmanager
def quiet() -> Iterator[None]:
    """Options of Ray Data until the block ends: one block per part, its own errors, nothing printed."""
    context, log = DataContext.get_current().copy(), logging.getLogger("ray.data")
    context.target_max_block_size = 1  # else results wait until they fill a block
    context.enable_progress_bars = context.print_on_execution_start = False
    context.raise_original_map_exception = True
    level = log.level
    log.setLevel(logging.CRITICAL)
    pickling.register_pickle_by_value(by_value)
    try:
        with DataContext.current(context):
            yield
    finally:
        pickling.unregister_pickle_by_value(by_value)
        log.setLevel(level)

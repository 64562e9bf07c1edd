"""Do the same work on every part of a data set: here, one after the other, or on workers that hold a model each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from sinkscope.checks import check_number, check_whole
from sinkscope.data.ahead import samples_ahead
from sinkscope.errors import InputError
from sinkscope.models.lvlm import LVLM

if TYPE_CHECKING:
    from sinkscope.models.inputs import Sample

K = TypeVar("K", bound=Hashable)
Work = Callable[[LVLM, Any], Any]
"""What is done with a part; it can be pickled, so that it travels to workers: a function of a module, or a
`functools.partial` of one."""


@dataclass(frozen=True)
class Ray:
    """Do the work on workers of Ray that hold one model each: ``engine=ss.scale.Ray(workers=2)``.

    The same as ``engine="ray"``, with options. A Ray that runs already (``ray.init``) is used and left as it is;
    else one is started, without dashboard and telemetry, and stopped at the end.

    Args:
        workers: How many; None for one per GPU of the cluster, or without GPUs one per four cores of a machine.
        gpus: GPUs of a worker, also a share such as 0.5, on the first of which its model is put; None for 1 if
            the cluster has GPUs. With 0 workers see no GPU.
        cpus: Cores of a worker, and its number of torch threads; None shares the cores of a machine.
        address: Of a cluster that runs, such as ``"auto"`` or ``"HOST:6379"``; None for that of the variable
            RAY_ADDRESS, else this machine.
        load: A function that makes the model on a worker; None for how this one was made (`LVLM.from_pretrained`,
            `load_bundled`, `load_example`). A model that you built travels as it is, once.
    """

    workers: int | None = None
    gpus: float | None = None
    cpus: int | None = None
    address: str | None = None
    load: Callable[[], LVLM] | None = None

    def __post_init__(self) -> None:
        if self.workers is not None:
            check_whole(1, workers=self.workers, hint="Write None for one per GPU.")
        if self.cpus is not None:
            check_whole(1, cpus=self.cpus, hint="Write None to share the cores.")
        if self.gpus is not None:
            check_number(0, gpus=self.gpus, hint="Write gpus=1, or 0 for none.")
        if self.address is not None and not isinstance(self.address, str):
            raise InputError(f"Got address={self.address!r}; expected a text. Write 'auto'.")
        if self.load is not None and not callable(self.load):
            write = "Write load=make_model, without calling it"
            raise InputError(f"Got load={self.load!r:.80}; expected a function. {write}.")


@dataclass(frozen=True)
class Prepared:
    """Work that gets the prepared samples of a part: ``work(lvlm, part, samples)``.

    ``items(part)`` are records with ``image`` and ``question``, in one sample, or ``apart`` in one each.
    """

    work: Callable[[LVLM, Any, tuple[Sample, ...]], Any]
    items: Callable[[Any], Sequence[Any]]
    apart: bool = False

    def __call__(self, lvlm: LVLM, part: Any) -> Any:
        """Prepare the samples and do the work."""
        with closing(samples_ahead(lvlm, [self.items(part)], apart=self.apart)) as prepared:
            return self.work(lvlm, part, next(prepared))


def check_engine(engine: Any) -> Ray | None:
    """The options of Ray, or None for ``"local"``; InputError for others, and where Ray is not installed."""
    if isinstance(engine, str) and engine == "local":
        return None
    if engine != "ray" and not isinstance(engine, Ray):
        wanted = "'local', 'ray', or ss.scale.Ray(workers=2)"
        raise InputError(f"Got engine={engine!r:.80}; expected {wanted}.")
    if importlib.util.find_spec("ray") is None:
        raise InputError(
            f"Got engine={engine!r:.80} without the package ray; expected it. Write "
            "pip install 'sinkscope[ray]', or engine='local'."
        )
    return engine if isinstance(engine, Ray) else Ray()


def each_part(
    lvlm: LVLM, work: Work, parts: Iterable[tuple[K, Any]], engine: Any = "local"
) -> Generator[tuple[K, Any], None, None]:
    """Give the key of every part with what ``work`` makes of it, as soon as it is done.

    Keys are those of the parts, each once, in any order. ``parts`` is read as it is needed, in the caller's
    thread; of `Prepared` work here at once, and images are opened while the model works on others. Close it
    (`contextlib.closing`), so that nothing runs on after an error.

    Raises:
        InputError: If the engine, or what must travel to workers, is none.
        WorkerError: If a part takes down several workers, or there is no worker.
        SinkscopeError: What ``work`` raises, also on a worker, with the key of the part.
    """
    options = check_engine(engine)
    if options is not None:
        from sinkscope.scale.workers import each_on_workers  # it imports ray

        yield from each_on_workers(lvlm, work, parts, **vars(options))
    elif isinstance(work, Prepared):
        listed = list(parts)
        items = [work.items(part) for _, part in listed]
        with closing(samples_ahead(lvlm, items, apart=work.apart)) as prepared:
            for (key, part), samples in zip(listed, prepared, strict=True):
                yield key, work.work(lvlm, part, samples)
    else:
        for key, part in parts:
            yield key, work(lvlm, part)

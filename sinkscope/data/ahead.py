"""Open and process the images of the next batch in another thread, while the model works on this one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pickle import PicklingError
from typing import Any

import torch
from torch import Tensor

from sinkscope.data.batches import AnswerBatch, AnswerData, make_batch, read_rows
from sinkscope.models.inputs import Processed, process
from sinkscope.models.lvlm import LVLM

UNCOPIED = (TypeError, ValueError, AttributeError, RuntimeError, PicklingError, copy.Error)


class Ahead:
    """Makes what the next batch needs, while a ``with`` block of it is open.

    ``make(processor, key)`` runs in a thread of its own, and runs no model. It has a copy of the processor,
    because no two threads may use one tokenizer. Where it fails the caller does the same: errors stay there.
    """

    def __init__(self, lvlm: LVLM, make: Callable[[Any, Any], Any]) -> None:
        self._lvlm, self._make, self._copy = lvlm, make, None
        self._pool: ThreadPoolExecutor | None = None
        self._next: tuple[Any, Future[Any]] | None = None

    def __enter__(self) -> Ahead:
        self._pool = ThreadPoolExecutor(1, "sinkscope-ahead")
        return self

    def __exit__(self, *error: object) -> None:
        pool, self._pool, self._next = self._pool, None, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def begin(self, key: Any) -> None:
        """Begin with the next batch; nobody else opens images until it is taken."""
        if self._pool is not None and self._copy is None:
            with suppress(*UNCOPIED):
                self._copy = copy.deepcopy(self._lvlm.processor)
        if self._pool is not None and self._copy is not None:
            self._next = key, self._pool.submit(self._make, self._copy, key)

    def take(self, key: Any) -> Any:
        """What was made for a batch, or None if it was not begun or failed."""
        begun, self._next = self._next, None
        if begun is None or begun[1].exception() is not None or begun[0] != key:  # the second waits
            return None
        return begun[1].result()


def _pinned(made: Processed, device: torch.device) -> Processed:
    """The same in pinned memory, from where it reaches a GPU while that works."""
    if device.type != "cuda":
        return made
    with torch.cuda.device(device):
        inputs = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in made.inputs.items()}
    return made._replace(inputs=inputs)


def samples_ahead(
    lvlm: LVLM,
    parts: Sequence[Sequence[Any]],
    *,
    apart: bool = False,
    refusals: tuple[type[Exception], ...] = (),
) -> Generator[Any, None, None]:
    """Prepare parts of items with ``image`` and ``question``, in order: one sample each, or one per item.

    Yields a tuple of samples per part, or the error of its preparation if that is one of ``refusals``.
    Close the iterator (`contextlib.closing`), so that nothing runs on after an error.
    """

    def given(at: int) -> list[tuple[Any, Any]]:
        asked = [(item.image, item.question) for item in parts[at]]
        return asked if apart else [tuple(map(list, zip(*asked, strict=True)))]

    def make(processor: Any, at: int) -> list[Processed]:
        return [_pinned(process(processor, *one), lvlm.device) for one in given(at)]

    with Ahead(lvlm, make) as ahead:
        for at in range(len(parts)):
            ready = [(one, None) for one in ahead.take(at) or ()] or given(at)
            samples: Any
            try:
                samples = tuple(lvlm.prepare(images=images, text=text) for images, text in ready)
            except refusals as error:
                samples = error
            if at + 1 < len(parts):
                ahead.begin(at + 1)
            yield samples


class Batches(Ahead):
    """Makes the batches of a dataset of answers."""

    def __init__(self, lvlm: LVLM, data: AnswerData, append_end: bool = True) -> None:
        def make(processor: Any, rows: Sequence[int]) -> Any:
            made, answers = read_rows(processor, data, rows)
            return _pinned(made, lvlm.device), answers

        super().__init__(lvlm, make)
        self._data, self._append_end = data, append_end

    def of(self, rows: Sequence[int], then: Sequence[int] = ()) -> AnswerBatch:
        """The batch of some rows; the images of the next one are opened meanwhile."""
        read, append_end = self.take(rows), self._append_end
        batch = make_batch(self._lvlm, self._data, rows, append_end=append_end, read=read)
        if then:
            self.begin(then)
        return batch

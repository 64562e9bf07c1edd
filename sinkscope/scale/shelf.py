"""Where the parts of an experiment lie until they are done, and their numbers as a source of Ray Data.

Processes that need no model take these classes by value, and import nothing of sinkscope.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask


class Shelf:
    """Holds the parts that were read and are not done; an actor of Ray."""

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}
        self.tries: dict[int, int] = {}
        self.read, self.end = 0, float("inf")

    async def put(self, number: int, part: bytes) -> None:
        """Take a part; they come in order."""
        self.parts[number], self.read = part, max(self.read, number + 1)

    async def close(self, number: int) -> None:
        """There are no parts from this number on."""
        self.end = min(self.end, number)

    async def drop(self, number: int) -> None:
        """Forget a part that is done."""
        self.parts.pop(number, None)
        self.tries.pop(number, None)

    async def has(self, number: int) -> bool:
        """Whether there is a part of that number; waits until this is known."""
        while number >= self.read and number < self.end:
            await asyncio.sleep(0.01)
        return number < self.end

    async def take(self, number: int) -> tuple[bytes | None, int]:
        """A part, None if it is done, and how many workers have taken it before."""
        tries = self.tries.get(number, 0)
        self.tries[number] = tries + 1
        return self.parts.get(number), tries


class Numbers(Datasource):
    """The numbers of the parts on a shelf, as they come: one block each, from one task that needs no core."""

    def __init__(self, shelf: Any) -> None:
        super().__init__()
        self.shelf = shelf

    def estimate_inmemory_data_size(self) -> int | None:
        """Nobody knows."""
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **options: Any) -> list[ReadTask]:
        """The one task; repeated after a machine died, it gives the same."""
        shelf = self.shelf

        def read() -> Iterator[pa.Table]:
            number = 0
            while ray.get(shelf.has.remote(number)):
                yield pa.table({"number": [number]})
                number += 1

        unknown: Any = dict(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(read, BlockMetadata(**unknown))]

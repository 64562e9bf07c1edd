"""What the pairs of a grid do to the keys of one prompt, and how many run in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sinkscope.experiments.sweeps.grid import Pair

T = TypeVar("T")


class Batch:
    """How many edits run as rows of one forward pass; halved when memory runs out.

    Args:
        size: A number, which then stays, or ``"auto"``.
        most: Where ``"auto"`` begins.
    """

    def __init__(self, size: int | str, most: int) -> None:
        self.fixed = size != "auto"
        self.size = int(size) if self.fixed else most

    def chunks(self, n: int, work: Callable[[int, int], T]) -> list[T]:
        """``work(start, stop)`` for all of ``0 .. n``, in order.

        Raises:
            torch.OutOfMemoryError: If one edit alone is too much, or the size is fixed.
        """
        done, start = [], 0
        while start < n:
            try:
                stop = min(n, start + self.size)
                done.append(work(start, stop))
                start = stop
            except torch.OutOfMemoryError:
                if self.fixed or self.size == 1:
                    raise
                self.size = max(1, self.size // 2)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        return done


def factors_of(
    sinks: Tensor, visual: Tensor, pairs: Sequence[Pair], low: Tensor | None = None
) -> Tensor:
    """What every key is multiplied with under every pair or triple, float ``[pair pos]``.

    Args:
        sinks: V-sinks, bool ``[pos]``. Without any, all image tokens are "rest".
        visual: Image tokens, bool ``[pos]``.
        pairs: ``(s_V, s_rest)``, or ``(s_V, s_L, s_rest)``.
        low: L-sinks, bool ``[pos]``, none of them a V-sink; with triples only.
    """
    values = torch.tensor(pairs)
    image = torch.where(sinks, values[:, :1], values[:, -1:])
    if low is not None:
        image = torch.where(low, values[:, 1:2], image)
    return torch.where(visual, image, 1.0)


@dataclass(frozen=True, eq=False)
class Edits:
    """The different edits among the pairs: where there is no V-sink, s_V makes no difference.

    Attributes:
        factors: Float ``[edit pos]``, none of them neutral.
        of_pair: Pair -> its edit, -1 for one that changes nothing.
    """

    factors: Tensor
    of_pair: tuple[int, ...]

    @classmethod
    def of(cls, factors: Tensor) -> Edits:
        """The different rows that are not all ones."""
        found: dict[bytes, int] = {}
        places, rows = [], []
        for i, (row, acts) in enumerate(zip(factors, (factors != 1).any(dim=1), strict=True)):
            key = row.numpy().tobytes()
            if acts and key not in found:
                found[key] = len(found)
                rows.append(i)
            places.append(found.get(key, -1))
        return cls(factors[rows], tuple(places))

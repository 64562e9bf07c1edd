"""The cells of a sweep: layers and coefficients, in pairs or triples, and what they do to keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sinkscope.checks import check_whole, is_number, is_whole
from sinkscope.errors import InputError, LayerError
from sinkscope.models.pictures import clusters_of

T = TypeVar("T")
Pair = tuple[float, ...]  # (s_V, s_rest), or (s_V, s_L, s_rest)
GROUPS = {2: ("V", "rest"), 3: ("V", "L", "rest")}  # by number of coefficients, as in a gate
NOUNS = {2: "pair", 3: "triple"}
CELL = ["layer", "edited", "pair", "s_v", "s_l", "s_rest"]  # in tables; no s_l for pairs
EMBED = -1  # how tables write layer="embed"


def lsg_grid(steps: int = 11, groups: int = 2) -> list[Pair]:
    """Coefficients whose sum is 1: the pairs of Choi et al. (2604.03316) with 11 steps.

    ``steps`` is how many values a coefficient takes, from 0 to 1, at least 2. With 2 ``groups``, V-sinks
    and the rest, ``(s_V, s_rest)`` from ``(0.0, 1.0)`` to ``(1.0, 0.0)``: ``steps`` of them. With 3,
    ``(s_V, s_L, s_rest)``, all points of the simplex: ``steps * (steps + 1) / 2``, 66 with 11 steps. The
    base, in which every coefficient is 1, is not among them.
    """
    check_whole(2, steps=steps, hint="Write ss.lsg_grid(steps=11).")
    if not is_whole(groups, 2, 3):
        raise InputError(
            f"Got groups={groups!r}; expected 2 (V-sinks and the rest) or 3 (V-sinks, L-sinks and "
            "ordinary tokens). Write ss.lsg_grid(steps=11, groups=3)."
        )
    last, places = steps - 1, range(steps)
    if groups == 2:
        return [(i / last, (last - i) / last) for i in places]
    return [(i / last, j / last, (last - i - j) / last) for i in places for j in range(steps - i)]


def check_grid(grid: Any) -> list[Pair]:
    """The pairs or triples, without repeats and without the base, which is always run."""
    hint = (
        "Write grid=ss.lsg_grid(), or pairs (s_V, s_rest) such as [(0.5, 0.5), (1.0, 0.0)], or triples "
        "(s_V, s_L, s_rest) such as [(0.2, 0.2, 0.6)]."
    )
    if isinstance(grid, str) or not isinstance(grid, Iterable):
        raise InputError(f"Got grid={grid!r}; expected a list of pairs. {hint}")
    pairs: dict[Pair, None] = {}
    for pair in grid:
        numbers = list(pair) if isinstance(pair, Iterable) and not isinstance(pair, str) else []
        if len(numbers) not in GROUPS or not all(map(is_number, numbers)):
            wanted = "two finite numbers, or three"
            raise InputError(f"Got {pair!r} in the grid; expected {wanted}. {hint}")
        pairs[tuple(float(x) for x in numbers)] = None
    if len({len(pair) for pair in pairs}) > 1:
        raise InputError(
            f"Got pairs and triples in one grid, {[*pairs][:6]}; expected one of the two. {hint}"
        )
    if out := [pair for pair in pairs if set(pair) != {1.0}]:
        return out
    raise InputError(f"Got a grid without a pair other than the base (1, 1). {hint}")


def words_of(pair: Sequence[float]) -> str:
    """A pair or triple in words: ``pair (0.5, 0.5)``."""
    return f"{NOUNS[len(pair)]} ({', '.join(f'{factor:g}' for factor in pair)})"


@dataclass(frozen=True)
class Cells:
    """The cells of a sweep."""

    layers: tuple[int, ...]  # whose output a gate would read, ascending; -1 is "embed"
    pairs: tuple[Pair, ...]

    @property
    def with_l(self) -> bool:
        """Whether L-sinks have a coefficient of their own."""
        return len(self.pairs[0]) == 3

    @property
    def blocks(self) -> tuple[int, ...]:
        """The edited blocks: one after each layer."""
        return tuple(layer + 1 for layer in self.layers)


def check_layers(layers: Any, n_layers: int) -> tuple[int, ...]:
    """Layers in the convention of LSG, a gate at layer l edits block l + 1: None, ``"embed"``, indices."""
    if layers is None:
        return tuple(range(EMBED, n_layers - 1))
    several = isinstance(layers, Iterable) and not isinstance(layers, str)
    given: Iterable[Any] = layers if several else [layers]
    found = set()
    for layer in given:
        if layer != "embed" and not is_whole(layer, 0, n_layers - 2):
            raise LayerError(
                f"Got layer {layer!r}; expected 'embed' or 0 to {n_layers - 2}. A gate at layer l "
                f"edits block l + 1, and block {n_layers - 1} is the last. Write layers='embed' to "
                "edit block 0."
            )
        found.add(EMBED if layer == "embed" else int(layer))
    if not found:
        raise LayerError("Got no layers; expected at least one. Write layers=None for all.")
    return tuple(sorted(found))


class Batch:
    """How many edits run as rows of one pass; ``"auto"``: ``most``, halved when memory runs out."""

    def __init__(self, size: int | str, most: int) -> None:
        self.fixed = size != "auto"
        self.size = int(size) if self.fixed else most

    def chunks(self, n: int, work: Callable[[int, int], list[T]]) -> list[T]:
        """What ``work(start, stop)`` gives for all of ``0 .. n``, in order."""
        done: list[T] = []
        start = 0
        while start < n:
            try:
                stop = min(n, start + self.size)
                done += work(start, stop)
                start = stop
            except torch.OutOfMemoryError:
                if self.fixed or self.size == 1:
                    raise
                self.size //= 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        return done


def factors_of(
    sinks: Tensor, visual: Tensor, pairs: Sequence[Pair], low: Tensor | None = None
) -> Tensor:
    """What every key is multiplied with under every pair or triple, float ``[pair pos]``.

    Masks are bool ``[pos]``; ``low`` are L-sinks that are no V-sinks, with triples only.
    """
    values = torch.tensor(pairs)
    image = torch.where(sinks, values[:, :1], values[:, -1:])
    if low is not None:
        image = torch.where(low, values[:, 1:2], image)
    return torch.where(visual, image, 1.0)


@dataclass(frozen=True, eq=False)
class Edits:
    """The different edits among the pairs: where there is no V-sink, s_V makes no difference."""

    factors: Tensor  # float [edit pos], none of them neutral
    of_pair: tuple[int, ...]  # the edit of every pair, -1 for one that changes nothing

    @classmethod
    def of(cls, factors: Tensor) -> Edits:
        """The different rows that are not all ones."""
        keys = [row.numpy().tobytes() if (row != 1).any() else b"" for row in factors]
        different = [key for key in dict.fromkeys(keys) if key]
        rows = [keys.index(key) for key in different]
        return cls(factors[rows], tuple(different.index(key) if key else -1 for key in keys))


def wide(part: pd.DataFrame, column: str) -> tuple[pd.DataFrame, np.ndarray, list[str]]:
    """Cells, changes ``[question cell]``, and the image of every question."""
    change = part.assign(change=part[column] - part[f"base_{column}"])
    broken = change[~np.isfinite(change["change"].to_numpy(dtype=float))]
    if len(broken):
        line = broken.iloc[0]
        raise InputError(
            f"Got {len(broken)} changes of {column} that are not finite, the first of item "
            f"{line['item']} at layer {line['layer']}, {words_of(coefficients_of(line))}; expected "
            "numbers. Leave out these lines, or run the sweep again: it refuses them."
        )
    place = ["layer", "pair"]
    table = change.pivot(index="item", columns=place, values="change").sort_index(axis=1)
    cells: Any = part.drop_duplicates(place).sort_values(place)[cell_of(part)]
    images = part.drop_duplicates("item").set_index("item")["image_id"].loc[table.index]
    return cells.reset_index(drop=True), table.to_numpy(dtype=float), clusters_of(images)


def cell_of(part: pd.DataFrame) -> list[str]:
    """The columns that say which cell a line is of."""
    return [name for name in CELL if name in part]


def coefficients_of(line: Mapping[Any, Any]) -> list[float]:
    """The coefficients of a line of a table."""
    return [line[name] for name in CELL[3:] if name in line]


def counted(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"

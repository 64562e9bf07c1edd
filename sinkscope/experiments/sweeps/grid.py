"""Which cells a sweep has: layers and coefficient pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from sinkscope.errors import InputError, LayerError

Pair = tuple[float, float]
BASE: Pair = (1.0, 1.0)
EMBED = -1
"""How tables write ``layer="embed"``."""


def lsg_grid(steps: int = 11) -> list[Pair]:
    """Coefficient pairs whose sum is 1: those of Choi et al. (2604.03316) with 11 steps.

    Args:
        steps: How many.

    Returns:
        ``(s_V, s_rest)`` from ``(0.0, 1.0)`` to ``(1.0, 0.0)``. The base ``(1, 1)`` is not among them.

    Raises:
        InputError: If there are fewer than two steps.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise InputError(f"Got steps={steps!r}; expected 2 or more. Write ss.lsg_grid(steps=11).")
    return [(i / (steps - 1), (steps - 1 - i) / (steps - 1)) for i in range(steps)]


def check_grid(grid: Any) -> list[Pair]:
    """The pairs, without repeats and without the base, which is always run.

    Raises:
        InputError: If a pair is none, a number is not finite, or no pair is left.
    """
    hint = "Write grid=ss.lsg_grid(), or pairs (s_V, s_rest) such as [(0.5, 0.5), (1.0, 0.0)]."
    if isinstance(grid, str) or not isinstance(grid, Iterable):
        raise InputError(f"Got grid={grid!r}; expected a list of pairs. {hint}")
    pairs: dict[Pair, None] = {}
    for pair in grid:
        numbers = list(pair) if isinstance(pair, Iterable) and not isinstance(pair, str) else []
        fine = [
            isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x) for x in numbers
        ]
        if len(fine) != 2 or not all(fine):
            raise InputError(f"Got {pair!r} in the grid; expected two finite numbers. {hint}")
        pairs[float(numbers[0]), float(numbers[1])] = None
    pairs.pop(BASE, None)
    if not pairs:
        raise InputError(f"Got a grid without a pair other than the base (1, 1). {hint}")
    return list(pairs)


@dataclass(frozen=True)
class Cells:
    """The cells of a sweep.

    Attributes:
        layers: Layers whose output a gate would read, ascending; -1 is ``"embed"``.
        pairs: ``(s_V, s_rest)``.
    """

    layers: tuple[int, ...]
    pairs: tuple[Pair, ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        """The edited blocks: one after each layer."""
        return tuple(layer + 1 for layer in self.layers)


def check_layers(layers: Any, n_layers: int) -> tuple[int, ...]:
    """Layers in the convention of LSG: a gate at layer l edits block l + 1.

    Args:
        layers: None for all, ``"embed"``, an index, or several of these.
        n_layers: Blocks of the decoder.

    Raises:
        LayerError: If an entry is neither ``"embed"`` nor an index with a block after it.
    """
    if layers is None:
        return tuple(range(EMBED, n_layers - 1))
    several = isinstance(layers, Iterable) and not isinstance(layers, str)
    found = set()
    for layer in list(layers) if several else [layers]:
        if layer == "embed":
            found.add(EMBED)
        elif (
            isinstance(layer, bool)
            or not isinstance(layer, Integral)
            or not 0 <= int(layer) < n_layers - 1
        ):
            raise LayerError(
                f"Got layer {layer!r}; expected 'embed' or 0 to {n_layers - 2}. A gate at layer l "
                f"edits block l + 1, and block {n_layers - 1} is the last. Write layers='embed' to "
                "edit block 0."
            )
        else:
            found.add(int(layer))
    if not found:
        raise LayerError("Got no layers; expected at least one. Write layers=None for all.")
    return tuple(sorted(found))

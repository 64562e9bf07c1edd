"""Which cells a sweep has: layers and coefficients, in pairs or triples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from sinkscope.checks import check_whole, is_number, is_whole
from sinkscope.errors import InputError, LayerError

if TYPE_CHECKING:
    from sinkscope.anatomy.towers import TowerAnatomy
    from sinkscope.models.lvlm import LVLM

Pair = tuple[float, ...]
"""``(s_V, s_rest)``, or ``(s_V, s_L, s_rest)``."""
GROUPS = {2: ("V", "rest"), 3: ("V", "L", "rest")}
"""Number of coefficients -> the groups they are of, as in a gate."""
EMBED = -1
"""How tables write ``layer="embed"``."""


def lsg_grid(steps: int = 11, groups: int = 2) -> list[Pair]:
    """Coefficients whose sum is 1: the pairs of Choi et al. (2604.03316) with 11 steps.

    Args:
        steps: How many values a coefficient takes, from 0 to 1.
        groups: 2 for V-sinks and the rest, 3 for V-sinks, L-sinks and ordinary tokens.

    Returns:
        ``(s_V, s_rest)`` from ``(0.0, 1.0)`` to ``(1.0, 0.0)``: ``steps`` of them. Or ``(s_V, s_L,
        s_rest)``, all points of the simplex: ``steps * (steps + 1) / 2``, so 66 with 11 steps and 21
        with 6. The base, in which every coefficient is 1, is not among them.

    Raises:
        InputError: If there are fewer than two steps, or other groups.
    """
    check_whole(2, steps=steps, hint="Write ss.lsg_grid(steps=11).")
    if not is_whole(groups, 2, 3):
        raise InputError(
            f"Got groups={groups!r}; expected 2 (V-sinks and the rest) or 3 (V-sinks, L-sinks and "
            "ordinary tokens). Write ss.lsg_grid(steps=11, groups=3)."
        )
    last = steps - 1
    if groups == 2:
        return [(i / last, (last - i) / last) for i in range(steps)]
    return [
        (i / last, j / last, (last - i - j) / last) for i in range(steps) for j in range(steps - i)
    ]


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
            raise InputError(
                f"Got {pair!r} in the grid; expected two finite numbers, or three. {hint}"
            )
        pairs[tuple(float(x) for x in numbers)] = None
    if len({len(pair) for pair in pairs}) > 1:
        raise InputError(
            f"Got pairs and triples in one grid, {[*pairs][:6]}; expected one of the two. {hint}"
        )
    out = [pair for pair in pairs if set(pair) != {1.0}]
    if not out:
        raise InputError(f"Got a grid without a pair other than the base (1, 1). {hint}")
    return out


def words_of(pair: Sequence[float]) -> str:
    """A pair or triple in words: ``pair (0.5, 0.5)``."""
    numbers = ", ".join(f"{factor:g}" for factor in pair)
    return f"{nouns(len(pair))} ({numbers})"


def nouns(many: int) -> str:
    """What so many coefficients are called."""
    return {2: "pair", 3: "triple"}[many]


@dataclass(frozen=True)
class Cells:
    """The cells of a sweep.

    Attributes:
        layers: Layers whose output a gate would read, ascending; -1 is ``"embed"``.
        pairs: ``(s_V, s_rest)``, or triples ``(s_V, s_L, s_rest)``.
    """

    layers: tuple[int, ...]
    pairs: tuple[Pair, ...]

    @property
    def with_l(self) -> bool:
        """Whether L-sinks have a coefficient of their own."""
        return any(len(pair) == len(GROUPS[3]) for pair in self.pairs)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The edited blocks: one after each layer."""
        return tuple(layer + 1 for layer in self.layers)


def check_layers(layers: Any, n_layers: int) -> tuple[int, ...]:
    """Layers in the convention of LSG, a gate at layer l edits block l + 1: None, ``"embed"``, indices."""
    if layers is None:
        return tuple(range(EMBED, n_layers - 1))
    several = isinstance(layers, Iterable) and not isinstance(layers, str)
    found = set()
    for layer in list(layers) if several else [layers]:
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


@dataclass(frozen=True)
class Shape:
    """The questions about one image, in tokens.

    Attributes:
        vision: ViT tokens of its images, one entry per image.
        stem: LLM tokens up to the end of the last image.
        tails: LLM tokens after it, one entry per row of the model (questions, longer options).
        alone: Whether every row may need an edited beginning of its own, because its L-sinks may not
            be those of the others.
    """

    vision: tuple[int, ...]
    stem: int
    tails: tuple[int, ...]
    alone: bool = False

    @property
    def rows(self) -> int:
        """Rows without an edit: the endings, and their common beginning."""
        return len(self.tails) + (len(self.tails) > 1)

    @property
    def edited_rows(self) -> int:
        """The most rows of one edit."""
        return 2 * len(self.tails) if self.alone and len(self.tails) > 1 else self.rows


@dataclass(frozen=True)
class Work:
    """The size of a model, as far as work depends on it.

    Attributes:
        vision: Weights of every vision block.
        language: Weights of every decoder block.
        widths: Of vision and language attention, heads times head dimension.
    """

    vision: tuple[int, ...]
    language: tuple[int, ...]
    widths: tuple[int, int]

    def see(self, shape: Shape) -> float:
        """The vision tower on the images of a shape, each on its own."""
        return sum(
            2.0 * weights * n + 4.0 * self.widths[0] * n * n
            for weights in self.vision
            for n in shape.vision
        )

    def decode(self, tokens: int, keys: int, first: int = 0) -> float:
        """Decoder blocks from ``first`` on, on ``tokens`` queries that see ``keys`` keys."""
        each = 4.0 * self.widths[1] * tokens * keys
        return sum(2.0 * weights * tokens + each for weights in self.language[first:])

    def plain(self, shape: Shape, cells: Cells) -> float:
        """One whole forward pass per question and cell, and one without edit."""
        lengths = [shape.stem + tail for tail in shape.tails]
        once = sum(self.see(shape) + self.decode(n, n) for n in lengths)
        return once * (1 + len(cells.layers) * len(cells.pairs))

    def reused(self, shape: Shape, cells: Cells) -> float:
        """The same with everything reused that an edit cannot change."""
        total = self.see(shape) + self._from(shape, 0)
        edited = [shape]
        if shape.alone:
            edited = [Shape(shape.vision, shape.stem, (tail,)) for tail in shape.tails]
        once = sum(self._from(one, block) for block in cells.blocks for one in edited)
        return total + len(cells.pairs) * once

    def _from(self, shape: Shape, first: int) -> float:
        """Decoder blocks from one on, the common beginning once."""
        if len(shape.tails) == 1:
            whole = shape.stem + shape.tails[0]
            return self.decode(whole, whole, first)
        tails = sum(self.decode(tail, shape.stem + tail, first) for tail in shape.tails)
        return self.decode(shape.stem, shape.stem, first) + tails


def work_of(lvlm: LVLM) -> Work:
    """The work of a model's blocks."""
    a = lvlm.anatomy
    return Work(
        _weights(lvlm.module, a.vision),
        _weights(lvlm.module, a.language),
        (a.vision.heads * a.vision.d_head, a.language.heads * a.language.d_head),
    )


def _weights(module: nn.Module, tower: TowerAnatomy) -> tuple[int, ...]:
    """Parameters of every block."""
    blocks = [module.get_submodule(path) for path in tower.blocks]
    return tuple(sum(p.numel() for p in block.parameters()) for block in blocks)


@dataclass(frozen=True)
class SweepCost:
    """What a sweep would do. Print it.

    Attributes:
        questions: Questions.
        images: Different image ids.
        layers: Layers.
        pairs: Coefficient pairs, or triples, the base apart.
        forwards: Full forward passes of the plain loop: one per question, layer and pair, and one per
            question for the base.
        blocks_plain: Decoder blocks times rows that the plain loop runs.
        blocks: Decoder blocks times rows that the sweep runs at most, a common beginning and each of
            its endings counted as rows of their own. What finds the sinks is not counted.
        bound: Work of the plain loop over that of the sweep: an estimate of how many times cheaper it
            is. It counts multiplications only, so what is measured may lie on either side of it. Where
            an image has no V-sinks, pairs that do the same are run once, which is not counted.
        looked_at: Questions whose lengths were looked at; the rest is taken to be like them.
        groups: 2 for pairs of coefficients, 3 for triples.
    """

    questions: int
    images: int
    layers: int
    pairs: int
    forwards: int
    blocks_plain: int
    blocks: int
    bound: float
    looked_at: int
    groups: int = 2

    def __str__(self) -> str:
        return (
            f"{self.questions} questions about {self.images} images, {self.layers} layers x "
            f"{self.pairs} {nouns(self.groups)}s and the base: {self.questions * self.layers * self.pairs} cells\n"
            f"plain loop: {self.forwards} forward passes, {self.blocks_plain} decoder block passes\n"
            f"sweep: at most {self.blocks} decoder block passes, many of them short; with vision tower "
            f"and lengths counted about {self.bound:.2f} times cheaper (multiplications of {self.looked_at} "
            "questions)"
        )


def cost_of(
    work: Work, shapes: Sequence[Shape], cells: Cells, questions: int, images: int, looked_at: int
) -> SweepCost:
    """The cost of a sweep whose images are like those of ``shapes``, with ``looked_at`` questions."""
    n = len(work.language)
    runs = 1 + len(cells.layers) * len(cells.pairs)
    rows = sum(shape.rows for shape in shapes) / len(shapes)
    edited = sum(shape.edited_rows for shape in shapes) / len(shapes)
    resumed = sum(n - block for block in cells.blocks) * len(cells.pairs)
    return SweepCost(
        questions=questions,
        images=images,
        layers=len(cells.layers),
        pairs=len(cells.pairs),
        forwards=questions * runs,
        blocks_plain=questions * runs * n,
        blocks=round(images * (rows * n + edited * resumed)),
        bound=sum(work.plain(s, cells) for s in shapes)
        / sum(work.reused(s, cells) for s in shapes),
        looked_at=looked_at,
        groups=len(cells.pairs[0]),
    )

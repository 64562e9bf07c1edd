"""What a sweep costs before it runs, against one full forward pass per layer, pair and question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from sinkscope.data.answers import ask
from sinkscope.data.items import Item
from sinkscope.detectors.choice import known_for
from sinkscope.detectors.rules import Detector
from sinkscope.experiments.sweep_grid import Cells, nouns
from sinkscope.experiments.sweep_images import Numbered, by_token

if TYPE_CHECKING:
    from sinkscope.anatomy.towers import TowerAnatomy
    from sinkscope.models.inputs import Sample
    from sinkscope.models.lvlm import LVLM


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


def estimate(
    lvlm: LVLM,
    groups: Sequence[Sequence[Numbered]],
    cells: Cells,
    questions: int,
    l_detector: Detector | None = None,
) -> SweepCost:
    """The cost of a sweep, from the first images' prompts; triples share only where that is sure."""
    some = groups[:8]
    known = known_for(lvlm) if l_detector is None else None
    if known is not None and known.default:
        l_detector = known.l_detector
    alone = cells.with_l and (l_detector is None or not by_token(l_detector))
    shapes = []
    for group in some:
        prepared = [lvlm.prepare(images=item.image, text=item.question) for _, item in group]
        shape = shape_of(lvlm, prepared, [item for _, item in group])
        shapes.append(replace(shape, alone=alone))
    looked_at = sum(len(group) for group in some)
    return cost_of(work_of(lvlm), shapes, cells, questions, len(groups), looked_at)


def shape_of(lvlm: LVLM, samples: Sequence[Sample], items: Sequence[Item]) -> Shape:
    """The lengths of the questions about one image."""
    first = samples[0].tokens
    stem = int((first.image[0] >= 0).nonzero().max()) + 1
    tails = [
        int(sample.tokens.ids.shape[1]) - stem + len(feed)
        for sample, item in zip(samples, items, strict=True)
        for feed in ask(lvlm.tokenizer, (sample.texts or ("",))[0], item).feeds
    ]
    return Shape(tuple(first.vision.live.sum(dim=1).tolist()), stem, tuple(tails))

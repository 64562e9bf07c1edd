"""What a sweep costs before it runs, against one full forward pass per layer, pair and question."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sinkscope.data.answers import ask
from sinkscope.detectors import Detector, known_for
from sinkscope.experiments.sweep_grid import NOUNS, Cells
from sinkscope.experiments.sweep_images import Groups, by_token, end_of_image
from sinkscope.models.lvlm import LVLM


@dataclass(frozen=True)
class Shape:
    """The questions about one image, in tokens."""

    vision: tuple[int, ...]  # of the ViT, one entry per image
    stem: int  # of the LLM, up to the end of the last image
    tails: tuple[int, ...]  # after it, one entry per row of the model (questions, longer options)


@dataclass(frozen=True)
class Work:
    """The size of a model, as far as work depends on it."""

    vision: tuple[int, ...]  # weights of every block, as in the other tower
    language: tuple[int, ...]
    widths: tuple[int, int]  # of vision and language attention, heads times head dimension

    def see(self, shape: Shape) -> float:
        """The vision tower on the images of a shape, each on its own."""
        width, sizes = self.widths[0], shape.vision
        return sum(2.0 * w * n + 4.0 * width * n * n for w in self.vision for n in sizes)

    def decode(self, tokens: int, keys: int, first: int = 0) -> float:
        """Decoder blocks from ``first`` on, on ``tokens`` queries that see ``keys`` keys."""
        each = 4.0 * self.widths[1] * tokens * keys
        return sum(2.0 * weights * tokens + each for weights in self.language[first:])

    def plain(self, shape: Shape, cells: Cells) -> float:
        """One whole forward pass per question and cell, and one without edit."""
        lengths = [shape.stem + tail for tail in shape.tails]
        once = sum(self.see(shape) + self.decode(n, n) for n in lengths)
        return once * (1 + len(cells.layers) * len(cells.pairs))

    def reused(self, shape: Shape, cells: Cells, *, alone: bool = False) -> float:
        """The same with everything reused that an edit cannot change; ``alone`` if edits share nothing."""
        parts = [replace(shape, tails=(tail,)) for tail in shape.tails] if alone else [shape]
        once = sum(self._from(part, block) for block in cells.blocks for part in parts)
        return self.see(shape) + self._from(shape, 0) + len(cells.pairs) * once

    def _from(self, shape: Shape, first: int) -> float:
        """Decoder blocks from one on, the common beginning once."""
        if len(shape.tails) == 1:
            whole = shape.stem + shape.tails[0]
            return self.decode(whole, whole, first)
        tails = sum(self.decode(tail, shape.stem + tail, first) for tail in shape.tails)
        return self.decode(shape.stem, shape.stem, first) + tails


def work_of(lvlm: LVLM) -> Work:
    """The work of a model's blocks."""
    towers, find = (lvlm.anatomy.vision, lvlm.anatomy.language), lvlm.module.get_submodule
    vision, language = (
        tuple(sum(p.numel() for p in find(path).parameters()) for path in tower.blocks)
        for tower in towers
    )
    widths = [tower.heads * tower.d_head for tower in towers]
    return Work(vision, language, (widths[0], widths[1]))


@dataclass(frozen=True)
class SweepCost:
    """What a sweep would do. Print it.

    Attributes:
        images: How many image ids there are.
        pairs: Coefficient pairs, or triples (``groups`` is 3), the base apart.
        forwards: Full forward passes of the plain loop: one per question, layer and pair, and one per
            question for the base.
        blocks_plain: Decoder blocks times rows that the plain loop runs.
        blocks: The same of the sweep at most, a common beginning and each of its endings counted as
            rows of their own. What finds the sinks is not counted.
        bound: Work of the plain loop over that of the sweep, in multiplications: an estimate of how many
            times cheaper it is. That pairs which do the same are run once is not counted.
        looked_at: Questions whose lengths were looked at; the rest is taken to be like them.
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
            f"{self.questions} questions about {self.images} images, {self.layers} layers x {self.pairs} "
            f"{NOUNS[self.groups]}s and the base: {self.questions * self.layers * self.pairs} cells\n"
            f"plain loop: {self.forwards} forward passes, {self.blocks_plain} decoder block passes\n"
            f"sweep: at most {self.blocks} decoder block passes, many of them short; with vision tower "
            f"and lengths counted about {self.bound:.2f} times cheaper (multiplications of "
            f"{self.looked_at} questions)"
        )


def estimate(lvlm: LVLM, groups: Groups, cells: Cells, low: Detector | None) -> SweepCost:
    """The cost of a sweep, from the first images' prompts; ``low`` is the rule for L-sinks, if given."""
    known = known_for(lvlm) if low is None else None
    if known is not None and known.default:
        low = known.l_detector
    alone = cells.with_l and (low is None or not by_token(low))
    shapes = []
    for items in ([item for _, item in group] for group in groups[:8]):
        samples = [lvlm.prepare(images=item.image, text=item.question) for item in items]
        stem, tails = end_of_image(samples[0]), []
        for sample, item in zip(samples, items, strict=True):
            feeds = ask(lvlm.tokenizer, (sample.texts or ("",))[0], item).feeds
            tails += [int(sample.tokens.ids.shape[1]) - stem + len(feed) for feed in feeds]
        seen = samples[0].tokens.vision.live.sum(dim=1).tolist()
        shapes.append(Shape(tuple(seen), stem, tuple(tails)))
    work, questions = work_of(lvlm), sum(map(len, groups))
    n, runs = len(work.language), 1 + len(cells.layers) * len(cells.pairs)
    rows = [len(shape.tails) + (len(shape.tails) > 1) for shape in shapes]
    edited = [2 * m - 2 if alone and m > 1 else m for m in rows]  # a beginning for every ending
    resumed = sum(n - block for block in cells.blocks) * len(cells.pairs)
    reused = sum(work.reused(shape, cells, alone=alone) for shape in shapes)
    blocks = round(len(groups) * (sum(rows) * n + sum(edited) * resumed) / len(shapes))
    bound = sum(work.plain(shape, cells) for shape in shapes) / reused
    counts = questions, len(groups), len(cells.layers), len(cells.pairs), questions * runs
    looked_at = sum(map(len, groups[:8]))
    return SweepCost(*counts, questions * runs * n, blocks, bound, looked_at, len(cells.pairs[0]))

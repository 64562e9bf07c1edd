"""The cells of a sweep, layers and coefficients in pairs or triples, and what it costs to run them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from sinkscope.checks import among, check_whole, is_number, is_whole, plain
from sinkscope.data.answers import ask
from sinkscope.data.items import Item
from sinkscope.detectors import CosineToBOS, Detector, Norm, NoSinks, SinkDimensions, known_for
from sinkscope.errors import InputError, LayerError
from sinkscope.models import LVLM, Sample
from sinkscope.models.pictures import clusters_of

Pair = tuple[float, ...]  # (s_V, s_rest), or (s_V, s_L, s_rest)
Numbered = tuple[int, Item]
Groups = Sequence[Sequence[Numbered]]  # all questions, by image
GROUPS = {2: ("V", "rest"), 3: ("V", "L", "rest")}  # by number of coefficients, as in a gate
NOUNS = {2: "pair", 3: "triple"}
CELL = ["layer", "edited", "pair", "s_v", "s_l", "s_rest"]  # in tables; no s_l for pairs
EMBED = -1  # how tables write layer="embed"


def lsg_grid(steps: int = 11, groups: int = 2) -> list[Pair]:
    """Coefficients whose sum is 1: the pairs of Choi et al. (2604.03316) with 11 steps.

    ``steps``, at least 2, is how many values a coefficient takes from 0 to 1. With 2 ``groups`` these are
    ``(s_V, s_rest)`` from ``(0.0, 1.0)`` to ``(1.0, 0.0)``; with 3 all points ``(s_V, s_L, s_rest)`` of
    the simplex, ``steps * (steps + 1) / 2``. The base, every coefficient 1, is not among them.
    """
    check_whole(2, 1001, steps=steps, hint="Write ss.lsg_grid(steps=11).")
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
    """The pairs or triples, None for `lsg_grid`, without repeats and the base, which is always run."""
    hint = (
        "Write grid=ss.lsg_grid(), or pairs (s_V, s_rest) such as [(0.5, 0.5), (1.0, 0.0)], or triples "
        "(s_V, s_L, s_rest) such as [(0.2, 0.2, 0.6)]."
    )
    grid = lsg_grid() if grid is None else grid
    if isinstance(grid, str) or not isinstance(grid, Iterable):
        raise InputError(f"Got grid={grid!r}; expected a list of pairs. {hint}")
    pairs: dict[Pair, None] = {}
    for pair in grid:
        numbers = list(pair) if isinstance(pair, Iterable) and not isinstance(pair, str) else []
        if len(numbers) not in GROUPS or not all(map(is_number, numbers)):
            came = f"Got {pair!r} in the grid"
            raise InputError(f"{came}; expected two finite numbers, or three. {hint}")
        pairs[tuple(map(float, numbers))] = None
    if len({len(pair) for pair in pairs}) > 1:
        raise InputError(
            f"Got pairs and triples in one grid, {[*pairs][:6]}; expected one of the two. {hint}"
        )
    if out := [pair for pair in pairs if set(pair) != {1.0}]:
        return out
    raise InputError(f"Got a grid without a pair other than the base (1, 1). {hint}")


def check_layers(layers: Any, n_layers: int) -> tuple[int, ...]:
    """Layers in the convention of LSG, a gate at layer l edits block l + 1: None, ``"embed"``, indices."""
    if layers is None:
        return tuple(range(EMBED, n_layers - 1))
    layers = plain(layers)
    alone = isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable)
    given: list[Any] = [layers] if alone else list(layers)
    for layer in given:
        if not among(layer, ("embed",)) and not is_whole(layer, 0, n_layers - 2):
            raise LayerError(
                f"Got layer {layer!r}; expected 'embed' or 0 to {n_layers - 2}. A gate at layer l "
                f"edits block l + 1, and block {n_layers - 1} is the last. Write layers='embed' to "
                "edit block 0."
            )
    if not given:
        raise LayerError("Got no layers; expected at least one. Write layers=None for all.")
    return tuple(sorted({EMBED if layer == "embed" else int(layer) for layer in given}))


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


def words_of(pair: Sequence[float]) -> str:
    """A pair or triple in words: ``pair (0.5, 0.5)``."""
    return f"{NOUNS[len(pair)]} ({', '.join(f'{factor:g}' for factor in pair)})"


def counted(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def cell_of(part: pd.DataFrame) -> list[str]:
    """The columns that say which cell a line is of."""
    return [name for name in CELL if name in part]


def coefficients_of(line: Mapping[Any, Any]) -> list[float]:
    """The coefficients of a line of a table."""
    return [line[name] for name in CELL[3:] if name in line]


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


def by_image(items: Sequence[Item]) -> list[list[Numbered]]:
    """Numbered questions in groups of one image id, in the order in which ids appear."""
    groups: dict[str, list[Numbered]] = {}
    for numbered in enumerate(items):
        groups.setdefault(numbered[1].image_id, []).append(numbered)
    return list(groups.values())


def by_token(detector: Detector) -> bool:
    """Whether a rule for L-sinks surely judges an image token without the text behind it."""
    fixed = type(detector) is Norm and not isinstance(detector.tau, str)
    return fixed or type(detector) in (SinkDimensions, CosineToBOS, NoSinks)


def end_of_image(sample: Sample) -> int:
    """The first position behind the last image token; InputError if there is none."""
    if not bool((sample.tokens.image[0] >= 0).any()):
        raise InputError(
            "Got a prompt in which no token is known to show an image; expected image tokens, whose keys a "
            "sweep scales."
        )
    return int((sample.tokens.image[0] >= 0).nonzero().max()) + 1


@dataclass(frozen=True)
class Shape:
    """The questions about one image, in tokens."""

    vision: tuple[int, ...]  # of the ViT, one entry per image
    stem: int  # of the LLM, up to the end of the last image
    tails: tuple[int, ...]  # after it, one entry per row of the model (questions, longer options)


def shape_of(lvlm: LVLM, items: Sequence[Item]) -> Shape:
    """The shape of questions about one image."""
    samples = [lvlm.prepare(images=item.image, text=item.question) for item in items]
    stem, tails = end_of_image(samples[0]), []
    for sample, item in zip(samples, items, strict=True):
        feeds = ask(lvlm.tokenizer, (sample.texts or ("",))[0], item).feeds
        tails += [int(sample.tokens.ids.shape[1]) - stem + len(feed) for feed in feeds]
    return Shape(tuple(samples[0].tokens.vision.live.sum(dim=1).tolist()), stem, tuple(tails))


@dataclass(frozen=True)
class Work:
    """The size of a model, as far as work depends on it."""

    vision: tuple[int, ...]  # weights of every block, as in the other tower
    language: tuple[int, ...]
    widths: tuple[int, int]  # of vision and language attention, heads times head dimension

    @classmethod
    def of(cls, lvlm: LVLM) -> Work:
        """The work of a model's blocks."""
        towers, find = (lvlm.anatomy.vision, lvlm.anatomy.language), lvlm.module.get_submodule
        vision, language = (
            tuple(sum(p.numel() for p in find(path).parameters()) for path in tower.blocks)
            for tower in towers
        )
        widths = [tower.heads * tower.d_head for tower in towers]
        return cls(vision, language, (widths[0], widths[1]))

    def see(self, shape: Shape) -> float:
        """The vision tower on the images of a shape, each on its own."""
        attended = 4.0 * self.widths[0]
        return sum(2.0 * w * n + attended * n * n for w in self.vision for n in shape.vision)

    def decode(self, tokens: int, keys: int, first: int = 0) -> float:
        """Decoder blocks from ``first`` on, on ``tokens`` queries that see ``keys`` keys."""
        each = 4.0 * self.widths[1] * tokens * keys
        return sum(2.0 * weights * tokens + each for weights in self.language[first:])

    def share(self, shape: Shape, first: int) -> float:
        """Decoder blocks from ``first`` on, the common beginning once."""
        if len(shape.tails) == 1:
            whole = shape.stem + shape.tails[0]
            return self.decode(whole, whole, first)
        tails = sum(self.decode(tail, shape.stem + tail, first) for tail in shape.tails)
        return self.decode(shape.stem, shape.stem, first) + tails

    def plain(self, shape: Shape, cells: Cells) -> float:
        """One whole forward pass per question and cell, and one without edit."""
        lengths = [shape.stem + tail for tail in shape.tails]
        once = sum(self.see(shape) + self.decode(n, n) for n in lengths)
        return once * (1 + len(cells.layers) * len(cells.pairs))

    def reused(self, shape: Shape, cells: Cells, *, alone: bool = False) -> float:
        """The same with everything reused that an edit cannot change; ``alone`` if edits share nothing."""
        parts = [replace(shape, tails=(tail,)) for tail in shape.tails] if alone else [shape]
        once = sum(self.share(part, block) for block in cells.blocks for part in parts)
        return self.see(shape) + self.share(shape, 0) + len(cells.pairs) * once


@dataclass(frozen=True)
class SweepCost:
    """What a sweep would do. Print it.

    ``forwards`` are full forward passes of the plain loop: one per question, layer and pair (or triple, with
    3 ``groups``), and one per question for the base. ``blocks_plain`` are decoder blocks times rows of the
    plain loop, ``blocks`` those of the sweep at most: a common beginning and each of its endings are rows of
    their own, and what finds the sinks is not counted. ``bound`` is an estimate of how many times cheaper the
    sweep is: multiplications of the plain loop over those of the sweep, not counting that pairs which do the
    same are run once. It is from the lengths of ``looked_at`` questions.
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
    shapes = [shape_of(lvlm, [item for _, item in group]) for group in groups[:8]]
    work, questions = Work.of(lvlm), sum(map(len, groups))
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

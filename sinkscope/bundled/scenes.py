"""Small drawn scenes, and questions whose answers are right by construction.

A scene is a 64x64 image: one to six shapes on a 3x3 grid of places ("top left" to "bottom right"), on a
plain, slightly noisy background. Everything follows from one seed, so a data split is a range of seeds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sinkscope.checks import check_whole, is_number, is_whole, typed
from sinkscope.errors import InputError

IMAGE_SIZE = 64  # pixels, both sides
GRID = 3  # places per side
MAX_OBJECTS = 6
SUPERSAMPLING = 4
NOISE = 5.0  # standard deviation of a pixel's channel, in grey levels
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 13, "large": 18}  # side of the bounding box in pixels, before jitter
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220)}
COLOURS |= {"yellow": (235, 205, 40), "purple": (150, 60, 180)}
BACKGROUNDS = {"black": (16, 16, 16), "grey": (120, 120, 120)}
BACKGROUNDS |= {"white": (238, 238, 238), "brown": (110, 70, 40)}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
# task -> scope
TASKS = {"count": "global", "colour_count": "global", "background": "global"}
TASKS |= {"colour": "local", "shape": "local"}
TRAIN_SEEDS = range(10_000_000)
VALIDATION_SEEDS = range(10_000_000, 11_000_000)
TEST_SEEDS = range(11_000_000, 12_000_000)


@dataclass(frozen=True)
class SceneObject:
    """One shape; boxes of one scene never overlap."""

    shape: str
    colour: str
    size: str
    row: int  # of the grid, from 0
    column: int
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels, the last two exclusive

    @property
    def place(self) -> str:
        """The name of the place in questions, such as `"top left"`."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """An RGB image of 64x64 pixels and the truth about it. `objects` are in reading order."""

    image: Image.Image
    objects: tuple[SceneObject, ...]
    background: str
    seed: int

    @property
    def count(self) -> int:
        """Number of shapes, 1 to 6."""
        return len(self.objects)

    @property
    def largest_size(self) -> str:
        """`"large"` if any shape is large, else `"small"`."""
        return max((obj.size for obj in self.objects), key=SIZES.__getitem__)

    @property
    def colours_present(self) -> frozenset[str]:
        """Names of the colours that at least one shape has."""
        return frozenset(obj.colour for obj in self.objects)

    @property
    def shapes_present(self) -> frozenset[str]:
        """Names of the shapes that occur."""
        return frozenset(obj.shape for obj in self.objects)


@dataclass(frozen=True)
class Question:
    """A question with its one-word answer. `task` is a key of `TASKS`, `scope` its value there."""

    text: str
    answer: str
    task: str
    scope: str


@typed
def draw_scene(seed: int, *, noise: float = NOISE, contrast: float = 1.0) -> Scene:
    """Draw the scene of this seed; the same seed gives the same pixels.

    The count is uniform on 1..6. Colours come from a palette of one to four colours drawn per
    scene, and half of the scenes hold small shapes only, so that no attribute is nearly constant.
    The bundled model was trained on the defaults.

    ``noise`` is the standard deviation of the pixel noise, in grey levels of 0 to 255. ``contrast``, 0 to 1,
    multiplies the distance of every grey level from the middle, before the noise.
    """
    check_whole(0, seed=seed, hint="Write one of TEST_SEEDS.")
    if not (is_number(noise, 0) and is_number(contrast, 0) and contrast <= 1):
        wanted = "noise of 0 or more grey levels and a contrast from 0 to 1"
        raise InputError(f"Got noise={noise!r} and contrast={contrast!r}; expected {wanted}.")
    rng = np.random.default_rng(seed)
    background = str(rng.choice(list(BACKGROUNDS)))
    count = int(rng.integers(1, MAX_OBJECTS + 1))
    palette = rng.permutation(list(COLOURS))[: int(rng.integers(1, 5))]
    sizes = ["small"] if rng.random() < 0.5 else list(SIZES)
    objects, pitch = [], IMAGE_SIZE / GRID
    for place in sorted(int(place) for place in rng.permutation(GRID * GRID)[:count]):
        row, column = divmod(place, GRID)
        colour, size = str(rng.choice(palette)), str(rng.choice(sizes))
        side = SIZES[size] + int(rng.integers(-1, 2))
        slack = min(2.0, (pitch - side) / 2 - 0.5)  # the box is jittered by up to two pixels
        centre = (np.array([column, row]) + 0.5) * pitch + rng.uniform(-slack, slack, size=2)
        left, top = (int(edge) for edge in np.floor(centre - side / 2 + 0.5))
        shape, box = str(rng.choice(SHAPES)), (left, top, left + side, top + side)
        objects.append(SceneObject(shape, colour, size, row, column, box))
    image = _render(rng, objects, background, noise, contrast)
    return Scene(image, tuple(objects), background, seed)


@typed
def ask(scene: Scene, seed: int, n: int = 1) -> list[Question]:
    """Draw `n` different questions about the scene, every task being equally likely at each draw."""
    pool: dict[str, list[Question]] = {}
    for question in all_questions(scene):
        pool.setdefault(question.task, []).append(question)
    available = sum(map(len, pool.values()))
    if not is_whole(n, 1, available):
        raise InputError(f"Got n={n!r} questions of scene {scene.seed}; expected 1 to {available}.")
    rng = np.random.default_rng([scene.seed, seed])
    chosen: list[Question] = []
    for _ in range(n):
        questions = pool[list(pool)[int(rng.integers(len(pool)))]]
        chosen.append(questions.pop(int(rng.integers(len(questions)))))
        if not questions:
            del pool[chosen[-1].task]
    return chosen


def all_questions(scene: Scene) -> list[Question]:
    """Every question the scene can answer. Empty places are never asked about."""
    asked = [
        ("count", "how many shapes are there?", str(scene.count)),
        ("background", "what colour is the background?", scene.background),
    ]
    for colour in COLOURS:
        number = str(sum(obj.colour == colour for obj in scene.objects))
        asked.append(("colour_count", f"how many {colour} shapes are there?", number))
    for obj in scene.objects:
        asked.append(("colour", f"what colour is the shape at the {obj.place}?", obj.colour))
        asked.append(("shape", f"what shape is at the {obj.place}?", obj.shape))
    return [Question(text, answer, task, TASKS[task]) for task, text, answer in asked]


def _render(
    rng: np.random.Generator,
    objects: Sequence[SceneObject],
    background: str,
    noise: float,
    contrast: float,
) -> Image.Image:
    """Draw large, shrink, reduce contrast and add pixel noise."""
    side = IMAGE_SIZE * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), _tinted(rng, BACKGROUNDS[background], 8))
    pen = ImageDraw.Draw(canvas)
    for obj in objects:
        left, top, right, bottom = (edge * SUPERSAMPLING for edge in obj.box)
        fill = _tinted(rng, COLOURS[obj.colour], 15)
        if obj.shape == "circle":
            pen.ellipse((left, top, right - 1, bottom - 1), fill=fill)
        elif obj.shape == "square":
            pen.rectangle((left, top, right - 1, bottom - 1), fill=fill)
        else:
            corners = [((left + right) / 2, top), (right - 1, bottom - 1), (left, bottom - 1)]
            pen.polygon(corners, fill=fill)
    small = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32)
    if contrast != 1.0:
        small = 127.5 + contrast * (small - 127.5)  # the middle grey level stays
    noisy = small + noise * rng.standard_normal(small.shape, dtype=np.float32)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _tinted(rng: np.random.Generator, colour: tuple[int, int, int], spread: int) -> tuple[int, ...]:
    """Shift each channel of a colour by at most `spread` grey levels."""
    shifted = np.array(colour) + rng.integers(-spread, spread + 1, size=3)
    return tuple(int(channel) for channel in shifted.clip(0, 255))


@typed
def scene_questions(
    n_images: int,
    per_image: int = 8,
    *,
    seeds: Sequence[int] = TEST_SEEDS,
    start: int = 0,
    noise: float = NOISE,
    contrast: float = 1.0,
) -> Iterator[dict[str, Any]]:
    """Questions about scenes of a split, scene by scene; for ``noise`` and ``contrast`` see `draw_scene`.

    Args:
        n_images: How many scenes.
        per_image: Different questions about each, at most what it can answer (8 to 20).
        seeds: The split: `TRAIN_SEEDS`, `VALIDATION_SEEDS` or `TEST_SEEDS`.
        start: How many scenes of the split to skip.

    Yields:
        Dicts with image, question, answer, task, scope and image_id (the scene's seed).
    """
    for seed in _part(n_images, seeds, start):
        scene = draw_scene(seed, noise=noise, contrast=contrast)
        for one in ask(scene, seed, per_image):
            fields = {"answer": one.answer, "task": one.task, "scope": one.scope, "image_id": seed}
            yield {"image": scene.image, "question": one.text, **fields}


@typed
def scene_attributes(
    n_images: int, *, seeds: Sequence[int] = TEST_SEEDS, start: int = 0
) -> Iterator[dict[str, Any]]:
    """Draw scenes of a split with what is true about them, for `sinkscope.linear_probes`.

    The arguments are those of `scene_questions`; the bundled model was trained on `TRAIN_SEEDS` only.

    Yields:
        Dicts with image, question (how many shapes there are), attributes and image_id (the scene's seed).
        Attributes are ``"count"`` (1 to 6), ``"largest size"``, and the sets ``"colours"`` and ``"shapes"``.
    """
    for seed in _part(n_images, seeds, start):
        scene = draw_scene(seed)
        truth: dict[str, Any] = {"count": scene.count, "largest size": scene.largest_size}
        truth |= {"colours": set(scene.colours_present), "shapes": set(scene.shapes_present)}
        question = all_questions(scene)[0].text
        yield {"image": scene.image, "question": question, "attributes": truth, "image_id": seed}


def _part(n_images: int, seeds: Sequence[int], start: int) -> Sequence[int]:
    """The seeds of some scenes of a split, which may not hold fewer."""
    if not (is_whole(n_images, 1) and is_whole(start, 0)) or start + n_images > len(seeds):
        raise InputError(
            f"Got n_images={n_images!r} from scene {start!r}; expected whole numbers, together 1 to "
            f"{len(seeds)}."
        )
    return seeds[start : start + n_images]

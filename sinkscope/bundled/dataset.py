"""Drawn scenes as data sets, in the forms that `sinkscope.compare` and `linear_probes` take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sinkscope.bundled.scenes import NOISE, TEST_SEEDS, all_questions, ask, draw_scene
from sinkscope.errors import InputError


def scene_questions(
    n_images: int,
    per_image: int = 8,
    *,
    seeds: Sequence[int] = TEST_SEEDS,
    start: int = 0,
    noise: float = NOISE,
    contrast: float = 1.0,
) -> Iterator[dict[str, Any]]:
    """Questions about scenes of a split, those about one scene together.

    Args:
        n_images: How many scenes.
        per_image: Different questions about each, at most what it can answer (8 to 20).
        seeds: The split: `TRAIN_SEEDS`, `VALIDATION_SEEDS` or `TEST_SEEDS`.
        start: How many scenes of the split to skip.
        noise: See `draw_scene`.
        contrast: See `draw_scene`.

    Yields:
        Dicts with image, question, answer, task, scope and image_id (the scene's seed).

    Raises:
        InputError: If the split has fewer scenes, or a number is below 1.
    """
    for seed in _part(n_images, seeds, start):
        scene = draw_scene(seed, noise=noise, contrast=contrast)
        for question in ask(scene, seed, per_image):
            yield {
                "image": scene.image,
                "question": question.text,
                "answer": question.answer,
                "task": question.task,
                "scope": question.scope,
                "image_id": seed,
            }


def scene_attributes(
    n_images: int, *, seeds: Sequence[int] = TEST_SEEDS, start: int = 0
) -> Iterator[dict[str, Any]]:
    """Scenes of a split with what is true about them, as `sinkscope.linear_probes` takes it.

    Args:
        n_images: How many scenes.
        seeds: The split: `TRAIN_SEEDS`, `VALIDATION_SEEDS` or `TEST_SEEDS`. The bundled model was
            trained on the first, so it has never seen scenes of the others.
        start: How many scenes of the split to skip.

    Yields:
        Dicts with image, question (how many shapes there are), attributes and image_id (the scene's
        seed). Attributes are ``"count"`` (1 to 6), ``"largest size"``, and two sets: ``"colours"``
        and ``"shapes"``.

    Raises:
        InputError: If the split has fewer scenes, or a number is below 1.
    """
    for seed in _part(n_images, seeds, start):
        scene = draw_scene(seed)
        yield {
            "image": scene.image,
            "question": all_questions(scene)[0].text,
            "attributes": {
                "count": scene.count,
                "largest size": scene.largest_size,
                "colours": set(scene.colours_present),
                "shapes": set(scene.shapes_present),
            },
            "image_id": seed,
        }


def _part(n_images: int, seeds: Sequence[int], start: int) -> Sequence[int]:
    """The seeds of some scenes of a split.

    Raises:
        InputError: If the split has fewer scenes, or a number is below 1.
    """
    if n_images < 1 or start < 0 or start + n_images > len(seeds):
        raise InputError(
            f"Got n_images={n_images} from scene {start} on; expected 1 to {len(seeds) - start}."
        )
    return seeds[start : start + n_images]

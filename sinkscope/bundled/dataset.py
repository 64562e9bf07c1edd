"""Questions about drawn scenes as a dataset, in the form `sinkscope.compare` takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sinkscope.bundled.scenes import TEST_SEEDS, ask, draw_scene
from sinkscope.errors import InputError


def scene_questions(
    n_images: int, per_image: int = 8, *, seeds: Sequence[int] = TEST_SEEDS, start: int = 0
) -> Iterator[dict[str, Any]]:
    """Questions about scenes of a split, those about one scene together.

    Args:
        n_images: How many scenes.
        per_image: Different questions about each, at most what it can answer (8 to 20).
        seeds: The split: `TRAIN_SEEDS`, `VALIDATION_SEEDS` or `TEST_SEEDS`.
        start: How many scenes of the split to skip.

    Yields:
        Dicts with image, question, answer, task, scope and image_id (the scene's seed).

    Raises:
        InputError: If the split has fewer scenes, or a number is below 1.
    """
    if n_images < 1 or start < 0 or start + n_images > len(seeds):
        raise InputError(
            f"Got n_images={n_images} from scene {start} on; expected 1 to {len(seeds) - start}."
        )
    for seed in seeds[start : start + n_images]:
        scene = draw_scene(seed)
        for question in ask(scene, seed, per_image):
            yield {
                "image": scene.image,
                "question": question.text,
                "answer": question.answer,
                "task": question.task,
                "scope": question.scope,
                "image_id": seed,
            }

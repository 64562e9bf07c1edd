"""What the demo asks about a scene, and how it compares answers and sinks with the truth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sinkscope.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor

    from sinkscope.bundled import Question, Scene
    from sinkscope.experiments import SinkTrace
    from sinkscope.models import LVLM
    from sinkscope.testing import Truth

EFFECT_QUESTIONS = 6
ANSWERS = "What the model answered"
EFFECTS = "What editing sinks, and as many random tokens, does to answers on other scenes"
PLANTED = "What was planted, as patches counted by rows (and their cells in the table of sinks)"


def choose_questions(scene: Scene, count: int) -> list[Question]:
    """Global and local questions by turns.

    Raises:
        InputError: If the scene does not hold as many.
    """
    from sinkscope.bundled import all_questions, ask

    most = len(all_questions(scene))
    if not 1 <= count <= most:
        raise InputError(
            f"Got --questions {count}; expected 1 to {most} for scene {scene.seed}. Write "
            "--questions 6, or another --seed."
        )
    drawn = ask(scene, 0, most)
    sides = [[q for q in drawn if q.scope == scope] for scope in ("global", "local")]
    turns = [side[i] for i in range(most) for side in sides if i < len(side)]
    return turns[:count]


def ask_model(lvlm: LVLM, scene: Scene, questions: Sequence[Question]) -> DataFrame:
    """The model's answers beside the truth, as a table."""
    import pandas as pd

    texts = [question.text for question in questions]
    sample = lvlm.prepare(images=[scene.image] * len(texts), text=texts)
    said = lvlm.generate(sample, max_new_tokens=3).text or ()
    lines = [
        {
            "question": question.text,
            "scope": question.scope,
            "answer": answer.strip(),
            "truth": question.answer,
            "right": "yes" if answer.strip() == question.answer else "no",
        }
        for question, answer in zip(questions, said, strict=True)
    ]
    return pd.DataFrame(lines)


def planted_model(seed: int) -> tuple[LVLM, Truth]:
    """A model with planted sinks and decoys, one of them a V-sink that meets the L rule too, and the truth."""
    from sinkscope.models import LVLM
    from sinkscope.testing import random_plant

    made = random_plant(seed, n_overlap=1)
    made.model.name_or_path = "a planted model"
    return LVLM(made.model, made.processor), made.truth


def check_effects(scenes: int) -> None:
    """Refuse a number of scenes that there is not.

    Raises:
        InputError: If it is negative or beyond the test split.
    """
    from sinkscope.bundled import TEST_SEEDS

    if not 0 <= scenes <= len(TEST_SEEDS):
        raise InputError(f"Got --effects {scenes}; expected 0 to {len(TEST_SEEDS)} scenes.")


def effects_of(lvlm: LVLM, scenes: int) -> tuple[str, DataFrame]:
    """Base, masked sinks, scaled sinks and random tokens, on global and local questions.

    Returns:
        The table for the terminal, and its cells for the page.
    """
    from sinkscope.bundled import scene_questions
    from sinkscope.experiments.effects import effect_table
    from sinkscope.viz.changes import effects_frame, effects_text

    asked = [{**q, "task": q["scope"]} for q in scene_questions(scenes, EFFECT_QUESTIONS)]
    summary = effect_table(lvlm, asked).summary()
    return effects_text(summary), effects_frame(summary)


def planted_and_found(trace: SinkTrace, truth: Truth) -> dict[str, DataFrame]:
    """What was planted in the image, what the trace found of it, and what it made up, as patches."""
    import pandas as pd

    columns = int(trace.sample.tokens.column.max()) + 1

    def named(patches: Iterable[int]) -> str:
        parts = [f"{patch} ({patch // columns},{patch % columns})" for patch in sorted(patches)]
        return ", ".join(parts) or "none"

    lines = []
    for kind, planted in (("V", truth.v_sinks), ("L", truth.l_sinks)):
        found = {r.row * columns + r.column for r in trace.records if r.kind == kind}
        lines.append(
            {
                "kind": f"{kind}-sinks",
                "planted": named(planted),
                "found": named(found & set(planted)),
                "missed": named(set(planted) - found),
                "wrong": named(found - set(planted)),
            }
        )
    return {PLANTED: pd.DataFrame(lines)}


def decoys_of(trace: SinkTrace, truth: Truth) -> dict[str, Tensor]:
    """The decoys at their LLM positions, bool ``[batch pos]``, by what they are."""
    import torch

    tokens = trace.sample.tokens
    columns = int(tokens.column.max()) + 1
    patch = tokens.row * columns + tokens.column
    return {
        name: (tokens.row >= 0) & torch.isin(patch, torch.tensor(patches))
        for name, patches in (
            ("spike decoys", truth.spike_decoys),
            ("attention decoys", truth.attention_decoys),
        )
    }


def describe(scene: Scene) -> str:
    """One line about a scene."""
    shapes = "1 shape" if scene.count == 1 else f"{scene.count} shapes"
    return f"Scene {scene.seed}: {shapes} on a {scene.background} background."


def as_text(table: DataFrame) -> str:
    """A small table for the terminal."""
    from sinkscope.viz.words import aligned

    return aligned([list(table.columns), *table.astype(str).to_numpy().tolist()])

"""What the demo asks about a scene, and how it compares answers and sinks with the truth."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from sinkscope.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL.Image import Image
    from torch import Tensor

    from sinkscope.bundled import Question, Scene
    from sinkscope.experiments import SinkTrace
    from sinkscope.models import LVLM, Sample
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
    from sinkscope.experiments.baselines import effect_table
    from sinkscope.viz.effects import effects_frame, effects_text

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
    from sinkscope.viz.tables import aligned

    return aligned([list(table.columns), *table.astype(str).to_numpy().tolist()])


DESCRIBE = "describe the picture."

BACKGROUND = "what colour is the background?"

PHOTO_QUESTION = "What is in the picture?"

WORDS_ARE_WRONG = (
    "The words about the photograph are wrong: projector and adapter have seen drawn scenes only, so the "
    "model describes shapes that are not there. Its two towers are published models, and their sinks are "
    "real."
)

CREDIT = (
    "Photograph: china.jpg of scikit-learn's sample images, by danielbuechele "
    "(flickr.com/photos/danielbuechele/6061409035), CC BY 2.0."
)

ANSWERS_real_demo = "What the model answered about the drawn scene"

PHOTO = "What the model says of the photograph"

LIVE = "What colour is the background? With and without some tokens, on this scene"

EFFECTS_real_demo = "What masking does to the accuracy of answers, over many scenes"

MASKED = "masked"

FIRST = "position 0"

LONGEST = 64

"""Tokens of a description."""

TOP = 8


@dataclass(frozen=True, eq=False)
class Shown:
    """What the demo has found out.

    Attributes:
        sample: The drawn scene with the question about it.
        trace: Its trace.
        photo: The photograph with its question.
        photo_trace: Its trace.
        tables: Heading -> table, in the order of the page.
    """

    sample: Sample
    trace: SinkTrace
    photo: Sample
    photo_trace: SinkTrace
    tables: dict[str, DataFrame]


def photograph() -> Image:
    """The photograph that scikit-learn ships."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))


def answer(lvlm: LVLM, sample: Sample, interventions: Sequence[Any] = ()) -> str:
    """The model's answer, greedy."""
    text = lvlm.generate(sample, interventions=interventions, max_new_tokens=LONGEST).text
    return (text or ("",))[0].strip()


def show(lvlm: LVLM, scene: Scene, questions: int, tell: Any) -> Shown:
    """Everything but the pictures.

    Args:
        lvlm: The example model.
        scene: The drawn scene.
        questions: How many questions to ask about it.
        tell: Called with what comes next.
    """
    from sinkscope.experiments import trace_sinks

    tell("asking about the drawn scene")
    answers = ask_model(lvlm, scene, choose_questions(scene, questions))
    sample = lvlm.prepare(images=scene.image, text=DESCRIBE)
    answers.attrs["notes"] = [f"Asked to describe the picture: {answer(lvlm, sample)}"]
    tell("tracing the drawn scene")
    trace = trace_sinks(lvlm, sample)
    tell("tracing the photograph")
    photo = lvlm.prepare(images=photograph(), text=PHOTO_QUESTION)
    photo_trace = trace_sinks(lvlm, photo)
    tables = {
        ANSWERS_real_demo: answers,
        PHOTO: photo_table(answer(lvlm, photo), photo_trace),
    }
    tell("masking tokens")
    tables[LIVE] = masked_answers(lvlm, scene)
    effects = effect_frame()
    if effects is not None:
        tables[EFFECTS_real_demo] = effects
    return Shown(sample, trace, photo, photo_trace, tables)


def photo_table(said: str, trace: SinkTrace) -> DataFrame:
    """Question and answer about the photograph, with what to think of it."""
    import pandas as pd

    from sinkscope.viz.tables import counts

    frame = pd.DataFrame([{"question": PHOTO_QUESTION, "sinks": counts(trace)}])
    frame.attrs["notes"] = [f"Its answer: {said}", WORDS_ARE_WRONG, CREDIT]
    return frame


def choices(lvlm: LVLM, trace: SinkTrace) -> dict[str, Any]:
    """Tokens to mask, bool ``[batch pos]`` or by layer: the first one, CLS, the most attended patches."""
    tokens, evidence = trace.sample.tokens, trace.vision
    feed = lvlm.anatomy.feed_layers[-1]
    excess = evidence.received.excess()[:, evidence.received.layers.index(feed)].mean(dim=1)
    patches = excess.masked_fill(~tokens.vision.select("patch"), -1.0)
    top = patches.new_zeros(patches.shape).scatter(1, patches.topk(TOP, dim=1).indices, 1.0)
    cls = tokens.from_vision(tokens.vision.select("cls").float()).nan_to_num() > 0
    return {
        FIRST: tokens.select("first"),
        f"{FIRST}, only where it is a sink": trace.text_sinks() & tokens.select("first")[:, None],
        "CLS": cls,
        f"the {TOP} most attended patches": tokens.from_vision(top).nan_to_num() > 0,
    }


def masked_answers(lvlm: LVLM, scene: Scene) -> DataFrame:
    """The answer about the background as it is, without some tokens, and without as many random ones."""
    import pandas as pd

    from sinkscope.experiments import RandomControl, trace_sinks
    from sinkscope.interventions import MaskKeys

    sample = lvlm.prepare(images=scene.image, text=BACKGROUND)
    trace = trace_sinks(lvlm, sample)
    lines = [{MASKED: "nothing", "answer": answer(lvlm, sample)}]
    for name, tokens in choices(lvlm, trace).items():
        mask = MaskKeys(tokens)
        lines.append({MASKED: name, "answer": answer(lvlm, sample, [mask])})
        if not name.startswith(FIRST):
            (control,) = RandomControl(mask, "count", n=1).draws(trace)
            count = int(tokens.sum())
            word = f"{count} random patch{'es' if count > 1 else ''}"
            said = answer(lvlm, sample, [control])
            lines.append({MASKED: word, "answer": said})
    frame = pd.DataFrame([{**line, "truth": scene.background} for line in lines])
    frame.attrs["notes"] = [
        "Masked in all layers, but where said. With position 0 masked everywhere, position 1 is the first token "
        "that anybody sees, and becomes the sink; masked only where it is one, no sink is left, and the answer "
        "is lost.",
        "CLS carries the colour of the background through the projector: without it the answer is a guess. "
        "One scene proves little; the next table counts many.",
    ]
    return frame


def effect_frame() -> DataFrame | None:
    """The measured effects that ship with the package; None before they were measured."""
    import pandas as pd

    path = files("sinkscope.example") / "effects.json"
    if not path.is_file():
        return None
    stored: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    frame = pd.DataFrame(stored["rows"])
    frame.attrs["notes"] = list(stored["notes"])
    return frame


def life(trace: SinkTrace) -> str:
    """Sinks with their life cycle, a line each."""
    from sinkscope.experiments.candidates import named
    from sinkscope.viz.tables import ranges

    lines = []
    for record in trace.records:
        what = named(trace, "language", record.batch, record.pos)
        if record.kind == "attention":
            heads = max(record.vit_drawn)
            kind = str(record.vit_kind).upper() if record.vit_kind != "patch" else "patch"
            lines.append(
                f"{what} ({kind} of the ViT): attended in most ViT blocks, up to {heads:.2f} beyond uniform; "
                "no spike that the V rule flags"
            )
            continue
        parts = [
            f"{'in the input' if block < 0 else f'written by block {block} ({half})'}, a sink in layers "
            f"{ranges(range(max(block + 1, 0), last + 1))}"
            for block, last, half in record.llm_lives
        ]
        lines.append(f"{what}: " + "; ".join(parts) if parts else f"{what}: born in the ViT")
    return "\n".join(lines)


def page_tables(tables: Mapping[str, DataFrame]) -> str:
    """All tables for the terminal, with their notes."""
    blocks = []
    for head, table in tables.items():
        notes = "".join(f"\n{note}" for note in table.attrs.get("notes", ()))
        blocks.append(f"{head}:\n{as_text(table)}{notes}")
    return "\n\n".join(blocks)

"""The demo on the example model: a drawn scene and a photograph, their sinks, and what masking them does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from sinkscope.demo import as_text, ask_model, choose_questions

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL.Image import Image

    from sinkscope.bundled import Scene
    from sinkscope.experiments import SinkTrace
    from sinkscope.models import LVLM, Sample

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
ANSWERS = "What the model answered about the drawn scene"
PHOTO = "What the model says of the photograph"
LIVE = "What colour is the background? With and without some tokens, on this scene"
EFFECTS = "What masking does to the accuracy of answers, over many scenes"
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
        ANSWERS: answers,
        PHOTO: photo_table(answer(lvlm, photo), photo_trace),
    }
    tell("masking tokens")
    tables[LIVE] = masked_answers(lvlm, scene)
    effects = effect_frame()
    if effects is not None:
        tables[EFFECTS] = effects
    return Shown(sample, trace, photo, photo_trace, tables)


def photo_table(said: str, trace: SinkTrace) -> DataFrame:
    """Question and answer about the photograph, with what to think of it."""
    import pandas as pd

    from sinkscope.viz.table import counts

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

    from sinkscope.experiments import trace_sinks
    from sinkscope.interventions import MaskKeys, RandomControl

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
    from sinkscope.viz.words import ranges

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

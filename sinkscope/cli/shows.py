"""What ``sinkscope demo`` asks, shows and compares with the truth, and the folder that commands write."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sinkscope.cli.recipes import load_model, stages

if TYPE_CHECKING:
    from pandas import DataFrame

    from sinkscope.bundled import Question, Scene
    from sinkscope.experiments import SinkTrace
    from sinkscope.models import LVLM, Sample

    Tables: TypeAlias = Mapping[str, DataFrame]  # by their headings

QUESTION = "What is in the picture?"
FIRST, TOP = "position 0", 8  # how many of the most attended patches are masked
PHOTO_NOTES = (
    "The words about the photograph are wrong: projector and adapter have seen drawn scenes only. The two "
    "towers are published models, and their sinks are real.",
    "Photograph: china.jpg of scikit-learn's sample images, by danielbuechele "
    "(flickr.com/photos/danielbuechele/6061409035), CC BY 2.0.",
    "Its own page: photo/index.html.",
)
MASK_NOTES = (
    "Masked in all layers, but where said. With position 0 masked everywhere, position 1 becomes the sink; "
    "masked only where it is one, no sink is left, and the answer is lost.",
    "CLS carries the colour of the background through the projector: without it the answer is a guess. "
    "One scene proves little; the next table counts many.",
)


def show_example(scene: Scene, questions: Sequence[Question], out: str) -> int:
    """The example model: a drawn scene, a photograph, and what masking does."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    from sinkscope.experiments import trace_sinks
    from sinkscope.viz.tables import counts

    print("sinkscope demo: a real model, its answers and its sinks, and a report.", flush=True)
    lvlm = load_model("example")
    with stages(4, "asking about the drawn scene") as step:
        answers = ask_model(lvlm, scene, questions)
        sample = lvlm.prepare(images=scene.image, text="describe the picture.")
        answers.attrs["notes"] = [f"Asked to describe the picture: {answer(lvlm, sample)}"]
        step("tracing the drawn scene")
        trace = trace_sinks(lvlm, sample)
        step("tracing the photograph")
        picture = Image.fromarray(load_sample_image("china.jpg"))
        photo = trace_sinks(lvlm, lvlm.prepare(images=picture, text=QUESTION))
        notes = [f"Its answer: {answer(lvlm, photo.sample)}", *PHOTO_NOTES]
        line = {"question": QUESTION, "sinks": counts(photo)}
        step("masking tokens")
        masked = "What colour is the background? With and without some tokens, on this scene"
        tables = {
            "What the model answered about the drawn scene": answers,
            "What the model says of the photograph": frame([line], notes),
            masked: masked_answers(lvlm, scene),
        }
        measured = files("sinkscope.example") / "effects.json"
        if measured.is_file():
            stored = json.loads(measured.read_text(encoding="utf-8"))
            head = "What masking does to the accuracy of answers, over many scenes"
            tables[head] = frame(stored["rows"], stored["notes"])
    print(f"\n{describe(scene)}\n\n{as_text(tables)}\n")
    print(f"Sinks of the drawn scene, block by block:\n{life(trace)}\n")
    page = write_folder(Path(out) / "photo", lvlm, photo, {})
    print(f"Sinks of the photograph:\n{life(photo)}\nReport: {page}\n")
    return show(out, lvlm, trace, tables)


def show_toy(scene: Scene, questions: Sequence[Question], effects: int, out: str) -> int:
    """The bundled model: questions, trace, what editing does."""
    from sinkscope.bundled import scene_questions
    from sinkscope.experiments import effect_table, trace_sinks
    from sinkscope.viz.effects import effects_frame, effects_text

    print("sinkscope demo: the same on the toy model inside the package.", flush=True)
    with stages(3, "loading the model") as step:
        lvlm = load_model("bundled")
        step("asking")
        tables = {"What the model answered": ask_model(lvlm, scene, questions)}
        step("tracing")
        trace = trace_sinks(lvlm, lvlm.prepare(images=scene.image, text=questions[0].text))
    print(f"\n{describe(scene)}\n\n{as_text(tables)}")
    if effects:
        asked = [{**q, "task": q["scope"]} for q in scene_questions(effects, 6)]
        summary = effect_table(lvlm, asked).estimates()
        head = "What editing sinks, and as many random tokens, does to answers on other scenes"
        print(f"\n{head}:\n{effects_text(summary)}")
        tables[head] = effects_frame(summary)
    hint = "\nFor models that have sinks: sinkscope demo, sinkscope demo --planted"
    print()
    return show(out, lvlm, trace, tables, "" if trace.records else hint)


def show_planted(scene: Scene, out: str) -> int:
    """A model whose sinks were planted: what was planted, what is found, and where the decoys are."""
    import torch

    from sinkscope.experiments import trace_sinks
    from sinkscope.models import LVLM
    from sinkscope.testing import random_plant

    print("sinkscope demo: trace planted sinks, and compare with the truth.", flush=True)
    made = random_plant(scene.seed, n_overlap=1)  # one V-sink meets the L rule too
    made.model.name_or_path = "a planted model"
    lvlm = LVLM(made.model, made.processor)
    sample = lvlm.prepare(images=scene.image, text="how many shapes are there?")
    trace = trace_sinks(lvlm, sample)
    tokens, decoys, lines = sample.tokens, {}, []
    columns = int(tokens.column.max()) + 1

    def named(patches: Iterable[int]) -> str:
        return ", ".join(f"{p} ({p // columns},{p % columns})" for p in sorted(patches)) or "none"

    for kind, there in (("V", set(made.truth.v_sinks)), ("L", set(made.truth.l_sinks))):
        found = {r.row * columns + r.column for r in trace.records if r.kind == kind}
        line = {"kind": f"{kind}-sinks", "planted": named(there), "found": named(found & there)}
        lines.append(line | {"missed": named(there - found), "wrong": named(found - there)})
    head = "What was planted, as patches counted by rows (and their cells in the table of sinks)"
    tables = {head: frame(lines)}
    print(f"\n{as_text(tables)}\n")
    patch = tokens.row * columns + tokens.column
    for kind in ("spike", "attention"):
        planted = torch.tensor(made.truth.patches(f"{kind}_decoys"))
        decoys[f"{kind} decoys"] = (tokens.row >= 0) & torch.isin(patch, planted)
    return show(out, lvlm, trace, tables, decoys=decoys)


def ask_model(lvlm: LVLM, scene: Scene, questions: Sequence[Question]) -> DataFrame:
    """The model's answers beside the truth."""
    texts = [question.text for question in questions]
    sample = lvlm.prepare(images=[scene.image] * len(texts), text=texts)
    said = [text.strip() for text in lvlm.generate(sample, max_new_tokens=3).text or ()]
    lines = []
    for q, text in zip(questions, said, strict=True):
        line = {"question": q.text, "scope": q.scope, "answer": text, "truth": q.answer}
        lines.append(line | {"right": "yes" if text == q.answer else "no"})
    return frame(lines)


def answer(lvlm: LVLM, sample: Sample, interventions: Sequence[Any] = ()) -> str:
    """The model's answer, greedy."""
    text = lvlm.generate(sample, interventions=interventions, max_new_tokens=64).text
    return (text or ("",))[0].strip()


def masked_answers(lvlm: LVLM, scene: Scene) -> DataFrame:
    """The answer about the background as it is, without some tokens, and without as many random ones."""
    from sinkscope.experiments import RandomControl, trace_sinks
    from sinkscope.interventions import MaskKeys

    sample = lvlm.prepare(images=scene.image, text="what colour is the background?")
    trace = trace_sinks(lvlm, sample)
    said = {"nothing": answer(lvlm, sample)}
    tokens, received = sample.tokens, trace.vision.received
    feed = received.layers.index(lvlm.anatomy.feed_layers[-1])
    excess = received.excess()[:, feed].mean(dim=1)
    patches = excess.masked_fill(~tokens.vision.select("patch"), -1.0)
    top = patches.new_zeros(patches.shape).scatter(1, patches.topk(TOP, dim=1).indices, 1.0)
    cls, first = tokens.vision.select("cls").float(), tokens.select("first")
    masked = {
        FIRST: first,
        f"{FIRST}, only where it is a sink": trace.text_sinks() & first[:, None],
        "CLS": tokens.from_vision(cls).nan_to_num() > 0,
        f"the {TOP} most attended patches": tokens.from_vision(top).nan_to_num() > 0,
    }
    for name, some in masked.items():
        mask = MaskKeys(some)
        said[name] = answer(lvlm, sample, [mask])
        if not name.startswith(FIRST):
            (control,) = RandomControl(mask, "count", n=1).draws(trace)
            many = int(some.sum())
            said[f"{many} random patch{'es' if many > 1 else ''}"] = answer(lvlm, sample, [control])
    lines = ({"masked": n, "answer": text, "truth": scene.background} for n, text in said.items())
    return frame(lines, MASK_NOTES)


def life(trace: SinkTrace) -> str:
    """Sinks with their life cycle, a line each."""
    from sinkscope.experiments.candidates import named
    from sinkscope.viz.tables import ranges

    lines = []
    for record in trace.records:
        lives = [
            f"{'in the input' if block < 0 else f'written by block {block} ({half})'}, a sink in layers "
            f"{ranges(range(max(block + 1, 0), last + 1))}"
            for block, last, half in record.llm_lives
        ]
        said = f": {'; '.join(lives) or 'born in the ViT'}"
        if record.kind == "attention":
            kind = "patch" if record.vit_kind == "patch" else str(record.vit_kind).upper()
            said = (
                f" ({kind} of the ViT): attended in most ViT blocks, up to {max(record.vit_drawn):.2f} "
                "beyond uniform; no spike that the V rule flags"
            )
        lines.append(named(trace, "language", record.batch, record.pos) + said)
    return "\n".join(lines)


def describe(scene: Scene) -> str:
    """One line about a scene."""
    shapes = "1 shape" if scene.count == 1 else f"{scene.count} shapes"
    return f"Scene {scene.seed}: {shapes} on a {scene.background} background."


def frame(lines: Iterable[Any], notes: Sequence[str] = ()) -> DataFrame:
    """A table with notes below it."""
    import pandas as pd

    table = pd.DataFrame(list(lines))
    table.attrs["notes"] = list(notes)
    return table


def as_text(tables: Tables) -> str:
    """Tables for the terminal, each with its heading and notes."""
    from sinkscope.viz.tables import frame_text

    said = {head: [frame_text(table), *table.attrs["notes"]] for head, table in tables.items()}
    return "\n\n".join("\n".join([f"{head}:", *lines]) for head, lines in said.items())


def show(
    out: str, lvlm: LVLM, trace: SinkTrace, tables: Tables, hint: str = "", **report: Any
) -> int:
    """Print the table of sinks, write the folder, say where it is; see `write_folder`."""
    print(trace.summary() + hint, flush=True)
    print(f"\nReport: {write_folder(out, lvlm, trace, tables, **report)}")
    return 0


def write_folder(
    out: str | Path, lvlm: LVLM, trace: SinkTrace, tables: Tables, **report: Any
) -> Path:
    """Measure the attention mass of the trace's groups and write the report; ``decoys`` as there."""
    from sinkscope.probes import AttentionMass
    from sinkscope.viz import write_report

    mass = AttentionMass(trace.groups)
    result = lvlm.run(trace.sample, [mass], logits="last")[mass]
    title = f"Attention sinks: {lvlm.name}"
    return write_report(out, trace, mass=result, title=title, tables=tables, **report)

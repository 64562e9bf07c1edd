"""The model card of the bundled model, made from the numbers stored beside the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from bundled_model.recipe import IMAGE_TOKENS, SPECIAL_TOKENS, vocabulary
from sinkscope.bundled.scenes import TASKS, TEST_SEEDS, all_questions, draw_scene

RECEIVED_EPS = 0.3  # Gu et al., 2025: a sink receives at least this share in a head
MASSIVE_ABSOLUTE, MASSIVE_RATIO = 100.0, 1000.0  # Sun et al., 2024: size, and size over the median
TRAINING_FIELDS = ("threads", "torch", "transformers")  # of training.json, printed as they are

HEAD = """---
license: mit
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, attention-sinks, interpretability, synthetic-data]
---
# The bundled model of sinkscope

Try every tool of sinkscope offline, within seconds, on a trained model whose attention nobody planted. The
model is a small LLaVA ({parameters:,} parameters, float32) that answers questions about drawn shapes. It is
not a general vision-language model.

Layout: CLIP tower (6 blocks, width 128, 2 heads of 64, 8-pixel patches of a 64x64 image, read at its
second-last block without CLS), two-layer projector, Llama decoder (5 blocks, width 128, 2 heads of 64),
{image_tokens} image tokens, one token per word. Load it with plain transformers:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(path)
processor = AutoProcessor.from_pretrained(path)
```

## Data

`sinkscope.bundled.scenes` draws one to six shapes on a 3x3 grid. The seed determines the scene. The
training, validation and test splits are disjoint ranges of seeds. Training used {drawn:,} scenes, each
once. Questions of the first test scene:

{examples}

## Training

`python scripts/train_bundled.py --out DIR` took {minutes:.0f} minutes on {threads} CPU threads shared with other
work (torch {torch}, transformers {transformers}).

1. The tower alone was trained for {vision_steps} steps of {vision_batch} scenes, with temporary heads. Each patch
   learned to name its place on the grid and the shape there, and CLS learned to count.
2. Projector and decoder were trained for {steps} steps of {batch} scenes with {turns} questions each. The tower was
   frozen, as in LLaVA-1.5. The loss was next-token loss on answers and, with a weight of {question_weight}, on questions.

`scripts/evaluate_bundled.py` measured all numbers below on the stored weights.

## Accuracy

{scenes} test scenes, one question per task and scene, single-turn prompts, greedy answers, exact match; 95 %
Wilson intervals.

| task | scope | right | accuracy | interval |
|---|---|---|---|---|
{accuracy}

## Attention sinks

Measured on {sink_scenes} test scenes; in the decoder on one prompt per task and scene. Columns of the tables:

- *most attended*: the token with the largest quotient of *received* and *null*, among keys that at least eight
  queries see, and the share of prompts in which it is the most attended one.
- *received (null)*: the attention that this token receives (mean over heads and over the queries that can see
  it), and the same under uniform attention.
- *one head*: the largest received attention in a single head.
- *on a shape (null)*: how often the most attended image token lies on a shape, and the share of patches that
  do. A token that is attended for what it shows is not a sink.
- *spike*: the largest |activation| that the block writes and, after the slash, its quotient with the median.
- *norm*: the largest token norm over the median norm.

{verdict}

### Vision tower

{vision}

### Language model

{language}

## Limits

The model knows {words} words and scenes of one kind. It guesses other colours, shapes and places. Training had
no questions about empty places. Numbers from this model show how a tool behaves, not how large models
behave: its width, depth, data and training time are all about a thousandth of theirs or less.
"""


class Layer(TypedDict):
    """One layer as `measurements.json` stores it; the fields of `LayerSinks` that the card prints."""

    layer: int
    received: float
    null: float
    token: str
    token_share: float
    head_received: float
    image_received: float
    image_null: float
    on_shape: float
    on_shape_null: float
    first: float
    first_null: float
    spike: float
    spike_ratio: float
    spike_token: str
    norm_ratio: float
    norm_token: str


def write_card(folder: Path) -> None:
    """Write `README.md` from `measurements.json` and `training.json` of the same folder.

    Raises:
        FileNotFoundError: if one of the two is missing.
    """
    measured = json.loads((folder / "measurements.json").read_text())
    training = json.loads((folder / "training.json").read_text())
    plan, accuracy = training["plan"], measured["accuracy"]
    fields = {
        "parameters": measured["parameters"],
        "image_tokens": IMAGE_TOKENS,
        "drawn": plan["batch"] * plan["steps"] + plan["vision_batch"] * plan["vision_steps"],
        "examples": _examples(),
        "minutes": training["seconds"] / 60,
        "scenes": measured["scenes"],
        "sink_scenes": measured["sink_scenes"],
        "accuracy": "\n".join(_accuracy_row(task, row) for task, row in accuracy.items()),
        "verdict": _verdict(measured["vision"], measured["language"]),
        "vision": _layer_table(measured["vision"], "CLS"),
        "language": _layer_table(measured["language"], "BOS"),
        "words": len(vocabulary()) - len(SPECIAL_TOKENS),
    }
    text = HEAD.format(**fields, **plan, **{name: training[name] for name in TRAINING_FIELDS})
    (folder / "README.md").write_text(text)


def _examples() -> str:
    """One question of each task about the first test scene, as a list."""
    questions = {question.task: question for question in all_questions(draw_scene(TEST_SEEDS[0]))}
    return "\n".join(
        f"- {task} ({TASKS[task]}): *{questions[task].text}* {questions[task].answer}"
        for task in TASKS
    )


def _accuracy_row(task: str, row: dict[str, float]) -> str:
    interval = f"{row['low']:.3f} to {row['high']:.3f}"
    right = f"{row['right']} of {row['asked']}"
    return f"| {task} | {TASKS[task]} | {right} | {row['share']:.3f} | {interval} |"


def _layer_table(layers: Sequence[Layer], first: str) -> str:
    """One line per block."""
    lines = [
        "| layer | most attended | received (null) | one head | best image token (null) "
        f"| on a shape (null) | to {first} (null) | spike | norm |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in layers:
        lines.append(
            f"| {row['layer']} | {_written(row['token'])}, {row['token_share']:.0%} "
            f"| {row['received']:.3f} ({row['null']:.3f}) | {row['head_received']:.3f} "
            f"| {row['image_received']:.3f} ({row['image_null']:.3f}) "
            f"| {row['on_shape']:.0%} ({row['on_shape_null']:.0%}) "
            f"| {row['first']:.3f} ({row['first_null']:.3f}) "
            f"| {row['spike']:.1f} / {row['spike_ratio']:.0f} at {_written(row['spike_token'])} "
            f"| {row['norm_ratio']:.1f} at {_written(row['norm_token'])} |"
        )
    return "\n".join(lines)


def _written(token: str) -> str:
    """A token and its place; words as code, because a page reads ``<s>`` as a mark of its own."""
    word, _, place = token.rpartition(" ")
    return f"`{word}` {place}" if place.startswith("(") else token


def _verdict(vision: Sequence[Layer], language: Sequence[Layer]) -> str:
    """What the published criteria say, per tower, in words."""
    towers = (("Vision tower (V-sinks)", vision), ("Language model (BOS and L-sinks)", language))
    return "\n".join(_tower_verdict(name, layers) for name, layers in towers)


def _tower_verdict(name: str, layers: Sequence[Layer]) -> str:
    heads = [row["layer"] for row in layers if row["head_received"] >= RECEIVED_EPS]
    massive = [
        row["layer"]
        for row in layers
        if row["spike"] >= MASSIVE_ABSOLUTE and row["spike_ratio"] >= MASSIVE_RATIO
    ]
    peak = max(layers, key=lambda row: row["received"] / row["null"])
    return (
        f"- **{name}.** {_conclusion(heads, massive)} Layers in which one head gives one token at "
        f"least {RECEIVED_EPS:.0%} of its attention (Gu et al., 2025): {_listed(heads)}. Layers with "
        f"massive activations, above {MASSIVE_ABSOLUTE:.0f} and {MASSIVE_RATIO:.0f} times the median "
        f"(Sun et al., 2024): {_listed(massive)}. What there is: in layer {peak['layer']} the most "
        f"attended token, most often {_written(peak['token'])}, receives {peak['received']:.3f} over all heads, "
        f"{peak['received'] / peak['null']:.1f} times its null."
    )


def _conclusion(heads: Sequence[int], massive: Sequence[int]) -> str:
    """One sentence: whether sinks grew."""
    if heads and massive:
        return "Sinks grew, and with massive activations."
    if heads:
        return "Attention sinks grew, without massive activations."
    if massive:
        return "Massive activations grew, but no token collects attention."
    return "No sink grew: none found by either published criterion."


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(str(layer) for layer in layers) if layers else "none found"

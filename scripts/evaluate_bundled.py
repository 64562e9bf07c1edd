"""Measure the stored bundled model and write its model card.

    python scripts/evaluate_bundled.py

Writes `measurements.json` and `README.md` into the model's folder. Every number in the card is
measured here, on test scenes, with the stored weights, or read from `training.json`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from bundled_model.card import write_card
from bundled_model.packing import patch_truth, pixels_of
from bundled_model.recipe import IMAGE_SIZE, PATCH_SIZE
from bundled_model.scoring import Pair, answer, one_question_per_task, prompt, right_by_task
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from sinkscope.bundled import TASKS, TEST_SEEDS, Scene, bundled_path, draw_scene

MIN_QUERIES = 8  # a key that fewer queries can see has no stable received attention


@dataclass(frozen=True)
class Accuracy:
    """Right answers of one task, and the 95 % Wilson interval of their share."""

    right: int
    asked: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class LayerSinks:
    """One layer of one tower; every number is a mean over prompts.

    `received` is the attention that the most attended token receives, averaged over heads and over
    the queries that can see it; `null` is that number under uniform attention. The most attended
    token is the one with the largest quotient of the two. `head_received` is the same for the
    single head and token where `received` is largest. `first` is the attention to the first token
    (BOS or CLS) from later queries. `on_shape` is the share of prompts in which the most attended
    image token lies on a shape, `on_shape_null` the share of patches that do. Ratios: largest to
    median of |activation|, and of token norm.
    """

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


def wilson(right: int, asked: int) -> Accuracy:
    """A share with its 95 % Wilson score interval."""
    z, share = 1.959964, right / asked
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    spread = math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    half = z * spread / (1 + z * z / asked)
    return Accuracy(right, asked, share, middle - half, middle + half)


def accuracies(model: nn.Module, processor: object, pairs: Sequence[Pair]) -> dict[str, Accuracy]:
    """Exact match of greedy answers to single-turn prompts, per task."""
    answers: list[str] = []
    for start in tqdm(range(0, len(pairs), 250), desc="answers"):
        answers += answer(model, processor, pairs[start : start + 250])
    right = right_by_task(pairs, answers)
    return {task: wilson(sum(right[task]), len(right[task])) for task in TASKS}


def keep_output(store: list[Tensor], module: nn.Module, inputs: object, output: object) -> None:
    """A forward hook that appends the block's residual stream, `[batch pos d_model]`."""
    store.append(output[0] if isinstance(output, tuple) else output)


def watch(blocks: Sequence[nn.Module], call: partial) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Run `call`; return what each block wrote, and each attention `[batch head query key]`."""
    states: list[Tensor] = []
    handles = [block.register_forward_hook(partial(keep_output, states)) for block in blocks]
    try:
        with torch.no_grad():
            output = call(output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    return states, output.attentions


def received_and_null(attention: Tensor, causal: bool) -> tuple[Tensor, Tensor, int]:
    """Received attention `[batch head key]`, its null `[key]`, and how many keys are eligible."""
    length = attention.shape[-1]
    uniform = torch.ones(length, length)
    if causal:
        uniform = uniform.tril() / torch.arange(1, length + 1)[:, None]
    else:
        uniform = uniform / length
    seen = (uniform > 0).sum(0)
    return attention.sum(-2) / seen, uniform.sum(0) / seen, int((seen >= MIN_QUERIES).sum())


def layer_rows(
    attention: Tensor,
    state: Tensor,
    names: Sequence[str],
    scenes: Sequence[Scene],
    causal: bool,
) -> list[dict[str, float | str]]:
    """The fields of `LayerSinks` for each prompt of a batch whose prompts share their layout."""
    start = names.index("patch 0,0")
    image = slice(start, start + len(patch_names()))
    received, null, eligible = received_and_null(attention, causal)
    mean = received.mean(1)
    top = (mean / null)[:, :eligible].argmax(-1)
    in_image = mean[:, image].argmax(-1)
    sizes, norms = state.abs(), state.norm(dim=-1)
    spikes, at_spike = sizes.amax(-1).max(-1)
    norm, at_norm = norms.max(-1)
    shapes = torch.stack(
        [torch.from_numpy(patch_truth(scene)["covered"]) for scene in scenes]
    ).double()
    later = attention[:, :, 1:, 0].mean((1, 2))
    later_null = (1 / torch.arange(2, len(names) + 1)).mean() if causal else null[0]
    return [
        {
            "received": mean[row, top[row]].item(),
            "null": null[top[row]].item(),
            "token": names[int(top[row])],
            "head_received": received[row, :, :eligible].max().item(),
            "image_received": mean[row, image][in_image[row]].item(),
            "image_null": null[image][in_image[row]].item(),
            "on_shape": shapes[row, in_image[row]].item(),
            "on_shape_null": shapes[row].mean().item(),
            "first": later[row].item(),
            "first_null": later_null.item(),
            "spike": spikes[row].item(),
            "spike_ratio": (spikes[row] / sizes[row].median()).item(),
            "spike_token": names[int(at_spike[row])],
            "norm_ratio": (norm[row] / norms[row].median()).item(),
            "norm_token": names[int(at_norm[row])],
        }
        for row in range(len(mean))
    ]


def summarise(layer: int, rows: Sequence[dict[str, float | str]]) -> LayerSinks:
    """Means over prompts; for tokens, the most frequent one."""
    fields: dict[str, float | str] = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        common, times = Counter(values).most_common(1)[0]
        fields[name] = common if isinstance(first, str) else sum(values) / len(values)
        if name == "token":
            fields["token_share"] = times / len(values)
    return LayerSinks(layer=layer, **fields)


def patch_names() -> list[str]:
    """Names of the image tokens in reading order, rows and columns counted from 0."""
    side = IMAGE_SIZE // PATCH_SIZE
    return [f"patch {row},{column}" for row in range(side) for column in range(side)]


def vision_sinks(model: nn.Module, pairs: Sequence[Pair]) -> list[LayerSinks]:
    """The tower, block by block; each scene counts once."""
    scenes = list({scene.seed: scene for scene, _ in pairs}.values())
    tower, names = model.model.vision_tower, ["CLS", *patch_names()]
    states, attentions = watch(tower.encoder.layers, partial(tower, pixels_of(scenes)))
    return [
        summarise(layer, layer_rows(attention, state, names, scenes, causal=False))
        for layer, (attention, state) in enumerate(zip(attentions, states, strict=True))
    ]


def language_sinks(model: nn.Module, processor: object, pairs: Sequence[Pair]) -> list[LayerSinks]:
    """The decoder, block by block, over prompts of every task."""
    rows: dict[int, list[dict[str, float | str]]] = {}
    for task in TASKS:
        asked = [(scene, question) for scene, question in pairs if question.task == task]
        texts = [prompt(processor, question.text) for _, question in asked]
        scenes = [scene for scene, _ in asked]
        inputs = processor(
            images=[scene.image for scene in scenes], text=texts, return_tensors="pt"
        )
        tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        first = tokens.index("<image>")
        names = [f"{token} ({place})" for place, token in enumerate(tokens)]
        names[first : first + len(patch_names())] = patch_names()
        blocks = model.model.language_model.layers
        states, attentions = watch(blocks, partial(model, **inputs, use_cache=False))
        for layer, (attention, state) in enumerate(zip(attentions, states, strict=True)):
            found = layer_rows(attention, state, names, scenes, causal=True)
            rows.setdefault(layer, []).extend(found)
    return [summarise(layer, found) for layer, found in rows.items()]


def main() -> None:
    """Measure, then write the numbers and the card."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=bundled_path(), help="the stored model")
    parser.add_argument("--scenes", type=int, default=600, help="test scenes for accuracies")
    parser.add_argument("--sink-scenes", type=int, default=100, help="test scenes for sinks")
    arguments = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(
        arguments.model, attn_implementation="eager"
    ).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    seeds = TEST_SEEDS[: arguments.scenes]
    pairs = [pair for seed in seeds for pair in one_question_per_task(draw_scene(seed))]
    some = pairs[: arguments.sink_scenes * len(TASKS)]
    found = {task: asdict(value) for task, value in accuracies(model, processor, pairs).items()}
    measurements = {
        "scenes": arguments.scenes,
        "sink_scenes": arguments.sink_scenes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "accuracy": found,
        "vision": [asdict(layer) for layer in vision_sinks(model, some)],
        "language": [asdict(layer) for layer in language_sinks(model, processor, some)],
    }
    text = json.dumps(measurements, indent=2) + "\n"
    (arguments.model / "measurements.json").write_text(text)
    write_card(arguments.model)
    print((arguments.model / "README.md").read_text())


if __name__ == "__main__":
    main()

"""What reuse saves in a sweep: time against one full forward pass per layer, pair and question.

One run compares, on a random LLaVA with the proportions of LLaVA-1.5 (32 thin decoder layers, a
vision tower of 24, 576 image tokens), and for one and for eight questions per image,

* the plain loop: one full forward pass of ``transformers`` per layer, pair and question, the keys
  scaled by a wrapper around the block's RoPE, log-probabilities of the answer read at its end;
* `ss.sweep` with the same layers and pairs, everything included: preparing the inputs, finding
  V-sinks, its check of itself, statistics-ready table.

The plain loop is timed on randomly drawn cells and layers, in rounds; its whole time is the mean over
cells times their number, plus the base. It is given the V-sinks for free. The bound is the ratio of
multiplications of both (see `sinkscope.experiments.sweep_grid`), in which matrices of all shapes are
equally fast. Nothing is downloaded: the model is built from its config.

``--device cuda --dtype bfloat16`` runs both on a GPU; a clock is read when the device has done its work.

    python benchmarks/sweep_reuse.py
    python benchmarks/sweep_reuse.py --layers 6 --questions 1 2 --rounds 2 --plain-cells 3 --no-write
    python benchmarks/sweep_reuse.py --device cuda --dtype bfloat16 --width 4096 --head-dim 128 \
        --vision-width 1024 --no-write
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
import transformers.models.llama.modeling_llama as llama
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for what the benchmarks share

import sinkscope as ss
from benchmarks.placing import add_place, built_on, clock_of, device_of, dtype_of, machine_name
from sinkscope.data.answers import answer_ids
from sinkscope.experiments.sweep_grid import Cells, Shape, Work, check_layers, shape_of
from sinkscope.experiments.sweep_images import v_sinks
from sinkscope.files import version_of
from sinkscope.testing import random_image
from sinkscope.testing.processors import llava_processor

PATCH, SIDE = 14, 336
REACH = 0.85
"""The share of the bound that one question per image is to reach."""
AT_EIGHT = 5.0
"""How many times faster eight questions per image are to be."""
DETECTOR = ss.detectors.Norm("3sigma")
WORDS = (
    "what colour is the large circle to the left of the small blue square in the picture ?",
    "how many red shapes are there ?",
    "is there a green triangle above the yellow star ? answer yes or no .",
    "which object is the biggest one in the scene ?",
    "describe what is at the top right in one word .",
    "what shape is the object in the middle of the lowest row ?",
    "how many squares are not blue ?",
    "is the background black , grey , white or brown ?",
)
ANSWERS = ("red", "3", "yes", "square", "nothing", "circle", "0", "white")


def build(options: argparse.Namespace) -> tuple[ss.LVLM, Any]:
    """A random LLaVA (MLP of 2.7 times the width), and a twin that nnsight never saw."""
    layers, width, vision_layers = options.layers, options.width, options.vision_layers
    vision_width, heads = options.vision_width, options.width // options.head_dim
    processor = llava_processor("clip", SIDE, PATCH)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_width,
            intermediate_size=4 * vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_width // 32,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(processor.tokenizer),
            hidden_size=width,
            intermediate_size=round(2.7 * width),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=4096,
            initializer_range=0.05,
        ),
        image_token_index=processor.image_token_id,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with built_on(device_of(options)):
        model = LlavaForConditionalGeneration(config).eval().to(dtype_of(options))
    return ss.LVLM(copy.deepcopy(model), processor), model


def dataset(images: int, questions: int) -> list[dict[str, Any]]:
    return [
        {"image": picture(i), "question": WORDS[q], "answer": ANSWERS[q], "image_id": i}
        for i in range(images)
        for q in range(questions)
    ]


def picture(seed: int) -> Image.Image:
    return random_image(SIDE, SIDE, seed)


class Plain:
    """The loop that one writes first, with an edit that owes nothing to sinkscope."""

    def __init__(self, lvlm: ss.LVLM, twin: Any, item: dict[str, Any]) -> None:
        self.twin = twin
        sample = lvlm.prepare(images=item["image"], text=item["question"])
        self.answer = list(answer_ids(lvlm.tokenizer, sample.texts[0], item["answer"]))
        fed = torch.tensor([self.answer[:-1]], dtype=torch.long)
        ids = torch.cat([sample.inputs["input_ids"], fed], dim=1)
        self.inputs = {**sample.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        pixels = self.inputs["pixel_values"].to(twin.dtype)
        self.inputs = {
            k: v.to(twin.device) for k, v in (self.inputs | {"pixel_values": pixels}).items()
        }
        self.blocks = lvlm.anatomy.language.n_layers
        self.visual = self.inputs["input_ids"][0] == lvlm.anatomy.image_token_id
        found = v_sinks(lvlm, sample, DETECTOR, "max").to(twin.device)
        self.sinks = torch.nn.functional.pad(found, (0, len(ids[0]) - len(found)))

    @torch.no_grad()
    def __call__(self, block: int | None, pair: tuple[float, ...]) -> tuple[float, Tensor]:
        """Log-probability of the answer and the logits that decide it."""
        factors = torch.where(self.visual, pair[1], 1.0)
        factors = torch.where(self.sinks, pair[0], factors)[None, None, :, None]
        rotate, calls = llama.apply_rotary_pos_emb, []

        def scaled(q: Tensor, k: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
            q, k = rotate(q, k, *rest, **named)
            calls.append(None)
            return q, (k * factors).to(k.dtype) if len(calls) - 1 == block else k

        llama.apply_rotary_pos_emb = scaled
        try:
            keep = len(self.answer)
            logits = self.twin(**self.inputs, use_cache=False, logits_to_keep=keep).logits[0]
        finally:
            llama.apply_rotary_pos_emb = rotate
        if len(calls) != self.blocks:
            raise RuntimeError(f"RoPE was called {len(calls)} times; expected once per block")
        logs = logits.float().log_softmax(-1)
        at = torch.tensor(self.answer, device=logs.device)[:, None]
        return float(logs.gather(1, at).sum()), logits


def machine(device: torch.device) -> dict[str, Any]:
    names = ("sinkscope", "torch", "transformers", "nnsight")
    return {
        "cpu": machine_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in names},
    }


def quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def measure(
    lvlm: ss.LVLM, twin: Any, questions: int, options: argparse.Namespace, clock: Callable
) -> dict:
    """Rounds of sweep and plain loop in turn; a ratio is formed within each round."""
    drawn = random.Random(questions)
    grid = ss.lsg_grid()
    layers = check_layers(None, lvlm.anatomy.language.n_layers)
    cells = Cells(layers, tuple(grid))
    runs = questions * len(layers) * len(grid)
    rounds, worst = [], 0.0
    for number in tqdm(range(options.rounds), desc=f"{questions} per image"):
        items = dataset(number + 1, questions)[-questions:]
        plain = [Plain(lvlm, twin, item) for item in items]
        start = clock()
        made = ss.sweep(lvlm, items, v_detector=DETECTOR, progress=False, batch=options.batch)
        ours = clock() - start
        seconds = []
        for _ in range(options.plain_cells):
            question, layer = drawn.randrange(questions), drawn.choice(layers)
            place = drawn.randrange(len(grid))
            start = clock()
            value, _ = plain[question](layer + 1, grid[place])
            seconds.append(clock() - start)
            table = made.table
            line = table[(table["item"] == question) & (table["layer"] == layer)]
            worst = max(worst, abs(float(line["logprob"].iloc[place]) - value))
        loop = statistics.mean(seconds) * (runs + questions)
        rounds.append({"plain": loop, "sweep": ours, "ratio": loop / ours})
    shape = shape_of(lvlm, [ss.experiments.Item(**item) for item in items])
    work = Work.of(lvlm)
    ratios = [one["ratio"] for one in rounds]
    return {
        "questions": questions,
        "cells": runs,
        "tokens": [shape.stem, list(shape.tails)],
        "v_sinks": int(made.table["n_v"].iloc[0]),
        "bound": work.plain(shape, cells) / work.reused(shape, cells),
        "ratio": statistics.median(ratios),
        "quartiles": quartiles(ratios),
        "plain": statistics.median(one["plain"] for one in rounds),
        "sweep": statistics.median(one["sweep"] for one in rounds),
        "rounds": rounds,
        "largest difference of log-probabilities": worst,
    }


def logits_differ(lvlm: ss.LVLM, twin: Any, cells: int) -> float:
    """The largest difference of logits, replayed against the plain loop, over random cells."""
    from sinkscope.data.batches import extend
    from sinkscope.models.decoder import decoder_inputs
    from sinkscope.models.prefix import capture_branches, resume_stem, resume_tails
    from sinkscope.models.replay import logits_at

    drawn = random.Random(1)
    items = dataset(1, len(WORDS))
    plain = [Plain(lvlm, twin, item) for item in items]
    givens, features = [], None
    with torch.no_grad():
        for one, item in zip(plain, items, strict=True):
            sample = lvlm.prepare(images=item["image"], text=item["question"])
            fed = extend(sample.inputs, one.answer[:-1])
            given, features = decoder_inputs(lvlm, fed, features)
            givens.append(given)
        end = int(plain[0].visual.nonzero().max()) + 1
        visual = plain[0].visual.cpu()
        seen = capture_branches(lvlm, givens, end)
        worst = 0.0
        for _ in range(cells):
            block = drawn.randrange(lvlm.anatomy.language.n_layers)
            pair = drawn.choice(ss.lsg_grid())
            question = drawn.randrange(len(items))
            factors = torch.where(visual, pair[1], 1.0)
            factors = torch.where(plain[0].sinks.cpu(), pair[0], factors)[None, :end]
            past = resume_stem(seen, block, factors)
            row = torch.tensor([question])
            hidden = resume_tails(seen, block, factors, past, torch.tensor([0]), row)
            _, expected = plain[question](block, pair)
            stop = givens[question]["inputs_embeds"].shape[1] - end
            got = logits_at(seen.tails, hidden)[0, stop - len(expected) : stop]
            worst = max(worst, float((got - expected).abs().max()))
    return worst


def paper_bound(layers: int = 32, pairs: int = 11, tokens: int = 616) -> float:
    """The bound for LLaVA-1.5-7B: 576 image tokens and 40 of text, one question per image."""
    language = 4 * 4096**2 + 3 * 4096 * 11008
    vision = 4 * 1024**2 + 2 * 1024 * 4096
    work = Work((vision,) * 24, (language,) * layers, (1024, 4096))
    shape = Shape((577,), tokens - 40, (40,))
    cells = Cells(tuple(range(-1, layers - 1)), tuple(ss.lsg_grid(pairs)))
    return work.plain(shape, cells) / work.reused(shape, cells)


def table(report: dict[str, Any]) -> str:
    m, model = report["machine"], report["model"]
    lines = [
        f"{report['date']}; {m['cpu']}, {m['threads']} of {m['cores']} cores, {report['clock']}, load "
        f"{m['load']} at the start; "
        + ", ".join(f"{name} {v}" for name, v in m["versions"].items())
        + f". LLaVA with {model['layers']} decoder layers of width {model['width']}, {model['vision_layers']} "
        f"vision blocks of width {model['vision_width']}, {model['dtype']}, SDPA; {model['layers']} layers x "
        f"{report['pairs']} pairs and the base, medians of {report['rounds']} images.",
        "",
        "| questions per image | passes of the plain loop | plain loop | sweep | times faster (quartiles) | bound | of the bound |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["results"]:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['questions']} | {row['cells'] + row['questions']} | {row['plain']:.1f} s | "
            f"{row['sweep']:.1f} s | **{row['ratio']:.2f}** ({low:.2f}–{high:.2f}) | {row['bound']:.2f} | "
            f"{row['ratio'] / row['bound']:.0%} |"
        )
    logs = max(row["largest difference of log-probabilities"] for row in report["results"])
    lines += [
        "",
        f"Largest difference to the plain loop: logits {report['logits']:.1e}, log-probabilities of answers "
        f"{logs:.1e}. The bound for LLaVA-1.5-7B (32 layers, 576 image tokens and 40 of text, one "
        f"question): {report['paper_bound']:.2f}.",
    ]
    return "\n".join(lines) + "\n"


def misses(report: dict[str, Any]) -> list[str]:
    out = []
    for row in report["results"]:
        if row["questions"] == 1 and row["ratio"] < REACH * row["bound"]:
            out.append(f"one question: {row['ratio']:.2f} < {REACH} x {row['bound']:.2f}")
        if row["questions"] == 8 and row["ratio"] < AT_EIGHT:
            out.append(f"eight questions: {row['ratio']:.2f} < {AT_EIGHT}")
    if report["logits"] > 1e-4 and report["model"]["dtype"] == "fp32":
        out.append(f"logits differ by {report['logits']:.1e}")
    return out


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    text = (__doc__ or "").split("\n\n    python")[0]
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layers", type=int, default=32, help="decoder layers")
    add("--width", type=int, default=128, help="of the decoder")
    add("--head-dim", type=int, default=32, help="of the decoder's heads")
    add("--vision-layers", type=int, default=24, help="vision blocks")
    add("--vision-width", type=int, default=64, help="of the vision tower")
    add("--questions", type=int, nargs="+", default=[1, 8], help="per image, at most 8")
    add("--rounds", type=int, default=3, help="images per number of questions")
    add("--plain-cells", type=int, default=24, help="passes of the plain loop timed per image")
    add("--batch", type=lambda x: x if x == "auto" else int(x), default="auto")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--cpu-time", action="store_true", help="count CPU seconds on one thread, not seconds")
    add_place(parser)
    add("--no-write", action="store_true", help="print the table only")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    device = device_of(options)
    facts = machine(device)
    size = (options.layers, options.width, options.vision_layers, options.vision_width)
    lvlm, twin = build(options)
    clock = clock_of(device, options.cpu_time)
    Plain(lvlm, twin, dataset(1, 1)[0])(0, (0.5, 0.5))  # warm, as the sweep below
    ss.sweep(lvlm, dataset(1, 1), layers="embed", grid=[(0.5, 0.5)], v_detector=DETECTOR)
    names = ("layers", "width", "vision_layers", "vision_width")
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": facts,
        "clock": "CPU seconds" if clock is time.process_time else "seconds",
        "model": dict(zip(names, size, strict=True))
        | {"dtype": options.dtype.replace("float", "fp")},
        "pairs": len(ss.lsg_grid()),
        "rounds": options.rounds,
        "results": [measure(lvlm, twin, n, options, clock) for n in options.questions],
        "logits": logits_differ(lvlm, twin, 12),
        "paper_bound": paper_bound(),
    }
    print(table(report))
    missed = misses(report)
    print("Aims missed: " + "; ".join(missed) if missed else "The sweep meets its aims.")
    if not options.no_write:
        options.out.mkdir(parents=True, exist_ok=True)
        body = json.dumps(report, indent=1) + "\n"
        (options.out / "sweep_reuse.json").write_text(body, encoding="utf-8")
        (options.out / "sweep_reuse.md").write_text(table(report), encoding="utf-8")
        print(f"Written: {options.out / 'sweep_reuse.md'}, and its numbers beside it.")


if __name__ == "__main__":
    main()

"""What training gates costs, against a loop written by hand and against training them one by one.

On a random LLaVA with LLaMA's and CLIP's proportions, in one process and in rounds of random order:

* **by hand**: transformers' own forward with labels, one forward hook that reads the end of the prompt,
  one on the vision tower that finds the V-sinks, and one on ``k_proj`` that scales the keys (there is no
  k-norm, and scaling commutes with RoPE); then ``backward`` and AdamW. Nothing below the gate has a graph;
* **train_lsg** on the same batch, one gate: the steps of its own loop;
* **train_lsg** with a gate at every layer at once, and the sum of its steps for each gate alone.

Batches are ready in memory on all sides. Ratios are formed within each round; medians and quartiles are
reported, in seconds that the processor spent on one thread, because the machine may be shared. The loss
and the gradients of both sides are compared first. Nothing is downloaded. ``--device cuda --dtype bfloat16``
runs all of it on a GPU, in seconds of the wall that are read when the device has done its work.

    python benchmarks/gate_training.py
    python benchmarks/gate_training.py --layers 6 --rounds 3 --no-write
    python benchmarks/gate_training.py --device cuda --dtype bfloat16 --layers 32 --heads 32 --no-write
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for what the benchmarks share

import sinkscope as ss
from benchmarks.placing import add_place, built_on, clock_of, device_of, dtype_of, machine_name
from sinkscope.data.batches import IGNORED, AnswerBatch
from sinkscope.lsg.passes import answer_losses, frozen, share
from sinkscope.lsg.train import cost_of
from sinkscope.training import TrainingSettings
from sinkscope.training.loop import Loop, Trainee

PATCHES = 24 * 24  # one 336 x 336 image, as in LLaVA-1.5
IMAGE_TOKEN = 1
HEAD_DIM = 64
ANSWER = 4
AIMS = {"per gate": 1.15, "together": 1.3}
LR = 1e-4


def build(options: argparse.Namespace) -> LlavaForConditionalGeneration:
    """A random LLaVA: MLP 2.7 and vocabulary 8 times the width, a tower of 5 % of the decoder's work."""
    layers, heads = options.layers, options.heads
    width = heads * HEAD_DIM
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width // 2,
            intermediate_size=2 * width,
            num_hidden_layers=max(2, layers // 4),
            num_attention_heads=heads // 2,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=8 * width,
            hidden_size=width,
            intermediate_size=round(width * 2.6875),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=2048,
        ),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        architectures=["LlavaForConditionalGeneration"],
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with built_on(device_of(options)):
        model = LlavaForConditionalGeneration(config).eval().to(dtype_of(options))
    return model.requires_grad_(False)


def make_batch(lvlm: ss.LVLM, rows: int, tokens: int) -> AnswerBatch:
    """Rows of one image and random text, of which the last tokens are the answer."""
    made = torch.Generator().manual_seed(0)
    vocab = lvlm.module.config.text_config.vocab_size
    ids = torch.randint(2, vocab, (rows, tokens), generator=made)
    ids[:, 1 : 1 + PATCHES] = IMAGE_TOKEN
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 3, 336, 336, generator=made),
    }
    labels = torch.full_like(ids, IGNORED)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    found = lvlm.prepare(inputs=inputs).tokens
    tokens_ = replace(found, live=found.live & (labels == IGNORED))
    return AnswerBatch(inputs, labels, tokens_, tuple(range(rows)))


class ByHand:
    """One gate, trained with forward hooks on the plain model."""

    def __init__(self, module: Any, gate: ss.LSG, tau: float) -> None:
        self.module, self.tau, self.layer = module, tau, gate.config.layer
        width = gate.config.d_model
        self.gate = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 2), nn.Softmax(-1)
        ).to(module.device)
        for mine, theirs in zip(self.gate.parameters(), gate.parameters(), strict=True):
            mine.data.copy_(theirs)
        self.optimizer = torch.optim.AdamW(self.gate.parameters(), lr=LR)

    def loss(self, batch: AnswerBatch) -> Tensor:
        device = self.module.device
        given = {k: v.to(device) for k, v in batch.inputs.items()}
        given["pixel_values"] = given["pixel_values"].to(self.module.dtype)
        ids, end = given["input_ids"], batch.labels.shape[1] - ANSWER - 1
        found: dict[str, Tensor] = {}

        def sinks(part: Any, args: Any, out: Any) -> None:
            states = out[0] if isinstance(out, tuple) else out
            found["v"] = states[:, 1:].norm(dim=-1) >= self.tau  # without CLS

        def read(part: Any, args: Any, out: Any) -> None:
            states = out[0] if isinstance(out, tuple) else out
            found["rho"] = self.gate(states[:, end].float())

        def scale(part: Any, args: Any, out: Tensor) -> Tensor:
            rho, factors = found["rho"], torch.ones(ids.shape, device=device)
            image = torch.where(found["v"], rho[:, :1], rho[:, 1:])
            factors = torch.cat([factors[:, :1], image, factors[:, 1 + PATCHES :]], dim=1)
            return (out * factors[..., None]).to(out.dtype)

        decoder = self.module.model.language_model.layers
        tower = self.module.model.vision_tower.encoder.layers
        with ExitStack() as stack:
            for part, hook in (
                (tower[-2], sinks),
                (decoder[self.layer], read),
                (decoder[self.layer + 1].self_attn.k_proj, scale),
            ):
                stack.callback(part.register_forward_hook(hook).remove)
            return self.module(**given, labels=batch.labels.to(device), use_cache=False).loss

    def step(self, batch: AnswerBatch) -> None:
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        nn.utils.clip_grad_norm_(self.gate.parameters(), 1.0)
        self.optimizer.step()


class Ready:
    """The objective of `train_lsg` on one batch that is ready in memory."""

    def __init__(self, lvlm: ss.LVLM, gates: dict[str, ss.LSG], batch: AnswerBatch) -> None:
        self.lvlm, self.gates, self.batch = lvlm, gates, batch
        self.blocks = [gate.config.edited for gate in gates.values()]

    def share(self, rows: Any, then: Any = ()) -> Any:
        return share(self.lvlm, self.batch, self.blocks)

    def losses(self, shared: Any, name: str) -> Any:
        return answer_losses([self.gates[name]], shared)


def ours(lvlm: ss.LVLM, gates: list[ss.LSG], batch: AnswerBatch) -> Callable[[], None]:
    """One step of the loop of `train_lsg`."""
    by_name = {str(gate.layer): copy.deepcopy(gate) for gate in gates}
    trainees = [Trainee(name, dict(gate.named_parameters())) for name, gate in by_name.items()]
    settings = TrainingSettings(epochs=10_000, batch=len(batch.rows), lr=LR, schedule="constant")
    loop = Loop(trainees, Ready(lvlm, by_name, batch), batch.rows, [], settings, progress=False)
    bar = tqdm(disable=True)
    return lambda: loop._one_step(bar)


def agreement(lvlm: ss.LVLM, gate: ss.LSG, batch: AnswerBatch, tau: float) -> dict[str, float]:
    """The largest differences of loss and gradients between both sides."""
    mine, theirs = copy.deepcopy(gate), ByHand(lvlm.module, gate, tau)
    loss = theirs.loss(batch)
    loss.backward()
    got = answer_losses([mine], share(lvlm, batch, [gate.config.edited]))
    (got.total / got.tokens).backward()
    grads = zip(mine.parameters(), theirs.gate.parameters(), strict=True)
    return {
        "loss": abs(float(got.total.detach()) / got.tokens - float(loss.detach())),
        "gradient": max(float((a.grad - b.grad).abs().max()) for a, b in grads),
        "largest gradient": max(float(p.grad.abs().max()) for p in mine.parameters()),
    }


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    lvlm = ss.LVLM(build(options))
    clock = clock_of(lvlm.device, cpu_seconds=True)
    batch = make_batch(lvlm, options.rows, options.tokens)
    tau = middle_norm(lvlm, batch)
    rule = ss.detectors.Norm(tau)
    layers = list(range(options.layers - 1))
    gates = [ss.LSG.for_model(lvlm, layer, v_detector=rule) for layer in layers]
    for gate in gates:
        with torch.no_grad():  # coefficients that differ, as after some training
            drawn = torch.Generator().manual_seed(1)
            gate.outer.weight.copy_(0.1 * torch.randn(gate.outer.weight.shape, generator=drawn))
    some = sorted({0, len(layers) // 3, len(layers) - 1})
    variants: dict[str, Callable[[], None]] = {}
    for layer in some:
        hand = ByHand(lvlm.module, gates[layer], tau)
        variants[f"hand {layer}"] = lambda hand=hand: hand.step(batch)
    for layer in layers:
        variants[f"alone {layer}"] = ours(lvlm, [gates[layer]], batch)
    variants["together"] = ours(lvlm, gates, batch)
    close = agreement(lvlm, gates[some[1]], batch, tau)
    with frozen(lvlm.module):
        seconds = rounds_of(variants, options.rounds, clock)
    rounds = range(options.rounds)
    apart = [sum(seconds[f"alone {layer}"][i] for layer in layers) for i in rounds]
    ratios = {
        f"per gate, layer {layer}": [
            seconds[f"alone {layer}"][i] / seconds[f"hand {layer}"][i] for i in rounds
        ]
        for layer in some
    }
    ratios["all layers at once"] = [apart[i] / seconds["together"][i] for i in rounds]
    edited = [gate.config.edited for gate in gates]
    tower = lvlm.anatomy.vision.n_layers
    cost = cost_of(
        TrainingSettings(batch=options.rows), edited, options.rows, 0, tower, options.layers
    )
    return {
        "machine": machine(lvlm.device),
        "shape": {
            "decoder layers": options.layers,
            "width": options.heads * HEAD_DIM,
            "vision layers": tower,
            "rows": options.rows,
            "tokens": options.tokens,
            "answer tokens": ANSWER,
            "parameters": sum(p.numel() for p in lvlm.module.parameters()),
            "dtype": options.dtype,
        },
        "agreement": close,
        "bound": cost.to_dict(),
        "aims": AIMS,
        "rounds": options.rounds,
        "seconds": {
            **{name: summary(values) for name, values in seconds.items()},
            "apart": summary(apart),
        },
        "ratios": {name: summary(values) for name, values in ratios.items()},
    }


def middle_norm(lvlm: ss.LVLM, batch: AnswerBatch) -> float:
    """A threshold that a fifth of the patches exceed."""
    seen = share(lvlm, batch, [0]).vision
    norms = next(iter(seen.values()))[:, 1:].norm(dim=-1).flatten().sort().values
    return float(norms[len(norms) * 4 // 5 :][:2].mean())


def rounds_of(
    variants: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every variant in every round; the first pass of each is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with tqdm(total=(rounds + 1) * len(variants), unit="step") as bar:
        for number in range(-1, rounds):
            order = list(variants)
            random.Random(number).shuffle(order)
            for name in order:
                gc.collect()
                start = clock()
                variants[name]()
                if number >= 0:
                    seconds[name].append(clock() - start)
                bar.update()
    return seconds


def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on; nothing that names the machine."""
    clock = clock_of(device, cpu_seconds=True)
    return {
        "cpu": machine_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "CPU seconds" if clock is time.process_time else "seconds",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    shape, m, bound = report["shape"], report["machine"], report["bound"]
    lines = [
        f"{m['cpu']}, {m['threads']} of {m['cores']} cores, {m['clock']}, torch "
        f"{m['versions']['torch']}; {report['rounds']} rounds. LLaVA with {shape['decoder layers']} "
        f"decoder blocks of width {shape['width']} and {shape['vision layers']} vision blocks, "
        f"{shape['rows']} × {shape['tokens']} tokens, {shape['dtype'].replace('float', 'fp')}. Quartiles in parentheses.",
        "",
        "| what | by hand | `train_lsg` | ratio | aim |",
        "|---|---:|---:|---:|---:|",
    ]
    seconds = report["seconds"]
    for name, ratio in report["ratios"].items():
        cell = f"**{ratio['median']:.2f}** ({ratio['low']:.2f}–{ratio['high']:.2f})"
        if name.startswith("per gate"):
            layer = name.rsplit(" ", 1)[1]
            hand, own = seconds[f"hand {layer}"]["median"], seconds[f"alone {layer}"]["median"]
            aim = f"≤ {AIMS['per gate']}"
            lines.append(
                f"| one gate, layer {layer} | {hand:.3f} s | {own:.3f} s | {cell} | {aim} |"
            )
    together, apart = seconds["together"]["median"], seconds["apart"]["median"]
    lines += [
        "",
        "| what | one by one | at once | times cheaper | bound | aim |",
        "|---|---:|---:|---:|---:|---:|",
        f"| {len(bound['gate_blocks'])} gates, `train_lsg` | {apart:.2f} s | {together:.2f} s | {cell} | "
        f"{bound['bound']:.2f} | ≥ {AIMS['together']} |",
        "",
        f"The bound counts decoder blocks: {bound['apart']} passes one by one, {bound['together']} at "
        f"once, of which {bound['plain_blocks']} without gradient. Loss and gradients of both sides "
        f"differ by at most {report['agreement']['loss']:.0e} and {report['agreement']['gradient']:.0e} "
        f"(largest gradient {report['agreement']['largest gradient']:.0e}).",
    ]
    return "\n".join(lines) + "\n"


def misses(report: dict[str, Any]) -> list[str]:
    """Where an aim is missed."""
    out = []
    for name, ratio in report["ratios"].items():
        if name.startswith("per gate") and ratio["median"] > AIMS["per gate"]:
            out.append(f"{name}: {ratio['median']:.2f} > {AIMS['per gate']}")
    if report["ratios"]["all layers at once"]["median"] < AIMS["together"]:
        out.append(f"all layers at once: below {AIMS['together']}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16, help="decoder blocks (16)")
    parser.add_argument("--heads", type=int, default=4, help="heads of 64 (4)")
    parser.add_argument("--rows", type=int, default=1, help="rows per batch (1)")
    parser.add_argument("--tokens", type=int, default=PATCHES + 64, help="tokens per row (640)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (9)")
    add_place(parser)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    report = benchmark(options)
    print(table(report))
    for line in misses(report):
        print("Missed:", line)
    if not options.no_write:
        folder = Path(__file__).parent / "results"
        text = json.dumps(report, indent=1) + "\n"
        (folder / "gate_training.json").write_text(text, encoding="utf-8")
        (folder / "gate_training.md").write_text(table(report), encoding="utf-8")


if __name__ == "__main__":
    main()

"""What watching costs on one GPU, at the size of LLaVA-1.5-7B, in under three minutes.

The model has the shape of LLaVA-1.5-7B and random weights in bf16; nothing is downloaded. At 640, 2048 and
8192 tokens every round runs, in random order:

* the plain forward pass of ``transformers`` (SDPA), on a twin that sinkscope never saw;
* a run without probes: through nnsight, and by hooks where the version has both;
* `AttentionMass` of three groups at every layer, of all queries and of the last;
* `ReceivedAttention` and `MassiveActivations` at every layer;
* `MaskKeys` on the first token in every layer, with and without effects, and `ScaleKeys` in one layer;
* eager attention with ``output_attentions=True``, reduced to the same groups, up to 2048 tokens.

Then come 32 decoded tokens, and `trace_sinks` at 32,768 tokens. Ratios are formed within a round. Peak memory
is what a line takes over the weights. What the budget ends is named in the table, and results are written after
every block.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --profile
    python -m benchmarks.gpu --small --out /dev/shm/rehearsal.json    # a rehearsal on the CPU
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging as transformers_logging

import sinkscope as ss
from benchmarks.probe_overhead import machine
from benchmarks.timing import Line, table, time_rounds, verdict, write
from benchmarks.watched import BOUND, Shape, Step, answers, bounded, passes, twin

GROUPS = {"first": "first", "image": "image", "text": "text"}
DTYPE = torch.bfloat16
NEW_TOKENS = 32
FREE = 26 * 2**30  # what the longest prompt takes over the weights, in bytes
AIMS = {  # ratios to the plain pass, at 640, 2048 and 8192 tokens
    "AttentionMass, all queries": (1.25, 1.20, 1.25),
    "AttentionMass, last query": (1.15, 1.05, 1.05),
    "ReceivedAttention": (1.3, 1.4, 1.8),
    "MassiveActivations": (1.2, 1.15, 1.15),
    "MaskKeys in all layers": (1.35, 1.25, 1.25),
}
PROFILED = ("plain", "AttentionMass, all queries")
LATER_AIMS = {
    "AttentionMass at every step": 1.5,
    "MaskKeys at every step": 1.6,
    "trace_sinks": 3.0,
}


SMALL = Shape(2, 64, 2, 128, 512, 2, 32, 2, 56)


@dataclass(frozen=True)
class Block:
    """Lines that are compared: how long the prompt is, and until which share of the budget they may run."""

    name: str
    tokens: int
    images: int
    rounds: int
    until: float


BLOCKS = (
    Block("640 tokens", 640, 1, 40, 0.28),
    Block("2048 tokens", 2048, 1, 15, 0.40),
    Block("8192 tokens", 8192, 2, 9, 0.58),
    Block("decoding", 640, 1, 5, 0.86),
    Block("32,768 tokens", 32768, 4, 3, 0.97),
)


class Model:
    """A model that sinkscope holds, and twins of it with the same weights."""

    def __init__(self, shape: Shape, device: str) -> None:
        module = shape.build(device, DTYPE)
        self.shape, self.device = shape, device
        self.plain, self.eager, self.lvlm = (
            twin(module, "sdpa"),
            twin(module, "eager"),
            ss.LVLM(module),
        )
        self.twice = bounded(module)
        self.weights = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))

    def lines(self, block: Block) -> list[Line]:
        inputs = self.shape.inputs(block.tokens, block.images, self.plain)
        sample = self.lvlm.prepare(inputs=inputs)
        steps: dict[str, Step] = {"plain": partial(last_logits, self.plain, inputs)}
        if block.name == "decoding":
            how: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
            steps = {"plain": partial(self.plain.generate, **inputs, **how)}
            steps |= answers(self.lvlm, sample, GROUPS, "first", **how)
        elif block.name == BLOCKS[-1].name:
            rules = ss.detectors.Norm(1e4), ss.detectors.Massive()
            steps["trace_sinks"] = partial(ss.trace_sinks, self.lvlm, sample, *rules)
        else:
            steps[BOUND] = partial(last_logits, self.twice, inputs)
            steps |= passes(self.lvlm, sample, GROUPS, "first", logits="last")
            if block.tokens <= 2048:
                steps["eager, output_attentions"] = partial(eager, self.eager, inputs, sample)
        return [Line(label, step, aim_of(label, block)) for label, step in steps.items()]

    def measure(self, run: Callable[[], object]) -> tuple[float, int]:
        """Seconds of one call to its last kernel, and peak bytes over the weights."""
        cuda = self.device == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            answer = run()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        del answer
        return seconds, torch.cuda.max_memory_allocated() - self.weights if cuda else 0


def aim_of(label: str, block: Block) -> float | None:
    place = [known.name for known in BLOCKS].index(block.name)
    return AIMS[label][place] if label in AIMS else LATER_AIMS.get(label)


def last_logits(module: Any, inputs: dict[str, Tensor]) -> Tensor:
    return module(**inputs).logits[:, -1].float().cpu()


def eager(module: Any, inputs: dict[str, Tensor], sample: ss.models.Sample) -> Tensor:
    """What a user writes without sinkscope."""
    chosen = torch.stack([sample.tokens.select(s) for s in GROUPS.values()], dim=-1)[:, None]
    weights = module(**inputs, output_attentions=True).attentions
    groups = chosen.to(weights[0])
    return torch.stack([layer @ groups for layer in weights], dim=1).float().cpu()


def profiled(model: Model, run: Callable[[], object]) -> dict[str, float]:
    """Where one pass spends its time; on a CPU, operations stand in for kernels."""
    cuda = model.device == "cuda"
    wall = statistics.median(model.measure(run)[0] for _ in range(5))
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with profile(activities=kinds):
        model.measure(run)  # this one starts the profiler
    with profile(activities=kinds) as seen:
        model.measure(run)
    found = seen.key_averages()
    on_cpu = [e for e in found if e.device_type == DeviceType.CPU]
    if cuda:
        kernels = [e for e in found if e.device_type == DeviceType.CUDA]
        times = [(e.key.lower(), e.self_device_time_total) for e in kernels]
    else:
        kernels = [e for e in on_cpu if e.key.startswith("aten::")]
        times = [(e.key.lower(), e.self_cpu_time_total) for e in kernels]

    def counted(pattern: str) -> list[Any]:
        return [e for e in on_cpu if re.match(pattern, e.key)]

    attention = sum(t for key, t in times if re.search("flash|fmha|attention", key))
    busy, launches = sum(t for _, t in times), counted("cu(da)?Launch")
    return {
        "time, ms": wall * 1e3,
        "kernels, ms": busy / 1e3,
        "of attention, ms": attention / 1e3,
        "device idle, ms": max(0.0, wall * 1e3 - busy / 1e3),
        "kernels": sum(e.count for e in kernels),
        "CPU time of launches, ms": sum(e.self_cpu_time_total for e in launches) / 1e3,
        "synchronisations": sum(e.count for e in counted(r"cuda\w*Synchronize")),
        "copies to the CPU": sum(e.count for e in found if "Memcpy DtoH" in e.key),
    }


def profile_lines(found: dict[str, dict[str, float]]) -> list[str]:
    """The plain pass and the probed one side by side; what is ours is their difference."""
    plain, probed = (found[label] for label in PROFILED)
    lines = ["| one pass at 640 tokens | plain | AttentionMass | ours | share |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for name, whole in probed.items():
        ours = whole - plain[name]
        share = f"{ours / whole:.0%}" if whole else ""
        lines.append(f"| {name} | {plain[name]:.4g} | {whole:.4g} | {ours:.4g} | {share} |")
    return lines


def text_of(report: dict[str, Any]) -> str:
    m = report["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items() if v)
    lines = [
        f"{report['date']}; {m['device']}, {m['cpu']}, {m['cores']} cores; {versions}. LLaVA with a decoder of "
        f"{report['model']['layers']} layers, width {report['model']['width']}, random weights in "
        f"{report['dtype']} ({report['weights'] / 2**30:.1f} GiB), SDPA, batch 1. Peak memory is over the weights."
    ]
    for name, block in report["blocks"].items():
        rows = block["rows"]
        lines += ["", f"**{name}**" + (f": {block['skipped']}" if not rows else "")]
        lines += ["", *table(rows, memory=True)] if rows else []
    lines += ["", *profile_lines(report["profile"])] if "profile" in report else []
    return "\n".join([*lines, "", report["verdict"], ""])


def why_not(model: Model, block: Block, latest: float) -> str:
    """Why a block is left out, or ""."""
    if time.monotonic() > latest:
        return "skipped, no time is left"
    if model.device == "cuda" and block.tokens > 10_000:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < FREE:
            return f"skipped, {free / 2**30:.0f} GiB are free and {FREE / 2**30:.0f} are needed"
    return ""


def facts_of(model: Model, budget: float) -> dict[str, Any]:
    facts = machine()
    gpu = model.device == "cuda"
    facts["device"] = (
        torch.cuda.get_device_name() if gpu else "a rehearsal on the CPU at a tenth of the tokens"
    )
    facts["versions"] = {"sinkscope": ss.__version__, **facts["versions"]}
    report = {"date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
    report |= {"machine": facts, "model": asdict(model.shape), "dtype": str(DTYPE)[6:]}
    return report | {"weights": model.weights, "budget": budget, "blocks": {}}


def benchmark(options: argparse.Namespace) -> None:
    start = time.monotonic()
    model = Model(*((SMALL, "cpu") if options.small else (Shape(), "cuda")))
    report = facts_of(model, options.budget)
    slug = re.sub(r"[^a-z0-9]+", "-", report["machine"]["device"].lower()).strip("-")
    path = options.out or Path(__file__).parent / "results" / f"gpu-{slug}.json"
    for block in BLOCKS:
        if options.small:
            block = replace(block, tokens=block.tokens // 10, rounds=2)
        until, rows = start + block.until * options.budget, []
        reason = why_not(model, block, until - 0.05 * options.budget)
        if not reason:
            lines, how = (
                model.lines(block),
                {"warm": block.tokens < 10_000, "strict": options.small},
            )
            rows = time_rounds(lines, block.rounds, model.measure, until, **how)
            if options.profile and block.name == BLOCKS[0].name:
                steps = {line.label: partial(profiled, model, line.run) for line in lines}
                report["profile"] = {label: steps[label]() for label in PROFILED}
        rows = [{"block": block.name, **row} for row in rows]
        report["blocks"][block.name] = {"rows": rows, "skipped": reason, "prompt": asdict(block)}
        every = [row for done in report["blocks"].values() for row in done["rows"]]
        report |= {"verdict": verdict(every), "seconds": round(time.monotonic() - start, 1)}
        write(report, text_of(report), path)
        print(f"{report['seconds']:.0f} s: {block.name}", flush=True)
    print(f"\n{text_of(report)}\nWritten: {path}, and its table beside it.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--budget", type=float, help="seconds for everything (default: 170; 35 with --small)")
    add("--small", action="store_true", help="tiny sizes on the CPU, to rehearse the script")
    add("--profile", action="store_true", help="also profile AttentionMass at 640 tokens")
    add("--out", type=Path, help="the JSON file (default: benchmarks/results/gpu-<machine>.json)")
    options = parser.parse_args(arguments)
    if not (options.small or torch.cuda.is_available()):
        raise SystemExit("No CUDA device was found. Write --small for a rehearsal on the CPU.")
    options.budget = options.budget or (35.0 if options.small else 170.0)
    torch.set_num_threads(1 if options.small else torch.get_num_threads())
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    benchmark(options)


if __name__ == "__main__":
    main()

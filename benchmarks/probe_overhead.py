"""What watching costs: time and peak memory of probes, as ratios to the plain forward pass.

One run compares, on a small random LLaVA and at several prompt lengths,

* the plain forward pass of ``transformers`` (SDPA), which knows nothing of sinkscope;
* the same through `LVLM.run` without a probe, by hooks and through nnsight;
* `AttentionMass` of four groups at every layer, with its null;
* `ReceivedAttention` at every layer, with its null;
* `MaskKeys` on the first token in every layer, with its effects;
* eager attention with ``output_attentions=True``, reduced to the same four groups;
* TransformerLens' cache of attention patterns, reduced to the same, where it is installed.

Times are taken in one process, in rounds that visit all variants in random order; a ratio is formed
within each round, and the median over the rounds is reported. On a machine that is busy, write
``--cpu-time``: it counts the seconds that the processor spent, on one thread. Peak memory is taken in
a fresh process per variant and length. Nothing is downloaded: the model is built from its config.

    python benchmarks/probe_overhead.py
    python benchmarks/probe_overhead.py --tokens 640 --layers 2 --rounds 3 --no-memory --no-write
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

import sinkscope as ss

PATCHES = 24 * 24  # one 336 x 336 image, as in LLaVA-1.5
IMAGE_TOKEN = 1
HEAD_DIM = 64
GROUPS = {"first": "first", "image": "image", "first image": "image:0", "text": "text"}
LIMITS = {"time": {640: 1.15, 4096: 1.6}, "memory": 1.25}  # what AttentionMass aims at

Step = Callable[[ss.models.Sample], "Tensor | None"]


@dataclass(frozen=True)
class Decoder:
    """The size of the language model; the vision tower is cheap and always the same.

    Few heads and a small vocabulary make the plain pass cheap, and so the ratios high: with the
    width of the model its matrices grow with the square, and attention with the first power.
    """

    layers: int = 8
    heads: int = 8
    kv_heads: int = 8
    mlp: float = 4.0  # width of the gated MLP over that of the model, as in Llama 3.2 1B
    vocab: int = 2048

    def build(self) -> LlavaForConditionalGeneration:
        """A random LLaVA with a CLIP tower, in eval mode, with SDPA attention."""
        width = self.heads * HEAD_DIM
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=336,
                patch_size=14,
            ),
            text_config=LlamaConfig(
                vocab_size=self.vocab,
                hidden_size=width,
                intermediate_size=round(width * self.mlp),
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                max_position_embeddings=16384,
            ),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=PATCHES,
            architectures=["LlavaForConditionalGeneration"],
        )
        config._attn_implementation = "sdpa"
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval()

    def inputs(self, tokens: int) -> dict[str, Tensor]:
        """A prompt of ``tokens`` tokens with as many whole images as fit beside 16 words or more."""
        images = (tokens - 16) // PATCHES
        if images < 1:
            raise SystemExit(f"--tokens {tokens}: write {PATCHES + 16} or more, for one image.")
        made = torch.Generator().manual_seed(tokens)
        ids = torch.randint(2, self.vocab, (1, tokens), generator=made)
        ids[:, 1 : 1 + images * PATCHES] = IMAGE_TOKEN
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(images, 3, 336, 336, generator=made),
        }


@dataclass(frozen=True)
class Variant:
    """One way to run the model: its name in the table and how to prepare it."""

    label: str
    prepare: Callable[[LlavaForConditionalGeneration], Step]
    kernel: str = "sdpa"


def prepare_plain(module: LlavaForConditionalGeneration) -> Step:
    @torch.no_grad()
    def step(sample: ss.models.Sample) -> None:
        _ = module(**sample.inputs).logits

    return step


def prepare_trace(module: LlavaForConditionalGeneration) -> Step:
    lvlm = ss.LVLM(module)

    def step(sample: ss.models.Sample) -> None:
        lvlm.run(sample, engine="nnsight")

    return step


def prepare_hooks(module: LlavaForConditionalGeneration) -> Step:
    lvlm = ss.LVLM(module)

    def step(sample: ss.models.Sample) -> None:
        lvlm.run(sample)

    return step


def prepare_mask(module: LlavaForConditionalGeneration) -> Step:
    lvlm = ss.LVLM(module)

    def step(sample: ss.models.Sample) -> None:
        lvlm.run(sample, interventions=[ss.MaskKeys("first", layers=None)])

    return step


def prepare_mass(module: LlavaForConditionalGeneration) -> Step:
    lvlm = ss.LVLM(module)

    def step(sample: ss.models.Sample) -> Tensor:
        probe = ss.AttentionMass(GROUPS)
        return lvlm.run(sample, probes=[probe])[probe].mass

    return step


def prepare_received(module: LlavaForConditionalGeneration) -> Step:
    lvlm = ss.LVLM(module)

    def step(sample: ss.models.Sample) -> None:
        lvlm.run(sample, probes=[ss.ReceivedAttention()])

    return step


def prepare_eager(module: LlavaForConditionalGeneration) -> Step:
    @torch.no_grad()
    def step(sample: ss.models.Sample) -> Tensor:
        groups = one_hot(sample)
        out = module(**sample.inputs, output_attentions=True)
        return torch.stack([weights @ groups for weights in out.attentions], dim=1)

    return step


def prepare_transformer_lens(module: LlavaForConditionalGeneration) -> Step:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = type(module).__name__
    bridge = build_bridge_from_module(module, architecture, hf_config=module.config)
    names = [
        f"blocks.{i}.attn.hook_pattern" for i in range(module.config.text_config.num_hidden_layers)
    ]

    @torch.no_grad()
    def step(sample: ss.models.Sample) -> Tensor:
        groups = one_hot(sample)
        inputs = dict(sample.inputs)
        ids = inputs.pop("input_ids")
        _, cache = bridge.run_with_cache(ids, names_filter=names, **inputs)
        return torch.stack([cache[name] @ groups for name in names], dim=1)

    return step


def one_hot(sample: ss.models.Sample) -> Tensor:
    """The groups as columns, ``[batch 1 key group]``."""
    masks = [sample.tokens.select(selection) for selection in GROUPS.values()]
    return torch.stack(masks, dim=-1).float()[:, None]


VARIANTS = {
    "plain": Variant("plain forward", prepare_plain),
    "hooks": Variant("no probe", prepare_hooks),
    "trace": Variant("no probe, through nnsight", prepare_trace),
    "mass": Variant("`AttentionMass`, all layers", prepare_mass),
    "received": Variant("`ReceivedAttention`, all layers", prepare_received),
    "mask": Variant("`MaskKeys` on the first token, all layers", prepare_mask),
    "eager": Variant("eager, `output_attentions=True`", prepare_eager, "eager"),
    "transformer_lens": Variant("TransformerLens cache", prepare_transformer_lens, "eager"),
}


def prepare(name: str, decoder: Decoder) -> Step:
    """One variant on a model of its own, so that none leaves a trace on another."""
    module = decoder.build()
    step = VARIANTS[name].prepare(module)
    module.set_attn_implementation(VARIANTS[name].kernel)
    return step


def prepare_all(names: list[str], decoder: Decoder) -> tuple[dict[str, Step], dict[str, str]]:
    """All variants that load, and why the others do not."""
    steps, missing = {}, {}
    for name in names:
        if name == "transformer_lens" and importlib.util.find_spec(name) is None:
            missing[name] = "not installed"
            continue
        try:
            steps[name] = prepare(name, decoder)
        except Exception as error:  # another library's failure to load is a result
            if name != "transformer_lens":
                raise
            missing[name] = f"does not load: {type(error).__name__}: {error}"[:300]
    return steps, missing


def time_rounds(
    steps: dict[str, Step],
    sample: ss.models.Sample,
    rounds: int,
    clock: Callable[[], float],
    tick: Callable[[str], None],
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every variant in every round, and how far its masses are from eager's."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    masses: dict[str, Tensor] = {}
    for name, step in steps.items():  # the first pass of each is not timed
        answer = step(sample)
        if answer is not None:
            masses[name] = answer
        tick(name)
    for number in range(rounds):
        order = list(steps)
        random.Random(number).shuffle(order)
        for name in order:
            gc.collect()
            start = clock()
            answer = steps[name](sample)
            seconds[name].append(clock() - start)
            del answer
            tick(name)
    reference = masses.get("eager")
    if reference is None:
        return seconds, {}
    return seconds, {
        name: float((mass - reference).abs().max())
        for name, mass in masses.items()
        if name != "eager"
    }


def time_one_call(tokens: int, clock: Callable[[], float], rounds: int = 9) -> dict[str, float]:
    """Seconds of one causal SDPA call on one-hot values, padded to the head dimension or not."""
    query, key = torch.randn(2, 1, 8, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    values = {width: torch.zeros(1, 8, tokens, width) for width in (HEAD_DIM, len(GROUPS))}
    for value in values.values():
        value[..., 0] = 1.0
    seconds: dict[int, list[float]] = {width: [] for width in values}
    with torch.no_grad():
        for number in range(rounds + 1):
            for width, value in values.items():
                start = clock()
                torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
                if number:
                    seconds[width].append(clock() - start)
    padded, narrow = (statistics.median(seconds[width]) for width in values)
    return {"tokens": tokens, "padded": padded, "unpadded": narrow, "ratio": narrow / padded}


class PeakMemory:
    """The process's peak resident memory between entry and exit, in bytes."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.before = resident("VmRSS")
        self._stop = threading.Event()
        self._sampled = self.before
        self._thread = None
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the old peak
        except OSError:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self._sampled = max(self._sampled, resident("VmRSS"))

    def __exit__(self, *error: object) -> None:
        if self._thread is None:
            self.peak = resident("VmHWM")
        else:
            self._stop.set()
            self._thread.join()
            self.peak = self._sampled


def resident(field: str) -> int:
    """Resident memory now (``VmRSS``) or at its peak (``VmHWM``), in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import psutil

        return psutil.Process().memory_info().rss
    return int(re.findall(rf"{field}:\s+(\d+) kB", status)[0]) * 1024


def measure_memory(name: str, tokens: int, decoder: Decoder) -> dict[str, float]:
    """In this process: the peak of one pass, whole and above what the model takes, in MiB."""
    step = prepare(name, decoder)
    reader = ss.LVLM(decoder.build())
    short, sample = (reader.prepare(inputs=decoder.inputs(n)) for n in (PATCHES + 16, tokens))
    del reader
    step(short)  # imports, compiled sources and thread pools are not the pass's memory
    with PeakMemory() as memory:
        answer = step(sample)
    del answer
    return {"peak": memory.peak / 2**20, "extra": (memory.peak - memory.before) / 2**20}


def memory_in_fresh_process(
    name: str, tokens: int, options: argparse.Namespace
) -> dict[str, float]:
    """`measure_memory` in a process of its own, where freed tensors go back to the system at once."""
    command = [sys.executable, __file__, "--measure-memory", name, "--tokens", str(tokens)]
    for option in ("layers", "heads", "kv_heads", "mlp", "threads"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    # Without these, glibc keeps freed tensors and the peak depends on what came before.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"The memory of {name} could not be measured:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """What the numbers depend on; nothing that names the machine."""
    names = ("torch", "transformers", "nnsight", "transformer-lens")
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.findall(r"model name\s*:\s*(.+)", info.read_text())
        cpu = found[0].strip() if found else cpu
    return {
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def load() -> float | None:
    """How many processes wanted the processor during the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def summarise(
    seconds: dict[str, list[float]], memory: dict[str, dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """Medians, and ratios to the plain forward pass of the same round."""
    out: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        ratios = [value / plain for value, plain in zip(values, seconds["plain"], strict=True)]
        row: dict[str, Any] = {
            "seconds": statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": quartiles(ratios),
            "all_seconds": [round(value, 5) for value in values],
        }
        if name in memory:
            row["memory"] = memory[name] | {
                "ratio": memory[name]["peak"] / memory["plain"]["peak"],
                "extra_ratio": memory[name]["extra"] / memory["plain"]["extra"],
            }
        out[name] = row
    return out


def quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    m, model = report["machine"], report["model"]
    lines = [
        f"{report['date']}; {m['cpu']} ({m['instructions']}), {m['threads']} of "
        f"{m['cores']} cores, {report['clock']}, load {m['load before timing']} before timing; "
        + ", ".join(f"{name} {v}" for name, v in m["versions"].items() if v)
        + f". LLaVA with a decoder of {model['layers']} layers, {model['heads']} heads of {HEAD_DIM}"
        f" ({model['kv_heads']} key-value heads), a gated MLP of {model['mlp']:g} times the width, fp32, SDPA, batch 1.",
        "",
        "| tokens | variant | time | × plain (quartiles) | pass memory | × plain | process peak | × plain |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for tokens, rows in report["results"].items():
        for name, variant in VARIANTS.items():
            if name in report["missing"]:
                lines.append(
                    f"| {tokens} | {variant.label} | {report['missing'][name]} | | | | | |"
                )
            elif name in rows:
                lines.append(line_of(tokens, variant.label, rows[name]))
    lines += ["", *remarks(report)]
    return "\n".join(lines) + "\n"


def line_of(tokens: str, label: str, row: dict[str, Any]) -> str:
    low, high = row["ratio_quartiles"]
    cells = [
        tokens,
        label,
        f"{row['seconds']:.3f} s",
        f"**{row['ratio']:.2f}** ({low:.2f}–{high:.2f})",
    ]
    if "memory" in row:
        m = row["memory"]
        cells += [f"{m['extra']:.0f} MiB", f"**{m['extra_ratio']:.2f}**"]
        cells += [f"{m['peak']:.0f} MiB", f"{m['ratio']:.2f}"]
    else:
        cells += [""] * 4
    return f"| {' | '.join(cells)} |"


def remarks(report: dict[str, Any]) -> Iterator[str]:
    call = report["one_call"]
    yield (
        f"One attention call on one-hot values, {call['tokens']} tokens, 8 heads of {HEAD_DIM}: "
        f"{call['padded']:.3f} s padded to the head dimension, {call['unpadded']:.3f} s unpadded "
        f"({call['ratio']:.1f} ×)."
    )
    differences = [v for by_name in report["agreement"].values() for v in by_name.values()]
    if differences:
        worst = max(differences)
        yield ""
        yield f"Largest difference of any group mass from eager's, over all lengths: {worst:.1e}."


def misses(report: dict[str, Any]) -> list[str]:
    """Where `AttentionMass` costs more than it should."""
    out = []
    for tokens, rows in report["results"].items():
        row = rows.get("mass")
        limit = LIMITS["time"].get(int(tokens))
        if row and limit and row["ratio"] > limit:
            out.append(f"time at {tokens} tokens: {row['ratio']:.2f} > {limit}")
        extra = row["memory"]["extra_ratio"] if row and "memory" in row else 0.0
        if extra > LIMITS["memory"]:
            out.append(f"memory at {tokens} tokens: {extra:.2f} > {LIMITS['memory']}")
    return out


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    with tqdm(total=total, unit="pass", smoothing=0.1) as bar:

        def tick(what: str) -> None:
            bar.set_description(what)
            bar.update()

        yield tick


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Everything the command line asks for, as one report."""
    decoder = decoder_of(options)
    facts = machine()
    steps, missing = prepare_all(options.variants, decoder)
    reader = ss.LVLM(decoder.build())
    rounds = {n: options.rounds or max(5, min(15, 12000 // n)) for n in options.tokens}
    passes = sum((rounds[n] + 1) * len(steps) for n in options.tokens)
    passes += 0 if options.no_memory else len(steps) * len(options.tokens)
    clock = time.process_time if options.cpu_time else time.perf_counter
    memory: dict[int, dict[str, dict[str, float]]] = {}
    seconds, agreement = {}, {}
    with progress(passes) as tick:
        for n in options.tokens:
            memory[n] = {}
            for name in () if options.no_memory else steps:
                memory[n][name] = memory_in_fresh_process(name, n, options)
                tick(f"{n} tokens, memory: {name}")
        facts["load before timing"] = load()
        for n in options.tokens:
            sample = reader.prepare(inputs=decoder.inputs(n))

            def at_length(name: str, n: int = n) -> None:
                tick(f"{n} tokens: {name}")

            timed = time_rounds(steps, sample, rounds[n], clock, at_length)
            seconds[n], agreement[str(n)] = timed
        call = time_one_call(2048, clock)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": facts,
        "model": asdict(decoder) | {"head_dim": HEAD_DIM, "dtype": "float32"},
        "groups": list(GROUPS),
        "missing": missing,
        "clock": "CPU seconds" if options.cpu_time else "seconds",
        "results": {str(n): summarise(seconds[n], memory[n]) for n in options.tokens},
        "agreement": agreement,
        "one_call": call,
    }


def decoder_of(options: argparse.Namespace) -> Decoder:
    return Decoder(options.layers, options.heads, options.kv_heads, options.mlp)


def write(report: dict[str, Any], folder: Path, word: str = "") -> Path:
    """The report as JSON under its date and processor, and its table for the documentation."""
    name = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", "", report["machine"]["cpu"])
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    word = f"-{word}" if word else ""
    path = folder / f"{report['date']}-{slug}-{report['machine']['cores']}-cores{word}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / f"table{word}.md").write_text(table(report), encoding="utf-8")
    return path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    text = (__doc__ or "").split("\n\n    python")[0]
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[640, 2048, 4096], help="prompt lengths")
    add("--rounds", type=int, default=0, help="timed rounds per length (default: 5 to 15)")
    add("--layers", type=int, default=8, help="decoder layers (default: 8)")
    add("--heads", type=int, default=8, help=f"query heads of {HEAD_DIM} (default: 8)")
    add("--kv-heads", type=int, default=8, help="key-value heads (default: 8; fewer is GQA)")
    add("--mlp", type=float, default=4.0, help="MLP width over model width (default: 4)")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME",
        help=f"some of {', '.join(VARIANTS)}; plain is always there")  # fmt: skip
    add("--cpu-time", action="store_true", help="count CPU seconds on one thread, not seconds")
    add("--no-memory", action="store_true", help="leave the memory out")
    add("--no-write", action="store_true", help="print the table only")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="where results go")
    add(
        "--word", default="", help="a word for the file names, for another decoder than the default"
    )
    add("--measure-memory", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.variants = [v for v in VARIANTS if v == "plain" or v in options.variants]
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    if options.measure_memory:
        measured = measure_memory(options.measure_memory, options.tokens[0], decoder_of(options))
        print(json.dumps(measured))
        return
    report = benchmark(options)
    print(table(report))
    missed = misses(report)
    print("Aims missed: " + "; ".join(missed) if missed else "AttentionMass meets its aims.")
    if not options.no_write:
        print(f"Written: {write(report, options.out, options.word)}, and its table beside it.")


if __name__ == "__main__":
    main()

"""How exact edits of attention are, beside the rounding of the same model without an edit.

The reference is written out in fp64 by `tests.interventions.reference`: explicit logits, masks, softmax
and products on a twin of the model. Three things are measured, in fp32, bf16 and fp16:

* one attention call with a key that outweighs all others by a logit gap of 10, 20 or 95: the largest
  absolute error, on values of size about 1;
* one pass of tiny random models of every family;
* a cached answer of 16 tokens of the same models, against one full pass over prompt and answer. In half
  precision that includes what a full pass and a cached one differ by anyway.

The last two are shares of the largest logit, and the largest over all models and edits is printed.

    python -m benchmarks.edit_precision
"""

# ruff: noqa: TID251  (edits are measured against the reference of the tests)

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import sinkscope as ss
from sinkscope.testing import random_image
from tests.interventions import test_gaps as call
from tests.interventions.cases import LANGUAGE
from tests.interventions.conftest import Case, build, make_case
from tests.interventions.reference import grown_inputs, reference_run
from tests.interventions.test_exact import off
from tests.interventions.test_generation import FAMILIES, PERSISTENT, STEPS, generate
from tests.interventions.test_untouched import THRESHOLDS, half

OUT = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def one_call(kernel: str, dtype: torch.dtype) -> dict[str, float]:
    """Largest error of one call, unedited and over gaps and edits of the dominant key."""
    plain = edited = 0.0
    for gap in call.GAPS:
        tensors, scaling = call.planted(gap, dtype)
        made = call.call_of(kernel, tensors, scaling)
        got = made[0](*made[1], **made[2])[0]
        plain = max(plain, _error(got, call.explicit(tensors, scaling)))
        for how, factor in (("mask", 0.0), ("scale", 0.25), ("scale", -0.5), ("weight", 0.5)):
            got = call.edited(made, how=how, factor=factor)
            edited = max(edited, _error(got, _wanted(tensors, scaling, how, factor)))
    return {"plain": plain, "edited": edited}


def _error(got: Tensor, want: Tensor) -> float:
    return (got.double() - want).abs().max().item()


def _wanted(tensors: list[Tensor], scaling: float, how: str, factor: float) -> Tensor:
    """The formula of one edit."""
    sink = call.column(call.SINKS)
    if how == "mask":
        return call.explicit(tensors, scaling, lambda x: x.masked_fill(sink, -call.INF))
    if how == "scale":
        return call.explicit(tensors, scaling, lambda x: torch.where(sink, factor * x, x))
    return call.explicit(tensors, scaling, weigh=call.halves)


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """A padded batch of two rows with three images for a tiny model of every family."""
    for name, kernel in FAMILIES:
        lvlm = ss.LVLM(*build(name, kernel, dtype))
        sample = lvlm.prepare(
            images=[
                random_image(96, 120, 0),
                [random_image(70, 64, 1), random_image(120, 60, 2)],
            ],
            text=["what is it", "how many red shapes are in the two pictures ?"],
        )
        yield f"{name}, {kernel}", make_case(lvlm, build(name, "eager", dtype)[0], sample)


def one_pass(c: Case, edits: list[Any], changes: list[Any], dtype: torch.dtype) -> float:
    """How far the logits of one pass are from the reference's."""
    answer = reference_run(c, changes, inputs=half(c.sample.inputs, dtype))
    run = c.lvlm.run(c.sample, interventions=edits)
    return off(run.logits[c.live], answer.logits[c.live])


def cached(c: Case, edits: list[Any], changes: list[Any], dtype: torch.dtype) -> float:
    """How far the logits of an answer are from those of one full pass of the reference."""
    out = generate(c, edits)
    inputs = half(grown_inputs(c.sample, out.sequences, STEPS - 1), dtype)
    want = reference_run(c, changes, inputs=inputs).logits[:, c.live.shape[1] - 1 :]
    return off(torch.cat([run.logits for run in out.steps], dim=1), want)


def of_models(dtype: torch.dtype, bar: tqdm) -> dict[str, list[dict[str, Any]]]:
    """Both measures for every model: unedited, and under every edit."""
    # Rounding moves rows across the thresholds of the image-centric rule.
    names = [n for n in LANGUAGE if n != THRESHOLDS or dtype == torch.float32]
    measures: dict[str, tuple[Callable[..., float], list[str]]] = {
        "one pass": (one_pass, names),
        "cached answer": (cached, [n for n in names if n in PERSISTENT]),
    }
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in measures}
    for model, c in cases(dtype):
        for measure, (error, edits) in measures.items():
            row = {"model": model, "plain": error(c, [], [], dtype), "edited": {}}
            for name in edits:
                pair = LANGUAGE[name]
                row["edited"][name] = error(c, [pair.edit(c)], [pair.change(c)], dtype)
                bar.update()
            rows[measure].append(row)
    return rows


def machine() -> dict[str, Any]:
    """What the numbers depend on; nothing that names the machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sinkscope": ss.__version__,
        },
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown; every cell is the largest of its kind."""
    m = report["machine"]
    lines = [
        f"{m['cpu']}, {m['threads']} thread, torch {m['versions']['torch']}, transformers "
        f"{m['versions']['transformers']}: {report['seconds']:.0f} CPU seconds. One call: absolute error on "
        f"values of size about 1, over gaps of 10, 20 and 95. The others: shares of the largest logit, the largest "
        f"of {len(FAMILIES)} tiny models under {len(LANGUAGE)} edits (one pass) and {len(PERSISTENT)} (an answer of "
        f"{STEPS} tokens). *Times* is the largest quotient of the two in one model.",
        "",
        "| what | dtype | unedited | edited | times |",
        "|---|---|---:|---:|---:|",
    ]
    for row in report["calls"]:
        lines.append(
            _line(f"one call, {row['kernel']}", row["dtype"], [row["plain"]], [row["edited"]])
        )
    for measure in ("one pass", "cached answer"):
        for dtype, measures in report["models"].items():
            rows = measures[measure]
            edited = [max(row["edited"].values()) for row in rows]
            lines.append(_line(measure, dtype, [row["plain"] for row in rows], edited))
    return "\n".join(lines) + "\n"


def _line(what: str, dtype: str, plain: list[float], edited: list[float]) -> str:
    times = max(e / p for p, e in zip(plain, edited, strict=True))
    return f"| {what} | {dtype} | {max(plain):.1e} | {max(edited):.1e} | {times:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="where to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    calls = [
        {"kernel": kernel, "dtype": name, **one_call(kernel, dtype)}
        for kernel in call.KERNELS
        for name, dtype in DTYPES.items()
    ]
    half_only = 2 * (1 + (THRESHOLDS in PERSISTENT))  # that half precision leaves out
    total = len(FAMILIES) * (len(DTYPES) * (len(LANGUAGE) + len(PERSISTENT)) - half_only)
    with tqdm(total=total, unit="edit") as bar:
        models = {name: of_models(dtype, bar) for name, dtype in DTYPES.items()}
    report = {
        "machine": machine(),
        "seconds": round(time.process_time() - started, 1),
        "calls": calls,
        "models": models,
    }
    text = table(report)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "edit_precision.md").write_text(text)
    (args.out / "edit_precision.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

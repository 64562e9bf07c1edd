"""What watching costs in Python: a deep decoder so small that nothing but Python takes time.

On a GPU a short pass waits for Python, which starts kernels one by one. A decoder of 32 layers and 32
channels shows the same on one core of a CPU. Every round runs all lines once, in random order; ratios of
CPU seconds to the plain pass of ``transformers`` are formed within the round.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --profile            # also where the time of one pass goes
    python -m benchmarks.overhead --rounds 3 --no-write
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import os
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from transformers.utils import logging as transformers_logging

import sinkscope as ss
from benchmarks.probe_overhead import load, machine
from benchmarks.timing import Line, table, time_rounds, verdict, write
from benchmarks.watched import BOUND, Shape, Step, answers, bounded, passes, twin

SHAPE = Shape(32, 32, 2, 64, 128, 2, 32, 2, 28)
NEW_TOKENS = 16
GROUPS = {"image": "image", "text": "text"}
AIMS = {
    "AttentionMass, all queries": 1.3,
    "ReceivedAttention": 1.5,
    "MassiveActivations": 1.3,
    "MaskKeys in all layers": 1.5,
    "trace_sinks, rules given": 2.5,
    "AttentionMass at every step": 1.4,
    "MaskKeys at every step": 1.6,
}
OUT = Path(__file__).parent / "results" / "overhead.json"
OURS = Path(ss.__file__).parent
PARTS = {  # how a function's file names whose time it is; the first that fits
    "our kernels": str(OURS / "kernels"),
    "our other Python": str(OURS),
    "nnsight": f"{os.sep}nnsight{os.sep}",
    "transformers": f"{os.sep}transformers{os.sep}",
    "torch": f"{os.sep}torch{os.sep}",
}


def blocks() -> dict[str, list[Line]]:
    """One pass, and a short answer; the plain twin is never seen by sinkscope."""
    module = SHAPE.build("cpu", torch.float32)
    plain, lvlm = twin(module, "sdpa"), ss.LVLM(module)
    inputs = SHAPE.inputs(21, 1, plain)
    sample = lvlm.prepare(inputs=inputs)
    rules = ss.detectors.Norm(100.0), ss.detectors.Massive()
    short: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    one = {"plain": partial(plain, **inputs), BOUND: partial(bounded(plain), **inputs)}
    one |= passes(lvlm, sample, GROUPS, "image")
    one["trace_sinks, rules given"] = partial(ss.trace_sinks, lvlm, sample, *rules)
    many = {"plain": partial(plain.generate, **inputs, **short)}
    many |= answers(lvlm, sample, GROUPS, "image", **short)
    alone = {"plain": one["plain"], **questions(lvlm, sample, one["trace_sinks, rules given"])}
    every = (("one pass", one), ("decoding", many), ("questions of trace_sinks", alone))
    return {
        name: [Line(label, step, AIMS.get(label)) for label, step in steps.items()]
        for name, steps in every
    }


def questions(lvlm: Any, sample: Any, trace: Step) -> dict[str, Step]:
    """Label -> a pass with one of the probes that a trace asks in its one pass."""
    asked, run = [], lvlm.run

    def listen(sample: Any, probes: Any = (), **how: Any) -> Any:
        asked.extend(probes)
        return run(sample, probes, **how)

    lvlm.run = listen
    try:
        trace()
    finally:
        del lvlm.run
    steps = {"no probe": partial(run, sample)}
    for probe in asked:
        where = ", ".join(str(getattr(probe, name, "")) for name in ("tower", "site"))
        steps[f"{type(probe).__name__}, {where}".rstrip(", ")] = partial(run, sample, [probe])
    return steps


def measure(run: Callable[[], object]) -> tuple[float, int]:
    """Seconds that the processor spent."""
    start = time.process_time()
    with torch.no_grad():
        answer = run()
    seconds = time.process_time() - start
    del answer
    return seconds, 0


def time_by_part(run: Callable[[], object], passes: int = 5) -> dict[str, float]:
    """Milliseconds of one pass under cProfile, by whose code calls; a built-in counts for its caller."""
    measure(run)
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(passes):
        measure(run)
    profile.disable()
    spent = dict.fromkeys([*PARTS, "other"], 0.0)

    def add(file: str, seconds: float) -> None:
        part = next((name for name, words in PARTS.items() if words in file), "other")
        spent[part] += seconds * 1e3 / passes

    for entry in profile.getstats():
        if isinstance(entry.code, str):  # a built-in, such as an operation of torch
            continue
        add(entry.code.co_filename, entry.inlinetime)
        for called in entry.calls or ():
            if isinstance(called.code, str):
                add(entry.code.co_filename, called.inlinetime)
    return spent


def profile_lines(profiles: dict[str, dict[str, float]]) -> list[str]:
    """What each probed line takes beyond the plain one, by whose code it is, and as a share of the whole."""
    plain, parts = profiles["plain"], [*PARTS, "other"]
    out = ["", f"| beyond plain | {' | '.join(parts)} | all | share of the line |"]
    out += ["|---" + "|---:" * (len(parts) + 2) + "|"]
    for label in [name for name in profiles if name != "plain"]:
        spent = profiles[label]
        more = {name: spent.get(name, 0.0) - plain.get(name, 0.0) for name in parts}
        cells = [f"{ms:.1f} ms" for ms in (*more.values(), sum(more.values()))]
        share = sum(more.values()) / sum(spent.values())
        out.append(f"| {label} | {' | '.join(cells)} | {share:.0%} |")
    return out


def text_of(report: dict[str, Any]) -> str:
    m = report["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items() if v)
    out = [
        f"{report['date']}; {m['cpu']}, one thread, CPU seconds, load {m['load before timing']} before timing; "
        f"{versions}. A decoder of {SHAPE.layers} layers of {SHAPE.width} channels, 21 tokens; decoding makes {NEW_TOKENS} tokens."
    ]
    for name, rows in report["rows"].items():
        out += ["", f"**{name}**", "", *table(rows, memory=False, unit="CPU time")]
    out += ["", report["verdict"]]
    if "profiles" in report:
        out += ["", "Where the time of one pass goes, under `cProfile`, which makes Python slower:"]
        for profiles in report["profiles"].values():
            out += profile_lines(profiles)
    return "\n".join([*out, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=31, help="rounds of one pass; a quarter of them for decoding")
    add("--profile", action="store_true", help="also say where the time of one pass goes")
    add("--out", type=Path, default=OUT, help="the JSON file; the table lies beside it")
    add("--no-write", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    facts: dict[str, Any] = machine() | {"load before timing": load()}
    facts["versions"] = {"sinkscope": ss.__version__, **facts["versions"]}
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    }
    report |= {"machine": facts, "clock": "CPU seconds", "rows": {}}
    made, until = blocks(), time.monotonic() + 600
    for name, lines in made.items():
        rounds = max(3, options.rounds // 4) if name == "decoding" else options.rounds
        report["rows"][name] = time_rounds(lines, rounds, measure, until, warm=True, strict=True)
    if options.profile:
        report["profiles"] = {
            name: {x.label: time_by_part(x.run) for x in lines if x.label in ("plain", *AIMS)}
            for name, lines in made.items()
            if any(x.label in AIMS for x in lines)
        }
    report["verdict"] = verdict([row for rows in report["rows"].values() for row in rows])
    print(text_of(report))
    if not options.no_write:
        write(report, text_of(report), options.out)
        print(f"Written: {options.out}, and its table beside it.")


if __name__ == "__main__":
    main()

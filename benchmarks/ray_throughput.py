"""How many images per second Ray's workers answer on this machine, against the local engine.

Times `ss.sweep` (and `ss.trace_dataset`, where this version has it) on scenes with the bundled model, one torch
thread everywhere: the local engine, then Ray with one and with two workers of one core. Two times are told: the
whole call, in which Ray starts and workers load their model, and the second half of the parts, which is what
counts in a long run. Rows must be those of the local engine. Rounds are interleaved; medians are
written with all times.

    python benchmarks/ray_throughput.py
    python benchmarks/ray_throughput.py --images 12 --rounds 1 --no-write
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
os.environ["OMP_NUM_THREADS"] = "1"

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for what the benchmarks share

import sinkscope as ss
from benchmarks.placing import machine_name
from sinkscope.experiments.sweep_result import Folder
from sinkscope.files import version_of

RESULTS = Path(__file__).parent / "results"
ENGINES: dict[str, Any] = {"local": "local"}
ENGINES |= {f"ray, {n} worker{'s' * (n > 1)}": ss.scale.Ray(workers=n, cpus=1) for n in (1, 2)}


def sweep(lvlm: ss.LVLM, images: int, engine: Any, out: Path) -> tuple[pd.DataFrame, list[float]]:
    """The table of a sweep, and when each image was written."""
    questions, times, write = list(ss.bundled.scene_questions(images, 2)), [], Folder.write

    def timed(self: Folder, *given: Any) -> None:
        write(self, *given)
        times.append(time.perf_counter())

    Folder.write = timed  # type: ignore[method-assign]
    try:
        rule = ss.detectors.Norm(86.0)
        made: Any = ss.sweep(
            lvlm, questions, v_detector=rule, engine=engine, out=out, progress=False
        )
    finally:
        Folder.write = write  # type: ignore[method-assign]
    return made.table, times


def trace(lvlm: ss.LVLM, images: int, engine: Any, out: Path) -> tuple[pd.DataFrame, list[float]]:
    """The tables of a trace of a data set, and when each part was written."""
    from sinkscope.experiments.dataset_files import Parts

    times, write = [], Parts.write

    def timed(self: Parts, *given: Any) -> Any:
        made = write(self, *given)
        times.append(time.perf_counter())
        return made

    scenes = ss.bundled.scene_questions(8 * images, 1)
    records = ({"image": one["image"], "question": one["question"]} for one in scenes)
    Parts.write = timed  # type: ignore[method-assign]
    try:
        made: Any = ss.trace_dataset(lvlm, records, out, engine=engine, part=8, progress=False)
    finally:
        Parts.write = write  # type: ignore[method-assign]
    return made.images.drop(columns="seconds"), times


def once(
    job: Any, lvlm: ss.LVLM, images: int, engine: Any
) -> tuple[pd.DataFrame, dict[str, float]]:
    """A table, seconds of the whole call, and parts per second of the second half."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        table, times = job(lvlm, images, engine, Path(folder) / "out")
        whole = time.perf_counter() - start
    half = len(times) // 2  # by then every worker is there
    steady = (len(times) - 1 - half) / (times[-1] - times[half])
    return table, {"seconds": whole, "parts_per_second": steady}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-write", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    load, lvlm, rows = os.getloadavg()[0], ss.load_bundled(), []
    jobs: dict[str, Any] = {"sweep": sweep}
    if hasattr(ss, "trace_dataset"):
        jobs["trace_dataset"] = trace
    for name, job in jobs.items():
        found: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
        for _ in range(asked.rounds):
            tables = {}
            for engine, how in ENGINES.items():
                tables[engine], told = once(job, lvlm, asked.images, how)
                found[engine].append(told)
                print(name, engine, told, flush=True)
                pd.testing.assert_frame_equal(tables[engine], tables["local"], atol=1e-6)
        for engine, told in found.items():
            line: dict[str, Any] = {"job": name, "engine": engine, "rounds": told}
            for key in ("seconds", "parts_per_second"):
                line[key] = statistics.median(one[key] for one in told)
            rows.append(line)
    base = {row["job"]: row["parts_per_second"] for row in rows if row["engine"] == "local"}
    versions = ", ".join(f"{x} {version_of(x)}" for x in ("sinkscope", "torch", "ray"))
    head = (
        f"{datetime.date.today()}; {machine_name(torch.device('cpu'))}, {os.cpu_count()} cores, load {load:.2f} at the start; "
        f"{versions}. Bundled model, one thread per process; rounds: {asked.rounds}, of which medians; {asked.images} "
        "parts each. A part is one image with 2 questions (sweep) or 8 images (trace_dataset)."
    )
    text = f"{head}\n\n| job | engine | whole call | parts per second, second half | against local |\n|---|---|---:|---:|---:|\n"
    for row in rows:
        rate = row["parts_per_second"]
        text += f"| {row['job']} | {row['engine']} | {row['seconds']:.1f} s | {rate:.2f} | "
        text += f"{rate / base[row['job']]:.2f} |\n"
    print(text)
    if not asked.no_write:
        (RESULTS / "ray_throughput.md").write_text(text)
        (RESULTS / "ray_throughput.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

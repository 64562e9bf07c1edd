"""Memory and speed of `ss.trace_dataset`, and a run that is killed in the middle and started again.

For the bundled model (drawn scenes, V-sinks by attention of 5 times uniform, for its gap rule finds none) and for the
example model (the same scenes, its own rules): one run from beginning to end in a process of its own, whose
resident memory is read while it works; one that gets SIGKILL at half of its parts and is started again. Both
folders must hold the same lines (all columns but the seconds).

    python benchmarks/trace_dataset.py
    python benchmarks/trace_dataset.py --images 64 0 --no-write

Writes ``results/trace_dataset.json`` and ``.md``, ``.csv`` (resident memory over time) and ``.png``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import pandas as pd
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for what the benchmarks share

import sinkscope as ss
from benchmarks.placing import machine_name
from sinkscope.files import version_of
from sinkscope.viz import theme

RESULTS = Path(__file__).parent / "results"
PART = 16
FIRST_SEED = 11_000_000  # of the scenes that no model was trained on


def scenes(many: int) -> Any:
    """Scenes that are drawn when they are asked for, with one question each."""
    for seed in range(FIRST_SEED, FIRST_SEED + many):
        image = ss.bundled.draw_scene(seed).image
        yield {"image": image, "question": "how many shapes are there?", "image_id": seed}


def work(model: str, many: int, folder: Path) -> None:
    """One run, in the process that calls."""
    warnings.filterwarnings("ignore")
    bundled = model == "bundled"
    lvlm = ss.load_bundled() if bundled else ss.load_example()
    rules: Any = {"v_detector": ss.detectors.Received(times_null=5.0)} if bundled else {}
    ss.trace_dataset(lvlm, scenes(many), folder, part=PART, progress=False, **rules)


def done(folder: Path) -> int:
    """How many parts are there."""
    return len(list(folder.glob("part-*.json")))


def watched(model: str, many: int, folder: Path, stop: int | None = None) -> pd.DataFrame:
    """Run in a process of its own and read its memory; SIGKILL once ``stop`` parts are there."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=(model, many, folder))
    process.start()
    of, begun, lines = psutil.Process(process.pid), time.perf_counter(), []
    while process.is_alive():
        try:
            rss = of.memory_info().rss / 2**20
        except psutil.Error:
            break
        parts = done(folder)
        line = {"model": model, "seconds": round(time.perf_counter() - begun, 2)}
        lines.append(line | {"images": min(many, parts * PART), "rss_mib": round(rss, 1)})
        if stop is not None and parts >= stop:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.5)
    process.join()
    wanted = 0 if stop is None else -signal.SIGKILL
    if process.exitcode != wanted:
        raise SystemExit(f"{model}: ended with {process.exitcode}, expected {wanted}")
    return pd.DataFrame(lines)


def measure(model: str, many: int, folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """Both runs of one model: what is reported, and memory over time."""
    table = watched(model, many, folder / "whole")
    half = -(-many // PART) // 2
    watched(model, many, folder / "killed", half)
    left = len(ss.experiments.DatasetTrace.load(folder / "killed").parts)
    watched(model, many, folder / "killed")
    runs = [ss.experiments.DatasetTrace.load(folder / name) for name in ("whole", "killed")]
    assert all(run.finished for run in runs)
    for name in ("sinks", "images"):
        one, other = (getattr(run, name).drop(columns="seconds", errors="ignore") for run in runs)
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    busy = table[(table["images"] > 0)]
    at = busy[(busy["images"] >= 0.1 * many) & (busy["images"] < many)]
    early, late = (
        at[at["images"] <= at["images"].median()],
        at[at["images"] > at["images"].median()],
    )
    span = busy["seconds"].iloc[-1] - busy["seconds"].iloc[0]
    line = {"model": model, "images": len(runs[0].images), "sinks": len(runs[0].sinks)}
    line |= {"images_per_second": round((many - busy["images"].iloc[0]) / span, 2)}
    line |= {"rss_first_half_mib": round(early["rss_mib"].mean(), 1)}
    line |= {"rss_second_half_mib": round(late["rss_mib"].mean(), 1)}
    line |= {"rss_most_mib": table["rss_mib"].max(), "parts_when_killed": left}
    return line | {"parts": len(runs[0].parts), "killed_and_resumed_is_whole": True}, table


def markdown(body: dict[str, Any]) -> str:
    """The results as a table."""
    names = "images sinks images_per_second rss_first_half_mib rss_second_half_mib rss_most_mib"
    titles = "images|sinks and attended tokens|images per second|memory, first half (MiB)"
    head = f"model|{titles}|memory, second half (MiB)|most memory (MiB)|parts when killed".split(
        "|"
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for line in body["models"]:
        cells = [line["model"], *(str(line[name]) for name in names.split())]
        cells.append(f"{line['parts_when_killed']} of {line['parts']}; resumed: the same lines")
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in body["versions"].items())
    place = (
        f"{body['machine']}, {body['threads']} thread; {versions}; {body['part']} images per part."
    )
    return "\n".join([*lines, "", place, ""])


def draw(table: pd.DataFrame) -> Any:
    """Resident memory over time, a panel per model."""
    models = list(dict.fromkeys(table["model"]))
    figure = theme.new_figure((4.6 * len(models), 3.6))
    for ax, model in zip(theme.panels(figure, len(models), len(models)), models, strict=True):
        part = table[table["model"] == model]
        ax.plot(part["seconds"], part["rss_mib"], color="#0072B2")
        ax.set_ylim(0, 1.25 * part["rss_mib"].max())
        title = f"{model} model, {part['images'].max()} images"
        ax.set_title(title, fontsize=theme.LABEL, loc="left")
        theme.label(ax, "seconds since the process began", "resident memory (MiB)")
        theme.plain(ax)
    return figure


def main() -> None:
    """Measure both models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs=2, default=(2000, 100), metavar="N")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    lines, tables = [], []
    with tempfile.TemporaryDirectory() as folder:
        for model, many in zip(("bundled", "example"), options.images, strict=True):
            if many:
                line, table = measure(model, many, Path(folder) / model)
                print(json.dumps(line), flush=True)
                lines.append(line)
                tables.append(table)
    if options.no_write:
        return
    versions = {name: version_of(name) for name in ("sinkscope", "torch", "transformers")}
    place = {"machine": machine_name(torch.device("cpu")), "threads": options.threads}
    body = {"part": PART, **place, "versions": versions, "models": lines}
    (RESULTS / "trace_dataset.json").write_text(json.dumps(body, indent=1) + "\n")
    (RESULTS / "trace_dataset.md").write_text(markdown(body))
    whole = pd.concat(tables)
    whole.to_csv(RESULTS / "trace_dataset.csv", index=False)
    draw(whole).savefig(RESULTS / "trace_dataset.png", dpi=110)


if __name__ == "__main__":
    main()

"""Study tiny random models of every image-text-to-text type and write the support table of the documentation.

    python scripts/support_table.py                         all types; writes docs/support.md
    python scripts/support_table.py --decoders --towers     and the decoders and towers inside LLaVA
    python scripts/support_table.py qwen3_vl gpt_oss        these only; prints the table
    python scripts/support_table.py qwen3_vl --update       these again, the other rows as they were measured

Each model is built (`tiny_families`) and checked (`sinkscope.testing.check_model`) in a process of its own, with limits of
memory and time. The measurements are kept in benchmarks/results/support.jsonl, one model a line. Three types have towers of
timm, which is no dependency: without `pip install timm` they are not run. The exit status is 1 if a number is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tiny_families.page import page, rank, worst

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "support.jsonl"
WEIGHTS = ROOT / "docs" / "real_weights.json"
PAGE = ROOT / "docs" / "support.md"
MEMORY, TIME = 8 << 30, 150  # bytes and seconds for one model
DEFAULT = {"why": "", "error": None}
KINDS = ("type", "decoder", "tower")
SERVER = multiprocessing.get_context("forkserver")  # imports once what every study needs
SHAPES = ("", "with an image of another shape or several tiles: ", "with two images: ")


def main() -> int:
    """Study what the command line asks for and write or print the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="TYPE", help="types, decoders or towers; all without"
    )
    parser.add_argument("--decoders", action="store_true", help="also text decoders inside LLaVA")
    parser.add_argument("--towers", action="store_true", help="also vision towers inside LLaVA")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default: 2)")
    parser.add_argument(
        "--out", type=Path, help="the page; docs/support.md by default, unless TYPE is given"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the measurements, as JSON lines"
    )
    parser.add_argument(
        "--update", action="store_true", help="keep the measurements of other models"
    )
    asked = parser.parse_args()
    known = {(row["kind"], row["name"]): row for row in read(asked.results)} if asked.update else {}
    kept = asked.update or not asked.names
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join(
        sys.path
    )  # for the process that the others start from
    SERVER.set_forkserver_preload(["tiny_families", "sinkscope.models", "sinkscope.testing"])
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(asked.jobs) as pool:
        for row in pool.map(lambda one: alone(*one), chosen(asked)):
            known[row["kind"], row["name"]] = row
            rows = [
                known[key] for key in sorted(known, key=lambda key: (KINDS.index(key[0]), key[1]))
            ]
            if kept:
                write(asked.results, rows)
            print(line(row), file=sys.stderr, flush=True)
    facts = {
        "Date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        **{name: version(name) for name in ("transformers", "torch", "nnsight")},
        "run time": f"{sum(row['seconds'] for row in rows) / 60:.0f} minutes of one core "
        f"({platform.machine()}) for {len(rows)} models",
    }
    text = page(rows, json.loads(WEIGHTS.read_text(encoding="utf-8")), facts)
    out = asked.out or (PAGE if kept else None)
    if out is None:
        print(text)
    else:
        out.write_text(text, encoding="utf-8")
    return int(any(check["status"] == "wrong" for row in rows for check in row["checks"]))


def read(path: Path) -> list[dict[str, Any]]:
    """The measurements of an earlier run; none without the file."""
    if not path.exists():
        return []
    rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["checks"] = [{**DEFAULT, **check} for check in row["checks"]]
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Keep the measurements, without what is empty and how far exact numbers are off, which changes from run to run."""
    lines = []
    for row in rows:
        checks = [
            {
                name: value
                for name, value in check.items()
                if value not in ("", None) and (name != "error" or check["status"] != "exact")
            }
            for check in row["checks"]
        ]
        lines.append(json.dumps({**row, "checks": checks}, separators=(",", ":")) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def chosen(asked: argparse.Namespace) -> list[tuple[str, str]]:
    """Kind and name of the models to study."""
    from tiny_families import DECODERS, TOWERS, TYPES

    everything = {"type": TYPES, "decoder": DECODERS, "tower": TOWERS}
    if not asked.names:
        kinds = ["type", *["decoder"] * asked.decoders, *["tower"] * asked.towers]
        return [(kind, name) for kind in kinds for name in everything[kind]]
    found = [
        (kind, name) for kind, names in everything.items() for name in names if name in asked.names
    ]
    unknown = {*asked.names} - {name for _, name in found}
    if unknown:
        raise SystemExit(f"no type, decoder or tower is named {', '.join(sorted(unknown))}")
    return found


def line(row: dict[str, Any]) -> str:
    """One line about a model, for who waits."""
    if row["not_run"]:
        return f"{row['kind']:<8}{row['name']:<28}not run: {row['not_run']}"
    total = dict.fromkeys(("exact", "approximate", "no", "wrong"), 0)
    for check in row["checks"]:
        total[check["status"]] += 1
    told = ", ".join(f"{count} {status}" for status, count in total.items() if count)
    return f"{row['kind']:<8}{row['name']:<28}{told}; {row['seconds']:.0f} s"


# --- one model in a process of its own ----------------------------------------------------------------


def alone(kind: str, name: str) -> dict[str, Any]:
    """Study a model in a process of its own; one that dies or hangs is a wrong answer."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        process = SERVER.Process(target=study, args=(kind, name, folder), daemon=True)
        process.start()
        process.join(TIME)
        if process.is_alive():
            process.kill()
            process.join()
            row = failed(f"it took more than {TIME} seconds")
        elif (path := Path(folder) / "row.json").exists():
            row = json.loads(path.read_text(encoding="utf-8"))
        else:
            said = (Path(folder) / "log.txt").read_text(encoding="utf-8", errors="replace")
            row = failed(
                f"the process ended with {process.exitcode}: {' '.join(said.split())[-200:]}"
            )
    return {"kind": kind, "name": name, **row, "seconds": round(time.monotonic() - start, 1)}


def failed(why: str, status: str = "wrong") -> dict[str, Any]:
    """The measurement of a model that does not load."""
    return {"not_run": None, "checks": [one("load", status, why)]}


def one(name: str, status: str, why: str = "") -> dict[str, Any]:
    """One check of the language tower."""
    return {"name": name, "tower": "language", "status": status, "why": why, "error": None}


def study(kind: str, name: str, folder: str) -> None:
    """Study a model in this process and write its measurement to a folder, and what is printed to a log there."""
    with (Path(folder) / "log.txt").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.filterwarnings("ignore")
    import torch
    from tiny_families import NEED_TIMM, NOT_RUN, VARIANTS_NOT_RUN
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    torch.set_num_threads(1)
    reason = NOT_RUN.get(name) if kind == "type" else VARIANTS_NOT_RUN.get(name)
    if kind == "type" and name in NEED_TIMM and importlib.util.find_spec("timm") is None:
        reason = "its tower is of timm, which is not installed"
    if kind == "type" and name not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        reason = f"transformers {version('transformers')} does not have it"
    row = {"not_run": reason, "checks": []} if reason else measured(kind, name)
    (Path(folder) / "row.json").write_text(json.dumps(row), encoding="utf-8")


def measured(kind: str, name: str) -> dict[str, Any]:
    """Build a model, load it and check it on inputs of each shape."""
    from tiny_families import build, variant

    import sinkscope as ss

    model = build(name) if kind == "type" else variant(kind, name)
    samples = list(shapes(kind, name, model))
    try:
        lvlm = ss.LVLM(model, None)
    except ss.SinkscopeError as error:
        return failed(refusal(error), "no")
    except Exception as error:  # noqa: BLE001  what it is belongs in the table
        return failed(raw(error))
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for label, inputs in samples:
        for check in checked(ss, lvlm, inputs):
            if label and check["why"] and rank(check) > 1:
                check["why"] = label + check["why"]
            found.setdefault((check["name"], check["tower"]), []).append(check)
    return {"not_run": None, "checks": [worst(checks) for checks in found.values()]}


def shapes(kind: str, name: str, model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The inputs of each shape that a model has; a plain pass must run on them."""
    import torch
    from tiny_families import inputs_of, variant_inputs

    for shape, label in enumerate(SHAPES):
        inputs = (
            inputs_of(name, model, shape) if kind == "type" else variant_inputs(name, model, shape)
        )
        if inputs is not None:
            with torch.no_grad():
                model(**inputs)
            yield label, inputs


def checked(ss: Any, lvlm: Any, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks of one sample, the load first."""
    from sinkscope.testing import check_model

    try:
        sample = lvlm.prepare(inputs=inputs)
    except ss.SinkscopeError as error:
        return [one("load", "no", refusal(error))]
    except Exception as error:  # noqa: BLE001  what it is belongs in the table
        return [one("load", "wrong", raw(error))]
    return [one("load", "exact"), *(vars(check) | {} for check in check_model(lvlm, sample).checks)]


def refusal(error: Exception) -> str:
    """The first sentence of an error of ours."""
    return " ".join(str(error).split()).partition(". ")[0].removesuffix(".")


def raw(error: Exception) -> str:
    """An error that is none of ours, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


if __name__ == "__main__":
    raise SystemExit(main())

"""Per-sample logs of lmms-eval, read back as a `Comparison`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd

from sinkscope.checks import check_number, is_number, typed
from sinkscope.data.items import ALL
from sinkscope.errors import InputError, nearest
from sinkscope.experiments.comparing import Comparison
from sinkscope.files import read_json

RECORD = "sinkscope_edits.json"  # what the plug-in writes beside the log
MARK = "_samples_"  # in the name of a log, between its date and its task
# What a line of a log holds beside its metrics.
FIELDS = {"doc_id", "doc", "target", "arguments", "input", "resps", "filtered_resps"}
FIELDS |= {"doc_hash", "prompt_hash", "target_hash", "token_counts", "input_media"}
Log = Mapping[int, Mapping[str, Any]]  # one line per document, by its number


@typed
def read_lmms_eval(
    logs: Mapping[str, Any],
    *,
    metric: str | Mapping[str, str] | None = None,
    task: str | Sequence[str] | None = None,
    scale: float = 1.0,
) -> Comparison:
    """Read logs of ``lmms_eval --log_samples`` as a `Comparison`, paired document by document.

    ``correct`` of its table is the metric: 0 or 1, or a score between. ``touched``, ``sinks`` and images come
    from the record of sinkscope's plug-in. Without one every document counts as touched, and as an image of its
    own. InputError if two logs are not of the same tasks and documents.

    Args:
        logs: Condition -> the ``--output_path`` of its run, or a list of them, one per seed; the base first.
        metric: The metric's name in the log, or task -> name; None if there is one alone.
        task: Which tasks to read; None for all.
        scale: What the metric is divided by, such as 100 for percent.
    """
    check_number(above=0, hint="Write 100 for percent.", scale=scale)
    if not logs:
        raise InputError("Got no logs; expected {'base': folder, 'gated': folder}.")
    wanted = [task] if isinstance(task, str) else task and list(task)
    lines, first, base = [], {}, next(iter(logs))
    for name, given in logs.items():
        paths = list(given) if isinstance(given, (list, tuple)) else [given]
        if not paths or (name == base and len(paths) > 1):
            raise InputError(
                f"Got {len(paths)} logs of {name!r}; expected one of the base, else one or more."
            )
        for seed, path in enumerate(paths):
            found = _read(Path(path).expanduser(), wanted)
            _check_same(first := first or found, found, f"{name!r} ({path})")
            notes, numbers = _notes(Path(path).expanduser()), count()
            for where in sorted(found):
                asked = metric.get(where) if isinstance(metric, Mapping) else metric
                for doc, line in sorted(found[where].items()):
                    note = _note(notes, where, doc, name == base, path)
                    told = {"task": where, "question": line["input"], "answer": line["target"]}
                    told |= {"condition": name, "seed": seed, "given": str(line["filtered_resps"])}
                    value = _score(
                        line, asked, scale, f"document {doc} of {where} in {str(path)!r}"
                    )
                    lines.append({"item": next(numbers), **told, **note, "correct": value})
    table = pd.DataFrame(lines)
    # An image is known by its pixels if any run has noted them.
    images = table.dropna(subset="image_id").groupby("item")["image_id"]
    if (images.nunique() > 1).any():
        raise InputError(
            "Got records with other images of the same documents; expected the same data."
        )
    own = table["task"] + "/" + table["item"].astype(str)
    return Comparison(table.assign(image_id=table["item"].map(images.first()).fillna(own)), base)


def _read(path: Path, wanted: Sequence[str] | None) -> dict[str, Log]:
    """The log of every task in a folder, or one file."""
    files = [path] if path.is_file() else sorted(path.rglob(f"*{MARK}*.jsonl"))
    named = [(file.stem.partition(MARK)[2] or ALL, file) for file in files]
    names = [name for name, _ in named]
    if missing := [name for name in wanted or () if name not in names]:
        raise InputError(f"Got no log of {missing} in {str(path)!r}. {nearest(missing[0], names)}")
    kept = [(name, file) for name, file in named if wanted is None or name in wanted]
    if not kept:
        wrong = "the --output_path of a run with --log_samples"
        raise InputError(f"Got {str(path)!r} without a file *{MARK}*.jsonl; expected {wrong}.")
    if twice := [name for name, _ in kept if names.count(name) > 1]:
        raise InputError(
            f"Got several logs of {twice[0]!r} in {str(path)!r}; expected those of one run. Give the file."
        )
    return {name: _lines(file) for name, file in kept}


def _lines(file: Path) -> Log:
    out: dict[int, Any] = {}
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            doc = line["doc_id"]
            out[doc] = {**line, **{key: line[key] for key in ("input", "target", "filtered_resps")}}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"Got line {number} of {str(file)!r}, which is none of a log of lmms-eval "
                f"({type(error).__name__}: {error}); expected what --log_samples writes."
            ) from error
        if len(out) < number:
            raise InputError(
                f"Got document {doc} twice in {str(file)!r}; expected one line each: a task with one filter, "
                "and one run per file."
            )
    return out


def _check_same(first: Mapping[str, Log], found: Mapping[str, Log], where: str) -> None:
    """Refuse other tasks and other documents than those of the first log."""
    if set(first) != set(found):
        raise InputError(
            f"Got the tasks {sorted(found)} in the log of {where}, and {sorted(first)} in the first one; "
            "expected the same. Write task=[...] for some of them."
        )
    for task, log in first.items():
        other = found[task]
        if set(log) != set(other):
            raise InputError(
                f"Got {len(other)} documents of {task} in the log of {where}, and {len(log)} in the first one, "
                f"of which {len(set(log) & set(other))} have the same doc_id; expected the same documents."
            )
        for key in ("input", "target", "doc_hash"):
            wrong = [doc for doc, line in log.items() if line.get(key) != other[doc].get(key)]
            if wrong:
                raise InputError(
                    f"Got another {key} of {task}, document {wrong[0]}, in the log of {where} "
                    f"({len(wrong)} documents in all); expected the documents of the first log."
                )


def _notes(path: Path) -> dict[tuple[str, int], Any] | None:
    """What the plug-in noted of every document, or None."""
    file = (path.parent if path.is_file() else path) / RECORD
    if not file.exists():
        return None
    whole = read_json(file, "Run lmms-eval again.")
    return {(one["task"], one["doc_id"]): one for one in whole["documents"]}


def _note(notes: Any, task: str, doc: int, base: bool, path: Any) -> dict[str, Any]:
    if notes is None:
        return {"touched": not base, "sinks": float("nan"), "uncontrolled": False, "image_id": None}
    if (task, doc) not in notes:
        raise InputError(
            f"Got no note of document {doc} of {task} in {RECORD} of {str(path)!r}; expected one of every "
            "document of the log. Run without --use_cache, in a folder of its own."
        )
    note = notes[task, doc]
    sinks = float("nan") if note["sinks"] is None else note["sinks"]
    kept = {"touched": note["touched"], "uncontrolled": note["uncontrolled"]}
    return {**kept, "sinks": sinks, "image_id": note["image"]}


def _score(line: Mapping[str, Any], metric: str | None, scale: float, where: str) -> float:
    """A metric of one document, as a number between 0 and 1."""
    found = dict(_numbers(line))
    if metric is None and len(found) != 1:
        raise InputError(
            f"Got the metrics {sorted(found)} of {where}; expected metric= one of them."
        )
    name = next(iter(found)) if metric is None else metric
    if name not in found:
        raise InputError(
            f"Got no number for the metric {name!r} of {where}. {nearest(name, found)}"
        )
    value = float(found[name]) / scale
    if not is_number(value, 0) or value > 1:
        raise InputError(
            f"Got {name}={found[name]} of {where}; expected a score from 0 to scale={scale:g}. Write scale=100 "
            "for percent."
        )
    return value


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics of a document that are numbers, or dicts with a number as ``"score"``."""
    for name, value in line.items():
        value = value.get("score") if isinstance(value, dict) else value
        if name not in FIELDS and isinstance(value, (bool, int, float)):
            yield name, value

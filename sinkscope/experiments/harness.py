"""Per-sample logs of lmms-eval, read back as a `Comparison`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd

from sinkscope.checks import check_number, typed
from sinkscope.errors import InputError, nearest
from sinkscope.experiments.comparing import Comparison
from sinkscope.files import read_json, unseal

RECORD = "sinkscope_edits.json"  # what the plug-in writes beside the log
MARK = "_samples_"  # in the name of a log, between its date and its task
# What a line of a log holds beside its metrics.
FIELDS = {"doc_id", "doc", "target", "arguments", "input", "resps", "filtered_resps"}
FIELDS |= {"doc_hash", "prompt_hash", "target_hash", "token_counts", "input_media"}
ADVICE = "Run lmms-eval again."
COLUMNS = "item image_id task question answer condition seed given correct touched sinks"
Logs = Mapping[str, Mapping[int, Mapping[str, Any]]]  # task -> number of the document -> its line


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
    wanted, lines = [task] if isinstance(task, str) else task, []
    first: Logs | None = None
    for name, given in logs.items():
        paths = list(given) if isinstance(given, (list, tuple)) else [given]
        if not paths or (first is None and len(paths) > 1):
            many = "one of the base, which stands first, and one or more of the others"
            raise InputError(f"Got {len(paths)} logs of {name!r}; expected {many}.")
        for seed, path in enumerate(Path(one).expanduser() for one in paths):
            found, base = _read(path, wanted), first is None
            _check_same(first := first or found, found, f"{name!r} ({path})")
            for line in _told(found, path, metric, scale):
                unnoted = {"touched": not base, "sinks": None, "uncontrolled": False}
                lines.append({**unnoted, **line, "condition": name, "seed": seed})
    if not lines:
        raise InputError("Got no logs; expected {'base': folder, 'gated': folder}.")
    images = {line["item"]: line["image_id"] for line in reversed(lines) if line["image_id"]}
    for line in lines:
        own = f"{line['task']}/{line['item']}"  # where no run has noted the image
        known = images.setdefault(line["item"], own)
        if line["image_id"] not in (None, known):
            where = f"document {line['item']} of all, of {line['task']}"
            raise InputError(f"Got records with two images of {where}; expected the same data.")
        line["image_id"] = known
    table = pd.DataFrame(lines).astype({"sinks": float})
    return Comparison(table[[*COLUMNS.split(), "uncontrolled"]], next(iter(logs)))


def _told(found: Logs, path: Path, metric: Any, scale: float) -> Iterator[dict[str, Any]]:
    """What the logs of a run, and its record if there is one, tell of every document."""
    places, numbers = path.parents[:2] if path.is_file() else [path], count()
    notes: dict[tuple[str, int], dict[str, Any]] | None = None
    for file in [place / RECORD for place in places if (place / RECORD).exists()][:1]:
        record = unseal(read_json(file, ADVICE), file, ADVICE)
        notes = {(one["task"], one["doc_id"]): one for one in record["documents"]}
    for task, log in sorted(found.items()):
        for doc, line in sorted(log.items()):
            where, note = (
                f"document {doc} of {task} in {str(path)!r}",
                (notes or {}).get((task, doc)),
            )
            if notes is not None and note is None:
                raise InputError(
                    f"Got no note of {where} in {RECORD}; expected one of every document. Run without "
                    "--use_cache, in a folder of its own."
                )
            asked = metric.get(task) if isinstance(metric, Mapping) else metric
            told = {"item": next(numbers), "image_id": note and note["image"], "task": task}
            told |= {"question": line["input"], "answer": line["target"]}
            told["given"] = str(line["filtered_resps"])
            told["correct"] = _score(line, asked, scale, where)
            yield told | {k: note[k] for k in ("touched", "sinks", "uncontrolled") if note}


def _read(path: Path, wanted: Sequence[str] | None) -> Logs:
    """The logs of a folder, or one file; one per task."""
    files = [path] if path.is_file() else sorted(path.rglob(f"*{MARK}*.jsonl"))
    named = [(file.stem.partition(MARK)[2], file) for file in files]
    names = [name for name, _ in named if wanted is None or name in wanted]
    if missing := [name for name in wanted or () if name not in names]:
        known = nearest(missing[0], [name for name, _ in named])
        raise InputError(f"Got no log of {missing} in {str(path)!r}. {known}")
    if not names or len(names) > len(set(names)):
        raise InputError(
            f"Got {len(names)} logs of the tasks {sorted(set(names))} in {str(path)!r}; expected one per task, "
            "in the --output_path of one run with --log_samples. Give that folder, or the file."
        )
    return {name: _lines(file) for name, file in named if name in names}


def _lines(file: Path) -> dict[int, Any]:
    out: dict[int, Any] = {}
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            out[line["doc_id"]] = line
            missing = {"input", "target", "filtered_resps"} - line.keys()
        except (ValueError, KeyError, TypeError) as error:
            missing = {f"{type(error).__name__}: {error}"}
        if missing or len(out) < number:
            raise InputError(
                f"Got {str(file)!r} with a line {number} that is none of a log, or the second of its document "
                f"({sorted(missing)}); expected what --log_samples writes for a task with one filter."
            )
    return out


def _check_same(first: Logs, found: Logs, where: str) -> None:
    """Refuse other tasks and other documents than those of the first log."""
    if set(first) != set(found):
        raise InputError(
            f"Got the tasks {sorted(found)} in the log of {where}, and {sorted(first)} in the first one; "
            "expected the same. Write task=[...] for some of them."
        )
    for task, log in first.items():
        other = found[task]
        if strange := sorted(set(log) ^ set(other)):
            raise InputError(
                f"Got {len(other)} documents of {task} in the log of {where}, and {len(log)} in the first one, "
                f"of which {len(strange)} are in one alone, such as {strange[0]}; expected the same."
            )
        for doc, line in log.items():
            if wrong := [x for x in ("input", "target") if line[x] != other[doc][x]]:
                raise InputError(
                    f"Got another {wrong[0]} of document {doc} of {task} in the log of {where}: "
                    f"{other[doc][wrong[0]]!r}; expected {line[wrong[0]]!r}, as in the first one."
                )


def _score(line: Mapping[str, Any], metric: str | None, scale: float, where: str) -> float:
    """A metric of one document, a number or a dict with a number as its ``"score"``, as 0 to 1."""
    values = {k: v.get("score") if isinstance(v, dict) else v for k, v in line.items()}
    found = {k: v for k, v in values.items() if k not in FIELDS and isinstance(v, (int, float))}
    if metric is None and len(found) != 1:
        raise InputError(
            f"Got the metrics {sorted(found)} of {where}; expected metric= one of them."
        )
    name = next(iter(found)) if metric is None else metric
    if name not in found:
        raise InputError(f"Got no number for {name!r} of {where}. {nearest(name, found)}")
    if not 0 <= found[name] <= scale:
        raise InputError(
            f"Got {name}={found[name]} of {where}; expected 0 to {scale:g}. Write scale=100 for percent."
        )
    return float(found[name]) / scale

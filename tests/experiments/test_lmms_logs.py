"""Logs of lmms-eval, written by a real run of scripts/lmms_eval_run.py, read back as a comparison."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sinkscope.errors import CheckpointError, InputError
from sinkscope.experiments import Comparison, read_lmms_eval
from sinkscope.experiments.harness import RECORD
from sinkscope.files import SEAL, seal

SAVED = Path(__file__).parent / "saved_lmms"
RUNS = {name: SAVED / name for name in ("base", "gated", "masked")}
METRIC = {"scenes_free": "right", "scenes_options": "acc"}


def raw(folder, task):
    (file,) = folder.rglob(f"*_samples_{task}.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def copied(tmp_path):
    """Copies of two runs, and what changes every line of one log of the second."""
    for name in ("base", "masked"):
        shutil.copytree(RUNS[name], tmp_path / name)

    def change(work, task="scenes_free"):
        (file,) = (tmp_path / "masked").rglob(f"*_samples_{task}.jsonl")
        lines = [work(i, line) for i, line in enumerate(raw(tmp_path / "masked", task))]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines if line is not None))

    change.runs = {"base": tmp_path / "base", "masked": tmp_path / "masked"}
    return change


def test_every_number_is_that_of_the_log():
    """Accuracies and differences by hand from the lines; images and touched documents from the record."""
    got = read_lmms_eval(RUNS, metric=METRIC)
    assert isinstance(got, Comparison)
    assert got.base == "base"
    assert got.conditions == ("gated", "masked")
    assert len(got.table) == 3 * (16 + 13)
    lines = got.estimates(draws=50).set_index(["task", "condition"])
    means = {}
    for name, folder in RUNS.items():
        for task, metric in METRIC.items():
            means[task, name] = np.mean([one[metric] for one in raw(folder, task)])
            assert lines.loc[task, name]["accuracy"] == means[task, name]
            delta = means[task, name] - means[task, "base"]
            assert lines.loc[task, name]["delta"] == pytest.approx(delta)
    assert means["scenes_free", "base"] == 14 / 16  # as lmms-eval printed: 0.875, and 0.8125
    assert means["scenes_free", "masked"] == 13 / 16
    assert lines.loc["all", "masked"][["n", "images"]].tolist() == [29, 4]
    shares = lines.loc["all"]["touched"]
    assert shares.tolist() == [0, 1, 1]
    sinks = got.table.set_index("condition")["sinks"]
    assert sinks["masked"].notna().all()  # the condition made a trace
    assert sinks[["base", "gated"]].isna().all()
    one = got.table[got.table["task"] == "scenes_free"].iloc[0]
    first = raw(RUNS["base"], "scenes_free")[0]
    asked = [first[key] for key in ("input", "target", "filtered_resps")]
    assert one[["question", "answer", "given"]].tolist() == asked
    assert "scenes_free" in got.to_markdown(draws=20)
    assert got.plot(draws=20).axes


def test_one_task_a_file_and_several_seeds():
    (file,) = RUNS["base"].rglob("*_scenes_free.jsonl")
    logs = {"base": file, "edits": [RUNS["gated"], RUNS["masked"]]}
    got = read_lmms_eval(logs, task="scenes_free")
    line = got.estimates(draws=20).set_index("condition").loc["edits"]
    assert (line["n"], line["seeds"], line["images"]) == (16, 2, 4)
    assert line["accuracy"] == (14 + 13) / 32
    assert line["seed_sd"] == pytest.approx(np.std([14 / 16, 13 / 16], ddof=1))


def test_a_score_between_is_a_share_of_the_scale(copied):
    copied(lambda i, line: {**line, "right": {"score": 25 * (i % 4)}})
    logs = copied.runs | {"base": copied.runs["masked"]}
    table = read_lmms_eval(logs, task="scenes_free", scale=75).table
    assert table[table["condition"] == "base"]["correct"].tolist() == [0, 1 / 3, 2 / 3, 1] * 4
    with pytest.raises(
        InputError, match=r"Got right=25 of document 1 .* expected 0 to 1. Write scale=100"
    ):
        read_lmms_eval(logs, task="scenes_free")


def test_without_a_record_all_is_touched_and_every_document_an_image_of_its_own(copied):
    for folder in copied.runs.values():
        (folder / RECORD).unlink()
    table = read_lmms_eval(copied.runs, metric=METRIC).table
    assert table.groupby("condition")["touched"].mean().to_dict() == {"base": 0.0, "masked": 1.0}
    assert table["image_id"].nunique() == 29
    assert table["sinks"].isna().all()


OTHERS = {
    "a missing document": (lambda i, x: x if i else None, "Got 15 documents .* such as 0"),
    "another question": (lambda i, x: {**x, "input": f"{i}"}, "another input of document 0"),
    "another answer": (lambda i, x: {**x, "target": "no"}, "another target of document"),
    "a document twice": (lambda i, x: {**x, "doc_id": 3}, "line 2 .* the second of its document"),
    "no such field": (lambda i, x: {"doc_id": i}, "'filtered_resps', 'input', 'target'"),
    "no object": (lambda i, x: i, "TypeError"),
    "two metrics": (lambda i, x: {**x, "f1": 1.0}, r"Got the metrics \['f1', 'right'\]"),
    "a metric of text": (lambda i, x: {**x, "right": "yes"}, r"Got the metrics \[\]"),
    "nothing": (lambda i, x: {**x, "right": float("nan")}, "Got right=nan of document 0"),
    "below": (lambda i, x: {**x, "right": -1}, "expected 0 to 1"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_logs_are_refused(name, copied):
    work, message = OTHERS[name]
    copied(work)
    with pytest.raises(InputError, match=message):
        read_lmms_eval(copied.runs, task="scenes_free")


def test_other_tasks_metrics_folders_and_records_are_refused(copied, tmp_path):
    runs = copied.runs
    wrong = [
        (dict(logs={}), "Got no logs"),
        (dict(logs={"base": [runs["base"]] * 2}), "Got 2 logs of 'base'"),
        (dict(logs={"base": runs["base"], "x": []}), "Got 0 logs of 'x'"),
        (dict(logs=runs, task="scenes_fre"), "Did you mean 'scenes_free'"),
        (dict(logs=runs, task="scenes_free", metric="rihgt"), "Did you mean 'right'"),
        (dict(logs={"base": tmp_path / "none"}), "Got 0 logs"),
        (dict(logs=runs, metric=METRIC, scale=0), "scale=0"),
        (dict(logs=runs), None),
    ]
    for given, message in wrong:
        if message is None:  # one metric for each task alone
            assert len(read_lmms_eval(**given).table) == 58
            continue
        with pytest.raises(InputError, match=message):
            read_lmms_eval(**given)
    record = json.loads((runs["masked"] / RECORD).read_text())
    del record[SEAL]
    for note in record["documents"]:
        note["image"] = "pixels:other"
    (runs["masked"] / RECORD).write_text(json.dumps(seal(record)))
    with pytest.raises(InputError, match="two images of document 0 of all"):
        read_lmms_eval(runs)
    record["documents"] = record["documents"][1:]
    (runs["masked"] / RECORD).write_text(json.dumps(seal(record)))
    with pytest.raises(InputError, match="Got no note of document 0 of scenes_options"):
        read_lmms_eval(runs)
    for text in ("{", "[]", json.dumps(record)):
        (runs["masked"] / RECORD).write_text(text)
        with pytest.raises(CheckpointError, match="Run lmms-eval again"):
            read_lmms_eval(runs)
    (file,) = runs["masked"].rglob("*_scenes_free.jsonl")
    file.rename(file.with_name(file.name.replace("_free", "_other")))
    with pytest.raises(InputError, match=r"Got the tasks .* in the log of 'masked'"):
        read_lmms_eval(runs)
    shutil.copytree(RUNS["masked"], runs["masked"] / "again")
    with pytest.raises(InputError, match="expected one per task"):
        read_lmms_eval(runs)

"""A path that no file can have is refused by every function that takes one, and nothing is written."""

from pathlib import Path

import pytest

import sinkscope as ss
from sinkscope import checks, results
from sinkscope.data.questions import Questions
from sinkscope.errors import CheckpointError
from sinkscope.testing import random_image

RECORDS = [{"image": random_image(40, 40, i), "question": "what", "answer": "red"} for i in (0, 1)]
PATHS = {
    "NUL": lambda at: f"{at}/a\0b",
    "long": lambda at: f"{at}/{'x' * 300}",
    "long, as Path": lambda at: Path(at, "x" * 300),
    "a long parent": lambda at: f"{at}/{'x' * 300}/gate",
    "deep": lambda at: f"{at}/{'/'.join(['y' * 200] * 30)}",
    "half a letter": lambda at: f"{at}/\ud800",
    "empty": lambda at: "",
}
TAKES = {
    "LVLM.from_pretrained": lambda one, path: ss.LVLM.from_pretrained(path),
    "result.save": lambda one, path: one.norms.save(path),
    "results.load": lambda one, path: results.load(path),
    "results.load_run": lambda one, path: results.load_run(path),
    "gate.save_pretrained": lambda one, path: one.gate.save_pretrained(path),
    "LSG.from_pretrained": lambda one, path: ss.LSG.from_pretrained(path),
    "LSG.save_stack": lambda one, path: ss.LSG.save_stack([one.gate], path),
    "LSG.load_stack": lambda one, path: ss.LSG.load_stack(path),
    "import_gates": lambda one, path: ss.lsg.import_gates(path, one.lvlm),
    "trace.to_json": lambda one, path: one.trace.to_json(path),
    "write_report": lambda one, path: ss.viz.write_report(path, one.trace),
    "sweep": lambda one, path: ss.sweep(one.lvlm, RECORDS, out=path),
    "Sweep.load": lambda one, path: ss.experiments.Sweep.load(path),
    "train_lsg": lambda one, path: ss.train_lsg(one.lvlm, RECORDS, layers=[0], out=path),
    "load_example": lambda one, path: ss.load_example(cache=path),
    "load_example, wheels": lambda one, path: ss.load_example(source=path, cache=one.place),
    "a file of questions": lambda one, path: list(Questions(source=f"{path}.csv")),
}


class One:
    """What the cases may use."""

    def __init__(self, lvlm, place):
        self.lvlm, self.place = lvlm, place
        sample = lvlm.prepare(random_image(40, 40), "what is it")
        self.norms = lvlm.run(sample, [ss.TokenNorms()])["TokenNorms"]
        self.gate = ss.LSG.for_model(lvlm, 0, v_detector=ss.detectors.Norm(10.0))
        self.trace = ss.trace_sinks(lvlm, sample)


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    return One(tiny("llava-clip-llama"), tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", TAKES)
def test_paths_that_no_file_can_have_are_refused(one, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, path in PATHS.items():
        if kind == "empty" and name.startswith(("load_example", "a file")):
            continue  # as if it were not given; and ".csv" is a name
        with pytest.raises(CheckpointError, match="which no file can be called"):
            TAKES[name](one, path(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_path_without_a_name_is_no_file(one):
    with pytest.raises(CheckpointError, match=r"Got '\.', which cannot be written"):
        one.norms.save(".")


def test_names_to_the_limit_and_paths_not_there_yet_are_left_to_the_system(tmp_path):
    (tmp_path / "file").touch()
    for path in ("x" * 255, "a/b/c", "file/below", "~", "user/gate", "."):
        checks.check_path(path=tmp_path / path)
    checks.check_path(path=None, other=3)

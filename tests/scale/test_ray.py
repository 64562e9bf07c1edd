"""Two workers on this machine give the rows of the local engine, and nothing is lost or doubled."""

from __future__ import annotations

import os
import signal
import time

import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope import detectors
from sinkscope.bundled import scene_attributes, scene_questions
from sinkscope.errors import InputError, WorkerError
from sinkscope.scale.engine import each_part
from tests.scale.ray_here import need_ray
from tests.scale.work import Halved, do

need_ray()

import ray  # noqa: E402

from sinkscope.scale import workers  # noqa: E402

pytestmark = pytest.mark.slow
RULES = {
    "v_detector": detectors.Norm(86.0),
    "l_detector": detectors.Received(times_null=1.4, heads="mean"),
}
TWO = ss.scale.Ray(workers=2, cpus=1)
ONE = ss.scale.Ray(workers=1, cpus=1)


@pytest.fixture(scope="module")
def own():
    """A Ray that the user started: it stays."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    assert ray.is_initialized()
    ray.shutdown()


@pytest.fixture
def built():
    """A model that nobody can make again: it travels."""
    made = ss.load_bundled()
    return ss.LVLM(made.module, made.processor)


def test_a_sweep_goes_on_with_two_workers_where_the_local_one_stopped(tmp_path):
    assert not ray.is_initialized()
    before = dict(os.environ), signal.getsignal(signal.SIGTERM)
    lvlm, questions = ss.load_bundled(), list(scene_questions(6, 2, noise=40.0))
    how = {"layers": ["embed", 1], "grid": [(0.5, 1.0), (1.0, 0.2)], "progress": False}
    how |= {"score": lambda item, answered: min(1.0, -answered.logprob / 10)}
    how["v_detector"] = RULES["v_detector"]
    local = ss.sweep(lvlm, questions, out=tmp_path / "sweep", **how)
    for number in (0, 2, 3, 5):
        (tmp_path / "sweep" / f"part-{number:06d}.parquet").unlink()
    found = ss.sweep(lvlm, questions, out=tmp_path / "sweep", engine=TWO, **how)
    pd.testing.assert_frame_equal(found.table, local.table, rtol=1e-6, atol=1e-6)
    assert found.settings == local.settings
    assert not ray.is_initialized()
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM)) == before


def test_parts_come_once_are_read_late_and_outlive_a_worker(own, built, tmp_path):
    read, found, ahead = [], {}, []

    def parts():
        for n in range(20):
            read.append(n)
            yield f"part {n}", {"n": n} | ({"flag": str(tmp_path / "killed")} if n == 3 else {})
        yield "the last", {"raise": True, "wait": str(tmp_path / "rest")}

    def take():
        for key, made in each_part(built, do, parts(), TWO):
            assert key not in found
            found[key] = made
            ahead.append(len(read) - len(found))
            if len(found) == 20:
                (tmp_path / "rest").touch()

    with pytest.raises(
        InputError, match=r"^Got seven; .* Write 8\. \(On a worker, in .*last'\.\)$"
    ):
        take()
    assert {key: made[0] for key, made in found.items()} == {f"part {n}": n * n for n in range(20)}
    assert (tmp_path / "killed").exists()
    assert {made[2:] for made in found.values()} == {(built.name, False)}
    assert max(ahead) <= workers.AHEAD * 2
    assert ray.is_initialized()


def test_a_part_that_kills_every_worker_ends_it(own, monkeypatch):
    monkeypatch.setattr(workers, "TRIES", 1)
    parts = [(n, {"n": n, "die": n == 1}) for n in (0, 1)]
    done = each_part(ss.load_bundled(), do, parts, ONE)
    assert next(done)[0] == 0
    with pytest.raises(WorkerError, match=r"took down 1 workers.*memory.*in part 1"):
        next(done)
    late = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 2.0:  # its workers are gone
        assert time.monotonic() < late
        time.sleep(0.1)


def test_a_comparison_on_workers(own, built):
    gate = ss.LSG.for_model(built, layer=1, v_detector=RULES["v_detector"])
    torch.manual_seed(0)
    for weights in gate.parameters():
        weights.data += 0.3 * torch.randn_like(weights)
    conditions = {
        "base": [],
        "masked": lambda trace: [ss.MaskKeys(trace.v_sinks, [1, 2], allow_noop=True)],
        "gate": [gate],
        "halved": Halved(),
    }
    questions = list(scene_questions(6, 4, noise=40.0))
    local = ss.compare(built, questions, conditions, **RULES, progress=False)
    found = ss.compare(built, questions, conditions, **RULES, progress=False, engine=TWO)
    pd.testing.assert_frame_equal(found.table, local.table)
    assert local.table.groupby("condition")["given"].agg(tuple).nunique() > 2


def test_probes_on_workers(own):
    lvlm, scenes = ss.load_bundled(), list(scene_attributes(24))
    groups = {**ss.experiments.sink_groups(2, 2), "image": "image"}
    how = {"groups": groups, "targets": ["count"], "layers": [0, 2], "permutations": 0}
    how |= {"draws": 20, "batch": 5, "progress": False, **RULES}
    local, found = (ss.linear_probes(lvlm, scenes, **how, engine=e) for e in ("local", TWO))
    pd.testing.assert_frame_equal(found.table, local.table, rtol=1e-6)
    pd.testing.assert_frame_equal(found.rows, local.rows, rtol=1e-6)

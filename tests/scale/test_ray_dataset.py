"""A traced data set on two workers, one of which is killed: the rows of the local engine."""

from __future__ import annotations

import pandas as pd
import psutil
import pytest

import sinkscope as ss
from sinkscope.experiments.dataset_files import Parts
from tests.scale.ray_here import need_ray

need_ray()

pytestmark = pytest.mark.slow
RULES = {
    "v_detector": ss.detectors.Norm(86.0),
    "l_detector": ss.detectors.Received(times_null=1.4, heads="mean"),
}


def records():
    for one in ss.bundled.scene_questions(40, 1):
        yield {name: one[name] for name in ("image", "question", "image_id")}


def test_a_worker_that_is_killed_in_the_middle_loses_and_doubles_nothing(tmp_path, monkeypatch):
    lvlm, write, killed = ss.load_bundled(), Parts.write, []
    how = {"part": 2, "progress": False, **RULES}
    local = ss.trace_dataset(lvlm, records(), tmp_path / "local", **how)

    def kills(self, *given):
        made = write(self, *given)
        if len(self.known) == 5:
            every = psutil.Process().children(recursive=True)
            workers = [one for one in every if "".join(one.cmdline()).startswith("ray::MapWorker")]
            killed.append(workers[0].pid)
            workers[0].kill()
        return made

    monkeypatch.setattr(Parts, "write", kills)
    engine = ss.scale.Ray(workers=2, cpus=1)
    found = ss.trace_dataset(lvlm, records(), tmp_path / "ray", engine=engine, **how)
    assert len(killed) == 1
    assert len(found.sinks) > 40
    pd.testing.assert_frame_equal(found.sinks, local.sinks, rtol=1e-6, atol=1e-6)
    images = [one.images.drop(columns="seconds") for one in (found, local)]
    pd.testing.assert_frame_equal(*images, rtol=1e-6, atol=1e-6)
    assert images[0]["record"].tolist() == list(range(40))

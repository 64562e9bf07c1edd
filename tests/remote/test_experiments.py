"""Experiments of many requests on a model that is not here: the same numbers, and they go on where they stopped."""

import pandas as pd
import pytest

import sinkscope as ss
from sinkscope.experiments.sweep_result import Folder
from tests.experiments.test_sweep import EVERY, GRID, some


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl"])
def test_a_sweep_gives_the_same_cells_and_goes_on_where_it_stopped(
    family, tiny, remote, loopback, tmp_path, monkeypatch
):
    """A request per block and the base for each question, and one per prompt that finds its V-sinks."""
    here, there = tiny(family), remote(family)
    options = {"grid": GRID, "v_detector": EVERY, "layers": ["embed", 1]}
    want = ss.sweep(here, some(), **options).table
    write, ran = Folder.write, [loopback.seen["ran"]]

    def then_fail(folder, *part):
        write(folder, *part)
        ran.append(loopback.seen["ran"])
        loopback.tell({"at": "job", "error": "CUDA out of memory"})

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", then_fail)
        with pytest.raises(ss.errors.RemoteError, match="CUDA out of memory"):
            ss.sweep(there, some(), **options, out=tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("part-*"))] == ["part-000000.parquet"]
    failed = loopback.seen["ran"]
    got = ss.sweep(there, some(), **options, out=tmp_path).table
    pd.testing.assert_frame_equal(want, got, atol=1e-5, rtol=1e-5)
    assert ran[1] - ran[0] == 3 * (1 + 1 + 2)
    assert (
        loopback.seen["ran"] - failed == 1 + 1 + 2
    )  # the second image alone, which has one question


def test_a_trace_comes_back_to_its_job(tiny, remote, loopback):
    """The result of a job is fetched, not run again."""
    there = remote("llava-clip-llama")
    sample = there.prepare(images=some()[0]["image"], text="what is it")
    first = ss.trace_sinks(there, sample)
    job, ran = there.traffic.job_id, loopback.seen["ran"]
    again = ss.trace_sinks(there, sample, job=job)
    assert again.to_json() == first.to_json()
    assert loopback.seen["ran"] == ran
    with pytest.raises(ss.errors.InputError, match="which answers another call"):
        ss.trace_sinks(there, sample, detail="full", job=job)

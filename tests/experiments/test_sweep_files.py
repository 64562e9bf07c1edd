"""Sweeps on disk: killed, continued, refused, damaged."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope.errors import CheckpointError, InputError
from sinkscope.experiments import sweep_result as store
from sinkscope.files import LOCK, WRITING, seal, unseal
from tests.experiments.sweep_job import questions, run

ROOT = Path(__file__).parents[2]
KILLS = 5


@pytest.fixture
def started(monkeypatch):
    """Starts a sweep in a process of its own; what it imports is imported once."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.experiments.sweep_job"])

    def start(folder):
        process = context.Process(target=run, args=(folder,))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    torch.set_num_threads(1)
    return run(tmp_path_factory.mktemp("undisturbed") / "out")


@pytest.mark.slow
def test_killed_at_random_moments_ends_as_if_undisturbed(undisturbed, started, tmp_path):
    """SIGKILL five times, each at a random moment after new parts began to appear."""
    folder, drawn, counts = tmp_path / "out", random.Random(7), []
    for _ in range(KILLS):
        process = started(folder)
        before = len(list(folder.glob("part-*.parquet")))
        aim = before + drawn.randint(0, 1)
        while process.is_alive() and len(list(folder.glob("part-*.parquet"))) <= aim:
            time.sleep(0.002)
        time.sleep(drawn.random() * 0.05)
        assert process.is_alive(), "the sweep ended before it was killed"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        counts.append(len(list(folder.glob("part-*.parquet"))))
    assert counts == sorted(counts)
    assert 0 < counts[-1] < 24
    last = started(folder)
    last.join()
    assert last.exitcode == 0
    made = ss.experiments.Sweep.load(folder)
    pd.testing.assert_frame_equal(made.table, undisturbed.table, check_exact=True)
    assert made.notes == undisturbed.notes
    assert not list(folder.glob("*.writing"))


def test_memory_and_folder_give_the_same_table(undisturbed):
    lvlm = ss.LVLM(*ss.testing.tiny_llava())
    made = ss.sweep(lvlm, questions(), v_detector=ss.detectors.Norm("3sigma"), progress=False)
    pd.testing.assert_frame_equal(made.table, undisturbed.table, check_exact=True)
    assert made.settings == undisturbed.settings
    assert made.table["item"].tolist() == sorted(made.table["item"])
    assert len(made.table) == len(questions()) * 3 * 11
    assert not made.table.duplicated(["item", "layer", "pair"]).any()


@pytest.fixture
def small(tiny, tmp_path):
    lvlm, folder = tiny("llava-clip-llama"), tmp_path / "out"

    def make(items=None, detector="3sigma", **options):
        options = {"layers": [0], "grid": [(0.5, 0.5)], "out": folder, **options}
        rule = ss.detectors.Norm(detector)
        return ss.sweep(lvlm, items or questions()[:6], v_detector=rule, **options)

    make.folder = folder
    return make


def test_what_is_there_is_not_computed_again(small):
    first = small()
    (small.folder / "part-000001.parquet").unlink()
    stamps = {f: f.stat().st_mtime_ns for f in small.folder.glob("part-*.parquet")}
    again = small()
    assert all(f.stat().st_mtime_ns == stamp for f, stamp in stamps.items())
    pd.testing.assert_frame_equal(first.table, again.table, check_exact=True)


def test_another_sweep_is_refused_with_the_differences(small):
    small()
    with pytest.raises(InputError, match=r"grid: there \[\[0.5, 0.5\]\], here \[\[0.1, 0.9\]\]"):
        small(grid=[(0.1, 0.9)])
    with pytest.raises(InputError, match=r"layers: there \[0\], here \[1\]\n.*score: there"):
        small(layers=[1], score="logprob")
    with pytest.raises(InputError, match="v_rule: there"):
        small(detector="valley")
    with pytest.raises(InputError, match="dataset: there"):
        small(items=[{**q, "answer": "no"} for q in questions()[:6]])
    other = ss.LVLM(*ss.testing.tiny_llava(seed=1))
    rule = ss.detectors.Norm("3sigma")
    options = {"layers": [0], "grid": [(0.5, 0.5)], "out": small.folder}
    with pytest.raises(InputError, match=r"model\.weights: there"):
        ss.sweep(other, questions()[:6], v_detector=rule, **options)


class Stop(BaseException):
    """Ends a sweep as a killed process would."""


def stop_after(monkeypatch, images):
    module = sys.modules[ss.sweep.__module__]
    real, ran = module.sweep_image, []

    def counted(*given, **options):
        if len(ran) == images:
            raise Stop
        ran.append(1)
        return real(*given, **options)

    monkeypatch.setattr(module, "sweep_image", counted)


def test_another_preparation_is_refused(tmp_path, monkeypatch):
    """Half of the images were prepared in one way and half in another, and nothing said so."""
    lvlm = ss.LVLM(*ss.testing.tiny_llava())
    rule, folder = ss.detectors.Norm("3sigma"), tmp_path / "out"

    def go():
        ss.sweep(lvlm, questions()[:6], [0], [(0.5, 0.5)], v_detector=rule, out=folder)

    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(Stop):
            go()
    assert len(list(folder.glob("part-*"))) == 2
    for part, name, value in (
        (lvlm.processor.image_processor, "image_mean", (0.9, 0.9, 0.9)),
        (lvlm.processor, "chat_template", "{{ 'now' }}<image>{{ messages[0]['role'] }}"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(part, name, value)
            with pytest.raises(InputError, match=r"model\.preparation: there"):
                go()
    go()
    assert len(list(folder.glob("part-*"))) == 3


def scorer(factor, stop=False):
    def score(item, answered):
        if stop and item.image_id == "1":
            raise Stop
        return factor * answered.logprob

    return score


def test_another_function_of_the_same_name_is_refused(small):
    with pytest.raises(Stop):
        small(score=scorer(1.0, stop=True))
    assert len(list(small.folder.glob("part-*"))) == 1
    with pytest.raises(InputError, match="score_code: there"):
        small(score=scorer(1.0))


def test_the_same_function_made_again_goes_on(small):
    first = small(score=scorer(2.0))
    assert "scorer" in first.settings["score"]
    pd.testing.assert_frame_equal(small(score=scorer(2.0)).table, first.table)
    with pytest.raises(InputError, match="score_code: there"):
        small(score=scorer(3.0))
    file = sys.__stderr__
    with pytest.raises(InputError, match=r"file of the score function, of type TextIOWrapper"):
        small(score=lambda item, answered: float(file.fileno()))


def test_strange_folders_are_refused(small, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="which is a file"):
        small(out=tmp_path / "file")
    with pytest.raises(InputError, match="a folder with other files"):
        small(out=tmp_path)
    with pytest.raises(CheckpointError, match="Name the folder that"):
        ss.experiments.Sweep.load(tmp_path)


def test_damaged_and_unfinished_folders(small):
    small()
    part = small.folder / "part-000002.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="Delete this file and run the sweep again"):
        ss.experiments.Sweep.load(small.folder)
    part.unlink()
    assert "not finished: 2 of 3 images" in ss.experiments.Sweep.load(small.folder).notes
    assert not small().notes
    manifest = small.folder / store.MANIFEST
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        small()


@pytest.fixture
def living():
    """A process that waits, and is killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_leftovers_of_a_killed_process_are_removed_and_no_others(small, living):
    """A second process deleted what the first was writing, which then ended with an error."""
    small()
    left = small.folder / f"part-000001.parquet.{living.pid}{WRITING}"
    folder = small.folder / f"checkpoint-000002.aa.{living.pid}{WRITING}"
    odd = small.folder / f"notes{WRITING}"  # of no process: not ours
    folder.mkdir()
    for file in (left, odd, folder / "state.json"):
        file.write_bytes(b"half")
    small()
    assert left.exists()
    assert folder.exists()
    living.kill()
    living.wait()
    small()
    assert not left.exists()
    assert not folder.exists()
    assert odd.exists()


HOLD = """
import sys, pathlib
from sinkscope.files import held
with held(pathlib.Path(sys.argv[1]), "sweep"):
    print("holding", flush=True)
    input()
"""


def test_a_second_process_is_refused_while_the_first_runs(small):
    small()
    (small.folder / "part-000001.parquet").unlink()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(small.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
    )
    assert first.stdout.readline() == b"holding\n"
    with pytest.raises(InputError, match=rf"another sweep runs now \(process {first.pid}\)"):
        small()
    assert not (small.folder / "part-000001.parquet").exists()
    first.kill()  # nothing is cleaned up: the system lets go of the lock
    first.communicate()
    small()
    assert (small.folder / "part-000001.parquet").exists()


def test_a_lock_alone_does_not_make_a_folder_strange(small):
    small.folder.mkdir()
    (small.folder / LOCK).write_text("1")
    small()


def test_manifest_is_plain(small):
    made = small()
    found = json.loads((small.folder / store.MANIFEST).read_text())
    assert found == seal(made.settings)
    assert found["versions"]["torch"] == torch.__version__
    assert found["groups"] == 3


SAVED = Path(__file__).with_name("saved_sweep")
"""The first of two images, written before the package had its rooms."""
RULES = {
    "v_detector": ss.detectors.Norm("3sigma"),
    "l_detector": ss.detectors.SinkDimensions((2, 7), 2.0),
}


def test_a_folder_of_an_earlier_commit_is_read_and_continued(tmp_path):
    kept = ss.experiments.Sweep.load(SAVED)
    assert kept.notes == ("not finished: 1 of 2 images",)
    logprobs = [-5.167814, -5.149463, -6.325160, -6.427346]
    assert kept.table["logprob"].tolist() == pytest.approx(logprobs, abs=1e-6)
    assert kept.table["base_logprob"].tolist() == pytest.approx([-5.136907] * 2 + [-6.439894] * 2)
    assert kept.table["n_l"].tolist() == [1] * 4
    out = shutil.copytree(SAVED, tmp_path / "out")

    def go(**options):
        lvlm, grid = ss.LVLM(*ss.testing.tiny_llava()), [(0.2, 0.2, 0.6), (1.0, 0.5, 1.0)]
        return ss.sweep(lvlm, questions()[:4], [0], grid, **RULES, score="logprob", **options)

    noted = json.loads((out / store.MANIFEST).read_text())
    part = next(store.parts_of(out, unseal(noted, out, "")))
    noted = kept.settings | {"versions": {**kept.settings["versions"], "torch": "1.0"}}
    (out / store.MANIFEST).write_text(json.dumps(seal(noted)))
    with pytest.raises(InputError, match=r'versions.torch: there "1.0".*\n.*Write out=.another'):
        go(out=out)
    noted["versions"] = go().settings["versions"]  # those of this machine
    (out / store.MANIFEST).write_text(json.dumps(seal(noted)))
    (out / store.part_name(0)).unlink()
    store.Folder(out, noted).write(0, part[0].to_pylist(), part[1])
    made = go(out=out)
    assert not made.notes
    assert made.settings == noted
    pd.testing.assert_frame_equal(made.table, go().table, atol=1e-5)
    again = made.table[made.table["item"] < 2]
    pd.testing.assert_frame_equal(again, kept.table, check_exact=True)

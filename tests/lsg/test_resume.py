"""A run that is killed and started again ends at the same weights; another run is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import sinkscope as ss
from sinkscope.errors import CheckpointError, InputError
from sinkscope.files import held, seal, unseal
from sinkscope.models.loading import identity_of
from sinkscope.results.saving import digest
from sinkscope.testing import random_image, tiny_llava
from sinkscope.training.loop import Loop
from tests.lsg.test_train import RULE, Bad, records, same, train, weights

SAVED = Path(__file__).parent / "saved_run"
SCRIPT = """
import sys, time
import torch
import sinkscope as ss
from sinkscope.testing import tiny_llava
from tests.lsg.test_resume import LONG
from tests.lsg.test_train import records, train

class Slow(list):
    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)

torch.set_num_threads(1)
lvlm = ss.LVLM(*tiny_llava(), verify=False)
train(lvlm, Slow(records()), out=sys.argv[1], **LONG)
"""
LONG = {"layers": [0, 1], "epochs": 3, "evaluate_every": 2, "checkpoint_every": 2}


@pytest.mark.slow
def test_a_killed_run_ends_at_the_weights_of_an_undisturbed_one(lvlm, tmp_path):
    """SIGKILL after the checkpoint of step 4 of 9."""
    root, folder = Path(__file__).parents[2], tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (folder / "checkpoint-000004" / "state.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    last = train(lvlm, out=folder, **LONG)
    undisturbed = train(lvlm, **LONG)
    assert same(weights(last), weights(undisturbed))
    assert last.history.equals(undisturbed.history)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [".lock", "checkpoint-000009", "run.json"]


@pytest.fixture
def lvlm():
    return ss.LVLM(*tiny_llava(), verify=False)


@pytest.mark.parametrize("at", [25, 38, 60])
def test_a_run_that_breaks_off_anywhere_goes_on(lvlm, tmp_path, at):
    """In one process, at many places: in a step, at a validation, before the first checkpoint."""
    expected = train(lvlm, **LONG)
    bad = Bad(records(), ZeroDivisionError())
    bad.reads = 60 - at
    with pytest.raises(ZeroDivisionError):
        train(lvlm, bad, out=tmp_path, **LONG)
    again = train(lvlm, out=tmp_path, **LONG)
    assert same(weights(expected), weights(again))
    assert expected.history.equals(again.history)
    assert again.record["results"] == expected.record["results"]


def test_an_early_end_is_the_same_after_a_break(lvlm, tmp_path):
    """How long a gate has waited for a lower loss is kept, too."""
    options = {"epochs": 8, "evaluate_every": 1, "checkpoint_every": 1, "patience": 3}
    options |= {"lr": 0.5, "schedule": "constant"}
    expected = train(lvlm, **options)
    last = expected.record["steps"]
    assert last < 24
    for step in range(last - 2, last):
        folder, save = tmp_path / str(step), Loop._save

        def until(loop, step=step, save=save):
            save(loop)
            if loop.step == step:
                raise ZeroDivisionError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Loop, "_save", until)
            with pytest.raises(ZeroDivisionError):
                train(lvlm, out=folder, **options)
        again = train(lvlm, out=folder, **options)
        assert again.record["steps"] == last
        assert again.history.equals(expected.history)
        assert same(weights(expected), weights(again))


def test_a_run_of_the_version_before_goes_on(lvlm, tmp_path):
    """Half a run that the loop before this one wrote: four of six steps, and a validation at two of them."""
    shutil.copytree(SAVED, tmp_path, dirs_exist_ok=True)
    facts, last = tmp_path / "run.json", tmp_path / "checkpoint-000004"
    tensors = load_file(last / "state.safetensors")
    noted = unseal(json.loads(facts.read_text()), facts, "")
    data = unseal(json.loads((last / "state.json").read_text()), last, "", sealed(noted, tensors))
    noted["model"]["weights"] = identity_of(lvlm)["weights"]  # random weights may differ by machine
    facts.write_text(json.dumps(seal(noted)))
    (last / "state.json").write_text(json.dumps(seal(data, sealed(noted, tensors))))
    options = {"layers": [1], "choices": {"hidden": 2}, "evaluate_every": 2, "patience": 3}
    expected = train(lvlm, **options)
    steps, step = [], Loop._one_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Loop, "_one_step", lambda loop, bar: (steps.append(loop.step), step(loop, bar))
        )
        again = train(lvlm, **options, out=tmp_path, checkpoint_every=2)
    assert steps == [4, 5]
    assert same(weights(expected), weights(again), 1e-6)
    pd.testing.assert_frame_equal(expected.history, again.history, rtol=1e-5)


def test_another_run_is_refused_with_the_differences(lvlm, tmp_path):
    train(lvlm, out=tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(
        InputError, match=r"settings\.lr: there 0\.02, here 0\.01\n.*settings\.seed"
    ):
        train(lvlm, out=tmp_path, lr=0.01, seed=5)
    changed = records()
    changed[0]["answer"] = "seven"
    with pytest.raises(InputError, match=r"data\.fingerprint: there \"\w+\", here \"\w+\""):
        train(lvlm, changed, out=tmp_path)
    with pytest.raises(InputError, match=r"steps\.rows: there 4, here 8"):
        train(lvlm, out=tmp_path, accumulate=2)
    with pytest.raises(InputError, match=r"gates\.1: there null, here \{"):
        train(lvlm, layers=[0, 1], out=tmp_path)
    other = ss.LVLM(*tiny_llava(seed=1), verify=False)
    with pytest.raises(InputError, match=r"model\.weights: there"):
        train(other, out=tmp_path)
    gate = ss.LSG.for_model(lvlm, 0, v_detector=RULE)
    with torch.no_grad():
        gate.outer.bias.add_(1.0)
    with pytest.raises(InputError, match=r"gates\.0\.start: there \"\w+\", here"):
        train(lvlm, gates=[gate], out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("named", [True, False])
def test_pixels_that_changed_are_another_run(lvlm, tmp_path, named):
    """The file's name and the ``image_id`` stay; what the model is shown does not."""
    data = records()
    for i, record in enumerate(data):
        path = tmp_path / f"{i // 2}.png"
        record["image"].save(path)
        data[i] = record | {"image": path, "image_id": i // 2 if named else None}
    out = tmp_path / "run"
    train(lvlm, data, out=out, epochs=1)
    random_image(32, 32, 999).save(data[0]["image"])
    with pytest.raises(InputError, match=r"data\.fingerprint: there \"\w+\", here"):
        train(lvlm, data, out=out, epochs=1)


def test_a_second_run_of_the_same_folder_is_refused_while_the_first_goes_on(lvlm, tmp_path):
    done = train(lvlm, out=tmp_path)
    with held(tmp_path, "run"):
        assert same(weights(train(lvlm, out=tmp_path)), weights(done))  # what is done is only read
    shutil.rmtree(*tmp_path.glob("checkpoint-*"))
    with held(tmp_path, "run"), pytest.raises(InputError, match="where another run runs now"):
        train(lvlm, out=tmp_path)
    train(lvlm, out=tmp_path)


def sealed(facts, tensors):
    """The digest of what a checkpoint's ``state.json`` belongs to."""
    return digest(json.dumps(facts, sort_keys=True), tensors).encode()


def test_files_that_cannot_be_read_are_named(lvlm, tmp_path):
    train(lvlm, out=tmp_path)
    (newest,) = tmp_path.glob("checkpoint-*")
    whole = (newest / "state.safetensors").read_bytes()
    (newest / "state.safetensors").write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match=r"state\.safetensors cannot be read"):
        train(lvlm, out=tmp_path)
    (newest / "state.safetensors").write_bytes(whole)
    (newest / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json', which cannot be read as JSON"):
        train(lvlm, out=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="which cannot be written"):
        train(lvlm, out=tmp_path / "file" / "run")


def test_checkpoints_hold_no_pickle_and_no_half_written_one_counts(lvlm, tmp_path):
    expected = train(lvlm, out=tmp_path / "a", checkpoint_every=1)
    run = json.loads((tmp_path / "a" / "run.json").read_text())
    assert run["settings"]["lr"] == 0.02
    half = tmp_path / "a" / "checkpoint-000099.tmp"
    half.mkdir()
    (half / "state.json").write_text("{")
    again = train(lvlm, out=tmp_path / "a", checkpoint_every=1)
    assert same(weights(expected), weights(again))
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert {path.suffix for path in files if path.name != ".lock"} == {".json", ".safetensors"}

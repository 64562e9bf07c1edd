"""What every result has: a table by its axes, a short text, and a file from which it comes back whole."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

import sinkscope as ss
from examples.kurtosis_probe import TokenKurtosis
from sinkscope import results
from sinkscope.errors import CheckpointError, InputError, InterventionError, ProbeError
from sinkscope.results import Result, load, load_run, saving
from sinkscope.testing import random_plant
from tests.probes.everything import assert_same, tables

TABLES = tables() | {TokenKurtosis(): "pos kurtosis"}
PROBES = list(TABLES)


@pytest.fixture(scope="module")
def edit():
    return ss.MaskKeys("image:0", layers=[0])


@pytest.fixture(scope="module")
def run(tiny, batch, edit):
    lvlm = tiny("llava-clip-llama")
    return lvlm.run(batch(lvlm), PROBES, [edit])


@pytest.fixture
def saved(run, tmp_path):
    return run.save(tmp_path / "made" / "run.safetensors")


@pytest.mark.parametrize("i", range(len(PROBES)), ids=[type(p).__name__ for p in PROBES])
def test_tables_texts_and_pages(run, i):
    result = run[PROBES[i]]
    table = result.to_dataframe()
    assert list(table.columns) == ["batch", "layer", *TABLES[PROBES[i]].split()]
    assert set(table["layer"]) <= set(result.layers)
    assert len(repr(result)) <= 200
    assert repr(result).startswith(f"{type(result).__name__}(")
    assert f"layers 0-{len(result.layers) - 1}" in repr(result) or len(repr(result)) == 200
    page = result._repr_html_()
    assert page.count("<tr") == 1 + min(20, len(table))
    head = [str(value) for value in table.iloc[0, :-1]][:4]
    assert all(f"<td>{value}</td>" in page for value in head if "." not in value)


def test_texts_of_runs_and_detections_are_short(tiny, batch, run, edit):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    found = ss.detect(lvlm, sample, ss.detectors.Norm(5.0))
    generation = lvlm.generate(sample, [ss.TokenNorms()], max_new_tokens=2, min_new_tokens=2)
    for one in (run, run.effects[edit], found, ss.calibrate(lvlm, [sample]), generation):
        assert len(repr(one)) <= 200
        assert one._repr_html_().count("<tr") <= 50
    assert "results {LogitLens, AttentionEntropy, AttentionEntropy_1," in repr(run)
    assert repr(generation).endswith("steps 2 x Run)")
    parts = run.to_dataframe().set_index("part")["content"]
    assert parts["results['LogitLens']"].startswith("LensResult(tokens [batch 2, layer 3,")
    assert parts["effects['MaskKeys']"].startswith("Effect(")


@dataclass(frozen=True, eq=False)
class Every(Result):
    values: Float[Tensor, "batch pos"]
    tensors: tuple[Tensor, ...]
    plain: dict
    note: str = "<b>"


def every(dtype):
    values = torch.tensor([[1.5, float("nan"), float("-inf"), float("inf")]], dtype=dtype)
    mixed = values.isnan(), torch.arange(3), torch.zeros(0, 2), values.expand(3, 4).T
    plain = {
        "nan": float("nan"),
        "least": -float("inf"),
        "layers": range(2, 9, 3),
        "cut": slice(1, None),
    }
    return Every(values, mixed, {**plain, "list": [1, (True, None)], "text": "ä"})


def test_what_is_printed_is_escaped():
    page = every(torch.float32)._repr_html_()
    assert "note &lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("<tr") == 4  # NaN has no line


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_kind_of_value_comes_back(tmp_path, dtype):
    one = every(dtype)
    again = load(one.save(tmp_path / "one.safetensors"))
    assert_same(one, again)
    for tensor, other in zip(one.tensors, again.tensors, strict=True):
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor.nan_to_num().float(), other.nan_to_num().float())
    assert repr(again.plain) == repr(one.plain)
    assert again.note == one.note


def test_a_run_comes_back_bit_for_bit(run, saved, edit):
    again = load_run(saved)
    assert again.names == run.names
    assert run.names[:3] == ("LogitLens", "AttentionEntropy", "AttentionEntropy_1")
    assert torch.equal(again.logits, run.logits)
    for name, probe in zip(run.names, PROBES, strict=True):
        assert run[name] is run[probe]
        assert again[name] is again[probe]
        assert_same(run[probe], again[name], name)
        assert run[probe].to_dataframe().equals(again[name].to_dataframe())
    assert_same(run.effects[edit], again.effects["MaskKeys"])
    assert again.effects["MaskKeys"].sites == run.effects["MaskKeys"].sites
    for key in (ss.TokenNorms([1]), "TokenNorm", [1]):
        with pytest.raises(
            ProbeError, match=r"did not run; expected one of this run's, \['LogitLens'"
        ):
            again[key]
    with pytest.raises(InterventionError, match="Got 'MaskQueries', which did nothing"):
        again.effects["MaskQueries"]
    assert load_file(saved)["results/TokenNorms/norms"].shape == run["TokenNorms"].norms.shape


def test_a_generation_comes_back(tiny, batch, tmp_path):
    lvlm = tiny("qwen2.5-vl")
    gate = ss.LSG.for_model(lvlm, 1, v_detector=ss.detectors.Norm(1.0), allow_noop=True)
    masks = {"some": batch(lvlm).tokens.image >= 0}
    probes = [ss.AttentionMass(masks), ss.AttentionMass({"last": "last"})]
    made = lvlm.generate(batch(lvlm), probes, [gate], max_new_tokens=2, min_new_tokens=2)
    again = load_run(made.save(tmp_path / "run.safetensors"))
    assert torch.equal(again.sequences, made.sequences)
    assert (again.text, [step.step for step in again.steps]) == (made.text, [0, 1])
    for step, other in zip(made.steps, again.steps, strict=True):
        for probe in probes:
            assert_same(step[probe], other[probe])
        assert_same(step.effects[gate], other.effects["LSG"])


def test_a_table_comes_back_with_its_types(tmp_path):
    table = pd.DataFrame(
        {
            "item": [0, 1],
            "image_id": ["a", 7],
            "task": pd.Series(["count", "where"], dtype="str"),
            "given": ["one", None],
            "correct": [True, False],
            "sinks": [0.1 + 0.2, float("nan")],
        }
    )
    made = ss.experiments.Comparison(table, "base")
    found = load(made.save(tmp_path / "made.safetensors"))
    assert type(found) is ss.experiments.Comparison
    assert found.base == "base"
    pd.testing.assert_frame_equal(found.table, table, check_exact=True)


def test_a_loaded_calibration_flags_the_same_tokens(tmp_path):
    planted = random_plant(1, "clip", n_overlap=1)
    lvlm = ss.LVLM(planted.model, planted.processor, verify=False)
    samples = [lvlm.prepare(inputs=planted.inputs(image_seed=i)) for i in (1, 2, 3)]
    made = ss.calibrate(lvlm, samples[:2])
    again = load(made.save(tmp_path / "rules.safetensors"))
    assert again == made
    assert again.to_dataframe().equals(made.to_dataframe())
    for tower, one, other in (
        ("vision", made.v_detector, again.v_detector),
        ("language", made.l_detector, again.l_detector),
    ):
        want = ss.detect(lvlm, samples[2], one, tower=tower)
        assert want.mask.any()
        assert_same(want, ss.detect(lvlm, samples[2], other, tower=tower))
        assert_same(want, load(want.save(tmp_path / tower)))
    limits = ss.detectors.Limits("ratio", (float("inf"), 2.0))
    assert saving.unpack(saving.pack(limits, "", {}), {}) == limits


def flip_last_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rewritten(path, old, new):
    """The same file with another text in its metadata, whole and with its sum."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = file.metadata()["sinkscope"].replace(old, new)
    tensors = load_file(path)
    save_file(tensors, path, {"sinkscope": text, "sha256": saving.digest(text, tensors)})


REFUSED = {
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "cannot be read as safetensors"),
    "cut off early": (
        lambda p: p.write_bytes(p.read_bytes()[:50]),
        "cannot be read as safetensors",
    ),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read as safetensors"),
    "a bit": (flip_last_bit, "damaged or changed"),
    "gone": (lambda p: p.unlink(), "cannot be read as safetensors"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "cannot be read as safetensors"),
    "another file": (
        lambda p: save_file({"x": torch.zeros(1)}, p),
        "holds tensors of something else",
    ),
    "newer": (
        lambda p: rewritten(p, '"format": 1', '"format": 2'),
        "of format 2; expected format 1: update sinkscope",
    ),
    "unknown": (
        lambda p: rewritten(p, '"MassResult"', '"os.system"'),
        "a file with a 'os.system', which is not known here.*Import the module that defines it",
    ),
    "another field": (
        lambda p: rewritten(p, '"layers"', '"blocks"'),
        "cannot be understood .TypeError.*make it again, or update sinkscope",
    ),
    "another record": (
        lambda p: rewritten(p, '"precision": "model"', '"precise": "model"'),
        "cannot be understood .TypeError",
    ),
    "another tensor": (
        lambda p: rewritten(p, '{"tensor": "logits"}', '{"tensor": "logit"}'),
        "cannot be understood .KeyError",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_not_whole_or_not_known_are_refused(saved, case):
    change, message = REFUSED[case]
    change(saved)
    with pytest.raises(CheckpointError, match=f"^Got .*{message}"):
        load(saved)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("went_off"),)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load("run.safetensors")
    torch.save(Bomb(), "run.pt")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load("run.pt")
    assert not Path("went_off").exists()


def test_what_no_file_can_hold_is_named(tiny, batch, tmp_path):
    lvlm = tiny("llava-clip-llama")
    trace = ss.trace_sinks(lvlm, batch(lvlm))
    with pytest.raises(InputError, match="Got sample of type Sample, which no file can hold"):
        trace.save(tmp_path / "trace")
    assert not list(tmp_path.iterdir())


def test_other_results_are_no_run_and_a_place_must_be_one(run, saved, tmp_path):
    one = run["TokenNorms"].save(tmp_path / "norms.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds a NormResult; expected a run. Write .*load\(path\)"
    ):
        load_run(one)
    assert_same(load(one), run["TokenNorms"])
    with pytest.raises(CheckpointError, match="cannot be written"):
        run.save(saved / "below a file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        run.save(tmp_path)


def test_a_file_is_replaced_whole_or_stays(run, saved, monkeypatch):
    def fails(*given):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fails)
    before = saved.read_bytes()
    with pytest.raises(CheckpointError, match="no space left"):
        run["TokenNorms"].save(saved)
    assert saved.read_bytes() == before
    assert load(saved).names == run.names


def test_the_class_of_a_file_is_found_in_a_new_process(saved):
    import subprocess
    import sys

    code = "import sys; from sinkscope.results import load; print(load(sys.argv[1]).names)"
    code = f"import tests.probes.test_results; {code}"  # where the example's probe is imported
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("('LogitLens',")


def test_names_are_told_apart():
    assert results.names_of([1, "int", 2, "x", "x"]) == ("int", "int_1", "int_2", "x", "x_1")

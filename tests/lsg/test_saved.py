"""Files that the version before wrote are read as before."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sinkscope as ss

SAVED = Path(__file__).parent / "saved"
SEEN = json.loads((SAVED / "coefficients.json").read_text())
STATES = torch.linspace(-2, 2, 3 * 64).reshape(3, 64).sin() * 3


@pytest.fixture
def lvlm(tiny):
    return tiny("llava-clip-llama")


def check(gate, folder, coefficients):
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(gate.state_dict()[name], value)
    torch.testing.assert_close(gate(STATES).detach(), torch.tensor(coefficients))
    kept = json.loads((folder / "config.json").read_text())["gate"]
    assert json.loads(json.dumps(gate.config.to_dict())) == kept


def test_a_gate(lvlm, tmp_path):
    gate = ss.LSG.from_pretrained(SAVED / "gate", lvlm=lvlm)
    check(gate, SAVED / "gate", SEEN["gate"][0])
    assert gate.config.v_detector["name"] == "SinkDimensions"
    assert gate.record == json.loads((SAVED / "gate" / "training.json").read_text())
    gate.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "training.json"):
        assert (tmp_path / "again" / name).read_bytes() == (SAVED / "gate" / name).read_bytes()
    made, kept = (
        json.loads((at / "config.json").read_text()) for at in (tmp_path / "again", SAVED / "gate")
    )
    assert len(made.pop("sha256")) == 64  # which came later
    assert made == kept


def test_a_stack(lvlm):
    gates = ss.LSG.load_stack(SAVED / "stack", lvlm=lvlm)
    assert [gate.layer for gate in gates] == ["embed", 0]
    for gate, folder, seen in zip(
        gates, ("gate-00-layer-embed", "gate-01-layer-0"), SEEN["stack"], strict=True
    ):
        check(gate, SAVED / "stack" / folder, seen)
    assert gates[1].record == {"seed": 7}


def test_a_folder_of_the_version_before_is_replaced(lvlm, tmp_path):
    import shutil

    shutil.copytree(SAVED / "stack", tmp_path / "stack")
    gates = ss.LSG.load_stack(tmp_path / "stack", lvlm=lvlm)
    ss.LSG.save_stack(gates[:1], tmp_path / "stack")
    assert len(ss.LSG.load_stack(tmp_path / "stack", lvlm=lvlm)) == 1

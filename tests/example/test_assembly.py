"""What can go wrong while the parts are read and joined; no published weights are needed here."""

from __future__ import annotations

import sys

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import sinkscope as ss
from sinkscope.bundled import bundled_path
from sinkscope.errors import CheckpointError
from sinkscope.example import assembly, load
from sinkscope.example import assembly as language
from sinkscope.example import sources as layout
from sinkscope.example.sources import HUB_LANGUAGE, HUB_VISION


def onnx_bytes(**tensors):
    """An ONNX file with nothing but these tensors."""
    onnx = pytest.importorskip("onnx")
    stored = [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = onnx.helper.make_graph([], "nothing", [], [], initializer=stored)
    return onnx.helper.make_model(graph).SerializeToString()


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            {},
            r"differs from DINOv2-S/14 at \['embeddings.cls_token'.*one tensor .* its 222 weights",
        ),
        ({"backbone.extra": np.zeros(3, np.float32)}, "differs"),
    ],
)
def test_another_graph_is_refused(tensors, says):
    from sinkscope.example.assembly import read_vision

    with pytest.raises(CheckpointError, match=says):
        read_vision(onnx_bytes(**tensors))


def test_the_lora_is_added_at_its_scale():
    """``W + 16 / 8 * B A`` on one matrix of the right size; the others keep their zeros."""

    class Everything(nn.Module):
        """Every path exists and is a matrix of zeros."""

        def __init__(self):
            super().__init__()
            self.made = {}

        def get_submodule(self, path):
            tensors = load_file(layout.LORA)
            a, b = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
            made = self.made.setdefault(path, nn.Linear(a.shape[1], b.shape[0], bias=False))
            nn.init.zeros_(made.weight)
            return made

    model = Everything()
    language.merge_lora(model)
    assert len(model.made) == 30 * 7
    path = "model.layers.3.mlp.gate_proj"
    tensors = load_file(layout.LORA)
    a, b = (tensors[f"base_model.model.{path}.lora_{side}.weight"].double() for side in "AB")
    want = 2.0 * b @ a
    assert want.abs().max() > 1e-3
    assert torch.allclose(model.made[path].weight.double(), want, atol=1e-6)


def test_the_hub_that_cannot_be_asked_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    says = rf"source='hub', but {HUB_LANGUAGE} and {HUB_VISION} could not be loaded .*OSError"
    with (
        pytest.warns(UserWarning, match="this is another model"),
        pytest.raises(CheckpointError, match=says),
    ):
        ss.load_example(source="hub", cache=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_hub_is_asked_for_both_models(monkeypatch, tmp_path):
    asked, written = [], []

    class Part(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.config = transformers.PretrainedConfig()
            self.config._commit_hash = f"commit of {name}"

    def from_pretrained(name, **options):
        asked.append(name)
        return Part(name)

    for kind in ("AutoModelForCausalLM", "AutoTokenizer", "Dinov2Model"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", from_pretrained)
    monkeypatch.setattr(assembly, "_write", lambda *parts: written.append(parts))
    assembly.assemble_from_hub(tmp_path, progress=False)
    assert asked == [HUB_LANGUAGE, HUB_LANGUAGE, HUB_VISION]
    assert written[0][2] == {name: f"commit of {name}" for name in (HUB_LANGUAGE, HUB_VISION)}


@pytest.mark.parametrize(("source", "name"), [(None, "example"), ("hub", "example (hub)")])
def test_the_hub_gives_a_model_of_another_name(monkeypatch, source, name):
    monkeypatch.setattr(load, "example_path", lambda **given: bundled_path())
    assert ss.load_example(source=source).name == name


def test_bars_and_messages_rest_only_while_it_assembles(capsys):
    """With no bar of ours, those of transformers do not show either; afterwards they do again."""
    logging = transformers.utils.logging
    logging.enable_progress_bar()
    before = torch.random.get_rng_state()
    with assembly._steps(progress=False) as step:
        step("one")
        print("hidden", file=sys.stderr)
        assert not logging.is_progress_bar_enabled()
        torch.randn(3)
    print("shown", file=sys.stderr)
    assert logging.is_progress_bar_enabled()
    assert capsys.readouterr().err == "shown\n"
    assert torch.equal(torch.random.get_rng_state(), before)

"""The assembled model is what its parts say: compared with the ONNX graph, the GGUF and training's prompt."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sinkscope as ss
from sinkscope.bundled import TEST_SEEDS, ask, draw_scene
from sinkscope.data.answers import answer_ids
from sinkscope.example import assembly
from sinkscope.example import sources as layout
from sinkscope.example.sources import DINOV2, SMOLLM2, read_member
from tests.real_model import example, example_folder, wheel_folder

LORA_SCALE = 2.0  # alpha / r = 16 / 8
LOADS = """
import socket, sys

def refuse(*args, **options):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import sinkscope as ss

lvlm = ss.load_example(progress=False)
assert not {"gguf", "onnx"} & set(sys.modules), "what reads wheels was imported"
print(lvlm.name, lvlm.verified)
"""


@pytest.fixture(scope="module")
def onnx_model():
    import onnx

    return onnx.load_model_from_string(read_member(wheel_folder() / DINOV2.file, DINOV2))


def between(model, start, outputs):
    """The part of a graph that leads from one tensor to others."""
    from onnx import TensorProto, helper

    needed, kept = set(outputs), []
    for node in reversed(model.graph.node):
        if needed & {*node.output} - {start}:
            kept.insert(0, node)
            needed |= {*node.input}
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        for names in ([start], outputs)
    ]
    graph = helper.make_graph(kept, "part", *ends, initializer=model.graph.initializer)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def test_the_tower_computes_what_the_graph_computes(onnx_model):
    """Twelve blocks, by onnx's own evaluator, on the embeddings of a scene's first tokens."""
    from onnx.reference import ReferenceEvaluator

    lvlm = example()
    outputs = [f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in range(12)]
    start = "/backbone/embeddings/Add_output_0"
    sample = lvlm.prepare(images=draw_scene(TEST_SEEDS[0]).image, text="a")
    with torch.no_grad():
        states = lvlm.module.model.vision_tower.embeddings(sample.inputs["pixel_values"])[:, :9]
        part = ReferenceEvaluator(between(onnx_model, start, outputs))
        want = part.run(None, {start: states.numpy()})
        for layer, theirs in zip(lvlm.anatomy.vision.blocks, want, strict=True):
            states = lvlm.module.get_submodule(layer)(states)
            off = np.abs(states.numpy() - theirs).max()
            assert off < 1e-4 * np.abs(theirs).max(), layer


def test_the_embeddings_are_those_of_the_graph(onnx_model):
    """At 518 pixels, where no position is interpolated: patches by a product, CLS, positions."""
    from onnx import numpy_helper

    values = {i.name: numpy_helper.to_array(i) for i in onnx_model.graph.initializer}
    kernel, bias = (
        values[f"backbone.embeddings.patch_embeddings.projection.{n}"] for n in ("weight", "bias")
    )
    pixels = np.random.default_rng(0).normal(size=(3, 518, 518)).astype(np.float32)
    patches = pixels.reshape(3, 37, 14, 37, 14).transpose(1, 3, 0, 2, 4).reshape(37 * 37, -1)
    made = patches @ kernel.reshape(384, -1).T + bias + values["onnx::Reshape_1962"][0]
    first = values["backbone.embeddings.cls_token"][0] + values["onnx::Concat_1957"][0]
    with torch.no_grad():
        seen = example().module.model.vision_tower.embeddings(torch.from_numpy(pixels)[None])[0]
    assert torch.allclose(seen, torch.from_numpy(np.concatenate([first, made])), atol=1e-4)


def test_the_language_model_is_the_gguf_and_the_lora(tmp_path):
    """Read without transformers, added in float64; the GGUF keeps halves of q and k interleaved."""
    import gguf

    (tmp_path / "model.gguf").write_bytes(read_member(wheel_folder() / SMOLLM2.file, SMOLLM2))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    lora = {name: t.double().numpy() for name, t in load_file(layout.LORA).items()}
    state = example().module.model.language_model.state_dict()
    for layer, ours, theirs, heads in (
        (0, "self_attn.q_proj", "attn_q", 9),
        (29, "self_attn.k_proj", "attn_k", 3),
        (11, "self_attn.v_proj", "attn_v", 0),
        (11, "mlp.down_proj", "ffn_down", 0),
    ):
        base = stored[f"blk.{layer}.{theirs}.weight"].astype(np.float64)
        if heads:
            base = base.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(base.shape)
        path = f"base_model.model.model.layers.{layer}.{ours}"
        a, b = (lora[f"{path}.lora_{side}.weight"] for side in "AB")
        want = torch.from_numpy(base + LORA_SCALE * b @ a)
        assert not torch.allclose(torch.from_numpy(base), want, atol=1e-3), "the LoRA is too small"
        assert torch.allclose(state[f"layers.{layer}.{ours}.weight"].double(), want, atol=1e-6)
    words = torch.from_numpy(stored["token_embd.weight"].copy())
    assert torch.equal(state["embed_tokens.weight"][:-1], words)
    assert torch.allclose(state["embed_tokens.weight"][-1], words.mean(0), atol=1e-6)


def test_the_prompt_is_the_one_of_training():
    """Token by token: what training joined by hand."""
    lvlm, question = example(), "what colour is the background?"

    def ids(text):
        return lvlm.tokenizer(text, add_special_tokens=False)["input_ids"]

    sample = lvlm.prepare(images=draw_scene(TEST_SEEDS[0]).image, text=question)
    end = ids("<|im_end|>\n<|im_start|>assistant\n")
    want = [*ids("<|im_start|>user\n"), *[49152] * 257, *ids("\n"), *ids(question), *end]
    assert sample.tokens.ids[0].tolist() == want
    assert sample.tokens.words[0][:2] == ("<|im_start|>", "user")
    assert sample.inputs["pixel_values"].shape == (1, 3, 224, 224)
    assert sample.tokens.vision.grid.tolist() == [[16, 16]]
    assert (lvlm.anatomy.feeds, lvlm.anatomy.drops) == ((10,), 0)  # CLS goes into the prompt


def test_it_answers_and_describes():
    lvlm, scene = example(), draw_scene(TEST_SEEDS[0])
    asked = [q for q in ask(scene, 0, 8) if q.task in ("background", "colour", "shape")][:3]
    sample = lvlm.prepare(images=[scene.image] * len(asked), text=[q.text for q in asked])
    out = lvlm.generate(sample, max_new_tokens=2)
    assert [answer.strip() for answer in out.text] == [q.answer for q in asked]
    told = out.sequences[:, sample.inputs["input_ids"].shape[1] :].tolist()
    for prompt, ids, question in zip(sample.texts, told, asked, strict=True):
        want = answer_ids(lvlm.tokenizer, prompt, question.answer)  # what generation writes
        assert tuple(ids[: len(want)]) == want
    sample = lvlm.prepare(images=scene.image, text="describe the picture.")
    (said,) = lvlm.generate(sample, max_new_tokens=10).text
    first = scene.objects[0]
    assert said.startswith(f"On a {scene.background} background: a {first.size} {first.colour}")


def test_it_is_loaded_as_it_was_asked_for():
    lvlm = example()
    assert (lvlm.name, lvlm.verified, lvlm.module.training) == ("example", True, False)
    half = ss.load_example("bfloat16", "eager")
    assert half.module.dtype == torch.bfloat16
    assert (half.anatomy.vision.kernel, half.anatomy.language.kernel) == ("eager", "eager")
    model, processor = ss.example.load_example_hf()
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert processor.chat_template == layout.TEMPLATE


def test_after_the_first_time_only_the_cache_is_read(tmp_path):
    """No network, none of the packages that read wheels, and no wheel: another source is not opened."""
    example_folder()
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment["SINKSCOPE_WHEELS"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADS],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "example True\n"


def test_the_folder_says_what_it_was_made_of():
    record = json.loads((example_folder() / assembly.RECORD).read_text())
    assert record["made_of"] == {wheel.requirement: wheel.sha256 for wheel in (SMOLLM2, DINOV2)}


@pytest.mark.slow
def test_assembling_again_gives_the_same_bytes(tmp_path):
    """And draws no random number of the user's."""
    before = torch.random.get_rng_state()
    made = ss.example.example_path(source=wheel_folder(), cache=tmp_path, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    ours, theirs = (
        {path.name: path for path in folder.iterdir()} for folder in (made, example_folder())
    )
    assert made.name == example_folder().name
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].read_bytes() == theirs[name].read_bytes(), name

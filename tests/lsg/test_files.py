"""A gate that was saved is the gate; whatever else lies in a folder is refused, and none of it is run."""

import html
import json
import os
import pickle
import re
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

import sinkscope as ss
from sinkscope.anatomy.discovery import read_anatomy
from sinkscope.errors import CheckpointError, InputError, InterventionError
from sinkscope.lsg.config import BASES, canonical, differences
from sinkscope.models.loading import sizes_of
from sinkscope.testing import TINY, random_image, write_checkpoint

RULE = ss.detectors.Norm(1.0)
refused = partial(pytest.raises, CheckpointError)
FAMILY = "llava-clip-llama"
HERE = Path(__file__).parent


def gate_for(lvlm, layer=1, seed=0, **choices):
    """A gate whose coefficients are far from those of a new one."""
    gate = ss.LSG.for_model(lvlm, layer, v_detector=RULE, hidden=16, seed=seed, **choices)
    with torch.no_grad():
        for tensor in gate.parameters():
            tensor.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return gate


@pytest.fixture
def lvlm(tiny):
    return tiny(FAMILY)


@pytest.fixture
def gate(lvlm):
    return gate_for(lvlm)


@pytest.fixture
def folder(gate, tmp_path):
    gate.save_pretrained(tmp_path / "gate")
    return tmp_path / "gate"


def edit_json(path, **changes):
    """Change values, and leave out the digest, as the error of a digest that does not fit advises."""
    data = {**json.loads(path.read_text()), **changes}
    data.pop("sha256", None)
    path.write_text(json.dumps(data))


def edit_gate(folder, **changes):
    data = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", gate={**data["gate"], **changes})


def edit_tensors(folder, change):
    edit_json(folder / "config.json")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# What is loaded is what was saved


@pytest.mark.filterwarnings("error")  # nothing is said where weights were compared
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"affine": False, "activation": "tanh", "scale": 1.25, "decode": "refresh"},
        {"groups": ("V", "L", "rest"), "l_detector": ss.detectors.SinkDimensions((3, 5), 2.0)},
        {"init": "neutral", "signal": "visual"},
    ],
)
def test_a_loaded_gate_is_the_saved_one(lvlm, tmp_path, choices):
    gate = gate_for(lvlm, "embed" if "affine" in choices else 1, **choices)
    gate.save_pretrained(tmp_path / "gate")
    loaded = ss.LSG.from_pretrained(tmp_path / "gate", lvlm=lvlm)
    assert loaded.config == gate.config
    assert loaded.state_dict().keys() == gate.state_dict().keys()
    for name, value in gate.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    sample = lvlm.prepare(images=random_image(), text="what is it")
    want = lvlm.run(sample, interventions=[gate]).logits
    assert torch.equal(lvlm.run(sample, interventions=[loaded]).logits, want)
    assert not torch.equal(lvlm.run(sample).logits, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_and_saved_as_fp32(folder, gate, tmp_path, dtype):
    edit_tensors(folder, lambda t: t.update({n: v.to(dtype) for n, v in t.items()}))
    loaded = ss.LSG.from_pretrained(folder)
    for name, value in gate.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], value.to(dtype).float())
    loaded.to(dtype).save_pretrained(tmp_path / "half")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_other_types_are_refused(folder, dtype):
    edit_tensors(folder, lambda t: t.update({"outer.bias": t["outer.bias"].to(dtype)}))
    with refused(match=rf"'outer.bias' of .* in {dtype}; expected finite"):
        ss.LSG.from_pretrained(folder)


def test_a_torch_file_is_read_where_there_are_no_safetensors(folder, gate):
    (folder / "model.safetensors").unlink()
    torch.save(gate.state_dict(), folder / "pytorch_model.bin")
    loaded = ss.LSG.from_pretrained(folder, allow_noop=True)
    assert torch.equal(loaded.inner.weight, gate.inner.weight)
    assert loaded.allow_noop
    assert not ss.LSG.from_pretrained(folder).allow_noop


def test_home_is_expanded_and_paths_are_taken(gate, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    gate.save_pretrained("~/mine")
    assert (tmp_path / "mine" / "config.json").is_file()
    assert ss.LSG.from_pretrained("~/mine").config == gate.config
    assert ss.LSG.from_pretrained(tmp_path, subfolder="mine").config == gate.config
    with refused(match=r"/other', which is without config"):
        ss.LSG.from_pretrained(tmp_path, subfolder="other")


# Stacks


def test_a_stack_keeps_its_order(lvlm, tmp_path):
    gates = [gate_for(lvlm, layer, seed) for layer, seed in ((1, 0), ("embed", 1), (1, 2))]
    gates[2].record = {"seed": 7}
    ss.LSG.save_stack(gates, tmp_path / "stack", record={"chosen": "by hand"})
    loaded = ss.LSG.load_stack(tmp_path / "stack", lvlm=lvlm)
    for one, other in zip(gates, loaded, strict=True):
        assert one.config == other.config
        assert torch.equal(one.inner.weight, other.inner.weight)
    assert [gate.record for gate in loaded] == [None, None, {"seed": 7}]
    single = ss.LSG.from_pretrained(tmp_path / "stack", subfolder="gate-01-layer-embed")
    assert torch.equal(single.inner.weight, gates[1].inner.weight)
    card = (tmp_path / "stack" / "README.md").read_text()
    assert "by hand" in card
    assert "[gate-02-layer-1](gate-02-layer-1/README.md) | see its card" in card
    ss.LSG.save_stack(gates[:1], tmp_path / "stack")
    assert len(ss.LSG.load_stack(tmp_path / "stack")) == 1


def test_gate_and_stack_are_told_apart(gate, folder, tmp_path):
    ss.LSG.save_stack([gate], tmp_path / "stack")
    with refused(match=r"Write ss\.LSG\.load_stack"):
        ss.LSG.from_pretrained(tmp_path / "stack")
    with refused(match=r"Write ss\.LSG\.from_pretrained"):
        ss.LSG.load_stack(folder)
    with refused(match="expected a new or empty one"):
        gate.save_pretrained(tmp_path / "stack")
    with pytest.raises(InterventionError, match="expected one LSG or a list"):
        ss.LSG.save_stack([], tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("names", [[], ["../gate"], ["a/b"], "gate", [3], ["gate-00-layer-1"] * 2])
def test_names_in_a_stack_stay_inside(gate, tmp_path, names):
    ss.LSG.save_stack([gate], tmp_path / "stack")
    edit_json(tmp_path / "stack" / "config.json", gates=names)
    with refused(match="expected names of folders beside it"):
        ss.LSG.load_stack(tmp_path / "stack")


# Another model


def load_on(folder, lvlm):
    ss.LSG.from_pretrained(folder, lvlm=lvlm)


def attach_to(folder, lvlm):
    ss.LSG.from_pretrained(folder).attach(lvlm)


def run_on(folder, lvlm):
    sample = lvlm.prepare(images=random_image(112, 84), text="what")
    lvlm.run(sample, interventions=[ss.LSG.from_pretrained(folder)])


@pytest.mark.parametrize("use", [load_on, attach_to, run_on])
def test_another_model_is_refused_with_the_differences(tiny, folder, use):
    said = (
        "(?s)made for another model.*model_type: made for 'llava', found 'qwen2_5_vl'.*"
        "vision_layers: made for 3, found 4"
    )
    with pytest.raises(InterventionError, match=said):
        use(folder, tiny("qwen2.5-vl"))


@pytest.mark.parametrize("use", [load_on, attach_to])
def test_other_weights_are_refused_and_adopted(folder, use):
    model, processor = TINY[FAMILY]()
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1.0)
    other = ss.LVLM(model, processor)
    with pytest.raises(
        InterventionError, match=r"other weights of this architecture.*adopt\(lvlm\)"
    ):
        use(folder, other)
    adopted = ss.LSG.from_pretrained(folder).adopt(other)
    sample = other.prepare(images=random_image(), text="what")
    assert other.run(sample, interventions=[adopted]).logits.isfinite().all()


def test_without_weights_the_gate_loads_and_says_what_was_not_compared(gate, folder, tmp_path):
    write_checkpoint(*TINY[FAMILY](), tmp_path / "model")
    remote = ss.LVLM.from_pretrained(tmp_path / "model", remote=True)
    with pytest.warns(UserWarning, match="weights were not compared: the model has none here"):
        loaded = ss.LSG.from_pretrained(folder, lvlm=remote)
    assert loaded.inner.weight.device.type == "cpu"
    assert torch.equal(loaded.inner.weight, gate.inner.weight)
    edit_gate(folder, weights=[])
    with pytest.warns(UserWarning, match="not compared: the gate knows none"):
        ss.LSG.from_pretrained(folder, lvlm=ss.LVLM.from_pretrained(tmp_path / "model"))


# Names of one model


@pytest.mark.parametrize("name", ["llava", "llava_llama", "LlavaLlamaForCausalLM"])
def test_foreign_names_of_the_type_are_one_model(lvlm, gate, folder, name):
    edit_gate(folder, model={**gate.config.model, "model_type": name})
    assert ss.LSG.from_pretrained(folder, lvlm=lvlm).config == gate.config


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_original_and_converted_llava_are_one_model(size):
    """The table is compared with the anatomy of the real class in its real size, without weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Model

    wide = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40}
    text = LlamaConfig(intermediate_size=11008, vocab_size=32064, **(wide if size == "13b" else {}))
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        model = Model(LlavaConfig(vision_config=vision, text_config=text))
    found = sizes_of(read_anatomy(model))
    for base in (f"liuhaotian/llava-v1.5-{size}", f"llava-hf/llava-1.5-{size}-hf"):
        assert dict(BASES[base]) == found
        assert differences({"base": base}, found) == []
        assert differences({"base": base, "model_type": "llava_llama"}, found) == []
    other = "liuhaotian/llava-v1.5-13b" if size == "7b" else "liuhaotian/llava-v1.5-7b"
    assert any(line.startswith("language_width") for line in differences({"base": other}, found))


def test_an_unknown_base_is_a_difference():
    assert canonical({"base": "me/mine"}) == {"base": "me/mine"}
    assert differences({"base": "me/mine"}, {}) == ["base: made for 'me/mine', found None"]


def test_a_gate_for_a_base_is_refused_on_a_tiny_model(lvlm, folder):
    edit_gate(folder, model={"base": "liuhaotian/llava-v1.5-7b"}, d_model=4096, layer=10)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"inner.weight": torch.zeros(16, 4096)}
    tensors |= {"norm.weight": torch.ones(4096), "norm.bias": torch.zeros(4096)}
    save_file(tensors, folder / "model.safetensors")
    assert ss.LSG.from_pretrained(folder).config.model["feed_layers"] == [22]
    with pytest.raises(InterventionError, match="language_width: made for 4096, found 64"):
        ss.LSG.from_pretrained(folder, lvlm=lvlm)


# Damaged and strange files


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def text(name, content):
    """A damage that replaces a file."""
    return lambda folder: (folder / name).write_bytes(content.encode("latin-1"))


def head(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def choice(**changes):
    return lambda folder: edit_gate(folder, **changes)


def tensors(change):
    return lambda folder: edit_tensors(folder, change)


C, M, T = "config.json", "model.safetensors", "training.json"
NEW = {"sinkscope": "9.1"}
DAMAGE = {
    "truncated": (cut, "damaged or cut off: SafetensorError"),
    "renamed": (
        tensors(lambda t: t.update({"first.weight": t.pop("inner.weight")})),
        r"(?s)inner.weight: expected \(16, 64\), found none.*first.weight: expected none, found \(16",
    ),
    "extra": (tensors(lambda t: t.update(more=torch.zeros(3))), r"more: expected none, found \(3,"),
    "missing": (tensors(lambda t: t.pop("outer.bias")), r"bias: expected \(2,\), found none"),
    "shape": (
        tensors(lambda t: t.update({"inner.weight": t["inner.weight"][:, :-1].contiguous()})),
        r"inner.weight: expected \(16, 64\), found \(16, 63\)",
    ),
    "nan": (
        tensors(lambda t: t.update({"outer.bias": torch.tensor([float("nan"), 0.0])})),
        "'outer.bias' of .* with NaN or infinite",
    ),
    "no tensors": (lambda f: (f / M).unlink(), "without model.safetensors"),
    "no config": (
        lambda f: (f / C).unlink(),
        r"without config.json; expected what gate.save_pretrained\(folder\) wrote",
    ),
    "no json": (text(C, "{"), "cannot be read as JSON"),
    "a list": (text(C, "[]"), "holds a list"),
    "nothing": (text(C, "{}"), "a dict of the format 'None'"),
    "a list as format": (head(format=["x"]), r"of the format \"\['x'\]\""),
    "unknown field": (head(colour="red"), r"unknown fields \['colour'\]"),
    "unknown gate field": (choice(colour="red"), r"impossible: Got .* unknown fields \['colour'\]"),
    "newer": (head(format_version=2, versions=NEW), r"=2 .*'9\.1'}.*; expected 1 to 1, .* Upgrade"),
    "no version": (head(format_version=-5), "format_version=-5 .*; expected 1 to 1"),
    "versions": (head(versions=[1]), r"versions=\[1\] in config.json of .* versions by name"),
    "width": (choice(d_model=65), "impossible: Got d_model=65; expected the model's width, 64"),
    "a layer beyond": (choice(layer=2), "layer=2 for a gate in a decoder of 3 blocks"),
    "group": (choice(groups=["V", "x"]), "impossible: Got groups"),
    "rule": (choice(v_detector={"name": "Shell"}), "the detector 'Shell'"),
    "rule's name": (choice(v_detector={"name": ["Norm"]}), "Got v_detector={'name'"),
    "no model": (choice(model={}), "impossible: Got model={}; expected the fingerprint"),
    "gate is text": (head(gate="V"), "impossible: Got gate='V'; expected its choices, by name"),
    "deep config": (text(C, '{"a":' * 20_000), "config.json', which cannot .*RecursionError"),
    "deep record": (text(T, "[" * 100_000), "training.json', which cannot .*RecursionError"),
    "a record without names": (
        text(T, "[1, 2]"),
        "training.json', which holds a list; expected a tr",
    ),
    "large": (choice(hidden=10**13), r"expected \(10000000000000, 64\)"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_said(folder, case):
    damage, message = DAMAGE[case]
    damage(folder)
    with refused(match=message):
        ss.LSG.from_pretrained(folder)


CHANNELS = {"name": "SinkDimensions", "tau": 2.0, "normalize": "none"}
WRONG_FIELDS = {
    "layer": [-1, True, 1.0, None],
    "d_model": [64.0, 0, True, "64"],
    "hidden": [0.5, 0, -1, True, None],
    "scale": [float("inf"), float("nan"), -1.0, 0, True, "2", 10**400],
    "seed": ["a", 1.5, 2**80, -(2**70), None],
    "affine": ["no", "false", 1, None],
    "weights": [["a"] * 32, [float("nan")], 3, None, {"a": 1}],
    "model": [[1], "llava", None],
    "groups": [["rest", "V"], 3],
    "v_detector.tau": [
        {"name": "Norm", "tau": tau} for tau in (float("nan"), 0, "valley", 10**400, True)
    ],
    "v_detector.dims": [{**CHANNELS, "dims": dims} for dims in ([48], [-1], [1.0], [], 5)],
    "v_detector.strict": [{"name": "Norm", "tau": 1.0, "strict": "no"}],
    "v_detector.normalize": [{**CHANNELS, "dims": [1], "normalize": "l2"}],
    "v_detector.absolute": [{"name": "Massive", "absolute": -1.0}],
    "v_detector.ratio": [{"name": "Massive", "ratio": float("inf")}],
    "v_detector.seed": [{"name": "RandomTokens", "count": 3, "seed": 0.5}],
    "v_detector.reason": [{"name": "NoSinks", "reason": 3}],
    "v_detector.gap": [{"name": "Norm", "tau": 1.0, "gap": float("nan")}],
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_every_field_has_its_type(gate, folder, name):
    """In memory every wrong value is refused, and in a file the first of them."""
    head, _, part = name.partition(".")
    for value in WRONG_FIELDS[name]:
        made = tuple(value) if head in ("weights", "groups") and isinstance(value, list) else value
        with pytest.raises(InterventionError, match=rf"^Got {head}.*{part}=.*; expected "):
            replace(gate.config, **{head: made})
    edit_gate(folder, **{head: WRONG_FIELDS[name][0]})
    said = rf"^config.json of '{folder}' is impossible: Got {head}.*{part}="
    with refused(match=said):
        ss.LSG.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("language_layers", float("inf")),
        ("feed_layers", []),
        ("heads", None),
        ("model_type", ["llava"]),
    ],
)
def test_every_size_of_the_model_has_its_type(gate, folder, name, value):
    edit_gate(folder, model={**gate.config.model, name: value})
    with refused(match=rf"is impossible: Got model\['{name}'\]="):
        ss.LSG.from_pretrained(folder)


def test_a_rule_for_l_sinks_is_held_to_the_decoder(lvlm):
    low = {**CHANNELS, "dims": [63]}
    choices = {"groups": ("V", "L", "rest"), "l_detector": ss.lsg.detector_of(low)}
    assert gate_for(lvlm, **choices).config.l_detector["dims"] == [63]  # the ViT has 48
    with pytest.raises(InterventionError, match=r"l_detector.dims=\[64\]; expected .* below 64"):
        gate_for(lvlm, **{**choices, "l_detector": ss.lsg.detector_of({**low, "dims": [64]})})


def test_a_neutral_gate_is_neutral(lvlm, gate):
    """The word means coefficients of 1, however a config was made."""
    neutral = ss.LSG.for_model(lvlm, 1, v_detector=RULE, init="neutral")
    assert neutral(torch.randn(3, 64)).detach().equal(torch.ones(3, 2))
    with pytest.raises(InterventionError, match=r"init='neutral' and scale=1; expected scale=2"):
        replace(gate.config, init="neutral")


@pytest.mark.parametrize("name", ["d_model", "weights", "model"])
def test_what_the_model_says_is_no_choice(lvlm, name):
    with pytest.raises(InterventionError, match=rf"Got \['{name}'\] for a gate; expected fields"):
        ss.LSG.for_model(lvlm, 1, v_detector=RULE, **{name: 3})


STRANGE = {
    "meta": lambda: torch.empty(2, device="meta"),
    "sparse": lambda: torch.ones(2).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2)]),
    "expanded": lambda: torch.zeros(1).expand(2),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning", "ignore:TypedStorage")
@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_without_numbers_of_their_own_are_refused(gate, folder, kind):
    (folder / "model.safetensors").unlink()
    torch.save({**gate.state_dict(), "outer.bias": STRANGE[kind]()}, folder / "pytorch_model.bin")
    with refused(match=r"pytorch_model.bin', in which \['outer.bias'\] hold"):
        ss.LSG.from_pretrained(folder)


def test_dictionaries_within_dictionaries_end(folder):
    (folder / "model.safetensors").unlink()
    path, deep = folder / "pytorch_model.bin", 5000
    torch.save({}, path)
    with zipfile.ZipFile(path) as made:
        parts = {name: made.read(name) for name in made.namelist()}
    pickled = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * deep + b"}" + b"s" * deep + b"."
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            file.writestr(name, pickled if name.endswith("data.pkl") else content)
    with refused(match=r"pytorch_model\.bin', whose dictionaries are nested"):
        ss.LSG.from_pretrained(folder)


def test_a_whole_model_is_no_gate(tmp_path):
    write_checkpoint(*TINY[FAMILY](), tmp_path / "model")
    with refused(match=r"a checkpoint of a whole model \('llava'\)"):
        ss.LSG.from_pretrained(tmp_path / "model")


def test_released_files_point_to_the_importer(tmp_path):
    (tmp_path / "sink_cfg.json").write_text("{}")
    with refused(match=r"Write ss\.lsg\.import_gates\(folder, lvlm\)"):
        ss.LSG.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./none", "~/none", Path("none"), "none", "a/b/c"]
)
def test_a_path_that_is_not_there(name):
    with refused(match="which is nothing that exists; expected the folder"):
        ss.LSG.from_pretrained(name)


def test_a_file_is_no_folder(folder):
    with refused(match="which is a file"):
        ss.LSG.from_pretrained(folder / "config.json")
    with refused(match="Got '3', which is of type int"):
        ss.LSG.from_pretrained(3)


# No code of a file is run


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("layout", ["torch", "plain pickle", "legacy"])
def test_a_pickle_bomb_does_not_go_off(folder, tmp_path, monkeypatch, layout, forced):
    if forced:  # torch's switch for unsafe loading
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target = tmp_path / "went-off"
    (folder / "model.safetensors").unlink()
    path, content = folder / "pytorch_model.bin", {"inner.weight": Bomb(target)}
    if layout == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "torch")
    with refused(match="Nothing of it was run"):
        ss.LSG.from_pretrained(folder)
    assert not target.exists()
    torch.load(path, weights_only=False) if layout != "plain pickle" else pickle.loads(
        path.read_bytes()
    )
    assert target.exists()  # it is a bomb


def test_a_pickle_under_the_name_of_safetensors_is_not_unpickled(folder, tmp_path):
    target = tmp_path / "went-off"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(target)))
    with refused(match="damaged or cut off"):
        ss.LSG.from_pretrained(folder)
    assert not target.exists()


# Writing


def test_nothing_else_is_overwritten(gate, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with refused(match=r"holds \['thesis.tex'\]; expected a new or empty"):
        gate.save_pretrained(tmp_path / "mine")
    with refused(match="which is a file; expected a folder"):
        gate.save_pretrained(tmp_path / "mine" / "thesis.tex")
    write_checkpoint(*TINY[FAMILY](), tmp_path / "model")
    with refused(match=r"holds \[.*'config.json'"):
        gate.save_pretrained(tmp_path / "model")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]


def test_a_gate_replaces_a_gate(lvlm, gate, folder, tmp_path):
    other = gate_for(lvlm, "embed", seed=5)
    other.save_pretrained(folder, record={"seed": 5})
    other.save_pretrained(folder)
    assert ss.LSG.from_pretrained(folder).config == other.config
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    (tmp_path / "empty").mkdir()
    gate.save_pretrained(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "gate"]
    (folder / "notes.txt").write_text("mine")
    with refused(match=r"holds \['notes.txt'\]"):
        gate.save_pretrained(folder)


@pytest.mark.parametrize("moment", ["fill", "rename"])
def test_a_failure_leaves_what_was_there(lvlm, gate, folder, tmp_path, monkeypatch, moment):
    if moment == "fill":

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    else:
        real = Path.rename

        def refuse(self, target):
            if self.parent.suffix == ".tmp" and self.name == "config.json":  # the last move
                raise OSError("renaming failed")
            return real(self, target)

        monkeypatch.setattr(Path, "rename", refuse)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with refused(match="What was there is still there"):
        gate_for(lvlm, "embed").save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert ss.LSG.from_pretrained(folder).config == gate.config
    assert [path.name for path in tmp_path.iterdir()] == ["gate"]


def under(folder):
    """Every file and folder, with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def note(folder):
    (folder / "notes.txt").write_text("mine")


def checkpoints(folder):
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-1").write_text("mine")


def named_like_ours(folder):
    (folder / "training.json").mkdir()
    (folder / "training.json" / "keep").write_text("mine")


def linked(folder):
    (folder / "training.json").symlink_to(folder / "config.json")


FOREIGN = {
    "a note": (note, "notes.txt"),
    "a folder": (checkpoints, "checkpoints"),
    "a folder named like a file of ours": (named_like_ours, "training.json"),
    "a link": (linked, "training.json"),
}


@pytest.mark.parametrize(
    ("within", "case"),
    [*((None, case) for case in FOREIGN), ("", "a note"), ("gate-00-layer-1", "a folder")],
)
def test_a_folder_with_something_else_in_it_is_not_overwritten(gate, tmp_path, case, within):
    """A gate (None), a stack, and a gate in a stack."""
    put, name = FOREIGN[case]
    save = gate.save_pretrained if within is None else partial(ss.LSG.save_stack, [gate])
    save(tmp_path / "ours")
    put(tmp_path / "ours" / (within or ""))
    before = under(tmp_path)
    said = f"{within}/{name}" if within else name
    with refused(match=rf"^Got the folder .* holds \['{said}'\]; expected"):
        save(tmp_path / "ours")
    assert under(tmp_path) == before


@pytest.mark.parametrize("name", ["my_thesis", "gate-00-layer-1"])
def test_what_a_config_lists_is_not_ours_for_that(gate, tmp_path, name):
    """The names in a file that anybody may have written do not say what may vanish."""
    stack = tmp_path / "stack"
    ss.LSG.save_stack([gate], stack)
    (stack / "gate-00-layer-1").rename(stack / "gate-01-layer-1")
    (stack / name).mkdir()
    (stack / name / "config.json").write_text("{}")
    (stack / name / "model.safetensors").write_bytes(b"mine")
    edit_json(stack / "config.json", gates=[name, "gate-01-layer-1", 3, ["x"]])
    before = under(tmp_path)
    with refused(match=rf"which holds \['{name}"):
        ss.LSG.save_stack([gate], stack)
    assert under(tmp_path) == before


@pytest.mark.parametrize("full", [False, True])
def test_the_working_directory_stays(lvlm, gate, tmp_path, monkeypatch, full):
    """The folder is written into, not replaced: who works in it is not left in a deleted one."""
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("here").mkdir()
    monkeypatch.chdir("here")
    if full:
        gate_for(lvlm, "embed").save_pretrained(".", record={"seed": 1})
    gate.save_pretrained(".")
    assert Path.cwd() == tmp_path / "here"
    assert sorted(os.listdir()) == ["README.md", "config.json", "model.safetensors"]
    assert ss.LSG.from_pretrained(".").config == gate.config
    assert os.listdir(tmp_path) == ["here"]


def test_a_broken_gate_is_not_saved(gate, tmp_path):
    with torch.no_grad():
        gate.inner.weight[0, 0] = float("inf")
    with refused(match=r"NaN or infinite numbers in \['inner.weight'\]"):
        gate.save_pretrained(tmp_path / "gate")
    assert not (tmp_path / "gate").exists()


# Cards


def test_the_card_of_a_new_gate_says_untrained(lvlm, folder, tmp_path):
    new = ss.LSG.for_model(lvlm, 1, v_detector=RULE, scale=1.25)
    new.save_pretrained(tmp_path / "new")
    card = (tmp_path / "new" / "README.md").read_text()
    assert "**Untrained.** Its last layer is zero, so every coefficient is 0.625." in card
    assert "**Not recorded.**" in (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {
        "library_name": "sinkscope",
        "tags": ["attention-sinks", "layer-wise-sink-gating"],
    }


def test_the_card_tells_the_record_and_it_stays_with_the_gate(gate, folder, tmp_path):
    record = {
        "base_model": "llava-hf/llava-1.5-7b-hf",
        "samples": 640,
        "settings": {"lr": torch.tensor(1e-3), "layers": (1,), "dtype": torch.bfloat16},
        "losses": [3.0 - 0.01 * step for step in range(100)],
        "history": [{"step": 0, "loss": 3.0}, {"step": 1, "loss": float("nan")}],
        "note": "a | b\n<script>",
        "nothing": [],
    }
    gate.save_pretrained(folder, record=record)
    card = (folder / "README.md").read_text()
    for line in (
        "| samples | 640 |",
        "| settings.lr | 0.001 |",
        "| settings.dtype | torch.bfloat16 |",
        "| losses | 100 values: first 3, last 2.01, smallest 2.01, largest 3 |",
        "| history | 2 entries, the last: step 1, loss nan |",
        "| note | a \\| b &lt;script&gt; |",
        "| nothing | none |",
    ):
        assert line in card, line
    assert "ntrained" not in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "llava-hf/llava-1.5-7b-hf"
    loaded = ss.LSG.from_pretrained(folder)
    assert loaded.record["losses"] == record["losses"]
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card


def test_nothing_in_a_card_runs_or_leads_elsewhere(gate, folder):
    """A record and its names are shown as they are; only the card's own link and its base model are links."""
    bad = "[paper](javascript:alert(1)) <a href=javascript:e()>x</a> ![p](https://a.b/c) `x`"
    record = {
        "base_model": bad,
        "note": bad,
        bad: 1,
        "gates": [bad, bad],
        "link": "https://a.b/c_d",
    }
    gate.save_pretrained(folder, record=record)
    card = (folder / "README.md").read_text()
    head, body = card.split("---", 2)[1:]
    assert "base_model" not in yaml.safe_load(head)
    reader = MarkdownIt("commonmark", {"html": True}).enable("table")
    reader.validateLink = lambda url: True
    page = reader.render(body)
    assert re.findall(r'href="([^"]*)"', page) == ["https://arxiv.org/abs/2604.03316"]
    assert "<img" not in page
    assert page.count(html.escape(bad)) == 5, "two values, a name, and two of a list"
    assert "<td>https://a.b/c_d</td>" in page


@pytest.mark.parametrize(
    ("record", "message"),
    [(3, "a record of type int"), ({"a": [object()]}, r"record\['a'\]\[0\] of type object")],
)
def test_records_are_plain(gate, tmp_path, record, message):
    with pytest.raises(InputError, match=message):
        gate.save_pretrained(tmp_path / "gate", record=record)
    assert not (tmp_path / "gate").exists()

"""Gates of a format we have not seen: every layout here is one that this file made up.

Each is written from known tensors; the imported gate is compared with the formula, in plain PyTorch,
on those tensors.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sinkscope as ss
from sinkscope.errors import CheckpointError, InterventionError, LayerError
from sinkscope.lsg.importing import Settings, find_gates
from sinkscope.testing import random_image

WIDTH, HIDDEN = 64, 16
RULE = ss.detectors.Norm(1.0)


@pytest.fixture
def lvlm(tiny):
    return tiny("llava-clip-llama")


class Planted:
    """A gate's tensors in fp16, and what it computes."""

    def __init__(self, seed=0, groups=2, hidden=HIDDEN, biases=True, affine=True):
        draw = torch.Generator().manual_seed(seed)

        def drawn(*shape):
            return (torch.randn(*shape, generator=draw) * 0.5).half()

        self.tensors = {"inner.weight": drawn(hidden, WIDTH), "outer.weight": drawn(groups, hidden)}
        if biases:
            self.tensors |= {"inner.bias": drawn(hidden), "outer.bias": drawn(groups)}
        if affine:
            self.tensors |= {"norm.weight": drawn(WIDTH), "norm.bias": drawn(WIDTH)}

    def named(self, **names):
        """The tensors under other names: ``inner_weight="..."``."""
        return {names[role.replace(".", "_")]: value for role, value in self.tensors.items()}

    def placed(self, prefix, norm="norm", inner="mlp.0", outer="mlp.2"):
        """The tensors under a prefix, modules named so."""
        parts = {"norm": norm, "inner": inner, "outer": outer}
        out = {}
        for role, value in self.tensors.items():
            part, _, kind = role.partition(".")
            out[f"{prefix}{parts[part]}.{kind}"] = value
        return out

    def __call__(self, states, activation=torch.nn.functional.gelu, scale=1.0):
        t = {name: value.float() for name, value in self.tensors.items()}
        h = torch.nn.functional.layer_norm(
            states, (WIDTH,), t.get("norm.weight"), t.get("norm.bias")
        )
        h = activation(torch.nn.functional.linear(h, t["inner.weight"], t.get("inner.bias")))
        h = torch.nn.functional.linear(h, t["outer.weight"], t.get("outer.bias"))
        return scale * h.softmax(-1)


@pytest.fixture
def write(tmp_path):
    def writes(tensors, settings=None, name="non_lora_trainables.bin"):
        if name.endswith("safetensors"):
            save_file(tensors, tmp_path / name)
        else:
            torch.save(tensors, tmp_path / name)
        if settings is not None:
            (tmp_path / "sink_cfg.json").write_text(json.dumps(settings))
        return tmp_path

    return writes


def same(gate, planted, **formula):
    states = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9)) * 3
    with torch.no_grad():
        found = gate(states)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, planted(states, **formula), atol=1e-6, rtol=1e-6)


PEFT = "base_model.model.model.layers.1.gate."
BESIDE = {
    "base_model.model.model.mm_projector.0.weight": torch.zeros(WIDTH, 48),
    "base_model.model.model.mm_projector.0.bias": torch.zeros(WIDTH),
    "base_model.model.model.mm_projector.2.weight": torch.zeros(WIDTH, WIDTH),
    "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": torch.zeros(8, WIDTH),
    "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": torch.zeros(WIDTH, 8),
    "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, WIDTH),
    "base_model.model.model.embed_tokens.weight": torch.zeros(8, WIDTH),
    "base_model.model.lm_head.weight": torch.zeros(2, 8),
}

LAYOUTS = {
    "peft": lambda p: p.placed(PEFT),
    "peft beside others": lambda p: {**BESIDE, **p.placed(PEFT)},
    "sequential": lambda p: p.placed("layers.1.sink_gate.", "0", "1", "3"),
    "bare sequential": lambda p: p.placed("gate.", "0", "1", "3"),
    "fc": lambda p: p.placed("model.layers.1.lsg.", "ln", "fc1", "fc2"),
    "no prefix": lambda p: p.placed("", "norm", "fc1", "fc2"),
    "underscores": lambda p: {
        f"gate_{name.replace('.', '_')}": value
        for name, value in p.placed("", "ln", "fc1", "fc2").items()
    },
    "letters": lambda p: p.named(
        norm_weight="gate.gamma",
        norm_bias="gate.beta",
        inner_weight="gate.w1",
        inner_bias="gate.b1",
        outer_weight="gate.w2",
        outer_bias="gate.b2",
    ),
    "nested": lambda p: {"state_dict": p.placed("gate."), "step": 3},
    "nested under the name of the file": lambda p: {"non_lora_trainables": p.placed(PEFT)},
    "a name with others in it": lambda p: p.placed("lora_free.sink_embeddings.gate."),
    "modules to save": lambda p: {
        **p.placed("layers.1.gate.modules_to_save.default."),
        **Planted(seed=8).placed("layers.1.gate.original_module."),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_gate_in_many_layouts(lvlm, write, layout, capsys):
    planted = Planted()
    folder = write(LAYOUTS[layout](planted), {"layer": 1})
    found = ss.lsg.import_gates(folder, lvlm, v_detector=RULE)
    (gate,) = found.gates
    assert (gate.layer, gate.groups) == (1, ("V", "rest"))
    assert {value.dtype for value in gate.state_dict().values()} == {torch.float32}
    same(gate, planted)
    shown = capsys.readouterr().out
    assert shown.strip() == str(found)
    assert sum(" -> " in line and "float16" in line for line in shown.splitlines()) == 6
    sample = lvlm.prepare(images=random_image(), text="what")
    lvlm.run(sample, interventions=[gate])


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("hidden", [HIDDEN, WIDTH])
def test_what_a_file_lacks_is_neutral_and_said(lvlm, write, biases, affine, hidden):
    planted = Planted(biases=biases, affine=affine, hidden=hidden)
    found = ss.lsg.import_gates(write(planted.placed(PEFT)), lvlm, v_detector=RULE, show=False)
    same(found.gates[0], planted)
    said = "\n".join(found.assumed)
    assert ("inner.bias is not in the file: 0" in said) == (not biases)
    assert ("no tensor of a LayerNorm" in said) == (not affine)
    assert ("the rows of the square matrix" in said) == (hidden == WIDTH)
    assert "there is no sink_cfg.json" in said


def test_matrices_the_other_way_round(lvlm, write):
    planted = Planted()
    turned = {n: v.T.contiguous() if v.ndim == 2 else v for n, v in planted.placed(PEFT).items()}
    found = ss.lsg.import_gates(write(turned), lvlm, v_detector=RULE, show=False)
    same(found.gates[0], planted)
    assert sum("(transposed)" in use for _, use in found.matched) == 2


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "non_lora_trainables.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_and_file_kinds(lvlm, write, name, dtype):
    planted = Planted()
    planted.tensors = {role: value.to(dtype) for role, value in planted.tensors.items()}
    found = ss.lsg.import_gates(
        write(planted.placed(PEFT), name=name), lvlm, v_detector=RULE, show=False
    )
    same(found.gates[0], planted)


# Stacks

STACKS = {
    "by layer": (lambda n, place: f"model.layers.{n}.gate.", {}),
    "by layer, all said": (lambda n, place: f"model.layers.{n}.gate.", {"layers": [0, 1]}),
    "gates of a list": (lambda n, place: f"gates.{place}.", {"gate_layers": [0, 1]}),
    "gates by layer": (lambda n, place: f"gates.{n + 5}.", {"layers": [0, 1]}),
    "glued": (lambda n, place: f"L{n}_", {}),
}


@pytest.mark.parametrize("layout", STACKS)
def test_several_gates_of_one_file(lvlm, write, layout):
    prefix, settings = STACKS[layout]
    gates = [Planted(seed=3), Planted(seed=4)]
    tensors = {}
    for place, one in reversed(list(enumerate(gates))):
        tensors |= one.placed(prefix(place, place))
    found = ss.lsg.import_gates(write(tensors, settings), lvlm, v_detector=RULE, show=False)
    assert [gate.layer for gate in found.gates] == [0, 1]
    for gate, planted in zip(found.gates, gates, strict=True):
        same(gate, planted)


def test_parts_in_lists_of_their_own(lvlm, write):
    """``fc1.0``, ``fc1.1``: the number stands at the end of a part's name."""
    gates = [Planted(seed=3), Planted(seed=4)]
    tensors = {}
    for place, one in enumerate(gates):
        tensors |= one.placed("", f"norm.{place}", f"fc1.{place}", f"fc2.{place}")
    found = ss.lsg.import_gates(write(tensors), lvlm, layer=[0, 1], v_detector=RULE, show=False)
    for gate, planted in zip(found.gates, gates, strict=True):
        same(gate, planted)


def test_the_stack_of_the_paper_by_shape():
    """Five gates of width 4096, in half precision, as large as the release is said to be."""
    tensors = {}
    for layer in (3, 6, 7, 10, 19):
        prefix = f"base_model.model.model.layers.{layer}.gate."
        tensors |= {
            f"{prefix}mlp.0.weight": torch.zeros(64, 4096),
            f"{prefix}mlp.0.bias": torch.zeros(64),
            f"{prefix}mlp.2.weight": torch.zeros(2, 64),
            f"{prefix}mlp.2.bias": torch.zeros(2),
        }
    matches, left = find_gates(tensors, 4096, ())
    assert [match.number for match in matches] == [3, 6, 7, 10, 19]
    assert not left
    assert sum(value.numel() for value in tensors.values()) == 5 * 262_338


# Layers


@pytest.mark.parametrize("base", [0, 1])
def test_the_file_may_count_from_one(lvlm, write, base):
    tensors = Planted().placed(f"model.layers.{base}.gate.")
    for settings in ({}, {"layer": base}, {"gate": {"layer_idx": str(base)}}):
        found = ss.lsg.import_gates(
            write(tensors, settings), lvlm, index_base=base, v_detector=RULE, show=False
        )
        assert found.gates[0].layer == 0


def test_a_layer_that_is_given_counts_from_zero_and_outweighs_the_file(lvlm, write):
    folder = write(Planted().placed("model.layers.9.gate."), {"layer": 9})
    found = ss.lsg.import_gates(folder, lvlm, layer=1, index_base=1, v_detector=RULE, show=False)
    assert found.gates[0].layer == 1
    assert "layers [1] as asked, though names say [9]" in found.assumed
    with pytest.raises(LayerError, match="layer=9 for a gate in a decoder of 3 blocks"):
        ss.lsg.import_gates(folder, lvlm, v_detector=RULE, show=False)


WRONG_LAYERS = {
    "none": ("gate.", {}, {}, r"numbers \[None\] and no layer in sink_cfg.json"),
    "a place or a layer": ("gates.0.", {}, {}, r"numbers \[0\] and no layer .* Write layer=\[0\]"),
    "two readings": (
        "gate.",
        {"read_layer": 0, "edit_layer": 1},
        {},
        r"several readings of layers .*'read_layer': \[0\], 'edit_layer': \[1\]",
    ),
    "names differ": (
        "model.layers.1.gate.",
        {"layer": 0},
        {},
        r"1 gates with the numbers \[1\] and the layers \[0\] in sink_cfg.json .*: by their names the "
        r"gates are of the layers \[1\], by the order of the settings of \[0\]; .* Write layer=\[1\] or "
        r"layer=\[0\], or another index_base than 0",
    ),
    "too many": ("gate.", {"layers": [0, 1]}, {}, r"1 gates .* the layers \[0, 1\]"),
}


@pytest.mark.parametrize("case", WRONG_LAYERS)
def test_layers_are_never_guessed(lvlm, write, case):
    prefix, settings, options, message = WRONG_LAYERS[case]
    folder = write(Planted().placed(prefix), settings)
    with pytest.raises(CheckpointError, match=message):
        ss.lsg.import_gates(folder, lvlm, v_detector=RULE, show=False, **options)


def two(prefix, first=0):
    """Two gates whose numbers count from ``first``, and their tensors, the later one first."""
    gates = [Planted(seed=3), Planted(seed=4)]
    tensors = {}
    for place in (1, 0):
        tensors |= gates[place].placed(prefix.format(first + place))
    return gates, tensors


ORDERED = {
    "asked": ("lsg.gates.{}.", {}, {"layer": [1, 0]}),
    "asked, against the file": ("lsg.gates.{}.", {"layers": [0, 1]}, {"layer": [1, 0]}),
    "asked, against the names": ("layers.{}.gate.", {}, {"layer": [1, 0]}),
    "asked, as a tuple": ("lsg.gates.{}.", {}, {"layer": (1, 0)}),
    "said by the file": ("lsg.gates.{}.", {"layers": [1, 0]}, {}),
    "said by the file, from one": ("lsg.gates.{}.", {"layers": [2, 1]}, {"index_base": 1}),
}


@pytest.mark.parametrize("case", ORDERED)
def test_layers_are_of_the_gates_in_the_order_that_is_given(lvlm, write, case):
    prefix, settings, options = ORDERED[case]
    gates, tensors = two(prefix)
    found = ss.lsg.import_gates(
        write(tensors, settings), lvlm, v_detector=RULE, show=False, **options
    )
    assert [gate.layer for gate in found.gates] == [0, 1]
    for gate, planted in zip(found.gates, reversed(gates), strict=True):
        same(gate, planted)
    said = (
        "layers [1, 0] as asked, though names say [0, 1]"
        if case == "asked, against the names"
        else "gates in the order [0, 1] are of the layers [1, 0]"
    )
    assert said in found.assumed


CONTRADICTIONS = {
    "names by layer": ("layers.{}.gate.", 0, [1, 0], {}, r"layers \[0, 1\], .* of \[1, 0\]"),
    "from one": ("layers.{}.gate.", 1, [2, 1], {"index_base": 1}, r"\[0, 1\], .* of \[1, 0\]"),
    "numbers that are layers": ("gates.{}.", 1, [2, 1], {}, r"\[1, 2\], .* of \[2, 1\]"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_file_that_contradicts_itself_is_refused_with_both_readings(lvlm, write, case):
    prefix, first, layers, options, readings = CONTRADICTIONS[case]
    folder = write(two(prefix, first)[1], {"layers": layers})
    with pytest.raises(CheckpointError, match="by their names the gates are of the .*" + readings):
        ss.lsg.import_gates(folder, lvlm, v_detector=RULE, show=False, **options)


def test_each_gate_has_a_layer_of_its_own(lvlm, write):
    folder = write(two("lsg.gates.{}.")[1], {"layers": [1, 1]})
    for options in ({}, {"layer": [1, 1]}):
        with pytest.raises(CheckpointError, match=r"layers \[1, 1\] for the gates .* another one"):
            ss.lsg.import_gates(folder, lvlm, v_detector=RULE, show=False, **options)


def test_gates_without_numbers_have_no_order(lvlm, write):
    tensors = Planted(seed=3).placed("red.gate.") | Planted(seed=4).placed("blue.gate.")
    with pytest.raises(CheckpointError, match=r"numbers \[None, None\] .* which gate comes first"):
        ss.lsg.import_gates(write(tensors), lvlm, layer=[0, 1], v_detector=RULE, show=False)


def test_the_embeddings_are_a_layer(lvlm, write):
    planted = Planted()
    folder = write(planted.placed("gate."))
    found = ss.lsg.import_gates(folder, lvlm, layer="embed", v_detector=RULE, show=False)
    assert found.gates[0].layer == "embed"
    same(found.gates[0], planted)
    both = write(two("gates.{}.")[1])
    found = ss.lsg.import_gates(both, lvlm, layer=[1, "embed"], v_detector=RULE, show=False)
    assert [gate.layer for gate in found.gates] == ["embed", 1]
    with pytest.raises(LayerError, match="layer='last' for a gate"):
        ss.lsg.import_gates(folder, lvlm, layer=["last", 0], v_detector=RULE, show=False)


# Settings


def test_settings_are_read_and_the_rest_is_listed(lvlm, write):
    settings = {
        "sink": {"vit_sink_dims": [5], "vit_tau": 2.5, "llm_sink_dims": [3, 7], "llm_tau": 20},
        "gate_layer": 1,
        "activation": "nn.ReLU()",
        "prior": 1.25,
        "num_layers": 3,
        "num_groups": 2,
        "base_model": "someone/model",
    }
    planted = Planted()
    found = ss.lsg.import_gates(write(planted.placed("gate."), settings), lvlm, show=False)
    (gate,) = found.gates
    assert gate.config.v_detector == {
        "name": "SinkDimensions",
        "dims": [5],
        "tau": 2.5,
        "normalize": "none",
        "strict": False,
    }
    same(gate, planted, activation=torch.relu, scale=1.25)
    matched = dict(found.matched)
    assert matched["sink_cfg.json: prior"] == "scale"
    assert matched["sink_cfg.json: base_model"] == "a model unknown to us, not checked"
    assert "sink_cfg.json: sink.llm_tau" in found.ignored
    assert "sink_cfg.json: num_layers" in found.ignored
    assert "the file's prior or scale, 1.25, multiplies the softmax" in found.assumed
    assert "signal is 'last'" in found.assumed


def test_arguments_outweigh_the_file(lvlm, write):
    settings = {"layer": 1, "activation": "relu", "prior": 1.25, "groups": ["v_sink", "rest"]}
    planted = Planted()
    found = ss.lsg.import_gates(
        write(planted.placed("gate."), settings),
        lvlm,
        activation="silu",
        scale=2.0,
        decode="off",
        signal="mean",
        groups=("rest", "V"),
        v_detector=RULE,
        show=False,
    )
    (gate,) = found.gates
    assert (gate.config.decode, gate.config.signal) == ("off", "mean")
    assert gate.config.v_detector["name"] == "Norm"
    assert gate.groups == ("V", "rest")
    states = torch.randn(2, WIDTH)
    want = planted(states, torch.nn.functional.silu, 2.0)[:, [1, 0]]
    torch.testing.assert_close(gate(states).detach(), want, atol=1e-6, rtol=1e-6)
    assert {f"sink_cfg.json: {name}" for name in ("activation", "prior", "groups")} <= set(
        found.ignored
    )


def test_three_groups_in_the_order_of_the_file(lvlm, write):
    planted = Planted(groups=3)
    folder = write(planted.placed("gate."), {"layer": 1, "groups": ["rest", "v_sink", "l_sink"]})
    low = ss.detectors.SinkDimensions((3,), 2.0)
    (gate,) = ss.lsg.import_gates(folder, lvlm, v_detector=RULE, l_detector=low, show=False).gates
    assert gate.groups == ("V", "L", "rest")
    states = torch.randn(2, WIDTH)
    torch.testing.assert_close(
        gate(states).detach(), planted(states)[:, [1, 2, 0]], atol=1e-6, rtol=1e-6
    )


def test_half_a_rule_is_no_rule(lvlm, write):
    folder = write(Planted().placed("gate."), {"layer": 1, "sink_dims": [5]})
    found = ss.lsg.import_gates(folder, lvlm, show=False)
    assert found.gates[0].config.v_detector == ss.LSG.for_model(lvlm, 1).config.v_detector
    assert "sink_cfg.json: sink_dims" in found.ignored
    assert any("the rule is that of LSG.for_model" in one for one in found.assumed)


WRONG_SETTINGS = {
    "two thresholds": (
        {"tau": 1.0, "sink_threshold": 2.0, "sink_dims": [5]},
        {},
        r"several readings of vision tau .*'tau': 1.0, 'sink_threshold': 2.0",
    ),
    "groups": ({"groups": ["red", "rest"]}, {}, "a group 'red' in sink_cfg.json"),
    "their number": ({"num_groups": 3}, {}, "3 groups in sink_cfg.json and 2 coefficients"),
    "names": ({}, {"groups": ("V", "L", "rest")}, "and 2 coefficients; expected a name for each"),
    "two of one name": (
        {"gate": {"prior": 1.0}, "gate.prior": 2.0},
        {},
        r"several values called \['gate.prior'\] in sink_cfg.json",
    ),
    "no names": ([1], {}, "a list in .*expected settings by name"),
    "activation": (
        {"activation": "leaky_relu"},
        {},
        r"{'activation': 'leaky_relu'} in sink_cfg.json, read as activation; expected one of .*'gelu'.* "
        r"Write activation=..., or ignore=\('activation',\)",
    ),
    "another gelu": ({"hidden_act": "gelu_new"}, {}, "read as activation"),
    "signal": ({"signal": "mean"}, {}, "read as signal; expected 'last'.* signal='visual'"),
    "pool": ({"pool": "mean"}, {}, "{'pool': 'mean'} in sink_cfg.json, read as signal"),
    "temperature": (
        {"temperature": 2.0},
        {},
        "read as temperature; expected 1: a gate here has none",
    ),
    "priors": ({"prior": [0.5, 0.5]}, {}, "read as scale; expected a positive number"),
    "no prior": ({"prior": 0}, {}, "read as scale; expected a positive number"),
    "endless prior": ({"prior": float("nan")}, {}, "read as scale; expected a positive number"),
    "layer": ({"layer": "L1"}, {}, "{'layer': 'L1'} in sink_cfg.json, read as layers"),
    "half a layer": ({"layer": 1.5}, {}, "read as layers; expected whole numbers"),
    "where it acts": (
        {"layer": None, "edit_layer": 1},
        {},
        r"\['edit_layer'\] in sink_cfg.json, the layers where gates act; .* Write layer=",
    ),
    "channel": (
        {"vit_sink_dims": [48], "tau": 2.0},
        {},
        "read as vision sink dims; expected channels",
    ),
    "channel before": ({"sink_dims": [-1], "tau": 2.0}, {}, "read as vision sink dims"),
    "tau": ({"sink_dims": [5], "vit_tau": "high"}, {}, "read as vision tau; expected a number"),
    "groups by number": ({"groups": 2.5}, {}, "read as groups; expected names, or their number"),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_settings_are_never_guessed(lvlm, write, case):
    settings, options, message = WRONG_SETTINGS[case]
    settings = {"layer": 1, **settings} if isinstance(settings, dict) else settings
    folder = write(Planted().placed("gate."), settings)
    with pytest.raises(CheckpointError, match=message):
        ss.lsg.import_gates(folder, lvlm, show=False, **options)


@pytest.mark.parametrize(
    "strange",
    [
        {"init_scale": 0.02, "lr_scale": 10, "loss_scale": 128},
        {"gate_mlp_layers": 1, "mlp_layers": 2, "layers_total": 32},
        {"activation_checkpointing": True, "impact": "relu"},
        {"group_by_length": True, "early_stopping_threshold": 0.01, "mlp_dims": [16], "taut": 2.0},
        {"vision": {"layer": 0, "hidden_act": "quick_gelu"}, "text_config": {"hidden_act": "silu"}},
        {"layer_norm_eps": 1e-6, "temperature": 1.0, "pool": "last_token"},
    ],
)
def test_a_word_in_a_longer_key_is_no_setting(lvlm, write, strange):
    planted = Planted()
    folder = write(planted.placed("gate."), {"layer": 1, **strange})
    found = ss.lsg.import_gates(folder, lvlm, v_detector=RULE, show=False)
    assert found.gates[0].layer == 1
    same(found.gates[0], planted)
    known = {"temperature", "pool"}
    lists = {f"sink_cfg.json: {key}" for key in Settings(strange).values if key not in known}
    assert set(found.ignored) == lists


def test_keys_are_cut_into_words(lvlm, write):
    settings = {
        "gateLayer": 1,
        "SINK_DIMS": {"v": [5], "l": [41, 33]},
        "tau": {"vit": 2.5, "llm": 20},
    }
    found = ss.lsg.import_gates(write(Planted().placed("gate."), settings), lvlm, show=False)
    rule = found.gates[0].config.v_detector
    assert (rule["dims"], rule["tau"]) == ([5], 2.5)
    assert set(found.ignored) == {"sink_cfg.json: SINK_DIMS.l", "sink_cfg.json: tau.llm"}


def test_a_setting_that_cannot_be_read_is_settled_by_an_argument(lvlm, write):
    planted = Planted()
    settings = {"layer": 1, "activation": "leaky_relu", "pool": "mean", "prior": [1, 1]}
    folder = write(planted.placed("gate."), settings)
    choices = {"activation": "relu", "signal": "visual", "scale": 2.0}
    found = ss.lsg.import_gates(folder, lvlm, v_detector=RULE, show=False, **choices)
    same(found.gates[0], planted, activation=torch.relu, scale=2.0)
    assert found.gates[0].config.signal == "visual"
    left = ("activation", "pool", "prior")
    found = ss.lsg.import_gates(folder, lvlm, v_detector=RULE, show=False, ignore=left)
    same(found.gates[0], planted)
    assert set(found.ignored) == {f"sink_cfg.json: {key}" for key in left}


def test_a_known_base_must_be_this_model(lvlm, write):
    folder = write(
        Planted().placed("gate."), {"layer": 1, "base_model": "liuhaotian/llava-v1.5-7b"}
    )
    with pytest.raises(InterventionError, match=r"(?s)gates for 'liuhaotian.*language_width"):
        ss.lsg.import_gates(folder, lvlm, show=False)


# Tensors that could be read twice


NESTED = {
    **Planted().placed("gate."),
    "gate": {"mlp": {"0": {"weight": torch.zeros(HIDDEN, WIDTH)}}},
}
WRONG_TENSORS = {
    "two of one name": (
        NESTED,
        r"several tensors are called \['gate.mlp.0.weight'\] once nested names are joined",
    ),
    "nothing": (
        BESIDE,
        r"(?s)Got no gate; expected a matrix \[hidden, 64\].*mm_projector.0.weight",
    ),
    "two last layers": (
        {**Planted().placed("gate."), "gate.mlp.4.weight": torch.zeros(3, HIDDEN)},
        r"several candidates for the last layer of gate.mlp.0.weight: gate.mlp.2.weight \(2, 16\), "
        r"gate.mlp.4.weight \(3, 16\)",
    ),
    "two norms": (
        {**Planted().placed("gate."), "gate.ln.weight": torch.zeros(WIDTH)},
        r"several candidates for norm.weight .*gate.norm.weight \(64,\), gate.ln.weight \(64,\)",
    ),
    "something else in the gate": (
        {**Planted().placed("gate."), "gate.temperature": torch.ones(1)},
        r"tensors inside a gate that have no place in it: gate.temperature \(1,\)",
    ),
    "four groups": (
        {"gate.0.weight": torch.zeros(HIDDEN, WIDTH), "gate.2.weight": torch.zeros(4, HIDDEN)},
        "Got no gate",
    ),
    "different groups": (
        {
            **Planted().placed("layers.0.gate."),
            **Planted(groups=3).placed("layers.1.gate."),
        },
        r"gates with \[2, 3\] coefficients in one file",
    ),
    "not finite": (
        {
            **Planted().placed("layers.1.gate."),
            "layers.1.gate.mlp.2.bias": torch.full((2,), torch.nan),
        },
        "NaN or infinite",
    ),
    "whole numbers": (
        {**Planted().placed("layers.1.gate."), "layers.1.gate.mlp.2.bias": torch.ones(2).long()},
        r"in torch.int64; expected one of",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_are_never_guessed(lvlm, write, case):
    tensors, message = WRONG_TENSORS[case]
    with pytest.raises(CheckpointError, match=message):
        ss.lsg.import_gates(write(tensors, {"layer": 1} if "layers" not in next(iter(tensors)) else {}), lvlm, v_detector=RULE, show=False)  # fmt: skip


def test_names_and_ignored_parts_settle_it(lvlm, write):
    planted = Planted()
    twice = {
        **planted.placed("gate."),
        "gate.mlp.4.weight": torch.zeros(3, HIDDEN),
        "gate.temperature": torch.ones(1),
    }
    folder = write(twice, {"layer": 1})
    ignored = ss.lsg.import_gates(
        folder, lvlm, ignore=("mlp.4", "temperature"), v_detector=RULE, show=False
    )
    same(ignored.gates[0], planted)
    assert set(ignored.ignored) == {"gate.mlp.4.weight", "gate.temperature"}
    names = {role: f"gate.{role}" for role in ("norm.weight", "norm.bias")}
    names |= {"inner.weight": "gate.mlp.0.weight", "outer.weight": "gate.mlp.2.weight"}
    names |= {"inner.bias": "gate.mlp.0.bias", "outer.bias": "gate.mlp.2.bias"}
    named = ss.lsg.import_gates(folder, lvlm, tensors=names, v_detector=RULE, show=False)
    same(named.gates[0], planted)
    swapped = {**names, "inner.weight": "gate.mlp.4.weight"}
    with pytest.raises(CheckpointError, match="tensors that make no gate of a decoder of width 64"):
        ss.lsg.import_gates(folder, lvlm, tensors=swapped, v_detector=RULE, show=False)
    with pytest.raises(CheckpointError, match=r"unknown \['first', 'nothing'\] and without"):
        ss.lsg.import_gates(folder, lvlm, tensors={"first": "nothing"}, v_detector=RULE, show=False)


# Files


def test_files_that_are_not_there_or_not_whole(lvlm, write, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"without non_lora_trainables.bin; expected it there"
    ):
        ss.lsg.import_gates(tmp_path, lvlm)
    folder = write(Planted().placed("gate."), {"layer": 1})
    with pytest.raises(InterventionError, match="index_base=2; expected 0 or 1"):
        ss.lsg.import_gates(folder, lvlm, index_base=2)
    path = folder / "non_lora_trainables.bin"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        ss.lsg.import_gates(folder, lvlm)
    torch.save(torch.zeros(3), path)
    with pytest.raises(CheckpointError, match="holds a Tensor; expected tensors by name"):
        ss.lsg.import_gates(folder, lvlm)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_bomb_among_tensors_does_not_go_off(lvlm, write, tmp_path):
    folder = write({**Planted().placed("gate."), "note": Bomb(tmp_path / "went-off")})
    with pytest.raises(CheckpointError, match="Nothing of it was run"):
        ss.lsg.import_gates(folder, lvlm)
    assert not (tmp_path / "went-off").exists()


def test_an_imported_gate_is_saved_and_loaded(lvlm, write, tmp_path):
    (gate,) = ss.lsg.import_gates(
        write(Planted().placed("gate."), {"layer": 1}), lvlm, v_detector=RULE, show=False
    ).gates
    gate.save_pretrained(tmp_path / "ours")
    loaded = ss.LSG.from_pretrained(tmp_path / "ours", lvlm=lvlm)
    assert torch.equal(loaded.outer.weight, gate.outer.weight)

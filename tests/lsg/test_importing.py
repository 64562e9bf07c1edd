"""Gates of a format we have not seen: every layout here is made up.

Each is written from known tensors; the imported gate is compared with the formula, in plain PyTorch,
on those tensors.
"""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

import sinkscope as ss
from sinkscope.errors import CheckpointError, InterventionError, LayerError

WIDTH, HIDDEN = 64, 16
RULE = ss.detectors.Norm(1.0)
CHOICES = {"groups": ("V", "rest"), "activation": "gelu", "scale": 1.0, "signal": "last"}
refused = partial(pytest.raises, CheckpointError)
load = partial(ss.lsg.import_gates, show=False, v_detector=RULE)


@pytest.fixture
def lvlm(tiny):
    return tiny("llava-clip-llama")


class Planted:
    """A gate's tensors in fp16, and what it computes."""

    def __init__(self, seed=0, groups=2, hidden=HIDDEN, biases=True, affine=True):
        draw = torch.Generator().manual_seed(seed)
        shapes = {"inner.weight": (hidden, WIDTH), "outer.weight": (groups, hidden)}
        shapes |= {"inner.bias": (hidden,), "outer.bias": (groups,)} if biases else {}
        shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)} if affine else {}
        self.tensors = {k: (torch.randn(s, generator=draw) * 0.5).half() for k, s in shapes.items()}

    def placed(self, prefix="layers.1.gate.", norm="norm.", inner="mlp.0.", outer="mlp.2."):
        """The tensors under a prefix, modules named so."""
        parts = {"norm": norm, "inner": inner, "outer": outer}
        named = {role: role.partition(".") for role in self.tensors}
        return {
            f"{prefix}{parts[part]}{kind}": self.tensors[role]
            for role, (part, _, kind) in named.items()
        }

    def __call__(self, states, activation=torch.nn.functional.gelu, scale=1.0):
        t = {name: value.float() for name, value in self.tensors.items()}
        norm = (t.get("norm.weight"), t.get("norm.bias"))
        h = torch.nn.functional.layer_norm(states, (WIDTH,), *norm)
        h = activation(torch.nn.functional.linear(h, t["inner.weight"], t.get("inner.bias")))
        h = torch.nn.functional.linear(h, t["outer.weight"], t.get("outer.bias"))
        return scale * h.softmax(-1)


@pytest.fixture
def write(tmp_path):
    def writes(tensors, settings=None, name="non_lora_trainables.bin"):
        save = save_file if name.endswith("safetensors") else torch.save
        save(tensors, tmp_path / name)
        if settings is not None:
            (tmp_path / "sink_cfg.json").write_text(json.dumps(settings))
        return tmp_path

    return writes


def same(gate, planted, order=slice(None), **formula):
    states = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9)) * 3
    found = gate(states).detach()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, planted(states, **formula)[:, order], atol=1e-6, rtol=1e-6)


PEFT = "base_model.model.model.layers.1.gate."
BESIDE = {
    "base_model.model.model.mm_projector.0.bias": torch.zeros(WIDTH),
    "base_model.model.model.mm_projector.2.weight": torch.zeros(WIDTH, WIDTH),
    "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, WIDTH),
    "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": torch.zeros(WIDTH, 8),
    "base_model.model.lm_head.weight": torch.zeros(2, 8),
}
LETTERS = {"norm.weight": "gamma", "norm.bias": "beta", "inner.weight": "w1", "inner.bias": "b1"}
LETTERS |= {"outer.weight": "w2", "outer.bias": "b2"}
LAYOUTS = {
    "peft beside others": lambda p: {**BESIDE, **p.placed(PEFT)},
    "sequential": lambda p: p.placed("layers.1.sink_gate.", "0.", "1.", "3."),
    "underscores": lambda p: p.placed("layer_1_gate_", "ln_", "fc1_", "fc2_"),
    "letters": lambda p: {f"h.1.gate.{LETTERS[role]}": one for role, one in p.tensors.items()},
    "nested": lambda p: {"non_lora_trainables": p.placed(PEFT), "step": 3},
    "a list inside": lambda p: p.placed("layers.1.gate.", "layers.0.", "layers.1.", "layers.3."),
    "modules to save": lambda p: {
        **p.placed("layers.1.gate.modules_to_save.default."),
        **Planted(seed=8).placed("layers.1.gate.original_module."),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_gate_in_many_layouts(lvlm, write, layout, capsys):
    planted = Planted()
    found = load(write(LAYOUTS[layout](planted)), lvlm, show=True)
    (gate,) = found.gates
    assert (gate.layer, gate.groups) == (1, ("V", "rest"))
    same(gate, planted)
    shown = capsys.readouterr().out
    assert shown.strip() == str(found)
    assert sum(" -> " in line and "float16" in line for line in shown.splitlines()) == 6


@pytest.mark.parametrize(
    ("biases", "affine", "hidden"),
    [(False, True, HIDDEN), (True, False, HIDDEN), (False, False, WIDTH), (True, True, WIDTH)],
)
def test_what_a_file_lacks_is_neutral_and_said(lvlm, write, biases, affine, hidden):
    planted = Planted(biases=biases, affine=affine, hidden=hidden)
    found = load(write(planted.placed()), lvlm)
    same(found.gates[0], planted)
    said = "\n".join(found.assumed)
    assert ("inner.bias is not in the file: 0" in said) == (not biases)
    assert ("no tensor of a LayerNorm" in said) == (not affine)
    assert ("the rows of the square matrix" in said) == (hidden == WIDTH)
    assert "activation is 'gelu'" in said


def test_matrices_the_other_way_round_and_other_types(lvlm, write):
    planted = Planted()
    planted.tensors = {role: value.bfloat16() for role, value in planted.tensors.items()}
    turned = {
        name: (value.T.contiguous() if value.ndim == 2 else value)
        for name, value in planted.placed().items()
    }
    found = load(write(turned, name="non_lora_trainables.safetensors"), lvlm)
    same(found.gates[0], planted)
    assert sum("(transposed)" in use for _, use in found.matched) == 2


# Several gates and their layers


def two(prefix, first=0):
    """Two gates whose numbers count from ``first``, and their tensors, the later one first."""
    gates = [Planted(seed=3), Planted(seed=4)]
    return gates, {
        **gates[1].placed(prefix.format(first + 1)),
        **gates[0].placed(prefix.format(first)),
    }


STACKS = {  # prefix, the first number, options, whether the layers are in the other order
    "by layer": ("model.layers.{}.gate.", 0, {}, False),
    "from one": ("model.layers.{}.gate.", 1, {"index_base": 1}, False),
    "glued": ("L{}_", 0, {}, False),
    "asked": ("lsg.gates.{}.", 9, {"layer": (0, 1)}, False),
    "asked in another order": ("lsg.gates.{}.", 9, {"layer": [1, 0]}, True),
    "asked, against the names": ("layers.{}.gate.", 0, {"layer": [1, 0]}, True),
}


@pytest.mark.parametrize("case", STACKS)
def test_several_gates_of_one_file(lvlm, write, case):
    prefix, first, options, turned = STACKS[case]
    gates, tensors = two(prefix, first)
    found = load(write(tensors), lvlm, **options)
    assert [gate.layer for gate in found.gates] == [0, 1]
    for gate, planted in zip(found.gates, gates[::-1] if turned else gates, strict=True):
        same(gate, planted)
    against = "layers [1, 0] as asked, though names say [0, 1]" in found.assumed
    assert against == (case == "asked, against the names")
    assert any(one.startswith("gates in the order") for one in found.assumed) == ("gates" in prefix)


def test_parts_in_lists_of_their_own(lvlm, write):
    """``fc1.0``, ``fc1.1``: the number stands at the end of a part's name."""
    gates = [Planted(seed=3), Planted(seed=4)]
    tensors = {}
    for place, one in enumerate(gates):
        tensors |= one.placed("", f"norm.{place}.", f"fc1.{place}.", f"fc2.{place}.")
    found = load(write(tensors), lvlm, layer=["embed", 1])
    assert [gate.layer for gate in found.gates] == ["embed", 1]
    for gate, planted in zip(found.gates, gates, strict=True):
        same(gate, planted)


WRONG_LAYERS = {
    "none": (Planted().placed("gate."), {}, CheckpointError, r"layers \[\] for.*Write layer=\[0\]"),
    "places": (two("gates.{}.")[1], {}, CheckpointError, r"layers \[\] for.*layer=\[0, 1\]"),
    "too many": (
        Planted().placed(),
        {"layer": [0, 1]},
        CheckpointError,
        r"the layers \[0, 1\] for",
    ),
    "twice": (two("gates.{}.")[1], {"layer": [1, 1]}, CheckpointError, "one of its own for each"),
    "beyond": (Planted().placed("layers.9.gate."), {}, LayerError, "layer=9 for a gate"),
    "below": (Planted().placed("layers.0.gate."), {"index_base": 1}, LayerError, "layer=-1 for"),
    "a word": (Planted().placed(), {"layer": "last"}, LayerError, "layer='last' for a gate"),
    "base": (
        Planted().placed(),
        {"index_base": 2},
        InterventionError,
        "index_base=2; expected one",
    ),
    "no numbers": (
        Planted().placed("red.gate.") | Planted(4).placed("blue.gate."),
        {"layer": [0, 1]},
        CheckpointError,
        "several candidates for two matrices: red",
    ),
}


@pytest.mark.parametrize("case", WRONG_LAYERS)
def test_layers_are_never_guessed(lvlm, write, case):
    tensors, options, error, message = WRONG_LAYERS[case]
    with pytest.raises(error, match=message):
        load(write(tensors), lvlm, **options)


# Settings


SETTINGS = {"gate": {"layer": 1, "activation": "relu"}, "prior": 1.25}


def test_settings_are_not_read_and_every_choice_must_be_given(lvlm, write):
    planted = Planted()
    folder = write(planted.placed(), SETTINGS)
    with pytest.raises(CheckpointError, match="relu") as caught:
        load(folder, lvlm, v_detector=None)
    assert (
        "Write layer=..., groups=..., activation=..., scale=..., signal=..., v_detector=..."
        in str(caught.value)
    )
    given = {**CHOICES, "activation": "relu", "scale": 1.25}
    for name in given:
        with refused(match=rf"without \['{name}'\]"):
            load(folder, lvlm, layer=1, **{**given, name: None})
    found = load(folder, lvlm, layer=1, **given)
    same(found.gates[0], planted, activation=torch.relu, scale=1.25)
    assert "sink_cfg.json: gate.activation = 'relu'" in found.ignored
    ignoring = load(folder, lvlm, ignore=("gate.", "prior"), tensors=names_of(planted))
    same(ignoring.gates[0], planted)


def test_choices_and_the_order_of_groups_are_those_given(lvlm, write):
    planted = Planted(groups=3)
    low = ss.detectors.SinkDimensions((3,), 2.0)
    choices = {"groups": ("rest", "V", "L"), "decode": "off", "signal": "mean", "scale": 2.0}
    (gate,) = load(write(planted.placed()), lvlm, l_detector=low, **choices).gates
    assert (gate.config.decode, gate.config.signal) == ("off", "mean")
    assert gate.groups == ("V", "L", "rest")
    same(gate, planted, order=[1, 2, 0], scale=2.0)
    with refused(match="and 3 coefficients; expected as many names"):
        load(write(planted.placed()), lvlm, groups=("V", "rest"))


def test_without_a_rule_it_is_that_of_a_new_gate(lvlm, write):
    found = load(write(Planted().placed()), lvlm, v_detector=None)
    assert found.gates[0].config.v_detector == ss.LSG.for_model(lvlm, 1).config.v_detector
    assert "the rule for V-sinks is that of LSG.for_model" in found.assumed


def test_a_known_base_must_be_this_model(lvlm, write):
    folder = write(Planted().placed(), {"base_model": "liuhaotian/llava-v1.5-7b"})
    with pytest.raises(InterventionError, match=r"(?s)gates for 'liuhaotian.*language_width"):
        load(folder, lvlm, layer=1, **CHOICES)


# Tensors that could be read twice


def names_of(planted, prefix="layers.1.gate."):
    parts = {"norm": "norm.", "inner": "mlp.0.", "outer": "mlp.2."}
    named = {role: role.partition(".") for role in planted.tensors}
    return {role: f"{prefix}{parts[part]}{kind}" for role, (part, _, kind) in named.items()}


G = "layers.1.gate."
GATE = Planted().placed()
WRONG_TENSORS = {
    "nothing": (BESIDE, r"(?s)Got no gate; expected matrices \[hidden, 64\].*The file holds"),
    "four groups": (Planted(groups=4).placed(), "Got no gate"),
    "two last layers": ({**GATE, f"{G}4.weight": torch.zeros(3, HIDDEN)}, "candidates for two"),
    "two norms": ({**GATE, f"{G}ln.weight": torch.zeros(WIDTH)}, r"several the same: .*ln.weight"),
    "two biases": ({**GATE, f"{G}mlp.0.b": torch.zeros(HIDDEN)}, r"several the same: .*mlp.0.b "),
    "another vector": ({**GATE, f"{G}query": torch.zeros(WIDTH)}, r"no place .*query \(64,\)"),
    "temperature": (
        {**GATE, f"{G}temperature": torch.ones(1)},
        r"no place in a gate.*: .*temperature",
    ),
    "outside": ({**GATE, "other.weight": torch.ones(7)}, r"no place in a gate.*: other.weight"),
    "different groups": (
        {**Planted().placed("layers.0.gate."), **Planted(groups=3).placed("layers.1.gate.")},
        r"gates with \[2, 3\] coefficients; expected matr",
    ),
    "two of one name": (
        {**GATE, "layers": {"1": {"gate": {"mlp.0.bias": torch.zeros(HIDDEN)}}}},
        r"several tensors are called \['layers.1.gate.mlp.0.bias'\]",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_are_never_guessed(lvlm, write, case):
    tensors, message = WRONG_TENSORS[case]
    with refused(match=message):
        load(write(tensors), lvlm)


def test_names_and_ignored_parts_settle_it(lvlm, write):
    planted = Planted()
    more = {f"{G}mlp.4.weight": torch.zeros(3, HIDDEN), f"{G}temperature": torch.ones(1)}
    folder = write({**planted.placed(), **more})
    ignored = load(folder, lvlm, ignore=("mlp.4", "temperature"))
    same(ignored.gates[0], planted)
    assert set(ignored.ignored) == set(more)
    names = names_of(planted)
    named = load(folder, lvlm, tensors=names)
    same(named.gates[0], planted)
    assert set(named.ignored) == set(more)
    for name in ("mlp.4.weight", "mlp.2.bias", "temperature"):
        with refused(match=r"for inner.weight of a gate; expected the|without the matrices"):
            load(folder, lvlm, tensors={**names, "inner.weight": f"{G}{name}"})
    with refused(match=r"unknown \['first', 'nothing'\] and without"):
        load(folder, lvlm, tensors={"first": "nothing"})


# Files


def test_files_that_are_not_there_or_not_whole(lvlm, write, tmp_path):
    with refused(match=r"without non_lora_trainables.bin; expected it"):
        load(tmp_path, lvlm)
    folder = write(Planted().placed(), [1])
    with refused(match=r"a list in sink_cfg.json; expected a dict"):
        load(folder, lvlm)
    (folder / "sink_cfg.json").unlink()
    torch.save(torch.zeros(3), folder / "non_lora_trainables.bin")
    with refused(match="holds a Tensor; expected tensors by name"):
        load(folder, lvlm)

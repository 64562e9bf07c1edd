"""Where a model keeps its parts: found by what they are, checked, and refused by name."""

import dataclasses
import re
from collections.abc import Callable

import nnsight
import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sinkscope as ss
from sinkscope.anatomy.attention_call import (
    AttentionCall,
    NoAttentionCall,
    calls_attention,
    forward_tree,
    read_attention_call,
)
from sinkscope.anatomy.discovery import read_anatomy
from sinkscope.errors import AttentionCallError, ModelError, ProbeError
from sinkscope.probes import Read
from sinkscope.testing import TINY, random_image, tiny_llava, tiny_qwen2_5_vl

FAMILIES = tuple(TINY)


def eager(module, query, key, value, attention_mask, **kwargs):
    return value, None


class Once(nn.Module):
    """The usual form."""

    def forward(self, x):
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager)
        out, _ = attention_interface(self, x, x, x, None)
        return out


class OtherName(nn.Module):
    """The variable's name is somebody else's choice."""

    def forward(self, x):
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager)
        return attend(self, x, x, x, None)[0]


class PerWindow(nn.Module):
    """One call per window."""

    def forward(self, windows):
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager)
        return [attend(self, w, w, w, None)[0] for w in windows]


class Twice(nn.Module):
    """Self- and cross-attention in one module."""

    def forward(self, x, y):
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager)
        return attend(self, x, x, x, None)[0] + attend(self, x, y, y, None)[0]


class ByHand(nn.Module):
    """Attention that never asks the interface; like a CLIP attention otherwise."""

    def __init__(self, like):
        super().__init__()
        self.q_proj, self.k_proj = like.q_proj, like.k_proj
        self.v_proj, self.out_proj = like.v_proj, like.out_proj
        self.heads = like.num_heads

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:2], self.heads, -1)
        q, k, v = (
            proj(hidden_states).reshape(shape).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
        out = (weights @ v).transpose(1, 2).reshape(hidden_states.shape)
        return self.out_proj(out), None


@pytest.mark.parametrize(
    ("module", "bind", "call", "fires"),
    [
        (Once, "attention_interface_0", "attention_interface_1", "once"),
        (OtherName, "attend_0", "attend_1", "once"),
        (PerWindow, "attend_0", "attend_1", "per window"),
    ],
)
def test_the_call_is_found_in_the_source(module, bind, call, fires):
    assert calls_attention(module())
    assert read_attention_call(module(), "here") == AttentionCall(bind, call, fires)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (nn.Linear(2, 2), "here .Linear. does not call attention"),
        (Twice(), "here .Twice. has 2 attention calls .* expected exactly one"),
    ],
)
def test_what_is_not_one_call_is_refused_by_name(module, says):
    assert re.match(says, read_attention_call(module, "here").reason)


def test_a_forward_without_source_is_refused():
    made = type("Made", (nn.Module,), {"forward": eval("lambda self, x: x")})
    assert forward_tree(made.forward) is None
    reason = read_attention_call(made(), "here").reason
    assert reason.startswith("here (Made) does not call attention")


@pytest.mark.parametrize("kernel", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_of_every_family_has_its_call(family, kernel):
    """Flash is set on the config object only: its kernel is not here, its branch in the source is."""
    module, _ = TINY[family]()
    for part in module.modules():
        if hasattr(getattr(part, "config", None), "_attn_implementation"):
            part.config._attn_implementation = kernel
    anatomy = ss.LVLM(module).anatomy
    for tower in (anatomy.vision, anatomy.language):
        assert tower.attending == tuple(range(tower.n_layers))
        assert tower.kernel == kernel
    windows = anatomy.vision.packed and kernel != "flash_attention_2"
    assert {call.fires for call in anatomy.vision.calls} == {"per window" if windows else "once"}
    assert {call.fires for call in anatomy.language.calls} == {"once"}


def test_the_label_of_the_call_depends_on_the_kernel():
    """Under flash the packed tower calls once in another branch, hence under another label."""
    labels = {}
    for kernel in ("sdpa", "flash_attention_2"):
        module, _ = tiny_qwen2_5_vl()
        module.config.vision_config._attn_implementation = kernel
        labels[kernel] = {call.call for call in ss.LVLM(module).anatomy.vision.calls}
    assert labels == {
        "sdpa": {"attention_interface_2"},
        "flash_attention_2": {"attention_interface_1"},
    }


@pytest.mark.parametrize(
    "probe",
    [
        ss.ReceivedAttention(),
        ss.AttentionPatterns(),
        ss.AttentionMass({"a": "image"}, precision="float32"),
    ],
)
def test_flash_kernels_have_no_fp32_and_say_so(tiny, probe):
    module, processor = tiny_llava()
    lvlm = ss.LVLM(module, processor)
    sample = lvlm.prepare(images=random_image(), text="what")
    module.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ProbeError, match=r"computes in half precision only.*set_attn_implementation"
    ):
        lvlm.run(sample, [probe])


def test_the_binding_is_the_function_and_the_call_has_the_tensors():
    """`..._0` is no call, though it reads without error; what is read is checked to be callable."""
    module, processor = tiny_llava()
    lvlm = ss.LVLM(module, processor, verify=False)
    sample = lvlm.prepare(images=random_image(), text="what")
    found = lvlm.anatomy.language.call(0)
    model = nnsight.NNsight(module)
    with model.trace(**sample.inputs):
        source = model.model.language_model.layers[0].self_attn.source
        function = nnsight.save(getattr(source, found.bind).output)
        inputs = nnsight.save(getattr(source, found.call).inputs)
    assert function is ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert [tuple(x.shape[1:]) for x in inputs[0][1:4]] == [
        (heads, sample.tokens.ids.shape[1], 16) for heads in (4, 2, 2)
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """How many attention calls a kernel is given, and how many queries each has."""

    tower: str = "vision"

    def reads(self, context):
        layers = context.layers("vision", None)
        return [Read(ss.Site("vision", "attention", i), query_lengths) for i in layers]

    def finish(self, answers, context):
        return [answers[site].tolist() for site in sorted(answers)]


def query_lengths(calls, state):
    return torch.tensor([args[1].shape[2] for _, args, _ in calls])


def test_all_windows_are_read(tiny):
    """A windowed block calls once per window, and a plain read would see the first window only."""
    lvlm = tiny("qwen2.5-vl")
    sample = lvlm.prepare(images=random_image(112, 112), text="what")
    probe = Windows()
    lengths = lvlm.run(sample, [probe])[probe]
    assert lengths == [[16] * 4, [64], [16] * 4, [64]]


@pytest.mark.parametrize("label", ["attention_interface_1", "attention_interface_0"])
def test_a_wrong_label_is_never_half_read(label):
    """The branch that does not run, or the binding: an error, never the first window."""
    module, processor = tiny_qwen2_5_vl()
    lvlm = ss.LVLM(module, processor)
    sample = lvlm.prepare(images=random_image(112, 112), text="what")
    vision = lvlm.anatomy.vision
    wrong = tuple(dataclasses.replace(call, call=label) for call in vision.calls)
    lvlm._anatomy = dataclasses.replace(
        lvlm.anatomy, vision=dataclasses.replace(vision, calls=wrong)
    )
    probe = ss.AttentionMass({"patch": "patch"}, tower="vision")
    with pytest.raises(Exception, match="was requested but the model already ran past it"):
        lvlm.run(sample, [probe], engine="nnsight")
    with pytest.raises(Exception, match="was requested but the model already ran past it"):
        lvlm.generate(sample, [probe], max_new_tokens=2, engine="nnsight")


def without_interface(tower="vision"):
    module, processor = tiny_llava()
    for layer in module.model.vision_tower.encoder.layers:
        layer.self_attn = ByHand(layer.self_attn)
    return module, processor


def test_a_tower_without_readable_attention_still_has_its_residual_stream():
    """Attention of that tower is refused by name, before a pass; everything else works."""
    plain = ss.LVLM(*tiny_llava())
    lvlm = ss.LVLM(*without_interface())
    assert lvlm.verified
    vision = lvlm.anatomy.vision
    assert vision.attending == ()
    assert all(isinstance(call, NoAttentionCall) for call in vision.calls)
    sample = lvlm.prepare(images=random_image(), text="what")
    works = [
        ss.TokenNorms(tower="vision"),
        ss.MassiveActivations(tower="vision", site="attn_out"),
        ss.AttentionMass({"image": "image"}),
    ]
    run, want = lvlm.run(sample, works), plain.run(sample, works)
    assert torch.allclose(run[works[0]].norms, want[works[0]].norms, atol=1e-4)
    assert torch.allclose(run[works[2]].mass, want[works[2]].mass, atol=1e-4)
    passes = []
    handle = lvlm.module.register_forward_pre_hook(lambda *_: passes.append(1))
    for probe in (
        ss.AttentionMass({"patch": "patch"}, tower="vision"),
        ss.ValueNorms(tower="vision"),
        ss.ContributionNorms({"patch": "patch"}, tower="vision"),
    ):
        with pytest.raises(AttentionCallError, match=r"layers.0.self_attn .ByHand.*still work"):
            lvlm.run(sample, [probe])
    handle.remove()
    assert not passes


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_lead_to_the_parts(tiny, family):
    lvlm = tiny(family)
    a, part = lvlm.anatomy, lvlm.module.get_submodule
    for tower in (a.vision, a.language):
        for i in range(tower.n_layers):
            block = part(tower.blocks[i])
            assert tower.attention[i].startswith(tower.blocks[i])
            assert part(tower.mlp[i]) in block.children()
            assert part(tower.projection[i]).weight.shape == (
                tower.d_model,
                tower.heads * tower.d_head,
            )
    assert part(a.head).weight.shape == (a.vocab, a.language.d_model)
    assert part(a.final_norm) is lvlm.module.model.language_model.norm
    assert a.image_token_id == lvlm.module.config.image_token_id
    assert (a.language.heads, a.language.kv_heads) == (4, 2)


@pytest.mark.parametrize(("tower", "feeds", "drops"), [("clip", (1,), 1), ("siglip", (2,), 0)])
def test_which_vision_block_feeds_the_projector(tower, feeds, drops):
    anatomy = ss.LVLM(tiny_llava(tower)[0]).anatomy
    assert (anatomy.feed_layers, anatomy.drops) == (feeds, drops)


def test_several_feature_layers_all_feed():
    """`vision_feature_layer` may be a list; the states are concatenated in its order."""
    module, processor = tiny_llava("siglip", vision_layers=4)
    module.config.vision_feature_layer = [-1, -3]
    linear = module.model.multi_modal_projector.linear_1
    module.model.multi_modal_projector.linear_1 = nn.Linear(
        2 * linear.in_features, linear.out_features
    )
    lvlm = ss.LVLM(module, processor)
    assert (lvlm.anatomy.feeds, lvlm.anatomy.feed_layers) == ((3, 1), (1, 3))
    assert lvlm.verified


@pytest.mark.parametrize("layer", [0, -9, 4])
def test_feature_layers_that_do_not_exist_are_refused(layer):
    module, _ = tiny_llava()
    module.config.vision_feature_layer = layer
    with pytest.raises(ModelError, match=f"vision_feature_layer={layer} with 3 vision blocks"):
        ss.LVLM(module)


def test_a_wrong_config_does_not_mislead(tiny):
    """What feeds the projector is measured: the config is not asked."""
    module, processor = tiny_llava()
    right = ss.LVLM(module, processor).anatomy
    before = type(module.config).vision_feature_layer
    module.config.vision_feature_layer = -1
    module.model.config.vision_feature_layer = -1
    read = read_anatomy(module)
    assert (read.feeds, read.measured) == ((right.vision.n_layers - 1,), False)
    module.model.config.vision_feature_layer = module.config.vision_feature_layer = before
    assert ss.LVLM(module, processor).anatomy == right


def test_a_switched_kernel_is_noticed(tiny):
    """The anatomy follows `set_attn_implementation`; samples stay good."""
    module, processor = tiny_qwen2_5_vl()
    lvlm = ss.LVLM(module, processor)
    sample = lvlm.prepare(images=random_image(96, 96), text="what")
    probe = ss.AttentionMass({"patch": "patch"}, tower="vision")
    before = lvlm.run(sample, [probe])[probe].mass
    module.set_attn_implementation("eager")
    assert lvlm.anatomy.vision.kernel == "eager"
    after = lvlm.run(sample, [probe])[probe].mass
    assert torch.allclose(before.nan_to_num(), after.nan_to_num(), atol=1e-5)
    assert not torch.equal(before.nan_to_num(), after.nan_to_num())

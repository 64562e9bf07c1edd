"""Models of published sizes without weights, of words only, without a processor, and with a hint."""

import time

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import sinkscope as ss
from sinkscope.anatomy.families import HINTS
from sinkscope.testing import random_image, tiny_gemma3, tiny_llava, tiny_qwen2_5_vl

MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
CLIP = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
LLAVA = dict(
    vision_config=CLIP,
    text_config=dict(
        model_type="llama",
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32064,
    ),
    image_token_id=32000,
    vision_feature_layer=-2,
)
QWEN3 = dict(
    text_config=dict(
        model_type="qwen3_vl_text",
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        rope_parameters={**MROPE, "mrope_section": [24, 20, 20]},
    ),
    vision_config=dict(
        depth=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        out_hidden_size=4096,
        deepstack_visual_indexes=[8, 16, 24],
    ),
)


def without_weights(model_type, sizes):
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type](**sizes))


def test_llava_of_7b_without_weights():
    """Block 22 feeds the projector, CLS is dropped, one patch makes one token."""
    start = time.process_time()
    anatomy = ss.LVLM(without_weights("llava", LLAVA)).anatomy
    assert anatomy.measured
    assert (anatomy.feeds, anatomy.drops, anatomy.prefix, anatomy.merge) == ((22,), 1, ("cls",), 1)
    assert anatomy.projector == "model.multi_modal_projector"
    assert (anatomy.vision.n_layers, anatomy.language.n_layers) == (24, 32)
    assert time.process_time() - start < 120  # a copy of 7e9 weights would take longer


def test_qwen3_vl_of_8b_without_weights():
    """DeepStack: states of three more vision blocks enter before decoder blocks 1, 2 and 3."""
    lvlm = ss.LVLM(without_weights("qwen3_vl", QWEN3))
    anatomy = lvlm.anatomy
    assert (anatomy.feeds, anatomy.merge) == ((26,), 2)
    assert anatomy.enters == ((1, 8), (2, 16), (3, 24))
    assert not lvlm.verified
    assert "declared" in str(lvlm.report())


@pytest.mark.parametrize("make", [tiny_llava, tiny_qwen2_5_vl, tiny_gemma3])
def test_a_stand_in_says_what_the_model_says(make):
    """The same config with and without weights: one anatomy, and one map for an image of another shape."""
    module, processor = make()
    full = ss.LVLM(module, processor)
    with torch.device("meta"):
        empty = type(module)(module.config)
    bare = ss.LVLM(empty, processor)
    for name in ("feeds", "enters", "drops", "prefix", "merge", "projector", "measured"):
        assert getattr(bare.anatomy, name) == getattr(full.anatomy, name), name
    here, there = (
        one.prepare(images=random_image(120, 60), text="what").tokens for one in (full, bare)
    )
    assert torch.equal(here.sources, there.sources)
    assert torch.equal(here.box.nan_to_num(-1), there.box.nan_to_num(-1))
    assert module.get_input_embeddings().weight.device.type == "cpu"


def words_only():
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, vocab_size=500)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_a_text_only_model_is_a_baseline(tiny):
    """Probes and edits of the decoder work; the vision side says that there is none."""
    model, tokenizer = words_only(), tiny("llava-clip-llama").tokenizer
    lvlm = ss.LVLM(model, tokenizer)
    sample = lvlm.prepare(text=["how many red shapes", "what is it"])
    run = lvlm.run(sample, [probe := ss.AttentionMass({"first": "first"})])
    model.set_attn_implementation("eager")
    out = model(**sample.inputs, output_attentions=True)
    model.set_attn_implementation("sdpa")
    rows = torch.arange(2)
    for layer, weights in enumerate(out.attentions):
        want = weights[rows, :, :, sample.tokens.first]
        got = run[probe].mass[:, layer, ..., 0]
        assert torch.allclose(got.nan_to_num(), want.where(~got.isnan(), 0.0), atol=1e-5)
    assert (sample.tokens.image == -1).all()
    masked = lvlm.run(sample, interventions=[ss.MaskKeys("first")]).logits
    assert not torch.equal(masked, run.logits)
    made = lvlm.generate(sample, max_new_tokens=3).sequences
    assert torch.equal(made, model.generate(**sample.inputs, max_new_tokens=3, do_sample=False))
    with pytest.raises(ss.SinkscopeError, match="vision tower of a model in which there is no"):
        lvlm.run(sample, [ss.TokenNorms(tower="vision")])
    with pytest.raises(ss.SinkscopeError, match="images for a text-only model"):
        lvlm.prepare(images=random_image(), text="what")


def test_a_text_only_checkpoint_loads(tmp_path, tiny):
    words_only().save_pretrained(tmp_path)
    tiny("llava-clip-llama").tokenizer.save_pretrained(tmp_path)
    lvlm = ss.LVLM.from_pretrained(tmp_path)
    assert lvlm.verified
    assert lvlm.anatomy.vision.blocks == ()
    assert "no vision tower" in str(lvlm.report())
    check = ss.testing.check_model(lvlm)
    assert check.wrong == (), str(check)
    assert check.status("mass") == "exact"


def test_hints_are_followed_and_wrong_ones_refused():
    """A path that no module has is refused with what was tried; a right one is used."""
    module, processor = tiny_llava()
    try:
        ss.register_family("llava", projector="model.multi_modal_projector")
        assert ss.LVLM(module, processor).anatomy.projector == "model.multi_modal_projector"
        ss.register_family("llava", vision_tower="model.vision_towre")
        with pytest.raises(
            ss.SinkscopeError, match=r"vision_tower='model.vision_towre' for 'llava'"
        ):
            ss.LVLM(module, processor)
    finally:
        HINTS.pop("llava", None)
    for wrong in ({"model_type": ""}, {"model_type": "llava", "image_token_id": -1}):
        with pytest.raises(ss.SinkscopeError, match="expected"):
            ss.register_family(**wrong)
    assert not HINTS

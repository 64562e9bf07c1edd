import sys

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import AttentionCallError, LayerError
from sinkscope.models.decoder import scaled_keys
from sinkscope.testing import random_image, tiny_llava
from tests.conftest import FAMILIES


def logits_of(lvlm, sample):
    with torch.no_grad():
        return lvlm.module(**sample.inputs).logits


def attention_of(lvlm, block):
    return lvlm.module.get_submodule(lvlm.anatomy.language.attention[block])


def registry_of(lvlm):
    return sys.modules[type(attention_of(lvlm, 0)).__module__].ALL_ATTENTION_FUNCTIONS


@pytest.mark.parametrize(
    ("family", "kernel"),
    [(family, "sdpa") for family in FAMILIES] + [("gemma3", "eager"), ("qwen2.5-vl", "eager")],
)
def test_equals_the_edit_through_nnsight(family, kernel, tiny, batch):
    """Two independent ways to scale keys: `ScaleKeys` in a trace, and this hook in a plain pass."""
    lvlm = tiny(family, kernel)
    sample = batch(lvlm)
    visual = sample.tokens.image >= 0
    factors = torch.where(visual, 0.3, 1.0)[:, None, :, None]
    with scaled_keys(lvlm.module, lvlm.anatomy, {1: lambda key: key * factors}):
        edited = logits_of(lvlm, sample)
    expected = lvlm.run(sample, interventions=[ss.ScaleKeys("image", 0.3, [1])]).logits
    live = sample.tokens.live
    torch.testing.assert_close(edited[live], expected[live], atol=1e-5, rtol=1e-5)
    assert (edited[live] - logits_of(lvlm, sample)[live]).abs().max() > 1e-3


def test_cache_stays_clean(tiny, batch):
    lvlm = tiny("llava-siglip-qwen3")
    sample = batch(lvlm)
    with torch.no_grad():
        plain = lvlm.module(**sample.inputs, use_cache=True).past_key_values
        with scaled_keys(lvlm.module, lvlm.anatomy, {1: lambda key: 0.5 * key}):
            edited = lvlm.module(**sample.inputs, use_cache=True).past_key_values
    assert torch.equal(plain.layers[1].keys, edited.layers[1].keys)
    assert not torch.equal(plain.layers[2].keys, edited.layers[2].keys)


@pytest.mark.parametrize("fails", [False, True])
def test_restores_the_model_bitwise(fails, tiny, batch):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    before = logits_of(lvlm, sample)
    config, names = attention_of(lvlm, 1).config, set(registry_of(lvlm))
    kernel = lvlm.module.config.get_text_config()._attn_implementation

    def edit(key):
        if fails:
            raise ZeroDivisionError("in the edit")
        return 2 * key

    if fails:
        with (
            pytest.raises(ZeroDivisionError, match="in the edit"),
            scaled_keys(lvlm.module, lvlm.anatomy, {1: edit, 2: edit}),
        ):
            logits_of(lvlm, sample)
    else:
        with scaled_keys(lvlm.module, lvlm.anatomy, {1: edit, 2: edit}):
            assert not torch.equal(logits_of(lvlm, sample), before)
    assert attention_of(lvlm, 1).config is config
    assert set(registry_of(lvlm)) == names
    assert lvlm.module.config.get_text_config()._attn_implementation == kernel
    assert torch.equal(logits_of(lvlm, sample), before)


def test_neutral_edit_changes_no_bit(tiny, batch):
    lvlm = tiny("gemma3")
    sample = batch(lvlm)
    with scaled_keys(lvlm.module, lvlm.anatomy, {0: lambda key: key * 1.0}):
        edited = logits_of(lvlm, sample)
    assert torch.equal(edited, logits_of(lvlm, sample))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_of_a_trace_is_not_scaled(family, tiny, batch):
    """It rides in further head dimensions, which are no part of the keys."""
    lvlm = tiny(family)
    sample = batch(lvlm)
    edits = [ss.MaskKeys("image", layers=[1])]
    want = lvlm.run(sample, interventions=edits).logits
    factors = torch.where(sample.tokens.image >= 0, 1e-5, 1.0)[:, None, :, None]
    with scaled_keys(lvlm.module, lvlm.anatomy, {1: lambda key: key * factors}):
        got = lvlm.run(sample, interventions=edits).logits
    live = sample.tokens.live
    torch.testing.assert_close(got[live], want[live], atol=1e-5, rtol=1e-5)


def test_edits_nest(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    outer = scaled_keys(lvlm.module, lvlm.anatomy, {1: lambda key: 2 * key})
    inner = scaled_keys(lvlm.module, lvlm.anatomy, {1: lambda key: 3 * key})
    with outer, inner:
        both = logits_of(lvlm, sample)
    with scaled_keys(lvlm.module, lvlm.anatomy, {1: lambda key: 6 * key}):
        assert torch.equal(both, logits_of(lvlm, sample))


def test_gradient_reaches_the_factor(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    factor = torch.ones((), requires_grad=True)
    with scaled_keys(lvlm.module, lvlm.anatomy, {1: lambda key: key * factor}):
        lvlm.module(**sample.inputs).logits[:, -1].logsumexp(-1).sum().backward()
    assert factor.grad is not None
    assert factor.grad.abs() > 0


@pytest.mark.parametrize("block", [-1, 3, 1.5, True])
def test_unknown_blocks_are_refused(block, tiny):
    lvlm = tiny("llava-clip-llama")
    with (
        pytest.raises(LayerError, match="expected an int from 0 to 2"),
        scaled_keys(lvlm.module, lvlm.anatomy, {block: lambda key: key}),
    ):
        pytest.fail("not reached")


def test_a_module_without_the_registry_is_refused():
    model, processor = tiny_llava()
    lvlm = ss.LVLM(model, processor)
    sample = lvlm.prepare(images=random_image(), text="what")
    attention = attention_of(lvlm, 0)

    class Own(type(attention)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    attention.__class__ = Own
    with (
        pytest.raises(AttentionCallError, match="no ALL_ATTENTION_FUNCTIONS"),
        scaled_keys(lvlm.module, lvlm.anatomy, {0: lambda key: key}),
    ):
        logits_of(lvlm, sample)

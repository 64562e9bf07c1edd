"""A pass measures the model in evaluation mode, whatever mode its modules are in."""

import pytest
import torch

import sinkscope as ss
from sinkscope.testing import TINY, random_image
from tests.probes.everything import every_probe

FAMILIES = ("llava-clip-llama", "qwen2.5-vl")


def adapter(lvlm):
    """A fresh LoRA with dropout: its own modules are in training mode, the model is not."""
    peft = pytest.importorskip("peft")
    maps = r".*(q_proj|o_proj|down_proj|fc2|attn.proj)"
    options = {"r": 2, "lora_dropout": 0.5, "init_lora_weights": False}
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=maps, **options), lvlm.module)


def attention_dropout(lvlm):
    """Attention dropout as a config sets it at load, and the model in training mode."""
    for tower in (lvlm.anatomy.vision, lvlm.anatomy.language):
        for path in tower.attention:
            part = lvlm.module.get_submodule(path)
            part.dropout = part.attention_dropout = 0.5
    lvlm.module.train()


def one_block(lvlm):
    """One block of the decoder in training mode, the model not."""
    attention_dropout(lvlm)
    lvlm.module.eval()
    lvlm.module.get_submodule(lvlm.anatomy.language.blocks[1]).train()


def checkpoints(lvlm):
    """Gradient checkpointing in training mode, where it turns the cache off."""
    attention_dropout(lvlm)
    lvlm.module.gradient_checkpointing_enable()


MODES = {one.__name__: one for one in (adapter, attention_dropout, one_block, checkpoints)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_is_what_the_model_computes_in_evaluation_mode(family, mode):
    module, processor = TINY[family]()
    lvlm = ss.LVLM(module, processor, verify=False)
    MODES[mode](lvlm)
    modes = [part.training for part in module.modules()]
    assert any(modes)
    sample = lvlm.prepare(random_image(96, 96), "what is it")
    mass = ss.AttentionMass({"all": "all"})
    run = lvlm.run(sample, [mass])
    kept = lvlm.run(sample, grad=True).logits.detach()
    said = lvlm.generate(sample, every_probe(), max_new_tokens=4, min_new_tokens=4)
    assert [part.training for part in module.modules()] == modes
    module.eval()
    with torch.no_grad():
        want = module(**sample.inputs).logits
        ids = module.generate(**sample.inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(run.logits, want)
    assert torch.equal(kept, want)
    assert torch.equal(said.sequences, ids)
    assert torch.allclose(run[mass].mass, torch.ones(()), atol=1e-5)


def test_replayed_passes_are_those_of_evaluation_mode():
    """Sweeps and the reading of gates do not go through `LVLM.run`."""
    module, processor = TINY["llava-clip-llama"]()
    lvlm = ss.LVLM(module, processor, verify=False)
    one = {"image": random_image(64, 64), "question": "what is it", "answer": "red"}
    gate = ss.LSG.for_model(lvlm, 0, v_detector=ss.detectors.Norm(1.0))
    with torch.no_grad():
        gate.outer.weight.normal_(generator=torch.Generator().manual_seed(0))

    def tables():
        norm = ss.detectors.Norm(1.0)
        read = ss.gate_coefficients(lvlm, [gate], [one]).table
        return read, ss.sweep(lvlm, [one], [0], [(0.3, 1.5)], v_detector=norm).table

    attention_dropout(lvlm)
    got = tables()
    assert all(part.training for part in module.modules())
    module.eval()
    for table, want in zip(got, tables(), strict=True):
        assert table.equals(want)

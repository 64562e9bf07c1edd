"""Where results lie, a model over two devices, and what passes leave behind: nothing."""

import gc

import accelerate
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sinkscope as ss
from sinkscope.testing import TINY
from tests.gpu.common import GROUPS, far, plain, single, tensors

pytestmark = pytest.mark.gpu


def test_results_lie_on_the_cpu_and_inputs_anywhere(on, batch, moved):
    lvlm = on("qwen2.5-vl")
    sample = batch(lvlm)
    probes = [ss.AttentionMass(GROUPS), ss.ReceivedAttention(), ss.MassiveActivations()]
    probes += [ss.AttentionPatterns("last"), ss.TokenNorms(tower="vision"), ss.LogitLens()]
    edits = [ss.MaskKeys("text", [1])]
    here, there = (lvlm.run(given, probes, edits) for given in (sample, moved(sample)))
    for probe in probes:
        found = list(tensors(here[probe]))
        assert found
        assert {t.device.type for t in found} == {"cpu"}
        for a, b in zip(found, tensors(there[probe]), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert torch.equal(here.logits.nan_to_num(), there.logits.nan_to_num())
    assert {t.device.type for t in tensors(list(here.effects))} <= {"cpu"}


def test_a_model_over_two_devices(on, batch, device):
    """Vision tower and a block have their weights on the CPU; accelerate moves them for the pass."""
    whole = on()
    sample = batch(whole)
    module, processor = TINY["llava-clip-llama"]()
    places = dict.fromkeys(dict(module.model.language_model.named_children()), device)
    places = {f"model.language_model.{name}": place for name, place in places.items()}
    del places["model.language_model.layers"]
    for at in range(len(module.model.language_model.layers)):
        places[f"model.language_model.layers.{at}"] = "cpu" if at == 1 else device
    places |= {"model.vision_tower": "cpu", "model.multi_modal_projector": device}
    places |= {"lm_head": device}
    spread = accelerate.dispatch_model(module, places, main_device=device, force_hooks=True)
    lvlm = ss.LVLM(spread, processor, verify=False)
    probes = [ss.AttentionMass(GROUPS), ss.ReceivedAttention(), ss.TokenNorms(tower="vision")]
    edits = [ss.ScaleKeys("image", 0.5, [1])]
    one, other = lvlm.run(sample, probes, edits), whole.run(sample, probes, edits)
    assert far(one.logits, other.logits) < 1e-4
    for probe in probes:
        for a, b in zip(tensors(one[probe]), tensors(other[probe]), strict=True):
            assert far(a, b) < 2e-5 * max(1.0, float(b.nan_to_num().abs().max()))
    answers = [each.generate(sample, max_new_tokens=3, do_sample=False) for each in (lvlm, whole)]
    assert torch.equal(answers[0].sequences, answers[1].sequences)


def left(module):
    """What a pass could leave on a model, and in the registry of attention functions."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    found = [
        (
            name,
            id(vars(part).get("config")),
            sorted(vars(part)),
            *(len(vars(part)[h]) for h in hooks),
        )
        for name, part in module.named_modules()
    ]
    return found, sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl"])
def test_an_exception_in_the_middle_leaves_the_model_clean(on, moved, family, error):
    lvlm = on(family)
    sample = moved(single(lvlm))
    given = {"probes": [ss.AttentionMass(GROUPS)], "interventions": [ss.MaskKeys("image")]}
    want, edited = plain(lvlm, sample), lvlm.run(sample, **given).logits
    before = left(lvlm.module)

    def stop(module, args):
        raise error("in the middle")

    for at in (lvlm.anatomy.vision.blocks[1], lvlm.anatomy.language.blocks[1]):
        hook = lvlm.module.get_submodule(at).register_forward_pre_hook(stop)
        with pytest.raises(error, match="in the middle"):
            lvlm.run(sample, **given)
        with pytest.raises(error, match="in the middle"):
            lvlm.generate(sample, max_new_tokens=2, **given)
        hook.remove()
        assert left(lvlm.module) == before
        assert torch.equal(plain(lvlm, sample), want)
        assert torch.equal(lvlm.run(sample, **given).logits, edited)


def test_memory_does_not_grow(on, batch, device):
    lvlm = on()
    sample = batch(lvlm)

    def held():
        gc.collect()
        if device.type == "cuda":
            return torch.cuda.memory_allocated()
        return sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor)

    def once():
        probes = [ss.AttentionMass(GROUPS), ss.ReceivedAttention(), ss.MassiveActivations()]
        lvlm.run(sample, probes, [ss.MaskKeys("image", [1])])
        lvlm.generate(sample, probes[:1], max_new_tokens=2)

    for _ in range(2):
        once()
    before = held()
    for _ in range(20):
        once()
    assert held() <= before

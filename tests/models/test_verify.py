"""What is proven when a model is loaded, and what it costs."""

import inspect

import pytest
import torch

import sinkscope as ss
from sinkscope.anatomy import attention_call as source
from sinkscope.anatomy.discovery import read_anatomy
from sinkscope.errors import AttentionCallError, ModelError, NonFiniteError
from sinkscope.models import proofs as verify
from sinkscope.testing import TINY, random_image, tiny_llava

FAMILIES = tuple(TINY)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_passes_go_through_the_whole_decoder(family):
    """One plain pass and one with the probes; those that measure end in front of the last block's end."""
    module, processor = TINY[family]()
    last, ended = read_anatomy(module).language.blocks[-1], []
    module.get_submodule(last).register_forward_hook(lambda *_: ended.append(1))
    assert ss.LVLM(module, processor).verified
    assert len(ended) == 2


def test_the_source_of_a_class_is_read_once(monkeypatch):
    """Whatever the number of blocks: here 3 and 3, and later 6 and 6."""
    read = []

    def getsource(forward, real=inspect.getsource):
        read.append(forward)
        return real(forward)

    source._read.cache_clear()
    source.forward_tree.cache_clear()
    monkeypatch.setattr(source.inspect, "getsource", getsource)
    small, _ = tiny_llava()
    read_anatomy(small)
    assert len(set(read)) == len(read) > 0
    large, _ = tiny_llava(vision_layers=6, layers=6)
    read.clear()
    assert read_anatomy(large).language.n_layers == 6
    assert read == []


@pytest.mark.parametrize("tower", ["vision", "language"])
@pytest.mark.parametrize("layer", [0, 2])
def test_attention_that_does_not_sum_to_one_is_refused(monkeypatch, tower, layer):
    """In whichever block it is: the mass of one block is doubled where it is measured; others go on."""
    real = verify.AttentionMass.finish

    def finish(self, answers, context):
        wrong = {
            site: {**value, "mass": value["mass"] * (2 if (site.tower, site.layer) == at else 1)}
            for site, value in answers.items()
        }
        return real(self, wrong, context)

    at = (tower, layer)
    monkeypatch.setattr(verify.AttentionMass, "finish", finish)
    lvlm = ss.LVLM(*tiny_llava())
    said = rf"over all {tower} tokens sums to 1 \+- 1; expected.* Write layers=\[. ?,?.*\] for the rest"
    sample = lvlm.prepare(images=random_image(), text="what")
    with pytest.raises(AttentionCallError, match=said):
        lvlm.run(sample, [ss.AttentionMass({"all": "all"}, [0, 1, 2], tower=tower)])
    rest = [other for other in range(3) if other != layer]
    assert list(lvlm.anatomy.tower(tower).attending) == rest
    lvlm.run(sample, [ss.ValueNorms(layers=rest, tower=tower), ss.TokenNorms(tower=tower)])
    assert lvlm.verified
    assert "attention sums to 1" not in lvlm.report().verification


def test_nan_in_the_vision_tower_is_named():
    module, processor = tiny_llava()
    module.model.vision_tower.encoder.layers[0].mlp.fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"NaN or infinite (states|logits)"):
        ss.LVLM(module, processor)


def test_threads_are_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ss.LVLM(*tiny_llava())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tower", ["vision", "language"])
def test_a_model_whose_passes_are_left_to_chance_is_refused(tower):
    """A dropout that does not look at `training`; random numbers that change nothing are fine."""
    module, processor = tiny_llava()
    part = module.get_submodule(getattr(read_anatomy(module), tower).blocks[0])

    def draw(*_):
        torch.rand(1)

    handle = part.register_forward_pre_hook(draw)
    assert ss.LVLM(module, processor).verified
    handle.remove()
    part.register_forward_hook(lambda m, args, out: torch.nn.functional.dropout(out, 0.1))
    with pytest.raises(ModelError, match=r"differ by .* random numbers in evaluation mode"):
        ss.LVLM(module, processor)
    assert not ss.LVLM(module, processor, verify=False).verified

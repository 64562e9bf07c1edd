"""What was measured is kept for models of one structure, and measured anew where that differs."""

import json

import pytest
import torch
from torch import nn

import sinkscope as ss
from sinkscope.models import proofs
from sinkscope.models.patch_map import MEASURING
from sinkscope.testing import random_image, tiny_llava, tiny_qwen2_5_vl


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache folder of its own, in which anatomies are kept."""
    monkeypatch.setenv("SINKSCOPE_CACHE", str(tmp_path))
    monkeypatch.setenv("SINKSCOPE_KEEP_ANATOMY", "1")
    return tmp_path / "anatomy"


def passes_of(load):
    """What a function makes, and how many passes ran in it."""
    made = []
    plain = nn.Module._call_impl

    def counted(module, *args, **kwargs):
        if hasattr(type(module), "get_image_features") and hasattr(module, "lm_head"):
            made.append(id(module) in MEASURING)
        return plain(module, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__call__", counted)
        return load(), len(made)


@pytest.mark.parametrize("make", [tiny_llava, tiny_qwen2_5_vl])
def test_a_second_load_runs_nothing_and_knows_the_same(kept, make):
    first, many = passes_of(lambda: ss.LVLM(*make()))
    second, none = passes_of(lambda: ss.LVLM(*make(seed=5)))
    assert many > 0
    assert none == 0
    assert second.anatomy == first.anatomy
    assert second.verified
    assert len(list(kept.iterdir())) == 1
    _, forced = passes_of(lambda: ss.LVLM(*make(), verify=True))
    assert forced == many
    sample = second.prepare(images=random_image(64, 80), text="what")
    assert torch.equal(second.run(sample).logits, second.module(**sample.inputs).logits)


def test_another_structure_is_measured(kept):
    """Another kernel, dtype, a hook, a swapped part or another config is another file."""
    ss.LVLM(*tiny_llava())
    ss.LVLM(*tiny_llava(attn_implementation="eager"))
    ss.LVLM(*tiny_llava(dtype=torch.bfloat16))
    module, processor = tiny_llava()
    module.model.multi_modal_projector.register_forward_hook(lambda *_: None)
    ss.LVLM(module, processor)
    module, processor = tiny_llava()
    module.config.vision_feature_layer = -1
    ss.LVLM(module, processor)
    assert len(list(kept.iterdir())) == 5


def test_a_damaged_file_is_measured_again_and_replaced(kept):
    first = ss.LVLM(*tiny_llava())
    (file,) = kept.iterdir()
    good = file.read_text()
    for bad in ("", "[]", good[:40], json.dumps(json.loads(good) | {"measured": {"feeds": [0]}})):
        file.write_text(bad)
        again, many = passes_of(lambda: ss.LVLM(*tiny_llava()))
        assert many > 0
        assert again.anatomy == first.anatomy
        assert file.read_text() == good


def test_a_home_that_cannot_be_written_is_no_error(kept, monkeypatch):
    kept.write_text("a file where the folder would be")
    assert ss.LVLM(*tiny_llava()).verified


def test_verify_false_runs_nothing_until_it_is_asked(kept):
    lvlm, none = passes_of(lambda: ss.LVLM(*tiny_llava(), verify=False))
    assert none == 0
    anatomy, some = passes_of(lambda: lvlm.anatomy)
    assert some > 0
    assert anatomy.measured
    assert not lvlm.verified
    with pytest.raises(ss.SinkscopeError, match="verify='yes'; expected"):
        ss.LVLM(*tiny_llava(), verify="yes")


class Wrapped(nn.Module):
    """A part that someone put around another one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_part_that_was_swapped_after_load_is_noticed(monkeypatch):
    """The next run proves the model as it is: here something stands around an output projection."""
    module, processor = tiny_llava()
    lvlm = ss.LVLM(module, processor)
    sample = lvlm.prepare(images=random_image(), text="what")
    before, probe = lvlm.anatomy, ss.ContributionNorms({"all": "all"})
    norms = lvlm.run(sample, [probe])[probe].norms
    proven = []
    verify = proofs.verify_anatomy
    monkeypatch.setattr(
        "sinkscope.models.kept.verify_anatomy", lambda *a: proven.append(1) or verify(*a)
    )
    attention = module.model.language_model.layers[1].self_attn
    attention.o_proj = Wrapped(attention.o_proj)
    run = lvlm.run(sample)
    assert proven == [1]
    assert torch.equal(run.logits, module(**sample.inputs).logits)
    assert lvlm.anatomy.language.attending == before.language.attending
    assert torch.equal(lvlm.run(sample, [probe])[probe].norms.nan_to_num(), norms.nan_to_num())
    assert proven == [1]

"""The twin of an intervention for which touching nothing is fine."""

import pytest
import torch

import sinkscope as ss
from sinkscope import detectors
from sinkscope.errors import InterventionError, NoEffectError
from sinkscope.interventions.application import allowing_noop
from sinkscope.testing import random_image, tiny_llava


class Plain:
    """An intervention that is no dataclass."""

    steps = "all"

    def __init__(self, allow_noop):
        self.allow_noop = allow_noop

    def edits(self, context):
        return []


def test_a_dataclass_is_copied():
    mask = ss.MaskKeys("image", layers=[1])
    twin = allowing_noop(mask)
    assert (twin.allow_noop, mask.allow_noop) == (True, False)
    assert (twin.tokens, twin.layers) == ("image", [1])
    assert allowing_noop(twin) is twin


def test_a_gate_shares_its_parameters():
    lvlm = ss.LVLM(*tiny_llava("clip", "llama"), verify=False)
    gate = ss.LSG.for_model(lvlm, 0, v_detector=detectors.NoSinks())
    twin = allowing_noop(gate)
    assert (twin.allow_noop, gate.allow_noop) == (True, False)
    assert all(a is b for a, b in zip(twin.parameters(), gate.parameters(), strict=True))
    neutral = ss.LSG.for_model(lvlm, 0, v_detector=detectors.NoSinks(), init="neutral")
    sample = lvlm.prepare(images=random_image(48, 48, 0), text="what is it")
    with pytest.raises(NoEffectError, match="touched no row"):
        lvlm.run(sample, [], [neutral])
    run = lvlm.run(sample, [], [allowing_noop(neutral)])
    assert torch.equal(run.logits, lvlm.run(sample).logits)


def test_what_has_no_twin_is_refused_unless_it_needs_none():
    fine = Plain(True)
    assert allowing_noop(fine) is fine
    with pytest.raises(InterventionError, match=r"a method allowing_noop\(\)"):
        allowing_noop(Plain(False))

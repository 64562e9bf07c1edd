"""Every intervention keeps the promises of `check_intervention`."""

import pytest
import torch

import sinkscope as ss
from sinkscope.testing import check_intervention

FAMILIES = ("llava-clip-llama", "llava-siglip-qwen3", "llava-dinov2-olmo2", "qwen2.5-vl")


@pytest.fixture(scope="module")
def prepared(tiny, batch):
    """A padded batch whose first row is selected nowhere, and masks of the second row's tokens."""

    def make(family):
        lvlm = tiny(family)
        sample = batch(lvlm)
        some = torch.zeros_like(sample.tokens.live)
        visual = (sample.tokens.image[1] >= 0).nonzero().flatten()
        some[1, visual[[1, 3]]] = True
        other = torch.zeros_like(some)
        other[1, visual[[0, 2, 4]]] = True
        patches = torch.zeros_like(sample.tokens.vision.live)
        patches[:, 2:4] = True
        return lvlm, sample, some, other, patches

    return make


def states(lvlm, sample, layers):
    probe = ss.probes.ResidualStates(layers=layers)
    return lvlm.run(sample, probes=[probe])[probe].states.flip(2)


def values(lvlm, sample, layers, tower="language"):
    probe = ss.probes.AttentionValues(layers=layers, tower=tower)
    return lvlm.run(sample, probes=[probe])[probe].values.nan_to_num().flip(3)


CASES = {
    "MaskKeys": lambda c: ss.MaskKeys(c.some),
    "MaskKeys of heads": lambda c: ss.MaskKeys(c.some, layers=[1], heads=[0, 2]),
    "MaskKeys of patches": lambda c: ss.MaskKeys(c.patches, tower="vision"),
    "ScaleKeys": lambda c: ss.ScaleKeys(c.some, 0.3),
    "ScaleKeys of patches": lambda c: ss.ScaleKeys(c.patches, 2.0, tower="vision"),
    "ScaleAttention": lambda c: ss.ScaleAttention(c.some, 0.5),
    "ScaleAttention as is": lambda c: ss.ScaleAttention(c.some, 0.5, renormalize=False),
    "AttentionKnockout": lambda c: ss.AttentionKnockout("last", c.some),
    "Redistribute": lambda c: ss.Redistribute(c.some, c.other, 0.6),
    "AblateValues": lambda c: ss.AblateValues(c.some),
    "AblateValues mean": lambda c: ss.AblateValues(c.some, "mean"),
    "AblateValues resample": lambda c: ss.AblateValues(c.some, "resample"),
    "AblateValues of a head": lambda c: ss.AblateValues(c.some, heads=[1]),
    "AblateActivations": lambda c: ss.AblateActivations([1, 2], c.some),
    "AblateActivations clamp": lambda c: ss.AblateActivations([1, 2], c.some, "clamp", value=0.1),
    "AblateActivations of patches": lambda c: ss.AblateActivations([3], c.patches, tower="vision"),
    "PatchActivations": lambda c: ss.PatchActivations(
        states(c.lvlm, c.sample, [0]), "resid_post", c.some, [0]
    ),
    "PatchActivations of values": lambda c: ss.PatchActivations(
        values(c.lvlm, c.sample, [0]), "values", c.some, [0]
    ),
    "PatchActivations of patches' values": lambda c: ss.PatchActivations(
        values(c.lvlm, c.sample, [0], "vision"), "values", c.patches, [0], tower="vision"
    ),
    "ScaleTokens": lambda c: ss.interventions.ScaleTokens(c.some, 0.5),
    "SinkToFront": lambda c: ss.interventions.SinkToFront(c.some),
    "EvictKeys": lambda c: ss.interventions.EvictKeys(start=2, recent=6),
}
NEUTRAL = {
    "ScaleKeys": lambda c: ss.ScaleKeys(c.some, 1.0, allow_noop=True),
    "ScaleAttention": lambda c: ss.ScaleAttention(c.some, 1.0, allow_noop=True),
    "ScaleAttention as is": lambda c: ss.ScaleAttention(
        c.some, 1.0, renormalize=False, allow_noop=True
    ),
    "Redistribute": lambda c: ss.Redistribute(c.some, c.other, 0.0, allow_noop=True),
    "ScaleTokens": lambda c: ss.interventions.ScaleTokens(c.some, 1.0, allow_noop=True),
    "MaskKeys": lambda c: ss.MaskKeys(c.some & False, allow_noop=True),
    "AblateValues": lambda c: ss.AblateValues(c.some & False, allow_noop=True),
    "EvictKeys": lambda c: ss.interventions.EvictKeys(4, 4096, allow_noop=True),
}


class Case:
    def __init__(self, lvlm, sample, some, other, patches):
        self.lvlm, self.sample = lvlm, sample
        self.some, self.other, self.patches = some, other, patches


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_intervention_keeps_its_contract(prepared, family, name):
    case = Case(*prepared(family))
    neutral = NEUTRAL.get(name)
    check_intervention(
        lambda: CASES[name](case),
        case.lvlm,
        case.sample,
        neutral=None if neutral is None else lambda: neutral(case),
    )

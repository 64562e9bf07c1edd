"""Every intervention keeps the promises of `check_intervention`."""

from dataclasses import replace

import pytest
import torch

from sinkscope.testing import check_intervention
from tests.interventions.cases import LANGUAGE, SIX, VISION, crossed
from tests.interventions.test_states_everywhere import EDITS, FEW

EVERY = LANGUAGE | {f"{name} in the ViT": pair for name, pair in VISION.items()} | {**EDITS}
OTHERS = ("llava-siglip-qwen3", "llava-dinov2-olmo2", "qwen2.5-vl")


@pytest.mark.parametrize(
    ("family", "name"), crossed(EVERY, [("llava-clip-llama",), *zip(OTHERS)], few=(*SIX, *FEW))
)
def test_intervention_keeps_its_contract(case, family, name):
    """In a batch whose first row is selected nowhere by masks of tokens."""
    c, pair = case(family), EVERY[name]
    second = torch.arange(2)[:, None] == 1
    c = replace(c, some=c.some & second, other=c.other & second)
    neutral = pair.neutral and (lambda: pair.neutral(c))
    remote = name in (*SIX, *FEW)
    check_intervention(lambda: pair.edit(c), c.lvlm, c.sample, neutral=neutral, remote=remote)

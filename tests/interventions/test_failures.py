"""Whatever happens inside a pass, the model afterwards is the model before."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import sinkscope as ss
from sinkscope.interventions import Edit
from sinkscope.sites import Site


class MishapError(Exception):
    """What a user's kernel throws."""


@dataclass(frozen=True, eq=False)
class Broken:
    """A user's intervention that fails at one site, at one step."""

    site: Site
    at_step: int = 0
    steps: str = "all"
    allow_noop: bool = False

    def edits(self, context: Any) -> list[Edit]:
        kernel = (
            fail if context.step >= self.at_step and (context.step or not self.at_step) else same
        )
        return [Edit(self.site, kernel)]


def fail(*args, **kwargs):
    raise MishapError("in the middle of a pass")


def same(value, state, *span):
    return value, {
        name: torch.zeros(2, dtype=torch.long) for name in ("rows", "empty", "tokens", "count")
    }


SITES = [
    Site("vision", "attention", 1),
    Site("vision", "resid_post", 0),
    Site("language", "attention", 2),
    Site("language", "resid_pre", 1),
    Site("language", "mlp_out", 0),
]


def plainly(lvlm, sample):
    """Logits of a plain run, of the module itself, and a plain answer."""
    with torch.no_grad():
        module = lvlm.module(**sample.inputs).logits
    return [
        lvlm.run(sample).logits,
        module,
        lvlm.generate(sample, max_new_tokens=4).sequences,
    ]


def bitwise(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl", "gemma3"])
def test_an_exception_in_a_users_kernel_leaves_the_model_as_it_was(case, family, site):
    c = case(family)
    before = plainly(c.lvlm, c.sample)
    edits = [
        ss.MaskKeys(c.patches, tower="vision"),
        ss.interventions.ScaleTokens(c.some, 0.5),
        ss.MaskKeys(c.some),
        Broken(site),
    ]
    with pytest.raises(MishapError, match="in the middle of a pass"):
        c.lvlm.run(c.sample, interventions=edits)
    assert bitwise(plainly(c.lvlm, c.sample), before)


@pytest.mark.parametrize("at_step", [0, 1])
@pytest.mark.parametrize("family", ["llava-clip-llama", "gemma3"])
def test_an_exception_in_the_middle_of_an_answer(case, family, at_step):
    c = case(family)
    before = plainly(c.lvlm, c.sample)
    edits = [ss.MaskKeys(c.some), Broken(Site("language", "attention", 1), at_step)]
    with pytest.raises(MishapError):
        c.lvlm.generate(c.sample, interventions=edits, max_new_tokens=4, min_new_tokens=4)
    assert bitwise(plainly(c.lvlm, c.sample), before)


def test_an_edit_that_is_refused_leaves_the_model_as_it_was(case):
    c = case("llava-clip-llama")
    before = plainly(c.lvlm, c.sample)
    alone = ss.MaskKeys("first", queries="first")
    with pytest.raises(ss.errors.NoEffectError):
        c.lvlm.run(c.sample, interventions=[ss.MaskKeys(c.some), alone])
    assert bitwise(plainly(c.lvlm, c.sample), before)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_module_is_itself_after_edits(case, kernel):
    c = case("llava-clip-llama", kernel)
    before = plainly(c.lvlm, c.sample)
    weights = [p.clone() for p in c.lvlm.module.parameters()]
    edits = [
        ss.MaskKeys(c.some),
        ss.Redistribute(c.first, c.other, 0.6),
        ss.AblateValues(c.other, heads=[1]),
        ss.AblateActivations([1], c.some),
        ss.ScaleKeys(c.patches, 0.5, tower="vision"),
    ]
    c.lvlm.run(c.sample, interventions=edits)
    c.lvlm.generate(c.sample, interventions=edits, max_new_tokens=3)
    assert bitwise(plainly(c.lvlm, c.sample), before)
    assert bitwise(weights, c.lvlm.module.parameters())

"""Where a patch may come from: a run, a step of an answer, a result, a tensor, one row for all."""

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import NoEffectError
from sinkscope.testing import random_image
from tests.interventions.cases import crossed, turned
from tests.interventions.test_exact import off
from tests.interventions.test_generation import generate

FAMILIES = ("llava-clip-llama", "gemma3", "qwen2.5-vl")
SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post", "values")
TOWERS = [(family, tower) for family in FAMILIES for tower in ("language", "vision")]
FEW = ("mlp_out", "values")


def reads(site, layers=None, tower="language", tokens="all"):
    if site == "values":
        return ss.probes.AttentionValues(layers, tokens, tower)
    return ss.probes.ResidualStates(tokens, layers, tower, site)


def patched(c, donor, site, layers, tower="language", **options):
    tokens = c.some if tower == "language" else c.patches
    edit = ss.PatchActivations(donor, site, tokens, layers, tower=tower, **options)
    return c.lvlm.run(c.sample, interventions=[edit]).logits


@pytest.mark.parametrize(("family", "tower", "site"), crossed(SITES, TOWERS, 2, FEW))
def test_a_run_a_result_and_a_tensor_are_the_same_donor(case, family, tower, site):
    """The run holds other layers too, and results of every other site and of the other tower."""
    c = case(family)
    probes = {(t, s): reads(s, None, t) for t in ("language", "vision") for s in SITES}
    run = c.lvlm.run(turned(c), probes=list(probes.values()))
    result = run[probes[tower, site]]
    tensor = result.values if site == "values" else result.states
    logits = [patched(c, donor, site, [1], tower) for donor in (run, result, tensor[:, [1]])]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], c.lvlm.run(c.sample).logits)
    narrow = reads(site, [1], tower)
    alone = c.lvlm.run(turned(c), probes=[narrow])
    assert torch.equal(logits[0], patched(c, alone, site, [1], tower))


@pytest.mark.parametrize("site", ["resid_post", "values"])
def test_the_prompt_of_an_answer_is_a_donor(case, site):
    c = case("llava-clip-llama")
    probe = reads(site)
    step = c.lvlm.generate(turned(c), [probe], max_new_tokens=2, min_new_tokens=2).steps[0]
    run = c.lvlm.run(turned(c), probes=[probe])
    # generate() counts the positions of a padded row from its first token, the plain model does not.
    from_step, from_run = (patched(c, donor, site, [0, 2])[c.live] for donor in (step, run))
    assert off(from_step, from_run) <= 1e-5
    assert off(c.lvlm.run(c.sample).logits[c.live], from_run) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "tower", "site"), crossed(SITES, TOWERS, 2, FEW))
def test_a_patch_from_the_same_run_changes_no_bit(case, family, tower, site, dtype):
    c = case(family, "sdpa", dtype)
    plain = c.lvlm.run(c.sample, probes=[reads(site, None, tower)])
    again = patched(c, plain, site, None, tower, allow_noop=True)
    assert torch.equal(again, plain.logits)
    with pytest.raises(NoEffectError, match=r"PatchActivations (left every token|touched no row)"):
        patched(c, plain, site, None, tower)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_patched_as_they_are_replaced(case, family):
    c = case(family)
    probe = ss.probes.AttentionValues()
    run = c.lvlm.run(turned(c), probes=[probe])
    edits = [
        ss.PatchActivations(run, "values", c.some, [0, 2]),
        ss.AblateValues(c.some, run, [0, 2]),
        ss.AblateValues(c.some, run[probe], [0, 2]),
        ss.AblateValues(c.some, run[probe].values[:, [0, 2]], [0, 2]),
    ]
    first, *others = [generate(c, [edit], 4) for edit in edits]
    for other in others:
        for one, two in zip(first.steps, other.steps, strict=True):
            assert torch.equal(one.logits, two.logits)


@pytest.mark.parametrize("site", ["resid_post", "values"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_may_serve_all(case, family, site):
    c = case(family)
    ours, theirs = random_image(64, 64, 0), random_image(64, 64, 1)
    sample = c.lvlm.prepare(images=[ours] * 2, text=["what is it", "what is on"])
    assert sample.tokens.live.all()
    probe = reads(site, [0, 1])
    one = c.lvlm.run(c.lvlm.prepare(images=theirs, text="what is it"), probes=[probe])[probe]
    tensor = one.values if site == "values" else one.states
    tokens = sample.tokens.select("image")

    def logits(donor):
        edit = ss.PatchActivations(donor, site, tokens, [0, 1])
        return c.lvlm.run(sample, interventions=[edit]).logits

    assert torch.equal(logits(one), logits(tensor.expand(2, *tensor.shape[1:])))
    assert not torch.equal(logits(one), c.lvlm.run(sample).logits)


def test_patched_values_hold_for_as_long_as_asked(case):
    """The cache keeps the model's own values, so only ``steps`` decides about later steps."""
    c = case("llava-clip-llama")
    run = c.lvlm.run(turned(c), probes=[ss.probes.AttentionValues()])
    for steps, told in (("all", [1, 1, 1]), ("prefill", [1, 0, 0]), ("decode", [0, 1, 1])):
        edit = ss.PatchActivations(run, "values", c.some, steps=steps)
        out = generate(c, [edit], 3)
        assert [int(edit in step.effects) for step in out.steps] == told

"""Runs and models that are pickled, copied and saved."""

import copy
import pickle

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import InterventionError, ProbeError
from sinkscope.testing import TINY, random_image
from tests.probes.everything import assert_same


def test_a_pickled_run_knows_equal_probes_and_interventions(tiny):
    """By class and parameters, tensors and weights among them; the run's own objects come first."""
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(), text="what is it")
    first, image = torch.zeros_like(sample.tokens.live), sample.tokens.image >= 0
    first[:, 0] = True

    def asked():
        return [
            ss.TokenNorms(layers=[1]),
            ss.TokenNorms(layers=[2]),
            ss.AttentionMass({"first": first.clone(), "image": "image"}),
        ]

    gate = ss.LSG.for_model(lvlm, 1, v_detector=ss.detectors.Norm(1.0), allow_noop=True)
    edits = [ss.MaskKeys(image.clone(), layers=[0]), ss.MaskKeys(first, layers=[0]), gate]
    probes = asked()
    run = lvlm.run(sample, probes, edits)
    loaded = pickle.loads(pickle.dumps(run))
    for probe, again in zip(probes, asked(), strict=True):
        assert run[probe] is run[again]
        assert_same(loaded[probe], run[probe])
    for edit in edits:
        assert torch.equal(loaded.effects[edit].rows, run.effects[edit].rows)
    assert torch.equal(
        loaded.effects[ss.MaskKeys(image, layers=[0])].tokens, run.effects[edits[0]].tokens
    )
    with pytest.raises(ProbeError, match="by object, name, or equal parameters"):
        loaded[ss.TokenNorms(layers=[0])]
    with pytest.raises(ProbeError, match="Got AttentionMass, which did not run"):
        loaded[ss.AttentionMass({"first": ~first, "image": "image"})]
    with pytest.raises(InterventionError, match="which did nothing in this pass"):
        loaded.effects[ss.MaskKeys(~image, layers=[0])]
    edits = [ss.ScaleKeys(image, 0.5, layers=[0]) for _ in range(2)]
    twice = lvlm.run(sample, [], edits)
    assert twice.effects[edits[1]].touched.all()
    with pytest.raises(InterventionError, match="which 2 of them equal"):
        twice.effects[ss.ScaleKeys(image, 0.5, layers=[0])]


@pytest.mark.parametrize("where", [False, "local"])
def test_a_copied_model_is_one_of_its_own(where):
    """Traced before or not; what is changed in one is not in the other."""
    lvlm = ss.LVLM(*TINY["llava-clip-llama"]())
    sample = lvlm.prepare(images=random_image(), text="what is it")
    probe = ss.AttentionMass({"image": "image"})
    want = lvlm.run(sample, [probe], remote=where)
    other = copy.deepcopy(lvlm)
    assert (other.anatomy, other.name, other.verified) == (lvlm.anatomy, lvlm.name, lvlm.verified)
    got = other.run(sample, [probe], remote=where)
    assert_same(got[probe], want[probe])
    with torch.no_grad():
        other.module.get_output_embeddings().weight.mul_(2)
    assert torch.equal(lvlm.run(sample, remote=where).logits, want.logits)
    assert torch.equal(other.run(sample, remote=where).logits, 2 * want.logits)

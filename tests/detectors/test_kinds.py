"""CLS named as a V-sink: which token that is, and where there is none."""

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import DetectorError
from tests.keeping_cls import cls_of, keeping_cls

CLS = ss.detectors.VisionTokens("cls")


@pytest.fixture(scope="module")
def lvlm():
    return keeping_cls()


def test_it_flags_the_token_before_the_patches(lvlm, batch):
    sample = batch(lvlm)
    found = ss.detect(lvlm, sample, CLS, tower="vision", layers=[1, 2])
    assert found.mask.nonzero().tolist() == [[i, layer, 0] for i in range(3) for layer in (0, 1)]
    assert found.scores.unique().tolist() == [0.0, 1.0]
    assert found.null == 0.0
    assert found.layers == (1, 2)
    assert not found.warnings
    table = found.to_dataframe()
    assert (table["flagged"] == (table["pos"] == 0)).all()


@pytest.mark.parametrize("merge", ["max", "mean", "any"])
def test_it_is_carried_to_the_first_image_token_of_every_image(lvlm, batch, merge):
    """Whose column in the embeddings is what CLS becomes: the rest of the ViT leaves it alone."""
    sample = batch(lvlm)
    nothing = ss.detectors.NoSinks()
    trace = ss.trace_sinks(lvlm, sample, CLS, nothing, merge=merge)
    assert torch.equal(trace.v_sinks, cls_of(sample))
    assert trace.v_sinks.sum(dim=1).tolist() == [1, 2]
    with torch.no_grad():
        tower = lvlm.module.model.vision_tower(
            sample.inputs["pixel_values"], output_hidden_states=True
        )
        made = lvlm.module.model.multi_modal_projector(tower.hidden_states[-2][:, 0])
    states = ss.probes.ResidualStates(trace.v_sinks, [0], site="resid_pre")
    seen = lvlm.run(sample, [states])[states].states[:, 0]
    rows = seen[~seen[..., 0].isnan()]
    torch.testing.assert_close(rows, made, atol=1e-5, rtol=1e-5)


def test_registers_are_refused_where_there_are_none(lvlm, batch):
    with pytest.raises(DetectorError, match=r"'register'\) for a model whose vision tower has no"):
        ss.detect(lvlm, batch(lvlm), ss.detectors.VisionTokens("register"), tower="vision")


def test_models_that_drop_it_or_never_had_it_are_refused(tiny, batch):
    cases = {"llava-clip-llama": "whose projector drops it", "llava-siglip-qwen2": "has no such"}
    for family, why in cases.items():
        lvlm = tiny(family)
        sample = batch(lvlm)
        with pytest.raises(DetectorError, match=rf"{why}.*expected .*'full'.*Norm\(100.0\)"):
            ss.trace_sinks(lvlm, sample, CLS, ss.detectors.NoSinks())


def test_it_is_no_rule_for_the_decoder(lvlm, batch):
    with pytest.raises(DetectorError, match="for the language tower, which has no such tokens"):
        ss.detect(lvlm, batch(lvlm), CLS)


@pytest.mark.parametrize("kind", ["CLS", "patch", None, ["cls"]])
def test_other_kinds_are_refused(kind):
    with pytest.raises(DetectorError, match=r"Got kind=.*; expected one of \('cls', 'register'\)"):
        ss.detectors.VisionTokens(kind)

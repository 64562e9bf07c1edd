"""CLS named as a V-sink: which token that is, and where there is none."""

import pytest
import torch

import sinkscope as ss
from sinkscope.detectors.choice import describe, detector_of, rule_of
from sinkscope.detectors.detection import check_detector
from sinkscope.detectors.rules import STATE_SITE
from sinkscope.errors import DetectorError
from sinkscope.kernels.gating import flags
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


ALONE = [
    ss.detectors.SinkDimensions((0, 5), 2.0),
    ss.detectors.SinkDimensions((0, 5), 1.0, "none", strict=False),
    ss.detectors.Massive(1.0, 6.0),
    ss.detectors.Norm(8.0),
    ss.detectors.RandomTokens(3, seed=7),
    ss.detectors.NoSinks(),
    CLS,
]


@pytest.mark.parametrize("detector", ALONE, ids=lambda one: type(one).__name__)
def test_a_gate_flags_what_the_detector_flags(lvlm, batch, detector):
    """By the kernel that gates run on states, with the plain data that a gate holds."""
    sample = batch(lvlm)
    data = describe(detector)
    assert describe(detector_of(data)) == data
    for tower, site in STATE_SITE.items():
        if detector is CLS and tower == "language":
            continue
        live = sample.tokens.vision.live if tower == "vision" else sample.tokens.live
        states = ss.probes.ResidualStates(tower=tower, site=site)
        seen = lvlm.run(sample, [states])[states].states.nan_to_num()
        judged = sample.tokens.vision.select("cls") if detector is CLS else live
        want = ss.detect(lvlm, sample, detector, tower=tower).mask
        for layer in range(seen.shape[1]):
            assert torch.equal(flags(seen[:, layer], rule_of(data), judged), want[:, layer])


@pytest.mark.parametrize("detector", [ss.detectors.Gap(), ss.detectors.Norm("valley"), "norm"])
def test_what_judges_tokens_by_one_another_is_no_rule_of_a_gate(detector):
    with pytest.raises(DetectorError, match="expected a rule that judges every token by itself"):
        describe(detector)
    with pytest.raises(
        DetectorError, match=r"detector 'Gap'; expected one of \['Massive', 'NoSinks'"
    ):
        detector_of({"name": "Gap"})


def test_what_is_no_detector_is_refused():
    for wrong in ("norm", ss.detectors.Norm):
        with pytest.raises(DetectorError, match="expected an object such as"):
            check_detector(wrong)

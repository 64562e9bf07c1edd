"""Every detector on states made by hand, its null, and its warnings."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope import detectors
from sinkscope.detectors.detection import Detection, expected_peak, jaccard
from sinkscope.detectors.rules import Rule
from sinkscope.errors import DetectorError, LayerError, SelectionError
from sinkscope.experiments.sweep_images import v_sinks
from sinkscope.kernels import residual
from sinkscope.probes.attention import ReceivedResult
from sinkscope.probes.residual import MassiveResult, NormResult, ScoreResult
from sinkscope.results.saving import pack, unpack
from sinkscope.testing import random_image
from tests.keeping_cls import keeping_cls

NAN = float("nan")


def flagged(detector, result):
    scores = detector.scores(result)
    limit = detector.thresholds(result, scores)[..., None]
    above = scores > limit if detector.strict else scores >= limit
    if hasattr(detector, "also"):
        above = above & detector.also(result)
    return above


EVERY = [
    detectors.CosineToBOS(0.5),
    detectors.Gap(),
    detectors.Limits("ratio", [6.0, float("inf"), 4.0, 5.0]),
    detectors.Massive(1.0, 6.0),
    detectors.NoSinks(),
    detectors.Norm("3sigma"),
    detectors.RandomTokens(3),
    detectors.Received(0.1),
    detectors.SinkDimensions((0, 5), tau=3.0),
    detectors.VisionTokens(),
    detectors.ZScore(2.0),
]
"""One of every detector, for `test_every_detector_keeps_its_promises`."""


def test_no_detector_is_missing():
    named = [getattr(detectors, name) for name in detectors.__all__]
    classes = {one for one in named if isinstance(one, type) and issubclass(one, Rule)}
    assert {type(detector) for detector in EVERY} == classes


@pytest.mark.parametrize("detector", EVERY, ids=lambda one: type(one).__name__)
def test_every_detector_keeps_its_promises(tiny, batch, detector):
    """A finite null, scores and flags of live tokens only, a threshold per layer, and a file."""
    lvlm = keeping_cls() if isinstance(detector, detectors.VisionTokens) else tiny("qwen2.5-vl")
    tower = "language" if not isinstance(detector, detectors.VisionTokens) else "vision"
    if isinstance(detector, detectors.Limits):
        tower = "vision"
    sample = batch(lvlm)
    live = sample.tokens.vision.live if tower == "vision" else sample.tokens.live
    found = ss.detect(lvlm, sample, detector, tower=tower)
    assert math.isfinite(found.null)
    assert found.detector == repr(detector)
    assert found.threshold.shape == found.mask.shape[:2]
    assert found.scores[~live[:, None].expand_as(found.mask)].isnan().all()
    assert not (found.mask & ~live[:, None]).any()
    assert unpack(pack(detector, "", {}), {}) == detector
    if hasattr(detector, "strict"):
        with pytest.raises(DetectorError, match="strict='no'; expected True or False"):
            replace(detector, strict="no")


def test_rms_score_by_hand():
    """One channel of 3 among three of 0: rms = 3 / 2, score 2 = sqrt(D), the bound."""
    h = torch.tensor([[[3.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]])
    score = residual.dimension_scores(h, {}, [0])
    assert torch.allclose(score, torch.tensor([[2.0, 1.0]]), atol=1e-5)
    raw = residual.dimension_scores(h, {}, [0, 2], rms=False)
    assert torch.equal(raw, torch.tensor([[3.0, 1.0]]))


def test_strictness_decides_a_score_equal_to_tau():
    result = ScoreResult(torch.tensor([[[2.0, 1.0, 3.0]]]), (0,))
    strict = detectors.SinkDimensions([0], tau=2.0)
    loose = detectors.SinkDimensions([0], tau=2.0, strict=False)
    assert flagged(strict, result).tolist() == [[[False, False, True]]]
    assert flagged(loose, result).tolist() == [[[True, False, True]]]


def test_massive_needs_both_limits():
    values = torch.tensor([[[[150.0], [90.0], [-150.0]]]])
    channels = torch.zeros(1, 1, 3, 1, dtype=torch.long)
    close_median = MassiveResult(values, channels, torch.tensor([[0.2]]), (0,), "resid_pre")
    tiny_median = MassiveResult(values, channels, torch.tensor([[0.05]]), (0,), "resid_pre")
    assert not flagged(detectors.Massive(), close_median).any()
    assert flagged(detectors.Massive(), tiny_median).tolist() == [[[True, False, True]]]


def test_norm_valley_lies_in_the_widest_gap():
    norms = torch.tensor([[[10.0, 11.0, 9.0, 10.5, 40.0, 42.0]]])
    valley = detectors.Norm("valley")
    limit = valley.thresholds(NormResult(norms, (0,), "resid_post"), norms)
    assert math.isclose(float(limit), math.sqrt(11 * 40), rel_tol=1e-5)
    assert flagged(valley, NormResult(norms, (0,), "resid_post")).sum() == 2
    even = torch.tensor([[[10.0, 11.0, 9.0, 10.5, 12.0, 12.5]]])
    assert not flagged(valley, NormResult(even, (0,), "resid_post")).any()


def test_three_sigma_by_hand():
    norms = torch.cat([torch.ones(1, 1, 99), torch.full((1, 1, 1), 11.0)], dim=-1)
    rule = detectors.Norm("3sigma")
    result = NormResult(norms, (0,), "resid_post")
    limit = rule.thresholds(result, norms)
    assert math.isclose(float(limit), 1.1 + 3 * 1.0, rel_tol=1e-4)
    assert flagged(rule, result).sum() == 1


def test_z_scores_by_hand():
    """The limit is that of 3 sigma at z=3, by row; padding does not count; eleven tokens are needed."""
    norms = torch.cat([torch.ones(1, 1, 99), torch.full((1, 1, 1), 11.0)], dim=-1)
    result = NormResult(torch.cat([norms, norms * NAN], dim=-1), (0,), "resid_post")
    limit = detectors.ZScore().thresholds(result, result.norms)
    assert math.isclose(float(limit), 1.1 + 3 * 1.0, rel_tol=1e-4)
    assert flagged(detectors.ZScore(), result).nonzero().tolist() == [[0, 0, 99]]
    assert not flagged(detectors.ZScore(9.91), result).any()
    for tokens, found in ((10, 0), (11, 1)):
        few = NormResult(norms[..., 100 - tokens :], (0,), "resid_post")
        assert flagged(detectors.ZScore(), few).sum() == found
    alone = NormResult(torch.tensor([[[5.0, NAN]]]), (0,), "resid_post")
    assert detectors.ZScore().thresholds(alone, alone.norms).tolist() == [[math.inf]]


def test_received_by_head_and_as_multiple_of_the_null():
    got = torch.tensor([[[[0.1, 0.4], [0.1, 0.1]]]])
    null = torch.tensor([[[0.5, 0.1]]])
    result = ReceivedResult(got, null, (0,), others=got / 2, others_null=null / 2)
    assert flagged(detectors.Received(0.3), result).tolist() == [[[False, True]]]
    assert not flagged(detectors.Received(0.3, heads="mean"), result).any()
    assert flagged(detectors.Received(times_null=3.0), result).tolist() == [[[False, True]]]
    assert torch.allclose(result.sink_rate(0.3), torch.tensor([[0.0, 0.5]]))


def test_expected_peak_of_one_half_normal():
    assert math.isclose(expected_peak(1), math.sqrt(2 / math.pi), rel_tol=1e-5)
    draws = torch.randn(200_000, 8, generator=torch.Generator().manual_seed(0)).abs().amax(1).mean()
    assert math.isclose(expected_peak(8), float(draws), rel_tol=5e-3)


def detection(mask):
    mask = torch.tensor(mask)[:, None]
    scores = mask.float()
    return Detection(
        "it", "language", (0,), mask, scores, torch.ones(1, 1), 0.0, torch.ones_like(mask[:, 0])
    )


def test_jaccard_by_hand():
    one, other = detection([[True, True, False]]), detection([[True, False, False]])
    assert jaccard(one, other) == 0.5
    assert jaccard(one, one) == 1.0
    empty = detection([[False, False, False]])
    assert jaccard(empty, empty) == 1.0
    table = ss.detectors.agreement({"one": one, "other": other})
    assert table.loc["one", "other"] == 0.5
    with pytest.raises(DetectorError, match="expected the same sample"):
        jaccard(one, detection([[True]]))


def test_a_detector_that_flags_a_fifth_of_the_image_says_so(tiny):
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(48, 48, 0), text="what is it")
    found = ss.detect(lvlm, sample, detectors.SinkDimensions([0, 1, 2], tau=0.5))
    assert found.saturated
    assert "over 20%" in found.warnings[0]
    assert found.fraction.max() > 0.2
    calm = ss.detect(lvlm, sample, detectors.Norm(1e6))
    assert not calm.saturated
    assert calm.warnings == ()
    assert calm.fraction.max() == 0


def test_detectors_run_in_one_pass_and_compare(tiny, batch):
    lvlm = tiny("qwen2.5-vl")
    sample = batch(lvlm)
    rules = {
        "dims": detectors.SinkDimensions([0, 5], tau=3.0),
        "norm": detectors.Norm("3sigma"),
        "cosine": detectors.CosineToBOS(0.5),
        "massive": detectors.Massive(1.0, 3.0),
    }
    for tower in ("language", "vision"):
        found = ss.detectors.detect_all(lvlm, sample, rules, tower=tower)
        assert ss.detectors.agreement(found).shape == (4, 4)
        for one in found.values():
            live = sample.tokens.vision.live if tower == "vision" else sample.tokens.live
            assert not (one.mask & ~live[:, None]).any()
            assert set(one.to_dataframe().columns) >= {"batch", "layer", "pos", "score", "flagged"}


WRONG = [
    (lambda d: d.SinkDimensions([0], tau=20.0), r"less than sqrt\(64\) = 8.0"),
    (lambda d: d.SinkDimensions([0], tau=-1.0), r"tau=-1.0; expected a finite number above 0"),
    (lambda d: d.SinkDimensions([99], tau=2.0), "expected 0 to 63"),
    (
        lambda d: d.SinkDimensions([0], tau=2.0, normalize="l2"),
        r"expected one of \('rms', 'none'\)",
    ),
    (lambda d: d.Massive(absolute=-1), "absolute=-1; expected a finite number of at least 0"),
    (lambda d: d.Norm("gap"), "tau='gap'.*'valley' or '3sigma'"),
    (lambda d: d.Norm(0), "tau=0; expected a finite number above 0"),
    (lambda d: d.Received(eps=1.5), "eps=1.5; expected a finite number above 0 and below 1"),
    (lambda d: d.Received(heads="sum"), r"expected one of \('max', 'mean'\)"),
    (lambda d: d.Received(times_null=-1.0), "times_null=-1.0; expected a finite number above 0"),
    (lambda d: d.Gap(gap=1.0), "gap=1.0; expected a finite number above 1"),
    (lambda d: d.Gap(draws=0.0), "draws=0.0; expected a finite number above 0 and below 1"),
    (lambda d: d.Gap(medians=float("nan")), "medians=nan; expected a finite number above 0"),
    (lambda d: d.Limits("size", (1.0, 1.0)), "expected one of"),
    (lambda d: d.Limits("ratio", (1.0,) * 9), "expected a positive one per block"),
    (lambda d: d.Limits("ratio", (1.0, float("nan"))), "expected a positive one per block"),
    (lambda d: d.CosineToBOS(1.0), "threshold=1.0; expected a finite number above 0 and below 1"),
    (lambda d: d.Norm, "expected an object such as"),
]


IMPOSSIBLE = [
    lambda: detectors.SinkDimensions([], tau=2.0),
    lambda: detectors.SinkDimensions("12", tau=2.0),
    lambda: detectors.SinkDimensions([0], tau=NAN),
    lambda: detectors.Massive(NAN, NAN),
    lambda: detectors.Massive(math.inf, 1000.0),
    lambda: detectors.Norm(NAN),
    lambda: detectors.Norm("valley", gap=NAN),
    lambda: detectors.Received(eps=NAN),
    lambda: detectors.Received(times_null=-1),
    lambda: detectors.Received(strict="no"),
    lambda: detectors.CosineToBOS("0.9"),
    lambda: detectors.Gap(growth=NAN),
    lambda: detectors.Gap(draws=True),
    lambda: detectors.Limits("ratio", (1.0, NAN)),
    lambda: detectors.RandomTokens(3, seed=0.5),
    lambda: detectors.NoSinks(3),
]


@pytest.mark.parametrize("make", IMPOSSIBLE)
def test_impossible_numbers_are_refused_when_a_detector_is_made(make):
    with pytest.raises(DetectorError, match=r"^Got .*; expected"):
        make()


def test_numbers_of_numpy_and_torch_are_numbers():
    values = torch.tensor([[[[150.0], [90.0]]]])
    seen = MassiveResult(values, torch.zeros_like(values).long(), torch.tensor([[1.0]]), (0,), "x")
    made = detectors.Massive(np.float32(100), torch.tensor(10.0))
    assert flagged(made, seen).tolist() == [[[True, False]]]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[m for _, m in WRONG])
def test_impossible_detectors_are_refused(tiny, make, message):
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(48, 48, 0), text="what is it")
    with pytest.raises(ss.SinkscopeError, match=message):
        ss.detect(lvlm, sample, make(detectors))


def test_calibration_needs_samples(tiny):
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(48, 48, 0), text="what is it")
    for samples, came in (([], "Got no samples"), (sample, "Got a Sample")):
        with pytest.raises(ss.errors.CalibrationError, match=f"{came}; expected a list"):
            ss.calibrate(lvlm, samples)


def test_layers_and_detections_that_are_not_there_are_named():
    one = detection([[True, False]])
    for layer in (3, -1, False):
        with pytest.raises(
            LayerError, match=rf"Got layer {layer}; this detection holds layers \(0,"
        ):
            one.at(layer)
    with pytest.raises(DetectorError, match="2 detections with 1 names"):
        ss.detectors.agreement([one, one])
    with pytest.raises(DetectorError, match=r"Got object; expected what ss\.detect"):
        ss.detectors.agreement({"a": one, "b": object()})


def test_known_constants_are_found_by_size_and_only_agreed_ones_are_used(tiny):
    assert detectors.known_for(tiny("llava-clip-llama")) is None
    table = detectors.table().set_index("model")
    assert table.loc["LLaVA-1.5-7B", "LLM sink channels"] == [1415, 2533]
    assert bool(table.loc["LLaVA-1.5-7B", "used by default"])
    assert not bool(table.loc["Qwen2.5-VL-3B", "used by default"])


@dataclass(frozen=True)
class Equal(detectors.Norm):
    """Every token scores exactly its threshold."""

    tau: float = 1.0

    def scores(self, result):
        return torch.where(result.norms.isnan(), result.norms, 1.0)


def by_hand(trace, sample, rule, merge):
    """V-sinks position by position, from the detection's scores and mask and the sample's sources."""
    tokens, found = sample.tokens, trace.v_detection
    out = torch.zeros_like(tokens.live)
    for row, pos in (tokens.image >= 0).nonzero().tolist():
        image = int(tokens.image_index[row, pos])
        sources = [int(s) for s in tokens.sources[row, pos] if s >= 0]
        for feed in (found.layers.index(layer) for layer in trace.feeds):
            mean = sum(float(found.scores[image, feed, s]) for s in sources) / len(sources)
            limit = float(found.threshold[image, feed])
            passes = mean > limit if rule.strict else mean >= limit
            flagged = any(bool(found.mask[image, feed, s]) for s in sources)
            out[row, pos] |= flagged and (merge != "mean" or passes)
    return out


RULES = {
    "massive": detectors.Massive(1e-3, 6.0),
    "massive, ratio out of reach": detectors.Massive(1e-6, 1e9),
    "equal": Equal(),
    "equal, strict": Equal(strict=True),
    "gap": detectors.Gap(),
}


@pytest.mark.parametrize("family", ["qwen2.5-vl", "gemma3"])
@pytest.mark.parametrize("name", RULES)
def test_where_tokens_merge_the_whole_rule_holds(tiny, batch, family, name):
    """With the mean too: a rule that flags no ViT token makes no V-sink."""
    lvlm = tiny(family)
    sample, rule = batch(lvlm), RULES[name]
    for merge in ("max", "mean", "any"):
        trace = ss.trace_sinks(lvlm, sample, rule, ss.detectors.NoSinks(), merge=merge)
        assert torch.equal(trace.v_sinks, by_hand(trace, sample, rule, merge)), merge
        if not trace.v_detection.mask.any():
            assert not trace.v_sinks.any()
        if name == "equal":
            assert torch.equal(trace.v_sinks, sample.tokens.image >= 0)
    one = lvlm.prepare(random_image(56, 70), "what is it")
    want = ss.trace_sinks(lvlm, one, rule, ss.detectors.NoSinks(), merge="mean").v_sinks[0]
    assert torch.equal(v_sinks(lvlm, one, rule, "mean"), want)  # those of a sweep


def test_an_unknown_way_to_merge_is_refused_before_the_model_runs(tiny, batch, monkeypatch):
    lvlm = tiny("qwen2.5-vl")
    sample = batch(lvlm)
    monkeypatch.setattr(type(lvlm), "run", None)
    with pytest.raises(SelectionError, match="merge='median'; expected one of"):
        ss.trace_sinks(lvlm, sample, merge="median")

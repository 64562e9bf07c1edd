"""What the default rules find on a real model, against truth that plain eager `transformers` computes."""

from collections import Counter

import pytest
import torch

import sinkscope as ss
from benchmarks.example_detection import (
    FEW_MEDIANS,
    counts,
    photo,
    prompts,
    random_models,
    truth_of,
    variants,
)
from tests.real_model import example

NAMES = (
    "scene, count",
    "scene, describe",
    "china.jpg",
    "flower.jpg",
    "two images",
    "batch of two",
    "text of 20",
    "text of 300",
    "text of 1000",
)


@pytest.fixture(scope="module")
def lvlm():
    return example()


@pytest.fixture(scope="module")
def measured(lvlm):
    """Trace and truth of every prompt, made when the first test asks for it."""
    samples, made = prompts(lvlm), {}
    assert tuple(samples) == NAMES

    def get(name):
        if name not in made:
            made[name] = ss.trace_sinks(lvlm, samples[name]), truth_of(lvlm, samples[name])
        return made[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_every_real_sink_is_found_and_none_is_made_up(measured, name):
    trace, truth = measured(name)
    found = counts(trace.l_detection.mask, truth)
    assert sum(c.found for c in found) >= 26
    assert [(layer, c) for layer, c in enumerate(found) if c.missed or c.wrong] == []
    assert trace.chosen == "the gap rule on this sample"
    # The towers' sinks of this model are text: no patch has a spike.
    assert not trace.v_sinks.any()
    assert not trace.l_sinks().any()


@pytest.mark.parametrize("name", ["scene, count", "china.jpg", "two images", "text of 300"])
def test_no_constant_of_the_rule_decides(measured, name):
    """Each halved and doubled: nothing that must be found is lost, hardly anything is made up."""
    trace, truth = measured(name)
    for said, rule in variants().items():
        flagged = rule.spikes_in(trace.language) & rule.also(trace.language)
        found = counts(flagged, truth)
        assert sum(c.missed for c in found) == 0, said
        assert sum(c.wrong for c in found) <= (2 if said == "gap x 0.5" else 0), said


def test_position_0_lives_twice_and_position_1_is_a_decoy_afterwards(measured):
    trace, truth = measured("china.jpg")
    first, second = (r for r in trace.records if r.pos in (0, 1))
    assert first.llm_lives == ((1, 9, "mlp"), (11, 29, "mlp"))
    assert second.llm_lives == ((1, 9, "mlp"),)
    assert (first.word, second.word) == ("<|im_start|>", "user")
    # It spikes again, above a hundred medians, and no head looks at it.
    assert truth.medians[0, 12, 1] > 100
    assert truth.share[0, 12, 1] < 0.01
    assert first.verdict == "NOP"
    assert first.head_received > 0.9


def test_the_most_attended_token_is_ranked_first(measured):
    """By a multiple of the null, which is at most 1 over it, the last token would be."""
    trace, truth = measured("scene, count")
    by_truth = int(truth.share[0].amax(dim=0).nan_to_num().argmax())
    sinks = [r for r in trace.records if r.kind == "text"]
    assert max(sinks, key=lambda r: r.excess).pos == by_truth == 0
    drawn = trace.language.drawn()[0].nan_to_num(-1.0).amax(dim=0)
    assert int(drawn.argmax()) == 0
    last = int(trace.sample.tokens.last[0])
    assert trace.language.drawn()[0, :, last].isnan().all()


def test_attention_without_a_spike_has_its_name(measured):
    for name, many in (("china.jpg", 1), ("two images", 2)):
        trace, _ = measured(name)
        attended = [r for r in trace.records if r.kind == "attention"]
        assert [r.vit_kind for r in attended] == ["cls"] * many
        assert torch.equal(trace.attended.nonzero()[:, 1], torch.tensor([r.pos for r in attended]))
        assert min(max(r.vit_drawn) for r in attended) > 0.3
    said = trace.outcomes["vision"]
    assert said.startswith("no patch spikes: the largest |h| is ")
    reasons = {c.token: c.reason for c in trace.candidates if c.tower == "vision"}
    assert reasons["CLS"] == "no patch: a kind of its own, listed apart"


def test_cls_receives_what_the_eager_tower_gives(lvlm, measured):
    trace, _ = measured("china.jpg")
    module = lvlm.module
    tower = module.model.vision_tower
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    with torch.no_grad():
        out = tower(trace.sample.inputs["pixel_values"], output_attentions=True)
    module.set_attn_implementation(before)
    weights = torch.stack([a[0] for a in out.attentions])
    n = weights.shape[-1]
    others = (weights.sum(dim=2) - weights.diagonal(dim1=2, dim2=3)) / (n - 1)
    got = trace.vision.received.others
    assert got is not None
    assert torch.allclose(got[0], others, atol=1e-5)
    assert trace.records[2].vit_drawn == pytest.approx(
        (others - 1 / n).amax(dim=1)[:, 0].tolist(), abs=1e-5
    )


def test_an_attention_rule_makes_cls_a_v_sink(lvlm):
    sample = lvlm.prepare(images=photo("china.jpg"), text="What is in the picture?")
    trace = ss.trace_sinks(lvlm, sample, ss.detectors.Received(0.035, heads="mean"))
    assert [(r.kind, r.vit_kind) for r in trace.records if r.pos == 3] == [("V", "cls")]
    assert trace.chosen == "V: given; L: the gap rule on this sample"
    assert not trace.attended.any()


def test_one_pass_per_trace(lvlm, monkeypatch):
    passes = Counter()
    run = lvlm.module.forward
    monkeypatch.setattr(
        lvlm.module, "forward", lambda *args, **kwargs: passes.update("p") or run(*args, **kwargs)
    )
    sample = lvlm.prepare(images=photo("china.jpg"), text="What is in the picture?")
    ss.trace_sinks(lvlm, sample)
    assert passes["p"] == 1
    ss.calibrate(lvlm, [sample])
    assert passes["p"] == 3


def test_a_calibration_on_scenes_holds_on_a_photograph(lvlm, measured):
    """Limits judge states alone, so they are looser than the gap rule, and miss nothing."""
    samples = [measured(name)[0].sample for name in ("scene, count", "scene, describe")]
    found = ss.calibrate(lvlm, samples, progress=False)
    assert not found.vision.found
    assert found.language.found
    trace, truth = measured("china.jpg")
    again = ss.trace_sinks(lvlm, trace.sample, calibration=found)
    assert again.chosen == (
        "V: calibrated on 2 samples, which show none; L: calibrated on 2 samples"
    )
    each = counts(again.l_detection.mask, truth)
    assert sum(c.missed for c in each) == 0
    assert sum(c.wrong for c in each) == 0


def test_half_precision_finds_the_same():
    lvlm = ss.load_example("bfloat16", progress=False)
    sample = lvlm.prepare(images=photo("china.jpg"), text="What is in the picture?")
    trace, truth = ss.trace_sinks(lvlm, sample), truth_of(lvlm, sample)
    found = counts(trace.l_detection.mask, truth)
    assert sum(c.found for c in found) >= 26
    assert sum(c.missed + c.wrong for c in found) == 0
    assert [r.kind for r in trace.records].count("attention") == 1


def test_random_weights_of_the_same_shape_have_no_sinks(lvlm):
    assert random_models(lvlm, 2) == [0, 0]


def test_what_is_listed_between_is_between(measured):
    """The truth scores nothing in between, and there is something there."""
    _, truth = measured("china.jpg")
    between = ~truth.must & ~truth.must_not
    assert not (truth.must & truth.must_not).any()
    large = (truth.medians >= FEW_MEDIANS) & (truth.share >= 0.2) & between
    assert large.any()


def test_cls_is_no_ordinary_token(lvlm, measured):
    """A control draws from ordinary tokens; CLS, to which the tower attends throughout, is none."""
    trace, _ = measured("china.jpg")
    assert trace.attended[0, 3]
    assert not trace.ordinary()[0, 3]
    assert not trace.ordinary(5)[0, 3]
    assert int(trace.ordinary().sum()) == 256
    assert trace.groups["ordinary"][0, 5, 3]  # groups split all tokens

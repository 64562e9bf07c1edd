"""The gap rule on evidence made by hand, and what it says where it flags nothing."""

import dataclasses
import math

import pytest
import torch

import sinkscope as ss
from sinkscope import detectors
from sinkscope.detectors.calibration import _Look, _rule, separation
from sinkscope.detectors.gap import outcome_of
from sinkscope.experiments.measuring import nothing_seen
from sinkscope.probes import EvidenceResult, MassiveResult, ReceivedResult
from sinkscope.testing import random_image, tiny_llava

TOKENS = 16


def massive(sizes, channels, layers, site="resid_pre"):
    """Two channels of every token: the largest, and a small one."""
    values = torch.stack([sizes, torch.full_like(sizes, 0.5)], dim=-1)
    index = torch.stack([channels, torch.full_like(channels, 99)], dim=-1)
    return MassiveResult(values, index, torch.ones(sizes.shape[:2]), layers, site)


def evidence(spikes, drawn, *, tower="language", before=None, judged=None):
    """One row: layers of ``{pos: medians}`` and ``{pos: beyond uniform}``; all else ordinary."""
    layers = tuple(range(1, len(spikes) + 1))
    sizes, gives = torch.full((1, len(spikes), TOKENS), 5.0), torch.zeros(1, len(spikes), TOKENS)
    channels = torch.zeros(1, len(spikes), TOKENS, dtype=torch.long)
    for i, (large, taken) in enumerate(zip(spikes, drawn, strict=True)):
        for pos, medians in large.items():
            sizes[0, i, pos], channels[0, i, pos] = medians, 7
        for pos, share in taken.items():
            gives[0, i, pos] = share
    null = torch.full((1, len(spikes), TOKENS), 0.1)
    others = (gives + 0.1)[:, :, None]
    received = ReceivedResult(others, null, layers, others, null)
    first = torch.full((1, 1, TOKENS), 5.0)
    at = torch.zeros(1, 1, TOKENS, dtype=torch.long)
    for pos, medians in (before or {}).items():
        first[0, 0, pos], at[0, 0, pos] = medians, 7
    return EvidenceResult(
        massive(sizes, channels, layers),
        received,
        massive(first, at, (0,)) if tower == "language" else None,
        torch.ones(1, TOKENS, dtype=torch.bool) if judged is None else judged,
        layers,
    )


def flagged(rule, seen):
    scores = rule.scores(seen)
    above = scores >= rule.thresholds(seen, scores)[..., None]
    return [sorted(row.nonzero().flatten().tolist()) for row in (above & rule.also(seen))[0]]


def test_what_spikes_and_draws_in_one_layer_is_a_sink():
    seen = evidence(
        [{0: 200.0, 1: 120.0}, {0: 9000.0, 1: 105.0}, {0: 300.0, 3: 300.0}],
        [{0: 0.5, 1: 0.4}, {0: 0.8, 1: -0.01}, {3: 0.05, 5: 0.9}],
    )
    assert flagged(detectors.Gap(), seen) == [[0, 1], [0], []]
    assert seen.upper_quartile().tolist() == [[5.0, 5.0, 5.0]]
    assert seen.prominence()[0, 0, 1] == 24.0


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        (detectors.Gap(), [[0]]),
        (detectors.Gap(gap=4.1), [[]]),
        (detectors.Gap(medians=21.0), [[]]),
        (detectors.Gap(draws=0.21), [[]]),
        (detectors.Gap(gap=3.9, medians=19.0, draws=0.19), [[0]]),
    ],
)
def test_every_limit_decides(rule, found):
    assert flagged(rule, evidence([{0: 20.0}], [{0: 0.2}])) == found


def test_a_spike_of_the_embeddings_is_not_born_in_the_llm():
    seen = evidence([{0: 100.0, 2: 100.0}], [{0: 0.5, 2: 0.5}], before={0: 60.0, 2: 49.0})
    assert seen.growth()[0, 0, 0] == pytest.approx(100 / 60)
    assert flagged(detectors.Gap(), seen) == [[2]]
    # A channel that was not kept was at most as large as the least that was.
    assert seen.growth()[0, 0, 5] == 1.0
    assert evidence([{0: 100.0}], [{}]).growth()[0, 0, 0] == 200.0


def test_in_the_vision_tower_a_patch_may_draw_in_any_block_and_cls_is_no_patch():
    judged = torch.ones(1, TOKENS, dtype=torch.bool)
    judged[0, 0] = False
    seen = evidence(
        [{0: 90.0, 4: 90.0}, {0: 90.0, 4: 90.0}],
        [{0: 0.5}, {0: 0.5, 4: 0.3}],
        tower="vision",
        judged=judged,
    )
    assert flagged(detectors.Gap(), seen) == [[4], [4]]


@pytest.mark.parametrize(
    ("spikes", "drawn", "said"),
    [
        ({0: 60.0}, {}, "60 medians and 12.0 times the upper quartile of its layer, and came with"),
        ({}, {}, "no token spikes: the largest |h| is 5 medians and 1.0 times"),
        (
            {},
            {},
            "no token draws: the most that a head gives one beyond uniform attention is 0.000",
        ),
        ({2: 208.0}, {}, "1 token spikes: position 2 (208 medians)"),
        (
            {},
            {4: 0.3, 5: 0.2},
            "2 tokens draw attention: position 4 (0.30 beyond uniform), position 5",
        ),
        ({2: 208.0}, {4: 0.3}, "none does both in one layer"),
    ],
)
def test_outcomes_are_said_with_their_numbers(spikes, drawn, said):
    seen = evidence([spikes], [drawn], before={0: 60.0})
    assert said in outcome_of(detectors.Gap(), [seen], "language")


def test_the_quartile_of_many_few_and_no_tokens():
    """Of n tokens it is the one with the index ceil(0.75 (n - 1)); 17 million are more than torch 2.6 takes."""
    wide = torch.arange(16, 0, -1).float()[None, None].repeat(1, 1_100_000, 1)
    wide[0, 1, 5:], wide[0, 2] = torch.nan, torch.nan
    seen = evidence([{}], [{}])
    values, layers = wide[..., None], tuple(range(wide.shape[1]))
    large = MassiveResult(values, values.long(), torch.ones(wide.shape[:2]), layers, "resid_pre")
    got = dataclasses.replace(seen, massive=large).upper_quartile()
    assert got.shape == (1, 1_100_000)
    assert got[0, [0, 1, 3]].tolist() == [13.0, 15.0, 13.0]
    assert got[0, 2].isnan()
    for n in range(1, 17):
        judged = (torch.arange(16) < n)[None]
        few = evidence([{i: 100.0 + i for i in range(16)}], [{}], judged=judged)
        want = few.medians()[0, 0, :n].quantile(0.75, interpolation="higher")
        assert few.upper_quartile() == want
    nothing = nothing_seen(detectors.Gap())[1]  # a tower without a token
    assert nothing.upper_quartile().shape == (0, 0)
    assert nothing.prominence().shape == (0, 0, 1)


def test_what_draws_is_the_most_of_the_heads_that_are_known():
    """NaN in some heads only, in all, and without a null."""
    others = torch.rand(2, 3, 4, TOKENS, generator=torch.Generator().manual_seed(0))
    null = torch.rand(2, 3, TOKENS, generator=torch.Generator().manual_seed(1))
    others[0, 1, :2, 3], others[1, 2, :, 4:], null[0, 0, 7] = torch.nan, torch.nan, torch.nan
    seen = evidence([{}], [{}])
    received = ReceivedResult(others, null, (1, 2, 3), others, null)
    got = dataclasses.replace(seen, received=received).drawn()
    excess = others - null[:, :, None]
    want = excess.nan_to_num(nan=-2.0).amax(dim=2)
    want = want.masked_fill(excess.isnan().all(dim=2), torch.nan)
    assert torch.equal(got.nan_to_num(-9.0), want.nan_to_num(-9.0))


def looks_of(samples):
    rule = detectors.Gap()
    return [_Look(one, rule.spikes_in(one) & rule.also(one)) for one in samples]


def test_one_odd_token_vetoes_nothing():
    """Thirty samples; in one of them a token without attention is as large as the sinks."""
    samples = [evidence([{0: 200.0}], [{0: 0.5}]) for _ in range(30)]
    samples[3] = evidence([{0: 200.0, 9: 250.0}], [{0: 0.5}])
    looks = looks_of(samples)
    found = separation(looks, [k.evidence.medians() for k in looks], 0.0)
    assert (found.low, found.high) == ({1: 200.0}, {1: 5.0})
    assert found.clear == (1,)
    # Two of thirty are more than one sink in twenty.
    samples[4] = samples[3]
    looks = looks_of(samples)
    found = separation(looks, [k.evidence.medians() for k in looks], 0.0)
    assert found.high == {1: 250.0}
    assert found.clear == ()


def test_layers_of_different_size_get_a_limit_each():
    looks = looks_of([evidence([{0: 200.0}, {0: 9000.0, 1: 300.0}], [{0: 0.5}, {0: 0.5}])] * 2)
    found = separation(looks, [k.evidence.medians() for k in looks], 0.0)
    rule, tau = _rule("ratio", (), found, 4)
    assert tau is None
    assert isinstance(rule, detectors.Limits)
    want = [math.inf, (200.0 * 5.0) ** 0.5, (9000.0 * 300.0) ** 0.5, math.inf]
    assert list(rule.limits) == pytest.approx(want)
    one = rule.at(2)
    assert isinstance(one, detectors.Massive)
    assert (one.absolute, one.ratio) == (0.0, pytest.approx(want[2]))
    assert isinstance(rule.at(0), detectors.NoSinks)


def test_limits_are_those_of_their_layers(tiny):
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(48, 48, 0), text="what is it")
    n = lvlm.anatomy.language.n_layers
    probe = ss.MassiveActivations(site="resid_pre", k=1)
    sizes = lvlm.run(sample, [probe])[probe]
    for score, values in (("ratio", sizes.ratio()), ("absolute", sizes.values[..., 0].abs())):
        limits = [float(values[0, i].nan_to_num().quantile(0.9)) for i in range(n)]
        found = ss.detect(lvlm, sample, detectors.Limits(score, limits))
        want = values >= torch.tensor(limits)[None, :, None]
        assert torch.equal(found.mask, want & sample.tokens.live[:, None])
    dims = detectors.Limits("channels", [2.0] * n, dims=(0, 3))
    same = detectors.SinkDimensions((0, 3), 2.0, strict=False)
    assert torch.equal(ss.detect(lvlm, sample, dims).mask, ss.detect(lvlm, sample, same).mask)


def test_random_initialisations_have_no_sinks():
    for seed in range(3):
        model, processor = tiny_llava(seed=seed)
        lvlm = ss.LVLM(model, processor, verify=False)
        trace = ss.trace_sinks(
            lvlm, lvlm.prepare(images=random_image(48, 48, seed), text="what is it")
        )
        assert trace.records == ()
        assert set(trace.outcomes) == {"vision", "language"}
        assert trace.chosen == "the gap rule on this sample"
        assert {c.tower for c in trace.candidates} == {"vision", "language"}
        assert not any(c.flagged for c in trace.candidates)


def test_a_prompt_that_is_too_short_takes_the_generic_definition(tiny):
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(48, 48, 0), text="what is it")
    rules = detectors.SinkRules.on_sample(lvlm, sample)
    assert isinstance(rules.v, detectors.Gap)
    live = sample.tokens.live.clone()
    live[:, 8:] = False
    short = dataclasses.replace(sample, tokens=dataclasses.replace(sample.tokens, live=live))
    rules = detectors.SinkRules.on_sample(lvlm, short)
    assert (rules.v, rules.l_rule) == (detectors.Massive(), detectors.Massive())
    assert rules.chosen.startswith("the generic definition")


def test_given_rules_come_first_and_nothing_is_calibrated_for_nothing(tiny):
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(48, 48, 0), text="what is it")
    norm, none = detectors.Norm(5.0), detectors.NoSinks()
    rules = detectors.SinkRules.on_sample(lvlm, sample, norm)
    assert (rules.v, rules.v_source, rules.l_source) == (
        norm,
        "given",
        "the gap rule on this sample",
    )
    assert rules.chosen == "V: given; L: the gap rule on this sample"

    def never():
        raise AssertionError("calibrated for nothing")

    assert detectors.SinkRules.on_others(lvlm, never, norm, none).chosen == "given"
    half = detectors.SinkRules.on_others(lvlm, lambda: [sample], norm)
    assert half.calibration is not None
    assert half.calibration.vision.reason == "this tower was not looked at"
    assert half.l_source == "calibrated on 1 samples, which show none"


def test_published_constants_come_after_given_rules_and_before_the_gap_rule(tiny, monkeypatch):
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(48, 48, 0), text="what is it")
    norm, given = detectors.Norm(5.0), detectors.Norm(9.0)
    row = detectors.Known("Tiny-1B", "llava", 64, 3, 64, (1, 2), 2.0, norm, "made up here", True)
    monkeypatch.setattr("sinkscope.detectors.choice.known_for", lambda lvlm: row)

    def never():
        raise AssertionError("calibrated for nothing")

    for rules in (
        detectors.SinkRules.on_sample(lvlm, sample, given),
        detectors.SinkRules.on_others(lvlm, never, given),
    ):
        assert (rules.v, rules.l_rule) == (given, row.l_detector)
        assert rules.chosen == "V: given; L: published constants of Tiny-1B"
    both = detectors.SinkRules.on_sample(lvlm, sample)
    assert (both.v, both.l_rule) == (norm, row.l_detector)
    assert both.chosen == "published constants of Tiny-1B"

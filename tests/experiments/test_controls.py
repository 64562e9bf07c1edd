"""RandomControl on a planted model: as many tokens, as much attended, or another image's."""

from dataclasses import replace

import pytest
import torch

import sinkscope as ss
from sinkscope import detectors
from sinkscope.errors import NoEffectError
from sinkscope.testing import plant

RULES = (detectors.Norm("valley"), detectors.SinkDimensions((41, 101), 3.0))


@pytest.fixture(scope="module")
def traced():
    planted = plant("clip", v_sinks=(9, 46), l_sinks=(20, 33), v_layer=1, l_layer=1)
    lvlm = ss.LVLM(planted.model, planted.processor, verify=False)
    traces = [
        ss.trace_sinks(lvlm, lvlm.prepare(inputs=planted.inputs(image_seed=seed)), *RULES)
        for seed in (0, 1)
    ]
    return lvlm, traces[0], traces[1]


def test_count_controls_edit_as_many_ordinary_tokens(traced):
    _, trace, _ = traced
    control = ss.RandomControl(ss.MaskKeys(trace.v_sinks, layers=[2, 3]), n=5)
    draws = control.draws(trace)
    assert len(draws) == 5
    sinks = trace.v_sinks | trace.l_sinks().any(dim=1) | trace.text_sinks().any(dim=1)
    for it in draws:
        assert it.tokens.sum() == trace.v_sinks.sum() == 2
        assert not (it.tokens & sinks).any()
        assert it.layers == [2, 3]
    again = control.draws(trace)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(draws, again, strict=True))
    assert len({tuple(it.tokens.flatten().tolist()) for it in draws}) > 1
    (it,) = ss.RandomControl(ss.MaskKeys(trace.l_sinks(), layers=None), n=1).draws(trace)
    assert torch.equal(it.tokens.sum(-1), trace.l_sinks().sum(-1)), "layer by layer"


@pytest.mark.parametrize("match", ["count", "mass"])
def test_the_result_tells_how_well_controls_are_matched(traced, match):
    lvlm, trace, _ = traced
    edit = ss.MaskKeys(trace.v_sinks, layers=[2, 3], heads=[1])
    received = trace.received[:, [2, 3], 1].nan_to_num().mean(dim=1)
    control = ss.RandomControl(edit, match, n=3)
    result, wanted = control.run(lvlm, trace), received[trace.v_sinks].sum()
    assert result.real_mass.item() == pytest.approx(wanted.item())
    for draw, it in enumerate(control.draws(trace)):
        taken = received[it.tokens]
        assert result.mass[draw, 0] == pytest.approx(taken.sum().item())
        assert not (it.tokens & ~trace.ordinary()).any()
        if match == "mass":  # no token more than it needs
            assert taken.sum() >= wanted > taken.sum() - taken.max()
    assert (result.mass >= result.real_mass).all() == (match == "mass")
    line = result.to_dataframe().loc[0]
    assert line["control_mass"] == pytest.approx(result.mass.mean().item())


@pytest.mark.parametrize(
    ("match", "source", "target"),
    [
        ("count", "v_sinks", "name"),
        ("count", "l_sinks", "by layer"),
        ("mass", "v_sinks", "by layer"),
        ("mass", "l_sinks", "name"),
        ("mass", "l_sinks", "mask"),
    ],
)
def test_a_moved_source_takes_its_tokens_from_the_target(traced, match, source, target):
    lvlm, trace, _ = traced
    sinks = trace.v_sinks if source == "v_sinks" else trace.l_sinks()
    aims = {
        "name": "bos" if match == "count" else "last",
        "mask": trace.ordinary(),
        "by layer": trace.groups["ordinary"],
    }
    edit = ss.Redistribute(sinks, aims[target], 0.5)
    for it in ss.RandomControl(edit, match, n=2).draws(trace):
        assert it.source.any()
        source, aim = (x if x.ndim == 3 else x[:, None] for x in (it.source, it.target))
        assert not (source & aim).any()
        before = trace.sample.tokens.select(edit.target, trace.n_layers)
        before = before if before.ndim == 3 else before[:, None]
        assert torch.equal(aim | (source & before), before | (source & before))
        assert lvlm.run(trace.sample, interventions=[it]).effects[it].touched.all()


def test_position_controls_need_another_image(traced):
    _, trace, other = traced
    control = ss.RandomControl(ss.MaskKeys(trace.v_sinks), match="position")
    for donor, message in ((None, "without a donor"), ([], "without a donor"),
                           (trace.sample, "Got Sample as a donor"),
                           (other, "lie where this one has sinks too")):  # fmt: skip
        with pytest.raises(ss.SinkscopeError, match=message):
            control.draws(trace, donor)
    moved = plant("clip", v_sinks=(1, 2), l_sinks=(3,))
    second = ss.LVLM(moved.model, moved.processor, verify=False)
    donor = ss.trace_sinks(second, second.prepare(inputs=moved.inputs()), *RULES)
    (it,) = control.draws(trace, donor)
    assert it.tokens.sum() == 3


def test_the_result_carries_distribution_interval_and_p(traced):
    lvlm, trace, _ = traced
    result = ss.RandomControl(ss.MaskKeys(trace.v_sinks), n=19).run(lvlm, trace)
    assert result.controls.shape == (19, 1)
    assert torch.equal(result.base, torch.zeros(1))
    far = (result.controls - result.controls.mean()).abs()
    as_far = int((far >= (result.real - result.controls.mean()).abs()).sum())
    assert result.p_value().item() == pytest.approx((1 + as_far) / 20)
    columns = {"base", "real", "control", "low", "high", "p", "real_mass", "control_mass"}
    assert set(result.to_dataframe().columns) == columns
    controls = torch.arange(101.0)[:, None]
    result = ss.experiments.ControlResult(torch.zeros(1), controls, torch.zeros(1), "count")
    for level, ends in {0.95: (2.5, 97.5), 0.9: (5.0, 95.0), 0.5: (25.0, 75.0)}.items():
        assert [x.item() for x in result.interval(level)] == pytest.approx(ends)
    line = result.to_dataframe().loc[0]
    assert (line["low"], line["high"], line["control"]) == pytest.approx((2.5, 97.5, 50.0))


def test_replacements_stand_side_by_side_with_their_controls(traced):
    """Every line is what its own edit and controls give, and a sink's zero is the mildest of them."""
    lvlm, trace, _ = traced
    table = ss.experiments.replacement_table(lvlm, trace, trace.v_sinks, [2, 3], n=6, seed=2)
    assert list(table["replacement"]) == ["zero", "mean", "resample"]
    assert list(table["batch"]) == [0, 0, 0]
    for line in table.to_dict("records"):
        edit = ss.AblateValues(trace.v_sinks, line["replacement"], [2, 3], seed=2)
        kl = lvlm.run(trace.sample, interventions=[edit], kl=True).effects[edit].kl
        assert line["real"] == pytest.approx(float(kl), abs=1e-5)
        alone = ss.RandomControl(edit, n=6, seed=2).run(lvlm, trace)
        assert line["control"] == float(alone.controls.mean())
        assert line["p"] == float(alone.p_value())
    real = table.set_index("replacement")["real"]
    assert real["zero"] < min(real["mean"], real["resample"])


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (dict(match="size"), "expected one of"),
        (dict(n=0), "Got n=0; expected an int from 1"),
        (dict(intervention=ss.interventions.EvictKeys()), "one of the fields"),
        (dict(intervention=ss.MaskKeys("all")), "0 ordinary image tokens to draw from"),
        (dict(intervention=ss.MaskKeys("all", tower="vision")), "intervention of the decoder"),
        (dict(intervention=ss.MaskKeys("text"), match="mass"), r"receive 0\S* of attention togeth"),
        (dict(seed="a"), "Got seed='a'; expected an int"),
        (dict(seed=True), "Got seed=True; expected an int"),
        (dict(intervention=ss.MaskKeys), "Got MaskKeys; expected an intervention of the decoder"),
        (
            dict(intervention=ss.MaskKeys("first", [-1]), match="mass"),
            r"Got layer -1; .* never neg",
        ),
        (dict(intervention=ss.MaskKeys("first", [True]), match="mass"), "Got layer True"),
        (dict(intervention=ss.MaskKeys("first", "2"), match="mass"), "Got layer '2'"),
        (dict(intervention=ss.AttentionKnockout("last", "first"), match="mass"), r"lvlm=lvlm\)"),
    ],
)
def test_impossible_controls_are_refused(traced, control, message):
    _, trace, _ = traced
    given = {"intervention": ss.MaskKeys(trace.v_sinks)} | control
    with pytest.raises(ss.SinkscopeError, match=message):
        ss.RandomControl(**given).draws(trace)


def test_what_is_no_trace_no_score_or_finds_its_own_tokens_is_refused(traced):
    lvlm, trace, _ = traced
    control = ss.RandomControl(ss.MaskKeys(trace.v_sinks), n=1)
    with pytest.raises(ss.SinkscopeError, match=r"Got Sample as a sample .*Write ss\.trace_sinks"):
        control.run(lvlm, trace.sample)
    with pytest.raises(ss.SinkscopeError, match="score that returns float; expected a tensor"):
        control.run(lvlm, trace, lambda run: 3.0)
    with pytest.raises(ss.SinkscopeError, match=r"a tensor of shape \(1, 1\); expected .* \(1,\)"):
        control.run(lvlm, trace, lambda run: run.logits[:, :, 0])
    gate = ss.LSG.for_model(lvlm, layer=1, v_detector=detectors.Norm(5.0))
    with pytest.raises(ss.SinkscopeError, match=r"v_detector=ss\.detectors\.RandomTokens"):
        ss.RandomControl(gate, n=1).draws(trace)


def receiving(trace, received):
    """The trace with this received attention."""
    result = replace(trace.language.received, received=received)
    return replace(trace, language=replace(trace.language, received=result))


@pytest.mark.parametrize(("layers", "many"), [([3], 8), (3, 8), ([0], 1), ([0, 3], 2), (None, 2)])
def test_mass_is_that_of_the_edited_layers(traced, layers, many):
    """Two sinks that receive 1 each in layer 3, and ordinary tokens that receive a quarter, and so on."""
    _, trace, _ = traced
    received = torch.zeros_like(trace.received)
    for layer, sink, other in ((0, 0.25, 1.0), (3, 1.0, 0.25)):
        by_token = torch.where(trace.v_sinks, sink, torch.where(trace.ordinary(), other, 0.0))
        received[:, layer] = by_token[:, None]
    trace = receiving(trace, received)
    (it,) = ss.RandomControl(ss.MaskKeys(trace.v_sinks, layers), "mass", n=1).draws(trace)
    assert it.tokens.sum() == many


def test_mass_is_that_of_the_edited_heads(traced):
    _, trace, _ = traced
    received = torch.zeros_like(trace.received)
    received[:, :, 1] = torch.where(trace.v_sinks, 1.0, 0.5)[:, None]
    trace = receiving(trace, received)
    (it,) = ss.RandomControl(ss.MaskKeys(trace.v_sinks, heads=[1]), "mass", n=1).draws(trace)
    assert it.tokens.sum() == 4
    most = trace.v_sinks | (trace.ordinary() & (trace.sample.tokens.row > 0))
    with pytest.raises(ss.SinkscopeError, match=r"Row 0 has \d+ ordinary image tokens that rec"):
        ss.RandomControl(ss.MaskKeys(most, heads=[1]), "mass", n=1).draws(trace)


def test_mass_of_a_selection_by_layer_is_matched_in_each_layer(traced):
    lvlm, trace, _ = traced
    sinks, received = trace.l_sinks(), trace.received.nan_to_num().mean(dim=2)
    assert not sinks[:, 0].any()  # nothing to match there
    for it in ss.RandomControl(ss.MaskKeys(sinks, [0, 2, 3]), "mass", n=5).draws(trace):
        assert it.tokens.shape == sinks.shape
        assert not it.tokens[:, [0, 1]].any()  # no sink, and not edited
        assert not (it.tokens & ~trace.ordinary()[:, None]).any()
        for layer in (2, 3):
            taken = received[:, layer][it.tokens[:, layer]]
            wanted = received[:, layer][sinks[:, layer]].sum()
            assert taken.sum() >= wanted > taken.sum() - taken.max()
        fewer, more = sorted((it.tokens[0, 2], it.tokens[0, 3]), key=lambda x: int(x.sum()))
        assert not (fewer & ~more).any()
    result = ss.RandomControl(ss.MaskKeys(sinks, [2, 3]), "mass", n=2).run(lvlm, trace)
    by_hand = [received[0, layer][sinks[0, layer]].sum() for layer in (2, 3)]
    assert result.real_mass.item() == pytest.approx(float(sum(by_hand)) / 2)
    assert (result.mass >= result.real_mass).all()


def test_mass_under_queries_is_what_these_give(traced):
    """The reference is what the edit itself says: attention of its rows on its keys before."""
    lvlm, trace, _ = traced
    last = trace.sample.tokens.select("last")
    for queries in ("last", last | last.roll(-2, 1)):
        edit = ss.AttentionKnockout(queries, trace.v_sinks, [2, 3], heads=[0, 1])
        control = ss.RandomControl(edit, "mass", n=3)
        result = control.run(lvlm, trace)
        drawn = control.draws(trace, lvlm=lvlm)
        masses = [result.real_mass, *result.mass]
        for it, mass in zip((edit, *drawn), masses, strict=True):
            effect = lvlm.run(trace.sample, interventions=[it]).effects[it]
            assert mass.item() == pytest.approx(effect.mass_before.mean().item(), abs=1e-6)
        assert (result.mass >= result.real_mass).all()
        count = ss.RandomControl(edit, "count", n=1).run(lvlm, trace)
        assert count.real_mass.item() == pytest.approx(result.real_mass.item())


@pytest.mark.parametrize("match", ["count", "mass"])
def test_edits_without_layers_have_controls_too(traced, match):
    lvlm, trace, _ = traced
    received = trace.received.nan_to_num().mean(dim=(1, 2))
    for edit in (
        ss.interventions.ScaleTokens(trace.v_sinks, 0.5),
        ss.interventions.SinkToFront(trace.v_sinks),
    ):
        result = ss.RandomControl(edit, match, n=1).run(lvlm, trace)
        assert result.real_mass.item() == pytest.approx(received[trace.v_sinks].sum().item())


@pytest.fixture(scope="module")
def pair(traced):
    """Two rows; the model has text sinks too, as a row of its L rule says."""
    lvlm, trace, _ = traced
    inputs = {name: torch.cat([x, x]) for name, x in trace.sample.inputs.items()}
    out = ss.trace_sinks(lvlm, lvlm.prepare(inputs=inputs), *RULES)
    return out, out.sample.tokens.image >= 0, out.sample.tokens.live


def flagged(trace, *places):
    """The trace whose L rule also flags ``(row, token)`` in layer 1."""
    mask = trace.l_detection.mask.clone()
    for row, token in places:
        mask[row, 1, token] = True
    return replace(trace, l_detection=replace(trace.l_detection, mask=mask))


@pytest.mark.parametrize("match", ["count", "mass"])
def test_controls_are_of_the_kind_that_is_edited_in_the_row(pair, match):
    trace, visual, live = pair
    text = (live & ~visual & ~trace.text_sinks().any(1))[0].nonzero().flatten()
    trace = flagged(trace, (0, text[0]), (1, text[1]))
    mask = torch.zeros_like(visual)
    mask[0] = trace.v_sinks[0]
    mask[0, text[2]] = True
    mask[1, text[3:5]] = True
    received = torch.where(visual[:, None, None], 0.5, 0.25).expand_as(trace.received)
    trace = receiving(trace, received)
    for it in ss.RandomControl(ss.MaskKeys(mask), match, n=8).draws(trace):
        assert (it.tokens & visual).sum(1).tolist() == [2, 0]
        assert (it.tokens & ~visual).sum(1).tolist() == [1, 2]
        sinks = trace.v_sinks | trace.l_detection.mask.any(dim=1)
        assert not (it.tokens & (sinks | mask | ~live)).any()


def test_position_controls_are_of_the_kind_that_is_edited_in_the_row(pair):
    trace, visual, live = pair
    free = trace.ordinary()[0].nonzero().flatten()
    text = (live & ~visual & ~trace.text_sinks().any(1))[0].nonzero().flatten()
    mask = torch.zeros_like(visual)
    mask[0] = trace.v_sinks[0]
    control = ss.RandomControl(ss.MaskKeys(mask), match="position")
    donor = flagged(trace, (0, free[0]), (0, text[0]), (1, free[1]))
    (it,) = control.draws(trace, donor)
    assert it.tokens.nonzero().tolist() == [[0, int(free[0])]]
    mask = mask.clone()
    mask[1, text[2]] = True
    control = ss.RandomControl(ss.MaskKeys(mask), match="position")
    with pytest.raises(NoEffectError, match=r"text sinks .* in the rows \[1\]"):
        control.draws(trace, donor)
    donor = flagged(donor, (1, text[0]))
    (it,) = control.draws(trace, donor)
    assert it.tokens.nonzero().tolist() == [[0, int(free[0])], [1, int(text[0])]]
    by_layer = torch.zeros(*trace.l_detection.mask.shape, dtype=torch.bool)
    by_layer[:, 2] = mask
    (it,) = ss.RandomControl(ss.MaskKeys(by_layer), match="position").draws(trace, donor)
    assert it.tokens.nonzero().tolist() == [[0, 2, int(free[0])], [1, 2, int(text[0])]]


def test_several_donors_give_as_many_position_controls(traced):
    lvlm, trace, _ = traced
    free = trace.ordinary()[0].nonzero().flatten()[:3]
    donors = [flagged(trace, (0, token)) for token in free]
    control = ss.RandomControl(ss.MaskKeys(trace.v_sinks), match="position", n=20)
    assert [it.tokens[0].nonzero().item() for it in control.draws(trace, donors)] == free.tolist()
    result = control.run(lvlm, trace, donor=donors)
    assert result.controls.shape == (3, 1)
    assert control.run(lvlm, trace, donor=donors[0]).p_value().item() >= 0.5

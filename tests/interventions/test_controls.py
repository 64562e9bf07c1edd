"""RandomControl, edited blocks, eviction and registers on planted and tiny models."""

from dataclasses import replace

import pytest
import torch

import sinkscope as ss
from sinkscope import detectors
from sinkscope.errors import NoEffectError
from sinkscope.testing import plant, random_image, tiny_llava
from tests.interventions.reference import grown_inputs
from tests.interventions.test_exact import off
from tests.interventions.test_generation import PLAIN
from tests.probes.test_writes import HELD


@pytest.fixture(scope="module")
def traced():
    planted = plant("clip", v_sinks=(9, 46), l_sinks=(20, 33), v_layer=1, l_layer=1)
    lvlm = ss.LVLM(planted.model, planted.processor, verify=False)
    rules = (detectors.Norm("valley"), detectors.SinkDimensions((41, 101), 3.0))
    traces = [
        ss.trace_sinks(lvlm, lvlm.prepare(inputs=planted.inputs(image_seed=seed)), *rules)
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


def test_per_layer_selections_are_matched_layer_by_layer(traced):
    _, trace, _ = traced
    (it,) = ss.RandomControl(ss.MaskKeys(trace.l_sinks(), layers=None), n=1).draws(trace)
    assert torch.equal(it.tokens.sum(-1), trace.l_sinks().sum(-1))


def test_mass_controls_take_as_much_attention(traced):
    _, trace, _ = traced
    edit = ss.MaskKeys(trace.v_sinks, layers=[2, 3], heads=[1])
    draws = ss.RandomControl(edit, match="mass", n=4).draws(trace)
    received = trace.received[:, [2, 3], 1].nan_to_num().mean(dim=1)
    wanted = received[trace.v_sinks].sum()
    for it in draws:
        taken = received[it.tokens]
        assert (it.tokens & ~trace.ordinary()).sum() == 0
        assert taken.sum() >= wanted > taken.sum() - taken.max()  # no token more than it needs
        assert it.tokens.sum() > trace.v_sinks.sum()
    assert len({tuple(it.tokens.flatten().tolist()) for it in draws}) == 4


def test_mass_that_ordinary_tokens_do_not_have_is_refused(traced):
    _, trace, _ = traced
    control = ss.RandomControl(ss.MaskKeys("text"), match="mass")
    with pytest.raises(ss.SinkscopeError, match=r"receive 0\S* of attention together; expected at"):
        control.draws(trace)


def test_the_result_tells_how_well_controls_are_matched(traced):
    lvlm, trace, _ = traced
    edit = ss.MaskKeys(trace.v_sinks, layers=[2, 3])
    received = trace.received[:, [2, 3]].nan_to_num().mean(dim=(1, 2))
    for match in ("count", "mass"):
        control = ss.RandomControl(edit, match, n=3)
        result = control.run(lvlm, trace)
        assert result.real_mass.item() == pytest.approx(received[trace.v_sinks].sum().item())
        for draw, it in enumerate(control.draws(trace)):
            assert result.mass[draw, 0] == pytest.approx(received[it.tokens].sum().item())
        assert (result.mass >= result.real_mass).all() == (match == "mass")
        line = result.to_dataframe().loc[0]
        assert line["control_mass"] == pytest.approx(result.mass.mean().item())


@pytest.mark.parametrize("match", ["count", "mass"])
@pytest.mark.parametrize("source", ["v_sinks", "l_sinks"])
@pytest.mark.parametrize("target", ["name", "mask", "by layer"])
def test_a_moved_source_takes_its_tokens_from_the_target(traced, match, source, target):
    lvlm, trace, _ = traced
    tokens = trace.sample.tokens
    sinks = trace.v_sinks if source == "v_sinks" else trace.l_sinks()
    aims = {
        "name": "bos" if match == "count" else "last",
        "mask": trace.ordinary(),
        "by layer": trace.groups["ordinary"],
    }
    edit = ss.Redistribute(sinks, aims[target], 0.5)
    for it in ss.RandomControl(edit, match, n=2).draws(trace):
        assert it.source.any()
        by_layer = [x if x.ndim == 3 else x[:, None] for x in (it.source, it.target)]
        assert not (by_layer[0] & by_layer[1]).any()
        before = tokens.select(edit.target, trace.n_layers)
        before = before if before.ndim == 3 else before[:, None]
        assert torch.equal(by_layer[1] | (by_layer[0] & before), before | (by_layer[0] & before))
        assert lvlm.run(trace.sample, interventions=[it]).effects[it].touched.all()


def test_position_controls_need_another_image(traced):
    _, trace, other = traced
    control = ss.RandomControl(ss.MaskKeys(trace.v_sinks), match="position")
    with pytest.raises(ss.SinkscopeError, match="without a donor"):
        control.draws(trace)
    with pytest.raises(ss.SinkscopeError, match="lie where this one has sinks too"):
        control.draws(trace, other)
    elsewhere = plant("clip", v_sinks=(1, 2), l_sinks=(3,))
    second = ss.LVLM(elsewhere.model, elsewhere.processor, verify=False)
    sample = second.prepare(inputs=elsewhere.inputs())
    donor = ss.trace_sinks(second, sample, trace_rule(), detectors.SinkDimensions((41, 101), 3.0))
    (it,) = control.draws(trace, donor)
    assert it.tokens.sum() == 3


def trace_rule():
    return detectors.Norm("valley")


def test_the_result_carries_distribution_interval_and_p(traced):
    lvlm, trace, _ = traced
    result = ss.RandomControl(ss.MaskKeys(trace.v_sinks), n=19).run(lvlm, trace)
    assert result.controls.shape == (19, 1)
    assert torch.equal(result.base, torch.zeros(1))
    low, high = result.interval()
    assert (low <= high).all()
    assert result.p_value().item() == pytest.approx(
        (
            1
            + (
                (result.controls - result.controls.mean()).abs()
                >= (result.real - result.controls.mean()).abs()
            )
            .sum()
            .item()
        )
        / 20
    )
    columns = {"base", "real", "control", "low", "high", "p", "real_mass", "control_mass"}
    assert set(result.to_dataframe().columns) == columns


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
        (dict(n=0), "at least 1 draw"),
        (dict(intervention=ss.interventions.EvictKeys()), "one of the fields"),
        (dict(intervention=ss.MaskKeys("all")), "0 ordinary image tokens to draw from"),
        (dict(seed="a"), "Got seed='a'; expected an int"),
        (dict(seed=True), "Got seed=True; expected an int"),
        (dict(intervention=ss.MaskKeys), "Got MaskKeys; expected an intervention with one"),
        (
            dict(intervention=ss.MaskKeys("first", [-1]), match="mass"),
            r"Got layer -1; expected .* never negative",
        ),
        (dict(intervention=ss.MaskKeys("first", [True]), match="mass"), "Got layer True"),
        (dict(intervention=ss.MaskKeys("first", "2"), match="mass"), "Got layer '2'"),
        (
            dict(intervention=ss.AttentionKnockout("last", "first"), match="mass"),
            r"control.draws\(trace, lvlm=lvlm\)",
        ),
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
    with pytest.raises(
        ss.SinkscopeError, match="Got a score that returns float; expected a tensor"
    ):
        control.run(lvlm, trace, lambda run: 3.0)
    with pytest.raises(ss.SinkscopeError, match=r"a tensor of shape \(1, 1\); expected .* \(1,\)"):
        control.run(lvlm, trace, lambda run: run.logits[:, :, 0])
    gate = ss.LSG.for_model(lvlm, layer=1, v_detector=detectors.Norm(5.0))
    with pytest.raises(ss.SinkscopeError, match=r"v_detector=ss\.detectors\.RandomTokens"):
        ss.RandomControl(gate, n=1).draws(trace)


def with_received(trace, **by_layer):
    """The trace with other received attention: ``l0={token: value}`` in every head of layer 0."""
    received = torch.zeros_like(trace.received)
    for layer, values in by_layer.items():
        for token, value in values.items():
            received[:, int(layer[1:]), :, token] = value
    return receiving(trace, received)


def receiving(trace, received):
    """The trace with this received attention."""
    result = replace(trace.language.received, received=received)
    return replace(trace, language=replace(trace.language, received=result))


@pytest.mark.parametrize(
    ("layers", "many"), [([3], 8), (3, 8), ([0], 1), ([0, 3], 2), (range(4), 2), (None, 2)]
)
def test_mass_is_that_of_the_edited_layers(traced, layers, many):
    """Two sinks that receive 1 each in layer 3, and ordinary tokens that receive a quarter, and so on."""
    _, trace, _ = traced
    at = trace.v_sinks[0].nonzero().flatten().tolist()
    ordinary = trace.ordinary()[0].nonzero().flatten().tolist()
    trace = with_received(
        trace,
        l0=dict.fromkeys(ordinary, 1.0) | dict.fromkeys(at, 0.25),
        l3=dict.fromkeys(ordinary, 0.25) | dict.fromkeys(at, 1.0),
    )
    (it,) = ss.RandomControl(ss.MaskKeys(trace.v_sinks, layers), "mass", n=1).draws(trace)
    assert it.tokens.sum() == many


def test_mass_is_that_of_the_edited_heads(traced):
    _, trace, _ = traced
    received = torch.zeros_like(trace.received)
    received[:, :, 1] = torch.where(trace.v_sinks, 1.0, 0.5)[:, None]
    trace = receiving(trace, received)
    (it,) = ss.RandomControl(ss.MaskKeys(trace.v_sinks, heads=[1]), "mass", n=1).draws(trace)
    assert it.tokens.sum() == 4
    most = ss.MaskKeys(
        trace.v_sinks | (trace.ordinary() & (trace.sample.tokens.row > 0)), heads=[1]
    )
    with pytest.raises(
        ss.SinkscopeError, match=r"Row 0 has \d+ ordinary image tokens that receive"
    ):
        ss.RandomControl(most, "mass", n=1).draws(trace)


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
    tokens = trace.sample.tokens
    late = tokens.select("last") | tokens.select("last").roll(-2, 1)
    for queries in ("last", late):
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
    rules = (detectors.Norm("valley"), detectors.SinkDimensions((41, 101), 3.0))
    out = ss.trace_sinks(lvlm, lvlm.prepare(inputs=inputs), *rules)
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
    with pytest.raises(ss.SinkscopeError, match="without a donor"):
        control.draws(trace, [])
    with pytest.raises(ss.SinkscopeError, match="Got Sample as a donor"):
        control.draws(trace, trace.sample)


def test_the_interval_is_central():
    controls = torch.arange(101.0)[:, None]
    result = ss.experiments.ControlResult(torch.zeros(1), controls, torch.zeros(1), "count")
    for level, ends in {0.95: (2.5, 97.5), 0.9: (5.0, 95.0), 0.5: (25.0, 75.0)}.items():
        assert [x.item() for x in result.interval(level)] == pytest.approx(ends)
    line = result.to_dataframe().loc[0]
    assert (line["low"], line["high"], line["control"]) == pytest.approx((2.5, 97.5, 50.0))


def test_edited_is_the_same_model_until_the_block_ends(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    mask = ss.MaskKeys("image:0")
    plain, want = lvlm.run(sample).logits, lvlm.run(sample, interventions=[mask]).logits
    with lvlm.edited([mask]) as edited:
        assert torch.equal(edited.run(sample).logits, want)
        more = ss.ScaleKeys("text", 0.5)
        both = edited.run(sample, interventions=[more])
        assert set(both.effects) == {mask, more}
        assert edited.generate(sample, max_new_tokens=2).steps[1].effects[mask].touched.all()
    with pytest.raises(ss.SinkscopeError, match="edits have ended"):
        edited.run(sample)
    assert torch.equal(lvlm.run(sample).logits, plain)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl"])
def test_eviction_keeps_first_and_recent_keys(tiny, batch, family, kernel):
    lvlm = tiny(family, kernel)
    sample = batch(lvlm)
    live = sample.tokens.live
    rows = sample.tokens.select("all")
    patterns = ss.AttentionPatterns(rows, layers=[0])
    evict = ss.interventions.EvictKeys(start=2, recent=5)
    plain = lvlm.run(sample, probes=[patterns])[patterns].patterns
    run = lvlm.run(sample, probes=[patterns], interventions=[evict])
    got = run[patterns].patterns
    for b in range(len(sample)):
        at = live[b].nonzero().flatten()
        before = plain[b, 0, :, : len(at)][..., at]
        after = got[b, 0, :, : len(at)][..., at]
        q, k = torch.arange(len(at))[:, None], torch.arange(len(at))[None]
        kept = ((k < 2) | (q - k < 5)) & (k <= q)
        want = before * kept / (before * kept).sum(-1, keepdim=True)
        assert (after - want).abs().max() < 1e-5
    out = lvlm.generate(
        sample, probes=[patterns], interventions=[evict], max_new_tokens=3, min_new_tokens=3
    )
    last = out.steps[2][patterns].patterns[:, 0, :, 0]
    assert torch.allclose((last.nan_to_num() > 0).sum(-1).float(), torch.tensor(7.0))


@pytest.mark.parametrize("family", ["llava-clip-llama", "llava-siglip-qwen2"])
def test_a_register_takes_over_the_neurons_and_stays_inside_the_tower(tiny, family):
    lvlm = tiny(family)
    sample = lvlm.prepare(images=random_image(48, 48, 0), text="what is it")
    outlier = torch.zeros_like(sample.tokens.vision.live)
    outlier[0, 5] = True
    neurons = ss.interventions.find_register_neurons(
        lvlm, [sample], [outlier], top_k=6, max_layer=1
    )
    assert sum(len(v) for v in neurons.values()) == 6
    probe = ss.interventions.NeuronActivity(outlier)
    activity = lvlm.run(sample, probes=[probe])[probe]
    best = max(
        (float(a), layer, n) for layer in (0, 1) for n, a in enumerate(activity.activity[layer][0])
    )
    assert best[2] in neurons[best[1]]
    register = ss.TestTimeRegister(neurons)
    plain = lvlm.run(sample)
    run = lvlm.run(sample, interventions=[register])
    assert run.logits.shape == plain.logits.shape
    assert not torch.equal(run.logits, plain.logits)
    assert torch.equal(lvlm.run(sample).logits, plain.logits)
    want = register_by_hand(lvlm, sample.inputs, neurons)
    assert (run.logits - want).abs().max() < 1e-5
    with pytest.raises(ss.SinkscopeError, match="adds positions to that tower"):
        lvlm.run(sample, probes=[ss.TokenNorms(tower="vision")], interventions=[register])


@pytest.mark.parametrize("dtype", PLAIN, ids=str)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava-clip-llama", "llava-siglip-qwen3", "gemma3"])
def test_a_register_in_a_batch_in_half_precision_and_over_sixteen_steps(
    tiny, batch, family, kernel, dtype
):
    lvlm = tiny(family, kernel, dtype)
    sample = batch(lvlm)
    register = ss.TestTimeRegister({0: [1, 5], 1: [3]})
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in sample.inputs.items()}
    live, prompt = sample.tokens.live, sample.tokens.live.shape[1]
    run = lvlm.run(sample, interventions=[register])
    assert torch.equal(run.logits[live], register_by_hand(lvlm, inputs, register.neurons)[live])
    assert not torch.equal(run.logits[live], lvlm.run(sample).logits[live])
    out = lvlm.generate(
        sample,
        interventions=[register],
        max_new_tokens=16,
        min_new_tokens=16,
        suppress_tokens=[lvlm.anatomy.image_token_id],
    )
    want = register_by_hand(lvlm, grown_inputs(sample, out.sequences, 15, inputs), register.neurons)
    got = torch.cat([step.logits for step in out.steps], dim=1)
    assert off(got, want[:, prompt - 1 :]) <= PLAIN[dtype]


@pytest.mark.parametrize("fill", ["zero", "mean", "keep"])
@pytest.mark.parametrize(("count", "scale"), [(1, 1.0), (1, -2.5), (3, 1.0), (3, 0.4)])
@pytest.mark.parametrize("family", ["llava-clip-llama", "gemma3"])
def test_every_setting_of_a_register_equals_hooks(tiny, batch, family, count, scale, fill):
    lvlm = tiny(family)
    sample = batch(lvlm)
    options = {"count": count, "scale": scale, "fill": fill}
    neurons = {0: [1, 5], 1: [3]}
    got = lvlm.run(sample, interventions=[ss.TestTimeRegister(neurons, **options)]).logits
    live = sample.tokens.live
    want = register_by_hand(lvlm, sample.inputs, neurons, **options)[live]
    assert off(got[live], want) <= 1e-5
    if options != {"count": 1, "scale": 1.0, "fill": "zero"}:
        usual = register_by_hand(lvlm, sample.inputs, neurons)[live]
        assert off(usual, want) > 1e-4


@pytest.mark.parametrize("how", HELD)
def test_neurons_are_what_the_last_map_of_an_mlp_reads_however_it_is_held(how):
    """Found, measured and moved: an adapter's own maps, of rank 4, are no neurons."""
    torch.manual_seed(0)
    module, processor = tiny_llava("dinov2", "llama")
    for name in ("fc1", "fc2", "down_proj"):
        HELD[how](module, name)
    lvlm = ss.LVLM(module.eval(), processor)
    vision, language = lvlm.anatomy.vision, lvlm.anatomy.language
    assert (vision.d_mlp, language.d_mlp) == (96, 96)
    assert all(path.endswith(".mlp.fc2") for path in vision.neurons)
    assert all(path.endswith(".mlp.down_proj") for path in language.neurons)
    sample = lvlm.prepare(images=random_image(48, 48, 0), text="what is it")
    outlier = torch.zeros_like(sample.tokens.vision.live)
    outlier[0, 5] = True
    read = []
    last = module.get_submodule(f"{vision.blocks[0]}.mlp.fc2")
    hook = last.register_forward_pre_hook(lambda m, args: read.append(args[0][0, 5].abs()))
    with torch.no_grad():
        module(**sample.inputs)
    hook.remove()
    neurons = ss.interventions.find_register_neurons(
        lvlm, [sample], [outlier], top_k=6, max_layer=0
    )
    assert neurons == {0: read[0].topk(6).indices.tolist()}
    got = lvlm.run(sample, interventions=[ss.TestTimeRegister(neurons)]).logits
    assert off(got, register_by_hand(lvlm, sample.inputs, neurons)) < 1e-5


@torch.no_grad()
def register_by_hand(lvlm, inputs, neurons, count=1, scale=1.0, fill="zero"):
    """The same with plain torch hooks: append, shift, drop."""
    a, root = lvlm.anatomy, lvlm.module
    module = dict(root.named_modules())
    hooks = []

    def append(m, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        longer = torch.cat([states, *count * [torch.zeros_like(states[:, :1])]], dim=1)
        if args:
            return (longer, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": longer}

    first = module[a.vision.blocks[0]]
    hooks.append(first.register_forward_pre_hook(append, with_kwargs=True))
    for layer, chosen in neurons.items():

        def shift(m, args, chosen=chosen):
            out = args[0].clone()
            for n in chosen:
                column = args[0][:, :-count, n]
                peak = column[torch.arange(len(column)), column.abs().argmax(1)] * scale
                rest = {
                    "zero": 0 * column,
                    "mean": 0 * column + column.mean(1)[:, None],
                    "keep": column,
                }
                out[:, :-count, n], out[:, -count:, n] = rest[fill], peak[:, None]
            return (out,)

        last = module[f"{a.vision.blocks[layer]}.mlp.fc2"]
        hooks.append(last.register_forward_pre_hook(shift))
    last = module[a.vision.blocks[a.feed_layers[-1]]]
    hooks.append(
        last.register_forward_hook(
            lambda m, args, out: (
                (out[0][:, :-count], *out[1:]) if isinstance(out, tuple) else out[:, :-count]
            ),
            prepend=True,
        )
    )
    logits = root(**inputs).logits
    for hook in hooks:
        hook.remove()
    return logits

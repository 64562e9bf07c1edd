"""Each baseline against its definition, written out on a plain transformers model."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import sinkscope as ss
from sinkscope import baselines, detectors
from sinkscope.errors import InputError, InterventionError, LayerError
from sinkscope.experiments.sink_edits import with_random_sinks
from sinkscope.testing import plant, random_image
from tests.lsg.reference import eager

RULES = detectors.Norm("valley"), detectors.SinkDimensions((41, 101), 3.0)


@pytest.fixture(scope="module")
def planted():
    made = plant("clip", v_sinks=(9,), l_sinks=(20,))
    return ss.LVLM(made.model, made.processor, verify=False), made


@pytest.fixture(scope="module")
def trace(planted):
    lvlm, _ = planted
    sample = lvlm.prepare(
        images=[random_image(64, 64, 0), random_image(64, 64, 1)],
        text=["how many", "what colour is the shape"],
    )
    out = ss.trace_sinks(lvlm, sample, *RULES)
    assert out.v_sinks.any(dim=1).all(), "else the tests below see nothing"
    assert out.l_sinks().any()
    return out


def edited(lvlm, trace, condition):
    run = lvlm.run(trace.sample, [], condition(trace), logits="last")
    return run.logits[:, -1]


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_var_is_redistribute_with_that_trace(planted, trace, preset):
    """What Redistribute does is tested against explicit weights elsewhere; here: which one it is."""
    lvlm, _ = planted
    made = baselines.var(preset, layers=[2, 3], p=0.7, rho=0.4)
    rule = trace.l_detection.mask
    visual = (trace.sample.tokens.image >= 0)[:, None]
    by_hand = ss.Redistribute(
        rule,
        visual & ~rule,
        0.7 if preset == "paper" else 0.3,
        [2, 3],
        ss.interventions.ImageCentric(
            rule & visual, 0.2, 0.6 if preset == "paper" else 0.4, preset == "code"
        ),
        queries="after image",
        allow_noop=True,
    )
    want = lvlm.run(trace.sample, [], [by_hand], logits="last").logits[:, -1]
    torch.testing.assert_close(edited(lvlm, trace, made), want, rtol=0, atol=0)


def test_var_defaults_are_the_published_ones(trace):
    paper, code = (baselines.var(preset)(trace)[0] for preset in ("paper", "code"))
    assert (paper.recycle, code.recycle) == pytest.approx((0.6, 0.4))
    assert paper.select.most_sink_share == pytest.approx(0.2)
    assert code.select.most_sink_share == pytest.approx(0.5)
    assert paper.layers == tuple(range(2, trace.n_layers))


def embeddings(model, sample):
    """What enters the decoder of a plain model, ``[batch pos d_model]``."""
    seen = []

    def keep(module, args, kwargs):
        seen.append(kwargs["inputs_embeds"].clone())

    hook = model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**sample.inputs)
    hook.remove()
    return seen[0]


def from_embeddings(model, sample, made):
    """Logits at the last position of a plain model that starts from other embeddings."""
    with torch.no_grad():
        out = model(
            inputs_embeds=made,
            attention_mask=sample.inputs["attention_mask"],
            use_cache=False,
        )
    return out.logits[:, -1]


def test_token_weights_are_embeddings_times_a_number(planted, trace):
    lvlm, made = planted
    v = trace.v_sinks
    rest = (trace.sample.tokens.image >= 0) & ~v
    hand = embeddings(made.model, trace.sample)
    hand = torch.where(v[..., None], 0.25 * hand, torch.where(rest[..., None], 1.5 * hand, hand))
    want = from_embeddings(made.model, trace.sample, hand)
    got = edited(lvlm, trace, baselines.token_weights(sink=0.25, rest=1.5))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    plain = lvlm.run(trace.sample, logits="last").logits[:, -1]
    assert (got - plain).abs().max() > 1e-3


def test_sink_to_front_is_embeddings_in_another_order(planted, trace):
    lvlm, made = planted
    hand = embeddings(made.model, trace.sample)
    for b, sinks in enumerate(trace.v_sinks):
        image = (trace.sample.tokens.image[b] >= 0).nonzero().flatten().tolist()
        order = [i for i in image if sinks[i]] + [i for i in image if not sinks[i]]
        assert order != image
        hand[b, image] = hand[b, order].clone()
    want = from_embeddings(made.model, trace.sample, hand)
    got = edited(lvlm, trace, baselines.sink_to_front())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    plain = lvlm.run(trace.sample, logits="last").logits[:, -1]
    assert (got - plain).abs().max() > 1e-3


@contextmanager
def keys_scaled(model, layer, factor):
    """A plain model whose keys at a block are multiplied, ``factor`` ``[batch pos]``."""
    import sys

    decoder = model.get_decoder()
    home = sys.modules[type(decoder.layers[0].self_attn).__module__]
    before, kernel = home.eager_attention_forward, model.config._attn_implementation

    def attend(module, query, key, *rest, **kwargs):
        if module is decoder.layers[layer].self_attn:
            key = key * factor[:, None, :, None]
        return eager(module, query, key, *rest, **kwargs)

    home.eager_attention_forward = attend
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        home.eager_attention_forward = before
        model.set_attn_implementation(kernel)


@pytest.mark.parametrize(("layer", "block"), [("embed", 0), (1, 2)])
def test_fixed_coefficients_are_scaled_keys_one_block_later(planted, trace, layer, block):
    lvlm, _ = planted
    twin = plant("clip", v_sinks=(9,), l_sinks=(20,)).model  # nnsight has never seen it
    visual = trace.sample.tokens.image >= 0
    factor = torch.where(trace.v_sinks, 0.1, torch.where(visual, 0.9, 1.0))
    with keys_scaled(twin, block, factor), torch.no_grad():
        want = twin(**trace.sample.inputs).logits[:, -1]
    got = edited(lvlm, trace, baselines.fixed_coefficients(layer, 0.1, 0.9))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    plain = lvlm.run(trace.sample, logits="last").logits[:, -1]
    assert (got - plain).abs().max() > 1e-3


def test_fixed_coefficients_are_a_gate_that_does_not_read(planted, trace):
    lvlm, _ = planted
    limits = trace.v_detection.threshold[:, lvlm.anatomy.feed_layers[-1]]
    gate = ss.LSG.for_model(lvlm, 1, v_detector=detectors.Norm(float(limits.max())))
    with torch.no_grad():
        gate.outer.bias.copy_(torch.tensor([0.2, 0.8]).log())
    run = lvlm.run(trace.sample, [], [gate], logits="last")
    keys = run.effects[gate].tokens[:, 0]
    got = edited(lvlm, trace, baselines.fixed_coefficients(1, 0.2, 0.8))
    assert bool((keys == (trace.sample.tokens.image >= 0).sum(1)).all())
    torch.testing.assert_close(got, run.logits[:, -1], rtol=1e-4, atol=1e-4)


def test_random_tokens_are_as_many_and_ordinary(trace):
    moved = with_random_sinks(trace, 3)
    visual = trace.sample.tokens.image >= 0
    assert torch.equal(moved.v_sinks.sum(1), trace.v_sinks.sum(1))
    assert torch.equal(moved.l_sinks().sum(2), trace.l_sinks().sum(2))
    assert torch.equal(moved.text_sinks(), trace.text_sinks())
    taken = moved.v_sinks | moved.l_sinks().any(dim=1)
    assert bool((taken <= trace.ordinary()).all())
    assert torch.equal(moved.overlap().sum(2), trace.overlap().sum(2))
    assert torch.equal(with_random_sinks(trace, 3).v_sinks, moved.v_sinks), (
        "the same seed, the same tokens"
    )
    others = [with_random_sinks(trace, seed).v_sinks for seed in range(5)]
    assert any(not torch.equal(moved.v_sinks, other) for other in others)
    assert bool((moved.v_sinks <= visual).all())


def test_random_tokens_are_other_places_in_other_images(planted):
    """With the same sinks, the same prompt and the same seed."""
    lvlm, _ = planted
    drawn = []
    for seed in range(4):
        sample = lvlm.prepare(images=random_image(64, 64, seed), text="how many")
        seen = ss.trace_sinks(lvlm, sample, *RULES)
        drawn.append((seen.ordinary(), with_random_sinks(seen, 3).v_sinks))
    assert all(torch.equal(ordinary, drawn[0][0]) for ordinary, _ in drawn)
    assert len({tuple(mask.flatten().tolist()) for _, mask in drawn}) > 1


def test_random_tokens_wrap_any_function_of_a_trace(planted, trace):
    control = baselines.random_tokens(baselines.fixed_coefficients(1, 0.1, 0.9), seed=3)
    sinks, rest = control(trace)
    moved = with_random_sinks(trace, 3).v_sinks
    assert torch.equal(sinks.tokens, moved)
    assert torch.equal(rest.tokens, (trace.sample.tokens.image >= 0) & ~moved)
    assert (sinks.factor, rest.factor, list(sinks.layers)) == (0.1, 0.9, [2])


def test_too_few_ordinary_tokens_leave_a_row_alone(trace):
    visual = trace.sample.tokens.image >= 0
    full = replace(trace, v_sinks=visual.clone())
    assert not with_random_sinks(full).v_sinks.any()


def test_random_tokens_of_a_gate_keep_its_weights(planted):
    lvlm, _ = planted
    gate = ss.LSG.for_model(lvlm, 1, v_detector=detectors.Norm(8.0))
    with torch.no_grad():
        gate.outer.bias.fill_(0.3)
    (control,) = baselines.random_tokens([gate], count=2, seed=5)
    assert control.config.v_detector["name"] == "RandomTokens"
    assert (control.config.v_detector["count"], control.config.v_detector["seed"]) == (2, 5)
    own = gate.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in control.state_dict().items())


@pytest.mark.parametrize(
    ("groups", "kind"),
    [("V rest", "V"), ("L rest", "L"), ("V L rest", "V"), ("V L rest", "L")],
)
def test_random_tokens_take_the_place_of_every_group_of_a_gate(planted, trace, groups, kind):
    """Seen on a gate that masks one group and leaves the others as they are."""
    lvlm, _ = planted
    names = tuple(groups.split())
    low = detectors.SinkDimensions((41, 101), 3.0) if "L" in names else None
    high = detectors.Norm(94.0) if "V" in names else detectors.NoSinks()
    gate = ss.LSG.for_model(
        lvlm, 3, groups=names, v_detector=high, l_detector=low, scale=len(names) - 1
    )
    with torch.no_grad():
        gate.outer.weight.zero_()
        gate.outer.bias.copy_(torch.tensor([-200.0 if name == kind else 0.0 for name in names]))
    masked, logits = [], []
    for seed in range(3):
        control = baselines.random_tokens([gate], count=6, seed=seed)
        for one in (gate, *control):
            run = lvlm.run(trace.sample, [], [one])
            masked.append(run.effects[one].tokens[:, 0].tolist())
            logits.append(run.logits)
    own, drawn = masked[::2], masked[1::2]
    assert own == [[1, 1]] * 3
    if len(names) == 2 or kind == "V":
        assert drawn == [[6, 6]] * 3
    else:  # V wins where both rules take a token
        (control,) = baselines.random_tokens([gate], count=6)
        assert control.config.v_detector["seed"] != control.config.l_detector["seed"]
        assert all(4 <= n <= 6 for row in drawn for n in row)
    assert all(not torch.equal(a, logits[0]) for a in logits[1::2])
    assert all(not torch.equal(a, b) for a, b in pairwise(logits[1::2])), "another seed"


def test_nothing_found_is_nothing_touched(planted):
    """What needs sinks leaves rows alone and the table counts them; what scales the rest does not."""
    lvlm, _ = planted
    data = [
        {"image": random_image(64, 64, i), "question": "how many", "answer": "red"}
        for i in range(2)
    ]
    conditions = {
        "base": [],
        "VAR paper": baselines.var("paper"),
        "VAR code": baselines.var("code"),
        "front": baselines.sink_to_front(),
        "sinks only": baselines.token_weights(sink=0.5),
        "with rest": baselines.token_weights(sink=0.5, rest=0.9),
        "cell": baselines.fixed_coefficients(1, 0.0, 1.0),
    }
    rules = {"v_detector": detectors.NoSinks(), "l_detector": detectors.NoSinks()}
    table = ss.compare(lvlm, data, conditions, **rules).table
    touched = table.groupby("condition")["touched"].mean().to_dict()
    assert touched.pop("with rest") == 1.0
    assert set(touched.values()) == {0.0}
    found = table[table["condition"] != "base"]["sinks"]
    assert (found == 0).all()
    assert table[table["condition"] == "base"]["sinks"].isna().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: baselines.var("papr"), "Did you mean 'paper'"),
        (lambda: baselines.var(p=1.5), "expected a share from 0 to 1"),
        (lambda: baselines.sink_to_front("V"), "expected one of"),
        (lambda: baselines.token_weights(), "sink=1.0 and rest=1.0, which change nothing"),
        (lambda: baselines.fixed_coefficients(1, 1, 1), "change nothing"),
        (lambda: baselines.random_tokens([]), "expected a function of a trace"),
        (lambda: baselines.random_tokens(baselines.var(), count=3), "expected none"),
    ],
)
def test_wrong_use_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_layer_or_a_factor_that_is_none_is_refused(trace):
    with pytest.raises(LayerError, match="99"):
        baselines.fixed_coefficients(99, 0.1, 0.9)(trace)
    with pytest.raises(InterventionError, match="Got s_v=nan; expected a finite number"):
        baselines.fixed_coefficients(1, float("nan"), 0.9)


def test_gates_without_a_count_are_refused(planted):
    gate = ss.LSG.for_model(planted[0], 1, v_detector=detectors.Norm(8.0))
    with pytest.raises(InputError, match="count=4"):
        baselines.random_tokens([gate])

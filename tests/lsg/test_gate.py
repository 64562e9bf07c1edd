"""The gate, traced and attached, against plain PyTorch: coefficients, logits, loss, gradients, decoding."""

import copy

import pytest
import torch
from torch import nn

import sinkscope as ss
from sinkscope.testing import TINY
from tests.lsg.conftest import FAMILIES, Case, vision_states
from tests.lsg.reference import Gated, greedy, sequential, twin_of

STEPS = 6
KINDS = {
    "as in the paper": {},
    "tanh, plain norm, scaled": {"activation": "tanh", "affine": False, "scale": 1.7},
    "silu, wide": {"activation": "silu", "hidden": 96},
    "mean of all": {"signal": "mean", "activation": "relu"},
    "mean of the image": {"signal": "visual"},
}
LLAVA, *OTHERS = FAMILIES


@pytest.fixture(scope="module")
def twins():
    made = {}

    def get(family):
        if family not in made:
            made[family] = twin_of(family).requires_grad_(requires_grad=False)
        return made[family]

    return get


def reference(c, gate, twin):
    tokens = c.sample.tokens
    signal = {"last": None, "mean": tokens.live, "visual": c.visual}[gate.config.signal]
    return Gated(
        twin,
        sequential(gate),
        gate.layer,
        masks_of(c, gate),
        tokens.last,
        signal,
        gate.config.decode,
        gate.config.scale,
    )


def masks_of(c, gate, l_sinks=None):
    v = c.flagged
    low = torch.zeros_like(v) if l_sinks is None else l_sinks & c.visual & ~v
    if "V" not in gate.groups:
        return [low, c.visual & ~low]
    return [v, c.visual & ~v] if "L" not in gate.groups else [v, low, c.visual & ~v & ~low]


def off(got, want, live=None):
    """The largest difference over the largest logit."""
    gap = (got - want).abs() if live is None else (got - want)[live].abs()
    return float(gap.max() / want.abs().max())


@pytest.mark.parametrize(
    ("family", "kind"),
    [*((LLAVA, kind) for kind in KINDS), *((f, "mean of all") for f in OTHERS)],
)
def test_one_pass(case, twins, family, kind):
    c, twin = case(family), twins(family)
    gate = c.gate(**KINDS[kind])
    ref = reference(c, gate, twin)
    with torch.no_grad(), ref.on():
        want = twin(**c.sample.inputs).logits
    live = c.sample.tokens.live
    run = c.lvlm.run(c.sample, interventions=[gate])
    assert off(run.logits, want, live) <= 1e-5
    with torch.no_grad(), gate.attach(c.lvlm.module) as attached:
        got = c.lvlm.module(**c.sample.inputs).logits
    assert off(got, want, live) <= 1e-5
    effect = run.effects[gate]
    assert torch.allclose(effect.extra["coefficients"][:, 0], ref.coefficients, atol=1e-5)
    assert torch.allclose(attached.coefficients, ref.coefficients, atol=1e-5)
    assert effect.tokens[:, 0].tolist() == c.visual.sum(1).tolist()
    assert c.flagged.any()
    assert (c.visual & ~c.flagged).any()


@pytest.mark.parametrize(("family", "layer"), [("gemma3", "embed"), ("llava-siglip-qwen3", 1)])
def test_other_layers(case, twins, family, layer):
    c, twin = case(family), twins(family)
    gate = c.gate(layer)
    ref = reference(c, gate, twin)
    with torch.no_grad(), ref.on():
        want = twin(**c.sample.inputs).logits
    run = c.lvlm.run(c.sample, interventions=[gate])
    assert off(run.logits, want, c.sample.tokens.live) <= 1e-5
    assert run.effects[gate].layers == (0 if layer == "embed" else layer + 1,)


@pytest.mark.parametrize(
    ("family", "how"),
    [(LLAVA, "traced"), (LLAVA, "attached"), ("gemma3", "traced"), ("qwen2.5-vl", "attached")],
)
def test_loss_and_gradients(case, twins, family, how):
    """Next-token loss at the last prompt position, and what reaches the gate's parameters."""
    c, twin = case(family), twins(family)
    gate = c.gate(activation="gelu", spread=0.3)
    answers = torch.tensor([5, 9])
    ref = reference(c, gate, twin)
    with ref.on():
        logits = twin(**c.sample.inputs).logits[:, -1]
    want = nn.functional.cross_entropy(logits, answers)
    want.backward()
    if how == "traced":
        logits = c.lvlm.run(c.sample, interventions=[gate], grad=True, logits="last").logits[:, 0]
        got = nn.functional.cross_entropy(logits, answers)
        got.backward()
    else:
        with gate.attach(c.lvlm.module):
            logits = c.lvlm.module(**c.sample.inputs).logits[:, -1]
            got = nn.functional.cross_entropy(logits, answers)
            got.backward()
    reached = [p for p in c.lvlm.module.parameters() if p.grad is not None]
    for parameter in reached:  # the model is shared with other tests
        parameter.grad = None
    want, got = float(want.detach()), float(got.detach())
    assert abs(got - want) <= 1e-5 * max(1.0, abs(want))
    names = {"norm": 0, "inner": 1, "outer": 3}
    for name, parameter in gate.named_parameters():
        part, _, kind = name.partition(".")
        other = getattr(ref.modules[names[part]], kind).grad
        assert other.abs().max() > 0, name
        assert (parameter.grad - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))
    assert reached, "a model that nobody has frozen gets gradients, as in any other loop"


@pytest.mark.parametrize(
    ("family", "decode"),
    [(LLAVA, "frozen"), (LLAVA, "off"), ("qwen2.5-vl", "refresh"), ("gemma3", "refresh")],
)
def test_cached_steps(case, twins, family, decode):
    c, twin = case(family), twins(family)
    gate = c.gate(decode=decode)
    check_steps(c, gate, reference(c, gate, twin), twin)


@pytest.mark.parametrize(
    ("groups", "decode"), [(("L", "rest"), "refresh"), (("V", "L", "rest"), "frozen")]
)
def test_cached_steps_with_l_sinks(case, twins, groups, decode):
    """The prompt's L-sinks are remembered: no later token is one, and none is forgotten."""
    c, twin = case(LLAVA), twins(LLAVA)
    gate, low = gate_with_l_sinks(c, groups, decode=decode)
    ref = reference(c, gate, twin)
    ref.masks = masks_of(c, gate, low)
    check_steps(c, gate, ref, twin)


def check_steps(c, gate, ref, twin):
    """Greedy steps, traced and attached, against the reference on the same tokens."""
    decode = gate.config.decode
    options = {
        "max_new_tokens": STEPS,
        "min_new_tokens": STEPS,
        "suppress_tokens": [c.lvlm.anatomy.image_token_id],
    }
    out = c.lvlm.generate(c.sample, interventions=[gate], **options)
    prompt = c.sample.tokens.live.shape[1]
    answer = out.sequences[:, prompt:]
    with torch.no_grad(), ref.on():
        want, _ = greedy(twin, c.sample.inputs, STEPS, forced=answer)
    for step, run in enumerate(out.steps):
        assert off(run.logits[:, -1], want[step]) <= 1e-5, step
    with gate.attach(c.lvlm.module):
        plain = c.lvlm.module.generate(
            **c.sample.inputs,
            **options,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert torch.equal(plain.sequences, out.sequences)
    for step, logits in enumerate(plain.logits):
        assert off(logits, want[step]) <= 1e-5, step
    later = [gate in run.effects for run in out.steps[1:]]
    assert later == [decode != "off"] * (STEPS - 1)
    if decode == "refresh":
        first, second = (out.steps[i].effects[gate].extra["coefficients"] for i in (0, 1))
        assert (first - second).abs().max() > 1e-4


def test_groups_with_l_sinks(case, twins):
    """The L rule is decided on what the edited block reads; V wins."""
    c, twin = case("gemma3"), twins("gemma3")
    gate, low = gate_with_l_sinks(c, ("V", "L", "rest"))
    ref = reference(c, gate, twin)
    ref.masks = masks_of(c, gate, low)
    with torch.no_grad(), ref.on():
        want = twin(**c.sample.inputs).logits
    run = c.lvlm.run(c.sample, interventions=[gate])
    assert off(run.logits, want, c.sample.tokens.live) <= 1e-5
    with torch.no_grad(), gate.attach(c.lvlm.module):
        got = c.lvlm.module(**c.sample.inputs).logits
    assert off(got, want, c.sample.tokens.live) <= 1e-5


def gate_with_l_sinks(c, groups, **choices):
    """A gate at block 0 with an L group, and the tokens of the prompt that meet its rule."""
    with torch.no_grad():
        states = c.lvlm.module(**c.sample.inputs, output_hidden_states=True).hidden_states[1]
    scores = states[..., [2, 7]].abs().amax(-1) / states.pow(2).mean(-1).add(1e-6).sqrt()
    tau = float(scores[c.visual].quantile(0.7))
    low = scores > tau
    assert (low & c.visual & ~c.flagged).any()
    assert tau < states.shape[-1] ** 0.5
    rule = ss.detectors.SinkDimensions([2, 7], tau)
    return c.gate(groups=groups, l_detector=rule, **choices), low


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl"])
def test_a_stack_is_a_list(case, twins, family):
    c, twin = case(family), twins(family)
    gates = [c.gate("embed"), c.gate(0, activation="relu"), c.gate(1)]
    references = [reference(c, gate, twin) for gate in gates]
    want = stacked(twin, references, c.sample.inputs)
    run = c.lvlm.run(c.sample, interventions=gates)
    assert off(run.logits, want, c.sample.tokens.live) <= 1e-5
    first, second, third = gates
    model = c.lvlm.module
    with first.attach(model), second.attach(model), third.attach(model), torch.no_grad():
        got = model(**c.sample.inputs).logits
    assert off(got, want, c.sample.tokens.live) <= 1e-5


def stacked(twin, references, inputs):
    """Later references wrap the attention function of earlier ones, so keys are scaled by each."""
    import sys
    from contextlib import ExitStack

    home = sys.modules[type(twin.get_decoder().layers[0].self_attn).__module__]
    with ExitStack() as stack:
        for one in references:
            inner = home.eager_attention_forward
            stack.enter_context(one.on())
            if one is not references[0]:
                chain(home, one, inner)
        with torch.no_grad():
            return twin(**inputs).logits


def chain(home, one, inner):
    decoder = one.model.get_decoder()
    edited = decoder.layers[0 if one.layer == "embed" else one.layer + 1].self_attn

    def attend(module, query, key, *rest, **kwargs):
        if module is edited:
            key = one.scaled(key)
        return inner(module, query, key, *rest, **kwargs)

    home.eager_attention_forward = attend


@pytest.mark.parametrize("family", ["qwen2.5-vl", "gemma3"])
def test_equals_scaled_keys(case, family):
    """With its coefficients known, a gate is two `ScaleKeys` per row: bit for bit."""
    c = case(family)
    assert same_sets(c.lvlm, c.sample, c.gate(), c.flagged, torch.zeros_like(c.flagged))


# The sets that a gate finds inside its pass are those of trace_sinks

Norm, Dims, Massive = ss.detectors.Norm, ss.detectors.SinkDimensions, ss.detectors.Massive


def norm_rule(states):
    """A rule whose limit is the score of a token, and one that reads it in another way."""
    tau = middle(states.norm(dim=-1))
    return Norm(tau, strict=False), Norm(tau, strict=True)


def strict_norm_rule(states):
    return norm_rule(states)[::-1]


def dims_rule(states):
    tau = middle(states[..., [2, 7]].abs().amax(-1))
    rules = (Dims((2, 7), tau, "none", strict) for strict in (True, False))
    return tuple(rules)


def loose_dims_rule(states):
    return dims_rule(states)[::-1]


def rms_rule(states):
    """Between two scores, so that rounding decides nothing."""
    scores = states[..., [2, 7]].abs().amax(-1) / states.pow(2).mean(-1).add(1e-6).sqrt()
    tau = between(scores)
    return Dims((2, 7), tau), Dims((2, 7), tau, "none")


def massive_rule(states):
    """The ratio alone decides: half of what is large enough is not large beside the median."""
    peaks = states.abs().amax(-1)
    return Massive(float(peaks.min()) / 2, between(peaks) / float(states.abs().median())), Massive(
        float(peaks.min()) / 2, 0.0
    )


def strict_massive_rule(states):
    limit = middle(states.abs().amax(-1))
    return Massive(limit, 0.0), Massive(limit, 0.0, strict=False)


def middle(scores):
    """The score of a token in the middle."""
    return float(scores.flatten().sort().values[scores.numel() // 2])


def between(scores):
    """A limit between two scores in the middle."""
    ordered = scores.flatten().sort().values
    at = len(ordered) // 2
    return float((ordered[at - 1] + ordered[at]) / 2)


SETS = (
    norm_rule,
    strict_norm_rule,
    dims_rule,
    loose_dims_rule,
    rms_rule,
    massive_rule,
    strict_massive_rule,
)


def same_sets(lvlm, sample, gate, v, low):
    """Whether a gate equals `ScaleKeys` on these tokens, row by row, bit for bit."""
    run = lvlm.run(sample, interventions=[gate])
    coefficients = run.effects[gate].extra["coefficients"][:, 0]
    assert coefficients.unique().numel() == coefficients.numel()
    visual = sample.tokens.image >= 0
    masks = {"V": v, "L": low, "rest": visual & ~v & ~low}
    edits = []
    for row, values in enumerate(coefficients.tolist()):
        mine = torch.zeros_like(visual)
        mine[row] = True
        for name, factor in zip(gate.groups, values, strict=True):
            edits.append(
                ss.ScaleKeys(masks[name] & mine, factor, [gate.config.edited], allow_noop=True)
            )
    return torch.equal(lvlm.run(sample, interventions=edits).logits, run.logits)


@pytest.mark.parametrize("rule", SETS)
def test_v_sinks_are_those_of_trace_sinks(case, rule):
    c = case("llava-clip-llama")
    right, wrong = rule(vision_states(c.lvlm, c.sample)[c.sample.tokens.vision.live])
    none = ss.detectors.NoSinks()
    found, other = (ss.trace_sinks(c.lvlm, c.sample, one, none).v_sinks for one in (right, wrong))
    assert found.any()
    assert (c.visual & ~found).any()
    assert not torch.equal(found, other)
    gate = c.gate(v_detector=right)
    nothing = torch.zeros_like(found)
    assert same_sets(c.lvlm, c.sample, gate, found, nothing)
    assert not same_sets(c.lvlm, c.sample, gate, other, nothing)


@pytest.mark.parametrize("rule", [strict_norm_rule, loose_dims_rule, rms_rule, massive_rule])
def test_l_sinks_are_those_of_trace_sinks(case, rule):
    c = case("llava-clip-llama")
    with torch.no_grad():
        states = c.lvlm.module(**c.sample.inputs, output_hidden_states=True).hidden_states[1]
    right, wrong = rule(states[c.visual])
    v = Norm(c.tau)
    found, other = (ss.trace_sinks(c.lvlm, c.sample, v, one).l_sinks(1) for one in (right, wrong))
    assert found.any()
    assert not torch.equal(found, other)
    gate = c.gate(groups=("V", "L", "rest"), l_detector=right)
    assert same_sets(c.lvlm, c.sample, gate, c.flagged, found)
    assert not same_sets(c.lvlm, c.sample, gate, c.flagged, other)


def test_a_sink_of_any_block_that_feeds_the_projector_is_a_v_sink(batch):
    model, processor = TINY["llava-clip-llama"]()
    config = copy.deepcopy(model.config)
    config.vision_feature_layer = [-1, -3]
    torch.manual_seed(0)
    lvlm = ss.LVLM(type(model)(config).eval(), processor)
    assert len(lvlm.anatomy.feed_layers) == 2
    sample = batch(lvlm)
    with torch.no_grad():
        tower = lvlm.module.model.vision_tower(
            sample.inputs["pixel_values"], output_hidden_states=True
        )
    first, last = (
        tower.hidden_states[layer + 1][..., 3].abs() for layer in lvlm.anatomy.feed_layers
    )
    live = sample.tokens.vision.live
    tau = between(torch.cat([first[live], last[live]]))
    low, high = (
        sample.tokens.from_vision((s >= tau).float()).nan_to_num() > 0 for s in (first, last)
    )
    assert (low & ~high).any()
    assert (high & ~low).any()
    rule = Dims((3,), tau, "none", strict=False)
    found = ss.trace_sinks(lvlm, sample, rule, ss.detectors.NoSinks()).v_sinks
    assert torch.equal(found, low | high)
    gate = Case(lvlm, sample, tau, found).gate(v_detector=rule)
    nothing = torch.zeros_like(found)
    assert same_sets(lvlm, sample, gate, found, nothing)
    for alone in (low, high):
        assert not same_sets(lvlm, sample, gate, alone, nothing)


def test_an_untrained_gate_halves_every_logit(case):
    c = case("llava-clip-llama")
    gate = ss.LSG.for_model(c.lvlm, 0, v_detector=ss.detectors.Norm(c.tau))
    run = c.lvlm.run(c.sample, interventions=[gate])
    half = c.lvlm.run(c.sample, interventions=[ss.ScaleKeys("image", 0.5, [1])])
    assert torch.equal(run.logits, half.logits)
    assert (run.effects[gate].extra["coefficients"] == 0.5).all()


@pytest.mark.parametrize(("kernel", "dtype"), [("sdpa", torch.bfloat16), ("eager", torch.float32)])
def test_a_neutral_gate_changes_no_bit(tiny, batch, kernel, dtype):
    lvlm = tiny("llava-clip-llama", kernel, dtype)
    sample = batch(lvlm)
    rule = ss.detectors.Norm(1.0)
    for groups in (("V", "rest"), ("V", "L", "rest")):
        low = ss.detectors.SinkDimensions([1], 2.0) if "L" in groups else None
        options = {"v_detector": rule, "l_detector": low, "groups": groups, "init": "neutral"}
        gate = ss.LSG.for_model(lvlm, 0, allow_noop=True, **options)
        plain = lvlm.run(sample)
        run = lvlm.run(sample, interventions=[gate])
        assert torch.equal(run.logits, plain.logits)
        assert not run.effects[gate].touched.any()
        with torch.no_grad(), gate.attach(lvlm.module):
            got = lvlm.module(**sample.inputs).logits
        assert torch.equal(got[sample.tokens.live], plain.logits[sample.tokens.live])
        strict = ss.LSG.for_model(lvlm, 0, **options)
        with pytest.raises(ss.errors.NoEffectError):
            lvlm.run(sample, interventions=[strict])


def test_a_row_without_v_sinks_is_all_rest(case):
    c = case("llava-clip-llama")
    norms = ss.TokenNorms(tower="vision")
    feed = c.lvlm.anatomy.feed_layers[-1]
    by_image = c.lvlm.run(c.sample, probes=[norms])[norms].norms[:, feed].nan_to_num().amax(1)
    lowest, highest = sorted([float(by_image[0]), float(by_image[1:].max())])
    gate = c.gate(v_detector=ss.detectors.Norm((lowest + highest) / 2))
    run = c.lvlm.run(c.sample, interventions=[gate])
    quiet = 0 if float(by_image[0]) == lowest else 1
    row = torch.zeros_like(c.visual)
    row[quiet] = True
    factor = float(run.effects[gate].extra["coefficients"][quiet, 0, 1])
    want = c.lvlm.run(c.sample, interventions=[ss.ScaleKeys(c.visual & row, factor, [1])])
    assert torch.equal(run.logits[quiet], want.logits[quiet])


def test_in_half_precision_the_gate_computes_in_fp32(tiny, batch):
    lvlm = tiny("llava-clip-llama", "sdpa", torch.bfloat16)
    sample = batch(lvlm)
    gate = ss.LSG.for_model(lvlm, 0, v_detector=ss.detectors.Norm(1.0))
    with torch.no_grad():
        gate.outer.weight.normal_(generator=torch.Generator().manual_seed(0))
    assert all(p.dtype == torch.float32 for p in gate.parameters())
    run = lvlm.run(sample, interventions=[gate])
    with torch.no_grad(), gate.attach(lvlm.module):
        got = lvlm.module(**sample.inputs).logits
    assert off(got.float(), run.logits.float(), sample.tokens.live) <= 2e-2
    assert run.effects[gate].extra["coefficients"].dtype == torch.float32


def test_coefficients_of_random_tokens_are_a_control(case):
    """As many tokens in every image, others in another image, the same again."""
    c = case("llava-siglip-qwen3")
    rule = ss.detectors.RandomTokens(3)
    one, two = (ss.detect(c.lvlm, c.sample, rule, tower="vision").mask for _ in range(2))
    assert torch.equal(one, two)
    assert (one.sum(2) == 3).all()
    feed = c.lvlm.anatomy.feed_layers[-1]
    assert not torch.equal(one[0, feed], one[1, feed])
    other = ss.detect(c.lvlm, c.sample, ss.detectors.RandomTokens(3, seed=1), tower="vision").mask
    assert not torch.equal(one, other)
    gate = c.gate(v_detector=rule)
    trace = ss.trace_sinks(c.lvlm, c.sample, rule, ss.detectors.NoSinks())
    assert same_sets(c.lvlm, c.sample, gate, trace.v_sinks, torch.zeros_like(trace.v_sinks))


def test_remote_equals_local(case):
    c = case("llava-clip-llama")
    gate = c.gate(decode="refresh")
    here = c.lvlm.generate(c.sample, interventions=[gate], max_new_tokens=3, min_new_tokens=3)
    there = c.lvlm.generate(
        c.sample, interventions=[gate], max_new_tokens=3, min_new_tokens=3, remote="local"
    )
    for one, other in zip(here.steps, there.steps, strict=True):
        assert torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("name", ["LLaVA-1.5-7B", "LLaVA-1.5-13B"])
def test_known_models_need_no_calibration(name):
    row = next(row for row in ss.detectors.KNOWN if row.name == name)
    assert ss.lsg.describe(row.v_detector)["name"] == "Norm"
    assert ss.lsg.describe(row.l_detector)["dims"] == list(row.l_dims)

"""A gate on a plain model: who may attach, what is left behind, and what a prompt is."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import (
    DetectorError,
    InputError,
    InterventionError,
    LayerError,
    ModelError,
    NoEffectError,
)
from sinkscope.lsg.attach import ATTACHED
from sinkscope.testing import TINY, check_intervention, random_image


def logits(model, sample, **more):
    with torch.no_grad():
        return model(**sample.inputs, **more).logits


def snapshot(model):
    """Everything a gate could leave behind, by identity."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    modules = {
        name: (
            id(m.__dict__.get("config")),
            *(len(getattr(m, h)) for h in hooks),
            "forward" in vars(m),
        )
        for name, m in model.named_modules()
    }
    registry = next(
        g["ALL_ATTENTION_FUNCTIONS"]
        for g in [type(model.get_decoder().layers[0].self_attn).forward.__globals__]
    )
    return modules, sorted(registry.keys())


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_detach_restores_everything(case, kernel):
    c = case("llava-clip-llama", kernel)
    model, gate = c.lvlm.module, c.gate()
    before, plain = snapshot(model), logits(model, c.sample)
    attached = gate.attach(model)
    assert not torch.equal(logits(model, c.sample), plain)
    gate.detach()
    assert snapshot(model) == before
    assert torch.equal(logits(model, c.sample), plain)
    attached.detach()  # twice is once


def test_an_exception_inside_leaves_the_model_clean(case):
    c = case("llava-clip-llama")
    model, gate = c.lvlm.module, c.gate()
    before, plain = snapshot(model), logits(model, c.sample)
    layer = model.get_decoder().layers[2]

    def throw(*args):
        raise KeyError("midway")

    def fail():
        handle = layer.register_forward_hook(throw)
        with gate.attach(model):
            try:
                logits(model, c.sample)
            finally:
                handle.remove()

    with pytest.raises(KeyError, match="midway"):
        fail()
    assert snapshot(model) == before
    handle = layer.register_forward_hook(throw)
    with gate.attach(model):
        with pytest.raises(KeyError, match="midway"):
            logits(model, c.sample)
        handle.remove()
        with pytest.raises(InputError, match="of a part of a gated model"):
            model.model(**c.sample.inputs)  # the pass that failed is over
    assert torch.equal(logits(model, c.sample), plain)
    with gate.attach(model):
        assert not torch.equal(logits(model, c.sample), plain)


@pytest.mark.parametrize("first_off", [0, 1])
def test_two_gates_of_one_layer_in_any_order(case, first_off):
    c = case("llava-clip-llama")
    model, gates = c.lvlm.module, [c.gate(0), c.gate(0, activation="tanh")]
    before, plain = snapshot(model), logits(model, c.sample)
    alone = [c.lvlm.run(c.sample, interventions=[gate]).logits for gate in gates]
    both = c.lvlm.run(c.sample, interventions=gates).logits
    live = c.sample.tokens.live
    attached = [gate.attach(model) for gate in gates]
    assert torch.allclose(logits(model, c.sample)[live], both[live], atol=1e-5)
    attached[first_off].detach()
    left = alone[1 - first_off]
    assert torch.allclose(logits(model, c.sample)[live], left[live], atol=1e-5)
    attached[1 - first_off].detach()
    assert snapshot(model) == before
    assert torch.equal(logits(model, c.sample), plain)


@pytest.mark.parametrize("signal", ["last", "mean", "visual"])
def test_labels_say_where_the_prompt_ends(case, signal):
    """With an answer behind the prompt the gate still reads the prompt alone."""
    c = case("llava-clip-llama")
    gate, inputs = c.gate(signal=signal), dict(c.sample.inputs)
    answer = torch.tensor([[15, 19, 17], [16, 18, 14]])
    prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    mask = inputs["attention_mask"]
    inputs["attention_mask"] = torch.cat([mask, torch.ones_like(answer)], dim=1)
    labels = inputs["input_ids"].clone()
    labels[:, :prompt] = -100
    run = c.lvlm.run(c.sample, interventions=[gate])
    with torch.no_grad(), gate.attach(c.lvlm.module) as attached:
        out = c.lvlm.module(**inputs, labels=labels)
        first = run.effects[gate].extra["coefficients"][:, 0]
        assert torch.allclose(attached.coefficients, first, atol=1e-5)
        got = out.logits[:, :prompt][c.sample.tokens.live]
        assert torch.allclose(got, run.logits[c.sample.tokens.live], atol=2e-5)
        c.lvlm.module(**inputs)
        same = torch.allclose(attached.coefficients, first, atol=1e-3)
        assert same == (signal == "visual")
        with pytest.raises(InputError, match="begin with the first token"):
            c.lvlm.module(**inputs, labels=inputs["input_ids"])


def test_a_text_prompt_passes(case):
    c = case("llava-clip-llama")
    ids = torch.tensor([[3, 5, 7, 9]])
    model = c.lvlm.module
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with c.gate().attach(model) as attached:
            logits(model, c.sample)
            assert torch.equal(model(input_ids=ids).logits, plain)
            assert attached.coefficients is None


def test_another_batch_starts_afresh(case):
    c = case("llava-clip-llama")
    gate, model = c.gate(), c.lvlm.module
    one = c.lvlm.prepare(images=random_image(64, 64, 5), text="what colour")
    want = [c.lvlm.run(s, interventions=[gate]).logits for s in (c.sample, one)]
    with gate.attach(model):
        for sample, logit in zip((c.sample, one, c.sample), (*want, want[0]), strict=True):
            live = sample.tokens.live
            assert torch.allclose(logits(model, sample)[live], logit[live], atol=1e-5)


def test_a_gate_does_not_keep_the_model_alive():
    model, processor = TINY["llava-clip-llama"]()
    gate = ss.LSG.for_model(ss.LVLM(model, processor), 0, v_detector=ss.detectors.Norm(1.0))
    with gate.attach(model):
        pass
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


def test_a_gate_that_was_never_detached_goes_with_the_model():
    model, processor = TINY["llava-clip-llama"]()
    registry = type(model.get_decoder().layers[0].self_attn).forward.__globals__[
        "ALL_ATTENTION_FUNCTIONS"
    ]
    before = set(registry)
    lvlm = ss.LVLM(model, processor)
    sample = lvlm.prepare(images=random_image(64, 64, 5), text="what colour")
    gates = [ss.LSG.for_model(lvlm, 0, v_detector=ss.detectors.Norm(1.0)) for _ in range(2)]
    for gate in gates:
        gate.attach(model)
    logits(model, sample)
    assert set(registry) != before
    kept = gates[0]
    seen = [weakref.ref(model), weakref.ref(gates[1])]
    del model, lvlm, gates, gate, sample
    gc.collect()
    assert [one() for one in seen] == [None, None]
    assert set(registry) == before
    with pytest.raises(InterventionError, match="attached to nothing"):
        kept.detach()


def test_an_attachment_outlives_its_handle(case):
    c = case("llava-clip-llama")
    gate, model = c.gate(), c.lvlm.module
    plain = logits(model, c.sample)
    gate.attach(model)
    gc.collect()
    assert not torch.equal(logits(model, c.sample), plain)
    gate.detach()
    assert torch.equal(logits(model, c.sample), plain)


EDITS = {
    "mask": lambda c: ss.MaskKeys("image", layers=[1]),
    "knockout": lambda c: ss.AttentionKnockout("last", "image", layers=[1]),
    "weights": lambda c: ss.ScaleAttention("image", 0.3, layers=[1]),
    "weights, as they are": lambda c: ss.ScaleAttention("image", 0.3, [1], renormalize=False),
    "keys": lambda c: ss.ScaleKeys("image", 0.3, layers=[1]),
    "two masks": lambda c: [ss.MaskKeys("text", layers=[1]), ss.MaskKeys("image", layers=[1])],
}


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("llava-clip-llama", name) for name in EDITS), ("qwen2.5-vl", "mask"), ("gemma3", "mask")],
)
def test_edits_of_a_trace_on_an_attached_model(case, family, name):
    """They are those of the traced gate: a mask's bias of the logits is not scaled with the keys."""
    c = case(family)
    # With factors this small a bias that was scaled with the keys would be gone.
    scale = 1.0 if name == "keys" else 1e-5
    gate, made = c.gate(scale=scale), EDITS[name](c)
    edits = made if isinstance(made, list) else [made]
    mass = ss.AttentionMass({"image": "image"}, layers=[1])
    live = c.sample.tokens.live
    want = c.lvlm.run(c.sample, probes=[mass], interventions=[gate, *edits])
    with gate.attach(c.lvlm):
        got = c.lvlm.run(c.sample, probes=[mass], interventions=edits)
    assert torch.allclose(got.logits[live], want.logits[live], atol=2e-5)
    assert torch.allclose(got[mass].mass.nan_to_num(), want[mass].mass.nan_to_num(), atol=1e-5)
    if "mask" in name:
        assert float(got[mass].mass.nan_to_num().max()) < 1e-4


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl"])
def test_in_half_precision_it_equals_the_trace(tiny, batch, family):
    """The product of key and factor is taken in fp32 and rounded once, in both."""
    lvlm = tiny(family, "sdpa", torch.bfloat16)
    sample, model = batch(lvlm), lvlm.module
    gate = ss.LSG.for_model(lvlm, 0, v_detector=ss.detectors.Norm(1.0))
    with torch.no_grad():
        gate.outer.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    live = sample.tokens.live
    want = lvlm.run(sample, interventions=[gate]).logits[live]
    with gate.attach(model):
        got = logits(model, sample)[live]
    assert torch.equal(got, want)
    assert not torch.equal(logits(model, sample)[live], want)


def test_a_gate_in_half_precision_computes_in_fp32(case):
    c = case("llava-clip-llama")
    half = c.gate().to(torch.bfloat16)
    whole = c.gate()
    whole.load_state_dict(half.state_dict())
    states = torch.randn(2, half.config.d_model)
    assert torch.equal(half(states), whole(states))
    live = c.sample.tokens.live
    want = c.lvlm.run(c.sample, interventions=[whole]).logits[live]
    assert torch.equal(c.lvlm.run(c.sample, interventions=[half]).logits[live], want)
    with half.attach(c.lvlm):
        assert torch.allclose(logits(c.lvlm.module, c.sample)[live], want, atol=1e-5)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_adapters_of_peft(task):
    """The model in the wrapper is gated, and sees the labels that the wrapper is called with."""
    peft = pytest.importorskip("peft")
    model, processor = TINY["llava-clip-llama"]()
    lvlm = ss.LVLM(model, processor)
    gate = ss.LSG.for_model(lvlm, 0, v_detector=ss.detectors.Norm(1.0))
    with torch.no_grad():
        gate.outer.weight.normal_(generator=torch.Generator().manual_seed(0))
    inputs = dict(lvlm.prepare(images=random_image(64, 64, 5), text="what colour").inputs)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    with torch.no_grad(), gate.attach(model) as attached:
        want = model(**inputs, labels=labels).logits
        coefficients = attached.coefficients
    config = peft.LoraConfig(target_modules=r".*language_model.*q_proj", r=2, task_type=task)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad(), gate.attach(adapted) as attached:
        assert attached.model is adapted.get_base_model()
        assert torch.allclose(adapted(**inputs, labels=labels).logits, want, atol=1e-5)
        assert torch.allclose(attached.coefficients, coefficients, atol=1e-5)
        with pytest.raises(InputError, match=r"wrapper that calls model.forward"):
            model.forward(**inputs)


def test_check_intervention(case):
    c = case("llava-siglip-qwen3")
    make = c.gate
    check_intervention(
        make, c.lvlm, c.sample, neutral=lambda: c.gate(spread=0.0, init="neutral", allow_noop=True)
    )


def other_weights(c):
    model, processor = TINY["llava-clip-llama"](seed=7)
    return ss.LVLM(model, processor)


MISUSE = {
    "twice": (lambda c: twice(c.gate(), c.lvlm), InterventionError, r"already.*gate.detach\(\)"),
    "detach of nothing": (lambda c: c.gate().detach(), InterventionError, "attached to nothing"),
    "no model": (lambda c: c.gate().attach("llava"), ModelError, "Got str to attach"),
    "an edited model": (lambda c: edited(c), ModelError, r"Got Edited.*lvlm.edited\(\[gate"),
    "a plain module": (lambda c: c.gate().attach(torch.nn.Linear(2, 2)), ModelError, "a Linear"),
    "other weights": (
        lambda c: c.gate().attach(other_weights(c)),
        InterventionError,
        r"other weights of this architecture.*gate.adopt\(lvlm\)",
    ),
    "embeddings": (
        lambda c: with_attached(c, lambda m: m(inputs_embeds=torch.zeros(1, 4, 64))),
        InputError,
        "without input_ids",
    ),
    "images encoded before": (lambda c: encoded_before(c), InputError, "encoded before the gate"),
    "beams": (
        lambda c: with_attached(
            c, lambda m: m.generate(**c.sample.inputs, num_beams=2, max_new_tokens=3)
        ),
        InputError,
        "a gate works with greedy decoding",
    ),
}


def twice(gate, lvlm):
    gate.attach(lvlm)
    gate.attach(lvlm)


def with_attached(c, call):
    with c.gate().attach(c.lvlm.module), torch.no_grad():
        call(c.lvlm.module)


def edited(c):
    with c.lvlm.edited([ss.MaskKeys("bos", layers=[1])]) as one:
        c.gate().attach(one)


def encoded_before(c):
    model, inputs = c.lvlm.module, dict(c.sample.inputs)
    with torch.no_grad():
        features = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with c.gate().attach(model), torch.no_grad():
        model(**inputs, mm_encoder_outputs={"image": features})


@pytest.mark.parametrize("name", MISUSE)
def test_wrong_use(case, name):
    c = copy.copy(case("llava-clip-llama"))
    call, error, message = MISUSE[name]
    before = snapshot(c.lvlm.module)
    try:
        with pytest.raises(error, match=r"(?s)" + message):
            call(c)
    finally:
        for mine in list(ATTACHED.values()):
            for one in list(mine):
                one.detach()
    assert snapshot(c.lvlm.module) == before


NORM, VALLEY, RECEIVED = (
    ss.detectors.Norm(2.0),
    ss.detectors.Norm("valley"),
    ss.detectors.Received(),
)
BAD = [
    ({"layer": 2}, LayerError, "'embed' or 0 to 1"),
    ({"layer": -1}, LayerError, "scales keys in block"),
    ({"layer": 1.0}, LayerError, "layer=1.0"),
    ({"groups": ("V",)}, InterventionError, "Got groups="),
    ({"signal": "lst"}, InterventionError, "Did you mean 'last'"),
    ({"decode": "fresh"}, InterventionError, "Did you mean 'refresh'"),
    ({"decode": "refresh", "signal": "mean"}, InterventionError, "decode='frozen'"),
    ({"activation": "gelo"}, InterventionError, "'gelu'"),
    ({"hidden": 0}, InterventionError, "hidden=0"),
    ({"scale": -1.0}, InterventionError, "scale=-1.0"),
    ({"init": "neutral", "scale": 2.0}, InterventionError, "expected one of them"),
    ({"width": 3}, InterventionError, "fields of GateConfig"),
    ({"v_detector": VALLEY}, DetectorError, "judges every token by itself"),
    ({"v_detector": RECEIVED}, DetectorError, "judges every token by itself"),
    ({"l_detector": NORM}, InterventionError, r"groups=\('V', 'L', 'rest'\)"),
]


def made(c, **choices):
    options = {"v_detector": ss.detectors.Norm(c.tau), "layer": 0, **choices}
    return ss.LSG.for_model(c.lvlm, options.pop("layer"), **options)


@pytest.mark.parametrize(("choices", "error", "message"), BAD)
def test_bad_choices(case, choices, error, message):
    with pytest.raises(error, match=r"(?s)" + message):
        made(case("llava-clip-llama"), **choices)


def test_where_a_gate_cannot_work(case, tiny):
    c = case("llava-clip-llama")
    with pytest.raises(InputError, match="without a processor"):
        ss.LSG.for_model(ss.LVLM(c.lvlm.module), 0)
    other = tiny("llava-siglip-qwen2")
    sample = other.prepare(images=random_image(64, 64, 5), text="what colour")
    with pytest.raises(InterventionError, match=r"feed_layers: made for \[1\], found \[2\]"):
        other.run(sample, interventions=[made(c)])
    tokens = replace(c.sample.tokens, image=torch.full_like(c.sample.tokens.image, -1))
    with pytest.raises(NoEffectError, match="without image tokens"):
        c.lvlm.run(replace(c.sample, tokens=tokens), interventions=[made(c)])


def test_adopt_is_how_one_means_it(case):
    c = case("llava-clip-llama")
    other = other_weights(c)
    sample = other.prepare(images=random_image(64, 64, 5), text="what colour")
    gate = c.gate()
    with pytest.raises(InterventionError, match="other weights"):
        other.run(sample, interventions=[gate])
    adopted = gate.adopt(other)
    assert other.run(sample, interventions=[adopted]).effects[adopted].touched.all()
    states = torch.randn(2, gate.config.d_model)
    assert torch.equal(adopted(states), gate(states))


def test_a_tolerant_twin_shares_parameters(case):
    gate = case("llava-clip-llama").gate()
    twin = gate.allowing_noop()
    assert twin.allow_noop
    assert not gate.allow_noop
    assert twin.outer.weight is gate.outer.weight


def test_calibrates_on_drawn_scenes_where_nothing_is_published():
    lvlm = ss.load_bundled()
    gate = ss.LSG.for_model(lvlm, 1)
    assert gate.config.v_detector["name"] == "NoSinks"
    sample = lvlm.prepare(images=random_image(64, 64, 5), text="how many shapes are there?")
    effect = lvlm.run(sample, interventions=[gate]).effects[gate]
    assert effect.layers == (2,)
    assert effect.extra["coefficients"].tolist() == [[[0.5, 0.5]]]

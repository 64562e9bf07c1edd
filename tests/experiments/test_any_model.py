"""Traces, rules and generation on models without a map, a tower, or attention in every layer."""

from typing import Any

import pytest
import torch
from tiny_families import build, inputs_of
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sinkscope as ss
from sinkscope.detectors import Gap, Massive, Norm, NoSinks, Received, SinkDimensions
from sinkscope.errors import (
    AttentionCallError,
    InputError,
    InterventionError,
    ModelError,
    SelectionError,
    SinkscopeError,
)
from sinkscope.experiments.sweep_grid import end_of_image

V, L = Norm(30.0), SinkDimensions((1,), tau=1.5)
MODELS: dict[str, Any] = {}


def model_of(kind) -> Any:
    """An LVLM and a prepared sample of a tiny type; ``"words"`` is a causal LM without images."""
    if kind not in MODELS and kind == "words":
        torch.manual_seed(0)
        sizes: Any = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48}
        config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
        model = LlamaForCausalLM(config).eval()
        ids = torch.arange(30, 50)[None]
        MODELS[kind] = model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif kind not in MODELS:
        MODELS[kind] = (model := build(kind)), inputs_of(kind, model)
    model, inputs = MODELS[kind]
    if not isinstance(model, ss.LVLM):
        model = ss.LVLM(model)
        MODELS[kind] = model, inputs
    return model, model.prepare(inputs=inputs)


def states_of(lvlm, sample, tower, *, before):
    """What every block reads or writes, ``[block row pos d]``, by hooks on the plain model."""
    found, handles = [], []

    def keep(part, args, kwargs, out: Any = None):
        value = next(x for x in (*args, *kwargs.values()) if torch.is_tensor(x)) if before else out
        found.append((value[0] if isinstance(value, tuple) else value).detach().float())

    for path in lvlm.anatomy.tower(tower).blocks:
        part = lvlm.module.get_submodule(path)
        hook = part.register_forward_pre_hook if before else part.register_forward_hook
        handles.append(hook(keep, with_kwargs=True))
    with torch.no_grad():
        lvlm.module(**sample.inputs)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def said(trace):
    """All that a trace says of itself; it must have a figure too."""
    assert trace.plot() is not None
    assert trace.to_json()
    return trace.summary() + trace._repr_html_()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("aria", "every image token is made of all ViT tokens"),
        ("kosmos-2", "no token is known to show an image"),
        ("emu3", "there is no vision tower|no vision tower was found"),
        ("words", "there is no vision tower"),
    ],
)
@pytest.mark.parametrize("rules", [(V, L), (None, None)])
def test_without_a_place_for_vit_tokens_the_language_tower_is_traced(kind, why, rules) -> None:
    lvlm, sample = model_of(kind)
    trace = ss.trace_sinks(lvlm, sample, *rules)
    assert not trace.v_sinks.any()
    assert not trace.attended.any()
    assert any(one in trace.notes[0] for one in why.split("|"))
    assert any(one in trace.outcomes["vision"] for one in why.split("|"))
    words = said(trace)
    assert "V-sinks unknown" in words
    assert any(one in words for one in why.split("|"))
    if rules[1] is L:
        h = states_of(lvlm, sample, "language", before=True)
        scores = h[..., 1].abs() / (h.square().mean(-1) + 1e-6).sqrt()
        assert torch.equal(trace.l_detection.mask.transpose(0, 1), scores > 1.5)
        assert trace.l_detection.mask.any()
    if kind == "aria" and rules[0] is V:  # what the tower has is measured all the same
        norms = states_of(lvlm, sample, "vision", before=False).norm(dim=-1)
        assert torch.equal(trace.v_detection.mask.transpose(0, 1), norms >= 30.0)
        many = int((norms[-1] >= 30.0).sum())
        assert f"flags {many} ViT tokens" in trace.outcomes["vision"] or not many


def test_layers_without_softmax_attention_are_nan_and_named() -> None:
    lvlm, sample = model_of("qwen3_5")
    assert lvlm.anatomy.language.attending == (1, 2)
    trace = ss.trace_sinks(lvlm, sample, V, L)
    assert trace.l_detection.layers == (0, 1, 2)
    assert trace.received[:, 0].isnan().all()
    eager = build("qwen3_5", attn="eager")
    with torch.no_grad():
        weights = eager(**sample.inputs, output_attentions=True).attentions
    for layer, one in zip((1, 2), [w for w in weights if w is not None][-2:], strict=True):
        sees = torch.arange(one.shape[-1], 0, -1)
        assert torch.allclose(trace.received[:, layer], one.sum(2) / sees, atol=1e-5)
    assert "Blocks [0] of the LLM" in said(trace)
    received = ss.trace_sinks(lvlm, sample, V, Received(0.1)).l_detection
    assert received.layers == (0, 1, 2)
    assert not received.mask[:, 0].any()
    assert received.mask[:, 1:].any()
    mass = ss.AttentionMass(groups={"image": "image"})
    assert lvlm.run(sample, [mass])[mass].layers == (1, 2)
    assert ss.detect(lvlm, sample, Received(0.1)).layers == (1, 2)
    with pytest.raises(
        AttentionCallError, match=r"linear_attn .* Write layers=\[1, 2\] for the rest"
    ):
        lvlm.run(sample, [ss.AttentionMass(groups={"image": "image"}, layers=[0])])
    with pytest.raises(AttentionCallError, match=r"Write layers=\[1, 2\] for the rest"):
        lvlm.run(sample, [], [ss.MaskKeys("image")])


def test_a_tower_whose_attention_cannot_be_read_is_judged_by_its_states() -> None:
    lvlm, sample = model_of("got_ocr2")
    assert not lvlm.anatomy.vision.attending
    trace = ss.trace_sinks(lvlm, sample)
    assert trace.rules.v == Massive()
    assert trace.vision.received.received.isnan().all()
    h = states_of(lvlm, sample, "vision", before=False).flatten(2, 3)  # [block image pos d]
    spikes = h.abs().amax(-1) / h.abs().flatten(2).median(-1).values[..., None]
    assert torch.allclose(trace.vision.medians(), spikes.transpose(0, 1), rtol=1e-4)
    assert "Blocks [0, 1, 2] of the vision tower" in said(trace)
    for rule in (Gap(), Received(0.2)):
        with pytest.raises(AttentionCallError, match="does not call attention"):
            ss.detect(lvlm, sample, rule, tower="vision")
    assert "none of its blocks attends" in ss.calibrate(lvlm, [sample]).vision.reason


def test_states_that_enter_above_the_embeddings_are_feeds() -> None:
    lvlm, sample = model_of("qwen3_vl")
    assert lvlm.anatomy.enters == ((1, 0), (2, 1))
    norms = states_of(lvlm, sample, "vision", before=False).norm(dim=-1)  # [block ViT token]
    limit = float(norms[0].max()) * 0.999
    trace = ss.trace_sinks(lvlm, sample, Norm(limit), L)
    assert trace.feeds == (0, 1, 2)
    flagged = (norms >= limit).any(dim=0)[sample.tokens.vision.layout[0]]
    sources = sample.tokens.sources
    fed = torch.where(sources >= 0, flagged[sources.clamp(min=0)], False).any(-1)
    assert torch.equal(trace.v_sinks, fed)
    assert trace.v_sinks.any()


def test_sinks_on_newline_tokens_have_no_vit_token() -> None:
    lvlm, sample = model_of("llava_next")
    assert sample.tokens.select("newline").any()
    trace = ss.trace_sinks(lvlm, sample, V, SinkDimensions((1,), tau=1e-3))
    lines = [r for r in trace.records if sample.tokens.select("newline")[0, r.pos]]
    assert lines
    assert all(r.kind == "L" and not r.vit_tokens and r.vit_token == -1 for r in lines)


@pytest.mark.parametrize("kind", ["kosmos-2", "blip-2"])
def test_a_generate_of_the_language_model_inside_is_followed(kind) -> None:
    lvlm, sample = model_of(kind)
    inner = lvlm.module.get_submodule("text_model" if kind == "kosmos-2" else "language_model")
    inner.generation_config.eos_token_id = None
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        more = {"return_dict_in_generate": True, "output_logits": True}
        want = lvlm.module.generate(**sample.inputs, **options, **more)
    mass = ss.AttentionMass(groups={"all": "all"})
    got = lvlm.generate(sample, [mass], **options)
    assert torch.equal(got.sequences, want.sequences)
    assert len(got.steps) == 4
    for step, logits in zip(got.steps, want.logits, strict=True):
        assert torch.allclose(step.logits[:, -1], logits, atol=1e-5)
    first, later = got.steps[0][mass].mass, got.steps[2][mass].mass
    assert torch.allclose(first, torch.ones_like(first), atol=1e-5)
    assert bool((later < 1).all())  # what was generated is in no group


def test_a_generate_that_changes_the_prompt_is_refused() -> None:
    lvlm, sample = model_of("blip")
    with pytest.raises(ModelError, match="generate changes the prompt"):
        lvlm.generate(sample, max_new_tokens=2)


def test_what_cannot_be_read_is_refused_by_name() -> None:
    lvlm, sample = model_of("git")
    with pytest.raises(SinkscopeError, match=r"51"):  # image states stand before 14 ids
        lvlm.run(sample, [ss.TokenNorms()])
    lvlm, sample = model_of("gemma4")
    with pytest.raises(SinkscopeError, match=r"Write layers=\["):
        lvlm.run(sample, [ss.probes.AttentionValues()])
    with pytest.raises(InterventionError, match="fails on tokens that an edit has put in"):
        lvlm.run(sample, [], [ss.TestTimeRegister({0: [1]})])
    lvlm, sample = model_of("kosmos-2")
    for probe in (ss.TokenNorms(tower="vision"), ss.probes.CosineToFirst(tower="vision")):
        with pytest.raises(SelectionError, match="no token is known to show an image"):
            lvlm.run(sample, [probe])
    with pytest.raises(InputError, match="no token is known to show an image"):
        end_of_image(sample)
    lvlm, sample = model_of("words")
    with pytest.raises(ModelError, match="there is no vision tower"):
        ss.published.outlier_tokens(lvlm, sample)
    with pytest.raises(ModelError, match="there is no vision tower"):
        ss.LSG.for_model(lvlm, layer=0, v_detector=V)
    assert ss.calibrate(lvlm, [sample]).vision.reason == "there is no vision tower"
    lvlm, sample = model_of("aria")
    gate = ss.LSG.for_model(lvlm, layer=0, v_detector=V)
    with pytest.raises(InterventionError, match="every image token is made of all ViT tokens"):
        lvlm.run(sample, [], [gate])
    with (
        gate.attach(lvlm.module),
        pytest.raises(InterventionError, match="every image token is made of all ViT tokens"),
    ):
        lvlm.module(**sample.inputs)
    with pytest.raises(SelectionError, match=r"trace\.plot"):
        ss.viz.plot_sinks_on_image(ss.trace_sinks(lvlm, sample, NoSinks(), L))


@pytest.mark.parametrize("kind", ["got_ocr2", "qwen3_vl", "qwen3_5"])
def test_an_attached_gate_is_the_traced_one(kind) -> None:
    lvlm, sample = model_of(kind)
    norms = states_of(lvlm, sample, "vision", before=False).norm(dim=-1).flatten(1)
    rule = Norm(float(norms[lvlm.anatomy.feeds[-1]].median()))
    gate = ss.LSG.for_model(lvlm, layer=1, v_detector=rule)
    with torch.no_grad():
        gate.outer.bias.copy_(torch.tensor([-1.0, 0.5]))
        plain = lvlm.module(**sample.inputs).logits
        traced = lvlm.run(sample, [], [gate]).logits
        with gate.attach(lvlm.module):
            attached = lvlm.module(**sample.inputs).logits
    assert torch.allclose(attached, traced, atol=1e-5)
    assert not torch.allclose(plain, traced, atol=1e-3)


def test_windows_over_states_with_a_batch_axis_are_covered() -> None:
    lvlm, sample = model_of("hunyuan_vl")  # states are [1 pos d], one attention call per image
    mass = ss.AttentionMass(groups={"all": "all"}, tower="vision")
    got = lvlm.run(sample, [mass])[mass].mass
    assert torch.allclose(got, torch.ones_like(got), atol=1e-5)
    assert isinstance(lvlm.module.get_submodule(lvlm.anatomy.vision.blocks[0]), nn.Module)

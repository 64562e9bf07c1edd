"""A plain model may be called in any order: every pass is gated by its own prompt, or refused."""

import copy
import gc

import pytest
import torch
from transformers import DynamicCache

import sinkscope as ss
from sinkscope.errors import InputError, InterventionError
from sinkscope.lsg.attach import ByIdentity
from sinkscope.lsg.passes import arguments_of
from sinkscope.models.patch_map import MEASURING
from sinkscope.testing import TINY, random_image
from tests.lsg.conftest import vision_states

STEPS = 6


@pytest.fixture
def one(tiny):
    return Pair(tiny("llava-clip-llama"))


class Pair:
    """A model, two samples of one shape, and gates that change much."""

    def __init__(self, lvlm):
        self.lvlm, self.model = lvlm, lvlm.module
        self.a = lvlm.prepare(images=random_image(64, 64, 5), text="what colour")
        self.b = lvlm.prepare(images=random_image(64, 64, 6), text="what colour")
        self.tau = float(vision_states(lvlm, self.a).norm(dim=-1).quantile(0.7))

    def gate(self, layer=0, **choices):
        out = ss.LSG.for_model(self.lvlm, layer, v_detector=ss.detectors.Norm(self.tau), **choices)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for weight in (out.outer.weight, out.outer.bias):
                weight.copy_(4 * torch.randn(weight.shape, generator=generator))
        return out

    def prompt(self, sample):
        cache = DynamicCache(config=self.model.config.get_text_config())
        return cache, self.model(**sample.inputs, past_key_values=cache, use_cache=True).logits

    def step(self, cache, token=9, **more):
        ids = torch.full((1, 1), token)
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, **more).logits


@pytest.mark.parametrize(
    ("between", "decode"),
    [
        ("another image", "frozen"),
        ("another image", "refresh"),
        ("a text", "off"),
        ("a text", "frozen"),
        ("a step of another prompt", "refresh"),
    ],
)
def test_what_comes_between_changes_no_step(one, between, decode):
    gate = one.gate(decode=decode)
    with torch.no_grad(), gate.attach(one.model) as attached:
        cache, _ = one.prompt(one.a)
        want = [one.step(cache), one.step(cache, 11)]
        cache, _ = one.prompt(one.a)
        kept = attached.coefficients
        first = one.step(cache)
        if between == "another image":
            one.prompt(one.b)
            assert not torch.allclose(attached.coefficients, kept, atol=1e-2)
        elif between == "a text":
            one.model(input_ids=torch.full((1, 6), 9), use_cache=True)
        else:
            one.step(one.prompt(one.b)[0])
        second = one.step(cache, 11)
    assert torch.equal(first, want[0])
    assert torch.equal(second, want[1])
    plain, _ = one.prompt(one.a)
    if decode != "off":
        with torch.no_grad():
            assert (one.step(plain) - first).abs().max() > 1e-3


def test_a_cache_that_the_model_makes_is_known(one):
    with torch.no_grad(), one.gate().attach(one.model):
        want = one.step(one.prompt(one.a)[0])
        cache = one.model(**one.a.inputs, use_cache=True).past_key_values
        other = one.model(**one.b.inputs, use_cache=True, return_dict=False)[1]
        assert torch.equal(one.step(cache), want)
        assert not torch.allclose(one.step(other), want, atol=1e-3)


def test_guidance_leaves_the_gate_on(one):
    """The pass without image that guidance adds between two steps is not gated; the others are."""
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), one.gate().attach(one.model):
        out = one.model.generate(**one.a.inputs, **options, guidance_scale=1.5)
        answer = out.sequences[0, one.a.inputs["input_ids"].shape[1] :].tolist()
        cache, first = one.prompt(one.a)
        want = [first[:, -1], *(one.step(cache, token)[:, -1] for token in answer[:-1])]
    cache, _ = one.prompt(one.a)
    with torch.no_grad():
        plain = [one.step(cache, token)[:, -1] for token in answer[:-1]]
    for got, gated in zip(out.logits, want, strict=True):
        assert torch.allclose(got, gated, atol=1e-5)
    for got, ungated in zip(out.logits[1:], plain, strict=True):
        assert (got - ungated).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["static", "cropped", "reset"])
def test_caches_of_other_kinds(one, kind):
    gate = one.gate()
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    with torch.no_grad(), gate.attach(one.model):
        if kind == "static":
            want = one.model.generate(**one.a.inputs, **options)
            got = one.model.generate(**one.a.inputs, **options, cache_implementation="static")
        elif kind == "cropped":
            cache, _ = one.prompt(one.a)
            want = one.step(cache)
            cache.crop(-1)
            got = one.step(cache)
        else:
            want = one.step(one.prompt(one.b)[0])
            cache, _ = one.prompt(one.a)
            cache.reset()
            one.model(**one.b.inputs, past_key_values=cache, use_cache=True)
            got = one.step(cache)
    assert torch.equal(got, want)


def attached_late(one):
    cache, _ = one.prompt(one.a)
    with one.gate().attach(one.model):
        one.step(cache)


def copied(one):
    with one.gate().attach(one.model):
        one.step(copy.deepcopy(one.prompt(one.a)[0]))


def text_first(one):
    with one.gate().attach(one.model):
        cache = one.model(input_ids=torch.full((1, 3), 5), use_cache=True).past_key_values
        one.model(**one.a.inputs | {"attention_mask": None}, past_key_values=cache)


def two_images(one):
    with one.gate().attach(one.model):
        cache, _ = one.prompt(one.a)
        one.model(**one.b.inputs | {"attention_mask": None}, past_key_values=cache)


def further_turn(one):
    with one.gate().attach(one.model):
        cache, _ = one.prompt(one.a)
        one.model(input_ids=torch.full((1, 5), 9), past_key_values=cache)


def other_rows(one):
    with one.gate().attach(one.model):
        cache, _ = one.prompt(one.a)
        cache.batch_repeat_interleave(2)
        one.model(input_ids=torch.full((2, 1), 9), past_key_values=cache)


def cut_below(one):
    with one.gate().attach(one.model):
        cache, _ = one.prompt(one.a)
        cache.crop(-2)
        one.step(cache)


def generate(**options):
    def call(one):
        with one.gate().attach(one.model):
            one.model.generate(**one.a.inputs, max_new_tokens=3, do_sample=False, **options)

    return call


def whole(call):
    def gated(one):
        with one.gate().attach(one.model):
            call(one.model, one.a.inputs)

    return gated


def stale(one):
    with one.gate().attach(one.model):
        one.prompt(one.a)
        one.model.model(**one.b.inputs)


def an_earlier_image(used):
    """What the vision tower saw of one image is not taken for the image of a later prompt."""

    def call(one):
        model, inputs = one.model, dict(one.b.inputs)
        encoded = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        with one.gate().attach(model):
            if used:
                model(**one.a.inputs)
            else:
                model.model.get_image_features(one.a.inputs["pixel_values"], return_dict=True)
                model(input_ids=torch.full((1, 3), 5))
            model(**inputs, mm_encoder_outputs={"image": encoded})

    return call


REFUSED = {
    "attached between prompt and step": (attached_late, "has not seen.*before the prompt"),
    "a copy of a cache": (copied, "not a copy of it"),
    "an image behind a text": (text_first, "images behind 3 tokens.*whole conversation"),
    "an image behind an image": (two_images, "images behind [0-9]+ tokens"),
    "a further turn": (further_turn, "Got 1 rows of 5 new tokens.*Pass the whole conversation"),
    "more rows": (other_rows, "Got 2 rows of 1 new tokens to go on from 1 gated prompts"),
    "a cache cut below its prompt": (cut_below, "expected all of it"),
    "no cache": (generate(use_cache=False), r"generate\(use_cache=False\).*Write use_cache=True"),
    "chunks": (generate(prefill_chunk_size=8), "prefill_chunk_size: leave it out"),
    "large chunks": (generate(prefill_chunk_size=20), "leave out .*prefill_chunk_size"),
    "guesses": (generate(prompt_lookup_num_tokens=2), "guessed tokens.*prompt_lookup_num_tokens"),
    "a video": (
        whole(lambda m, i: m(**i, pixel_values_videos=torch.zeros(1))),
        "Got a video for a gated model; expected images",
    ),
    "the inner model": (whole(lambda m, i: m.model(**i)), r"Write model\(\*\*inputs\)"),
    "the inner model, later": (stale, r"such as model.model\(...\)"),
    "the decoder": (
        whole(lambda m, i: m.get_decoder()(input_ids=i["input_ids"])),
        r"such as model.model\(...\)",
    ),
    "an earlier image": (an_earlier_image(used=True), "encoded before the gate"),
    "an image encoded for nothing": (an_earlier_image(used=False), "encoded before the gate"),
    "a tuple as a cache": (
        whole(lambda m, i: m(**i, past_key_values=((),))),
        "cache of type tuple.*DynamicCache",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(one, name):
    call, message = REFUSED[name]
    with torch.no_grad():
        plain = one.model(**one.a.inputs).logits
        with pytest.raises(InputError, match=r"(?s)" + message):
            call(one)
        assert torch.equal(one.model(**one.a.inputs).logits, plain)


def test_images_that_pass_by_the_vision_tower_are_refused(one, monkeypatch):
    inner = one.model.model
    encoded = inner.get_image_features(one.b.inputs["pixel_values"], return_dict=True)
    with one.gate().attach(one.model), torch.no_grad():
        inner.get_image_features(one.a.inputs["pixel_values"], return_dict=True)
        monkeypatch.setattr(inner, "get_image_features", lambda **_: encoded)
        with pytest.raises(InputError, match="did not pass the vision"):
            one.model(**one.b.inputs)


def test_objects_are_told_apart_by_what_they_are():
    class Same:
        def __eq__(self, other):
            return True

        __hash__ = None

    kept, a, b = ByIdentity(), Same(), Same()
    kept.put(a, 1)
    assert (kept.get(a), kept.get(b), kept.get(None)) == (1, None, None)
    kept.put(b, 2)
    del a
    gc.collect()
    assert list(kept._kept) == [id(b)]
    with pytest.raises(InputError, match=r"cache of type tuple.*DynamicCache"):
        kept.put((), 3)


def test_arguments_by_name():
    class Named(torch.nn.Module):
        def forward(self, input_ids, labels=None, **more): ...

    class Nameless(torch.nn.Module):
        def forward(self, *args, **more): ...

    assert arguments_of(Named(), (1,), {"labels": 2, "x": 3}) == {
        "input_ids": 1,
        "labels": 2,
        "x": 3,
    }
    assert arguments_of(Nameless(), (), {"x": 3}) == {"x": 3}
    with pytest.raises(InputError, match="without names for Nameless"):
        arguments_of(Nameless(), (1,), {})


def test_videos_of_qwen_are_refused(tiny):
    lvlm = tiny("qwen2.5-vl")
    gate = ss.LSG.for_model(lvlm, 0, v_detector=ss.detectors.Norm(1.0))
    with gate.attach(lvlm), pytest.raises(InputError, match="Got a video"):
        lvlm.module(input_ids=torch.full((1, 3), 5), pixel_values_videos=torch.zeros(16, 1176))


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl", "gemma3"])
def test_arguments_without_names(tiny, family):
    pair = Pair(tiny(family))
    names = ["input_ids", "pixel_values", "attention_mask"]
    if family == "qwen2.5-vl":
        names = ["input_ids", "attention_mask"]
    given = dict(pair.a.inputs)
    with torch.no_grad(), pair.gate().attach(pair.model) as attached:
        want = pair.model(**given).logits
        values = [given.pop(name) for name in names]
        assert torch.equal(pair.model(*values, **given).logits, want)
        assert attached.coefficients is not None


@pytest.mark.parametrize("layer", ["embed", 0, 1])
def test_checkpoints_give_the_gradients_of_each_prompt(layer):
    """Two forward passes, then one backward pass, which runs the blocks again."""
    model, processor = TINY["llava-clip-llama"]()
    pair = Pair(ss.LVLM(model, processor))
    gate = pair.gate(layer)
    model.requires_grad_(requires_grad=False).train()

    def gradients():
        gate.zero_grad()
        with gate.attach(model):
            a, b = (model(**s.inputs).logits[:, -1].logsumexp(-1).sum() for s in (pair.a, pair.b))
            (a - 2 * b).backward()
        return {name: p.grad.clone() for name, p in gate.named_parameters()}

    want = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = []
    part = model.get_decoder().layers[gate.config.edited].self_attn
    handle = part.register_forward_hook(
        lambda *_: None if id(model) in MEASURING else again.append(1)
    )
    got = gradients()
    handle.remove()
    assert len(again) == 4, "both passes were run again"
    for name, value in want.items():
        assert value.abs().max() > 0
        assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-6 * float(value.abs().max()))


def test_reentrant_checkpoints_are_refused():
    model, processor = TINY["llava-clip-llama"]()
    pair = Pair(ss.LVLM(model, processor))
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pair.gate().attach(model):
        with pytest.raises(InputError, match='"use_reentrant": False'):
            model(**pair.a.inputs)
        with torch.no_grad():
            model(**pair.a.inputs)
        model.eval()(**pair.a.inputs)


@pytest.mark.parametrize("part", ["model", "model.language_model"])
def test_a_copy_of_an_attached_model_is_refused(one, part):
    with one.gate().attach(one.model):
        for whole in (one.model, one.model.get_submodule(part)):
            with pytest.raises(InterventionError, match=r"gate.detach\(\) first"):
                copy.deepcopy(whole)
    copied = copy.deepcopy(one.model)
    with torch.no_grad():
        assert torch.equal(copied(**one.a.inputs).logits, one.model(**one.a.inputs).logits)

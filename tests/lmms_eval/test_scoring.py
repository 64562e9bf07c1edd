"""The plug-in for lmms-eval, without lmms-eval: what is answered, scored, refused and noted."""

import importlib
import json

import pytest
import torch

import sinkscope as ss
from sinkscope import detectors
from sinkscope.errors import CheckpointError, InputError, LayerError, SinkscopeError
from sinkscope.experiments import EditSinks
from sinkscope.experiments.harness import RECORD
from sinkscope.lmms_eval import models
from sinkscope.lmms_eval.scoring import EditedModel, Prompt, decoding, with_places
from sinkscope.testing import random_image

ONE, TWO, THREE = (random_image(64, 64, seed) for seed in range(3))
FREE = {"max_new_tokens": 6, "temperature": 0.0, "until": None}


def prompts(*asked):
    return [
        Prompt("task", i, text, lambda given=given: given) for i, (text, given) in enumerate(asked)
    ]


ASKED = prompts(
    ("what is it", [ONE]),
    ("how many red shapes are in the two pictures ?", [ONE, TWO]),
    ("is it", None),
    ("what colour is it", THREE),
    ("what", []),
)


def plain(lvlm, prompt, new):
    """An answer of plain transformers, one prompt at a time; one without images by its tokenizer."""
    images = prompt.see()
    images = images if isinstance(images, list) else images and [images]
    parts = [{"type": "image"}] * len(images or ()) + [{"type": "text", "text": prompt.text}]
    chat = [{"role": "user", "content": parts}]
    text = lvlm.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    bos = lvlm.tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    given = {"images": images} if images else {}
    ready = lvlm.processor(text=[text], return_tensors="pt", add_special_tokens=special, **given)
    how = {"do_sample": False, "num_beams": 1, "max_new_tokens": new}
    with torch.no_grad():
        made = lvlm.module.generate(**ready, **how)
    return ready, made[:, ready["input_ids"].shape[1] :]


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl", "gemma3"])
@pytest.mark.parametrize("size", [1, 3])
def test_answers_are_those_of_plain_transformers(tiny, family, size):
    lvlm = tiny(family)
    said = EditedModel(lvlm, batch=size).generate(ASKED, [FREE] * len(ASKED))
    wanted = [plain(lvlm, prompt, 6)[1] for prompt in ASKED]
    assert said == [lvlm.tokenizer.decode(ids[0], skip_special_tokens=True) for ids in wanted]
    assert all(said)
    # the text behind a stop does not count, in a batch or alone; other settings have other batches
    stops = [text[2:4] or text[:1] for text in said]
    settings = [{**FREE, "until": [stop, "never"], "top_p": 0.1} for stop in stops]
    cut = EditedModel(lvlm, batch=size).generate(ASKED, settings)
    assert cut == [text[: text.find(stop)] for text, stop in zip(said, stops, strict=True)]


@pytest.mark.parametrize("normalized", [True, False])
def test_losses_are_those_of_plain_transformers(tiny, normalized):
    lvlm, options = tiny("llava-clip-llama"), [" red", " dark blue", " a b"]
    asked = [one for one in ASKED for _ in options]
    model = EditedModel(lvlm, batch=2, normalized=normalized)
    found = model.score(asked, options * len(ASKED))
    wanted = []
    for prompt in ASKED:
        ready, _ = plain(lvlm, prompt, 1)
        for option in options:
            ids = lvlm.tokenizer(option, add_special_tokens=False, return_tensors="pt")["input_ids"]
            whole = torch.cat([ready["input_ids"], ids], dim=1)
            more = {**ready, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
            with torch.no_grad():
                logits = lvlm.module(**more).logits[0, -ids.shape[1] - 1 : -1]
            logs = logits.log_softmax(-1).gather(1, ids[0][:, None])
            exact = bool((logits.argmax(-1) == ids[0]).all())
            wanted.append((float(-(logs.mean() if normalized else logs.sum())), exact))
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in wanted], abs=1e-4)
    assert [exact for _, exact in found] == [exact for _, exact in wanted]


def test_what_greedy_decoding_writes_is_greedy_and_has_the_lowest_loss():
    model, (one,) = EditedModel(ss.load_bundled()), ss.bundled.scene_questions(1, 1)
    asked = prompts((one["question"], [one["image"]]))
    assert model.generate(asked, [FREE]) == [one["answer"]]
    options = [one["answer"], "circle", "top left"]  # of one token, and of two
    for some in (options[:2], options):
        found = model.score(asked * len(some), [f" {option}" for option in some])
        assert [exact for _, exact in found] == [True] + [False] * (len(some) - 1)
        assert min(found)[0] == found[0][0]


def test_a_document_with_places_keeps_their_order(tiny):
    text = "compare <image> with <image> now"
    message = with_places(text, 2)
    kinds = [part["type"] for part in message[0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]
    for same, many in ((text, 1), (text, 3), ("<image>\nwhat is it", 1), ("what is it", 2)):
        assert with_places(same, many) == same
    lvlm = tiny("llava-clip-llama")
    said = EditedModel(lvlm).generate(prompts((text, [ONE, TWO])), [FREE])
    sample = lvlm.prepare(images=[ONE, TWO], text=message)
    assert said == list(lvlm.generate(sample, max_new_tokens=6, do_sample=False).text)


REFUSED = {
    "sampling": ({"do_sample": True}, "--gen_kwargs do_sample=False"),
    "heat": ({"temperature": 0.7}, "Got temperature=0.7"),
    "beams": ({"num_beams": 4}, "--gen_kwargs num_beams=1"),
    "padding": ({"image_aspect_ratio": "pad"}, "expected 'original'"),
    "unknown": ({"max_new_token": 4}, "Did you mean 'max_new_tokens'"),
    "none": ({"max_new_tokens": -1}, "max_new_tokens"),
    "until": ({"until": [3]}, "expected a text, or a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_not_greedy_are_refused(name):
    settings, message = REFUSED[name]
    with pytest.raises(InputError) as caught:
        decoding(settings)
    assert message in str(caught.value)


def test_settings_that_change_no_greedy_answer():
    assert decoding({}) == (1024, ())
    cold = {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "num_beams": 1}
    assert decoding({**cold, "max_gen_toks": 3, "until": "\n\n"}) == (3, ("\n\n",))
    assert decoding({"temperature": 0, "image_aspect_ratio": "original"}) == (1024, ())


@pytest.fixture
def write(tmp_path):
    def make(text):
        path = tmp_path / "edits.yaml"
        path.write_text(text)
        return str(path)

    return make


RECIPE = """
v_detector: norm:86
l_detector: received:1.4x
compare:
  conditions:
    base: []
    masked: {edit: {kind: top attended, edit: mask, k: 8}}
    blocked: [{AttentionKnockout: {queries: last, keys: image, layers: [3, 4]}}, {ScaleKeys: {tokens: first, factor: 0.5}}]
    gated: {gate: GATE}
    nothing: {edit: {kind: V-sinks}}
"""


def test_every_condition_of_a_recipe_answers_as_compare_does(tmp_path, write):
    """The right answers are those of `compare`, which has other batches."""
    lvlm, rules = ss.load_bundled(), {"v_detector": detectors.Norm(86.0)}
    rules["l_detector"] = detectors.Received(times_null=1.4)
    gate = ss.LSG.for_model(lvlm, layer=2, v_detector=rules["v_detector"])
    gate.save_pretrained(tmp_path / "gate")
    path = write(RECIPE.replace("GATE", str(tmp_path / "gate")))
    data = list(ss.bundled.scene_questions(3, 4, noise=40.0))
    knockout = ss.AttentionKnockout("last", "image", layers=[3, 4])
    same = {
        "base": [],
        "masked": EditSinks("top attended", k=8),
        "blocked": [knockout, ss.ScaleKeys("first", 0.5)],
        "gated": [gate],
    }
    wanted = ss.compare(lvlm, data, same, **rules).table
    asked = [
        Prompt("scenes", i, one["question"], lambda image=one["image"]: [image])
        for i, one in enumerate(data)
    ]
    for name in same:
        out = tmp_path / name
        model = EditedModel.of("bundled", path, name, out=out, batch_size="5", device="cpu")
        said = model.generate(asked, [{"max_new_tokens": 1}] * len(asked))
        line = wanted[wanted["condition"] == name]
        assert said == line["given"].tolist(), name
        text, idle = model.finish()
        assert not idle
        noted = json.loads((out / RECORD).read_text())
        notes = noted["documents"]
        assert [note["touched"] for note in notes] == line["touched"].tolist(), name
        assert f"{name!r} touched {int(line['touched'].sum())} of {len(data)}" in text
        assert [note["image"] for note in notes] == [
            notes[4 * (i // 4)]["image"] for i in range(12)
        ]
        assert len({note["image"] for note in notes}) == 3
        traced = [note["sinks"] for note in notes]
        assert (traced == line["sinks"].tolist()) if name == "masked" else not any(traced)
        assert noted["model"]["name"] == "bundled"
        with pytest.raises(InputError, match="of another run"):
            EditedModel.of("bundled", path, name, out=out)


def test_an_edit_that_touched_nothing_is_said(write):
    text = RECIPE.replace("norm:86", "norm:1e6")
    model = EditedModel.of("bundled", write(text), "nothing")
    words = Prompt("t", 0, "how many shapes are there?", lambda: None)
    seen = Prompt("t", 1, words.text, lambda: [ss.bundled.draw_scene(11_000_000).image])
    model.generate([words, seen], [{"max_new_tokens": 2}] * 2)
    said, idle = model.finish()
    assert idle
    assert "'nothing' touched 0 of 2 documents. NOTHING was edited" in said
    said, idle = EditedModel.of("bundled").finish()
    assert (said, idle) == ("sinkscope: 'base' touched 0 of 0 documents.", False)


WRONG = {
    "no model": ({}, "Got no model"),
    "a misspelt option": ({"base": "bundled", "dtyp": "float16"}, "Did you mean 'dtype'"),
    "a misspelt model": ({"base": "bundeld"}, "Did you mean 'bundled'"),
    "an automatic batch": ({"base": "bundled", "batch_size": "auto"}, "batch_size='auto'"),
    "trust in a word": ({"base": "bundled", "trust_remote_code": "yes"}, "trust_remote_code"),
    "several conditions": ({"base": "bundled", "recipe": RECIPE}, "Write condition=masked"),
    "another condition": (
        {"base": "bundled", "recipe": RECIPE, "condition": "maskd"},
        "Did you mean 'masked'",
    ),
    "no names": ({"base": "bundled", "recipe": "conditions: [base]"}, "expected names"),
    "no intervention": (
        {"base": "bundled", "recipe": "conditions: {x: [{Mask: {tokens: image}}]}"},
        "expected one of ['AblateActivations'",
    ),
    "two in one": (
        {"base": "bundled", "recipe": "conditions: {x: [{MaskKeys: {}, ScaleKeys: {}}]}"},
        "expected one of ['AblateActivations'",
    ),
    "a wrong argument": (
        {"base": "bundled", "recipe": "conditions: {x: [{MaskKeys: {token: image}}]}"},
        "Did you mean 'tokens'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name, write):
    given, message = WRONG[name]
    if "recipe" in given:
        given = {**given, "recipe": write(given["recipe"])}
    with pytest.raises(SinkscopeError) as caught:
        EditedModel.of(**given)
    assert message in str(caught.value)


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        EditedModel.of("no/such-model", out=tmp_path / "file" / "folder")


def test_one_condition_needs_no_name_and_a_layer_must_be_there(write):
    one = "model: bundled\nconditions: {base: [], x: [{MaskKeys: {tokens: image, layers: [99]}}]}"
    model = EditedModel.of(recipe=write(one))
    assert model.name == "x"
    image = ss.bundled.draw_scene(11_000_000).image
    with pytest.raises(LayerError):
        model.generate([Prompt("t", 0, "how many", lambda: [image])], [{}])


def test_lmms_eval_finds_the_plug_in():
    """It imports PACKAGE.models.NAME.CLASS and the folder of PACKAGE.tasks; here it is not installed."""
    assert models.AVAILABLE_MODELS == {"sinkscope": "Sinkscope"}
    for name in ("tasks", "models.sinkscope"):
        assert importlib.util.find_spec(f"sinkscope.lmms_eval.{name}")
    if importlib.util.find_spec("lmms_eval"):
        pytest.skip("lmms-eval is here")
    with pytest.raises(InputError, match="Got no lmms-eval"):
        importlib.import_module("sinkscope.lmms_eval.models.sinkscope")

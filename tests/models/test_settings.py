"""`LVLM.generate` writes what ``transformers``' own ``generate`` writes, or refuses what it cannot probe."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

import sinkscope as ss
from sinkscope.errors import InputError
from sinkscope.testing import random_image
from tests.conftest import FAMILIES
from tests.reference import language_attention


@pytest.fixture
def model(tiny):
    """A shared model whose generation config is given back."""
    lvlm = tiny("llava-clip-llama")
    kept = copy.deepcopy(lvlm.module.generation_config)
    yield lvlm
    lvlm.module.generation_config = kept


def both(lvlm, sample, *, remote=None, **options):
    """What ``transformers`` writes, and our generation, from one seed."""
    torch.manual_seed(0)
    want = lvlm.module.generate(**sample.inputs, **options)
    torch.manual_seed(0)
    return want, lvlm.generate(sample, [ss.TokenNorms()], remote=remote, **options)


SAMPLING = {"do_sample": True, "temperature": 3.0, "top_k": 40, "max_new_tokens": 6}
CONFIGS = {
    "nothing": {},
    "sampling": SAMPLING,
    "a length": {"max_length": 61},
    "penalties": {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "max_new_tokens": 5},
    "tokens": {"suppress_tokens": [53, 75], "min_new_tokens": 4, "max_new_tokens": 4},
}
OPTIONS = {
    "nothing": {},
    "greedy": {"do_sample": False, "max_new_tokens": 3},
    "a length": {"max_length": 59},
    "a config": {"generation_config": GenerationConfig(max_new_tokens=4, repetition_penalty=3.0)},
    "an end": {"eos_token_id": [182, 53], "pad_token_id": 0, "min_new_tokens": 2},
}


# Every config with no options, and every option with two configs.
@pytest.mark.parametrize(
    ("config", "options"),
    [
        *((config, "nothing") for config in CONFIGS),
        *((config, option) for config in ("sampling", "tokens") for option in OPTIONS),
    ],
)
def test_an_answer_is_that_of_transformers(model, batch, config, options):
    """What is given wins over the model's generation config, and that over defaults; a seed repeats."""
    model.module.generation_config.update(**CONFIGS[config])
    sample = batch(model)
    want, got = both(model, sample, **OPTIONS[options])
    assert torch.equal(got.sequences, want)
    assert len(got.steps) == want.shape[1] - sample.tokens.ids.shape[1]


def test_the_remote_path_obeys_the_config_too(model, batch):
    model.module.generation_config.update(**SAMPLING)
    want, got = both(model, batch(model), remote="local")
    assert torch.equal(got.sequences, want)


def test_a_row_ends_where_the_config_says(model, batch):
    """The end stands in the model's config, and other settings come in a config of the user's."""
    sample = batch(model)
    first = int(model.generate(sample, max_new_tokens=1).sequences[0, -1])
    model.module.generation_config.eos_token_id = first
    norms = ss.TokenNorms()
    given = GenerationConfig(max_new_tokens=3)
    out = model.generate(sample, [norms], generation_config=given)
    assert out.steps[1][norms].norms[0].isnan().all()
    assert not out.steps[1][norms].norms[1].isnan().any()
    none = model.generate(sample, [norms], generation_config=given, eos_token_id=None)
    assert not none.steps[1][norms].norms.isnan().any()


def embeds(lvlm, sample):
    return lvlm.module.get_input_embeddings()(sample.inputs["input_ids"]).detach()


STRANGE = {
    "past_key_values": lambda lvlm, sample: DynamicCache(),
    "inputs_embeds": embeds,
    "cache_position": lambda lvlm, sample: torch.arange(5),
    "logits_to_keep": lambda lvlm, sample: 1,
    "labels": lambda lvlm, sample: sample.inputs["input_ids"],
    "vision_feature_layer": lambda lvlm, sample: -1,
    "vision_feature_select_strategy": lambda lvlm, sample: "full",
    "mm_encoder_outputs": lambda lvlm, sample: {},
    "return_dict": lambda lvlm, sample: False,
}
IN_SAMPLES = {name: lambda lvlm, sample: True for name in ("use_cache", "output_attentions")}
IN_OPTIONS = {
    "position_ids": lambda lvlm, sample: torch.arange(sample.tokens.ids.shape[1])[None],
    "assistant_model": lambda lvlm, sample: lvlm.module,
    "custom_generate": lambda lvlm, sample: "somebody/repository",
    "trust_remote_code": lambda lvlm, sample: True,
    "negative_prompt_ids": lambda lvlm, sample: torch.ones(1, 2),
    "max_new_token": lambda lvlm, sample: 3,
}


@pytest.mark.parametrize("name", [*STRANGE, *IN_SAMPLES])
def test_inputs_that_change_what_a_pass_sees_are_refused(tiny, batch, name):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    value = {**STRANGE, **IN_SAMPLES}[name](lvlm, sample)
    with pytest.raises(
        InputError, match=rf"Got the inputs \['{name}'\]; expected some of \['atten"
    ):
        lvlm.prepare(inputs={**sample.inputs, name: value})
    assert name not in lvlm.prepare(inputs={**sample.inputs, name: None}).inputs


@pytest.mark.parametrize("name", [*STRANGE, *IN_OPTIONS])
def test_options_that_change_what_a_pass_sees_are_refused(tiny, batch, name):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    value = {**STRANGE, **IN_OPTIONS}[name](lvlm, sample)
    with pytest.raises(
        InputError, match=rf"Got \['{name}'\] as options of generate; expected sett"
    ):
        lvlm.generate(sample, max_new_tokens=2, **{name: value})


SETTINGS = {
    "num_beams": (2, "1"),
    "num_return_sequences": (2, "1"),
    "use_cache": (False, "True"),
    "return_dict_in_generate": (True, "False"),
    "synced_gpus": (True, "False"),
    "prompt_lookup_num_tokens": (2, "None"),
    "assistant_early_exit": (1, "None"),
    "use_mtp": (True, "False"),
    "is_assistant": (True, "False"),
    "penalty_alpha": (0.6, "None"),
    "dola_layers": ("low", "None"),
    "force_words_ids": ([[5]], "None"),
    "guidance_scale": (1.5, "1"),
    "prefill_chunk_size": (8, "None"),
    "token_healing": (True, "False"),
    "cache_implementation": ("paged", "a cache"),
    "stop_strings": (["a"], "one row"),
}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *((name, "option") for name in SETTINGS),
        *((name, where) for name in ("num_beams", "stop_strings") for where in ("config", "model")),
    ],
)
def test_settings_whose_steps_cannot_be_probed_are_refused(model, batch, name, where):
    value, expected = SETTINGS[name]
    config, options = GenerationConfig(), {"max_new_tokens": 2}
    if where == "option":
        options[name] = value
    else:
        setattr(config if where == "config" else model.module.generation_config, name, value)
    with pytest.raises(InputError, match=rf"{value!r}.*; expected {expected}".replace("[", r"\[")):
        model.generate(batch(model), generation_config=config, **options)


@pytest.mark.parametrize("name", ["use_cache", "num_beams", "num_return_sequences"])
def test_none_is_no_default_for_some_settings(model, batch, name):
    """``generate`` takes a None of its own for "no cache": a step then has every token as a query again,
    and an edit of the newest one meets them all."""
    sample = batch(model)
    with pytest.raises(InputError, match=f"Got {name}=None; expected (True|1)"):
        model.generate(sample, max_new_tokens=2, **{name: None})
    setattr(model.module.generation_config, name, None)  # there None stands for the default
    want, got = both(model, sample, max_new_tokens=3, generation_config=GenerationConfig())
    assert torch.equal(got.sequences, want)
    assert got.steps[1].logits.shape[1] == 1


VALUES = {
    "eos_token_id": (1.5, [1, 2.5], True, "</s>", -1),
    "pad_token_id": ("x", 0.5),
    "logits_processor": (3, [3], "greedy"),
    "stopping_criteria": (3, [None]),
    "prefix_allowed_tokens_fn": (3,),
    "streamer": (3, print),
    "compile_config": (1,),
    "cache_implementation": ("nonsense", 3),
    "early_stopping": ("maybe", []),
    "assistant_ensemble_weight": (1.0,),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_generate_stumbles_over_are_refused(model, batch, name):
    """Before a pass: the first was taken for 1, the others failed in the words of ``transformers``."""
    for value in VALUES[name]:
        with pytest.raises(InputError, match=name):
            model.generate(batch(model), max_new_tokens=2, **{name: value})


def test_values_of_the_right_kind_are_taken(model, batch):
    sample = batch(model)
    ends = {"eos_token_id": torch.tensor([182]), "pad_token_id": np.int64(0)}
    assert len(model.generate(sample, max_new_tokens=2, **ends).steps) <= 2
    seen = []

    class Streamer:
        put, end = staticmethod(seen.append), staticmethod(lambda: None)

    only = {"prefix_allowed_tokens_fn": lambda row, ids: [7], "streamer": Streamer()}
    lists = {"logits_processor": LogitsProcessorList(), "stopping_criteria": StoppingCriteriaList()}
    out = model.generate(sample, max_new_tokens=2, **only, **lists)
    assert out.sequences[:, -2:].unique().tolist() == [7]
    assert len(seen) == 3


def test_an_offloaded_cache_needs_a_place_to_come_from(model, batch, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"cache_implementation='offloaded'.* no GPU is here"):
        model.generate(batch(model), max_new_tokens=2, cache_implementation="offloaded")


def test_a_row_alone_may_end_at_a_string(model):
    sample = model.prepare(random_image(96, 96), "what is it")
    said = model.generate(sample, max_new_tokens=4)
    second = model.tokenizer.decode(said.sequences[0, -3])
    want, got = both(
        model, sample, max_new_tokens=4, stop_strings=[second], tokenizer=model.tokenizer
    )
    assert torch.equal(got.sequences, want)
    assert len(got.steps) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_ones_own_are_used_as_the_model_uses_them(tiny, batch, family):
    """They change what attention sees, and probes see the same; decoding goes on from them."""
    lvlm = tiny(family)
    sample = batch(lvlm)
    positions = (sample.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0) * 3 + 5
    moved = lvlm.prepare(inputs={**sample.inputs, "position_ids": positions})
    patterns = ss.AttentionPatterns("last")
    run = lvlm.run(moved, [patterns])
    with torch.no_grad():
        assert torch.equal(run.logits, lvlm.module(**moved.inputs).logits)
    want = language_attention(lvlm, moved.inputs)[..., -1:, :]
    assert torch.allclose(run[patterns].patterns.nan_to_num(), want, atol=1e-5)
    want, got = both(lvlm, moved, max_new_tokens=4, min_new_tokens=4)
    assert torch.equal(got.sequences, want)

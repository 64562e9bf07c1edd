"""A real language model behind a vision tower of random weights, loaded from a folder."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import sinkscope as ss
from benchmarks.example_detection import counts, photo, truth_of
from tests.real_model import example


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SmolLM2 of the example, a random CLIP tower and a random projector, as `save_pretrained` writes them."""
    real = example()
    config = real.module.config
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=224,
        patch_size=14,
    )
    made = LlavaConfig(
        vision_config=vision,
        text_config=config.text_config,
        image_token_index=config.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        image_seq_length=257,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(made).eval()
    model.model.language_model.load_state_dict(real.module.model.language_model.state_dict())
    model.tie_weights()
    path = tmp_path_factory.mktemp("random-tower")
    model.save_pretrained(path)
    real.processor.save_pretrained(path)
    return path


def test_the_text_sinks_are_found_behind_a_random_tower(folder):
    lvlm = ss.LVLM.from_pretrained(folder, dtype="float32")
    sample = lvlm.prepare(images=photo("china.jpg"), text="What is in the picture?")
    trace, truth = ss.trace_sinks(lvlm, sample), truth_of(lvlm, sample)
    found = counts(trace.l_detection.mask, truth)
    assert sum(c.found for c in found) >= 18
    assert sum(c.missed + c.wrong for c in found) == 0
    assert 0 in [r.pos for r in trace.records if r.kind == "text"]
    assert not trace.v_sinks.any()
    assert trace.outcomes["vision"].startswith("no patch spikes")
    assert "none found" in trace.summary()

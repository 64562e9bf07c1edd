import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

from sinkscope.testing import (
    TINY,
    ImageQwen2_5_VLProcessor,
    load_processor,
    random_image,
    tiny_gemma3,
    tiny_llava,
    tiny_qwen2_5_vl,
    write_checkpoint,
)
from sinkscope.testing.processors import gemma_tokenizer, llava_tokenizer, qwen_tokenizer

FAMILIES = sorted(TINY)


def prompt(processor, question="How many red shapes?"):
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([turn], add_generation_prompt=True)


def two_rows(processor):
    """Two images of different shape, two texts of different length."""
    return processor(
        images=[[random_image(112, 112, 1)], [random_image(90, 140, 2)]],
        text=[prompt(processor), prompt(processor, "Why?")],
        padding=True,
        return_tensors="pt",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_pass_is_live(family):
    model, processor = TINY[family](attn_implementation="eager")
    inputs = two_rows(processor)
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
        other = model(**(inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}))
    assert torch.isfinite(out.logits).all()
    assert not model.training
    # Attention is far from uniform in every layer, but no row is one-hot throughout.
    for pattern in out.attentions:
        last = pattern[:, :, -1]
        entropy = -(last * last.clamp(min=1e-9).log()).sum(-1).mean()
        uniform = inputs["attention_mask"].sum(-1).log().mean()
        assert 0.2 < entropy / uniform < 0.8
    # The last logits depend on the image and on the text, by more than a rounding error.
    assert (out.logits[0, -1] - other.logits[0, -1]).abs().mean() > 0.05
    assert (out.logits[0, -1] - out.logits[1, -1]).abs().mean() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_query_attention(family):
    model, _ = TINY[family]()
    config = model.config.text_config
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_text(family):
    model, processor = TINY[family]()
    inputs = two_rows(processor)
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert ids.shape[0] == 2
    assert 1 <= ids.shape[1] - inputs["input_ids"].shape[1] <= 4


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_load_offline(family, tmp_path):
    model, processor = TINY[family]()
    assert write_checkpoint(model, processor, tmp_path / "model") == tmp_path / "model"
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    read = load_processor(tmp_path / "model")
    inputs, again = two_rows(processor), two_rows(read)
    assert inputs.keys() == again.keys()
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    assert prompt(processor) == prompt(read)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**again).logits)


def test_auto_processor_loads_llava_checkpoints(tmp_path):
    write_checkpoint(*tiny_llava(), tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, LlavaProcessor)
    assert two_rows(processor)["input_ids"].shape[0] == 2


def test_qwen_checkpoints_name_the_real_classes(tmp_path):
    write_checkpoint(*tiny_qwen2_5_vl(), tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen2_5_VLProcessor"
    assert saved["image_processor"]["image_processor_type"].startswith("Qwen2VLImageProcessor")
    assert saved["video_processor"]["video_processor_type"] == "Qwen2VLVideoProcessor"


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_keeps_rotary_frequencies_in_float32(family):
    model, processor = TINY[family](dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert all(b.dtype == torch.float32 for b in model.buffers() if b.is_floating_point())
    inputs = two_rows(processor)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_seeds_and_the_global_generator(family):
    before = torch.random.get_rng_state()
    one, same, other = (TINY[family](seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs)


# ------------------------------------------------------------------------------------------- LLaVA


def test_clip_llava_reads_the_last_but_one_block_without_cls():
    model, processor = tiny_llava("clip", "llama")
    assert model.config.vision_feature_layer == -2
    pixels = processor.image_processor(random_image(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        expected = model.model.multi_modal_projector(hidden[-2][:, 1:])
        features = model.get_image_features(pixels).pooler_output[0]
    assert hidden[-2].shape[1] == 17
    assert torch.equal(features, expected[0])


@pytest.mark.parametrize(("strategy", "tokens"), [(None, 16), ("default", 16), ("full", 17)])
def test_dinov2_llava_drops_or_keeps_cls_and_scales_what_layers_write(strategy, tokens):
    model, processor = tiny_llava("dinov2", "llama", vision_feature_select_strategy=strategy)
    pixels = processor.image_processor(random_image(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        expected = model.model.multi_modal_projector(hidden[-2][:, 17 - tokens :])
        features = model.get_image_features(pixels).pooler_output[0]
    assert hidden[-2].shape[1] == 17
    assert torch.equal(features, expected[0])
    assert (two_rows(processor)["input_ids"] == model.config.image_token_id).sum(1).eq(tokens).all()
    assert model.config.image_seq_length == tokens
    scales = [p for name, p in model.named_parameters() if name.endswith("lambda1")]
    assert len(scales) == 6
    for scale in scales:
        assert 0.1 <= scale.min() < 0.3
        assert 0.8 < scale.max() <= 1


def test_a_clip_tower_may_keep_cls():
    model, processor = tiny_llava("clip", "llama", vision_feature_select_strategy="full")
    assert (two_rows(processor)["input_ids"] == model.config.image_token_id).sum(1).eq(17).all()
    with pytest.raises(ValueError, match="vision_feature_select_strategy='all'; expected one of"):
        tiny_llava(vision_feature_select_strategy="all")
    with pytest.raises(
        ValueError, match="A LLaVA on dinov2 reads the output of its last block but one"
    ):
        tiny_llava("dinov2", vision_layers=1)


def test_siglip_llava_reads_every_token_of_the_last_block():
    model, processor = tiny_llava("siglip", "qwen2")
    pixels = processor.image_processor(random_image(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        expected = model.model.multi_modal_projector(hidden[-1])
        features = model.get_image_features(pixels).pooler_output[0]
    assert hidden[-1].shape[1] == 16
    assert torch.equal(features, expected[0])
    assert not any("head" in name for name, _ in model.model.vision_tower.named_parameters())


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_one_image_becomes_one_token_per_patch(tower):
    _, processor = tiny_llava(tower, image_size=40, patch_size=8)
    inputs = processor(images=random_image(), text="<image>", return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 25


def test_qwen3_normalises_its_keys():
    model, _ = tiny_llava("clip", "qwen3")
    assert "k_norm.weight" in "".join(dict(model.named_parameters()))


def test_gpt_oss_has_a_learned_sink_and_windows():
    model, processor = tiny_llava("siglip", "gpt_oss", attn_implementation="eager")
    inputs = two_rows(processor)
    with torch.no_grad():
        attention = model(**inputs, output_attentions=True).attentions
    alive = inputs["attention_mask"].bool()[:, None].expand(-1, 4, -1)
    totals = torch.stack([pattern.sum(-1)[alive] for pattern in attention])
    assert (totals < 1 + 1e-5).all()
    assert totals.min() < 0.5  # some rows give the sink more than all tokens
    seen = [int((pattern[1, 0, -1] > 0).sum()) for pattern in attention]
    assert seen == [12, int(inputs["attention_mask"][1].sum()), 12]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tower": "dino"}, "tower='dino'; expected one of .'clip', 'siglip'"),
        ({"llm": "gpt2"}, "llm='gpt2'; expected one of .'llama', 'qwen2', 'qwen3'"),
        ({"kv_heads": 3}, "heads=4; expected a multiple of kv_heads=3"),
        ({"patch_size": 5}, "image_size=32; expected a multiple of patch_size=5"),
        ({"vision_layers": 1}, "vision_layers=1; expected an int of at least 2"),
    ],
)
def test_tiny_llava_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_llava(**arguments)


# ----------------------------------------------------------------------------------------- Gemma 3


def test_gemma_image_tokens_see_each_other_and_sliding_layers_their_window():
    model, processor = tiny_gemma3(attn_implementation="eager")
    inputs = two_rows(processor)
    with torch.no_grad():
        sliding, full, _ = model(**inputs, output_attentions=True).attentions
    row = 0
    image = (inputs["input_ids"][row] == model.config.image_token_id).nonzero().flatten()
    first, last = int(image[0]), int(image[-1])
    assert (full[row, :, first, last] > 0).all()
    assert (full[row, :, first, last + 1] == 0).all()
    assert (full[row, :, -1, first] > 0).all()
    n = inputs["input_ids"].shape[1]
    assert (sliding[row, :, -1, n - 12 :] > 0).all()
    assert (sliding[row, :, -1, : n - 12] == 0).all()
    # A window counts back from the query; the rest of its image is seen ahead of it.
    assert (sliding[row, :, first, first - 11 : last + 1] > 0).all()


def test_gemma_pools_two_by_two_patches_into_a_token():
    model, processor = tiny_gemma3()
    pixels = processor.image_processor(random_image(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model.model.vision_tower(pixels).last_hidden_state
        tokens = model.get_image_features(pixels).pooler_output
        pooled = states.reshape(1, 3, 2, 3, 2, 48).mean(dim=(2, 4)).reshape(1, 9, 48)
        projector = model.model.multi_modal_projector
        want = projector.mm_soft_emb_norm(pooled) @ projector.mm_input_projection_weight
    assert states.shape[1] == 36
    assert torch.allclose(tokens, want, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_heads": 3}, "heads=4; expected a multiple of kv_heads=3"),
        ({"pool": 4}, r"image_size=48; expected a multiple of pool \* patch_size=32"),
        ({"full_attention_layers": (3,)}, "full_attention_layers=3; expected an int from 0 to 2"),
    ],
)
def test_tiny_gemma_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_gemma3(**arguments)


# -------------------------------------------------------------------------------------- Qwen2.5-VL


def test_qwen_grids_are_ragged():
    _, processor = tiny_qwen2_5_vl()
    inputs = two_rows(processor)
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8], [1, 10, 6]]
    tokens = (inputs["input_ids"] == processor.image_token_id).sum(dim=1)
    assert tokens.tolist() == [16, 15]


def test_qwen_first_block_stays_inside_its_window_and_the_second_does_not():
    model, processor = tiny_qwen2_5_vl()
    inputs = processor.image_processor(random_image(112, 112), return_tensors="pt")
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    changed = pixels.clone()
    changed[0] += 1.0
    outputs = {0: [], 1: []}
    handles = [
        model.model.visual.blocks[block].register_forward_hook(
            lambda module, args, output, block=block: outputs[block].append(output)
        )
        for block in outputs
    ]
    with torch.no_grad():
        for values in (pixels, changed):
            model.model.visual(values, grid_thw=grid)
    for handle in handles:
        handle.remove()
    touched = {block: (a != b).any(dim=-1).sum() for block, (a, b) in outputs.items()}
    assert touched == {0: 16, 1: 64}  # one 4 x 4 window of 64 patches; then all of them


def test_qwen_has_no_bos_token():
    _, processor = tiny_qwen2_5_vl()
    assert processor.tokenizer.bos_token is None
    assert processor.tokenizer("How many?")["input_ids"] == processor.tokenizer.encode("How many?")


def test_qwen_processor_refuses_videos():
    _, processor = tiny_qwen2_5_vl()
    assert isinstance(processor, ImageQwen2_5_VLProcessor)
    with pytest.raises(ValueError, match="takes images and text, but videos came"):
        processor(text="<|video_pad|>", videos=[[random_image(), random_image()]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_heads": 3}, "heads=4; expected a multiple of kv_heads=3"),
        ({"window_size": 40}, "window_size=40; expected a multiple of 2 \\* 14=28"),
        ({"full_attention_blocks": (4,)}, "full_attention_blocks=4; expected an int from 0 to 3"),
    ],
)
def test_tiny_qwen_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_qwen2_5_vl(**arguments)


# ---------------------------------------------------------------------------------- text and images


@pytest.mark.parametrize("build", [llava_tokenizer, qwen_tokenizer, gemma_tokenizer])
@pytest.mark.parametrize("text", ["How many red shapes?", "naïve café 漢字 🙂", " two  spaces\n"])
def test_tokenizers_know_every_text(build, text):
    tokenizer = build()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab() == build().get_vocab()


def test_llava_text_begins_with_bos_and_keeps_the_image_token_whole():
    tokenizer = llava_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("USER: <image>\nWhy?")["input_ids"])
    assert tokens[0] == "<s>"
    assert tokens.count("<image>") == 1


def test_chat_templates():
    llava = llava_tokenizer()
    qwen = qwen_tokenizer()
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": "No."},
    ]
    assert llava.apply_chat_template(turns, tokenize=False) == "USER: <image>\nWhy? ASSISTANT: No. "
    assert gemma_tokenizer().apply_chat_template(turns, tokenize=False) == (
        "<bos><start_of_turn>user\n<start_of_image>Why?<end_of_turn>\n"
        "<start_of_turn>model\nNo.<end_of_turn>\n"
    )
    assert qwen.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Why?<|im_end|>\n"
        "<|im_start|>assistant\nNo.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_random_images():
    image = random_image(30, 20, seed=1)
    assert image.size == (30, 20)
    assert image.mode == "RGB"
    assert image.tobytes() == random_image(30, 20, seed=1).tobytes()
    assert image.tobytes() != random_image(30, 20, seed=2).tobytes()
    with pytest.raises(ValueError, match="width=0; expected an int of at least 1"):
        random_image(0, 20)

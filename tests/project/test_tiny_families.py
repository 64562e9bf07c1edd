"""The tiny models that the support table studies: they cover `transformers`, run, and have what makes them hard."""

from __future__ import annotations

import pytest
import torch
from tiny_families import (
    DECODERS,
    NEED_TIMM,
    NOT_RUN,
    TOWERS,
    TYPES,
    build,
    inputs_of,
    variant,
    variant_inputs,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

# one of each form of input, and of each kind of decoder
DOZEN = {
    "llava": (36, None, 72),
    "gemma3": (9, 27, 18),
    "qwen2_5_vl": (6, 8, 18),
    "qwen3_vl": (6, 8, 18),
    "qwen3_5": (6, 8, 18),
    "gemma4": (6, 8, 18),
    "idefics3": (9, 27, 18),
    # 6 x 6 tokens of the small image; 12 columns and a newline in the rows that the image fills
    "llava_next": (36 + 6 * 13, 36 + 12 * 7, 36 + 6 * 13 + 36 + 12 * 13),
    "mistral3": (6, 3, 9),
    "mllama": (1, 1, 2),
    "deepseek_vl_hybrid": (36, None, 72),
    "hunyuan_vl": (2 * 4 + 2, 4 * 3 + 2, 2 * 4 + 2 + 3 * 5 + 2),
}


def test_every_type_of_transformers_is_there() -> None:
    unknown = {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES} - {*TYPES}
    assert not unknown, f"tiny_families has no builder and no reason for {sorted(unknown)}"
    assert {*NEED_TIMM} | {*NOT_RUN} <= {*TYPES}
    assert (len(DECODERS), len(TOWERS)) == (80, 20)


@pytest.mark.parametrize("name", DOZEN)
def test_models_run_and_read_their_images(name: str) -> None:
    if name not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        pytest.skip("this transformers does not have the type")
    model = build(name)
    for shape, count in enumerate(DOZEN[name]):
        inputs = inputs_of(name, model, shape)
        assert (inputs is None) == (count is None)
        if inputs is None:
            continue
        image = inputs["input_ids"] == 7
        assert int(image.sum()) == count
        assert not image[0, 0]
        assert not image[0, -1]
        with torch.no_grad():
            logits = model(**inputs).logits
            other = model(**inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}).logits
        assert logits.isfinite().all()
        after = int(image[0].nonzero()[-1]) + 1
        assert (logits - other)[0, after:].abs().max() > 0.01
        if name != "mllama":  # where cross-attention has no image before it, it takes all of them
            assert torch.equal(logits[0, :3], other[0, :3])


def test_weights_are_the_same_at_each_call_and_attention_is_not_uniform() -> None:
    first, second = build("llava", attn="eager"), build("llava", attn="eager")
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        out = first(**inputs_of("llava", first), output_attentions=True)
    assert all(
        weights[..., -1, :].amax(-1).mean() > 5 / weights.shape[-1] for weights in out.attentions
    )


def test_hard_parts_are_there() -> None:
    gemma4 = build("gemma4").model.language_model.layers
    assert [layer.self_attn.head_dim for layer in gemma4] == [16, 16, 32]
    layers = build("qwen3_5").model.language_model.layers
    assert [hasattr(layer, "linear_attn") for layer in layers] == [True, False, False]
    sinks = variant("decoder", "gpt_oss").model.language_model.layers[0].self_attn.sinks
    assert sinks.abs().max() > 0.1
    registers = variant("tower", "dinov2_with_registers")
    inputs = variant_inputs("dinov2_with_registers", registers)
    assert inputs is not None
    assert int((inputs["input_ids"] == 7).sum()) == 36 + 4  # LLaVA drops the CLS token only
    ragged = variant_inputs("pixtral", variant("tower", "pixtral"), shape=2)
    assert ragged is not None
    assert ragged["image_sizes"].tolist() == [[32, 48], [48, 16]]


def test_types_that_are_not_built_say_why() -> None:
    with pytest.raises(ValueError, match="pi0 is not built here: a robot"):
        build("pi0")
    with pytest.raises(ValueError, match="rwkv is not built here: its output has no cache"):
        variant("decoder", "rwkv")

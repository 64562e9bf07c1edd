"""Processor output made by the user: what would run and give wrong logits is refused, and why is said."""

import pytest
import torch
from torch.nn.functional import pad

import sinkscope as ss
from sinkscope.errors import InputError
from sinkscope.testing import random_image
from tests.conftest import FAMILIES


def pixels(change):
    return lambda one: {"pixel_values": change(one["pixel_values"])}


def as_type(name, dtype):
    return lambda one: {name: one[name].to(dtype)}


def levels(dtype):
    """Pixels as a photo has them, 0 to 255."""

    def change(one):
        made = torch.rand(one["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": (made * 255).to(dtype)}

    return change


def half_scaled(one):
    """Two images, the second as nobody normalised it."""
    made = one["pixel_values"].clone()
    made[len(made) // 2 :] = 255 * torch.rand(made[len(made) // 2 :].shape)
    return {"pixel_values": made}


NORMALISED = "floats, normalised as by this model's image processor"
KINDS = {
    "uint8 pixels": (levels(torch.uint8), f"pixel_values of torch.uint8; expected {NORMALISED}"),
    "int64 pixels": (levels(torch.int64), f"pixel_values of torch.int64; expected {NORMALISED}"),
    "bool pixels": (pixels(lambda x: x > 0), f"pixel_values of torch.bool; expected {NORMALISED}"),
    "complex pixels": (as_type("pixel_values", torch.complex64), "complex64; expected floats"),
    "0 to 255": (levels(torch.float32), r"from 0\.\d+ to 25\d\.\d+, as before normalising"),
    "0 to 255 in half": (levels(torch.bfloat16), r"pixel_values from 0.* to 25\d"),
    "a part to 255": (half_scaled, r"pixel_values from 0.* to 25\d"),
    "float ids": (as_type("input_ids", torch.float32), r"float32; expected int64. Write input_ids"),
    "bool ids": (as_type("input_ids", torch.bool), "input_ids of torch.bool; expected int64"),
    "short ids": (as_type("input_ids", torch.int16), "input_ids of torch.int16; expected int64"),
    "ids beyond the vocabulary": (
        lambda one: {"input_ids": one["input_ids"] + 10**6},
        "token id 1000",
    ),
    "no row": (
        lambda one: {k: one[k][:0] for k in ("input_ids", "attention_mask")},
        r"input_ids of shape \(0, \d+\); expected a row and a token",
    ),
    "a complex mask": (as_type("attention_mask", torch.complex64), "expected 0 and 1"),
    "float positions": (
        lambda one: {"position_ids": one["attention_mask"].cumsum(1).float()},
        "position_ids of torch.float32; expected int64",
    ),
    "few positions": (
        lambda one: {"position_ids": torch.arange(3)[None]},
        r"position_ids of shape \(1, 3\); expected that of input_ids",
    ),
    "positions on 5 axes": (
        lambda one: {"position_ids": one["attention_mask"].cumsum(1).expand(5, -1, -1)},
        r"position_ids of shape \(5, 1, \d+\)",
    ),
    "positions in a list": (lambda one: {"position_ids": [0, 1]}, "position_ids of type list"),
}


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl", "gemma3"])
@pytest.mark.parametrize("name", KINDS)
def test_inputs_of_another_kind_are_refused(tiny, family, name):
    change, says = KINDS[name]
    lvlm = tiny(family)
    given = lvlm.prepare(random_image(64, 80), "what is it").inputs
    wrong = {**given, **change(given)}
    with pytest.raises(InputError, match=says):
        lvlm.prepare(inputs=wrong)


def test_types_of_floats_are_refused(tiny):
    lvlm = tiny("qwen2.5-vl")
    given = lvlm.prepare(random_image(64, 80), "what is it").inputs
    wrong = {**given, "mm_token_type_ids": torch.zeros(given["input_ids"].shape)}
    with pytest.raises(InputError, match=r"mm_token_type_ids of torch\.float32"):
        lvlm.prepare(inputs=wrong)


def test_channels_last_are_refused(tiny):
    for family in ("llava-clip-llama", "llava-siglip-qwen2", "gemma3"):
        lvlm = tiny(family)
        given = lvlm.prepare(random_image(64, 80), "what is it").inputs
        with pytest.raises(InputError, match=r"channels last; .*permute\(0, 3, 1, 2\)"):
            lvlm.prepare(
                inputs={**given, "pixel_values": given["pixel_values"].permute(0, 2, 3, 1)}
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_processor_makes_is_taken_in_any_precision(tiny, batch, family):
    """White, black and noisy pixels too; masks of any kind of number stand for the same."""
    lvlm = tiny(family)
    sample = batch(lvlm)
    made = sample.inputs["pixel_values"]
    for one in (
        made.double(),
        made.half(),
        made.clamp(min=0),
        made * 0,
        made + torch.randn_like(made),
    ):
        lvlm.prepare(inputs={**sample.inputs, "pixel_values": one})
    want = lvlm.run(sample).logits[sample.tokens.live]
    for kind in (torch.bool, torch.float32, torch.uint8):
        mask = sample.inputs["attention_mask"].to(kind)
        other = lvlm.prepare(inputs={**sample.inputs, "attention_mask": mask})
        assert torch.equal(lvlm.run(other).logits[sample.tokens.live], want)


@pytest.mark.parametrize(
    ("family", "name"), [("gemma3", "token_type_ids"), ("qwen2.5-vl", "mm_token_type_ids")]
)
def test_without_the_types_of_tokens_images_would_be_read_as_text(tiny, family, name):
    """The model takes such inputs, and gives other logits: it masks or counts images like words."""
    lvlm = tiny(family)
    given = lvlm.prepare(random_image(64, 80), "what is it").inputs
    bare = {k: v for k, v in given.items() if k != name}
    with torch.no_grad():
        whole, less = (lvlm.module(**one).logits for one in (given, bare))
    assert (whole - less).abs().max() > 0.05
    for wrong, says in (
        (bare, "missing"),
        ({**given, name: torch.zeros_like(given[name])}, "not 1 at image tokens alone"),
        ({**given, name: torch.ones_like(given[name])}, "not 1 at image tokens alone"),
        ({**given, name: given[name][:, :-1]}, "not 1 at image tokens alone"),
    ):
        with pytest.raises(InputError, match=f"{name} that are {says}"):
            lvlm.prepare(inputs=wrong)


@pytest.mark.parametrize(
    "change",
    [
        lambda one: {"image_grid_thw": -one["image_grid_thw"]},
        lambda one: {"image_grid_thw": one["image_grid_thw"][0]},
        lambda one: {"image_grid_thw": one["image_grid_thw"].float()},
        lambda one: {"image_grid_thw": one["image_grid_thw"].tolist()},
        lambda one: {"pixel_values": one["pixel_values"][:-4]},
        lambda one: {"pixel_values": one["pixel_values"][:, :-1]},
    ],
)
def test_grids_and_patches_must_agree(tiny, change):
    lvlm = tiny("qwen2.5-vl")
    given = lvlm.prepare(random_image(64, 80), "what is it").inputs
    says = r"Got image_grid_thw .*expected (\[time|int64|a tensor)|does not take these inputs"
    with pytest.raises(InputError, match=says):
        lvlm.prepare(inputs={**given, **change(given)})


def test_padding_without_a_mask_is_refused(tiny):
    """All of a batch would be attended, padding too: other logits, and a sink at the wrong place."""
    lvlm = tiny("llava-clip-llama")
    texts = ["what is it", "what is it, now or then or never"]
    two = lvlm.prepare([random_image(64, 80)] * 2, texts)
    blind = {k: v for k, v in two.inputs.items() if k != "attention_mask"}
    with torch.no_grad():
        wrong = lvlm.module(**blind).logits[:, -1]
    assert (wrong - lvlm.run(two, logits="last").logits[:, -1])[0].abs().max() > 1e-3
    right = {
        **blind,
        "input_ids": pad(two.inputs["input_ids"][1:], (0, 2), value=lvlm.tokenizer.pad_token_id),
    }
    for one in (blind, {**right, "pixel_values": two.inputs["pixel_values"][:1]}):
        with pytest.raises(InputError, match="padding in input_ids and no attention_mask"):
            lvlm.prepare(inputs=one)
    alone = lvlm.prepare(random_image(64, 80), texts[0]).inputs
    bare = lvlm.prepare(inputs={k: v for k, v in alone.items() if k != "attention_mask"})
    assert bool(bare.tokens.live.all())


def test_without_a_processor_only_kinds_can_be_told(tiny):
    lvlm = tiny("llava-clip-llama")
    given = lvlm.prepare(random_image(64, 80), "what is it").inputs
    bare = ss.LVLM(lvlm.module)
    bare.prepare(inputs={**given, "pixel_values": given["pixel_values"] + 9})
    with pytest.raises(InputError, match=r"torch.uint8; expected floats"):
        bare.prepare(inputs={**given, **levels(torch.uint8)(given)})

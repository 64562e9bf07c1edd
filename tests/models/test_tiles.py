"""Images that are cut into tiles: which image, which pixels and which part every token is."""

import pytest
import torch
import transformers as hf
from PIL import Image
from tiny_families import build

import sinkscope as ss
from sinkscope.testing.processors import LLAVA_CHAT, llava_tokenizer
from sinkscope.testing.tiny import randomize

PINS = [[48, 96], [96, 48], [48, 48], [96, 96]]


@pytest.fixture(scope="module")
def lvlm():
    """LLaVA-NeXT with 36 patches a tile, and a real processor for its tiles."""
    model = build("llava_next")
    tokenizer = llava_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    for config in (model.config, model.model.config):
        config.image_token_id = tokenizer.image_token_id
    randomize(model, torch.Generator().manual_seed(0), 0.2)
    square = {"height": 48, "width": 48}
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 48}, crop_size=square, image_grid_pinpoints=PINS
    )
    how = {"patch_size": 8, "num_additional_image_tokens": 1}
    how["vision_feature_select_strategy"] = "default"
    processor = hf.LlavaNextProcessor(images, tokenizer, chat_template=LLAVA_CHAT, **how)
    return ss.LVLM(model.eval(), processor)


def halves(size, axis):
    """An image whose first half along an axis is dark, and the other bright."""
    image = Image.new("RGB", size)
    w, h = size
    box = (w // 2, 0, w, h) if axis == 0 else (0, h // 2, w, h)
    image.paste((255, 255, 255), box)
    return image


@pytest.mark.parametrize("size", [(96, 48), (48, 96), (192, 96), (96, 96), (90, 50)])
def test_tiles_and_the_small_copy(lvlm, size):
    """The small copy shows the whole image; tiles show their own part of it, and rows end with newlines."""
    sample = lvlm.prepare(images=Image.new("RGB", size, (10, 90, 200)), text="what")
    tokens, (w, h) = sample.tokens, size
    assert (tokens.image[tokens.select("image")] == 0).all()
    small, tiles = tokens.select("thumbnail")[0], tokens.select("patch")[0]
    ends = tokens.select("newline")[0]
    assert torch.equal(small | tiles | ends, tokens.select("image")[0])
    assert int(small.sum()) == 36
    assert tokens.box_unit == "original"
    box = tokens.box[0]
    for part in (small, tiles):
        low, high = box[part][:, :2].amin(0), box[part][:, 2:].amax(0)
        assert torch.allclose(low, torch.zeros(2), atol=2.0 * max(size) / 48)
        assert torch.allclose(high, torch.tensor([float(w), float(h)]), atol=2.0 * max(size) / 48)
    assert box[ends].isnan().all()
    wide = (box[small][:, 2] - box[small][:, 0]).median()
    assert float(wide) == pytest.approx(w / 6, rel=0.05)


@pytest.mark.parametrize("axis", [0, 1])
def test_pixels_of_a_box_make_its_token(lvlm, axis):
    """Tokens of a bright half differ from an image that is all dark; those of the dark half do not."""
    size = (96, 48) if axis == 0 else (48, 96)
    halved = lvlm.prepare(images=halves(size, axis), text="what")
    dark = lvlm.prepare(images=Image.new("RGB", size), text="what")
    seen = []
    for sample in (halved, dark):
        embeds = lvlm.module.model.vision_tower.embeddings
        seen.append(embeds(sample.inputs["pixel_values"].flatten(0, 1)).detach())
    moved = (seen[0] - seen[1]).abs().amax(-1) > 1e-4
    vision = halved.tokens.vision
    low, high, middle = vision.box[..., axis], vision.box[..., axis + 2], size[axis] / 2
    bright, shade = low > middle - 1, high < middle - 8  # resizing blurs the edge
    assert int(bright.sum()) >= 36
    assert int(shade.sum()) >= 36
    assert moved[bright].all()
    assert not moved[shade].any()


def test_two_images_of_one_prompt(lvlm):
    """Tiles belong to their own image."""
    pair = [Image.new("RGB", (96, 48), (200, 0, 0)), Image.new("RGB", (96, 96), (0, 0, 90))]
    tokens = lvlm.prepare(images=pair, text="what").tokens
    counts = [int(tokens.select(f"image:{i}").sum()) for i in range(2)]
    assert counts[0] < counts[1]
    for i, (w, h) in enumerate(((96, 48), (96, 96))):
        box = tokens.box[tokens.select(f"image:{i}")]
        assert torch.allclose(
            box[:, 2:].nan_to_num().amax(0), torch.tensor([float(w), float(h)]), atol=4
        )

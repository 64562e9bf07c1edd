"""Questions that share an image equal the same questions asked alone."""

import pytest
import torch

import sinkscope as ss
from sinkscope.data.batches import extend
from sinkscope.models.decoder import decoder_inputs
from sinkscope.models.prefix import capture_branches, resume_stem, resume_tails, why_not_shared
from sinkscope.models.replay import logits_at
from sinkscope.testing import random_image, tiny_llava
from tests.conftest import FAMILIES

QUESTIONS = ("what is it", "how many red shapes are in the picture , and where ?", "why")
PAIRS = ((0.0, 1.0), (0.3, 0.7), (1.6, 0.2))


def ask(lvlm, images):
    """Samples, decoder arguments and the length of what they share."""
    samples = [lvlm.prepare(images=images, text=text) for text in QUESTIONS]
    givens, features = [], None
    with torch.no_grad():
        for i, sample in enumerate(samples):
            given, features = decoder_inputs(lvlm, extend(sample.inputs, [5] * i), features)
            givens.append(given)
    length = int((samples[0].tokens.image[0] >= 0).nonzero().max()) + 1
    return samples, givens, length


def flagged(sample):
    """Every third image token stands in for V-sinks."""
    visual = sample.tokens.image >= 0
    return visual & (torch.arange(visual.shape[1]) % 3 == 0), visual


@pytest.mark.parametrize(
    ("family", "kernel", "n_images"),
    [(family, "sdpa", 1) for family in FAMILIES]
    + [("llava-clip-llama", "eager", 2), ("gemma3", "eager", 1), ("qwen2.5-vl", "sdpa", 2)]
    + [("gpt_oss", "eager", 1)],
)
def test_shared_images_equal_single_questions(family, kernel, n_images, tiny):
    if family == "gpt_oss":
        lvlm = ss.LVLM(*tiny_llava("siglip", "gpt_oss", attn_implementation="eager"))
    else:
        lvlm = tiny(family, kernel)
    samples, givens, length = ask(lvlm, [random_image(90, 112, s) for s in range(n_images)])
    assert why_not_shared(givens, length) is None
    seen = capture_branches(lvlm, givens, length)
    marked, visual = flagged(samples[0])
    scales = torch.stack([torch.where(marked, v, r)[0] for v, r in PAIRS])
    scales = torch.where(visual, scales, 1.0)[:, :length]
    edits = torch.arange(3).repeat_interleave(3)
    tails = torch.arange(3).repeat(3)
    for block in range(lvlm.anatomy.language.n_layers):
        with torch.no_grad():
            past = resume_stem(seen, block, scales)
            logits = logits_at(seen.tails, resume_tails(seen, block, scales, past, edits, tails))
        for edit, tail, got in zip(edits.tolist(), tails.tolist(), logits, strict=True):
            mask, image = flagged(samples[tail])
            pair = [
                ss.ScaleKeys(mask, PAIRS[edit][0], [block], allow_noop=True),
                ss.ScaleKeys(image & ~mask, PAIRS[edit][1], [block], allow_noop=True),
            ]
            expected = lvlm.run(samples[tail], interventions=pair).logits[0, length:]
            torch.testing.assert_close(got[: len(expected)], expected, atol=1e-4, rtol=1e-5)
    plain = logits_at(seen.tails, seen.tails.hidden)
    for tail, sample in enumerate(samples):
        expected = lvlm.run(sample).logits[0, length:]
        torch.testing.assert_close(plain[tail][: len(expected)], expected, atol=1e-4, rtol=1e-5)


def test_what_cannot_be_shared(tiny):
    lvlm = tiny("gemma3")
    _, givens, length = ask(lvlm, random_image())
    other = lvlm.prepare(images=random_image(seed=9), text="what")
    with torch.no_grad():
        others, _ = decoder_inputs(lvlm, other.inputs)
    assert "differ before" in why_not_shared([*givens, others], length)
    assert "nothing stands" in why_not_shared(givens, 0)
    assert "nothing stands" in why_not_shared(givens, givens[0]["inputs_embeds"].shape[1])
    assert "sees what follows" in why_not_shared(givens, length - 4)
    unmasked = {**givens[0], "attention_mask": {"full_attention": None}}
    assert "leaves its mask" in why_not_shared([unmasked], length)


def test_padded_prompts_are_not_shared(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    with torch.no_grad():
        given, _ = decoder_inputs(lvlm, sample.inputs)
    assert "padded" in why_not_shared([given], 10)

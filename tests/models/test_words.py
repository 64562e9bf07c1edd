"""Every token of a prompt reads as text, whatever its tokenizer calls it."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sinkscope.testing import random_image
from sinkscope.testing.processors import llava_tokenizer, qwen_tokenizer
from sinkscope.tokens import words_of


@pytest.fixture(scope="module")
def bytes_only():
    return llava_tokenizer()


def read(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return words_of(tokenizer, ids)


def test_byte_level_pieces_are_words(bytes_only) -> None:
    words = read(bytes_only, "How many red\n")
    assert words == ("How", " many", " red", "\n")
    assert words_of(bytes_only, [1, 4]) == ("<s>", "<image>")


def test_a_character_in_several_tokens_says_which_part(bytes_only) -> None:
    """中 is the three bytes e4 b8 ad, and the tokenizer has learned no piece of them."""
    assert len(bytes_only("中", add_special_tokens=False)["input_ids"]) == 3
    assert read(bytes_only, "中") == ("中 1/3", "中 2/3", "中 3/3")
    assert read(bytes_only, "é a") == ("é 1/2", "é 2/2", " a")
    assert read(qwen_tokenizer(), "图中")[3:] == ("中 1/3", "中 2/3", "中 3/3")
    assert read(bytes_only, "🙂")[0] == "🙂 1/4"


def test_bytes_that_make_no_character_are_visible(bytes_only) -> None:
    first, second, third = bytes_only("中", add_special_tokens=False)["input_ids"]
    assert words_of(bytes_only, [first, second]) == ("�", "�")
    assert words_of(bytes_only, [third, 1]) == ("�", "<s>")
    assert words_of(bytes_only, [first, first, second, third]) == (
        "�",
        "中 1/3",
        "中 2/3",
        "中 3/3",
    )


def test_sentencepiece_blanks_and_bytes() -> None:
    pieces = ["<unk>", "▁red", "▁", "<0xC3>", "<0xA9>", "shape"]
    core = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>")
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert words_of(tokenizer, [1, 2, 3, 4, 5]) == ("red", " ", "é 1/2", "é 2/2", "shape")
    assert words_of(tokenizer, [99]) == ("token 99",)


def test_a_sample_has_words(tiny) -> None:
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(32, 32, 0), text="red é")
    words = sample.tokens.words[0]
    assert words[0] == "<s>"
    assert not [word for word in words if "Ġ" in word or "Ã" in word]
    assert [w for w in words if "/2" in w] == ["é 1/2", "é 2/2"]

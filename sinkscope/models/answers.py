"""The tokens of an answer, as they follow a prompt: one rule for training and for every score."""

from __future__ import annotations

from typing import Any

from sinkscope.errors import InputError


def answer_ids(tokenizer: Any, prompt: str, answer: str) -> tuple[int, ...]:
    """The tokens of an answer behind a prompt, which is how generation continues it.

    A prompt that ends in a word gets a space between, as ``ASSISTANT: circle``; one that ends in a
    new line does not. So byte-level tokenizers give `` circle`` in the first case, and SentencePiece no
    second space. An answer that begins with a space keeps it.

    Args:
        tokenizer: The model's.
        prompt: The rendered prompt, as in ``sample.texts``.
        answer: The answer.

    Raises:
        InputError: If the answer has no token, or the tokens of the prompt change with it.
    """
    if not answer.strip():
        raise InputError(f"Got the answer {answer!r}, which has no token; expected some text.")
    joined = not prompt or prompt[-1].isspace() or answer[0].isspace()
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    whole = prompt + ("" if joined else " ") + answer
    both = tokenizer(whole, add_special_tokens=False)["input_ids"]
    if both[: len(before)] != before or len(both) == len(before):
        raise InputError(
            f"Got the answer {answer[:40]!r} behind a prompt that ends in {prompt[-12:]!r}, whose tokens "
            "change with it; expected them to stay, as in generation. Let the chat template end without a "
            "space."
        )
    return tuple(both[len(before) :])

"""Token ids as words that a reader can recognise, one for every position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"
"""What a tokenizer writes for bytes that are no character."""
MOST_TOKENS = 4
"""A character of UTF-8 has at most four bytes, and a token at least one."""


def words_of(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of every token of a row.

    A character whose bytes lie in several tokens is written with each of them, and which part that
    token is: ``中 1/2``, ``中 2/2``. Bytes that make no character are ``�``.

    Args:
        tokenizer: A ``transformers`` tokenizer.
        ids: Token ids, with the special ones.

    Returns:
        One word per id, with its blanks.
    """
    known = {token: _word(tokenizer, token) for token in set(ids)}
    words = [known[token] for token in ids]
    at = 0
    while at < len(words):
        size, whole = _character(tokenizer, ids, words, at)
        if size > 1:
            words[at : at + size] = [f"{whole} {part + 1}/{size}" for part in range(size)]
        at += size
    return tuple(words)


def _word(tokenizer: Any, token: int) -> str:
    """One token alone. Tokenizers drop a blank that begins a text: then its piece is shown."""
    piece = tokenizer.convert_ids_to_tokens(token)
    return _text(tokenizer, [token]) or (piece or f"token {token}").replace("▁", " ")


def _character(tokenizer: Any, ids: Sequence[int], words: list[str], at: int) -> tuple[int, str]:
    """How many tokens from ``at`` on make whole characters, and the text of these."""
    if words[at].endswith(BROKEN):
        for size in range(2, MOST_TOKENS + 1):
            together = _text(tokenizer, list(ids[at : at + size]))
            if at + size <= len(ids) and BROKEN not in together:
                return size, together.strip(" ")
    return 1, words[at]


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

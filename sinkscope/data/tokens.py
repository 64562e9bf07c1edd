"""The tokens of an answer behind a prompt, and how well a model predicts them: in training and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss
from torch.nn.utils.rnn import pad_sequence

from sinkscope.errors import InputError

IGNORED = -100
"""The label of positions whose prediction does not count, as in PyTorch."""
EXTENDED = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
"""Inputs with one entry per position, and what a text token after the prompt has there."""
Ids = tuple[int, ...]


def answer_ids(tokenizer: Any, prompt: str, answer: str) -> Ids:
    """The tokens of an answer behind a rendered prompt, which is how generation continues it.

    A prompt that ends in a word gets a space between, as ``ASSISTANT: circle``, unless the answer begins
    with one; a prompt that ends in a new line does not. The prompt's tokens must stay as they are.
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
            "change with it; expected them to stay. Let the chat template end without a space."
        )
    return tuple(both[len(before) :])


def with_answers(
    inputs: Mapping[str, Any], tails: Sequence[Sequence[int]], pad: int = 0
) -> tuple[dict[str, Any], Tensor]:
    """Processor output with an answer after every prompt, padded with ``pad`` on the left again.

    ``tails`` are the answers' tokens, which may be none. Also: labels ``[row pos]``, those tokens and
    `IGNORED` elsewhere.
    """
    ids, live = inputs["input_ids"], inputs["attention_mask"].bool()
    if len(ids) != len(tails):
        raise InputError(f"Got {len(ids)} rows and {len(tails)} answers; expected one per row.")
    out = dict(inputs)
    for name, value in inputs.items():
        whole = isinstance(value, Tensor) and not value.is_floating_point()
        if name == "input_ids" or name in EXTENDED:
            more = [tail if name == "input_ids" else [EXTENDED[name]] * len(tail) for tail in tails]
            parts = zip(value, live, more, strict=True)
            rows = [torch.cat([old[mask], value.new_tensor(list(end))]) for old, mask, end in parts]
            out[name] = padded(rows, pad if name == "input_ids" else 0, "left")
        elif whole and value.shape == ids.shape:
            raise InputError(
                f"Got the input {name!r} with one entry per position; expected input_ids and "
                f"{sorted(EXTENDED)}: what an answer's tokens have there is not known."
            )
    width = out["input_ids"].shape[1]
    ends = [torch.tensor([IGNORED] * (width - len(tail)) + list(tail)) for tail in tails]
    return out, torch.stack(ends)


def extend(inputs: Mapping[str, Any], continuation: Sequence[int]) -> dict[str, Any]:
    """`with_answers` of one row; the tokens may be none."""
    return with_answers(inputs, [continuation])[0]


def padded(rows: Sequence[Tensor], value: int, side: str) -> Tensor:
    """Rows of unequal lengths as one tensor ``[row n]``."""
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """How well a model that reads an answer (teacher forcing) predicts each of its tokens."""

    logs: Tensor  # float ``[row n vocab]``: log-probabilities at the positions that predict the tokens
    greedy: Tensor  # int ``[row n]``: the likeliest token
    tokens: Tensor  # int ``[row n]``, or several ``[row n option]``; `IGNORED` where there is none

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor) -> TokenScores:
        """The scores of ``tokens`` under ``logits`` ``[row n vocab]``."""
        logs = logits.float().log_softmax(dim=-1)
        return cls(logs, logits.detach().argmax(dim=-1), tokens.to(logits.device))

    @property
    def logprobs(self) -> Tensor:
        """Log-probability of every token in nats, of the shape of ``tokens``; 0 where there is none."""
        index = self.tokens.clamp(min=0).reshape(*self.greedy.shape, -1)
        picked = self.logs.gather(2, index).reshape(self.tokens.shape)
        return picked.masked_fill(self.tokens == IGNORED, 0.0)

    @property
    def sums(self) -> Tensor:
        """Log-probability of every answer, ``[row]``."""
        return sum(self.logprobs.unbind(1), torch.zeros(()))

    @property
    def means(self) -> Tensor:
        """The same per token."""
        return self.sums / (self.tokens != IGNORED).sum(dim=1)

    @property
    def exact(self) -> Tensor:
        """Bool ``[row]``: whether every token is the likeliest, so that greedy decoding writes it."""
        return ((self.greedy == self.tokens) | (self.tokens == IGNORED)).all(dim=1)

    @property
    def loss(self) -> Tensor:
        """The next-token loss of all tokens, summed: PyTorch's cross-entropy to the bit."""
        logs, tokens = self.logs.flatten(0, 1), self.tokens.flatten()
        return nll_loss(logs, tokens, ignore_index=IGNORED, reduction="sum")

"""How an answer is scored: by teacher forcing, from the logits at its own positions.

::

    prompt ...... last     a_0    a_1    a_2          answer tokens
                    |       |      |
    logits for     a_0     a_1    a_2                 read at n positions, none after the answer

An answer and all options of a question share their prompt. Feeds are what must be put after it:
every option without its last token, and no feed that begins another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sinkscope.errors import InputError, nearest
from sinkscope.experiments.items import Item
from sinkscope.models.answers import answer_ids


@dataclass(frozen=True)
class Answered:
    """What the model makes of one question, without generating.

    Attributes:
        tokens: Token ids of the right answer.
        logprobs: Log-probability of each, given the prompt and those before it, in nats.
        greedy: The most likely token at each of their positions.
        choices: Mean log-probability per token of every option, in nats; empty without options.
        right: Which option is the right answer, -1 without options.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    greedy: tuple[int, ...]
    choices: tuple[float, ...] = ()
    right: int = -1

    @property
    def logprob(self) -> float:
        """Log-probability of the right answer: the sum over its tokens."""
        return sum(self.logprobs)


Score = Callable[[Item, Answered], float]


def logprob(item: Item, answered: Answered) -> float:
    """Log-probability of the right answer, in nats."""
    return answered.logprob


def choice(item: Item, answered: Answered) -> float:
    """1 if the right option has the highest mean log-probability per token, the first at a tie."""
    return float(answered.choices.index(max(answered.choices)) == answered.right)


def exact(item: Item, answered: Answered) -> float:
    """1 if greedy decoding begins with the right answer, token by token.

    As many tokens are compared as the answer has; what would follow is not looked at.
    """
    return float(answered.greedy == answered.tokens)


def check_finite(item: Item, answered: Answered, where: str, *, edited: bool) -> None:
    """Refuse log-probabilities that are no numbers: every comparison with them would be wrong.

    Args:
        item: The question.
        answered: What the model made of it.
        where: The cell in words.
        edited: Whether keys were scaled there.

    Raises:
        InputError: If one is NaN or infinite.
    """
    numbers = (*answered.logprobs, *answered.choices)
    if all(map(math.isfinite, numbers)):
        return
    wrong = next(x for x in numbers if not math.isfinite(x))
    hint = (
        "A factor this large overflows: write smaller ones in grid, or load the model with "
        "dtype='bfloat16' or 'float32'."
        if edited
        else "The model itself overflows: load it with dtype='bfloat16' or 'float32'."
    )
    raise InputError(
        f"Got a log-probability of {wrong} at {where}, for the question {item.question!r} about image "
        f"{item.image_id!r}; expected finite numbers. {hint}"
    )


def scored(score: Score, item: Item, answered: Answered, where: str) -> float:
    """The score of an answer, as a finite number.

    Raises:
        InputError: If a score function gives something else.
    """
    value: Any = score(item, answered)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"Got the score {value!r} at {where}, for the question {item.question!r} about image "
            f"{item.image_id!r}; expected a finite number. Return one for every question, or leave "
            "out the questions that have no score."
        )
    return number


SCORES: dict[str, Score] = {"logprob": logprob, "choice": choice, "exact": exact}


def choose_score(score: Any, items: Sequence[Item]) -> tuple[str, Score]:
    """The score and its name; None is ``"choice"`` where items have options, else ``"exact"``.

    Raises:
        InputError: If it is unknown, or some item lacks the options it needs.
    """
    with_options = sum(bool(item.choices) for item in items)
    if score is None and 0 < with_options < len(items):
        raise InputError(
            f"Got choices on {with_options} of {len(items)} items; expected all or none. Write "
            "score='exact' or score='logprob'."
        )
    name = ("choice" if with_options else "exact") if score is None else score
    if callable(name):
        own = cast("Score", name)
        return f"{own.__module__}.{getattr(own, '__qualname__', repr(own))}", own
    if name not in SCORES:
        raise InputError(
            f"Got score={score!r}; expected {', '.join(map(repr, SCORES))} or a function of an item and "
            f"what the model answered. {nearest(str(name), SCORES)}"
        )
    if name == "choice" and with_options < len(items):
        raise InputError(
            f"Got score='choice' and {len(items) - with_options} items without choices; expected "
            "options on every item, such as choices=['red', 'green']. Write score='exact'."
        )
    return name, SCORES[name]


@dataclass(frozen=True, eq=False)
class Asked:
    """One question, with its options as tokens.

    Attributes:
        item: The question.
        options: Ids of the answer, and then of every choice.
        feeds: What is put after the prompt: one row of the model each.
        row_of: Option -> its feed.
    """

    item: Item
    options: tuple[tuple[int, ...], ...]
    feeds: tuple[tuple[int, ...], ...]
    row_of: tuple[int, ...]


def ask(tokenizer: Any, prompt: str, item: Item) -> Asked:
    """The options of a question as tokens behind its prompt, and the fewest rows that score them all."""
    options = tuple(answer_ids(tokenizer, prompt, text) for text in (item.answer, *item.choices))
    feeds: list[tuple[int, ...]] = []
    for ids in sorted({ids[:-1] for ids in options}, key=lambda ids: (-len(ids), ids)):
        if not any(feed[: len(ids)] == ids for feed in feeds):
            feeds.append(ids)
    row_of = tuple(
        next(i for i, feed in enumerate(feeds) if feed[: len(ids) - 1] == ids[:-1])
        for ids in options
    )
    return Asked(item, options, tuple(feeds), row_of)


@dataclass(frozen=True, eq=False)
class Reading:
    """What is read of every row of the model: which positions, and which tokens there.

    Attributes:
        positions: Int ``[row n]``; rows with fewer positions repeat their last.
        tokens: Int ``[row n option]``: the token of every option at every position.
    """

    positions: Tensor
    tokens: Tensor

    def of(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and greedy tokens.

        Args:
            logits: ``[chunk n vocab]``.
            rows: Int ``[chunk]``: which row of the reading each one is.

        Returns:
            Float ``[chunk n option]`` and int ``[chunk n]``, on the CPU.
        """
        logs = logits.float().log_softmax(dim=-1)
        wanted = self.tokens[rows].to(logs.device)
        return logs.gather(2, wanted).cpu(), logits.argmax(dim=-1).cpu()


def reading_of(asked: Sequence[Asked], first: Sequence[int]) -> Reading:
    """What to read of the rows of several questions.

    Args:
        asked: The questions; their feeds, in order, are the rows.
        first: The position of each row's prompt's last token.
    """
    rows = [(one, row, feed) for one in asked for row, feed in enumerate(one.feeds)]
    n = max(len(feed) for _, _, feed in rows) + 1
    k = max(len(one.options) for one in asked)
    positions = torch.zeros(len(rows), n, dtype=torch.long)
    tokens = torch.zeros(len(rows), n, k, dtype=torch.long)
    for i, ((one, row, feed), start) in enumerate(zip(rows, first, strict=True)):
        positions[i] = start + torch.arange(n).clamp(max=len(feed))
        for j, ids in enumerate(one.options):
            if one.row_of[j] == row:
                tokens[i, : len(ids), j] = torch.tensor(ids)
    return Reading(positions, tokens)


def answered(one: Asked, logs: Sequence[Any], greedy: Sequence[Any]) -> Answered:
    """What the model answered, from the readings of a question's rows.

    Args:
        one: The question.
        logs: Per feed, ``[n option]`` as nested lists.
        greedy: Per feed, ``[n]``.
    """
    each = [
        tuple(logs[row][p][j] for p in range(len(ids)))
        for j, (ids, row) in enumerate(zip(one.options, one.row_of, strict=True))
    ]
    own = one.options[0]
    means = tuple(sum(values) / len(values) for values in each[1:])
    right = one.item.choices.index(one.item.answer) if one.item.choices else -1
    return Answered(own, each[0], tuple(greedy[one.row_of[0]][: len(own)]), means, right)

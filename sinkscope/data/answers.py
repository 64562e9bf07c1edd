"""The tokens of an answer, as they follow a prompt: one rule for training and for every score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sinkscope.data.items import Item, folded
from sinkscope.errors import InputError, nearest
from sinkscope.interventions.application import allowing_noop, check_interventions
from sinkscope.models.requests import GREEDY

if TYPE_CHECKING:
    from sinkscope.models.inputs import Sample
    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.runs import Generation, Run


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


@dataclass(frozen=True)
class Answers:
    """What a model said to a batch.

    Attributes:
        given: The answer, or the option with the highest score.
        correct: Whether it is the right one; see `answer_batch`.
        touched: Whether the edit touched the row, in the prompt pass or later.
    """

    given: tuple[str, ...]
    correct: tuple[bool, ...]
    touched: tuple[bool, ...]


class Forced:
    """Makes ``generate`` write given tokens: a logits processor.

    Args:
        tokens: Int ``[batch step]``.
        prompt: Length of the prompt.
    """

    def __init__(self, tokens: Tensor, prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores under which the next token is the given one."""
        wanted = self.tokens[:, input_ids.shape[1] - self.prompt].to(scores.device)
        out = torch.full_like(scores, float("-inf"))
        return out.scatter(1, wanted[:, None], 0.0)


def answer_batch(
    lvlm: LVLM,
    sample: Sample,
    items: Sequence[Item],
    edits: Sequence[Any],
    *,
    length_normalized: bool = True,
) -> Answers:
    """Answers of a batch, all of them free or all among options.

    Free answers are greedy, without what a generation config adds, and of each only as many tokens
    count as its own right answer has, so that no answer depends on the other questions of the batch. It is right if these are the tokens of
    the right answer, as in `sinkscope.data.answers.exact`, or if they begin with the same
    text after stripping and lower case: a model may leave out the space before an answer.

    An option's score is the mean log-probability of its tokens after the prompt, or their sum if it is not length
    normalised; the options are forced through ``generate``, so that a prompt is a prompt and an
    option's tokens are decode steps for every edit. Options of one token cost one forward pass.
    """
    ready = [allowing_noop(it) for it in check_interventions(edits)]
    if not items[0].choices:
        return _answer_freely(lvlm, sample, items, ready)
    scores, touched = score_options(lvlm, sample, items, ready, length_normalized)
    best = scores.argmax(dim=1).tolist()
    given = tuple(item.choices[i] for item, i in zip(items, best, strict=True))
    correct = tuple(text == item.answer for text, item in zip(given, items, strict=True))
    return Answers(given, correct, touched)


def _answer_freely(
    lvlm: LVLM, sample: Sample, items: Sequence[Item], edits: Sequence[Any]
) -> Answers:
    """Greedy answers, each cut to the length of its own right answer."""
    wanted = [
        answer_ids(lvlm.tokenizer, prompt, item.answer)
        for prompt, item in zip(sample.texts or (), items, strict=True)
    ]
    sizes = [len(ids) for ids in wanted]
    out = lvlm.generate(sample, [], edits, max_new_tokens=max(sizes), **GREEDY)
    said = out.sequences[:, sample.tokens.ids.shape[1] :].tolist()
    given, correct = [], []
    for row, ids, item in zip(said, wanted, items, strict=True):
        starts = [row[:size] for size in range(1, len(ids) + 1)]
        texts = lvlm.tokenizer.batch_decode(starts, skip_special_tokens=True)
        read = [text for text in texts if folded(text) == folded(item.answer)]
        right = tuple(starts[-1]) == ids
        given.append(texts[-1] if right or not read else read[-1])
        correct.append(right or bool(read))
    return Answers(tuple(given), tuple(correct), _touched(out.steps, sizes))


def score_options(
    lvlm: LVLM,
    sample: Sample,
    items: Sequence[Item],
    edits: Sequence[Any],
    length_normalized: bool,
) -> tuple[Tensor, tuple[bool, ...]]:
    """Log-probabilities of options, float ``[batch option]``, -inf where a row has fewer.

    Returns:
        The scores, and whether an edit touched the row in a pass that its scores came from.
    """
    tokens = [
        [answer_ids(lvlm.tokenizer, prompt, text) for text in item.choices]
        for prompt, item in zip(sample.texts or (), items, strict=True)
    ]
    many = max(len(row) for row in tokens)
    scores = torch.full((len(items), many), float("-inf"))
    if all(len(option) == 1 for row in tokens for option in row):
        run = lvlm.run(sample, [], edits, logits="last")
        logp = run.logits[:, -1].float().log_softmax(-1).cpu()
        for b, row in enumerate(tokens):
            scores[b, : len(row)] = logp[b, [option[0] for option in row]]
        return scores, _touched([run], [1] * len(items))
    touched = torch.zeros(len(items), dtype=torch.bool)
    for i in range(many):
        forced = [row[min(i, len(row) - 1)] for row in tokens]
        logp, out = _forced(lvlm, sample, forced, edits)
        touched |= torch.tensor(_touched(out.steps, [len(option) for option in forced]))
        for b, row in enumerate(tokens):
            if i < len(row):
                size = len(row[i]) if length_normalized else 1
                scores[b, i] = logp[b] / size
    return scores, tuple(touched.tolist())


def _forced(
    lvlm: LVLM, sample: Sample, forced: Sequence[tuple[int, ...]], edits: Sequence[Any]
) -> tuple[Tensor, Generation]:
    """The summed log-probability of one continuation per row, ``[batch]``."""
    from transformers import LogitsProcessorList

    longest = max(len(row) for row in forced)
    tokens = torch.tensor([row + row[-1:] * (longest - len(row)) for row in forced])
    prompt = sample.tokens.ids.shape[1]
    out = lvlm.generate(
        sample,
        [],
        edits,
        max_new_tokens=longest,
        logits_processor=LogitsProcessorList([Forced(tokens, prompt)]),
        **GREEDY,
    )
    total = torch.zeros(len(forced))
    for step, run in enumerate(out.steps):
        logp = run.logits[:, -1].float().log_softmax(-1).cpu()
        inside = torch.tensor([step < len(row) for row in forced])
        total += torch.where(inside, logp.gather(1, tokens[:, step, None])[:, 0], 0.0)
    return total, out


def _touched(steps: Sequence[Run], sizes: Sequence[int]) -> tuple[bool, ...]:
    """Which rows an edit touched; a packed tower has one row for all.

    Args:
        steps: The passes, the prompt's first.
        sizes: Per row, how many passes its answer took. What the row goes through later, because
            another answer of the batch is longer, does not count.
    """
    out = torch.zeros(len(sizes), dtype=torch.bool)
    for step, run in enumerate(steps):
        needed = torch.tensor([step < size for size in sizes])
        for effect in run.effects.values():
            touched = effect.touched
            out |= needed & (touched if len(touched) == len(sizes) else touched.any())
    return tuple(out.tolist())


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

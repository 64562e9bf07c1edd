"""What a model answers: freely or among options, under edits; and the scores of what it answered."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sinkscope.checks import check_choice
from sinkscope.data.batches import IGNORED, Ids, TokenScores, answer_ids, padded
from sinkscope.data.items import Item
from sinkscope.errors import InputError
from sinkscope.interventions.application import allowing_noop, check_interventions
from sinkscope.kernels.walk import Saying
from sinkscope.models.inputs import Sample
from sinkscope.models.lvlm import LVLM
from sinkscope.models.requests import GREEDY
from sinkscope.models.runs import Run


@dataclass(frozen=True)
class Answers:
    """What a model said to a batch; see `answer_batch`."""

    given: tuple[str, ...]  # the answer, or the option with the highest score
    correct: tuple[bool, ...]
    touched: tuple[bool, ...]  # by the edit, in the prompt pass or later


def answer_batch(
    lvlm: LVLM,
    sample: Sample,
    items: Sequence[Item],
    edits: Sequence[Any],
    *,
    length_normalized: bool = True,
) -> Answers:
    """Answers of a batch, all of them free or all among options; for these see `score_options`.

    Free answers are greedy, and of each only as many tokens count as its right answer has. It is right
    if these are that answer's tokens, or begin with the same text after stripping and lower case.
    """
    ready = [allowing_noop(it) for it in check_interventions(edits)]
    if items[0].choices:
        scores, touched, _ = score_options(lvlm, sample, items, ready, length_normalized)
        best = scores.argmax(dim=1).tolist()
        given = [item.choices[i] for item, i in zip(items, best, strict=True)]
        correct = [text == item.answer for text, item in zip(given, items, strict=True)]
        return Answers(tuple(given), tuple(correct), touched)
    prompts = zip(sample.texts or (), items, strict=True)
    wanted = [answer_ids(lvlm.tokenizer, prompt, item.answer) for prompt, item in prompts]
    sizes = [len(ids) for ids in wanted]
    out = lvlm.generate(sample, [], ready, max_new_tokens=max(sizes), **GREEDY)
    said = out.sequences[:, sample.tokens.ids.shape[1] :].tolist()
    given, correct = [], []
    for row, ids, item in zip(said, wanted, items, strict=True):
        starts = [row[:size] for size in range(1, len(ids) + 1)]
        texts = lvlm.tokenizer.batch_decode(starts, skip_special_tokens=True)
        same = [text for text in texts if text.strip().lower() == item.answer.strip().lower()]
        right = tuple(starts[-1]) == ids
        given.append(texts[-1] if right or not same else same[-1])
        correct.append(right or bool(same))
    return Answers(tuple(given), tuple(correct), touched_rows(out.steps, sizes))


def score_options(
    lvlm: LVLM, sample: Sample, items: Sequence[Item], edits: Sequence[Any], length_normalized: bool
) -> tuple[Tensor, tuple[bool, ...], Tensor]:
    """Log-probabilities of options, float ``[batch option]``, -inf where a row has fewer.

    Then touched rows, and bool ``[batch option]``: whether greedy decoding begins with the option. They
    are the mean over an option's tokens, or the sum. Options are forced through ``generate``, so that
    their tokens are decode steps for every edit; options of one token cost one forward pass.
    """
    options = [
        [torch.tensor(answer_ids(lvlm.tokenizer, prompt, text)) for text in item.choices]
        for prompt, item in zip(sample.texts or (), items, strict=True)
    ]
    if all(len(ids) == 1 for row in options for ids in row):
        run = lvlm.run(sample, [], edits, logits="last")
        wanted = padded([torch.cat(row) for row in options], IGNORED, "right")
        found = TokenScores.of(run.logits[:, -1:], wanted[:, None])
        touched = touched_rows([run], [1] * len(items))
        logs = found.logprobs[:, 0].cpu().masked_fill(wanted == IGNORED, float("-inf"))
        return logs, touched, found.greedy.cpu() == wanted
    scores, exact = [], []
    seen, start = torch.zeros(len(items), dtype=torch.bool), sample.tokens.ids.shape[1]
    for i in range(max(map(len, options))):
        forced = [row[min(i, len(row) - 1)] for row in options]
        ids = padded(forced, IGNORED, "right")

        # The option's tokens are forced; its last is repeated where others are longer.
        said = torch.stack(
            [one[torch.arange(ids.shape[1]).clamp(max=len(one) - 1)] for one in forced]
        )
        how: dict[str, Any] = {"logits_processor": [Saying(said, start)], **GREEDY}
        out = lvlm.generate(sample, [], edits, max_new_tokens=ids.shape[1], **how)
        found = TokenScores.of(torch.cat([run.logits[:, -1:] for run in out.steps], dim=1), ids)
        gone = torch.tensor([i >= len(row) for row in options])
        each = (found.means if length_normalized else found.sums).cpu()
        scores.append(each.masked_fill(gone, float("-inf")))
        exact.append(found.exact.cpu() & ~gone)
        seen |= torch.tensor(touched_rows(out.steps, [len(one) for one in forced]))
    return torch.stack(scores, dim=1), tuple(seen.tolist()), torch.stack(exact, dim=1)


def touched_rows(steps: Sequence[Run], sizes: Sequence[int]) -> tuple[bool, ...]:
    """Which rows an edit touched in the first passes, as many as ``sizes`` says; a packed tower has one row."""
    out = torch.zeros(len(sizes), dtype=torch.bool)
    for step, run in enumerate(steps):
        needed = torch.tensor(sizes) > step
        for found in (effect.touched for effect in run.effects.values()):
            out |= needed & (found if len(found) == len(sizes) else found.any())
    return tuple(out.tolist())


@dataclass(frozen=True)
class Answered:
    """What the model makes of one question, without generating; all log-probabilities in nats."""

    tokens: Ids  # token ids of the right answer
    logprobs: tuple[float, ...]  # of each, given the prompt and those before it
    greedy: Ids  # the most likely token at each of their positions
    choices: tuple[float, ...] = ()  # mean log-probability per token of every option, if any
    right: int = -1  # which option is the right answer, -1 without options

    @property
    def logprob(self) -> float:
        """Log-probability of the right answer: the sum over its tokens."""
        return sum(self.logprobs)


Score = Callable[[Item, Answered], float]
SCORES: dict[str, Score] = {
    # the right answer, in nats
    "logprob": lambda item, said: said.logprob,
    # 1 if the right option has the highest mean log-probability per token, the first at a tie
    "choice": lambda item, said: float(said.choices.index(max(said.choices)) == said.right),
    # 1 if greedy decoding begins with the right answer, token by token
    "exact": lambda item, said: float(said.greedy == said.tokens),
}


def choose_score(score: Any, items: Sequence[Item]) -> tuple[str, Score]:
    """The score and its name; None is ``"choice"`` where items have options, else ``"exact"``."""
    if callable(score):
        name = f"{score.__module__}.{getattr(score, '__qualname__', repr(score))}"
        return name, cast("Score", score)
    with_options = sum(bool(item.choices) for item in items)
    name = ("choice" if with_options else "exact") if score is None else score
    check_choice(SCORES, score=name)
    if name == "choice" and with_options < len(items):
        raise InputError(
            f"Got {len(items) - with_options} items without choices; expected options on all for "
            "score='choice'. Write choices=['red', 'green'], or score='exact' or score='logprob'."
        )
    return name, SCORES[name]


def check_finite(item: Item, answered: Answered, where: str, *, edited: bool) -> None:
    """Refuse log-probabilities that are NaN or infinite; ``where`` is the cell in words."""
    cause = "A factor this large overflows: write smaller ones in grid, or load"
    cause = cause if edited else "The model itself overflows: load"
    advice = f"{cause} the model with dtype='bfloat16' or 'float32'."
    for value in (*answered.logprobs, *answered.choices):
        _finite("a log-probability of", value, where, item, advice)


def scored(score: Score, item: Item, answered: Answered, where: str) -> float:
    """The score of an answer, as a finite number; see `check_finite`."""
    advice = "Return one for every question, or leave out the questions that have no score."
    return _finite("the score", score(item, answered), where, item, advice)


def _finite(what: str, value: Any, where: str, item: Item, advice: str) -> float:
    with suppress(TypeError, ValueError):
        if math.isfinite(number := float(value)):
            return number
    raise InputError(
        f"Got {what} {value!r} at {where}, for the question {item.question!r} about image "
        f"{item.image_id!r}; expected a finite number. {advice}"
    )


@dataclass(frozen=True, eq=False)
class Asked:
    """One question, with its options as tokens."""

    item: Item
    options: tuple[Ids, ...]  # the answer, and then every choice
    feeds: tuple[Ids, ...]  # what is put after the prompt: one row of the model each
    row_of: Ids  # option -> its feed


def ask(tokenizer: Any, prompt: str, item: Item) -> Asked:
    """The options of a question as tokens behind its prompt, and the fewest rows that score them all."""
    options = tuple(answer_ids(tokenizer, prompt, text) for text in (item.answer, *item.choices))
    starts, feeds = [ids[:-1] for ids in options], list[Ids]()
    for ids in sorted(set(starts), key=lambda ids: (-len(ids), ids)):
        if not any(feed[: len(ids)] == ids for feed in feeds):
            feeds.append(ids)
    rows = [[feed[: len(ids)] == ids for feed in feeds].index(True) for ids in starts]
    return Asked(item, options, tuple(feeds), tuple(rows))


@dataclass(frozen=True, eq=False)
class Reading:
    """What is read of every row of the model: which positions, and which tokens there."""

    positions: Tensor  # int ``[row n]``; rows with fewer positions repeat their last
    tokens: Tensor  # int ``[row n option]``: the token of every option at every position


def reading_of(asked: Sequence[Asked], first: Sequence[int]) -> Reading:
    """What to read of the feeds of several questions, whose prompts end at the positions ``first``."""
    rows = [(one, row, feed) for one in asked for row, feed in enumerate(one.feeds)]
    n = max(len(feed) for _, _, feed in rows) + 1
    positions = torch.zeros(len(rows), n, dtype=torch.long)
    tokens = torch.full((len(rows), n, max(len(one.options) for one in asked)), IGNORED)
    for i, ((one, row, feed), start) in enumerate(zip(rows, first, strict=True)):
        positions[i] = start + torch.arange(n).clamp(max=len(feed))
        for j, ids in enumerate(one.options):
            if one.row_of[j] == row:
                tokens[i, : len(ids), j] = torch.tensor(ids)
    return Reading(positions, tokens)


def answered(one: Asked, logs: Sequence[Any], greedy: Sequence[Any]) -> Answered:
    """What the model answered: log-probabilities ``[n option]`` and greedy tokens ``[n]`` by feed."""
    options = enumerate(zip(one.options, one.row_of, strict=True))
    each = [tuple(logs[row][p][j] for p in range(len(ids))) for j, (ids, row) in options]
    own, said = one.options[0], greedy[one.row_of[0]]
    means = tuple(sum(values) / len(values) for values in each[1:])
    right = one.item.choices.index(one.item.answer) if one.item.choices else -1
    return Answered(own, each[0], tuple(said[: len(own)]), means, right)

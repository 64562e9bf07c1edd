"""Let a model answer one batch of questions under one condition: freely, or among options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.experiments.items import Item, folded
from sinkscope.interventions.running import check_interventions, tolerant
from sinkscope.models.answers import answer_ids
from sinkscope.models.options import GREEDY

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.outputs import Generation, Run
    from sinkscope.models.prepare import Sample


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
    the right answer, as in `sinkscope.experiments.sweeps.scores.exact`, or if they begin with the same
    text after stripping and lower case: a model may leave out the space before an answer.

    An option's score is the mean log-probability of its tokens after the prompt, or their sum if it is not length
    normalised; the options are forced through ``generate``, so that a prompt is a prompt and an
    option's tokens are decode steps for every edit. Options of one token cost one forward pass.
    """
    ready = [tolerant(it) for it in check_interventions(edits)]
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

"""Let a model answer one batch of questions under one condition: freely, or among options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.experiments.items import Item, folded
from sinkscope.experiments.sweeps.scores import answer_ids
from sinkscope.interventions.running import check_interventions, tolerant

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.outputs import Generation
    from sinkscope.models.prepare import Sample


@dataclass(frozen=True)
class Answers:
    """What a model said to a batch.

    Attributes:
        given: The answer, or the option with the highest score.
        touched: Whether the edit touched the row, in the prompt pass or later.
    """

    given: tuple[str, ...]
    touched: tuple[bool, ...]

    def correct(self, items: Sequence[Item]) -> list[bool]:
        """Whether each is the right answer, after stripping and lower case."""
        pairs = zip(self.given, items, strict=True)
        return [folded(text) == folded(item.answer) for text, item in pairs]


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

    Free answers are greedy, as long as the longest right answer of the batch. An option's score is
    the mean log-probability of its tokens after the prompt, or their sum if it is not length
    normalised; the options are forced through ``generate``, so that a prompt is a prompt and an
    option's tokens are decode steps for every edit. Options of one token cost one forward pass.
    """
    ready = [tolerant(it) for it in check_interventions(edits)]
    if not items[0].choices:
        longest = max(len(answer_ids(lvlm.tokenizer, item.answer)) for item in items)
        out = lvlm.generate(sample, [], ready, max_new_tokens=longest)
        return Answers(out.text or ("",) * len(items), _touched([out], len(items)))
    scores, passes = score_options(lvlm, sample, items, ready, length_normalized)
    best = scores.argmax(dim=1).tolist()
    given = tuple(item.choices[i] for item, i in zip(items, best, strict=True))
    return Answers(given, _touched(passes, len(items)))


def score_options(
    lvlm: LVLM,
    sample: Sample,
    items: Sequence[Item],
    edits: Sequence[Any],
    length_normalized: bool,
) -> tuple[Tensor, list[Any]]:
    """Log-probabilities of options, float ``[batch option]``, -inf where a row has fewer.

    Returns:
        The scores, and the runs or generations they came from.
    """
    tokens = [[answer_ids(lvlm.tokenizer, text) for text in item.choices] for item in items]
    many = max(len(row) for row in tokens)
    scores = torch.full((len(items), many), float("-inf"))
    if all(len(option) == 1 for row in tokens for option in row):
        run = lvlm.run(sample, [], edits, logits="last")
        logp = run.logits[:, -1].float().log_softmax(-1).cpu()
        for b, row in enumerate(tokens):
            scores[b, : len(row)] = logp[b, [option[0] for option in row]]
        return scores, [run]
    passes = []
    for i in range(many):
        forced = [row[min(i, len(row) - 1)] for row in tokens]
        logp, out = _forced(lvlm, sample, forced, edits)
        passes.append(out)
        for b, row in enumerate(tokens):
            if i < len(row):
                size = len(row[i]) if length_normalized else 1
                scores[b, i] = logp[b] / size
    return scores, passes


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
    )
    total = torch.zeros(len(forced))
    for step, run in enumerate(out.steps):
        logp = run.logits[:, -1].float().log_softmax(-1).cpu()
        inside = torch.tensor([step < len(row) for row in forced])
        total += torch.where(inside, logp.gather(1, tokens[:, step, None])[:, 0], 0.0)
    return total, out


def _touched(passes: Sequence[Any], rows: int) -> tuple[bool, ...]:
    """Which rows an edit touched in any pass; a packed tower has one row for all."""
    out = torch.zeros(rows, dtype=torch.bool)
    for one in passes:
        for run in getattr(one, "steps", (one,)):
            for effect in run.effects.values():
                touched = effect.touched
                out |= touched if len(touched) == rows else touched.any()
    return tuple(out.tolist())

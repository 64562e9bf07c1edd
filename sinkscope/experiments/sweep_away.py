"""The cells of a sweep of a model that is not here: requests of one block and as many edits as fit a pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sinkscope.data import answers
from sinkscope.data.batches import IGNORED, with_answers
from sinkscope.experiments.sweep_grid import Numbered, end_of_image
from sinkscope.experiments.sweep_images import (
    Line,
    Prompted,
    Read,
    Rules,
    answered_by,
    cells_of,
    v_sinks,
)
from sinkscope.interventions import ScaleKeys
from sinkscope.interventions.application import allowing_noop
from sinkscope.models.inputs import Sample, positions_for
from sinkscope.models.lvlm import LVLM
from sinkscope.probes import LogitLens


def sweep_away(
    lvlm: LVLM, group: Sequence[Numbered], samples: Sequence[Sample], rules: Rules, tick: Any = None
) -> tuple[list[Line], list[str]]:
    """Every cell of every question about an image, and notes, as `sweep_image` gives them.

    Nothing is resumed: every edit of a question is a row of a whole pass. What comes back of a row are the
    log-probabilities of the answers' tokens and the likeliest token of each position.
    """
    lines, notes = list[Line](), list[str]()
    for (index, item), sample in zip(group, samples, strict=True):
        end_of_image(sample)  # which refuses prompts without an image
        asked = answers.ask(lvlm.tokenizer, (sample.texts or ("",))[0], item)
        sinks = v_sinks(lvlm, sample, rules.detector, rules.merge)
        prompt = Prompted(index, asked, sample, sinks)
        prompt = prompt.with_l_sinks(lvlm, rules.l_detector, rules.cells.blocks)
        edited = Rows(lvlm, prompt)
        unedited = torch.ones(1, len(sinks))
        (base,) = answered_by([prompt], edited.read(0, unedited))
        for block in rules.cells.blocks:
            for line in cells_of([prompt], base, block, rules, edited.read):
                lines.append(line)
                if tick is not None:
                    tick(1)
        if sample.tokens.unmapped:
            notes.append(f"no V-sinks are known: {sample.tokens.unmapped}")
    return lines, notes


class Rows:
    """One question with all its feeds, as often as there are edits, in one pass each time."""

    def __init__(self, lvlm: LVLM, prompt: Prompted) -> None:
        self._lvlm, self._prompt = lvlm, prompt
        self._layer, self._made = lvlm.anatomy.language.n_layers - 1, dict[int, Sample]()

    def read(self, block: int, factors: Tensor) -> list[Read]:
        """What every edit gives, with the keys of a block times ``factors`` ``[edit pos]`` of the prompt."""
        feeds, n = self._prompt.asked.feeds, len(factors)
        sample = self._made.setdefault(n, self._sample(n))
        width = int(sample.tokens.ids.shape[1])
        ends = [width - len(feed) - 1 for feed in feeds]  # the last prompt token, by feed
        rows = [
            pad(one, (end + 1 - len(one), width - end - 1), value=1.0)
            for one in factors
            for end in ends
        ]
        scale = torch.stack(rows)
        edits = [
            allowing_noop(ScaleKeys(scale == value, value, [block]))
            for value in scale.unique().tolist()
            if value != 1.0
        ]
        reading = answers.reading_of([self._prompt.asked], ends)
        places = torch.zeros(len(feeds), width, dtype=torch.bool)
        places.scatter_(1, reading.positions, True)
        wanted = torch.where(reading.tokens == IGNORED, -1, reading.tokens)
        lens = LogitLens(places.repeat(n, 1), [self._layer], k=1, score=wanted.repeat(n, 1, 1))
        said = self._lvlm.run(sample, [lens], edits, logits="last", effects=False)[lens]
        logs, greedy = said.scores[:, 0].nan_to_num(), said.tokens[:, 0, :, 0]  # NaN: not asked for
        return list(zip(logs.split(len(feeds)), greedy.split(len(feeds)), strict=True))

    def _sample(self, n: int) -> Sample:
        """The question ``n`` times with each of its feeds behind it; what all rows share is sent once."""
        lvlm, item, feeds = self._lvlm, self._prompt.asked.item, [*self._prompt.asked.feeds] * n
        many = len(feeds)
        plain = lvlm.prepare(images=[item.image] * many, text=[item.question] * many)
        inputs = positions_for(
            lvlm.module, with_answers(plain.inputs, feeds, lvlm.tokenizer.pad_token_id or 0)[0]
        )
        for name, value in inputs.items():
            if name.startswith("pixel") and len(value) == many and bool((value == value[:1]).all()):
                inputs[name] = value[:1].clone().expand_as(value)
        return lvlm.prepare(inputs=inputs)

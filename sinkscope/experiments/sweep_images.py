"""All cells for the questions about one image, with everything reused that an edit cannot change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sinkscope.anatomy.context import Context
from sinkscope.data import answers
from sinkscope.data.answers import Answered, Asked, Score
from sinkscope.data.batches import TokenScores, extend
from sinkscope.detectors import Detector, NoSinks
from sinkscope.detectors.detection import detect, visual_tokens
from sinkscope.detectors.rules import STATE_SITE, decide
from sinkscope.experiments.measuring import carry
from sinkscope.experiments.sweep_grid import Cells, Numbered, Pair, end_of_image, words_of
from sinkscope.kernels.walk import brought, detached, resolve
from sinkscope.models import LVLM, Sample
from sinkscope.models.decoder import Given, decoder_inputs
from sinkscope.models.prefix import capture_branches, resume_stem, resume_tails, why_not_shared
from sinkscope.models.replay import capture, logits_at, resume
from sinkscope.models.wrapping import on_device

T = TypeVar("T")
Line = dict[str, Any]
Read = tuple[Tensor, Tensor]  # log-probabilities and greedy tokens of some rows, on the device
TAILS_PER_EDIT = 4  # that many take about the memory of one whole prompt: endings are short


class Batch:
    """How many edits run as rows of one pass; ``"auto"``: ``most``, halved when memory runs out."""

    def __init__(self, size: int | str, most: int) -> None:
        self.fixed = size != "auto"
        self.size = int(size) if self.fixed else most

    def chunks(self, n: int, work: Callable[[int, int], list[T]]) -> list[T]:
        """What ``work(start, stop)``, a list of ``stop - start``, gives for all of ``0 .. n``, in order."""
        done: list[T] = []
        while len(done) < n:
            try:
                done += work(len(done), min(n, len(done) + self.size))
            except torch.OutOfMemoryError:
                if self.fixed or self.size == 1:
                    raise
                self.size //= 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        return done


def edits_of(
    sinks: Tensor, visual: Tensor, pairs: Sequence[Pair], low: Tensor | None = None
) -> tuple[Tensor, list[int]]:
    """Different factors of keys, float ``[edit pos]``, and the edit of every pair, -1 where all are 1.

    Masks are bool ``[pos]``; ``low`` are L-sinks that are no V-sinks, with triples only.
    """
    values = torch.tensor(pairs)
    image = torch.where(sinks, values[:, :1], values[:, -1:])
    if low is not None:
        image = torch.where(low, values[:, 1:2], image)
    factors = torch.where(visual, image, 1.0)
    keys = [row.numpy().tobytes() if (row != 1).any() else b"" for row in factors]
    known = [key for key in dict.fromkeys(keys) if key]
    return factors[list(map(keys.index, known))], [known.index(key) if key else -1 for key in keys]


@dataclass(frozen=True)
class Rules:
    """What is the same for every image."""

    cells: Cells
    score: Score
    detector: Detector
    merge: str
    batch: Batch
    l_detector: Detector | None = None  # with triples only


@dataclass(frozen=True, eq=False)
class Prompted:
    """One question, prepared: its number, options, prompt and sinks."""

    index: int
    asked: Asked
    sample: Sample
    sinks: Tensor  # V-sinks, bool [pos]
    # Edited block -> L-sinks that are no V-sinks, bool [pos]; empty with pairs.
    low: Mapping[int, Tensor] = field(default_factory=dict)

    def with_l_sinks(
        self,
        lvlm: LVLM,
        rule: Detector | None,
        blocks: Sequence[int],
        states: Mapping[int, Tensor] | None = None,
    ) -> Prompted:
        """The same with its L-sinks in the edited blocks, from what these read, ``[1 pos d_model]``.

        Without states, and for a rule that looks at anything else, such as attention, there is one more pass.
        """
        if rule is None:
            return self
        anatomy = lvlm.anatomy.language
        visual, live = visual_tokens(self.sample, "language")
        context, told = Context(lvlm.anatomy, self.sample.tokens), {}
        probe = rule.probe("language", blocks, anatomy)
        reads = probe.reads(context)
        own = {("language", STATE_SITE["language"], block) for block in blocks}
        there = {(read.site.tower, read.site.name, read.site.layer) for read in reads}
        if states is not None and there <= own:
            for read in reads:
                state = states[read.site.layer][:, : self.last + 1]
                given = resolve(None, read.parameters, state.device, {})
                told[read.site] = detached(read.kernel(state, {}, **given))
            answers: Any = brought(told)
            result = probe.finish(answers, context)
            mask = decide(rule, result, visual, live, "language", anatomy).mask[0]
        else:
            mask = detect(lvlm, self.sample, rule, layers=blocks).mask[0]
        low = mask & visual[0] & ~self.sinks
        return replace(self, low=dict(zip(blocks, low, strict=True)))

    @property
    def visual(self) -> Tensor:
        """Image tokens, bool ``[pos]``."""
        return self.sample.tokens.image[0] >= 0

    @property
    def last(self) -> int:
        """The last prompt token."""
        return int(self.sample.tokens.ids.shape[1]) - 1


def v_sinks(lvlm: LVLM, sample: Sample, detector: Detector, merge: str) -> Tensor:
    """V-sinks of the only row at their LLM positions, bool ``[pos]``."""
    if isinstance(detector, NoSinks):
        return torch.zeros_like(sample.tokens.live[0])
    feeds = lvlm.anatomy.reaching
    found = detect(lvlm, sample, detector, tower="vision", layers=feeds)
    return carry(sample, found, list(range(len(feeds))), merge)[0]


@torch.no_grad()
def sweep_image(
    lvlm: LVLM,
    group: Sequence[Numbered],
    samples: Sequence[Sample],
    rules: Rules,
    tick: Callable[[int], Any] | None = None,
) -> tuple[list[Line], list[str]]:
    """Every cell of every question about an image, and notes; ``tick`` is told how many are done."""
    first, end = samples[0].tokens, end_of_image(samples[0])
    sinks = v_sinks(lvlm, samples[0], rules.detector, rules.merge)
    givens: list[Given] = []
    prompts: list[Prompted] = []
    features = None
    pixels = {k: v for k, v in samples[0].inputs.items() if k.startswith("pixel")}
    pixels = on_device(pixels, lvlm.device)  # all these questions are about them
    for (index, item), sample in zip(group, samples, strict=True):
        asked = answers.ask(lvlm.tokenizer, (sample.texts or ("",))[0], item)
        for feed in asked.feeds:
            inputs = extend(sample.inputs, feed) | pixels
            given, features = decoder_inputs(lvlm, inputs, features)
            givens.append(given)
        alike = torch.equal(sample.tokens.ids[0, :end], first.ids[0, :end])
        own = sinks[:end] if alike else v_sinks(lvlm, sample, rules.detector, rules.merge)
        own = pad(own, (0, sample.tokens.ids.shape[1] - len(own)))
        prompts.append(Prompted(index, asked, sample, own))
    reason, notes = why_not_shared(givens, end) if len(givens) > 1 else "", []
    if reason is None:
        found = _shared(lvlm, prompts, givens, end, rules)
    else:
        found = _alone(lvlm, prompts, givens, rules)
    if reason:
        about = group[0][1].image_id
        notes = [f"nothing was shared by the questions about {about!r}: {reason}"]
    if first.unmapped:
        notes.append(f"no V-sinks are known: {first.unmapped}")
    lines = []
    for line in found:
        lines.append(line)
        if tick is not None:
            tick(1)
    return lines, notes


def _read(captured: Any, reading: Any, hidden: Tensor, rows: Tensor) -> Read:
    """Log-probabilities and greedy tokens of the rows of ``hidden``, the feeds ``rows`` of a reading."""
    logits = logits_at(captured, hidden, reading.positions[rows])
    found = TokenScores.of(logits, reading.tokens[rows])
    return found.logprobs, found.greedy


def _each(reads: Sequence[Read], many: int) -> list[Read]:
    """The readings of ``many`` rows each, of those of some rows after others."""
    logs, greedy = (torch.cat(side).split(many) for side in zip(*reads, strict=True))
    return list(zip(logs, greedy, strict=True))


def _alone(
    lvlm: LVLM, prompts: Sequence[Prompted], givens: Sequence[Given], rules: Rules
) -> Iterator[Line]:
    """Questions that share nothing: each feed of each question is one row."""
    rest = iter(givens)
    for prompt in prompts:
        seen = [capture(lvlm, next(rest), rules.cells.blocks) for _ in prompt.asked.feeds]
        reading = answers.reading_of([prompt.asked], [prompt.last] * len(seen))
        prompt = prompt.with_l_sinks(lvlm, rules.l_detector, rules.cells.blocks, seen[0].states)

        def run(block: int, factors: Tensor, seen: Any = seen, reading: Any = reading) -> Any:
            by_row = []
            for row, captured in enumerate(seen):
                scale = pad(factors, (0, captured.hidden.shape[1] - factors.shape[1]), value=1.0)
                hidden = resume(captured, block, scale, rows=[0] * len(factors))
                rows = torch.full((len(hidden),), row)
                by_row.append(_each([_read(captured, reading, hidden, rows)], 1))
            return [_each(reads, len(seen))[0] for reads in zip(*by_row, strict=True)]

        plain = [_read(x, reading, x.hidden, torch.tensor([i])) for i, x in enumerate(seen)]
        (base,) = answered_by([prompt], _each(plain, len(plain)))
        for block in rules.cells.blocks:
            yield from cells_of([prompt], base, block, rules, run)


def _shared(
    lvlm: LVLM, prompts: Sequence[Prompted], givens: Sequence[Given], end: int, rules: Rules
) -> Iterator[Line]:
    """Questions that begin alike: the beginning runs once per layer and edit."""
    lasts = [prompt.last - end for prompt in prompts for _ in prompt.asked.feeds]
    reading = answers.reading_of([prompt.asked for prompt in prompts], lasts)
    seen = capture_branches(lvlm, givens, end, rules.cells.blocks)
    every = torch.arange(len(givens))
    rows = every.split([len(prompt.asked.feeds) for prompt in prompts])
    if (low := rules.l_detector) is not None:
        stems, ends, found = seen.stem.states, seen.tails.states, []
        for prompt, own in zip(prompts, rows, strict=True):  # padding of the ending included
            one = slice(int(own[0]), int(own[0]) + 1)
            states = {at: torch.cat([x, ends[at][one]], dim=1) for at, x in stems.items()}
            found.append(prompt.with_l_sinks(lvlm, low, rules.cells.blocks, states))
        prompts = found

    def run(block: int, factors: Tensor, own: Tensor) -> list[Read]:
        past = resume_stem(seen, block, factors)
        edits = torch.arange(len(factors)).repeat_interleave(len(own))
        step, parts = TAILS_PER_EDIT * rules.batch.size, []
        for some in zip(edits.split(step), own.repeat(len(factors)).split(step), strict=True):
            hidden = resume_tails(seen, block, factors, past, *some)
            parts.append(_read(seen.tails, reading, hidden, some[1]))
        return _each(parts, len(own))

    (base,) = answered_by(prompts, [_read(seen.tails, reading, seen.tails.hidden, every)])
    for block in rules.cells.blocks:
        alike: dict[tuple[int, ...], list[int]] = {}  # prompts by their L-sinks at this block
        for i, prompt in enumerate(prompts):
            places = prompt.low[block].nonzero().flatten().tolist() if prompt.low else []
            alike.setdefault(tuple(places), []).append(i)
        for group in alike.values():
            some, plain = [prompts[i] for i in group], [base[i] for i in group]
            work = partial(run, own=torch.cat([rows[i] for i in group]))
            yield from cells_of(some, plain, block, rules, work, end)


def answered_by(prompts: Sequence[Prompted], reads: Sequence[Read]) -> list[list[Answered]]:
    """Answers by edit, one reading each, and prompt; all readings leave the device here, at once."""
    if not reads:
        return []
    logs, greedy = (iter(torch.cat(side).tolist()) for side in zip(*reads, strict=True))

    def one(asked: Asked) -> Answered:
        rows = ([next(side) for _ in asked.feeds] for side in (logs, greedy))
        return answers.answered(asked, *rows)

    return [[one(prompt.asked) for prompt in prompts] for _ in reads]


def cells_of(
    prompts: Sequence[Prompted],
    base: Sequence[Answered],
    block: int,
    rules: Rules,
    run: Callable[[int, Tensor], list[Read]],
    end: int | None = None,
) -> Iterator[Line]:
    """One line per question and pair; ``run`` gives the readings of all rows by edit."""
    first, pairs = prompts[0], rules.cells.pairs
    edits, edit_of = edits_of(first.sinks, first.visual, pairs, first.low.get(block))
    reads = rules.batch.chunks(len(edits), lambda i, j: run(block, edits[i:j, :end]))
    edited = answered_by(prompts, reads)
    layer, unedited = "embed" if block == 0 else block - 1, "the base, without an edit"
    for i, prompt in enumerate(prompts):
        item, plain = prompt.asked.item, base[i]
        answers.check_finite(item, plain, unedited, edited=False)
        n_v, n_l = int(prompt.sinks.sum()), int(prompt.low[block].sum()) if prompt.low else 0
        sizes = {"n_v": n_v, "n_l": n_l, "n_rest": int(prompt.visual.sum()) - n_v - n_l}
        asked = {"item": prompt.index, "image_id": item.image_id, "task": item.task}
        asked |= {"layer": block - 1, "edited": block, **sizes}
        for place, (pair, edit) in enumerate(zip(pairs, edit_of, strict=True)):
            after = plain if edit < 0 else edited[edit][i]
            where = f"layer {layer}, {words_of(pair)}"
            answers.check_finite(item, after, where, edited=True)
            s_l = pair[1] if prompt.low else None
            line = asked | {"pair": place, "s_v": pair[0], "s_l": s_l, "s_rest": pair[-1]}
            for name, one, told in (("", after, where), ("base_", plain, unedited)):
                line[f"{name}score"] = answers.scored(rules.score, item, one, told)
                line[f"{name}logprob"] = one.logprob
            yield line

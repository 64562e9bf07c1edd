"""compare: what interventions do to a model's answers, per task, paired and with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from sinkscope.checks import check_flags, check_whole
from sinkscope.errors import InputError
from sinkscope.experiments.answering import Answers, answer_batch
from sinkscope.experiments.comparison import Comparison
from sinkscope.experiments.items import Item, as_items, check_tasks
from sinkscope.experiments.trace import SinkTrace, trace_sinks
from sinkscope.experiments.variants import (
    Applied,
    Condition,
    Control,
    PerSeed,
    Variant,
    as_variants,
)
from sinkscope.models.prompts import check_questions

if TYPE_CHECKING:
    from sinkscope.detectors.rules import Detector
    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.prepare import Sample

Row = tuple[int, Item]


def compare(
    lvlm: LVLM,
    dataset: Iterable[Any],
    conditions: Mapping[str, Condition | PerSeed],
    *,
    v_detector: Detector | None = None,
    l_detector: Detector | None = None,
    batch: int = 16,
    length_normalized: bool = True,
    progress: bool | None = None,
) -> Comparison:
    """Answer every question under every condition.

    Args:
        lvlm: The model.
        dataset: Records with ``image``, ``question``, ``answer`` and, if you like, ``task``,
            ``image_id`` and ``choices``: dicts or `Item`. Questions about one image should stand
            together. Without tasks there is one group, ``"all"``.
        conditions: Name -> condition; the first is the base, usually ``[]``. A condition is a list of
            interventions, gates among them; a function that gets the `SinkTrace` of a batch and
            gives them; one of `sinkscope.experiments.baselines`; an object whose ``apply(lvlm)`` is
            the block in which the condition holds; or `per_seed` of those. Rows in which nothing was
            edited are answered as they are and counted in ``touched``.
        v_detector: For the traces; see `trace_sinks`. Calibrate on other images than these. Gates
            have a rule of their own.
        l_detector: Likewise.
        batch: The most questions per forward pass; a batch holds questions about one image.
        length_normalized: Whether the score of an option is the mean log-probability of its tokens
            (as in `sweep`), or their sum.
        progress: Whether to show a progress bar; None shows it from 50 questions on.

    Returns:
        The comparison. A free answer is cut to as many tokens as the right one has, tokenised
        as it follows the prompt. It counts if these are the tokens of the right answer, as in `sweep` with
        ``score="exact"``, or begin with the same text after stripping and lower case; what would follow is not
        looked at. Of ``choices`` the one with the highest score is the answer; options are tokenised
        likewise.

    Raises:
        InputError: If the dataset or the conditions are empty or malformed.
    """
    import pandas as pd

    check_flags(length_normalized=length_normalized)
    check_whole(1, batch=batch)
    if lvlm.tokenizer is None:
        raise InputError("Got an LVLM without a processor; expected one, to read answers.")
    variants, items = as_variants(conditions), as_items(dataset)
    check_tasks(items)
    check_questions(lvlm.processor, items)
    rules = {"v_detector": v_detector, "l_detector": l_detector}
    hidden = len(items) < 50 if progress is None else not progress
    lines: list[dict[str, Any]] = []
    with tqdm(total=len(items), desc="comparing", unit="question", disable=hidden) as bar:
        for part in _batches(items, batch):
            lines.extend(_answer(lvlm, part, variants, rules, length_normalized))
            bar.update(len(part))
    return Comparison(pd.DataFrame(lines), variants[0].name)


def _batches(items: Sequence[Item], batch: int) -> Iterable[list[Row]]:
    """Questions about one image, free and multiple-choice ones apart."""
    pairs = enumerate(items)
    for _, group in groupby(pairs, key=lambda row: (row[1].image_id, bool(row[1].choices))):
        rows = list(group)
        for start in range(0, len(rows), batch):
            yield rows[start : start + batch]


def _answer(
    lvlm: LVLM, rows: list[Row], variants: Sequence[Variant], rules: dict, length_normalized: bool
) -> list[dict[str, Any]]:
    """One batch under every condition; one trace at most, and unedited answers once at most."""
    items = [item for _, item in rows]
    sample = lvlm.prepare(images=[i.image for i in items], text=[i.question for i in items])
    trace: Any = None
    if any(variant.needs_trace for variant in variants):
        trace = trace_sinks(lvlm, sample, **rules)
    out: list[dict[str, Any]] = []
    plain: Any = None
    for variant in variants:
        edits = _edits(variant, trace)
        if edits or isinstance(variant.condition, Applied):
            answers = _under(lvlm, sample, items, variant.condition, edits, length_normalized)
        else:  # what the model says without an edit is the same every time
            plain = plain or answer_batch(
                lvlm, sample, items, [], length_normalized=length_normalized
            )
            answers = plain
        out += _lines(rows, variant, answers, trace if variant.needs_trace else None)
    return out


def _edits(variant: Variant, trace: Any) -> Sequence[Any]:
    """The interventions of a condition for the batch; none for one that is applied as a whole."""
    condition: Any = variant.condition
    if isinstance(condition, Applied):
        return []
    edits = condition(trace) if variant.needs_trace else condition
    if edits is None:
        raise InputError(
            f"The condition {variant.name!r} gave None for a batch; expected a list of interventions, [] "
            "for no edit. Does its function end without a return?"
        )
    return edits


def _under(
    lvlm: LVLM,
    sample: Sample,
    items: Sequence[Item],
    condition: Any,
    edits: Sequence[Any],
    length_normalized: bool,
) -> Answers:
    """Answers with edits, or inside the block of an applied condition, which touches every row."""
    whole = isinstance(condition, Applied)
    with condition.apply(lvlm) if whole else nullcontext():
        answers = answer_batch(lvlm, sample, items, edits, length_normalized=length_normalized)
    return replace(answers, touched=(True,) * len(items)) if whole else answers


def _lines(
    rows: list[Row], variant: Variant, answers: Answers, trace: SinkTrace | None
) -> list[dict[str, Any]]:
    """The lines of the table for one batch and condition."""
    sinks = [float("nan")] * len(rows)
    if trace is not None:
        sinks = [float(n) for n in (trace.v_sinks | trace.l_sinks().any(dim=1)).sum(dim=1)]
    uncontrolled = [False] * len(rows)
    if trace is not None and isinstance(variant.condition, Control):
        uncontrolled = variant.condition.uncontrolled(trace).tolist()
    return [
        {
            "item": index,
            "image_id": item.image_id,
            "task": item.task,
            "question": item.question,
            "answer": item.answer,
            "condition": variant.name,
            "seed": variant.seed,
            "given": given,
            "correct": right,
            "touched": touched,
            "sinks": found,
            "uncontrolled": without,
        }
        for (index, item), given, right, touched, found, without in zip(
            rows,
            answers.given,
            answers.correct,
            answers.touched,
            sinks,
            uncontrolled,
            strict=True,
        )
    ]

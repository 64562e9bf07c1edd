"""Comparison: answers under every condition, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.checks import check_flags, check_whole
from sinkscope.data.answers import Answers, answer_batch
from sinkscope.data.items import Item, as_items, check_tasks
from sinkscope.errors import InputError
from sinkscope.experiments.statistics import cluster_bootstrap
from sinkscope.experiments.tracing import SinkTrace, trace_sinks
from sinkscope.interventions.application import check_interventions
from sinkscope.models.prompts import check_questions
from sinkscope.protocols import Intervention
from sinkscope.results import Result
from sinkscope.viz.effects import count_comparisons

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from sinkscope.detectors.rules import Detector
    from sinkscope.models.inputs import Sample
    from sinkscope.models.lvlm import LVLM

ALL = "all"


@dataclass(frozen=True, eq=False)
class Comparison(Result):
    """Answers under every condition.

    Attributes:
        table: One line per question, condition and seed: item, image_id, task, question, answer,
            condition, seed, given, correct, touched (whether the edit touched that row), sinks (how many
            visual sinks the trace found in the row; NaN for conditions without a trace) and
            uncontrolled (whether random tokens were to be edited and there were too few of them).
        base: The condition that others are compared with.
    """

    table: pd.DataFrame
    base: str

    @property
    def conditions(self) -> tuple[str, ...]:
        """All but the base, in order."""
        return tuple(c for c in self.table["condition"].unique() if c != self.base)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of `summary`, ``"all"`` last."""
        own = [task for task in self.table["task"].unique() if task != ALL]
        return (*own, ALL)

    @property
    def comparisons(self) -> int:
        """How many differences to the base `summary` reports (see `count_comparisons`).

        As many intervals are looked at, uncorrected: of 20 that cover 95 %, one excludes zero by
        chance. ``summary(level=1 - 0.05 / comparison.comparisons)`` is Bonferroni's correction.
        """
        groups = self._by_task().groupby(["task", "condition"], sort=False, as_index=False)
        return count_comparisons(groups.agg({"touched": "mean"}), self.base)

    def summary(
        self, *, level: float = 0.95, draws: int = 2000, seed: int = 0, touched_only: bool = False
    ) -> pd.DataFrame:
        """Accuracy and paired difference to the base, per task, with intervals.

        Images are resampled with all their questions. A condition of several seeds is their mean,
        and its interval resamples images and seeds (see `cluster_bootstrap`).

        Args:
            level: Coverage of the intervals.
            draws: Bootstrap samples.
            seed: Of the draws.
            touched_only: Whether to judge each condition on the questions it touched only, instead
                of all of them.

        Returns:
            Columns task, condition, n, images, seeds, touched, uncontrolled (both shares of the
            questions), accuracy, low, high, delta, delta_low, delta_high, changed (the share of
            answers that turned right or wrong), seed_sd (standard deviation of the accuracy over
            seeds; NaN for one). Task ``"all"`` holds every question. ``attrs["comparisons"]`` is how
            many differences it holds.
        """
        check_bootstrap(level, draws)
        import pandas as pd

        whole = self._by_task()
        options = {"level": level, "draws": draws, "seed": seed}
        lines = []
        for names, group in whole.groupby(["task", "condition"], sort=False):
            task, condition = cast("tuple[str, str]", names)
            part = group
            if touched_only and condition != self.base:
                part = part.loc[part["touched"].astype(bool)]
            of_base = whole.loc[(whole["task"] == task) & (whole["condition"] == self.base)]
            lines.append({"task": task, "condition": condition, **_line(part, of_base, options)})
        out = pd.DataFrame(lines)
        out.attrs["comparisons"] = count_comparisons(out, self.base)
        out.attrs["level"] = level
        return out

    def to_dataframe(self) -> pd.DataFrame:
        """One line per question, condition and seed: a copy of `table`."""
        return self.table.copy()

    def to_markdown(self, **options: Any) -> str:
        """The summary as a Markdown table, conditions down and tasks across.

        Args:
            options: Of `summary`.
        """
        from sinkscope.viz.effects import comparison_markdown

        return comparison_markdown(self.summary(**options), base=self.base)

    def to_latex(self, **options: Any) -> str:
        """The same as a LaTeX ``tabular``, with a note about the number of comparisons under it.

        Args:
            options: Of `summary`.
        """
        from sinkscope.viz.effects import comparison_latex

        return comparison_latex(self.summary(**options), base=self.base)

    def plot(self, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Figure:
        """The change of accuracy per task and condition, with intervals.

        Args:
            level: See `summary`.
            draws: See `summary`.
            seed: See `summary`.

        Returns:
            A matplotlib figure.
        """
        from sinkscope.viz.effects import plot_effects

        return plot_effects(self.summary(level=level, draws=draws, seed=seed), base=self.base)

    def _by_task(self) -> pd.DataFrame:
        """The table once per task, and once more as ``"all"`` if there are several tasks."""
        import pandas as pd

        table = self.table if "seed" in self.table else self.table.assign(seed=0)
        wide = table.assign(task=ALL)
        several = [t for t in self.tasks if t != ALL]
        named = table.loc[table["task"] != ALL]  # those without a task are in "all" alone
        return pd.concat([named, wide], ignore_index=True) if len(several) > 1 else wide


def check_bootstrap(level: Any, draws: Any) -> None:
    """Refuse a coverage outside 0 to 1 and a number of draws below 1.

    Raises:
        InputError: If so.
    """
    if isinstance(level, bool) or not isinstance(level, Real) or not 0 < float(level) < 1:
        raise InputError(f"Got level={level!r}; expected a coverage between 0 and 1, such as 0.95.")
    if isinstance(draws, bool) or not isinstance(draws, Integral) or int(draws) < 1:
        raise InputError(f"Got draws={draws!r}; expected bootstrap samples, 1 or more. Write 2000.")


def _line(part: pd.DataFrame, of_base: pd.DataFrame, options: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one task and condition."""
    paired = part.merge(of_base[["item", "correct"]], on="item", suffixes=("", "_base"))
    right = paired["correct"].astype(float)
    change = right - paired["correct_base"].astype(float)
    images, seeds = paired["image_id"].tolist(), paired["seed"].tolist()
    accuracy = cluster_bootstrap(right.tolist(), images, seeds, **options)
    delta = cluster_bootstrap(change.tolist(), images, seeds, **options)
    return {
        "n": part["item"].nunique(),
        "images": part["image_id"].nunique(),
        "seeds": part["seed"].nunique(),
        "touched": part["touched"].mean() if len(part) else 0.0,
        "uncontrolled": part["uncontrolled"].mean()
        if "uncontrolled" in part and len(part)
        else 0.0,
        **dict(zip(("accuracy", "low", "high"), accuracy, strict=True)),
        **dict(zip(("delta", "delta_low", "delta_high"), delta, strict=True)),
        "changed": float((change.dropna() != 0).mean()) if len(change) else 0.0,
        "seed_sd": right.groupby(paired["seed"]).mean().std(),
    }


@runtime_checkable
class Applied(Protocol):
    """A condition that holds inside a ``with`` block, such as weights with an adapter in them."""

    def apply(self, lvlm: LVLM) -> AbstractContextManager[Any]:
        """The block in which the model answers under the condition."""
        ...


@runtime_checkable
class Control(Protocol):
    """A condition on random tokens, which knows for which rows it has too few to draw from."""

    def uncontrolled(self, trace: SinkTrace) -> Tensor:
        """Bool ``[batch]``: rows that are left unedited for that reason."""
        ...


Condition = Sequence[Any] | Callable[[SinkTrace], Sequence[Any]] | Applied


@dataclass(frozen=True)
class PerSeed:
    """One condition per seed, reported together; made by `per_seed`.

    Attributes:
        seeds: The condition of every seed, in order.
    """

    seeds: tuple[Condition, ...]


def per_seed(*conditions: Condition) -> PerSeed:
    """Conditions that differ in nothing but their seed, to be reported as one, over seeds.

    ::

        ss.compare(lvlm, questions, {"base": [], "gate": per_seed([gate_0], [gate_1], [gate_2])})

    Args:
        conditions: One per seed: of a gate's training, or of a random draw.

    Raises:
        InputError: If there is none.
    """
    if not conditions:
        raise InputError("Got per_seed() without a condition; expected one per seed.")
    return PerSeed(conditions)


@dataclass(frozen=True)
class Variant:
    """One condition of one seed.

    Attributes:
        name: The condition's name.
        seed: 0, 1, ... among those of that name.
        condition: The condition.
    """

    name: str
    seed: int
    condition: Condition

    @property
    def needs_trace(self) -> bool:
        """Whether it is a function of a trace."""
        return not isinstance(self.condition, Applied) and callable(self.condition)


def as_variants(conditions: Any) -> list[Variant]:
    """Conditions as a flat list; the first is the base.

    Raises:
        InputError: If they are no dict, there is none, or one is of no known kind.
        InterventionError: If a list holds something else than interventions.
    """
    if not isinstance(conditions, Mapping) or not conditions:
        raise InputError(
            f"Got conditions={conditions!r}; expected a dict such as {{'base': [], 'masked': "
            "lambda trace: [ss.MaskKeys(trace.v_sinks)]}."
        )
    out = []
    for name, given in conditions.items():
        several = given.seeds if isinstance(given, PerSeed) else (given,)
        out += [Variant(str(name), i, _checked(str(name), one)) for i, one in enumerate(several)]
    base = next(iter(conditions.values()))
    if isinstance(base, PerSeed) and len(base.seeds) > 1:
        raise InputError(
            "Got several seeds for the base; expected one condition that the others are compared "
            "with. Write {'base': [], ...} first."
        )
    return out


def _checked(name: str, condition: Any) -> Any:
    """A condition of a known kind."""
    if isinstance(condition, type):
        raise InputError(
            f"Got the class {condition.__name__} as condition {name!r}; expected an object. Write "
            f"{condition.__name__}(...)."
        )
    if isinstance(condition, Intervention):
        raise InputError(
            f"Got one {type(condition).__name__} as condition {name!r}; expected a list of "
            f"interventions. Write {{{name!r}: [it]}}."
        )
    if isinstance(condition, Applied) or callable(condition):
        return condition
    if isinstance(condition, Iterable) and not isinstance(condition, (str, Mapping)):
        return check_interventions(condition)
    raise InputError(
        f"Got {condition!r} as condition {name!r}; expected a list of interventions, a function of a "
        "SinkTrace, one of ss.baselines, or per_seed(...) of those."
    )


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

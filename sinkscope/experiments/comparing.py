"""compare: the same questions answered under every condition, with paired intervals."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Protocol, cast, runtime_checkable

import pandas as pd
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from sinkscope.checks import check_whole, typed
from sinkscope.data.answers import answer_batch
from sinkscope.data.batches import batches_of
from sinkscope.data.items import ALL, Item, as_items, check_tasks
from sinkscope.detectors.detection import Detector, check_rules
from sinkscope.errors import InputError
from sinkscope.experiments.sink_edits import EditSinks
from sinkscope.experiments.statistics import cluster_bootstrap
from sinkscope.experiments.tracing import SinkTrace, trace_sinks
from sinkscope.interventions.application import check_interventions
from sinkscope.models.inputs import Sample
from sinkscope.models.lvlm import LVLM
from sinkscope.models.prompts import check_questions
from sinkscope.protocols import Intervention
from sinkscope.results import Result
from sinkscope.scale.engine import Prepared, Ray, check_engine, each_part
from sinkscope.viz import effects


@dataclass(frozen=True, eq=False)
class Comparison(Result):
    """Answers under every condition, compared with those under ``base``.

    ``table`` has one line per question, condition and seed: item, image_id, task, question, answer,
    condition, seed, given, correct (or a score from 0 to 1), touched (by the edit), sinks (visual ones of
    the row; NaN without a trace) and uncontrolled (whether there were too few random tokens to edit).
    """

    table: pd.DataFrame
    base: str

    @property
    def conditions(self) -> tuple[str, ...]:
        """All but the base, in order."""
        return tuple(c for c in self.table["condition"].unique() if c != self.base)

    @property
    def comparisons(self) -> int:
        """How many differences `estimates` reports; ``level=1 - 0.05 / it`` is Bonferroni's."""
        return self.estimates(draws=1).attrs["comparisons"]

    def estimates(
        self, *, level: float = 0.95, draws: int = 2000, seed: int = 0, touched_only: bool = False
    ) -> pd.DataFrame:
        """Estimate accuracy and paired difference to the base, per task, with intervals of ``level``.

        Intervals resample images with all their questions, and seeds (see `cluster_bootstrap`).
        ``touched_only`` judges each condition on the questions it touched only.

        Columns are task, condition, n, images, seeds, touched, uncontrolled (shares of the questions),
        accuracy, low, high, delta, delta_low, delta_high, changed (share of answers that turned right or
        wrong) and seed_sd (of the accuracy over seeds; NaN for one). Task ``"all"`` holds every question;
        ``attrs["comparisons"]`` is how many differences there are.
        """
        given = {"seed": 0, "uncontrolled": False}
        table = self.table.assign(**{k: v for k, v in given.items() if k not in self.table})
        named = table.loc[table["task"] != ALL]  # those without a task are in "all" alone
        parts = [named] if named["task"].nunique() > 1 else []
        whole = pd.concat([*parts, table.assign(task=ALL)], ignore_index=True)
        options, lines = {"level": level, "draws": draws, "seed": seed}, []
        for names, part in whole.groupby(["task", "condition"], sort=False):
            task, condition = cast("tuple[str, str]", names)
            if touched_only and condition != self.base:
                part = part.loc[part["touched"].astype(bool)]
            of_base = whole.loc[(whole["task"] == task) & (whole["condition"] == self.base)]
            lines.append({"task": task, "condition": condition, **_line(part, of_base, options)})
        out = pd.DataFrame(lines)
        out.attrs |= {"comparisons": effects.count_comparisons(out, self.base), "level": level}
        return out

    def summary(self, **options: Any) -> str:
        """Write `estimates` as text for a terminal, with the options of `estimates`."""
        table = self.estimates(**options)
        if not self.conditions:
            return table.to_string(index=False, float_format="%.3f")
        return effects.effects_text(table, base=self.base)

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of `table`."""
        return self.table.copy()

    def to_markdown(self, **options: Any) -> str:
        """Write `estimates` as a Markdown table, conditions down and tasks across."""
        return effects.comparison_markdown(self.estimates(**options), base=self.base)

    def to_latex(self, **options: Any) -> str:
        """Write the same as a LaTeX ``tabular``, with a note about the number of comparisons."""
        return effects.comparison_latex(self.estimates(**options), base=self.base)

    def plot(self, **options: Any) -> Figure:
        """Draw the change of accuracy per task and condition, with intervals."""
        return effects.plot_effects(self.estimates(**options), base=self.base)


def _line(part: pd.DataFrame, of_base: pd.DataFrame, options: dict[str, Any]) -> dict[str, Any]:
    paired = part.merge(of_base[["item", "correct"]], on="item", suffixes=("", "_base"))
    right = paired["correct"].astype(float)
    change = right - paired["correct_base"].astype(float)
    clusters = paired["image_id"].tolist(), paired["seed"].tolist()
    accuracy, delta = (cluster_bootstrap(x.tolist(), *clusters, **options) for x in (right, change))
    of = {"n": "item", "images": "image_id", "seeds": "seed"}
    line: dict[str, Any] = {name: part[column].nunique() for name, column in of.items()}
    line |= {x: part[x].mean() if len(part) else 0.0 for x in ("touched", "uncontrolled")}
    names = ("accuracy", "low", "high", "delta", "delta_low", "delta_high")
    line |= zip(names, (*accuracy, *delta), strict=True)
    line["changed"] = float((change.dropna() != 0).mean()) if len(change) else 0.0
    return line | {"seed_sd": right.groupby(paired["seed"]).mean().std()}


@runtime_checkable
class Applied(Protocol):
    """A condition that holds inside a ``with`` block, such as weights with an adapter in them."""

    def apply(self, lvlm: LVLM) -> AbstractContextManager[Any]:
        """Enter the condition, and leave it when the block ends."""
        ...


Condition = Sequence[Any] | Callable[[SinkTrace], Sequence[Any]] | Applied
Variant = tuple[str, int, Any]  # name, number of the seed among those of that name, condition


@dataclass(frozen=True)
class PerSeed:
    """The condition of every seed, in order, reported together; made by `per_seed`."""

    seeds: tuple[Condition, ...]


@typed
def per_seed(*conditions: Condition) -> PerSeed:
    """Report conditions that differ in nothing but their seed as one: ``per_seed([gate_0], [gate_1])``."""
    if not conditions:
        raise InputError("Got per_seed() without a condition; expected one per seed.")
    return PerSeed(conditions)


@dataclass(frozen=True)
class Settled:
    """A condition on one batch; see `settle`."""

    edits: Sequence[Any]
    block: AbstractContextManager[Any]
    whole: bool  # whether the block holds it, and no edit
    sinks: Sequence[float]  # of every row; NaN without a trace
    uncontrolled: Sequence[bool]


def needs_trace(condition: Any) -> bool:
    """Whether a condition is a function of a `SinkTrace`."""
    return callable(condition) and not isinstance(condition, Applied)


def settle(lvlm: LVLM, name: str, condition: Any, trace: Any, rows: int) -> Settled:
    """What a condition is on a batch of some rows, with their trace if it `needs_trace`."""
    edits: Any = condition
    sinks, uncontrolled = [float("nan")] * rows, [False] * rows
    if isinstance(condition, Applied):
        return Settled([], condition.apply(lvlm), True, sinks, uncontrolled)
    if callable(condition):
        edits = condition(trace)
        sinks = (trace.v_sinks | trace.l_sinks().any(dim=1)).sum(dim=1).double().tolist()
        if isinstance(condition, EditSinks):
            uncontrolled = condition.uncontrolled(trace).tolist()
    if edits is None:
        raise InputError(
            f"The condition {name!r} gave None for a batch; expected a list of interventions. "
            "Does its function end without a return? Write [] for no edit."
        )
    return Settled(edits, nullcontext(), False, sinks, uncontrolled)


def _variants(conditions: Any) -> list[Variant]:
    """Conditions as a flat list; the first is the base."""
    if not isinstance(conditions, Mapping) or not conditions:
        wanted = "a dict such as {'base': [], 'masked': lambda trace: [ss.MaskKeys(trace.v_sinks)]}"
        raise InputError(f"Got conditions={conditions!r}; expected {wanted}.")
    out = []
    for name, given in conditions.items():
        several = given.seeds if isinstance(given, PerSeed) else (given,)
        if not out and len(several) > 1:
            raise InputError("Got several seeds for the base; expected one: {'base': []} first.")
        out += [(str(name), i, _checked(str(name), one)) for i, one in enumerate(several)]
    return out


def _checked(name: str, condition: Any) -> Any:
    came = repr(condition)
    if isinstance(condition, type):
        came = f"the class {condition.__name__}"
    elif isinstance(condition, Intervention):
        came = f"one {type(condition).__name__}"
    elif isinstance(condition, Applied) or callable(condition):
        return condition
    elif isinstance(condition, Iterable) and not isinstance(condition, (str, Mapping)):
        return check_interventions(condition)
    raise InputError(
        f"Got {came} as condition {name!r}; expected a list of interventions, a function of a SinkTrace, "
        f"one of ss.baselines, or per_seed(...) of those. Write {{{name!r}: [it]}}."
    )


@typed
def compare(
    lvlm: LVLM,
    dataset: Iterable[Any],
    conditions: Mapping[str, Condition | PerSeed],
    *,
    v_detector: Detector | None = None,
    l_detector: Detector | None = None,
    batch: int = 16,
    length_normalized: bool = True,
    engine: str | Ray = "local",
    progress: bool | None = None,
) -> Comparison:
    """Answer every question under every condition.

    A free answer is cut to the length of the right one. It is right if its tokens are the same, as in
    `sweep` with ``score="exact"``, or it begins with the same text after stripping and lower case.

    Args:
        dataset: Records with ``image``, ``question``, ``answer`` and, if you like, ``task``,
            ``image_id`` and ``choices``: dicts or `Item`. Questions about one image stand together.
        conditions: Name -> condition; the first is the base, usually ``[]``. A condition is a list of
            interventions, gates among them; a function from the `SinkTrace` of a batch to such a list;
            one of `sinkscope.experiments.baselines`; an object whose ``apply(lvlm)`` is the block in
            which the condition holds; or `per_seed` of those. Touching nothing is fine.
        v_detector: For the traces, as ``l_detector``; see `trace_sinks`. Calibrate on other images.
        batch: The most questions per forward pass; a batch holds questions about one image.
        length_normalized: Whether an option's log-probability is the mean over its tokens or the sum.
        engine: ``"local"``, ``"ray"`` or a `sinkscope.scale.Ray`: batches are shared among its workers, which
            get the conditions.
        progress: None shows a bar from 50 questions on.
    """
    check_whole(1, batch=batch)
    check_engine(engine)
    if lvlm.tokenizer is None:
        raise InputError("Got an LVLM without a processor; expected one, to read answers.")
    variants, items = _variants(conditions), as_items(dataset)
    check_tasks(items)
    check_questions(lvlm.processor, items)
    check_rules(v_detector, l_detector)
    rules = {"v_detector": v_detector, "l_detector": l_detector}
    hidden, done = len(items) < 50 if progress is None else not progress, {}
    # Questions about one image, free and multiple-choice ones apart.
    groups = groupby(range(len(items)), lambda i: (items[i].image_id, bool(items[i].choices)))
    parts = [{i: items[i] for i in n} for _, group in groups for n in batches_of([*group], batch)]
    how: Any = {"variants": variants, "rules": rules, "normalized": length_normalized}
    work = Prepared(partial(_answers, **how), _items)
    bar = tqdm(total=len(items), desc="comparing", unit="question", disable=hidden)
    with bar, closing(each_part(lvlm, work, enumerate(parts), engine)) as made:
        for number, lines in made:
            done[number] = lines
            bar.update(len(parts[number]))
    lines = [line for number in sorted(done) for line in done[number]]
    return Comparison(pd.DataFrame(lines), variants[0][0])


def _items(part: Mapping[int, Item]) -> list[Item]:
    return [*part.values()]


def _answers(
    lvlm: LVLM, part: Mapping[int, Item], samples: Sequence[Sample], **how: Any
) -> list[dict[str, Any]]:
    """The lines of one batch."""
    return list(_answer(lvlm, samples[0], part, **how))


def _answer(
    lvlm: LVLM,
    sample: Sample,
    part: Mapping[int, Item],
    variants: Any,
    rules: Any,
    normalized: bool,
) -> Iterator[dict[str, Any]]:
    """One batch under every condition; one trace at most, and unedited answers once at most."""
    items, plain = [*part.values()], None
    trace = None
    if any(needs_trace(one) for _, _, one in variants):
        trace = trace_sinks(lvlm, sample, **rules)
    for name, seed, condition in variants:
        on = settle(lvlm, name, condition, trace, len(items))
        answers = None if on.whole or on.edits else plain  # the same without an edit
        if answers is None:
            with on.block:
                answers = answer_batch(lvlm, sample, items, on.edits, length_normalized=normalized)
        if on.whole:
            answers = replace(answers, touched=(True,) * len(items))
        elif not on.edits:
            plain = answers
        for row, (index, item) in enumerate(part.items()):
            asked = {x: getattr(item, x) for x in ("image_id", "task", "question", "answer")}
            told = {x: getattr(answers, x)[row] for x in ("given", "correct", "touched")}
            line = {"item": index, **asked, "condition": name, "seed": seed, **told}
            yield line | {"sinks": on.sinks[row], "uncontrolled": on.uncontrolled[row]}

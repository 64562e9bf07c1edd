"""compare: what interventions do to a model's answers, per task, paired and with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

from tqdm.auto import tqdm

from sinkscope.errors import InputError
from sinkscope.experiments.statistics import cluster_bootstrap
from sinkscope.experiments.trace import SinkTrace, trace_sinks

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from sinkscope.detectors.rules import Detector
    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.prepare import Sample

Condition = Sequence[Any] | Callable[[SinkTrace], Sequence[Any]]


@dataclass(frozen=True)
class Item:
    """One question about one image.

    Attributes:
        image: PIL image, path or array.
        question: The question.
        answer: The right answer.
        task: What kind of question it is.
        image_id: Questions with one id are about one image: they share a batch, and are resampled
            together.
        choices: All answers to choose from, the right one among them; empty for a free answer.
    """

    image: Any
    question: str
    answer: str
    task: str = "all"
    image_id: Any = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Comparison:
    """Answers under every condition.

    Attributes:
        table: One line per question and condition: image_id, task, question, answer, condition,
            given, correct, touched (whether the edit touched that row).
        base: The condition that others are compared with.
    """

    table: pd.DataFrame
    base: str

    def summary(self, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
        """Accuracy and paired difference to the base, per task, with intervals clustered by image.

        Args:
            level: Coverage of the intervals.
            draws: Bootstrap samples.
            seed: Of the draws.

        Returns:
            Columns task, condition, n, images, accuracy, low, high, delta, delta_low, delta_high,
            touched. Task ``"all"`` holds every question.
        """
        import pandas as pd

        wide = self.table.assign(task="all")
        tables = [self.table, wide] if self.table["task"].nunique() > 1 else [wide]
        whole = pd.concat(tables, ignore_index=True)
        options = {"level": level, "draws": draws, "seed": seed}
        lines = []
        for names, part in whole.groupby(["task", "condition"], sort=False):
            task, condition = cast("tuple[str, str]", names)
            of_base = whole[(whole["task"] == task) & (whole["condition"] == self.base)]
            paired = part.merge(of_base, on="item", suffixes=("", "_base"))
            change = paired["correct"].astype(float) - paired["correct_base"].astype(float)
            images = part["image_id"].tolist()
            accuracy = cluster_bootstrap(part["correct"].tolist(), images, **options)
            delta = cluster_bootstrap(change.tolist(), paired["image_id"].tolist(), **options)
            lines.append(
                {
                    "task": task,
                    "condition": condition,
                    "n": len(part),
                    "images": part["image_id"].nunique(),
                    "touched": part["touched"].mean(),
                    **dict(zip(("accuracy", "low", "high"), accuracy, strict=True)),
                    **dict(zip(("delta", "delta_low", "delta_high"), delta, strict=True)),
                }
            )
        return pd.DataFrame(lines)

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


def as_items(dataset: Iterable[Any]) -> list[Item]:
    """Questions as `Item` records, in groups of one image.

    Raises:
        InputError: If a record lacks a field, there is none, or the answer is not among the choices.
    """
    items = []
    for i, record in enumerate(dataset):
        if isinstance(record, Item):
            item = record
        elif isinstance(record, Mapping):
            missing = {"image", "question", "answer"} - set(record)
            if missing:
                raise InputError(
                    f"Record {i} has {sorted(record)}; expected image, question, answer and, if you "
                    f"like, task and image_id; missing {sorted(missing)}."
                )
            known = {k: record[k] for k in Item.__dataclass_fields__ if k in record}
            item = Item(**known)
        else:
            raise InputError(
                f"Record {i} is a {type(record).__name__}; expected a dict or an Item with image, "
                "question and answer."
            )
        items.append(_checked(item, i))
    if not items:
        raise InputError("Got an empty dataset; expected at least one question.")
    return items


def _checked(item: Item, i: int) -> Item:
    """The item with an image id, and with choices as a tuple that holds the answer."""
    choices = item.choices
    listed = choices is None or (isinstance(choices, Sequence) and not isinstance(choices, str))
    if not listed or not all(isinstance(choice, str) for choice in choices or ()):
        raise InputError(f"Record {i} has choices={choices!r}; expected a list of str.")
    if choices and item.answer not in choices:
        raise InputError(
            f"Record {i} has the answer {item.answer!r} and choices={list(choices)}; expected the "
            "answer to be one of the choices, written in the same way."
        )
    known = f"item {i}" if item.image_id is None else item.image_id
    return replace(item, image_id=known, choices=tuple(choices or ()))


def compare(
    lvlm: LVLM,
    dataset: Iterable[Any],
    conditions: Mapping[str, Condition],
    *,
    v_detector: Detector | None = None,
    l_detector: Detector | None = None,
    batch: int = 16,
    progress: bool | None = None,
) -> Comparison:
    """Answer every question under every condition.

    Args:
        lvlm: The model.
        dataset: Records with ``image``, ``question``, ``answer`` and, if you like, ``task`` and
            ``image_id``: dicts or `Item`. Questions about one image should stand together.
        conditions: Name -> interventions, or a function that gets the `SinkTrace` of a batch and
            gives them. The first is the base, usually ``[]``. Rows without such tokens are answered
            unedited and counted in ``touched``.
        v_detector: For the traces; see `trace_sinks`. Calibrate on other images than these.
        l_detector: Likewise.
        batch: The most questions per forward pass; a batch holds questions about one image.
        progress: Whether to show a progress bar; None shows it from 50 questions on.

    Returns:
        The comparison. An answer counts if it is the right one after stripping and lower case;
        as many tokens are generated as the longest right answer of the batch has.

    Raises:
        InputError: If the dataset or the conditions are empty or malformed.
    """
    import pandas as pd

    items = as_items(dataset)
    if not isinstance(conditions, Mapping) or not conditions:
        raise InputError(
            f"Got conditions={conditions!r}; expected a dict such as {{'base': [], 'masked': "
            "lambda trace: [ss.MaskKeys(trace.v_sinks)]}."
        )
    if lvlm.tokenizer is None:
        raise InputError("Got an LVLM without a processor; expected one, to read answers.")
    rules = {"v_detector": v_detector, "l_detector": l_detector}
    hidden = len(items) < 50 if progress is None else not progress
    lines: list[dict[str, Any]] = []
    with tqdm(total=len(items), desc="comparing", unit="question", disable=hidden) as bar:
        for _, group in groupby(enumerate(items), key=lambda pair: str(pair[1].image_id)):
            rows = list(group)
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                lines.extend(_answer(lvlm, part, conditions, rules))
                bar.update(len(part))
    return Comparison(pd.DataFrame(lines), next(iter(conditions)))


def _answer(
    lvlm: LVLM, rows: list[tuple[int, Item]], conditions: Mapping[str, Condition], rules: dict
) -> list[dict[str, Any]]:
    """One batch under every condition."""
    items = [item for _, item in rows]
    sample = lvlm.prepare(images=[i.image for i in items], text=[i.question for i in items])
    trace: Any = None
    if any(callable(condition) for condition in conditions.values()):
        trace = trace_sinks(lvlm, sample, **rules)
    out = []
    plain: Any = None
    for name, condition in conditions.items():
        edits = condition(trace) if callable(condition) else condition
        if edits:
            given, touched = _generate(lvlm, sample, items, edits)
        else:  # greedy answers without an edit are the same every time
            plain = plain or _generate(lvlm, sample, items, [])
            given, touched = plain
        for (index, item), text, edited in zip(rows, given, touched, strict=True):
            out.append(
                {
                    "item": index,
                    "image_id": str(item.image_id),
                    "task": item.task,
                    "question": item.question,
                    "answer": item.answer,
                    "condition": name,
                    "given": text,
                    "correct": text.strip().lower() == item.answer.strip().lower(),
                    "touched": edited,
                }
            )
    return out


def _generate(
    lvlm: LVLM, sample: Sample, items: list[Item], edits: Sequence[Any]
) -> tuple[tuple[str, ...], list[bool]]:
    """The answers, and which rows an edit touched in the prompt pass or later."""
    tokenizer = lvlm.tokenizer
    lengths = [len(tokenizer(item.answer, add_special_tokens=False)["input_ids"]) for item in items]
    ready = [replace(it, allow_noop=True) for it in edits]
    out = lvlm.generate(sample, [], ready, max_new_tokens=max(1, *lengths))
    touched = [False] * len(items)
    for step in out.steps:
        for effect in step.effects.values():
            if effect.touched.shape[0] != len(items):
                touched = [bool(effect.touched.any()) or t for t in touched]
                continue
            touched = [bool(e) or t for e, t in zip(effect.touched.tolist(), touched, strict=True)]
    return out.text or ("",) * len(items), touched

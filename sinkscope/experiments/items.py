"""Questions about images, as records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sinkscope.errors import InputError
from sinkscope.models.image_ids import identified

NEEDED = frozenset({"image", "question", "answer"})
ALL = "all"
"""The task of all questions together, and of a question without one."""


@dataclass(frozen=True)
class Item:
    """One question about one image.

    Attributes:
        image: PIL image, path or array.
        question: The question.
        answer: The right answer.
        task: What kind of question it is: on all questions, or on none.
        image_id: Text or a whole number, which score functions and tables see as text. Questions with
            one id are about one image: they share a batch, and are resampled together. Missing in all
            records (None, NaN or blank): the image's pixels tell, see `sinkscope.models.image_ids`.
        choices: The options of a multiple-choice question, the right one among them: the model's
            answer is then the option with the highest log-probability. Empty: it answers freely.
    """

    image: Any
    question: str
    answer: str
    task: str = ALL
    image_id: Any = None
    choices: tuple[str, ...] = ()


def folded(text: str) -> str:
    """A text as answers are compared: stripped, in lower case."""
    return text.strip().lower()


def as_items(dataset: Iterable[Any]) -> list[Item]:
    """Questions as `Item` records.

    Raises:
        InputError: If a record lacks a field or has one of another type, its choices lack the answer,
            its image cannot be read or has an id of another, or there is none.
    """
    items = [_checked(_as_item(i, record), i) for i, record in enumerate(dataset)]
    if not items:
        raise InputError("Got an empty dataset; expected at least one question.")
    return identified(items)


def check_tasks(items: Sequence[Item]) -> None:
    """Refuse a task whose name stands for all questions, unless it is the only one.

    Raises:
        InputError: If there is one.
    """
    tasks = {item.task for item in items}
    if ALL in tasks and len(tasks) > 1:
        raise InputError(
            f"Got the tasks {sorted(tasks)}; expected no task {ALL!r} beside others, which is the name "
            "of all questions together. Write task='other' on items without one."
        )


def _as_item(i: int, record: Any) -> Item:
    """One record."""
    if isinstance(record, Item):
        return record
    if not isinstance(record, Mapping):
        raise InputError(
            f"Record {i} is a {type(record).__name__}; expected a dict or an Item with image, "
            "question and answer."
        )
    missing = NEEDED - set(record)
    if missing:
        raise InputError(
            f"Record {i} has {sorted(record)}; expected image, question, answer and, if you like, "
            f"task, image_id and choices; missing {sorted(missing)}."
        )
    return Item(**{k: record[k] for k in Item.__dataclass_fields__ if k in record})


def _checked(item: Item, i: int) -> Item:
    """The item with choices as a tuple that holds the answer."""
    for name in ("question", "answer", "task"):
        value = getattr(item, name)
        if not isinstance(value, str):
            hint = " Leave task out of all records if there are no tasks." if name == "task" else ""
            raise InputError(f"Record {i} has {name}={value!r}; expected a str.{hint}")
    choices: Any = item.choices
    listed = choices is None or (isinstance(choices, Sequence) and not isinstance(choices, str))
    if not listed or not all(isinstance(choice, str) for choice in choices or ()):
        raise InputError(f"Record {i} has choices={choices!r}; expected a list of str.")
    if choices and item.answer not in choices:
        raise InputError(
            f"Record {i} has the answer {item.answer!r} and choices={list(choices)}; expected the "
            "answer to be one of the choices, written in the same way."
        )
    return replace(item, choices=tuple(choices or ()))

"""Questions about images, as records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np

from sinkscope.errors import InputError, nearest
from sinkscope.models.pictures import clusters_of, identified

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
            records (None, NaN or blank): the image's pixels tell, see `sinkscope.models.pictures`.
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


FEWEST_IMAGES = 20

"""Fewer images than this cannot be split into a training and a test part that mean anything."""


@dataclass(frozen=True)
class LabelledImage:
    """One image, what is true about it, and the text it is shown with.

    Attributes:
        image: PIL image, path or array; a list of them for a prompt with several.
        attributes: Name -> class (an int or a str), or a set or list of classes if several can hold.
        question: The text after the image.
        image_id: Records with one id are about one image: they are never split between training and
            test, and are resampled together; see `Item`.
    """

    image: Any
    attributes: Mapping[str, Any]
    question: str = ""
    image_id: Any = None


@dataclass(frozen=True, eq=False)
class Target:
    """An attribute as a target.

    Attributes:
        name: The attribute.
        multi: Whether several classes can hold at once.
        classes: The classes, sorted. With ``multi``, those that not every record has.
        labels: Int ``[record]``, the index of the class; with ``multi`` bool ``[record class]``.
    """

    name: str
    multi: bool
    classes: tuple[Any, ...]
    labels: np.ndarray


def as_labelled(dataset: Iterable[Any]) -> list[LabelledImage]:
    """Records as `LabelledImage`; no image is opened yet.

    Raises:
        InputError: If a record is malformed.
    """
    items = []
    for i, record in enumerate(dataset):
        if isinstance(record, LabelledImage):
            item = record
        elif isinstance(record, Mapping):
            missing = {"image", "attributes"} - set(record)
            if missing:
                raise InputError(
                    f"Record {i} has {sorted(record)}; expected image, attributes and, if you like, "
                    f"question and image_id; missing {sorted(missing)}."
                )
            known = {k: record[k] for k in LabelledImage.__dataclass_fields__ if k in record}
            item = LabelledImage(**known)
        else:
            raise InputError(
                f"Record {i} is a {type(record).__name__}; expected a dict or an ss.experiments.LabelledImage "
                "with image and attributes."
            )
        if not isinstance(item.attributes, Mapping) or not item.attributes:
            raise InputError(
                f"Record {i} has attributes={item.attributes!r}; expected a dict of names and "
                "classes, such as {'count': 3, 'colours': {'red', 'blue'}}."
            )
        items.append(item)
    return items


def image_groups(items: Sequence[LabelledImage]) -> np.ndarray:
    """The image of every record, as one name for all records that share one.

    Raises:
        InputError: If an image cannot be read or has the id of another, or there are too few.
    """
    groups = np.array(clusters_of(item.image_id for item in identified(items)))
    n = len(set(groups))
    if n < FEWEST_IMAGES:
        raise InputError(
            f"Got {n} images; expected at least {FEWEST_IMAGES}, better hundreds: some train the "
            "probes and the others test them."
        )
    return groups


def as_targets(items: Sequence[LabelledImage], wanted: Sequence[str] | None) -> list[Target]:
    """The attributes of all records as targets.

    Args:
        items: The records.
        wanted: Names of the attributes to take, or None for those of the first record.

    Raises:
        InputError: If a record lacks one, if its kinds are mixed, or if it takes one value only.
    """
    known = list(items[0].attributes)
    names = known if wanted is None else wanted
    if isinstance(names, str) or not names:
        raise InputError(f"Got targets={wanted!r}; expected some of {known}, as a list.")
    twice = [name for name in dict.fromkeys(names) if list(names).count(name) > 1]
    if twice:
        raise InputError(f"Got targets={list(names)}; expected every one once, not {twice} again.")
    return [_target(name, items) for name in names]


def _target(name: str, items: Sequence[LabelledImage]) -> Target:
    values = []
    for i, item in enumerate(items):
        if name not in item.attributes:
            raise InputError(
                f"Record {i} lacks the attribute {name!r}; expected the same attributes in every "
                f"record. {nearest(name, map(str, item.attributes))}"
            )
        values.append(item.attributes[name])
    several = [isinstance(value, (Set, list, tuple)) for value in values]
    if any(several) != all(several):
        one, many = values[several.index(False)], values[several.index(True)]
        raise InputError(
            f"Attribute {name!r} is {one!r} in one record and {many!r} in another; expected one class "
            "in all records, or a set of classes in all. Write {'red'} for a set of one."
        )
    flat = [c for v in values for c in v] if all(several) else values
    _check_classes(name, flat)
    classes = sorted(set(flat))
    if all(several):
        labels = np.array([[c in set(v) for c in classes] for v in values], dtype=bool)
        labels = labels.reshape(len(values), len(classes))
        told = np.flatnonzero(~labels.all(axis=0))
        classes = [classes[i] for i in told]
        labels = labels[:, told]
    else:
        labels = np.array([classes.index(v) for v in values])
    if len(classes) < (1 if all(several) else 2):
        raise InputError(
            f"Attribute {name!r} is {values[0]!r} in every record; expected at least two different "
            "values: a probe of one class is always right."
        )
    return Target(name, all(several), tuple(classes), labels)


def _check_classes(name: str, values: Sequence[Any]) -> None:
    """All of one kind: truth values, whole numbers or names.

    Raises:
        InputError: If they are not.
    """
    kinds = {}
    for value in values:
        kind = "bool" if isinstance(value, (bool, np.bool_)) else ""
        kind = kind or ("int" if isinstance(value, Integral) else "")
        kind = kind or ("str" if isinstance(value, str) else "")
        if not kind:
            raise InputError(
                f"Attribute {name!r} holds {value!r} of type {type(value).__name__}; expected an int "
                "or a str per class. Sort continuous values into bins first."
            )
        kinds[kind] = value
    if len(kinds) > 1:
        raise InputError(
            f"Attribute {name!r} holds {', '.join(repr(v) for v in kinds.values())}; expected classes "
            "of one kind. Write all of them as str, or all as int."
        )

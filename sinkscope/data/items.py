"""Records of questions and of labelled images: one way to read them, and one check."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np

from sinkscope.errors import InputError, nearest
from sinkscope.models.pictures import clusters_of, identified

ALL = "all"  # the task of all questions together, and of a question without one
ADVICE = "Write dataset.rename_column(...), or leave such records out."


@dataclass(frozen=True)
class Item:
    """One question about one image, with the right answer.

    Attributes:
        task: What kind of question it is: on all questions, or on none.
        image_id: Text or a whole number, which score functions and tables see as text. Questions with
            one id are about one image: they share a batch, and are resampled together. Missing in all
            records (None, NaN or blank): the image's pixels tell, see `sinkscope.models.pictures`.
        choices: The options of a multiple-choice question, the right one among them: the model's
            answer is then the option with the highest log-probability. Empty: it answers freely.
    """

    image: Any  # PIL image, path or array
    question: str
    answer: str
    task: str = ALL
    image_id: Any = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelledImage:
    """One image, what is true about it, and the text it is shown with.

    ``attributes`` are name -> class (an int or a str), or a set or list of classes if several can hold.
    Records with one ``image_id`` are never split between training and test; see `Item`.
    """

    image: Any  # PIL image, path or array; a list of them for a prompt with several
    attributes: Mapping[str, Any]
    question: str = ""  # the text after the image
    image_id: Any = None


@dataclass(frozen=True, eq=False)
class Target:
    """An attribute as a target."""

    name: str
    multi: bool  # whether several classes can hold at once
    classes: tuple[Any, ...]  # sorted; with ``multi``, those that not every record has
    labels: np.ndarray  # int ``[record]``, the class; with ``multi`` bool ``[record class]``


class Lazy(Sequence[Any]):
    """Records that are made when they are asked for, and not kept: ``make(index)``, ``size`` of them."""

    def __init__(self, make: Callable[[int], Any], size: int) -> None:
        self.make, self.size = make, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        places = range(self.size)[index]
        return self.make(places) if isinstance(places, int) else [self.make(i) for i in places]


def read_record(
    record: Any, number: int, kind: type = Item, where: str = "", advice: str = ADVICE
) -> dict[str, Any]:
    """Read the fields of an `Item` or `LabelledImage` that a record has, a dict or an object.

    Fields without a default must be there. Messages begin with number and ``where``, and end with ``advice``.
    """
    get = record.get if isinstance(record, Mapping) else partial(getattr, record)
    found = {field.name: get(field.name, MISSING) for field in fields(kind)}
    needed = [field.name for field in fields(kind) if field.default is MISSING]
    if missing := [name for name in needed if found[name] is None or found[name] is MISSING]:
        shown = sorted(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
        raise InputError(
            f"Record {number}{where} ({shown}) has no {' and no '.join(missing)}; expected "
            f"{', '.join(needed[:-1])} and {needed[-1]}, in a dict or an object. {advice}"
        )
    return {name: value for name, value in found.items() if value is not MISSING}


def check_texts(number: int, texts: Mapping[str, Any], *, blank: bool) -> None:
    """Refuse what is no str, and also blank text unless ``blank``."""
    for name, text in texts.items():
        if not isinstance(text, str) or not (blank or text.strip()):
            raise InputError(
                f"Record {number} has {name}={text!r}; expected a str"
                f"{'' if blank else ' with at least one word'}. Write str(...) for numbers, or leave such out."
            )


def as_items(dataset: Iterable[Any]) -> list[Item]:
    """Questions as `Item` records; InputError if one is malformed, or its image unreadable or of another id."""
    items = []
    for i, record in enumerate(dataset):
        found = read_record(record, i)
        item = record if isinstance(record, Item) else Item(**found)
        texts = {name: getattr(item, name) for name in ("question", "answer", "task")}
        check_texts(i, texts, blank=True)
        options: Any = () if item.choices is None else item.choices
        listed = isinstance(options, Sequence) and not isinstance(options, str)
        if not (listed and all(isinstance(option, str) for option in options)):
            raise InputError(f"Record {i} has choices={options!r}; expected a list of str.")
        if options and item.answer not in options:
            raise InputError(
                f"Record {i} has the answer {item.answer!r} and choices={list(options)}; expected the "
                "answer to be one of the choices, written in the same way."
            )
        items.append(replace(item, choices=tuple(options)))
    if not items:
        raise InputError("Got an empty dataset; expected at least one question.")
    return identified(items)


def check_tasks(items: Sequence[Item]) -> None:
    """Refuse a task whose name stands for all questions, unless it is the only one."""
    tasks = {item.task for item in items}
    if ALL in tasks and len(tasks) > 1:
        raise InputError(
            f"Got the tasks {sorted(tasks)}; expected no task {ALL!r} beside others, which is the name "
            "of all questions together. Write task='other' on items without one."
        )


def as_labelled(dataset: Iterable[Any]) -> list[LabelledImage]:
    """Records as `LabelledImage`; no image is opened yet."""
    items = []
    for i, record in enumerate(dataset):
        found = read_record(record, i, LabelledImage)
        item = record if isinstance(record, LabelledImage) else LabelledImage(**found)
        check_texts(i, {"question": item.question}, blank=True)
        if not isinstance(item.attributes, Mapping) or not item.attributes:
            wanted = "a dict of names and classes, such as {'count': 3, 'colours': {'red', 'blue'}}"
            raise InputError(f"Record {i} has attributes={item.attributes!r}; expected {wanted}.")
        items.append(item)
    if not items:
        raise InputError("Got a data set without a record; expected images with their attributes.")
    return items


def image_groups(items: Sequence[LabelledImage]) -> np.ndarray:
    """The image of every record, as one name for all records that share one; see `clusters_of`."""
    groups = np.array(clusters_of(item.image_id for item in identified(items)))
    if (n := len(set(groups))) < 20:  # too few for a training and a test part
        raise InputError(f"Got {n} images to split; expected at least 20.")
    return groups


def as_targets(items: Sequence[LabelledImage], wanted: Sequence[str] | None) -> list[Target]:
    """Make targets of the attributes wanted, or those of the first record; all records must have them."""
    known = list(items[0].attributes)
    names = known if wanted is None or isinstance(wanted, str) else list(wanted)
    if isinstance(wanted, str) or not names:
        raise InputError(f"Got targets={wanted!r}; expected some of {known}, as a list.")
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"Got targets={names!r:.60}; expected some of {known}, as a list.")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InputError(f"Got targets={names}; expected every one once, not {twice} again.")
    return [_target(name, items) for name in names]


def _target(name: str, items: Sequence[LabelledImage]) -> Target:
    for i, item in enumerate(items):
        if name not in item.attributes:
            raise InputError(
                f"Record {i} lacks the attribute {name!r}; expected the same attributes in every "
                f"record. {nearest(name, map(str, item.attributes))}"
            )
    values = [item.attributes[name] for item in items]
    several = {isinstance(value, (Set, list, tuple)): value for value in values}
    if len(several) > 1:
        raise InputError(
            f"Attribute {name!r} is {several[False]!r} in one record and {several[True]!r} in another; "
            "expected one class in all records, or a set in all. Write {'red'} for a set of one."
        )
    multi = True in several
    classes = _classes(name, [c for value in values for c in value] if multi else values)
    if multi:
        labels = np.array([[c in set(value) for c in classes] for value in values], dtype=bool)
        told = np.flatnonzero(~labels.all(axis=0))
        classes, labels = [classes[i] for i in told], labels[:, told]
    else:
        labels = np.array([classes.index(value) for value in values])
    if len(classes) < (1 if multi else 2):
        raise InputError(
            f"Attribute {name!r} is {values[0]!r} in every record; expected at least two different "
            "values: a probe of one class is always right."
        )
    return Target(name, multi, tuple(classes), labels)


def _classes(name: str, values: Sequence[Any]) -> list[Any]:
    """The different values, sorted; all are truth values, whole numbers or names."""
    types: Any = ((bool, np.bool_), Integral, str)
    kinds: dict[Any, Any] = {}
    for value in values:
        kind = next((kind for kind in types if isinstance(value, kind)), None)
        if kind is None:
            raise InputError(
                f"Attribute {name!r} holds {value!r} of type {type(value).__name__}; expected an int "
                "or a str per class. Sort continuous values into bins first."
            )
        kinds[kind] = value
    if len(kinds) > 1:
        raise InputError(
            f"Attribute {name!r} holds {', '.join(map(repr, kinds.values()))}; expected classes of one "
            "kind. Write all of them as str, or all as int."
        )
    return sorted(set(values))

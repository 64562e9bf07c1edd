"""Questions about images, from drawn scenes, files, or the ``datasets`` library, as plain records."""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sinkscope.errors import InputError, nearest
from sinkscope.models.pictures import ADDRESSES, is_missing

FIELDS = ("image", "question", "answer", "task", "image_id", "choices")
NEEDED = ("image", "question", "answer")
SCENES = "scenes"
READERS = (".jsonl", ".json", ".csv", ".parquet")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Questions:
    """Where questions come from, and how their columns are read. Iterating gives records.

    Records are read one by one, every time it is iterated, so that a large set is never in memory.

    Args:
        source: ``"scenes"`` for the drawn scenes of the bundled model; a ``.jsonl``, ``.json``,
            ``.csv`` or ``.parquet`` file, whose image column holds paths (relative to the file);
            else a name or folder for ``datasets.load_dataset``.
        split: ``"train"``, ``"validation"`` or ``"test"`` of the scenes, or what ``load_dataset``
            calls it.
        limit: The most questions, from ``start`` on; None for all (100 scenes).
        start: How many to skip.
        columns: Field -> column name, for those whose names differ. Fields are image, question,
            answer, task, image_id and choices.
        choices: The same options for every question; None for those of the column, if there is one.
        letters: How options are named in answers, such as ``"A"`` or ``"(A)"``: then each question
            has as many letters to choose from as its column has options. None if the answer is the
            option itself.
        suffix: Put behind every question, such as a line that asks for the option's letter.
        per_image: Questions per drawn scene.
        subset: The configuration's name for ``load_dataset``.
    """

    source: str
    split: str = "test"
    limit: int | None = None
    start: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    choices: Sequence[str] | None = None
    letters: str | None = None
    suffix: str = ""
    per_image: int = 8
    subset: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        strange = sorted(set(self.columns) - set(FIELDS))
        if strange:
            raise InputError(
                f"Got columns for {strange}; expected fields among {FIELDS}. "
                f"{nearest(strange[0], FIELDS)}"
            )
        if self.letters is not None and "A" not in self.letters:
            raise InputError(f"Got letters={self.letters!r}; expected how an A looks, as '(A)'.")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"Got limit={self.limit}; expected 1 or more, or None for all.")
        if self.start < 0:
            raise InputError(f"Got start={self.start}; expected 0 or more.")
        if self.source == SCENES and self.split not in SPLITS:
            raise InputError(
                f"Got split={self.split!r} of the scenes; expected one of {SPLITS}. "
                f"{nearest(self.split, SPLITS)}"
            )

    def _check_types(self) -> None:
        """Refuse what a recipe may hold by mistake.

        Raises:
            InputError: If a value is of another type.
        """
        words = ("source", "split", "suffix", "letters", "subset")
        wanted: dict[str, tuple[Any, str]] = {name: ((str, type(None)), "a word") for name in words}
        wanted |= dict.fromkeys(("start", "per_image"), (int, "a whole number"))
        wanted |= {"limit": ((int, type(None)), "a whole number")}
        wanted |= {"columns": (Mapping, "fields and the names of their columns")}
        wanted |= {"choices": ((list, tuple, type(None)), "a list")}
        for name, (kind, what) in wanted.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(f"Got {name}={value!r} for questions; expected {what}.")

    def indexed(self) -> Sequence[dict[str, Any]]:
        """The records as a sequence that can be read again and again, for training.

        Images of a data set are decoded when their record is asked for; those of files stay paths.
        """
        path = Path(self.source).expanduser()
        if self.source == SCENES or path.suffix in READERS:
            return list(self)
        return Indexed(self, self._load())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.source == SCENES:
            yield from self._scenes()
            return
        for i, record in enumerate(self._raw()):
            if i < self.start:
                continue
            if self.limit is not None and i >= self.start + self.limit:
                return
            yield self._record(record, i)

    def _scenes(self) -> Iterator[dict[str, Any]]:
        """Questions about drawn scenes."""
        from sinkscope.bundled import scenes
        from sinkscope.bundled.scenes import scene_questions

        seeds = {
            "train": scenes.TRAIN_SEEDS,
            "validation": scenes.VALIDATION_SEEDS,
            "test": scenes.TEST_SEEDS,
        }[self.split]
        limit = 100 * self.per_image if self.limit is None else self.limit
        skipped, first = divmod(self.start, self.per_image)
        images = -(-(first + limit) // self.per_image)
        made = scene_questions(images, self.per_image, seeds=seeds, start=skipped)
        for i, record in enumerate(made):
            if first <= i < first + limit:
                record["question"] += self.suffix
                yield record

    def _raw(self) -> Iterator[Mapping[str, Any]]:
        """Records as they stand in the file or data set."""
        path = Path(self.source).expanduser()
        if path.suffix in READERS:
            if not path.is_file():
                raise InputError(f"Got the file {self.source!r}, which does not exist.")
            yield from read_file(path)
            return
        yield from self._load()

    def _load(self) -> Any:
        """The data set of the ``datasets`` library."""
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise InputError(
                f"Got the data set {self.source!r}, which needs the datasets library; expected it to "
                "be installed. Write pip install 'sinkscope[data]', or name a file that ends in "
                f"one of {READERS}."
            ) from error
        try:
            return load_dataset(self.source, self.subset, split=self.split)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"The data set {self.source!r} (split {self.split!r}) could not be loaded "
                f"({type(error).__name__}: {error}); expected a folder or a name that "
                "datasets.load_dataset knows."
            ) from error

    def _record(self, raw: Mapping[str, Any], i: int) -> dict[str, Any]:
        """One record with the fields of an item."""
        out = {}
        for name in FIELDS:
            column = self.columns.get(name, name)
            value = raw.get(column)
            if isinstance(value, str) or not is_missing(value):
                out[name] = value
        missing = [name for name in NEEDED if name not in out]
        if missing:
            raise InputError(
                f"Record {i} of {self.source!r} has the columns {sorted(raw)}; expected {missing} "
                f"too, and not empty. Write columns={{{missing[0]!r}: 'the column'}}."
            )
        if isinstance(out["image"], str) and not out["image"].startswith(ADDRESSES):
            out["image"] = str(Path(self.source).expanduser().parent / out["image"])
        out["question"] = str(out["question"]) + self.suffix
        out["answer"] = str(out["answer"])
        self._name_choices(out, i)
        return out

    def _name_choices(self, out: dict[str, Any], i: int) -> None:
        """Options as they look in answers."""
        if self.choices is not None:
            out["choices"] = list(self.choices)
        elif "choices" in out and isinstance(out["choices"], str):
            out["choices"] = [part.strip() for part in out["choices"].split("|")]
        if "choices" not in out:
            return
        options = [str(option) for option in out["choices"]]
        if self.letters is not None and self.choices is None:
            named = string.ascii_uppercase[: len(options)]
            options = [self.letters.replace("A", letter) for letter in named]
        if out["answer"] not in options:
            raise InputError(
                f"Record {i} of {self.source!r} has the answer {out['answer']!r} and the options "
                f"{options}; expected one of them. Set letters='A' or letters='(A)' if answers are "
                "letters."
            )
        out["choices"] = options


class Indexed(Sequence[dict[str, Any]]):
    """Records of a data set, each made when it is asked for.

    Args:
        questions: How records are read.
        raw: The data set: something with a length and an index.
    """

    def __init__(self, questions: Questions, raw: Any) -> None:
        self.questions, self.raw = questions, raw
        stop = len(raw) if questions.limit is None else questions.start + questions.limit
        self.places = range(len(raw))[questions.start : stop]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        place = self.places[index]
        return self.questions._record(self.raw[place], place)


def read_file(path: Path) -> Iterator[Mapping[str, Any]]:
    """The records of a file, one by one.

    Raises:
        InputError: If a line is no record.
    """
    if path.suffix == ".parquet":
        import pandas as pd

        yield from pd.read_parquet(path).to_dict(orient="records")  # type: ignore[misc]
        return
    with path.open(newline="", encoding="utf-8") as lines:
        if path.suffix == ".csv":
            yield from csv.DictReader(lines)
            return
        try:
            if path.suffix == ".json":
                yield from json.load(lines)
            else:
                yield from (json.loads(line) for line in lines if line.strip())
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path.name} is no {path.suffix[1:]} of records ({error}); expected one JSON object "
                "per question."
            ) from error

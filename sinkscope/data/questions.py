"""Questions from drawn scenes, files, or the ``datasets`` library, as plain records."""

import csv
import json
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sinkscope.bundled import scenes
from sinkscope.checks import check_choice, check_fields, check_path, check_whole
from sinkscope.data.items import Lazy, read_record
from sinkscope.errors import InputError
from sinkscope.models.pictures import ADDRESSES, is_missing

FIELDS = ("image", "question", "answer", "task", "image_id", "choices")
SCENES = "scenes"
READERS = (".jsonl", ".json", ".csv", ".parquet")
WORDS = ("source", "split", "suffix", "letters", "subset")
WANTED: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(WORDS, ((str, type(None)), "a word")),
    "columns": (Mapping, "fields and the names of their columns"),
    "choices": ((list, tuple, type(None)), "a list"),
}


@dataclass(frozen=True)
class Questions:
    """Where questions come from, and how their columns are read. Iterating reads records one by one.

    Args:
        source: ``"scenes"`` for the drawn scenes of the bundled model; a ``.jsonl``, ``.json``,
            ``.csv`` or ``.parquet`` file, whose image column holds paths (relative to the file);
            else a name or folder for ``datasets.load_dataset``.
        split: ``"train"``, ``"validation"`` or ``"test"`` of the scenes, or what ``load_dataset``
            calls it.
        limit: The most questions, from ``start`` on; None for all (100 scenes).
        columns: Field -> column name, for those whose names differ. Fields are image, question,
            answer, task, image_id and choices.
        choices: The same options for every question; None for those of the column, if there is one.
        letters: How options are named in answers, such as ``"A"`` or ``"(A)"``: then each question has
            as many letters as options. None if the answer is the option itself.
        suffix: Put behind every question, such as a line that asks for the option's letter.
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
        for name, (kind, what) in WANTED.items():
            if not isinstance(value := getattr(self, name), kind):
                raise InputError(f"Got {name}={value!r} for questions; expected {what}.")
        check_whole(1, 20, per_image=self.per_image)
        check_whole(0, start=self.start)
        if self.limit is not None:
            check_whole(1, limit=self.limit, hint="Write None for all questions.")
        for name in self.columns:
            check_choice(FIELDS, columns=name)
        if self.letters is not None and "A" not in self.letters:
            raise InputError(f"Got letters={self.letters!r}; expected how an A looks, as '(A)'.")
        check_fields(self)
        if self.source == SCENES:
            check_choice(("train", "validation", "test"), split=self.split)

    def indexed(self) -> Sequence[dict[str, Any]]:
        """The records as a sequence that can be read again and again, for training.

        Images of a data set are decoded when their record is asked for; those of files stay paths.
        """
        if self.source == SCENES or Path(self.source).suffix in READERS:
            return list(self)
        raw = self._load()
        stop = len(raw) if self.limit is None else self.start + self.limit
        places = range(len(raw))[self.start : stop]
        return Lazy(lambda i: self._record(raw[places[i]], places[i]), len(places))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.source == SCENES:
            limit = 100 * self.per_image if self.limit is None else self.limit
            skipped, first = divmod(self.start, self.per_image)
            images = -(-(first + limit) // self.per_image)
            seeds = getattr(scenes, f"{self.split.upper()}_SEEDS")
            made = scenes.scene_questions(images, self.per_image, seeds=seeds, start=skipped)
            asked = islice(made, first, first + limit)
            return (one | {"question": one["question"] + self.suffix} for one in asked)
        path = Path(self.source).expanduser()
        raw = read_file(path) if path.suffix in READERS else self._load()
        stop = None if self.limit is None else self.start + self.limit
        return (self._record(record, i) for i, record in islice(enumerate(raw), self.start, stop))

    def _load(self) -> Any:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise InputError(
                f"Got the data set {self.source!r}, which needs the datasets library. Write pip install "
                f"'sinkscope[data]', or name a file that ends in one of {READERS}."
            ) from error
        try:
            return load_dataset(self.source, self.subset, split=self.split)
        except (OSError, ValueError, RuntimeError, IndexError) as error:
            raise InputError(
                f"The data set {self.source!r} (split {self.split!r}) could not be loaded; expected "
                f"what datasets.load_dataset knows. {type(error).__name__}: {error}"
            ) from error

    def _record(self, raw: Mapping[str, Any], i: int) -> dict[str, Any]:
        """One record with the fields of an item; empty columns are missing."""
        named = {name: raw.get(self.columns.get(name, name)) for name in FIELDS}
        some = {k: v for k, v in named.items() if isinstance(v, str) or not is_missing(v)}
        advice = f"Its columns are {sorted(raw)}: write columns={{'answer': 'the column'}}."
        out = read_record(some, i, where=f" of {self.source!r}", advice=advice)
        out["image"] = beside(Path(self.source).expanduser(), out["image"])
        out |= {"question": str(out["question"]) + self.suffix, "answer": str(out["answer"])}
        options = out.pop("choices", None) if self.choices is None else self.choices
        if options is None:
            return out
        if isinstance(options, str):
            options = [part.strip() for part in options.split("|")]
        out["choices"] = [str(option) for option in options]
        if self.letters is not None and self.choices is None:
            letters = string.ascii_uppercase[: len(options)]
            out["choices"] = [self.letters.replace("A", letter) for letter in letters]
        if out["answer"] not in out["choices"]:
            raise InputError(
                f"Record {i} of {self.source!r} has the answer {out['answer']!r} and the options "
                f"{out['choices']}; expected one of them. Set letters='A' or '(A)' if answers are letters."
            )
        return out


def beside(file: Path, image: Any) -> Any:
    """The image of a record of a file: paths are relative to the file; a list of them likewise."""
    if isinstance(image, (list, tuple)):
        return [beside(file, one) for one in image]
    local = isinstance(image, str) and not image.startswith(ADDRESSES)
    return str(file.parent / image) if local else image


def read_file(path: Path) -> Iterable[Mapping[str, Any]]:
    """The records of a file, one by one."""
    check_path(source=path)
    if not path.is_file():
        raise InputError(f"Got the file {str(path)!r}, which does not exist.")
    if path.suffix == ".parquet":
        for some in pq.ParquetFile(path).iter_batches(64):
            yield from some.to_pylist()
        return
    with path.open(newline="", encoding="utf-8") as lines:
        try:
            if path.suffix == ".csv":
                yield from csv.DictReader(lines)
            elif path.suffix == ".json":
                yield from json.load(lines)
            else:
                yield from (json.loads(line) for line in lines if line.strip())
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path.name} is no {path.suffix[1:]} of records ({error}); expected one object each."
            ) from error

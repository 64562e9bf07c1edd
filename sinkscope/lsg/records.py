"""Datasets of questions with answers: read once, checked, and looked up again by index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from sinkscope.checks import check_whole
from sinkscope.errors import InputError
from sinkscope.models.answers import answer_ids
from sinkscope.models.image_ids import ImageIds, clusters_of
from sinkscope.models.prompts import Marks, question_of

NEEDED = ("image", "question", "answer")


@dataclass(frozen=True, eq=False)
class AnswerData:
    """A dataset that was read once and found whole.

    Attributes:
        records: What gives a record by its index: dicts, or objects with such attributes.
        images: The image id of each record; see `sinkscope.models.image_ids`.
        groups: One name for all records that share an image, directly or through others.
        fingerprint: A digest of all questions, answers, image ids and pixels, in order.
        max_answer_tokens: The longest answer that is accepted.
    """

    records: Any
    images: tuple[str, ...]
    groups: tuple[str, ...]
    fingerprint: str
    max_answer_tokens: int

    def __len__(self) -> int:
        return len(self.images)

    def joined(self, other: AnswerData) -> AnswerData:
        """This dataset and then another one."""
        both = f"{self.fingerprint} {other.fingerprint}"
        longest = max(self.max_answer_tokens, other.max_answer_tokens)
        images = self.images + other.images
        records = _Both(self.records, other.records)
        return AnswerData(records, images, tuple(clusters_of(images)), both, longest)

    def split(self, share: float, seed: int) -> tuple[list[int], list[int]]:
        """Two parts without a common image.

        Records about several images stay with all that share one of them.

        Args:
            share: Of the groups of images, for the second part; at least one where it is above 0.
            seed: Of the choice.

        Returns:
            Indices of the first and of the second part, each in the dataset's order.

        Raises:
            InputError: If the share is no number from 0 to below 1, or there is one image only.
        """
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise InputError(
                f"Got validation={share!r}; expected a share of the images from 0 to below 1. For a "
                "dataset of your own write validation_data=dataset."
            )
        names = list(dict.fromkeys(self.groups))
        if share == 0:
            return list(range(len(self))), []
        if len(names) < 2:
            raise InputError(
                f"Got {len(self)} records about one image and validation={share}; expected two images or "
                "more that no record has both of, because the split is by image. Write validation=0, or "
                "validation_data=dataset."
            )
        many = min(max(1, round(share * len(names))), len(names) - 1)
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        held = {names[i] for i in order[:many]}
        parts: tuple[list[int], list[int]] = ([], [])
        for index, name in enumerate(self.groups):
            parts[name in held].append(index)
        return parts


class _Both:
    """Records of two datasets, one after the other."""

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second

    def __getitem__(self, index: int) -> Any:
        n = len(self.first)
        return self.first[index] if index < n else self.second[index - n]


def read_dataset(
    dataset: Iterable[Any],
    tokenizer: Any = None,
    *,
    max_answer_tokens: int = 256,
    image_token: int | None = None,
    marks: Marks | None = None,
    progress: bool = False,
) -> AnswerData:
    """Read a dataset once, check every record and keep no image.

    Args:
        dataset: Records with image, question, answer and, if you like, image_id: dicts, or objects
            with such attributes. Something with a length and an index (a list,
            ``datasets.Dataset``, a torch dataset) is read again whenever a batch is made; anything
            else is kept as a list of its records.
        tokenizer: To count the answers' tokens, or None.
        max_answer_tokens: The longest answer that is accepted.
        image_token: The id that stands for an image in prompts, which no answer may hold.
        marks: The texts that stand for images, which no question may hold inside of words, or None.
        progress: Whether to show a progress bar.

    Raises:
        InputError: If it is empty, or a record lacks something, with its number.
    """
    check_whole(1, max_answer_tokens=max_answer_tokens)
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, (str, Mapping)) or not (indexed or isinstance(dataset, Iterable)):
        raise InputError(
            f"Got a dataset of type {type(dataset).__name__}; expected records with image, question "
            "and answer. Write dataset['train'] for one split of several, or a list of dicts."
        )
    if hasattr(dataset, "itertuples"):
        raise InputError(
            "Got a DataFrame; expected records. Write dataset.to_dict(orient='records')."
        )
    records: Any = dataset if indexed else list(dataset)
    if not len(records):
        raise InputError("Got an empty dataset; expected at least one question with an answer.")
    names, ids, digest = [], ImageIds(), hashlib.blake2b(digest_size=16)
    for index in tqdm(range(len(records)), desc="reading", unit="record", disable=not progress):
        record = records[index]
        question, answer = checked_texts(record, index)
        if marks is not None:
            question_of(question, marks, who=f"Record {index} has")
        if tokenizer is not None:
            _check_answer(tokenizer, answer, index, max_answer_tokens, image_token)
        image = ids.add(index, field_of(record, "image"), field_of(record, "image_id"))
        names.append(image[0])
        digest.update("\x1f".join((question, answer, *image, "\x1e")).encode())
    groups = tuple(clusters_of(names))
    return AnswerData(records, tuple(names), groups, digest.hexdigest(), max_answer_tokens)


def field_of(record: Any, name: str) -> Any:
    """A field of a dict or of an object; None if it is missing."""
    return record.get(name) if isinstance(record, Mapping) else getattr(record, name, None)


def checked_texts(record: Any, index: int) -> tuple[str, str]:
    """Question and answer of a record that has all it needs.

    Raises:
        InputError: If it does not.
    """
    missing = [name for name in NEEDED if field_of(record, name) is None]
    if missing:
        known = sorted(record) if isinstance(record, Mapping) else type(record).__name__
        raise InputError(
            f"Record {index} ({known}) has no {' and no '.join(missing)}; expected image, question "
            "and answer. Write dataset.rename_column(...), or leave such records out."
        )
    found = [field_of(record, name) for name in ("question", "answer")]
    for name, text in zip(("question", "answer"), found, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"Record {index} has {name}={text!r}; expected a str with at least one word. Write "
                "str(...) for numbers, or leave such records out."
            )
    return found[0], found[1]


def _check_answer(
    tokenizer: Any, answer: str, index: int, longest: int, image_token: int | None
) -> None:
    """Refuse an answer that is longer than wanted, or would be taken for an image.

    Raises:
        InputError: If so.
    """
    ids = answer_ids(tokenizer, "", answer)  # as long as behind a prompt, or a token longer
    if image_token is not None and image_token in ids:
        raise InputError(
            f"Record {index} has the answer {answer[:40]!r}, which holds the token that stands for an "
            "image; expected words. Remove it, or leave such records out."
        )
    n = len(ids)
    if n > longest:
        raise InputError(
            f"Record {index} has an answer of {n} tokens; expected at most {longest}. Write "
            f"max_answer_tokens={n}, or leave such records out."
        )

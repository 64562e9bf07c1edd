"""Which questions are about the same image: one rule for answers, sweeps, probes, gates and intervals.

An image is what its ``image_id`` says: text, or a whole number, which is the same as its text (1 is
``"1"`` and 1.0). Where no record has one, it is its pixels, as the model is shown them: a path and the
picture opened from it are one image, wherever it lies. An id with two different pictures is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, TypeVar
from uuid import UUID

from sinkscope.errors import InputError
from sinkscope.models.pictures import open_image

T = TypeVar("T", bound=Any)
PIXELS = "pixels:"
"""How the id of an image without one begins; digests of several are joined by ``|``."""
WRITTEN = ("nan", "None", "<NA>", "NaT")
"""What a missing id looks like once somebody has turned it into text."""


def is_missing(value: Any) -> bool:
    """Whether that stands for nothing: None, NaN, ``pd.NA``, ``pd.NaT`` or blank text."""
    if value is None or isinstance(value, str):
        return value is None or not value.strip()
    import pandas as pd

    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def text_of(image_id: Any) -> str | None:
    """An image id as text; None if it is missing.

    Raises:
        InputError: If it is neither text nor a whole number, so that it may not be the same twice.
    """
    if is_missing(image_id) or (isinstance(image_id, str) and image_id in WRITTEN):
        return None
    number: Any = image_id if isinstance(image_id, Real) and not isinstance(image_id, bool) else 0.5
    if isinstance(number, Integral) or float(number).is_integer():
        return str(int(number))
    if isinstance(image_id, (str, os.PathLike, UUID)):
        return str(image_id)
    raise InputError(
        f"Got image_id={image_id!r}; expected text or a whole number. Leave it out of all records to "
        "tell images by their pixels."
    )


class ImageIds:
    """The ids of the images of one dataset, record by record."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._known: dict[str, tuple[int, str]] = {}
        self._given: bool | None = None

    def add(self, record: int, image: Any, image_id: Any = None) -> tuple[str, str]:
        """The id of a record's image, and a digest of its pixels.

        Args:
            record: Its number, for messages.
            image: Whatever `LVLM.prepare` takes as an image, or a list of them.
            image_id: What the record gives, perhaps missing.

        Raises:
            InputError: If an image cannot be read, an id is given in some records only, or one id
                stands for two different pictures.
        """
        images = image if isinstance(image, (list, tuple)) else [image]
        if not images:
            raise InputError(f"Record {record} has no image; expected at least one.")
        try:
            pixels = PIXELS + "|".join(map(self._digest, images))
            name = text_of(image_id)
        except InputError as error:
            raise InputError(f"Record {record}: {error}") from error
        given = name is not None
        self._given = given if self._given is None else self._given
        if given != self._given:
            raise InputError(
                f"Record {record} has {'an' if given else 'no'} image_id, unlike record 0; expected it "
                "in all records or in none, or one image would count as two."
            )
        name = pixels if name is None else name
        first, seen = self._known.setdefault(name, (record, pixels))
        if seen != pixels:
            raise InputError(
                f"Records {first} and {record} have the image_id {name!r} and different pictures; "
                "expected one picture per id. Give every picture its own, or leave image_id out."
            )
        return name, pixels

    def _digest(self, image: Any) -> str:
        """A digest of a picture's size and pixels; a file is read once."""
        path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
        if path in self._files:
            return self._files[path]
        opened = open_image(image)
        digest = hashlib.blake2b(repr(opened.size).encode(), digest_size=8)
        digest.update(opened.tobytes())
        if path is not None:
            self._files[path] = digest.hexdigest()
        return digest.hexdigest()


def identified(records: Sequence[T]) -> list[T]:
    """Records with the id of their image in the field ``image_id``.

    Raises:
        InputError: See `ImageIds.add`.
    """
    ids = ImageIds()
    return [
        replace(it, image_id=ids.add(i, it.image, it.image_id)[0]) for i, it in enumerate(records)
    ]


def clusters_of(image_ids: Iterable[Any]) -> list[str]:
    """The same name for all records that share an image, directly or through others.

    Args:
        image_ids: Ids of a table or of records, as `ImageIds` gives them.

    Raises:
        InputError: If one is missing: questions without an image are no group.
    """
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            root[name] = name = root[root[name]]
        return name

    firsts: list[str] = []
    for place, image_id in enumerate(image_ids):
        name = text_of(image_id)
        if name is None:
            raise InputError(
                f"Got image id {image_id!r} at place {place}; expected an id for every question. Leave "
                "such lines out, or give them ids of their own."
            )
        several = name.startswith(PIXELS) and "|" in name
        first, *others = (
            [PIXELS + one for one in name[len(PIXELS) :].split("|")] if several else [name]
        )
        for other in others:
            root[find(other)] = find(first)
        firsts.append(first)
    return [find(first) for first in firsts] if root else firsts

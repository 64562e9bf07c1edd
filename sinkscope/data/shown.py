"""Pictures and what is asked about them, from a folder, a file, a stream or any iterable, one by one."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from sinkscope.checks import plain
from sinkscope.data.items import check_texts, read_record
from sinkscope.data.questions import READERS, beside, read_file
from sinkscope.errors import InputError
from sinkscope.models.pictures import ADDRESSES, FORMATS, PIXELS, open_image, text_of

MODERN = (".heic", ".heif", ".avif")  # PIL reads them with a plugin only: refused, not left out
OWN = ("image", "question", "text", "image_id")
ADVICE = "Write {'image': picture, 'question': text}, or dataset.rename_column(...)."


@dataclass(frozen=True)
class Shown:
    """One record as it is traced: small and ready to travel where its picture is a file or its bytes.

    ``number`` counts the records from 0, ``fields`` are its other columns as JSON, ``digest`` is of all it
    holds, and ``problem`` why it cannot be read, or "".
    """

    image: Any
    question: str = ""
    image_id: Any = None
    number: int = 0
    fields: str = "{}"
    digest: str = ""
    problem: str = ""


def source_of(dataset: Any) -> Iterable[Any]:
    """The records of what was given as a data set; InputError if it is none.

    The pictures of the ``datasets`` library stay files or bytes until their record is traced.
    """
    if isinstance(dataset, (str, os.PathLike)):
        path = Path(dataset).expanduser()
        if path.is_dir():
            return _in_folder(path)
        if path.suffix in READERS:
            return ({**one, "image": beside(path, one.get("image"))} for one in read_file(path))
        raise InputError(
            f"Got dataset={str(dataset)!r}; expected a folder of pictures, a file that ends in one of {READERS}, "
            "or records. For a data set of the hub write datasets.load_dataset(name, split=..., streaming=True)."
        )
    for name, feature in (getattr(dataset, "features", None) or {}).items():
        if type(feature).__name__ == "Image" and is_dataclass(feature):
            how: Any = replace(feature, decode=False)  # type: ignore[type-var]
            dataset = dataset.cast_column(name, how)
    if isinstance(dataset, (Mapping, bytes)) or not isinstance(dataset, Iterable):
        raise InputError(
            f"Got dataset of type {type(dataset).__name__}; expected records, one by one. {ADVICE}"
        )
    return dataset


def _in_folder(folder: Path) -> list[dict[str, Any]]:
    """The pictures below a folder, sorted; hidden ones are left out."""
    Image.init()
    known = {end for end, name in Image.registered_extensions().items() if name in FORMATS}
    ends, found = (*known, *MODERN), []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.suffix.lower() in ends and not hidden and path.is_file():
            found.append({"image": str(path), "image_id": name.as_posix()})
    if not found:
        raise InputError(f"Got the folder {str(folder)!r} without a picture; expected {FORMATS}.")
    return found


def chunks_of(
    records: Iterable[Any], size: int, question: str, names: Iterable[str], *, skip: bool
) -> Iterator[list[Shown]]:
    """Records of `source_of` by ``size`` at a time, read when they are asked for.

    ``question`` is for records without one, ``names`` are those that no other column may have. With ``skip``
    a record that cannot be read says so in ``problem``; else InputError, which names it.
    """
    given, numbered = None, iter(enumerate(records))
    while some := list(islice(numbered, size)):
        chunk = []
        for number, record in some:
            one = _read(record, number, question, set(names), skip)
            if not one.problem:
                named = one.image_id is not None
                given = named if given is None else given
                if named != given:
                    got = f"Record {number} has {'an' if named else 'no'} image_id, unlike those before"
                    raise InputError(f"{got}; expected it in all records or in none.")
            chunk.append(_sealed(one))
        del some
        yield chunk


def _read(record: Any, number: int, question: str, taken: set[str], skip: bool) -> Shown:
    """One record, checked; its picture is not opened."""
    if not (isinstance(record, Mapping) or hasattr(record, "image")):
        record = {"image": record}  # a picture alone
    fields = _fields_of(record, number, taken) if isinstance(record, Mapping) else "{}"
    try:
        found = read_record(record, number, Shown, advice=ADVICE)
        get = (
            record.get if isinstance(record, Mapping) else lambda name: getattr(record, name, None)
        )
        asked = next((one for one in (get("question"), get("text")) if one is not None), question)
        check_texts(number, {"question": asked}, blank=False)
        images = found["image"] if isinstance(found["image"], (list, tuple)) else [found["image"]]
        if not images:
            raise InputError(f"Record {number} has an empty list of images; expected at least one.")
        images = [_portable(image) for image in images]
        several = isinstance(found["image"], (list, tuple))
        name = text_of(found.get("image_id"))
        return Shown(images if several else images[0], asked, name, number, fields)
    except InputError as error:
        if not skip:
            raise
        return Shown(None, "", None, number, fields, problem=str(error))


def _fields_of(record: Mapping[str, Any], number: int, taken: set[str]) -> str:
    """The other columns of a record, as JSON."""
    more = {name: plain(value) for name, value in record.items() if name not in OWN}
    for name, value in more.items():
        try:
            json.dumps(value)
            problem = "the name of a column of its own" if name in taken else ""
        except (TypeError, ValueError):
            problem = f"of type {type(value).__name__}"
        if problem or not isinstance(name, str):
            raise InputError(
                f"Record {number} has the column {name!r}, {problem or 'no text'}; expected text, numbers, lists of "
                "these, True, False or None, which are kept under their names. Write "
                f"dataset.remove_columns({name!r}), or dataset.rename_column({name!r}, 'another')."
            )
    return json.dumps(more)


def _portable(image: Any) -> Any:
    """A picture that can be read again and elsewhere: an absolute path, or the bytes of an open file."""
    if isinstance(image, (str, os.PathLike)) and not str(image).startswith(ADDRESSES):
        return os.path.abspath(os.path.expanduser(image))
    read = None if isinstance(image, Image.Image) else getattr(image, "read", None)
    return image if read is None else read()


def _sealed(one: Shown) -> Shown:
    """The record with its digest, and without an id with that of its pictures as an id."""
    images = one.image if isinstance(one.image, list) else [one.image]
    digests = [digest_of_image(image) for image in images]
    parts = [one.number, digests, one.question, one.image_id, one.fields, one.problem]
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    name = PIXELS + "|".join(digests) if one.image_id is None else one.image_id
    return replace(one, image_id=name, digest=digest)


def digest_of_image(image: Any) -> str:
    """A digest of a picture: of the bytes of a file, an address, pixels, or the name of what is unreadable."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    try:
        if isinstance(image, str) and not image.startswith(ADDRESSES):
            image = Path(image).read_bytes()
        if not isinstance(image, (bytes, str)):
            picture = image if isinstance(image, Image.Image) else open_image(image)
            image = repr((picture.mode, picture.size)).encode() + picture.tobytes()
    except (InputError, OSError, SyntaxError, ValueError):
        image = repr(image)[:1000]
    return hashlib.blake2b(
        image if isinstance(image, bytes) else image.encode(), digest_size=8
    ).hexdigest()

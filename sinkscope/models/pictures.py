"""Open and convert pictures, and tell which records are about one picture."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from http.client import HTTPException
from io import BytesIO
from typing import IO, Any, TypeVar
from urllib.request import Request, urlopen
from uuid import UUID

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from torch import Tensor

from sinkscope.checks import is_number
from sinkscope.errors import InputError

ADDRESSES = ("http://", "https://", "data:", "file://")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF", "HEIF", "JPEG2000", "PPM")
"""Files that are read. PIL knows more, and starts other programs for some: Ghostscript for EPS."""
PIXELS = "pixels:"
"""How the id of an image without one begins; digests of several are joined by ``|``."""
T = TypeVar("T", bound=Any)


def open_image(image: Any) -> Image.Image:
    """A picture as people see it: upright, opaque, RGB with 8 bits.

    EXIF orientation is obeyed. Wide greys are scaled, not clipped: 16-bit values by 255/65535, floats
    from 0 to 1 by 255, each to the nearest level. Transparency lies on white. The rest is PIL's
    ``convert("RGB")``, of an animation the present frame. ``transformers`` does so in part only.

    Args:
        image: PIL image, path, URL (``http``, ``https``, ``file``, ``data``), the bytes of a file, an
            open file, a dict with bytes or path as ``datasets`` gives it, or a numpy array or tensor:
            ``[height width]``, or with 1, 3 or 4 channels first or last; bool, integers to 255 or
            65535, floats to 1 or 255. InputError if it is none of these, or no file of `FORMATS`.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path") or image
    kind = type(image).__name__
    if isinstance(image, (str, os.PathLike)):
        with _found(image) as file:
            return _read(file, repr(str(image)[:60]))
    if isinstance(image, bytes):
        return _read(BytesIO(image), kind)
    if isinstance(image, Image.Image) or hasattr(image, "read"):
        return _read(image, kind)
    if getattr(image, "shape", None) is None or not hasattr(image, "__array__"):
        known = "a PIL image, a path, a URL, bytes, a numpy array or a tensor"
        raise InputError(f"Got an image of type {kind}; expected {known}.")
    return _read(_from_array(image), kind)


def _found(place: str | os.PathLike[str]) -> IO[bytes]:
    where = os.path.expanduser(os.fspath(place))
    if os.path.isfile(where):
        return open(where, "rb")
    if not where.startswith(ADDRESSES):
        what = "a folder" if os.path.isdir(where) else "neither an existing file nor a URL"
        got = f"Got the image {where[:60]!r}, which is {what}; expected the path or URL of one"
        places = f"Paths are relative to {os.getcwd()!r}; URLs begin with {', '.join(ADDRESSES)}"
        raise InputError(f"{got}. {places}.")
    request = Request(where, headers={"User-Agent": "sinkscope"})
    try:
        with urlopen(request, timeout=20) as answer:
            return BytesIO(answer.read())
    except (OSError, ValueError, HTTPException) as error:
        got = f"Got the image {str(place)[:60]!r}, which could not be fetched ({error})"
        raise InputError(f"{got}; expected a URL within reach. Else save it as a file.") from error


def _read(given: Any, shown: str) -> Image.Image:
    """A PIL image or a file as people see it: upright, with 8 bits, on white."""
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]  # HEIF is a plugin
    try:
        opened = isinstance(given, Image.Image)
        with nullcontext(given) if opened else Image.open(given, formats=known) as picture:
            picture = ImageOps.exif_transpose(picture)
            if 0 in picture.size:
                raise InputError(f"Got an image of {picture.size} pixels; expected at least 1 x 1.")
            if picture.mode.startswith(("I", "F")):
                picture = Image.fromarray(_levels(np.asarray(picture)))
            if "A" in picture.getbands() or picture.info.get("transparency") is not None:
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture.convert("RGBA"))
            return picture.convert("RGB")
    except InputError:
        raise
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        got = f"Got {shown}, which is no readable image ({error})"
        write = "For another format write Image.open(path).convert('RGB')"
        raise InputError(f"{got}; expected one of {', '.join(FORMATS)}. {write}.") from error


def _from_array(values: Any) -> Image.Image:
    """Grey, RGB or RGBA from an array in any usual layout."""
    if isinstance(values, Tensor):
        values = (values.float() if values.is_floating_point() else values).detach().cpu()
    array = np.asarray(values)
    shape, wanted = array.shape, ""
    first, last = (array.ndim == 3 and shape[axis] in (1, 3, 4) for axis in (0, -1))
    if array.ndim == 4:
        wanted = "one picture. For several write images=list(pictures), one entry per text, or "
        wanted += "images=[list(pictures)] for one text."
    elif array.dtype.kind not in "biuf" or 0 in shape or not (array.ndim == 2 or first or last):
        wanted = "numbers [height width], or with 1, 3 or 4 channels first or last."
    elif first and last:
        wanted = "1, 3 or 4 channels either first or last, not both. Write Image.fromarray(...)."
    if wanted:
        got = f"Got an image of shape {shape} and dtype {array.dtype}"
        raise InputError(f"{got}; expected {wanted}")
    array = np.moveaxis(array, 0, -1) if first else array
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    return Image.fromarray(np.ascontiguousarray(_levels(array)))


def _levels(array: np.ndarray) -> np.ndarray:
    """Values as 8 bits: integers from 255 or 65535, floats from 1 or 255, bool from 1."""
    if array.dtype == np.uint8:
        return array
    if not np.isfinite(array).all():
        raise InputError("Got an image with NaN or infinite values; expected finite ones.")
    low, high = float(array.min()), float(array.max())
    small, large = (1, 255) if array.dtype.kind in "bf" else (255, 65535)
    sixteen = array.dtype.kind == "u" and array.dtype.itemsize == 2
    full = large if high > small or sixteen else small
    nearly = full == 255 and array.dtype.kind == "f" and high < 2
    if low < 0 or high > full or nearly:
        got = f"Got an image of dtype {array.dtype} with values from {low:g} to {high:g}; expected"
        write = (
            "Scale it, or write array.clip(0, 1); normalised pixels go in as prepare(inputs=...)."
        )
        raise InputError(f"{got} 0 to {small} or {large}. {write}")
    return np.rint(array.astype(np.float64) * (255 / full)).astype(np.uint8)


def not_scaled(pixels: Tensor, processor: Any) -> str:
    """Say how model inputs differ from what an image processor makes, if nobody normalised them.

    Such pixels are never negative, and larger than twice what the brightest white becomes.
    """
    scaled = getattr(processor, "do_rescale", True)
    highest = 255.0 * (getattr(processor, "rescale_factor", None) or 1 / 255) if scaled else 255.0
    mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    if getattr(processor, "do_normalize", False) and mean is not None and std is not None:
        highest = float(((highest - np.asarray(mean)) / np.asarray(std)).max())
    if processor is None or not pixels.numel():
        return ""
    low, high = pixels.flatten(1).amin(dim=1), pixels.flatten(1).amax(dim=1)
    strange = (low >= 0) & (high > 2 * highest)
    where = int(strange.int().argmax())
    return f"{float(low[where]):g} to {float(high[where]):g}" if bool(strange.any()) else ""


def is_missing(value: Any) -> bool:
    """Whether that stands for nothing: None, NaN, ``pd.NA``, ``pd.NaT`` or blank text."""
    blank = isinstance(value, str) and not value.strip()
    return blank or bool(pd.api.types.is_scalar(value) and pd.isna(value))


def text_of(image_id: Any) -> str | None:
    """An image id as text; None if it is missing, also where that has been turned into text."""
    if is_missing(image_id):
        return None
    if isinstance(image_id, (str, os.PathLike, UUID)):
        return None if image_id in ("nan", "None", "<NA>", "NaT") else str(image_id)
    if is_number(image_id) and float(image_id).is_integer():
        return str(int(image_id))
    got = f"Got image_id={image_id!r}; expected text or a whole number"
    raise InputError(f"{got}. Leave it out of all records to tell images by their pixels.")


class ImageIds:
    """The ids of the images of one dataset, record by record."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._known: dict[str, tuple[int, str]] = {}
        self._given: bool | None = None

    def add(self, record: int, image: Any, image_id: Any = None) -> tuple[str, str]:
        """The id of a record's image, or images, and a digest of their pixels.

        InputError if an image cannot be read, some records only have an id, or one id has two pictures.
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
            got = f"Record {record} has {'an' if given else 'no'} image_id, unlike record 0; expected it"
            raise InputError(f"{got} in all records or in none, or one image would count as two.")
        name = pixels if name is None else name
        first, seen = self._known.setdefault(name, (record, pixels))
        if seen != pixels:
            got = f"Records {first} and {record} have the image_id {name!r} and different pictures"
            write = "Give every picture its own, or leave image_id out."
            raise InputError(f"{got}; expected one picture per id. {write}")
        return name, pixels

    def _digest(self, image: Any) -> str:
        """A digest of a picture's size and pixels; a file is read once."""
        path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else ""
        if not path or path not in self._files:
            opened = open_image(image)
            pixels = repr(opened.size).encode() + opened.tobytes()
            self._files[path] = hashlib.blake2b(pixels, digest_size=8).hexdigest()
        return self._files[path]


def identified(records: Sequence[T]) -> list[T]:
    """Records with the id of their image in the field ``image_id``; see `ImageIds.add`."""
    add = ImageIds().add
    return [replace(r, image_id=add(i, r.image, r.image_id)[0]) for i, r in enumerate(records)]


def clusters_of(image_ids: Iterable[Any]) -> list[str]:
    """One name for records that share an image, also through others; InputError if an id is missing."""
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            root[name] = name = root[root[name]]
        return name

    firsts: list[str] = []
    for place, image_id in enumerate(image_ids):
        name = text_of(image_id)
        if name is None:
            got = f"Got image id {image_id!r} at place {place}; expected an id for every question"
            raise InputError(f"{got}. Leave such lines out, or give them ids of their own.")
        many = name.removeprefix(PIXELS).split("|") if name.startswith(PIXELS) else ()
        first, *others = [PIXELS + part for part in many] or [name]
        for other in others:
            root[find(other)] = find(first)
        firsts.append(first)
    return [find(first) for first in firsts]

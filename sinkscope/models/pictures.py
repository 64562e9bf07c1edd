"""A picture as people see it, out of whatever users hold: the only place that opens or converts one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from http.client import HTTPException
from io import BytesIO
from typing import IO, Any
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sinkscope.errors import InputError

ADDRESSES = ("http://", "https://", "data:", "file://")
PATIENCE = 20
"""Seconds to wait for a server."""
CHANNELS = (1, 3, 4)
NOT_READABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
)
"""What PIL raises on a file that is no image, is cut off, or is absurdly large."""


def open_image(image: Any) -> Image.Image:
    """A picture as people see it: upright, opaque, RGB with 8 bits.

    EXIF orientation is obeyed. Wide greys are scaled, not clipped: 16-bit values by 255/65535, floats
    from 0 to 1 by 255, each to the nearest level. Transparency lies on white. The rest is PIL's
    ``convert("RGB")``; of an animation it is the present frame, the first of a file.

    ``transformers`` obeys orientation in files that it opens, and not in pictures that it is handed. It
    drops transparency in files, and in pictures too before 5.23, which puts these on white. It clips
    wide greys.

    Args:
        image: PIL image, path, URL (``http``, ``https``, ``file``, ``data``), the bytes of a file, an
            open file, a dict with bytes or path as ``datasets`` gives it, or a numpy array or tensor:
            ``[height width]``, or with 1, 3 or 4 channels first or last; bool, integers to 255 or
            65535, floats to 1 or 255.

    Raises:
        InputError: If it is none of these, is not there, or cannot be read.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path") or image
    if isinstance(image, Image.Image):
        return _read(image, str(image))
    if isinstance(image, (str, os.PathLike)):
        shown = repr(str(image)[:60])
        with _found(image, shown) as file:
            return _read(file, shown)
    if isinstance(image, bytes) or hasattr(image, "read"):
        return _read(BytesIO(image) if isinstance(image, bytes) else image, type(image).__name__)
    if getattr(image, "shape", None) is None or not hasattr(image, "__array__"):
        raise InputError(
            f"Got an image of type {type(image).__name__}; expected a PIL image, a path, a URL, bytes, "
            "a numpy array or a tensor."
        )
    return _as_seen(_from_array(image))


def _read(given: Any, shown: str) -> Image.Image:
    """A PIL image or a file as people see it.

    Raises:
        InputError: If PIL cannot read it, or its values have no known range.
    """
    try:
        if isinstance(given, Image.Image):
            return _as_seen(given)
        with Image.open(given) as opened:
            return _as_seen(opened)
    except InputError:
        raise
    except NOT_READABLE as error:
        raise InputError(
            f"Got {shown}, which is no readable image ({error}); expected a PNG, JPEG or other file "
            "that PIL opens."
        ) from error


def check_place(image: Any, who: str = "Got") -> None:
    """Refuse a path without a file, before long work; what is no path or URL, and URLs, pass.

    Args:
        image: What `open_image` takes.
        who: How the message begins.

    Raises:
        InputError: If there is no such file.
    """
    if not isinstance(image, (str, os.PathLike)):
        return
    where = os.path.expanduser(os.fspath(image))
    if os.path.isfile(where) or where.startswith(ADDRESSES):
        return
    what = "a folder" if os.path.isdir(where) else "neither an existing file nor a URL"
    raise InputError(
        f"{who} the image {where[:60]!r}, which is {what}; expected the path or URL of a picture. Paths "
        f"are relative to {os.getcwd()!r}; URLs begin with {', '.join(ADDRESSES)}."
    )


def _found(place: str | os.PathLike[str], shown: str) -> IO[bytes]:
    """The file at a path or a URL.

    Raises:
        InputError: If there is none.
    """
    check_place(place)
    where = os.path.expanduser(os.fspath(place))
    if os.path.isfile(where):
        return open(where, "rb")
    try:
        with urlopen(
            Request(where, headers={"User-Agent": "sinkscope"}), timeout=PATIENCE
        ) as answer:
            return BytesIO(answer.read())
    except (OSError, ValueError, HTTPException) as error:
        raise InputError(
            f"Got the image {shown}, which could not be fetched ({error}); expected a URL that this "
            "machine reaches. Otherwise save it and write the path of the file."
        ) from error


def _as_seen(picture: Image.Image) -> Image.Image:
    """Upright, with 8 bits, on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        picture = Image.fromarray(_levels(np.asarray(picture)))
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _from_array(values: Any) -> Image.Image:
    """Grey, RGB or RGBA from an array in any usual layout.

    Raises:
        InputError: If it has no such layout.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    array = np.asarray(values)
    shape = tuple(array.shape)
    what = f"Got an image of shape {shape} and dtype {array.dtype}; expected "
    if array.ndim == 4:
        raise InputError(
            f"{what}one picture. For several write images=list(pictures), one entry per text, or "
            "images=[list(pictures)] for one text."
        )
    if array.ndim == 3 and 0 not in shape:
        first, last = shape[0] in CHANNELS, shape[-1] in CHANNELS
        if first and last:
            raise InputError(
                f"{what}1, 3 or 4 channels either first or last, and here both could be. Write "
                "Image.fromarray(...)."
            )
        array = np.moveaxis(array, 0, -1) if first else array
        array = array[..., 0] if array.shape[-1] == 1 else array
    if (
        array.dtype.kind not in "biuf"
        or 0 in shape
        or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in CHANNELS))
    ):
        raise InputError(f"{what}numbers [height width], or with 1, 3 or 4 channels first or last.")
    return Image.fromarray(np.ascontiguousarray(_levels(array)))


def _levels(array: np.ndarray) -> np.ndarray:
    """Values as 8 bits: integers from 255 or 65535, floats from 1 or 255, bool from 1.

    Raises:
        InputError: If they lie outside, or are not finite.
    """
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
        raise InputError(
            f"Got an image of dtype {array.dtype} with values from {low:g} to {high:g}; expected 0 to "
            f"{small} or 0 to {large}. Write image.clip(0, {small}) or scale it; pixels that are "
            "normalised already go in as lvlm.prepare(inputs=...)."
        )
    return np.rint(array.astype(np.float64) * (255 / full)).astype(np.uint8)

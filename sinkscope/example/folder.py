"""The assembled model in the user's cache: where it lies, and how it comes there once."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sinkscope.errors import CheckpointError, InputError
from sinkscope.example import layout
from sinkscope.example.sources import HUB_LANGUAGE, HUB_VISION, WHEELS, missing

HUB = "hub"
ROOM = 640_000_000
"""Bytes that the assembled model takes, a little more than it has."""
HUB_WARNING = (
    "source='hub' takes SmolLM2 and DINOv2 from the hub. The example's projector and LoRA were trained on "
    "weights rounded to four bits, so this is another model, 'example (hub)', whose accuracy nobody measured."
)
ELSEWHERE = "Write load_example(cache='FOLDER') or set SINKSCOPE_CACHE."


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where sinkscope keeps what it fetched and made.

    Args:
        cache: A folder; None for SINKSCOPE_CACHE, else ``sinkscope`` in XDG_CACHE_HOME or ``~/.cache``.
    """
    given = cache or os.environ.get("SINKSCOPE_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sinkscope"


def wheel_folder(cache: Path) -> Path:
    """Where pip's wheels lie in a cache."""
    return cache / "wheels"


def model_folder(cache: Path, *, hub: bool = False) -> Path:
    """Where the assembled model lies in a cache; the name holds a digest of what it is made of."""
    sources = [HUB_LANGUAGE, HUB_VISION] if hub else [wheel.sha256 for wheel in WHEELS]
    name = "example-hub" if hub else "example"
    return cache / f"{name}-{layout.VERSION}-{layout.digest(sources)}"


def given_wheels(source: str | Path | None) -> Path | None:
    """The folder with both wheels that was named, in the call or by SINKSCOPE_WHEELS; None if none was.

    Raises:
        InputError: If it is no folder.
    """
    given = source or os.environ.get("SINKSCOPE_WHEELS")
    if not given:
        return None
    folder = Path(given).expanduser()
    if folder.is_dir():
        return folder
    name, also = ("source", f", or source={HUB!r}") if source else ("SINKSCOPE_WHEELS", "")
    raise InputError(
        f"Got {name}={str(given)!r}, which is no folder; expected one with {WHEELS[0].file} and "
        f"{WHEELS[1].file}{also}."
    )


def find_or_make(
    source: str | Path | None, cache: str | Path | None, progress: bool | None
) -> Path:
    """See `sinkscope.example.example_path`."""
    hub = source == HUB
    given = given_wheels(source) if source and not hub else None
    place = cache_folder(cache)
    folder = model_folder(place, hub=hub)
    if hub:
        warnings.warn(HUB_WARNING, stacklevel=2)
    if folder.is_dir():
        return folder
    from sinkscope.example import assembly, fetching

    if hub:
        with _made(folder) as made:
            assembly.assemble_from_hub(made, progress)
        return folder
    assembly.check_readers()
    given = given or given_wheels(None)
    wheels = given or wheel_folder(place)
    if given is None and missing(wheels):
        fetching.fetch(wheels, progress)
    with _made(folder) as made:
        assembly.assemble(made, wheels, progress)
    return folder


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """A new model folder; it appears whole or not at all.

    Raises:
        CheckpointError: If it cannot be written, or the disk has no room.
    """
    from sinkscope.folders import folder_whole

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < ROOM:
            raise CheckpointError(
                f"Got {free / 1e6:,.0f} MB free in {str(folder.parent)!r}; expected "
                f"{ROOM / 1e6:,.0f} MB, which assembling the example model takes. {ELSEWHERE}"
            )
        with folder_whole(folder) as made:
            yield made
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"Got the cache {str(folder.parent)!r}, where the example model cannot be written "
            f"({error}); expected a folder to write to, with {ROOM / 1e6:,.0f} MB free. {ELSEWHERE}"
        ) from error

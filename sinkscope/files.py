"""Folders that long runs write to: files appear whole or not at all, and say what runs there."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from sinkscope.errors import CheckpointError, InputError

WRITING = ".writing"  # ends the name of a file that is not whole yet, behind its process
LOCK = ".lock"  # what a running process holds; the file stays behind, and nobody holds it then


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all, also after a loss of power."""
    made = path.with_name(f"{path.name}.{os.getpid()}{WRITING}")
    with made.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    made.replace(path)


@contextmanager
def folder_whole(path: Path) -> Iterator[Path]:
    """A folder that takes its name when the block ends, whole or not at all, also after a loss of power.

    If another process was first, its folder stays. What dead processes left half-written is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in filter(_abandoned, path.parent.glob(f"{path.name}.*{WRITING}")):
        shutil.rmtree(left, ignore_errors=True)
    made = path.with_name(f"{path.name}.{uuid4().hex[:8]}.{os.getpid()}{WRITING}")
    made.mkdir()
    try:
        yield made
        for file in filter(Path.is_file, made.rglob("*")):
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        try:
            made.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def read_json(path: Path, advice: str) -> Any:
    """The content of a JSON file; ``advice`` ends the `CheckpointError` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last: nested too deeply
        raise CheckpointError(
            f"Got {str(path)!r}, which cannot be read as JSON ({type(error).__name__}: {error}); "
            f"expected the file as it was written. {advice}"
        ) from error


def _abandoned(file: Path) -> bool:
    """Whether the process that wrote a half-written file is gone; on Windows asking would end it."""
    pid = file.name.removesuffix(WRITING).rpartition(".")[2]
    if not pid.isdecimal() or sys.platform == "win32":
        return not pid.isdecimal()
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, PermissionError, OverflowError) as error:
        return isinstance(error, ProcessLookupError)
    return False


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Lock a folder against other processes until this one ends; ``what`` names a run in messages.

    Without locks (Windows, some file systems) nobody is kept out.
    """
    with _writable(folder):
        file = (folder / LOCK).open("a+", encoding="utf-8")
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(
                f"Got out={str(folder)!r}, where another {what} runs now (process "
                f"{file.read().strip() or 'unknown'}); wait until it ends, or write out='another folder'."
            ) from error
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def check_place(folder: Path, name: str, what: str) -> None:
    """Refuse a folder that is a file, holds other files, or cannot be written; nothing is left behind.

    ``name`` is the file that notes what runs, ``what`` what a run is called, such as ``"sweep"``.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    with _writable(folder):
        _make(folder, name, what)
        for place in missing:
            place.rmdir()
        if not missing and not os.access(folder, os.W_OK):
            raise PermissionError(f"no permission to write to {str(folder)!r}")


def claim(folder: Path, name: str, manifest: Mapping[str, Any], what: str) -> None:
    """Write a JSON-ready manifest to the folder of its run; refuse another run, with every difference."""
    ours, noted = json.loads(json.dumps(manifest)), folder / name
    with _writable(folder):
        _make(folder, name, what)
        for left in filter(_abandoned, folder.glob(f"*{WRITING}")):
            left.unlink(missing_ok=True)
        if not noted.exists():
            write_whole(noted, json.dumps(ours, indent=1) + "\n")
            return
    before = read_json(noted, f"Remove {str(folder)!r} to start again.")
    if lines := "\n  ".join(_differing(before, ours)):
        raise InputError(
            f"Got out={str(folder)!r}, which holds another {what}; expected the same settings, data "
            f"and model to continue it.\n  {lines}\nWrite out='another folder', or remove this one."
        )


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Say which folder could not be written."""
    try:
        yield
    except OSError as error:
        what = f"Got out={str(folder)!r}, which cannot be written ({error}); expected a folder."
        raise CheckpointError(what) from error


def _make(folder: Path, name: str, what: str) -> None:
    """Make a folder, unless it is a file or holds other files and no manifest."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"Got out={str(folder)!r}, which is a file; expected a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    others = [f for f in folder.iterdir() if f.name != LOCK and not f.name.endswith(WRITING)]
    if others and not (folder / name).exists():
        raise InputError(
            f"Got out={str(folder)!r}, a folder with other files and no {name}; expected a new "
            f"folder, or one of a {what} that is to be continued."
        )


def _differing(before: Any, now: Any, name: str = "") -> list[str]:
    """One line per value that differs between two trees of plain data."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        each = (_differing(before.get(k), now.get(k), f"{name}.{k}".lstrip(".")) for k in keys)
        return [line for lines in each for line in lines]
    texts = (json.dumps(value) for value in (before, now))
    there, here = (text if len(text) <= 120 else text[:117] + "..." for text in texts)
    return [] if before == now else [f"{name}: there {there}, here {here}"]

"""Folders that long runs write to: files appear whole or not at all, and say what runs there."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from sinkscope.errors import CheckpointError, InputError

WRITING = ".writing"
"""How the name of a file ends that is not whole yet; the process that writes it stands before."""
LOCK = ".lock"
"""The file that a running process holds; it stays behind, and nobody holds it then."""


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
    """A folder that is there whole or not at all, also after a loss of power.

    What is written goes to a folder beside it, which takes the name when the block has ended. If
    another process was first, its folder stays. What dead processes left half-written is removed.

    Args:
        path: The folder; what it lies in is made if it is missing.

    Yields:
        The folder to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{path.name}.*{WRITING}"):
        if abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    made = path.with_name(f"{path.name}.{uuid4().hex[:8]}.{os.getpid()}{WRITING}")
    made.mkdir()
    try:
        yield made
        for file in made.rglob("*"):
            if file.is_file():
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
    """The content of a JSON file.

    Args:
        path: The file.
        advice: What to do if it is none: the end of the message.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last: nested too deeply
        raise CheckpointError(
            f"Got {str(path)!r}, which cannot be read as JSON ({type(error).__name__}: {error}); "
            f"expected the file as it was written. {advice}"
        ) from error


def alive(pid: int) -> bool:
    """Whether a process of this number runs here; where that cannot be asked, it is taken to."""
    if sys.platform == "win32":  # there, asking would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def abandoned(file: Path) -> bool:
    """Whether a half-written file belongs to a process that runs no more."""
    pid = file.name.removesuffix(WRITING).rpartition(".")[2]
    return not (pid.isdecimal() and alive(int(pid)))


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes from running in a folder; the system lets go of it if this one is killed.

    A file system or a platform without locks keeps nobody out.

    Args:
        folder: The folder, which exists.
        what: What a run is called, such as ``"sweep"``.

    Raises:
        InputError: If another run holds it.
        CheckpointError: If the lock cannot be written.
    """
    try:
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise _not_writable(folder, error) from error
    with file:
        if not _locked(file):
            file.seek(0)
            raise InputError(
                f"Got out={str(folder)!r}, where another {what} runs now (process "
                f"{file.read().strip() or 'unknown'}); expected a folder that nobody writes to. Wait "
                "until it ends, or write out='another folder'."
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _locked(file: IO[str]) -> bool:
    """Lock an open file until it is closed; whether nobody else had."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return True
    return True


def check_place(folder: Path, name: str, what: str) -> None:
    """Refuse a place where no run can be written; nothing is left behind there.

    Args:
        folder: The folder, which need not exist.
        name: The name of the manifest in it.
        what: What a run is called, such as ``"sweep"``.

    Raises:
        InputError: If it is a file, or holds other files.
        CheckpointError: If it cannot be made or read.
    """
    _refuse_file(folder)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_others(folder, name, what)
        if missing:
            for place in missing:
                place.rmdir()
        elif not os.access(folder, os.W_OK):
            raise PermissionError(f"no permission to write to {str(folder)!r}")
    except OSError as error:
        raise _not_writable(folder, error) from error


def _refuse_file(folder: Path) -> None:
    """Refuse a file where a folder is expected."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"Got out={str(folder)!r}, which is a file; expected a folder.")


def _refuse_others(folder: Path, name: str, what: str) -> None:
    """Refuse a folder with files of something else."""
    others = [f for f in folder.iterdir() if f.name != LOCK and not f.name.endswith(WRITING)]
    if others and not (folder / name).exists():
        raise InputError(
            f"Got out={str(folder)!r}, a folder with other files and no {name}; expected a new "
            f"folder, or one of a {what} that is to be continued."
        )


def _not_writable(folder: Path, error: OSError) -> CheckpointError:
    """What to say of a folder that cannot be written."""
    return CheckpointError(
        f"Got out={str(folder)!r}, which cannot be written ({error}); expected a folder."
    )


def claim(folder: Path, name: str, manifest: Mapping[str, Any], what: str) -> None:
    """Note in a folder what runs there, or compare it with what was noted.

    Args:
        folder: The folder; it is made if it is missing.
        name: The name of the manifest in it.
        manifest: What is run, as JSON-ready values.
        what: What a run is called, such as ``"sweep"``.

    Raises:
        InputError: If it is a file, or holds another run (with every difference) or other files.
        CheckpointError: If it cannot be read or written.
    """
    _refuse_file(folder)
    ours, noted = json.loads(json.dumps(manifest)), folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_others(folder, name, what)
        for left in folder.glob(f"*{WRITING}"):
            if abandoned(left):
                left.unlink(missing_ok=True)
        if not noted.exists():
            write_whole(noted, json.dumps(ours, indent=1) + "\n")
            return
    except OSError as error:
        raise _not_writable(folder, error) from error
    lines = differing(read_json(noted, f"Remove {str(folder)!r} to start again."), ours)
    if lines:
        listed = "\n  ".join(lines)
        raise InputError(
            f"Got out={str(folder)!r}, which holds another {what}; expected the same settings, data "
            f"and model to continue it.\n  {listed}\nWrite out='another folder', or remove this one."
        )


def differing(before: Any, now: Any, name: str = "") -> list[str]:
    """One line per value that differs between two trees of plain data."""
    if isinstance(before, dict) and isinstance(now, dict):
        out = []
        for key in sorted({*before, *now}):
            inner = f"{name}.{key}" if name else str(key)
            out += differing(before.get(key), now.get(key), inner)
        return out
    return [] if before == now else [f"{name}: there {_short(before)}, here {_short(now)}"]


def _short(value: Any) -> str:
    """A value in a message."""
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."

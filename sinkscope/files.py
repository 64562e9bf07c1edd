"""Folders that long runs write to: files appear whole or not at all, and say what runs there.

What is read again is sealed: a SHA-256 of all that is loaded tells whether it is as it was written. Nothing
is written through a link.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import EEXIST
from importlib import import_module, metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

from sinkscope.checks import check_path
from sinkscope.errors import CheckpointError, InputError

WRITING = ".writing"  # ends the name of a file that is not whole yet, behind its process
LOCK = ".lock"  # what a running process holds; the file stays behind, and nobody holds it then
AGAIN = "Delete this file and start the same again: what is done is read, not done anew."
SEAL = "sha256"  # the key under which data hold the digest of all that is loaded with them
DONE = re.compile(  # what runs leave; it is sealed
    r"part-\d{6,}\.parquet|checkpoint-\d{6,}|report|"
    r"(images|sinks|control)-\d{6,}-[0-9a-f]{16}\.parquet|part-\d{6,}-[0-9a-f]{16}\.json|end\.json"
)


def cache_folder(cache: str | Path | None = None) -> Path:
    """The folder of a cache; None for SINKSCOPE_CACHE, else ``sinkscope`` in XDG_CACHE_HOME or ``~/.cache``."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    chosen = cache or os.environ.get("SINKSCOPE_CACHE") or home / "sinkscope"
    check_path(cache=chosen)
    return Path(chosen).expanduser()


def version_of(package: str) -> str:
    """Give the version of a package; if it is on the path and not installed, the one its source states."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return str(getattr(import_module(package), "__version__", "not installed"))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all, also after a loss of power.

    OSError if it cannot be written; what was there is then still there, and nothing else is. A link, a
    folder or a device in its place is one too: nothing is written through it.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError(EEXIST, "A link, folder or device is there; remove it first", str(path))
    made = path.with_name(_new_name(path))
    try:
        with made.open("xb") as file:  # x: a new file, never one behind a link
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)
    finally:
        with suppress(OSError):
            made.unlink()


@contextmanager
def folder_whole(path: Path) -> Iterator[Path]:
    """A folder that takes its name when the block ends, whole or not at all, also after a loss of power.

    If another process was first, its folder stays. What dead processes left half-written is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in filter(_abandoned, path.parent.glob(f"{path.name}.*{WRITING}")):
        shutil.rmtree(left, ignore_errors=True)
    made = path.with_name(_new_name(path))
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
        with suppress(OSError):  # the new name is on the disk too; Windows opens no folders
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _new_name(path: Path) -> str:
    """A name that no file has, for what is not whole yet."""
    return f"{path.name[:50]}.{uuid4().hex[:8]}.{os.getpid()}{WRITING}"


def read_json(path: Path, advice: str) -> Any:
    """The content of a JSON file; ``advice`` ends the `CheckpointError` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last: nested too deeply
        raise CheckpointError(
            f"Got {str(path)!r}, which cannot be read as JSON ({type(error).__name__}: {error}); "
            f"expected the file as it was written. {advice}"
        ) from error


def digest_of(data: Any, *parts: Any) -> str:
    """The SHA-256 of JSON-ready data and of the bytes of ``parts``."""
    out = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
    for part in parts:
        out.update(part)
    return out.hexdigest()


def seal(data: Mapping[str, Any], *parts: Any) -> dict[str, Any]:
    """JSON-ready data with a digest of them and of what is loaded with them, under `SEAL`."""
    return {**data, SEAL: digest_of(data, *parts)}


def unseal(found: Any, path: Path, advice: str, *parts: Any) -> dict[str, Any]:
    """The data that `seal` was given; CheckpointError, which ``advice`` ends, if anything is different."""
    data = dict(found) if isinstance(found, dict) else {}
    if data.pop(SEAL, None) != digest_of(data, *parts):
        raise CheckpointError(
            f"Got {str(path)!r}, which does not fit its digest (damaged, changed, of another run, or by an "
            f"earlier sinkscope); expected it as it was written. {advice}"
        )
    return data


def _abandoned(file: Path) -> bool:
    """Whether the process that wrote a half-written file is gone; on Windows asking would end it."""
    pid = file.name.removesuffix(WRITING).rpartition(".")[2]
    if not pid.isdecimal() or sys.platform == "win32":
        return False
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

    def opened(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)

    with writable(folder):
        file = open(folder / LOCK, "rb+", buffering=0, opener=opened)  # noqa: SIM115
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            known = file.read(20).decode(errors="replace").strip()
            raise InputError(
                f"Got out={str(folder)!r}, where another {what} runs now (process "
                f"{known or 'unknown'}); wait until it ends, or write out='another folder'."
            ) from error
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        with writable(folder):
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
        yield


def check_place(folder: Path, name: str, what: str) -> None:
    """Refuse a folder that is a file, holds other files, or cannot be written; nothing is left behind.

    ``name`` is the file that notes what runs, ``what`` what a run is called, such as ``"sweep"``.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    with writable(folder):
        _make(folder, name, what)
        for place in missing:
            place.rmdir()
        if not missing and not os.access(folder, os.W_OK):
            raise PermissionError(f"no permission to write to {str(folder)!r}")


def claim(folder: Path, name: str, manifest: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Write a JSON-ready manifest to the folder of its run; refuse another run, with every difference.

    Returns the manifest as it is read again. Nothing is written if it is there.
    """
    ours, noted = json.loads(json.dumps(manifest)), folder / name
    with writable(folder):
        _make(folder, name, what)
        for left in filter(_abandoned, folder.glob(f"*{WRITING}")):
            with suppress(OSError):  # on a disk that is read only it may stay
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not noted.exists():
            write_whole(noted, json.dumps(seal(ours), indent=1) + "\n")
            return ours
    found = read_json(noted, AGAIN)
    before = {k: v for k, v in found.items() if k != SEAL} if isinstance(found, dict) else None
    lines = [] if before is None else _differing(before, ours)
    if before and lines and found in (before, seal(before)):  # whole, or by a version without seals
        listed = "\n  ".join(lines)
        raise InputError(
            f"Got out={str(folder)!r}, which holds another {what}; expected the same settings, data "
            f"and model to continue it.\n  {listed}\nWrite out='another folder', or remove this one."
        )
    return unseal(found, noted, AGAIN)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turn an OSError of a block that writes to a folder into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"Got out={str(folder)!r}, which cannot be written ({error}); expected a folder with room "
            "and permission to write, and no links in it. What was there before is still there."
        ) from error


def _make(folder: Path, name: str, what: str) -> None:
    """Make a folder, unless it is a file or holds other files and no manifest."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"Got out={str(folder)!r}, which is a file; expected a folder.")
    if not folder.is_dir():  # a disk that is read only refuses even one that is there
        folder.mkdir(parents=True, exist_ok=True)
    names = (f.name for f in folder.iterdir() if f.name != LOCK and not f.name.endswith(WRITING))
    if not (folder / name).exists() and not all(map(DONE.fullmatch, names)):
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

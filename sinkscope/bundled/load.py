"""Load the bundled model as an LVLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkscope.bundled import load_bundled_hf
from sinkscope.models.lvlm import LVLM

if TYPE_CHECKING:
    import torch


def load_bundled(dtype: torch.dtype | str = "float32", attn_implementation: str = "sdpa") -> LVLM:
    """The small trained LVLM inside the package; no network is used.

    Args:
        dtype: What to compute in.
        attn_implementation: ``"sdpa"`` or ``"eager"``.

    Returns:
        The model, in evaluation mode on the CPU. What it can do and which sinks it has stands in
        its model card, ``ss.bundled.bundled_path() / "README.md"``.
    """
    model, processor = load_bundled_hf(dtype, attn_implementation)
    lvlm = LVLM(model, processor)
    lvlm.name = "bundled"
    return lvlm

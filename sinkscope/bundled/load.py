"""Load the bundled model as an LVLM."""

from __future__ import annotations

import torch

from sinkscope.bundled import load_bundled_hf
from sinkscope.models.lvlm import LVLM


def load_bundled(dtype: torch.dtype | str = "float32", attn_implementation: str = "sdpa") -> LVLM:
    """The small trained LVLM inside the package, in evaluation mode on the CPU; no network is used.

    ``attn_implementation`` is ``"sdpa"`` or ``"eager"``. What the model can do and which sinks it has stands
    in its model card, ``ss.bundled.bundled_path() / "README.md"``.
    """
    model, processor = load_bundled_hf(dtype, attn_implementation)
    lvlm = LVLM(model, processor)
    lvlm.name = "bundled"
    return lvlm

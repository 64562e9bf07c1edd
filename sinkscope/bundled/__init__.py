"""The small trained vision-language model that ships with the package, and the scenes it knows.

The model has two million parameters in the LLaVA-1.5 layout and was trained until it answers correctly;
nothing about its attention was planted. Its card, `bundled_path() / "README.md"`, has what was measured.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkscope.bundled.scenes import (
    TASKS,
    TEST_SEEDS,
    TRAIN_SEEDS,
    VALIDATION_SEEDS,
    Question,
    Scene,
    SceneObject,
    all_questions,
    ask,
    draw_scene,
    scene_attributes,
    scene_questions,
)

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from sinkscope.models.lvlm import LVLM

__all__ = ["TASKS", "TEST_SEEDS", "TRAIN_SEEDS", "VALIDATION_SEEDS", "Question", "Scene"]
__all__ += ["SceneObject", "all_questions", "ask", "bundled_path", "draw_scene", "load_bundled"]
__all__ += ["load_bundled_hf", "scene_attributes", "scene_questions"]


def bundled_path() -> Path:
    """The folder of the stored model, as `from_pretrained` takes it."""
    return Path(__file__).parent / "weights"


def load_bundled(dtype: torch.dtype | str = "float32", attn_implementation: str = "sdpa") -> LVLM:
    """Load the small trained LVLM of the package, in evaluation mode on the CPU; no network is used.

    ``attn_implementation`` is ``"sdpa"`` or ``"eager"``. The model card is ``bundled_path() / "README.md"``.
    """
    from sinkscope.models.lvlm import LVLM

    lvlm = LVLM(*load_bundled_hf(dtype, attn_implementation))
    lvlm.name = "bundled"
    lvlm._made_by = partial(load_bundled, dtype, attn_implementation)
    return lvlm


def load_bundled_hf(
    dtype: torch.dtype | str = "float32", attn_implementation: str = "sdpa"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load it as a plain transformers model and its processor; ``"eager"`` can return attention patterns."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    path = bundled_path()
    how: Any = {"dtype": dtype, "attn_implementation": attn_implementation}
    model = LlavaForConditionalGeneration.from_pretrained(path, local_files_only=True, **how)
    return model.eval(), LlavaProcessor.from_pretrained(path, local_files_only=True)

"""Tiny random models of every image-text-to-text type of the pinned `transformers`, and inputs for them.

    model = build("qwen3_vl")
    inputs = inputs_of("qwen3_vl", model, shape=2)
    logits = model(**inputs).logits

`TYPES` has every type that `transformers` lists for image-text-to-text, with None or, for those that are not built or
not run here, the reason. `variant` puts another text decoder or vision tower into LLaVA.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from tiny_families.configs import CHANGES
from tiny_families.inputs import inputs_of
from tiny_families.makers import MAKERS
from tiny_families.making import made
from tiny_families.sizes import small_config
from tiny_families.variants import DECODERS, TOWERS, VARIANTS_NOT_RUN, variant, variant_inputs

__all__ = [
    "DECODERS",
    "NEED_TIMM",
    "NOT_RUN",
    "TOWERS",
    "TYPES",
    "VARIANTS_NOT_RUN",
    "build",
    "inputs_of",
    "variant",
    "variant_inputs",
]

NOT_RUN = {
    "evolla": "reads proteins, no images",
    "pi0": "a robot's policy: its output is motion, not text",
    "pix2struct": "an encoder-decoder: no image tokens stand in the text",
    "pp_formulanet": "an encoder-decoder: no image tokens stand in the text",
    "udop": "an encoder-decoder: no image tokens stand in the text",
    "vision-encoder-decoder": "an encoder-decoder: no image tokens stand in the text",
}
NEED_TIMM = ("fast_vlm", "gemma3n", "perception_lm")
TYPES: dict[str, str | None] = {
    name: NOT_RUN.get(name) for name in sorted({*MAKERS, *NOT_RUN}) if "+" not in name
}
# types whose decoder or tower knows no other attention
_EAGER = ("blip", "git", "got_ocr2", "inkling2", "pp_chart2table")


def _load_timm() -> bool:
    """Import the library that some towers come from, if it is installed, before `transformers` looks for it.

    It imports torchvision, of which these towers use nothing. Where torchvision is built for another torch, its
    operators are missing; a declaration of two of them lets it be imported all the same.
    """
    if importlib.util.find_spec("timm") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        _DECLARED.define("nms(Tensor boxes, Tensor scores, float limit) -> Tensor")
        _DECLARED.define("qnms(Tensor boxes, Tensor scores, float limit) -> Tensor")
    importlib.import_module("timm")
    return True


_DECLARED = torch.library.Library("torchvision", "FRAGMENT")
_TIMM = _load_timm()


def build(model_type: str, attn: str = "sdpa") -> Any:
    """Build a tiny random model of a type, in evaluation mode, with the same weights at each call.

    Args:
        model_type: One of `TYPES` without a reason not to run.
        attn: The attention implementation; a few types take "eager" whatever is asked.
    """
    reason = TYPES[model_type]
    if reason is not None:
        raise ValueError(f"{model_type} is not built here: {reason}")
    names = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if model_type not in names:
        raise ValueError(f"transformers {transformers.__version__} has no type {model_type}")
    if model_type in NEED_TIMM and not _TIMM:
        raise ModuleNotFoundError(f"{model_type} has a tower of timm: pip install timm")
    config = small_config(CONFIG_MAPPING[model_type], CHANGES.get(model_type, {}))
    return made(
        getattr(transformers, names[model_type]), config, "eager" if model_type in _EAGER else attn
    )

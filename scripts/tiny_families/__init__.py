"""Tiny random models of every image-text-to-text type of the pinned `transformers`, and inputs for them.

    model = build("qwen3_vl")
    inputs = inputs_of("qwen3_vl", model, shape=2)
    logits = model(**inputs).logits

`TYPES` has every type that `transformers` lists for image-text-to-text, with None or, for those that are not built or
not run here, the reason. `variant` puts another text decoder or vision tower into LLaVA.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from tiny_families.configs import CHANGES
from tiny_families.inputs import inputs_of
from tiny_families.pictures import MAKERS
from tiny_families.sizes import small_config
from tiny_families.weights import randomize

__all__ = ["NOT_RUN", "TYPES", "build", "inputs_of"]

NOT_RUN = {
    "evolla": "reads proteins, no images",
    "pi0": "a robot's policy: its output is motion, not text",
    "pix2struct": "an encoder-decoder: the decoder reads no image tokens",
    "pp_formulanet": "an encoder-decoder: the decoder reads no image tokens",
    "udop": "an encoder-decoder: the decoder reads no image tokens",
    "vision-encoder-decoder": "an encoder-decoder: the decoder reads no image tokens",
}
TYPES: dict[str, str | None] = {
    name: NOT_RUN.get(name) for name in sorted({*MAKERS, *NOT_RUN})
}
# types whose decoder or tower knows no other attention
_ATTENTION = dict.fromkeys(
    ("blip", "git", "got_ocr2", "pp_chart2table", "inkling2", "inkling_mm_model"), "eager"
)


def build(model_type: str, attn: str = "sdpa") -> Any:
    """Build a tiny random model of a type, in evaluation mode, with the same weights at each call.

    Args:
        model_type: One of `TYPES` without a reason not to run.
        attn: The attention implementation; a few types take "eager" whatever is asked.
    """
    reason = TYPES[model_type]
    if reason is not None:
        raise ValueError(f"{model_type} is not built here: {reason}")
    config = small_config(CONFIG_MAPPING[model_type], CHANGES.get(model_type, {}))
    name = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    return made(getattr(transformers, name), config, _ATTENTION.get(model_type, attn))


def made(kind: type[nn.Module], config: PreTrainedConfig, attn: str) -> Any:
    """Make a model of a class and give it random weights."""
    config._attn_implementation = attn
    torch.manual_seed(0)
    model = kind(config)
    randomize(model)
    return model.eval()

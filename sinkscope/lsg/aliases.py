"""Names under which other code bases and the hub know models of one architecture.

Sizes are those of the published configs. A checkpoint that was converted has the same sizes and, up
to rounding, the same weights, so a gate for the one is a gate for the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

MODEL_ALIASES = MappingProxyType(
    {
        "llava_llama": "llava",  # config.model_type of the original LLaVA code
        "LlavaLlamaForCausalLM": "llava",  # its architecture
        "LlavaForConditionalGeneration": "llava",
        "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
        "Gemma3ForConditionalGeneration": "gemma3",
    }
)
"""Model types and class names, and what ``transformers`` calls the type."""

TOWER = MappingProxyType(  # CLIP ViT-L/14-336, read at its second-last block
    {
        "model_type": "llava",
        "vision_layers": 24,
        "vision_width": 1024,
        "feed_layers": [22],
        "tokens_merged": 1,
    }
)
LLAVA_7B = MappingProxyType(
    {
        **TOWER,
        "language_layers": 32,
        "language_width": 4096,
        "heads": 32,
        "kv_heads": 32,
        "head_dim": 128,
    }
)
LLAVA_13B = MappingProxyType(
    {
        **TOWER,
        "language_layers": 40,
        "language_width": 5120,
        "heads": 40,
        "kv_heads": 40,
        "head_dim": 128,
    }
)
BASES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "liuhaotian/llava-v1.5-7b": LLAVA_7B,
        "llava-hf/llava-1.5-7b-hf": LLAVA_7B,
        "liuhaotian/llava-v1.5-13b": LLAVA_13B,
        "llava-hf/llava-1.5-13b-hf": LLAVA_13B,
    }
)
"""Repositories and the fingerprint of what they hold."""


def canonical(made_for: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint in the words of this library.

    Args:
        made_for: A fingerprint, perhaps with a foreign ``model_type``, or with ``base``, a
            repository, in place of what it does not say itself.

    Returns:
        The fingerprint. An unknown ``base`` stays in it, so that it shows as a difference.
    """
    out = dict(made_for)
    base = out.get("base")
    if isinstance(base, str) and base in BASES:
        out = {**BASES[base], **{name: value for name, value in out.items() if name != "base"}}
    kind = out.get("model_type")
    if isinstance(kind, str):
        out["model_type"] = MODEL_ALIASES.get(kind, kind)
    return out

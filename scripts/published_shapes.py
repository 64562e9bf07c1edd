"""Measure the anatomy of published shapes without their weights, and print a line for each.

    python scripts/published_shapes.py [NAME ...]

The models are built on the meta device from sizes written down here, so nothing is downloaded. What needs weights
(attention sums, additions, the lens) is not proven: the report says "declared".
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import sinkscope as ss

Sizes = dict[str, Any]


def text(model_type: str, width: int, inner: int, layers: int, heads: int, **more: Any) -> Sizes:
    """The sizes of a decoder."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return {"model_type": model_type, **sizes, "num_attention_heads": heads, **more}


def tower(model_type: str, width: int, inner: int, layers: int, patch: int, **more: Any) -> Sizes:
    """The sizes of a vision tower with 16 heads."""
    return text(model_type, width, inner, layers, 16, patch_size=patch, **more)


def turned(*sections: int) -> Sizes:
    """Rotary positions in three sections."""
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}


def siglip(size: int, layers: int = 27, model_type: str = "siglip_vision_model") -> Sizes:
    """SigLIP so400m for images of a size."""
    how = {} if model_type != "siglip_vision_model" else {"vision_use_head": False}
    return tower(model_type, 1152, 4304, layers, 14, image_size=size, **how)


QWEN2_7B = text("qwen2", 3584, 18944, 28, 28, num_key_value_heads=4, vocab_size=152000)
SHAPES: dict[str, tuple[str, Sizes]] = {
    "llava-1.5-7b": (
        "llava",
        {
            "vision_config": tower("clip_vision_model", 1024, 4096, 24, 14, image_size=336),
            "text_config": text("llama", 4096, 11008, 32, 32, vocab_size=32064),
            "image_token_id": 32000,
            "vision_feature_layer": -2,
        },
    ),
    "llava-onevision-7b": (
        "llava_onevision",
        {"vision_config": siglip(384, 26), "text_config": QWEN2_7B, "image_token_id": 151646},
    ),
    "qwen2.5-vl-7b": (
        "qwen2_5_vl",
        {
            "text_config": QWEN2_7B
            | {
                "model_type": "qwen2_5_vl_text",
                "vocab_size": 152064,
                "rope_parameters": turned(16, 24, 24),
            },
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
            },
        },
    ),
    "qwen3-vl-8b": (
        "qwen3_vl",
        {
            "text_config": text(
                "qwen3_vl_text",
                4096,
                12288,
                36,
                32,
                num_key_value_heads=8,
                head_dim=128,
                vocab_size=151936,
                rope_parameters=turned(24, 20, 20),
            ),
            "vision_config": {
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "out_hidden_size": 4096,
                "deepstack_visual_indexes": [8, 16, 24],
            },
        },
    ),
    "internvl3-8b": (
        "internvl",
        {
            "vision_config": tower("internvl_vision", 1024, 4096, 24, 14, image_size=[448, 448])
            | {"patch_size": [14, 14]},
            "text_config": QWEN2_7B,
            "image_token_id": 151667,
        },
    ),
    "gemma-3-12b": (
        "gemma3",
        {
            "vision_config": siglip(896),
            "text_config": text(
                "gemma3_text",
                3840,
                15360,
                48,
                16,
                num_key_value_heads=8,
                head_dim=256,
                vocab_size=262208,
            ),
        },
    ),
    "mistral-small-3.1": (
        "mistral3",
        {
            "vision_config": tower("pixtral", 1024, 4096, 24, 14, image_size=1540),
            "text_config": text(
                "mistral",
                5120,
                32768,
                40,
                32,
                num_key_value_heads=8,
                head_dim=128,
                vocab_size=131072,
            ),
            "image_token_id": 10,
        },
    ),
    "idefics3-8b": (
        "idefics3",
        {
            "vision_config": siglip(364, model_type="idefics3_vision"),
            "text_config": text(
                "llama", 4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128259
            ),
            "image_token_id": 128257,
        },
    ),
    "smolvlm2-2.2b": (
        "smolvlm",
        {
            "vision_config": siglip(384, model_type="smolvlm_vision"),
            "text_config": text("llama", 2048, 8192, 24, 32, vocab_size=49280),
            "scale_factor": 3,
            "image_token_id": 49190,
        },
    ),
}


def main(names: list[str]) -> int:
    """Print a Markdown table; 1 if an anatomy could not be measured."""
    warnings.filterwarnings("ignore")
    print(
        "| shape | seconds | vision blocks that feed | enter above (decoder, vision) | CLS | merge |"
    )
    print("|---|---|---|---|---|---|")
    missing = 0
    for name in names or SHAPES:
        model_type, sizes = SHAPES[name]
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type](**sizes))
        start = time.perf_counter()
        a = ss.LVLM(model).anatomy
        took, missing = time.perf_counter() - start, missing + (not a.measured)
        enters = ", ".join(map(str, a.enters)) or "none"
        cls = "dropped" if a.drops else "kept" if "cls" in a.prefix else "none"
        feeds = f"{', '.join(map(str, a.feeds))} of {a.vision.n_layers}"
        line = (name, f"{took:.0f}", feeds, enters, cls, f"{a.merge} x {a.merge}")
        print(f"| {' | '.join(line)} |", flush=True)
    return int(missing > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

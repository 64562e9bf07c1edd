"""SmolLM2-135M-Instruct out of a GGUF, and the LoRA that taught it to read image tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sinkscope.example import layout

NAME = "base_model.model."
"""What peft puts in front of a module's path."""


def read_language(file: Path) -> tuple[Any, Any]:
    """The language model in float32 and its tokenizer, from a GGUF.

    Args:
        file: The GGUF; its weights of four bits are dequantised.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are full numbers now
    return model, AutoTokenizer.from_pretrained(file.parent, **where)


@torch.no_grad()
def merge_lora(model: Any) -> None:
    """Add the shipped LoRA to the weights: ``W + alpha / r * B A``, in float32."""
    settings = json.loads(layout.LORA_CONFIG.read_text(encoding="utf-8"))
    scale = settings["lora_alpha"] / settings["r"]
    tensors = load_file(layout.LORA)
    for name, a in tensors.items():
        path, is_a, _ = name.partition(".lora_A.weight")
        if is_a:
            b = tensors[f"{path}.lora_B.weight"]
            weight = model.get_submodule(path.removeprefix(NAME)).weight
            weight += scale * (b.float() @ a.float())

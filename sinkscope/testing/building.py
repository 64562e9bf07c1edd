"""What the builders of tiny models share: random weights, sizes, checkpoints and images."""

import pathlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

ModelAndProcessor = tuple[PreTrainedModel, ProcessorMixin]

HEAD_DIM = 16


def write_checkpoint(
    model: PreTrainedModel, processor: ProcessorMixin, folder: str | pathlib.Path
) -> pathlib.Path:
    """Save model and processor the way a hub repository holds them; return the folder.

    ``AutoModelForImageTextToText.from_pretrained(folder)`` loads the model offline, and
    ``AutoProcessor.from_pretrained(folder)`` the processor. For Qwen2.5-VL the latter needs
    torchvision, a limit of transformers; `load_processor` does without.
    """
    where = pathlib.Path(folder)
    model.save_pretrained(where)
    processor.save_pretrained(where)
    return where


def random_image(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
    """RGB image of random 8 x 8 pixel blocks, the same for the same arguments.

    Raises:
        ValueError: a side below one pixel.
    """
    if width < 1 or height < 1:
        raise ValueError(f"random_image needs positive sides, got width={width}, height={height}")
    blocks = (-(-height // 8), -(-width // 8))
    colours = np.random.default_rng(seed).integers(0, 256, size=(*blocks, 3), dtype=np.uint8)
    pixels = colours.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return Image.fromarray(pixels)


def randomize(model: nn.Module, generator: torch.Generator, std: float) -> None:
    """Overwrite every parameter of `model` with random values that keep activations in range.

    Matrices get ``std``; embeddings five times it, so text is not drowned by what blocks write;
    biases half of it; norm scales one plus that, those of queries and keys 1.5 plus that; learned
    sink logits ten times it; LayerScale factors are uniform between 0.1 and 1.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            if "embed" in name and parameter.ndim == 2:
                parameter.copy_(5 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.copy_(noise / 2 + 1.5)
            elif name.endswith(".sinks"):
                parameter.copy_(10 * noise)
            elif "lambda" in name:
                parameter.copy_(0.1 + 0.9 * torch.special.ndtr(noise / std))
            else:
                parameter.copy_(noise / 2 + float(name.endswith("weight")))


def build(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    attn_implementation: str,
    dtype: torch.dtype,
    seed: int,
    init_std: float,
) -> PreTrainedModel:
    """Model of `config` in eval mode with random weights of `seed`; the global RNG is untouched.

    Only parameters are cast to `dtype`: rotary frequencies stay in float32, as after
    ``from_pretrained``.
    """
    config._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]):
        model = model_class(config)
    randomize(model, torch.Generator().manual_seed(seed), init_std)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def text_settings(
    processor: ProcessorMixin, layers: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    """Settings every LLM config takes; ids from the tokenizer."""
    tokenizer = processor.tokenizer
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HEAD_DIM * heads,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def check_choice(argument: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse an unknown value with ``ValueError``."""
    if value not in known:
        raise ValueError(f"{argument}={value!r} is unknown; write one of {', '.join(known)}")


def check_divides(small: str, divisor: int, large: str, number: int) -> None:
    """Refuse a number that is no multiple with ``ValueError``."""
    if divisor < 1 or number % divisor:
        raise ValueError(f"{large}={number} must be a multiple of {small}={divisor}")

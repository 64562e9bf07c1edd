"""Tiny random vision-language models of real transformers classes, with their processors."""

import functools
import pathlib
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CohereConfig,
    Dinov2Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from sinkscope.testing.processors import (
    QWEN_MERGE,
    QWEN_PATCH,
    QWEN_TEMPORAL,
    WITH_CLS,
    gemma3_processor,
    llava_processor,
    qwen2_5_vl_processor,
)

ModelAndProcessor = tuple[PreTrainedModel, ProcessorMixin]
HEAD_DIM = 16


def write_checkpoint(
    model: PreTrainedModel, processor: ProcessorMixin, folder: str | pathlib.Path
) -> pathlib.Path:
    """Save model and processor the way a hub repository holds them; return the folder.

    The Auto classes of transformers load both offline; for Qwen2.5-VL's processor they need torchvision,
    `load_processor` does not.
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
    *,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    init_std: float = 0.2,
) -> PreTrainedModel:
    """Model of `config` in eval mode with random weights of `seed`; the global RNG is untouched.

    Only parameters are cast to `dtype`: rotary frequencies stay in float32, as after ``from_pretrained``.
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


def check_blocks(argument: str, blocks: tuple[int, ...], total: str, count: int) -> None:
    """Refuse block indices out of range with ``ValueError``."""
    if any(not 0 <= block < count for block in blocks):
        raise ValueError(
            f"{argument}={blocks}: expected block indices in 0..{count - 1} ({total}={count})"
        )


SLIDING, FULL = "sliding_attention", "full_attention"


def tiny_gemma3(
    *,
    vision_layers: int = 3,
    layers: int = 3,
    full_attention_layers: tuple[int, ...] = (1,),
    sliding_window: int = 12,
    heads: int = 4,
    kv_heads: int = 2,
    image_size: int = 48,
    patch_size: int = 8,
    pool: int = 2,
    **how: Any,
) -> ModelAndProcessor:
    """Random ``Gemma3ForConditionalGeneration`` in eval mode, and its processor.

    A SigLIP tower whose patches are average-pooled, ``pool x pool`` to an LLM token: at the defaults
    6 x 6 patches become 9 tokens. In the LLM queries and keys are normed, the logits' scale is not
    ``1 / sqrt(head_dim)``, tokens of one image see each other in both directions, and all layers but
    ``full_attention_layers`` see the last ``sliding_window`` positions only.

    Args:
        vision_layers: see `tiny_llava`, as are all that are not named here.
        layers: blocks of the LLM.
        full_attention_layers: LLM blocks without a sliding window.
        sliding_window: positions a query sees in the other blocks, itself among them.
        heads: query heads of the LLM.
        kv_heads: key and value heads of the LLM.
        image_size: side in pixels of the square the processor makes of every image.
        patch_size: side of a patch in pixels.
        pool: patches per side of an LLM token; ``pool * patch_size`` must divide `image_size`.
        how: attn_implementation, dtype, seed and init_std; see `tiny_llava`.

    Raises:
        ValueError: head counts, sizes or block indices that do not fit.
    """
    check_divides("kv_heads", kv_heads, "heads", heads)
    check_divides("pool * patch_size", pool * patch_size, "image_size", image_size)
    check_blocks("full_attention_layers", full_attention_layers, "layers", layers)
    tokens = (image_size // patch_size // pool) ** 2
    processor = gemma3_processor(image_size, tokens)
    tokenizer = processor.tokenizer
    kinds = [FULL if block in full_attention_layers else SLIDING for block in range(layers)]
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=patch_size,
            vision_use_head=False,
        ),
        text_config=Gemma3TextConfig(
            **text_settings(processor, layers, heads, kv_heads),
            head_dim=HEAD_DIM,
            query_pre_attn_scalar=4 * HEAD_DIM,
            sliding_window=sliding_window,
            layer_types=kinds,
        ),
        mm_tokens_per_image=tokens,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    return build(Gemma3ForConditionalGeneration, config, **how), processor


TOWERS = ("clip", "siglip", "dinov2")
LLMS = MappingProxyType(
    {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "gpt_oss": GptOssConfig,
        "gemma2": Gemma2Config,
        "olmo2": Olmo2Config,
        "glm4": Glm4Config,
        "granite": GraniteConfig,
        "cohere": CohereConfig,
    }
)
OWN_SETTINGS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        # Both experts are always on: which of them come first would depend on the last bit.
        "gpt_oss": {
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "sliding_window": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "gemma2": {"sliding_window": 12},
        "granite": {"residual_multiplier": 0.22},
    }
)


def tiny_llava(
    tower: str = "clip",
    llm: str = "llama",
    *,
    vision_layers: int = 3,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    image_size: int = 32,
    patch_size: int = 8,
    vision_feature_select_strategy: Literal["default", "full"] | None = None,
    **how: Any,
) -> ModelAndProcessor:
    """Random ``LlavaForConditionalGeneration`` in eval mode, and its processor.

    Args:
        tower: ``"clip"`` (CLS token, ``vision_feature_layer=-2``, CLS dropped), ``"dinov2"`` (the
            same, and LayerScale factors from 0.1 to 1 on what attention and MLP write) or
            ``"siglip"`` (no CLS, ``vision_feature_layer=-1``, all tokens kept, pooling head off).
        llm: ``"llama"`` (no biases), ``"qwen2"`` (q/k/v biases), ``"qwen3"`` (q/k norms),
            ``"gpt_oss"`` (a learned sink logit per head, every other block sees the last 12
            positions only, two experts), ``"gemma2"``, ``"olmo2"`` and ``"glm4"`` (a norm on what
            attention and MLP write), ``"granite"`` (a factor of 0.22 on it) or ``"cohere"`` (both
            side by side). GPT-OSS and Gemma 2 need ``attn_implementation="eager"``.
        vision_layers: blocks of the ViT.
        layers: blocks of the LLM.
        heads: query heads of the LLM, of 16 channels each; the width is ``16 * heads``.
        kv_heads: key and value heads of the LLM; must divide `heads`.
        image_size: side in pixels of the square the processor makes of every image.
        patch_size: side of a patch in pixels; must divide `image_size`.
        vision_feature_select_strategy: ``"default"`` drops the first ViT token, ``"full"`` keeps
            CLS; None as the tower's line says.
        how: ``attn_implementation="sdpa"`` as in transformers (``"eager"`` can return attention
            weights); ``dtype`` and ``seed=0`` of the weights; ``init_std=0.2``, the standard
            deviation of the random weight matrices.

    Raises:
        ValueError: an unknown tower, llm or strategy, head counts or sizes that do not divide.
    """
    check_choice("tower", tower, TOWERS)
    check_choice("llm", llm, tuple(LLMS))
    check_divides("kv_heads", kv_heads, "heads", heads)
    check_divides("patch_size", patch_size, "image_size", image_size)
    has_cls = tower in WITH_CLS
    strategy = vision_feature_select_strategy or ("default" if has_cls else "full")
    check_choice("vision_feature_select_strategy", strategy, ("default", "full"))
    if has_cls and vision_layers < 2:
        raise ValueError(
            f"vision_layers={vision_layers}: a LLaVA on {tower} reads the output of the last but one "
            "block; write vision_layers=2 or more"
        )
    processor = llava_processor(tower, image_size, patch_size, strategy)
    settings = text_settings(processor, layers, heads, kv_heads)
    settings |= {"head_dim": HEAD_DIM} | OWN_SETTINGS.get(llm, {})
    config = LlavaConfig(
        vision_config=_vision_config(tower, vision_layers, image_size, patch_size),
        text_config=LLMS[llm](**settings),
        image_token_index=processor.image_token_id,
        image_seq_length=(image_size // patch_size) ** 2 + has_cls - (strategy == "default"),
        vision_feature_layer=-2 if has_cls else -1,
        vision_feature_select_strategy=strategy,
    )
    return build(LlavaForConditionalGeneration, config, **how), processor


def tiny_qwen2_5_vl(
    *,
    vision_layers: int = 4,
    full_attention_blocks: tuple[int, ...] = (1, 3),
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    window_size: int = 56,
    min_pixels: int = 56 * 56,
    max_pixels: int = 140 * 140,
    **how: Any,
) -> ModelAndProcessor:
    """Random ``Qwen2_5_VLForConditionalGeneration`` in eval mode, and its image processor.

    Patches of 14 pixels, 2 x 2 of them merged into one LLM token, three-axis RoPE, and a windowed
    ViT: at the default ``window_size`` a window holds 4 x 4 patches, that is 2 x 2 LLM tokens, and a
    112 x 112 image has four windows. Images keep their shape, so grids are ragged over a batch.

    Args:
        vision_layers: see `tiny_llava`, as are all that are not named here.
        full_attention_blocks: ViT blocks that attend over the whole image; the others stay inside
            their window.
        layers: blocks of the LLM.
        heads: query heads of the LLM.
        kv_heads: key and value heads of the LLM.
        window_size: side of a window in pixels, a multiple of 28.
        min_pixels: images below this area are enlarged.
        max_pixels: images above this area are reduced.
        how: attn_implementation, dtype, seed and init_std; see `tiny_llava`.

    Raises:
        ValueError: head counts, window size or block indices that do not fit.
    """
    check_divides("kv_heads", kv_heads, "heads", heads)
    check_divides("2 * 14", QWEN_MERGE * QWEN_PATCH, "window_size", window_size)
    check_blocks("full_attention_blocks", full_attention_blocks, "vision_layers", vision_layers)
    processor = qwen2_5_vl_processor(min_pixels, max_pixels)
    tokenizer: Any = processor.tokenizer
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": vision_layers,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 4,
            "patch_size": QWEN_PATCH,
            "spatial_merge_size": QWEN_MERGE,
            "temporal_patch_size": QWEN_TEMPORAL,
            "window_size": window_size,
            "fullatt_block_indexes": list(full_attention_blocks),
            "out_hidden_size": HEAD_DIM * heads,
        },
        text_config=text_settings(processor, layers, heads, kv_heads) | {"rope_parameters": rope},
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        vision_end_token_id=tokenizer.vision_eos_token_id,
    )
    return build(Qwen2_5_VLForConditionalGeneration, config, **how), processor


def _vision_config(tower: str, layers: int, image_size: int, patch_size: int) -> PreTrainedConfig:
    """CLIP, SigLIP or DINOv2 tower of width 48 with 4 heads."""
    settings: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    if tower == "dinov2":
        return Dinov2Config(**settings, mlp_ratio=2)
    settings["intermediate_size"] = 96
    if tower == "clip":
        return CLIPVisionConfig(**settings)
    return SiglipVisionConfig(**settings, vision_use_head=False)


TINY: MappingProxyType[str, Callable[..., ModelAndProcessor]] = MappingProxyType(
    {
        "llava-clip-llama": functools.partial(tiny_llava, "clip", "llama"),
        "llava-siglip-qwen2": functools.partial(tiny_llava, "siglip", "qwen2"),
        "llava-siglip-qwen3": functools.partial(tiny_llava, "siglip", "qwen3"),
        "llava-dinov2-olmo2": functools.partial(
            tiny_llava, "dinov2", "olmo2", vision_feature_select_strategy="full"
        ),
        "qwen2.5-vl": tiny_qwen2_5_vl,
        "gemma3": tiny_gemma3,
    }
)
"""Builders by family; each takes the keyword arguments of its function."""

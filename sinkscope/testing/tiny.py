"""Tiny random vision-language models of real transformers classes, with their processors."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers as hf
from PIL import Image
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from sinkscope.checks import check_choice, check_whole
from sinkscope.errors import InputError
from sinkscope.models.loading import ImageQwen2_5_VLProcessor
from sinkscope.testing import processors
from sinkscope.testing.processors import WITH_CLS

ModelAndProcessor = tuple[PreTrainedModel, ProcessorMixin]
HEAD_DIM = 16


def write_checkpoint(model: PreTrainedModel, processor: ProcessorMixin, folder: str | Path) -> Path:
    """Save model and processor the way a hub repository holds them; `load_processor` loads the second offline."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def random_image(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
    """RGB image of random 8 x 8 pixel blocks; InputError for a side below one pixel."""
    check_whole(1, width=width, height=height)
    blocks = (-(-height // 8), -(-width // 8))
    colours = np.random.default_rng(seed).integers(0, 256, size=(*blocks, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(8, axis=0).repeat(8, axis=1)[:height, :width])


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator, std: float) -> None:
    """Overwrite every parameter with random values that keep activations in range.

    Embeddings are larger, so that text stays visible; LayerScale factors are uniform between 0.1 and 1.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        if parameter.ndim > 1:
            value = 5 * noise if "embed" in name and parameter.ndim == 2 else noise
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            value = noise / 2 + 1.5
        elif name.endswith(".sinks"):
            value = 10 * noise
        elif "lambda" in name:
            value = 0.1 + 0.9 * torch.special.ndtr(noise / std)
        else:
            value = noise / 2 + float(name.endswith("weight"))
        parameter.copy_(value)


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
    processor: ProcessorMixin, layers: int, heads: int, kv_heads: int, head_dim: int = HEAD_DIM
) -> dict[str, Any]:
    """Settings every LLM config takes; ids from the tokenizer."""
    check_divides("kv_heads", kv_heads, "heads", heads)
    tokenizer = processor.tokenizer
    ids = {f"{x}_token_id": getattr(tokenizer, f"{x}_token_id") for x in ("bos", "eos", "pad")}
    ids |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    sizes = {"vocab_size": len(tokenizer), "hidden_size": head_dim * heads, "intermediate_size": 96}
    return {**ids, **sizes, "num_hidden_layers": layers, "max_position_embeddings": 2048}


def vision_config(
    tower: str, layers: int, image_size: int, patch_size: int, width: int = 48, inner: int = 96
) -> PreTrainedConfig:
    """CLIP, SigLIP or DINOv2 tower with 4 heads."""
    settings: dict[str, Any] = {"num_attention_heads": 4, "image_size": image_size}
    settings |= {"hidden_size": width, "num_hidden_layers": layers, "patch_size": patch_size}
    if tower == "dinov2":
        return hf.Dinov2Config(**settings, mlp_ratio=2)
    if tower == "clip":
        return hf.CLIPVisionConfig(**settings, intermediate_size=inner)
    return hf.SiglipVisionConfig(**settings, intermediate_size=inner, vision_use_head=False)


def llava_config(
    tower: str, processor: Any, vision: PreTrainedConfig, text: PreTrainedConfig
) -> hf.LlavaConfig:
    """A LLaVA; behind a tower with CLS its projector reads the last block but one."""
    has_cls, strategy = tower in WITH_CLS, processor.vision_feature_select_strategy
    tokens = (vision.image_size // vision.patch_size) ** 2 + has_cls - (strategy == "default")
    reads: Any = {"vision_feature_layer": -2 if has_cls else -1, "image_seq_length": tokens}
    reads |= {"vision_feature_select_strategy": strategy}
    reads |= {"image_token_index": processor.image_token_id}
    return hf.LlavaConfig(vision_config=vision, text_config=text, **reads)


def check_divides(small: str, divisor: int, large: str, number: int) -> None:
    """Refuse a number that is no multiple."""
    if divisor < 1 or number % divisor:
        raise InputError(f"Got {large}={number}; expected a multiple of {small}={divisor}.")


# Both experts are always on: which of them come first would depend on the last bit.
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLMS: Mapping[str, Callable[..., PreTrainedConfig]] = {
    "llama": hf.LlamaConfig,
    "qwen2": hf.Qwen2Config,
    "qwen3": hf.Qwen3Config,
    "gpt_oss": partial(hf.GptOssConfig, **EXPERTS, sliding_window=12, rope_parameters=ROPE),
    "gemma2": partial(hf.Gemma2Config, sliding_window=12),
    "olmo2": hf.Olmo2Config,
    "glm4": hf.Glm4Config,
    "granite": partial(hf.GraniteConfig, residual_multiplier=0.22),
    "cohere": hf.CohereConfig,
}


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
        tower: ``"clip"`` (CLS token, ``vision_feature_layer=-2``, CLS dropped), ``"dinov2"`` (the same,
            and LayerScale) or ``"siglip"`` (no CLS, ``vision_feature_layer=-1``, all tokens kept).
        llm: ``"llama"`` (no biases), ``"qwen2"`` (q/k/v biases), ``"qwen3"`` (q/k norms), ``"gpt_oss"``
            (a learned sink logit per head, every other block sees the last 12 positions only, two
            experts), ``"gemma2"``, ``"olmo2"`` and ``"glm4"`` (a norm on what attention and MLP write),
            ``"granite"`` (a factor of 0.22 on it) or ``"cohere"`` (both side by side). GPT-OSS and
            Gemma 2 need ``attn_implementation="eager"``.
        vision_layers: blocks of the ViT; ``layers`` those of the LLM.
        heads: query heads of the LLM, of 16 channels each; ``kv_heads`` must divide it.
        image_size: side in pixels of the square that is made of every image; ``patch_size`` must divide it.
        vision_feature_select_strategy: ``"default"`` drops the first ViT token, ``"full"`` keeps CLS;
            None as the tower's line says.
        how: ``attn_implementation="sdpa"``; ``dtype`` and ``seed=0`` of the weights; ``init_std=0.2``,
            the standard deviation of the random weight matrices.

    InputError for an unknown tower, llm or strategy, and counts, sizes or block indices that do not fit.
    """
    check_choice(("clip", "siglip", "dinov2"), tower=tower)
    check_choice(LLMS, llm=llm)
    check_divides("patch_size", patch_size, "image_size", image_size)
    has_cls = tower in WITH_CLS
    strategy = vision_feature_select_strategy or ("default" if has_cls else "full")
    check_choice(("default", "full"), vision_feature_select_strategy=strategy)
    reads = f"A LLaVA on {tower} reads the output of its last block{' but one' if has_cls else ''}."
    check_whole(1 + has_cls, hint=reads, vision_layers=vision_layers)
    processor = processors.llava_processor(tower, image_size, patch_size, strategy)
    settings = text_settings(processor, layers, heads, kv_heads)
    vision = vision_config(tower, vision_layers, image_size, patch_size)
    config = llava_config(tower, processor, vision, LLMS[llm](**settings, head_dim=HEAD_DIM))
    return build(hf.LlavaForConditionalGeneration, config, **how), processor


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
    ``full_attention_layers`` see the last ``sliding_window`` positions only. ``pool * patch_size`` must
    divide ``image_size``; the other arguments are those of `tiny_llava`, and so are the errors.
    """
    check_divides("pool * patch_size", pool * patch_size, "image_size", image_size)
    for block in full_attention_layers:
        check_whole(0, layers - 1, full_attention_layers=block)
    tokens = (image_size // patch_size // pool) ** 2
    images = hf.Gemma3ImageProcessorPil(size={"height": image_size, "width": image_size})
    settings: Any = {"chat_template": processors.GEMMA_CHAT, "image_seq_length": tokens}
    processor = hf.Gemma3Processor(images, processors.gemma_tokenizer(), **settings)
    kinds = ["full" if block in full_attention_layers else "sliding" for block in range(layers)]
    text: Any = text_settings(processor, layers, heads, kv_heads) | {"head_dim": HEAD_DIM}
    text |= {"query_pre_attn_scalar": 4 * HEAD_DIM, "sliding_window": sliding_window}
    text["layer_types"] = [f"{kind}_attention" for kind in kinds]
    tokenizer: Any = processor.tokenizer
    config = hf.Gemma3Config(
        vision_config=vision_config("siglip", vision_layers, image_size, patch_size),
        text_config=hf.Gemma3TextConfig(**text),
        mm_tokens_per_image=tokens,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    return build(hf.Gemma3ForConditionalGeneration, config, **how), processor


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
    ViT: at the default ``window_size`` (in pixels, a multiple of 28) a window holds 4 x 4 patches, that
    is 2 x 2 LLM tokens, and a 112 x 112 image has four windows; ``full_attention_blocks`` attend over
    the whole image. Images keep their shape, so grids are ragged over a batch, and are scaled to an
    area from ``min_pixels`` to ``max_pixels``. Other arguments and errors are those of `tiny_llava`.
    """
    check_divides("2 * 14", 2 * 14, "window_size", window_size)
    for block in full_attention_blocks:
        check_whole(0, vision_layers - 1, full_attention_blocks=block)
    tokenizer: Any = processors.qwen_tokenizer()
    area: Any = {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}}
    images = hf.Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2, **area)
    processor = ImageQwen2_5_VLProcessor(images, tokenizer, chat_template=processors.QWEN_CHAT)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision: Any = {"depth": vision_layers, "num_heads": 4, "hidden_size": 64}
    vision |= {"intermediate_size": 96, "out_hidden_size": HEAD_DIM * heads}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"window_size": window_size, "fullatt_block_indexes": list(full_attention_blocks)}
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text_settings(processor, layers, heads, kv_heads) | {"rope_parameters": rope},
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        vision_end_token_id=tokenizer.vision_eos_token_id,
    )
    return build(hf.Qwen2_5_VLForConditionalGeneration, config, **how), processor


TINY: Mapping[str, Callable[..., ModelAndProcessor]] = {
    "llava-clip-llama": partial(tiny_llava, "clip", "llama"),
    "llava-siglip-qwen2": partial(tiny_llava, "siglip", "qwen2"),
    "llava-siglip-qwen3": partial(tiny_llava, "siglip", "qwen3"),
    "llava-dinov2-olmo2": partial(
        tiny_llava, "dinov2", "olmo2", vision_feature_select_strategy="full"
    ),
    "qwen2.5-vl": tiny_qwen2_5_vl,
    "gemma3": tiny_gemma3,
}
"""Builders by family; each takes the keyword arguments of its function."""

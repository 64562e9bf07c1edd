"""A tiny random Gemma 3: sliding windows, image tokens that see each other, pooled patches."""

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

from sinkscope.testing.building import (
    HEAD_DIM,
    ModelAndProcessor,
    build,
    check_divides,
    text_settings,
)
from sinkscope.testing.processors import gemma3_processor

SLIDING, FULL = "sliding_attention", "full_attention"


def tiny_gemma3(
    *,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vision_layers: int = 3,
    layers: int = 3,
    full_attention_layers: tuple[int, ...] = (1,),
    sliding_window: int = 12,
    heads: int = 4,
    kv_heads: int = 2,
    image_size: int = 48,
    patch_size: int = 8,
    pool: int = 2,
    init_std: float = 0.2,
) -> ModelAndProcessor:
    """Random ``Gemma3ForConditionalGeneration`` in eval mode, and its processor.

    A SigLIP tower whose patches are average-pooled, ``pool x pool`` to an LLM token: at the defaults
    6 x 6 patches become 9 tokens. In the LLM queries and keys are normed, the logits' scale is not
    ``1 / sqrt(head_dim)``, tokens of one image see each other in both directions, and all layers but
    ``full_attention_layers`` see the last ``sliding_window`` positions only.

    Args:
        attn_implementation: as in transformers; ``"eager"`` can return attention weights.
        dtype: of the weights.
        seed: of the weights.
        vision_layers: blocks of the ViT.
        layers: blocks of the LLM.
        full_attention_layers: LLM blocks without a sliding window.
        sliding_window: positions a query sees in the other blocks, itself among them.
        heads: query heads of the LLM, of 16 channels each; the width is ``16 * heads``.
        kv_heads: key and value heads of the LLM; must divide `heads`.
        image_size: side in pixels of the square the processor makes of every image.
        patch_size: side of a patch in pixels.
        pool: patches per side of an LLM token; ``pool * patch_size`` must divide `image_size`.
        init_std: standard deviation of the random weight matrices.

    Raises:
        ValueError: head counts, sizes or block indices that do not fit.
    """
    check_divides("kv_heads", kv_heads, "heads", heads)
    check_divides("pool * patch_size", pool * patch_size, "image_size", image_size)
    if any(not 0 <= block < layers for block in full_attention_layers):
        raise ValueError(
            f"full_attention_layers={full_attention_layers}: expected block indices in "
            f"0..{layers - 1} (layers={layers})"
        )
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
    model = build(
        Gemma3ForConditionalGeneration, config, attn_implementation, dtype, seed, init_std
    )
    return model, processor

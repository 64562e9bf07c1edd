"""LLaVA with another text decoder or another vision tower in it."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from tiny_families.inputs import inputs_of
from tiny_families.makers import MAKERS
from tiny_families.making import made
from tiny_families.parts import GEMMA3N_TEXT, GEMMA4_TEXT, LINEAR_FIRST, NEMOTRON_H
from tiny_families.sizes import small_config

_MAMBA_THEN_ATTENTION = ["mamba", "attention", "attention"]
_SSM = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8}
_UNTIED = {"tie_word_embeddings": False}  # LLaVA finds a shared table under one name only
_GPT2 = {**_UNTIED, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
_GRANITE = {
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.1,
}
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
_HALF_ROTARY = {"partial_rotary_factor": 0.5}


def _plain(names: str) -> dict[str, dict[str, Any]]:
    """Parts that the small sizes alone describe."""
    return {name: {} for name in names.split()}


DECODERS: dict[str, dict[str, Any]] = {
    **_plain(
        """apertus arcee biogpt cohere cohere2 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 flex_olmo gemma
        gemma3_text glm glm4 glm4_moe gpt_neox gpt_oss helium hunyuan_v1_dense jetmoe llama llama4_text
        minimax_m2 ministral3 mistral mixtral nanochat nemotron olmo olmo2 olmo3 olmoe phi3 phimoe qwen2 qwen2_moe
        qwen3 qwen3_moe recurrent_gemma rwkv seed_oss smollm3 starcoder2 vaultgemma bitnet"""
    ),
    "bamba": {"attn_layer_indices": [1], **_SSM},
    "bloom": {**_UNTIED, "n_layer": 3, "n_head": 4},
    "codegen": {**_GPT2, "rotary_dim": 8},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.0625},
    "deepseek_v2": {**_LATENT, "topk_method": "greedy"},
    "deepseek_v3": _LATENT,
    "deepseek_v32": {**_LATENT, "index_topk": 64},
    "falcon": {**_UNTIED, "num_kv_heads": 2},
    "falcon_h1": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_ssm": 64,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "gemma2": {
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3n_text": GEMMA3N_TEXT,
    # without embeddings for each layer, which need the ids that LLaVA does not pass on
    "gemma4_text": {**GEMMA4_TEXT, "hidden_size_per_layer_input": 0},
    "glm_moe_dsa": {**_LATENT, "index_topk": 64},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 8},
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoehybrid": {"layer_types": _MAMBA_THEN_ATTENTION, **_SSM},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": {
        "num_key_value_heads": 4,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "longcat_flash": {
        "num_layers": 2,
        "num_hidden_layers": 4,  # a layer is two blocks
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        **_LATENT,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "minimax": {"layer_types": LINEAR_FIRST, "block_size": 8},
    "mpt": {**_UNTIED, "n_layers": 3, "n_heads": 4, "d_model": 64},
    "nemotron_h": NEMOTRON_H,
    "opt": {**_UNTIED, "word_embed_proj_dim": 64},
    "persimmon": _HALF_ROTARY,
    "phi": _HALF_ROTARY,
    "qwen3_5_text": {"layer_types": LINEAR_FIRST},
    "qwen3_next": {"layer_types": LINEAR_FIRST},
    "stablelm": _HALF_ROTARY,
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
    },
}
TOWERS: dict[str, dict[str, Any]] = {
    **_plain(
        """aimv2_vision_model beit chinese_clip_vision_model clip_vision_model data2vec-vision deit
        ijepa mlcd_vision_model pixtral vit vit_msn"""
    ),
    "convnext": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "dinov2": {"layerscale_value": 0.3},
    "dinov2_with_registers": {"num_register_tokens": 4, "layerscale_value": 0.3},
    "dinov3_vit": {"num_register_tokens": 4, "layerscale_value": 0.3},
    # one stage, so that all states have the width that the projector takes
    "hiera": {
        "image_size": [48, 48],
        "patch_size": [8, 8],
        "patch_stride": [8, 8],
        "patch_padding": [0, 0],
        "embed_dim": 64,
        "depths": [3],
        "num_heads": [4],
        "num_query_pool": 0,
        "masked_unit_size": [2, 2],
        "masked_unit_attention": [True],
    },
    "internvl_vision": {"image_size": [48, 48], "patch_size": [8, 8]},
    "siglip2_vision_model": {"num_patches": 36},
    "siglip_vision_model": {"vision_use_head": False},
    "swin": {"embed_dim": 64, "depths": [3], "num_heads": [4], "window_size": 3},
}
VARIANTS_NOT_RUN = {
    "convnext": "its states are maps of channels, which LLaVA's projector does not take",
    **dict.fromkeys(
        ("mamba2", "recurrent_gemma", "rwkv"),
        "its output has no cache of keys, which LLaVA's forward pass returns",
    ),
    "siglip2_vision_model": "it needs the shapes of its images, which LLaVA does not pass on",
}
_NO_CLS = (
    "aimv2_vision_model",
    "convnext",
    "hiera",
    "ijepa",
    "pixtral",
    "siglip2_vision_model",
    "siglip_vision_model",
    "swin",
)
# gemma2 for its soft-caps; the others know no other
_EAGER = ("bloom", "codegen", "gemma2", "gpt_oss", "gptj", "hiera", "mpt", "swin", "vaultgemma")


def variant(kind: str, name: str, attn: str = "sdpa") -> Any:
    """Build LLaVA with another part.

    Args:
        kind: "decoder" or "tower".
        name: One of `DECODERS` or `TOWERS`.
        attn: The attention implementation; a few take "eager" whatever is asked.
    """
    if name in VARIANTS_NOT_RUN:
        raise ValueError(f"LLaVA with {name} is not built here: {VARIANTS_NOT_RUN[name]}")
    if kind == "decoder":
        vision: dict[str, Any] = {"model_type": "clip_vision_model"}
        text = {"model_type": name, **DECODERS[name]}
    else:
        vision = {"model_type": name, **TOWERS[name]}
        text = {"model_type": "llama"}
    whole = name in _NO_CLS
    changes = {
        "vision_config": vision,
        "text_config": text,
        "vision_feature_layer": -1 if whole else -2,
        "vision_feature_select_strategy": "full" if whole else "default",
    }
    config = small_config(CONFIG_MAPPING["llava"], changes)
    return made(
        transformers.LlavaForConditionalGeneration, config, "eager" if name in _EAGER else attn
    )


def variant_inputs(name: str, model: Any, shape: int = 0) -> dict[str, Any] | None:
    """Make inputs for LLaVA with the decoder or tower of this name; shapes are as for `inputs_of`."""
    form = f"llava+{name}"
    return inputs_of(form if form in MAKERS else "llava", model, shape)

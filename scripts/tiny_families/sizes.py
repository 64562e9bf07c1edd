"""Small sizes by field name, and the function that fills a config class of transformers with them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 200
IMAGE_TOKEN, VIDEO_TOKEN, AUDIO_TOKEN = 7, 8, 9
FIRST_OTHER_TOKEN = 10  # the ids of a config's other special tokens count from here

_SHARED = {
    # widths; every tower has the same width, so that a projector may have any direction
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "moe_hidden_size"), 64),
    **dict.fromkeys(
        ("intermediate_size", "intermediate_size_mlp", "ffn_dim", "d_ff", "mlp_dim"), 96
    ),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv"), 16),
    # no dropout, whatever its name
    **dict.fromkeys(
        (
            "attention_dropout",
            "attention_probs_dropout_prob",
            "activation_dropout",
            "dropout",
            "dropout_rate",
            "hidden_dropout_prob",
            "hidden_dropout_rate",
            "layerdrop",
            "projection_dropout",
            "projector_dropout",
        ),
        0.0,
    ),
    # mixtures of experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "shared_intermediate_size",
            "share_expert_dim",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            "moe_num_shared_experts",
            "n_shared_experts",
            "n_group",
            "topk_group",
            "first_k_dense_replace",
        ),
        1,
    ),
    "dense_intermediate_size": 96,
    # attention with low-rank keys and queries, and its indexer
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "rotary_dim": 8,
    # linear attention
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    # lengths
    "max_position_embeddings": 512,
    "attention_chunk_size": 64,
    "floor_scale": 64,
}
TEXT = {
    **_SHARED,
    "vocab_size": VOCABULARY,
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "layers", "decoder_layers", "num_decoder_layers"), 3
    ),
    "encoder_layers": 2,
    "num_key_value_heads": 2,
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 96),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 12,  # shorter than the texts, so that a window cuts something
}
VISION = {
    **{name: size for name, size in _SHARED.items() if name != "max_position_embeddings"},
    **dict.fromkeys(("num_hidden_layers", "depth", "n_layers"), 3),
    "encoder_layers": 2,
    "num_global_layers": 1,
    "num_key_value_heads": 4,
    "image_size": 48,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
    "window_size": 32,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
    **dict.fromkeys(
        (
            "out_hidden_size",
            "text_hidden_size",
            "vision_output_dim",
            "projection_dim",
            "output_dim",
        ),
        64,
    ),
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "max_source_positions": 50,
}
_PAIRED = ("pad_token_id", "bos_token_id", "eos_token_id")


def small_config(kind: type[PreTrainedConfig], changes: dict[str, Any], role: str = "top") -> Any:
    """Make a config of a class with the sizes above.

    Args:
        kind: The config class.
        changes: Fields that get another value. For a sub-config: a dictionary, in which `model_type` chooses the
            class; or None, which leaves the sub-config at its default. A value of `...` leaves a field at its default.
        role: `"top"`, `"text"` or `"vision"`: which sizes apply.
    """
    changes = copy.deepcopy(changes)  # configs change the dictionaries that they are given
    names = [field.name for field in dataclasses.fields(kind)]
    parts = getattr(kind, "sub_configs", None) or {}
    values: dict[str, Any] = {}
    if role == "top":
        values |= _special_tokens(names)
    if role != "top" or not parts or "num_attention_heads" in names:
        sizes = VISION if role == "vision" else TEXT
        values |= {name: sizes[name] for name in names if name in sizes and name not in parts}
    for name, part in parts.items():
        change = changes.get(name, {})
        if change is None:
            continue
        change = dict(change)
        chosen = change.pop("model_type", None)
        if chosen is not None:
            part = CONFIG_MAPPING[chosen]
        elif part.__name__ == "AutoConfig":
            part = type(getattr(kind(), name))
        values[name] = small_config(part, change, "text" if _is_text(name) else "vision")
    values |= {name: value for name, value in changes.items() if name not in parts}
    return kind(**{name: value for name, value in values.items() if value is not ...})


def _special_tokens(names: list[str]) -> dict[str, int]:
    known = {"image_token": IMAGE_TOKEN, "video_token": VIDEO_TOKEN, "audio_token": AUDIO_TOKEN}
    found: dict[str, int] = {}
    for name in names:
        if name.endswith(("_token_id", "_token_index")) and name not in _PAIRED:
            start = name.rsplit("_", 1)[0]
            found[name] = known.get(start, FIRST_OTHER_TOKEN + len(found))
    return found


def _is_text(name: str) -> bool:
    return (
        "text" in name or name == "encoder_config" or ("decoder" in name and "vision" not in name)
    )

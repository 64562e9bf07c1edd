"""Pieces of configs that several model types share, or that variants of LLaVA take."""

from __future__ import annotations

from tiny_families.sizes import VOCABULARY

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
LINEAR_FIRST = ["linear_attention", "full_attention", "full_attention"]
SLIDING_TWICE = ["sliding_attention", "sliding_attention", "full_attention"]
PINPOINTS = [[48, 48], [48, 96], [96, 48], [96, 96]]  # image sizes that tiles of 48 x 48 make up
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
AXES = {"text_config": {"rope_parameters": MROPE}}
GEMMA3 = {"mm_tokens_per_image": 9, "vision_config": SIGLIP}
LLAVA_NEXT = {"image_grid_pinpoints": PINPOINTS, "image_seq_length": 36}
QWEN3_5 = {
    "text_config": {
        "layer_types": LINEAR_FIRST,
        "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True},
    }
}
OMNI_TOKENS = {
    "vision_start_token_id": 12,
    "vision_end_token_id": 13,
    "audio_start_token_id": 14,
    "audio_end_token_id": 15,
}
INTERNVL = {"vision_config": {"image_size": [48, 48], "patch_size": [8, 8]}, "image_seq_length": 9}
# the two positions that feed the merger of windows and, before it, one inserted attention layer
MINICPM = {
    "insert_layer_id": 1,
    "image_size": 48,
    "vision_config": {"insert_layer_id": 1},
    "text_config": {"layer_types": LINEAR_FIRST},
}
MUSE = {
    "out_hidden_size": 64 * 4,  # four merged patches side by side
    "projector_hidden_size": 64,
    "vision_config": {"pos_emb_height": 8, "pos_emb_width": 8, "merge_size": 2},
}
MUSE_AUDIO = {
    "patch_sizes": [2, 2],
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "num_hidden_layers": 2,
    "out_hidden_size": 64,
}
SAM = {  # windows of 4 x 4 patches, then one layer that sees all; two convolutions halve the grid twice
    "downsample_channels": [64, 64],
    "output_channels": 32,
    "window_size": 4,
    "global_attn_indexes": [1],
}
GOT = {
    "vision_config": {
        "output_channels": 32,
        "window_size": 4,
        "global_attn_indexes": [1],
        "image_size": 64,  # 8 x 8 patches, halved twice: 4 tokens
    }
}
# heads of 16 in local layers and of 32 in global ones, as in the published models (256 and 512)
GEMMA4_TEXT = {
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 2,
    "layer_types": SLIDING_TWICE,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "final_logit_softcapping": 5.0,
    # dense
    "enable_moe_block": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
}
GEMMA3N_TEXT = {
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "altup_num_inputs": 2,  # two residual lanes
    "layer_types": SLIDING_TWICE,
    "activation_sparsity_pattern": [0.0, 0.0, 0.0],
    "intermediate_size": [96, 96, 96],
}
NEMOTRON_H = {
    "layers_block_type": ["mamba", "attention", "mlp"],  # a block is one of the three
    "num_hidden_layers": ...,  # follows from the types
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
}
# tokenizers of pixels with 16 codes
CHAMELEON_CODES = {
    "num_embeddings": 16,
    "embed_dim": 16,
    "latent_channels": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "resolution": 16,
}
EMU3_CODES = {
    "codebook_size": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "hidden_size": 32,
    "attn_resolutions": [4],
    "temporal_downsample_factor": 2,
}
JANUS_CODES = {
    "embed_dim": 8,
    "num_embeddings": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "projection_dim": 64,
    "image_token_embed_dim": 64,
    "latent_channels": 16,
}
# two stages of convolutions and windows
DAVIT = {
    "depths": [1, 1],
    "patch_size": [7, 3],
    "patch_stride": [4, 2],
    "patch_padding": [3, 1],
    "patch_prenorm": [False, True],
    "embed_dim": [32, 64],
    "num_heads": [2, 4],
    "num_groups": [2, 4],
    "window_size": 4,
    "projection_dim": 64,
    "max_temporal_embeddings": 4,
    "max_position_embeddings": 10,
    "drop_path_rate": 0.0,
}
# heads of local layers have sizes of their own
DOTS3_TEXT = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 24,
    "swa_v_head_dim": 16,
}

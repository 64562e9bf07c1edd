"""What each model type needs beyond the small sizes, as data: the changes that `small_config` takes.

Every text decoder has 3 layers of width 64 with 4 heads, every tower 2 or 3 such layers on images of 48 x 48 pixels in
patches of 8. Only what differs, or must be told because a default is too large, stands here.
"""

from __future__ import annotations

from typing import Any

from tiny_families.sizes import IMAGE_TOKEN, VOCABULARY

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
LINEAR_FIRST = ["linear_attention", "full_attention", "full_attention"]
SLIDING_TWICE = ["sliding_attention", "sliding_attention", "full_attention"]
PINPOINTS = [[48, 48], [48, 96], [96, 48], [96, 96]]  # image sizes that tiles of 48 x 48 make up
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
_mrope = {"text_config": {"rope_parameters": MROPE}}
_gemma3 = {"mm_tokens_per_image": 9, "vision_config": SIGLIP}
_llava_next = {"image_grid_pinpoints": PINPOINTS, "image_seq_length": 36}
_qwen3_5 = {
    "text_config": {
        "layer_types": LINEAR_FIRST,
        "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True},
    }
}
_omni_tokens = {
    "vision_start_token_id": 12,
    "vision_end_token_id": 13,
    "audio_start_token_id": 14,
    "audio_end_token_id": 15,
}
_internvl = {
    "vision_config": {"image_size": [48, 48], "patch_size": [8, 8]},
    "image_seq_length": 9,
}
# the two positions that feed the merger of windows and, before it, one inserted attention layer
_minicpm = {
    "insert_layer_id": 1,
    "image_size": 48,
    "vision_config": {"insert_layer_id": 1},
    "text_config": {"layer_types": LINEAR_FIRST},
}
_muse = {
    "out_hidden_size": 64 * 4,  # four merged patches side by side
    "projector_hidden_size": 64,
    "vision_config": {"pos_emb_height": 8, "pos_emb_width": 8, "merge_size": 2},
}
_sam = {  # windows of 4 x 4 patches, then one layer that sees all; two convolutions halve the grid twice
    "downsample_channels": [64, 64],
    "output_channels": 32,
    "window_size": 4,
    "global_attn_indexes": [1],
}
_got = {
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

CHANGES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {36: 9}},
    "blip": {"vision_config": {}, "text_config": {"encoder_hidden_size": 64}},
    "blip-2": {
        "image_token_index": IMAGE_TOKEN,
        "num_query_tokens": 5,
        "qformer_config": {"encoder_hidden_size": 64, "cross_attention_frequency": 1},
        "text_config": {"model_type": "opt", "word_embed_proj_dim": 64},
    },
    "chameleon": {
        "vocabulary_map": {
            "<image>": IMAGE_TOKEN,
            # a code's digits are written in letters: A is 0
            **{
                f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(code))}Z": 100 + code
                for code in range(16)
            },
        },
        "vq_config": {
            "num_embeddings": 16,
            "embed_dim": 16,
            "latent_channels": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "resolution": 16,
        },
    },
    "cohere2_vision": {"alignment_intermediate_size": 64, "text_config": {"logit_scale": 0.0625}},
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {"full_attention": None, "sliding_attention": MROPE},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "logit_scale": 0.0625,
        }
    },
    "cosmos3_edge": {"projector_hidden_size": 64, "vision_config": {"num_patches": 36}, **_mrope},
    "cosmos3_omni": _mrope,
    "deepseek_ocr2": {
        "vision_config": {"sam_config": _sam},
        "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": {"image_size": 64}},
    "diffusion_gemma": {
        "vision_config": {"pooling_kernel_size": 2, "position_embedding_size": 64},
        "text_config": {"head_dim": 16, "global_head_dim": 32, "layer_types": SLIDING_TWICE},
        "canvas_length": 6,
    },
    "dots3_note": {
        "vision_config": {
            "mlp_layer_types": ["dense", "sparse", "dense"],
            "adapter_in_dim": 64,
            "adapter_out_dim": 64,
        },
        "text_config": {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
            # heads of local layers have sizes of their own
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_q_lora_rank": 24,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 32,
            "swa_qk_nope_head_dim": 24,
            "swa_v_head_dim": 16,
        },
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": IMAGE_TOKEN,
            "<|extra_200|>": 50,  # the end of a row of codes
            **{f"<|visual token {code:06d}|>": 100 + code for code in range(16)},
        },
        "vq_config": {
            "codebook_size": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
            "attn_resolutions": [4],
            "temporal_downsample_factor": 2,
        },
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [32, 32],  # of text and of vision experts
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]},
        }
    },
    "exaone4_5": {
        "text_config": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    },
    "fast_vlm": {  # stages of convolutions and, at the end, two blocks of attention
        "vision_config": {
            "architecture": "fastvit_sa12",
            "model_args": {"layers": [1, 1, 1, 2], "embed_dims": [64, 64, 64, 64]},
            "hidden_size": 128,
        }
    },
    "florence2": {
        "vision_config": {
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
        },
        "text_config": {
            "model_type": "bart",
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
    },
    "gemma3": _gemma3,
    "gemma3n": {  # a small convolutional network stands for the published one, which has no other size
        "vision_soft_tokens_per_image": 4,
        "vision_config": {
            "architecture": "mobilenetv3_small_050",
            "model_args": {},
            "hidden_size": 288,
            "vocab_size": 8,
            "vocab_offset": 180,
        },
        "audio_config": {"conf_num_hidden_layers": 1},
        "text_config": GEMMA3N_TEXT,
    },
    "gemma4": {
        "vision_config": {"pooling_kernel_size": 2, "position_embedding_size": 64},
        "audio_config": None,
        "text_config": GEMMA4_TEXT,
    },
    "gemma4_unified": {
        "vision_config": {
            "pooling_kernel_size": 2,
            "mm_embed_dim": 64,
            "output_proj_dims": 64,
            "mm_posemb_size": 64,
        },
        "text_config": {"head_dim": 16, "global_head_dim": 32, "layer_types": SLIDING_TWICE},
    },
    "git": {"vision_config": {"model_type": "git_vision_model"}},
    "glm46v": _mrope,
    "glm4v": _mrope,
    "glm4v_moe": {
        "text_config": {
            # half of 16 dimensions turn
            "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
        }
    },
    "glm5_next": {
        "text_config": {
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "index_kpool": 2,
            "hc_mult": 2,  # two residual lanes
            "layer_types": LINEAR_FIRST,
            "indexer_types": None,
        }
    },
    "glm_ocr": _mrope,
    "glmga": _mrope,
    "got_ocr2": _got,
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-2, 0]],
        "spatial_target_layers": [1, 1, 2, 2],
        "image_grid_pinpoints": PINPOINTS,
        "qformer_config": {"encoder_hidden_size": 64, "hidden_size": 64},
    },
    "granite_docling": {"vision_config": {"scale_factor": 2, "deepstack_visual_indexes": [0]}},
    "hunyuan_vl": {
        "vision_config": {"max_image_size": 64, "temporal_patch_size": 1, "text_hidden_size": 64},
        "text_config": {"rope_parameters": {**MROPE, "mrope_section": [2, 2, 2, 2]}},
        "im_start_id": 20,
        "im_end_id": 21,
        "im_newline_id": 22,
    },
    "idefics": {
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "vocab_size": VOCABULARY,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "use_resampler": False,
        "vision_config": {"image_size": 48, "patch_size": 8},
    },
    "idefics2": {
        "perceiver_config": {
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        }
    },
    "instructblip": {
        "image_token_index": IMAGE_TOKEN,
        "num_query_tokens": 5,
        "qformer_config": {"encoder_hidden_size": 64},
        "text_config": {"model_type": "llama"},
    },
    "instructblipvideo": {
        "video_token_index": IMAGE_TOKEN,
        "num_query_tokens": 5,
        "qformer_config": {"encoder_hidden_size": 64},
        "text_config": {"model_type": "llama"},
    },
    "internvl": _internvl,
    "janus": {
        "vq_config": {
            "embed_dim": 8,
            "num_embeddings": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 64,
            "image_token_embed_dim": 64,
            "latent_channels": 16,
        },
        "vision_config": {"depth": 2, "mlp_ratio": 2, "num_image_tokens": 36},
    },
    "kimi_k25": {
        "projection_hidden_size": 64,
        "vision_config": {"pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 4},
        "text_config": {"num_key_value_heads": 4},
    },
    "kosmos-2": {"latent_query_num": 5},
    "kosmos-2.5": {
        "latent_query_num": 5,
        "vision_config": {"patch_embed_hidden_size": 64, "max_num_patches": 64},
    },
    "lfm2_vl": {
        "projector_hidden_size": 64,
        "text_config": {"layer_types": ["conv", "full_attention", "full_attention"]},
        "vision_config": {"num_patches": 64},
    },
    "lfm3_vl": {"projector_hidden_size": 64},
    "llama4": {
        "vision_config": {
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "intermediate_size": 256,  # four merged patches side by side
        }
    },
    "llava_next": _llava_next,
    "llava_next_video": _llava_next,
    "llava_onevision": {"image_grid_pinpoints": PINPOINTS},
    "minicpm_ocr": {name: value for name, value in _minicpm.items() if name != "image_size"},
    "minicpmv4_6": _minicpm,
    "minicpmv4_7": _minicpm,
    "minimax_m3_vl": {
        "projector_hidden_size": 64,
        "text_config": {"index_block_size": 8, "index_topk_blocks": 2},
    },
    "mistral_large4": {"text_config": {"num_key_value_heads": 4, "index_n_heads": 4}},
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {
            "intermediate_layers_indices": [0, 1],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            "max_num_tiles": 2,
            "vision_output_dim": 192,  # the last layer and the two others side by side
        },
    },
    "molmo2": {
        "image_patch_id": IMAGE_TOKEN,
        "vision_config": {"image_size": [48, 48], "num_position_embeddings": 36},
        "adapter_config": {
            "vision_feature_layer": [-1, -2],
            "text_hidden_size": 64,
            "hidden_size": 64,
        },
        "text_config": {"vocab_size": VOCABULARY},
    },
    "muse_glimmer": _muse,
    "muse_spark": {
        **_muse,
        "audio_config": {
            "patch_sizes": [2, 2],
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "out_hidden_size": 64,
        },
    },
    "nemotron_h_omni": {
        "audio_config": None,
        "image_token_id": IMAGE_TOKEN,
        "projector_hidden_size": 64,
        "vision_hidden_size": 64,
        "text_config": {"model_type": "nemotron_h", **NEMOTRON_H},
        "vision_config": {"model_type": "radio", "video_temporal_patch_size": 2},
    },
    "ovis2": {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "visual_indicator_token_ids": [20, 21, 22, 23, 24],
        "vision_config": {"vocab_size": 80},
    },
    "paddleocr_vl": _mrope,
    "paligemma": {
        "projection_dim": 64,
        "hidden_size": 64,
        "vocab_size": VOCABULARY,
        "vision_config": {"projection_dim": 64},
    },
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_tiny_patch16_384",
            "model_args": {
                "depth": 3,
                "embed_dim": 64,
                "num_heads": 4,
                "img_size": [48, 48],
                "patch_size": 8,
                "global_pool": "",
            },
        },
        "projector_pooling_ratio": 2,
    },
    "pp_chart2table": _got,
    "qianfan_ocr": _internvl,
    "qwen2_5_omni_thinker": {
        **_mrope,
        **_omni_tokens,
        "spatial_merge_size": 2,
        "audio_config": {"encoder_layers": 2},
    },
    "qwen2_5_vl": _mrope,
    "qwen2_vl": {**_mrope, "vision_config": {"mlp_ratio": 2}},
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5,
    "qwen3_omni_moe_thinker": {
        **_mrope,
        **_omni_tokens,
        "audio_config": {"downsample_hidden_size": 32, "encoder_layers": 2},
    },
    "qwen3_vl": _mrope,
    "qwen3_vl_moe": _mrope,
    "qwen4_exp": {
        "text_config": {
            "layer_types": LINEAR_FIRST,
            "hc_count": 2,  # two residual lanes
            "hc_lowrank": 8,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "ple_layer_ids": [],
        }
    },
    "shieldgemma2": _gemma3,
    "t5gemma2": {
        "encoder": {
            **_gemma3,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 10,
            "eoi_token_index": 11,
        }
    },
    "unlimited_ocr": {
        "vision_config": {
            "sam_config": _sam,
            "encoder_config": {"image_size": 48, "patch_size": 8},
        }
    },
    "video_llava": {"text_config": {"model_type": "llama"}},
    "vipllava": {"vision_feature_layer": [-2, -3]},
}

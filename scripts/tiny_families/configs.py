"""What each model type needs beyond the small sizes, as data: the changes that `small_config` takes.

Every text decoder has 3 layers of width 64 with 4 heads, every tower 2 or 3 such layers on images of 48 x 48 pixels in
patches of 8. Only what differs, or must be told because a default is too large, stands here."""

from __future__ import annotations

from typing import Any

from tiny_families.parts import (
    AXES,
    CHAMELEON_CODES,
    DAVIT,
    DOTS3_TEXT,
    EMU3_CODES,
    GEMMA3,
    GEMMA3N_TEXT,
    GEMMA4_TEXT,
    GOT,
    INTERNVL,
    JANUS_CODES,
    LINEAR_FIRST,
    LLAVA_NEXT,
    MINICPM,
    MROPE,
    MUSE,
    MUSE_AUDIO,
    NEMOTRON_H,
    OMNI_TOKENS,
    PINPOINTS,
    QWEN3_5,
    SAM,
    SLIDING_TWICE,
)
from tiny_families.sizes import IMAGE_TOKEN, VOCABULARY

CHANGES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {36: 9}},
    "blip": {"text_config": {"encoder_hidden_size": 64}},
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
        "vq_config": CHAMELEON_CODES,
    },
    "cohere2_vision": {"alignment_intermediate_size": 64, "text_config": {"logit_scale": 0.0625}},
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {"full_attention": None, "sliding_attention": MROPE},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "logit_scale": 0.0625,
        }
    },
    "cosmos3_edge": {"projector_hidden_size": 64, "vision_config": {"num_patches": 36}, **AXES},
    "cosmos3_omni": AXES,
    "deepseek_ocr2": {
        "vision_config": {"sam_config": SAM},
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
        "text_config": DOTS3_TEXT,
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": IMAGE_TOKEN,
            "<|extra_200|>": 50,  # the end of a row of codes
            **{f"<|visual token {code:06d}|>": 100 + code for code in range(16)},
        },
        "vq_config": EMU3_CODES,
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
        "vision_config": DAVIT,
        "text_config": {
            "model_type": "bart",
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
    },
    "gemma3": GEMMA3,
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
    "glm46v": AXES,
    "glm4v": AXES,
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
    "glm_ocr": AXES,
    "glmga": AXES,
    "got_ocr2": GOT,
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
    "idefics": {"use_resampler": False},
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
    "internvl": INTERNVL,
    "janus": {
        "vq_config": JANUS_CODES,
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
    "llava_next": LLAVA_NEXT,
    "llava_next_video": LLAVA_NEXT,
    "llava_onevision": {"image_grid_pinpoints": PINPOINTS},
    "minicpm_ocr": {name: value for name, value in MINICPM.items() if name != "image_size"},
    "minicpmv4_6": MINICPM,
    "minicpmv4_7": MINICPM,
    "minimax_m3_vl": {
        "projector_hidden_size": 64,
        "text_config": {"index_block_size": 8, "index_topk_blocks": 2},
    },
    "mistral4": {"num_key_value_heads": 4},
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
    "muse_glimmer": MUSE,
    "muse_spark": {**MUSE, "audio_config": MUSE_AUDIO},
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
    "paddleocr_vl": AXES,
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
    "pp_chart2table": GOT,
    "qianfan_ocr": INTERNVL,
    "qwen2_5_omni_thinker": {
        **AXES,
        **OMNI_TOKENS,
        "spatial_merge_size": 2,
        "audio_config": {"encoder_layers": 2},
    },
    "qwen2_5_vl": AXES,
    "qwen2_vl": {**AXES, "vision_config": {"mlp_ratio": 2}},
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5,
    "qwen3_omni_moe_thinker": {
        **AXES,
        **OMNI_TOKENS,
        "audio_config": {"downsample_hidden_size": 32, "encoder_layers": 2},
    },
    "qwen3_vl": AXES,
    "qwen3_vl_moe": AXES,
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
    "shieldgemma2": GEMMA3,
    "t5gemma2": {
        "encoder": {
            **GEMMA3,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 10,
            "eoi_token_index": 11,
        }
    },
    "unlimited_ocr": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"sam_config": SAM, "encoder_config": {"image_size": 48, "patch_size": 8}},
    },
    "video_llava": {"text_config": {"model_type": "llama"}},
    "vipllava": {"vision_feature_layer": [-2, -3]},
}

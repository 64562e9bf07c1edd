"""Which model type takes which form of pictures."""

from __future__ import annotations

from typing import Any

from tiny_families.fixed_images import (
    anyres,
    blip,
    crossed,
    fixed,
    frames,
    gated,
    hybrid,
    latent,
    local_views,
    stacked,
)
from tiny_families.free_images import (
    codes,
    each_patch,
    merged,
    packed,
    padded_patches,
    padded_pixels,
    patch_grids,
    placed_patches,
    pooled_crops,
    raw_patches,
    strips,
)
from tiny_families.pictures import PATCH, SIDE, Maker, Pictures


def none(config: Any, shape: int) -> Pictures | None:
    """No image: a decoder of text."""
    return Pictures({}, 0, ()) if shape == 0 else None


_NAMES: dict[Maker, str] = {
    fixed(): "aria blip-2 deepseek_vl janus llava ovis2 paligemma t5gemma2 vipllava",
    fixed(side=64): "fast_vlm gemma3n",
    fixed(tiles=True): "aya_vision cohere2_vision gemma3 shieldgemma2 internvl qianfan_ocr llama4",
    fixed(side=64, tiles=True): "got_ocr2 pp_chart2table",
    fixed("pixel_values_images"): "video_llava",
    fixed(side=16): "chameleon",
    blip(0, several=False): "blip git",
    blip(5): "instructblip kosmos-2",
    blip(37, several=False): "florence2",
    hybrid: "deepseek_vl_hybrid",
    frames: "instructblipvideo",
    latent: "kosmos-2.5",
    stacked(): "idefics3 smolvlm perception_lm",
    stacked("pixel"): "idefics2",
    stacked("tile"): "granite_docling",
    anyres: "llava_next llava_next_video llava_onevision granite4_vision",
    crossed: "mllama",
    gated: "idefics",
    local_views(32): "step3p7 deepseek_ocr2",
    local_views(SIDE, grid=True): "unlimited_ocr",
    packed(): """qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe qwen4_exp
        glm4v glm46v glmga glm4v_moe glm_ocr glm5_next ernie4_5_vl_moe exaone4_5 cohere_compass
        cosmos3_edge cosmos3_omni hyperclovax_vision_v2 hunyuan_vl minimax_m3_vl lfm3_vl
        qwen2_5_omni_thinker qwen3_omni_moe_thinker dots3_note""",
    packed(frames=2): "muse_glimmer muse_spark",
    packed(channels_first=True): "kimi_k25 paddleocr_vl",
    packed(image_merge_sizes=[2]): "video_llama_3",
    merged: "inkling2",
    patch_grids: "nemotron_h_omni",
    each_patch: "inkling_mm_model",
    strips: "minicpmv4_6 minicpmv4_7 minicpm_ocr",
    padded_pixels: "mistral3 lighton_ocr mistral_large4 llava+pixtral",
    padded_patches: "lfm2_vl",
    placed_patches(): "gemma4 diffusion_gemma",
    placed_patches(size=2 * PATCH, pool=1): "gemma4_unified",
    codes: "emu3",
    raw_patches: "fuyu",
    pooled_crops: "molmo2",
    none: "mistral4",
}
MAKERS: dict[str, Maker] = {
    name: maker for maker, names in _NAMES.items() for name in names.split()
}

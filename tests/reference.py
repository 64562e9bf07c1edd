"""Attention as Hugging Face's eager kernel computes it: the reference of every attention probe.

The decoder's weights come from ``output_attentions``. The packed vision tower returns none, so its
eager attention function is called here, window by window, on queries and keys made by the module.
"""

import itertools

import torch
from einops import rearrange
from torch import nn


def visible(lvlm, sample, grown=0):
    """Which keys each query may see, bool ``[batch layer query key]``.

    Causal; in Gemma 3 also both ways inside an image, and in sliding layers only the last
    ``sliding_window`` positions. ``grown`` generated tokens follow the prompt.
    """
    tokens, config = sample.tokens, lvlm.module.config.get_text_config()
    places = torch.arange(tokens.ids.shape[1] + grown)
    seen = (places <= places[:, None])[None]
    live = torch.nn.functional.pad(tokens.live, (0, grown), value=True)
    if lvlm.anatomy.model_type == "gemma3":
        image = torch.nn.functional.pad(tokens.image_index, (0, grown), value=-1)
        seen = seen | (image[:, None] == image[..., None]) & (image[:, None] >= 0)
    near = places > places[:, None] - (getattr(config, "sliding_window", None) or len(places))
    layers = [seen & near if kind == "sliding_attention" else seen for kind in layer_kinds(lvlm)]
    return torch.stack(layers, dim=1) & live[:, None, None]


def layer_kinds(lvlm):
    """``"full_attention"`` or ``"sliding_attention"`` of every decoder layer."""
    config = lvlm.module.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    return kinds or ["full_attention"] * lvlm.anatomy.language.n_layers


def in_cache(lvlm, n_keys):
    """Which keys a decode step still finds in the cache, bool ``[1 layer 1 key]``."""
    window = getattr(lvlm.module.config.get_text_config(), "sliding_window", None) or n_keys
    kept = torch.arange(n_keys) >= n_keys - window
    sliding = torch.tensor([kind == "sliding_attention" for kind in layer_kinds(lvlm)])
    return (kept | ~sliding[:, None])[None, :, None]


def set_kernel(module, kernel):
    before = module.config._attn_implementation
    module.set_attn_implementation(kernel)
    return before


@torch.no_grad()
def language_attention(lvlm, inputs):
    """``[batch layer head query key]`` under the eager kernel."""
    before = set_kernel(lvlm.module, "eager")
    out = lvlm.module(**inputs, output_attentions=True)
    set_kernel(lvlm.module, before)
    return torch.stack(out.attentions, dim=1)


@torch.no_grad()
def vision_attention(lvlm, sample):
    """``[image layer head query key]`` under the eager kernel, NaN at padding."""
    inner = lvlm.module.model
    before = set_kernel(lvlm.module, "eager")
    if not lvlm.anatomy.vision.packed:
        out = inner.vision_tower(sample.inputs["pixel_values"], output_attentions=True)
        set_kernel(lvlm.module, before)
        return torch.stack(out.attentions, dim=1)
    weights = []
    hooks = [
        block.attn.register_forward_hook(
            lambda m, args, kwargs, out: weights.append(packed_weights(m, args, kwargs)),
            with_kwargs=True,
        )
        for block in inner.visual.blocks
    ]
    inner.visual(sample.inputs["pixel_values"], grid_thw=sample.inputs["image_grid_thw"])
    for hook in hooks:
        hook.remove()
    set_kernel(lvlm.module, before)
    packed = torch.stack(weights)
    layout = sample.tokens.vision.layout
    images = []
    for index in layout:
        safe = index.clamp(min=0)
        one = packed[:, :, safe][:, :, :, safe]
        one[:, :, index < 0] = float("nan")
        one[..., index < 0] = float("nan")
        images.append(one)
    return torch.stack(images)


def packed_weights(attn: nn.Module, args, kwargs):
    """Block-diagonal softmax weights ``[head packed packed]`` of a Qwen2.5-VL vision block."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    hidden = args[0] if args else kwargs["hidden_states"]
    n = hidden.shape[0]
    q, k, _ = attn.qkv(hidden).reshape(n, 3, attn.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    q, k = apply_rotary_pos_emb_vision(q, k, *kwargs["position_embeddings"])
    scores = torch.einsum("qhd,khd->hqk", q, k) * attn.scaling
    bounds = kwargs["cu_seqlens"].tolist()
    mask = torch.full((n, n), float("-inf"), device=scores.device)
    for start, stop in itertools.pairwise(bounds):
        mask[start:stop, start:stop] = 0.0
    return (scores + mask).softmax(-1)


@torch.no_grad()
def projected_values(module, lvlm, inputs, tower):
    """What every block's value projection makes, by a hook: ``[row layer kv_head pos d_head]``.

    Of a packed tower the rows are one sequence, in the order of its windows.
    """
    anatomy, made = lvlm.anatomy.tower(tower), []

    def keep(attention):
        def hook(m, args, out):
            if m is not getattr(attention, "v_proj", None):  # queries, keys and values in one
                out = rearrange(out, "pos (three width) -> three pos width", three=3)[2][None]
            made.append(rearrange(out, "b pos (h d) -> b h pos d", d=anatomy.d_head).float())

        return hook

    hooks = []
    for path in anatomy.attention:
        attention = module.get_submodule(path)
        projection = getattr(attention, "v_proj", None) or attention.qkv
        hooks.append(projection.register_forward_hook(keep(attention)))
    try:
        module(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(made, dim=1)

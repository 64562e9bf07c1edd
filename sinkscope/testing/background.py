"""Random weights of a planted model that neither read nor write its reserved channels.

So nothing else can make or erase a spike, and the values of sink tokens are nearly zero: after the
norm little but the spike is left of them, and no value reads that.
"""

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from sinkscope.testing.circuits import (
    LanguageChannels,
    Projector,
    VisionChannels,
    constant_level,
    reserved,
)

LEVEL = 0.25
"""Standard deviation of an ordinary residual entry where a tower begins."""
NOISE_GAIN = 0.45
"""Gain of query and key weights; ordinary attention stays within a factor of two of uniform."""


def fill(
    linear: nn.Linear,
    generator: torch.Generator,
    gain: float,
    *,
    reads: list[int],
    writes: list[int],
) -> None:
    """Random weights of output scale `gain` that skip input channels `reads` and outputs `writes`."""
    noise = torch.randn(linear.weight.shape, generator=generator)
    weight = noise * gain / linear.in_features**0.5
    weight[:, reads] = 0
    weight[writes, :] = 0
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.zero_()


def vision_background(
    model: LlavaForConditionalGeneration, channels: VisionChannels, generator: torch.Generator
) -> None:
    """Random ViT that keeps its reserved channels at zero (CLIP: at a small common offset)."""
    tower, skip = model.model.vision_tower, reserved(channels)
    for name, parameter in tower.embeddings.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "patch_embedding.weight":
            noise *= 0.12 / parameter[0].numel() ** 0.5
            noise[skip] = 0
        else:
            noise *= 0.15
            noise[..., skip] = 0
        parameter.copy_(torch.zeros_like(noise) if name.endswith("bias") else noise)
    if isinstance(tower, CLIPVisionModel):
        tower.pre_layrnorm.weight.fill_(LEVEL)
        tower.pre_layrnorm.bias.zero_()
    layers: Any = tower.encoder.layers
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        for projection in (attention.q_proj, attention.k_proj):
            fill(projection, generator, NOISE_GAIN, reads=skip, writes=[])
        fill(attention.v_proj, generator, 1.0, reads=skip, writes=[])
        fill(attention.out_proj, generator, 0.25, reads=[], writes=skip)
        fill(mlp.fc1, generator, 1.0, reads=skip, writes=[])
        fill(mlp.fc2, generator, 0.1, reads=[], writes=skip)


def language_background(
    model: LlavaForConditionalGeneration, channels: LanguageChannels, generator: torch.Generator
) -> None:
    """Random LLM whose embeddings carry the constant channel and nothing else in reserved ones."""
    decoder, skip = model.model.language_model, reserved(channels)
    table = torch.randn(decoder.embed_tokens.weight.shape, generator=generator) * LEVEL
    table[:, skip] = 0
    table[:, channels.constant] = constant_level(table.shape[1])
    decoder.embed_tokens.weight.copy_(table)
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for projection in (attention.q_proj, attention.k_proj):
            fill(projection, generator, NOISE_GAIN, reads=skip, writes=[])
        fill(attention.v_proj, generator, 1.0, reads=skip, writes=[])
        fill(attention.o_proj, generator, 0.25, reads=[], writes=skip)
        fill(mlp.gate_proj, generator, 1.0, reads=skip, writes=[])
        fill(mlp.up_proj, generator, 1.0, reads=skip, writes=[])
        fill(mlp.down_proj, generator, 0.1, reads=[], writes=skip)
    fill(model.lm_head, generator, 2.0, reads=[], writes=[])


def projector_background(
    projector: Projector,
    vision: VisionChannels,
    language: LanguageChannels,
    generator: torch.Generator,
) -> None:
    """Random projector between the ordinary channels of the two towers."""
    fill(projector.linear_1, generator, 4.0, reads=reserved(vision), writes=[])
    fill(projector.linear_2, generator, 0.4, reads=[], writes=reserved(language))

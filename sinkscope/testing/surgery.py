"""Random weights of a planted model that neither read nor write its reserved channels, and the surgery.

So nothing else can make or erase a spike, and the values of sink tokens are nearly zero: after the
norm little but the spike is left of them, and no value reads that.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import CLIPVisionModel

from sinkscope.testing import circuits
from sinkscope.testing.circuits import LanguageChannels, Planted, Sink, VisionChannels, reserved

LEVEL = 0.25  # standard deviation of an ordinary residual entry where a tower begins
NOISE_GAIN = 0.45  # of queries and keys: ordinary attention is within a factor of two of uniform
MEASURED = 6  # random images over which levels are averaged


@torch.no_grad()
def operate(
    planted: Planted, vision: VisionChannels, language: LanguageChannels, generator: torch.Generator
) -> None:
    """Overwrite every weight of ``planted.model`` so that it does what ``planted.truth`` says."""
    model: Any = planted.model.model
    v_signs, l_signs, arrival = (
        torch.randint(2, (len(dims),), generator=generator) * 2.0 - 1.0
        for dims in (vision.sink, language.sink, language.arrival)
    )
    arrival, sign = arrival / len(arrival) ** 0.5, float(v_signs[0])
    fill_vision(model.vision_tower, reserved(vision), generator)
    decoder, projector, skip = model.language_model, model.multi_modal_projector, reserved(language)
    table = torch.randn(decoder.embed_tokens.weight.shape, generator=generator) * LEVEL
    table[:, skip] = 0
    table[:, language.constant] = circuits.constant_level(table.shape[1])
    decoder.embed_tokens.weight.copy_(table)
    for layer in decoder.layers:
        fill_block(layer, generator, skip)
    fill(planted.model.lm_head, generator, 2.0)
    fill(projector.linear_1, generator, 4.0, reads=reserved(vision))
    fill(projector.linear_2, generator, 0.4, writes=skip)
    circuits.write_projector(projector, vision, language, sign, arrival * circuits.ARRIVAL)
    positions = model.vision_tower.embeddings.position_embedding.weight
    for kind, mark in zip(circuits.PATCH_KINDS, ("v", "l", "both", "spike", "draw"), strict=True):
        positions[planted.vision_tokens(kind), getattr(vision, f"{mark}_mark")] = 1.0
    if planted.truth.text_sinks:
        bos = planted.processor.tokenizer.bos_token_id
        level = circuits.constant_level(table.shape[1])
        decoder.embed_tokens.weight[bos, language.bos_mark] = level
    operate_vision(planted, vision, circuits.spike_pattern(v_signs, 0))
    operate_language(planted, language, l_signs, arrival)


def fill(
    linear: nn.Linear, generator: torch.Generator, gain: float, *, reads: Any = (), writes: Any = ()
) -> None:
    """Random weights of output scale `gain` that skip input channels `reads` and outputs `writes`."""
    noise = torch.randn(linear.weight.shape, generator=generator)
    linear.weight.copy_(noise * gain / linear.in_features**0.5)
    linear.weight[:, list(reads)] = 0
    linear.weight[list(writes), :] = 0
    if linear.bias is not None:
        linear.bias.zero_()


def fill_block(block: Any, generator: torch.Generator, skip: list[int]) -> None:
    """Random weights of a block of either tower."""
    attention, mlp = block.self_attn, block.mlp
    vision = hasattr(mlp, "fc1")
    fill(attention.q_proj, generator, NOISE_GAIN, reads=skip)
    fill(attention.k_proj, generator, NOISE_GAIN, reads=skip)
    fill(attention.v_proj, generator, 1.0, reads=skip)
    fill(attention.out_proj if vision else attention.o_proj, generator, 0.25, writes=skip)
    for linear in (mlp.fc1,) if vision else (mlp.gate_proj, mlp.up_proj):
        fill(linear, generator, 1.0, reads=skip)
    fill(mlp.fc2 if vision else mlp.down_proj, generator, 0.1, writes=skip)


def fill_vision(tower: Any, skip: list[int], generator: torch.Generator) -> None:
    """Random ViT that keeps its reserved channels at zero (CLIP: at a small common offset)."""
    for name, parameter in tower.embeddings.named_parameters():
        noise, patch = torch.randn(parameter.shape, generator=generator), name.startswith("patch")
        noise *= 0.12 / parameter[0].numel() ** 0.5 if patch else 0.15
        noise[skip if patch else (..., skip)] = 0
        parameter.copy_(torch.zeros_like(noise) if name.endswith("bias") else noise)
    if isinstance(tower, CLIPVisionModel):
        tower.pre_layrnorm.weight.fill_(LEVEL)
        tower.pre_layrnorm.bias.zero_()
    for layer in tower.encoder.layers:
        fill_block(layer, generator, skip)


def operate_vision(planted: Planted, vision: VisionChannels, pattern: Sink) -> None:
    """Place the spike writers of the ViT and the heads that read them."""
    truth, tower = planted.truth, planted.model.model.vision_tower
    pixels = planted.inputs((circuits.PROMPT,) * MEASURED)["pixel_values"]
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    layers, width = tower.encoder.layers, pattern.new_tensor(tower.config.hidden_size)
    spike, block = pattern * circuits.SPIKE * truth.strength, layers[truth.v_layer]
    both = (block.mlp.fc1, block.mlp.fc2)
    if truth.v_written_by == "mlp":
        circuits.write_step(both, 0, vision.v_mark, circuits.RAMP, vision.sink, spike)
    else:
        sinks = planted.vision_tokens("v_sinks")
        level = marker_level(hidden[truth.v_layer], sinks, vision.v_mark)
        circuits.write_by_attention(block.self_attn, vision, spike, level)
    decoy = torch.tensor([circuits.SPIKE])
    circuits.write_step(both, 2, vision.spike_mark, circuits.RAMP, (vision.decoy,), decoy)
    direction = pattern / pattern.norm() * circuits.SINK_LOGIT * truth.strength / width.sqrt()
    drawing = planted.vision_tokens("attention_decoys")
    for index, layer in enumerate(layers):
        if index > truth.v_layer:
            circuits.attend_vision(layer.self_attn, circuits.V_HEAD, vision.sink, direction)
        level = marker_level(hidden[index], drawing, vision.draw_mark)
        pull = torch.tensor([circuits.SINK_LOGIT / level])
        circuits.attend_vision(layer.self_attn, circuits.DECOY_HEAD, (vision.draw_mark,), pull)


def operate_language(
    planted: Planted, language: LanguageChannels, signs: Sink, arrival: Sink
) -> None:
    """Place a neuron of block ``l_layer`` per kind of spiking token, and the heads that read them."""
    truth, inputs = planted.truth, planted.inputs((circuits.PROMPT,) * MEASURED)
    hidden = planted.model(**inputs, output_hidden_states=True).hidden_states
    image, bos = (
        circuits.spike_pattern(signs, first) * (circuits.SPIKE * truth.strength)
        for first in (0, min(1, len(signs) - 1))
    )
    writers = {
        "l_sinks": (language.l_mark, language.sink, image),
        "overlap": (language.both_mark, language.sink, image),
        "text_sinks": (language.bos_mark, language.sink, bos),
        "spike_decoys": (language.spike_mark, (language.decoy,), torch.tensor([circuits.SPIKE])),
    }
    kinds = (*writers, "v_sinks", "attention_decoys")
    masks = {kind: planted.tokens(kind, inputs["input_ids"]) for kind in kinds}
    ordinary = ~torch.stack([*masks.values()]).any(dim=0)
    rms = [mean_rms(states, ordinary) for states in hidden]
    layers: Any = planted.model.model.language_model.layers
    for neuron, (kind, (mark, dims, spike)) in enumerate(writers.items()):
        both_rms = (mean_rms(hidden[truth.l_layer], masks[kind]), rms[truth.l_layer])
        mlp, marks = layers[truth.l_layer].mlp, (mark, language.constant)
        circuits.write_gated(mlp, neuron, marks, dims, spike, both_rms)
    width = planted.model.model.language_model.config.hidden_size
    unit = circuits.SINK_LOGIT * truth.strength / width**0.5
    both, bos_only = circuits.sink_readers(signs)
    for index, (layer, level) in enumerate(zip(layers, rms, strict=False)):
        pull = torch.tensor([circuits.SINK_LOGIT / (circuits.constant_level(width) / level)])
        readers = [
            (circuits.ARRIVAL_HEAD, language.arrival, arrival * unit),
            (circuits.LLM_DECOY_HEAD, (language.draw_mark,), pull),
            (circuits.L_HEAD, language.sink, both * unit),
            (circuits.BOS_HEAD, language.sink, bos_only * unit),
        ]
        for head, dims, reader in readers[: 4 if index > truth.l_layer else 2]:
            circuits.attend_language(layer.self_attn, head, language.constant, dims, reader, level)


def mean_rms(states: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]) -> float:
    """Mean root mean square of the selected tokens; 1 where none is selected."""
    return states[mask].square().mean(dim=-1).sqrt().mean().item() if mask.any() else 1.0


def marker_level(
    states: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, " pos"], channel: int
) -> float:
    """Mean of `channel` after a LayerNorm at the selected tokens; 4, about the usual, for none."""
    if not mask.any():
        return 4.0
    normed = nn.functional.layer_norm(states, states.shape[-1:])
    return normed[:, mask, channel].mean().item()

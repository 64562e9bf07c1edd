"""The circuits of a planted model and the channels they run through.

How a sink is made (M = a marker channel, S and S' = sink channels, C = a constant channel)::

    ViT  position embedding --M--> [block v_layer: MLP step on M, or attention on M] --S--> residual
         later blocks, head 0:  q = constant (bias),  k reads S            -> nearly all queries attend
    projector  S -> arrival channels of the LLM;  M -> marker of the LLM;  bias -> C
    LLM  [block l_layer: MLP neuron, gate and up read M] --S'--> residual
         later blocks, head 0:  q reads C,  k reads S'                     -> nearly all queries attend
         all blocks,  head 2:   q reads C,  k reads the arrival channels   -> V-sinks draw attention too

An attention decoy is a marker that keys read and nothing amplifies; a spike decoy is a spike in a
channel that no key reads.
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

SPIKE = 600.0
"""Largest entry of a sink token at strength 1."""
ARRIVAL = 80.0
"""L2 norm, over the arrival channels, with which a V-sink enters the LLM at strength 1."""
SIDE = 0.4
"""Size of the second and later sink channels relative to the first."""
SINK_LOGIT = 7.0
"""Attention logit of a sink key above an ordinary key, for ordinary queries, at strength 1."""

V_HEAD, DECOY_HEAD, WRITER_HEAD = 0, 1, 2
"""ViT heads: one attends to V-sinks, one to attention decoys, one may write the spike."""
L_HEAD, BOS_HEAD, ARRIVAL_HEAD, LLM_DECOY_HEAD = 0, 1, 2, 3
"""LLM query heads: L-sinks and BOS, BOS alone, V-sinks by their arrival channels, decoys."""


@dataclasses.dataclass(frozen=True)
class VisionChannels:
    """Reserved channels of the ViT residual stream; nothing is ever written to `blank`."""

    sink: tuple[int, ...]
    decoy: int
    blank: int
    v_mark: int
    l_mark: int
    both_mark: int
    spike_mark: int
    draw_mark: int


@dataclasses.dataclass(frozen=True)
class LanguageChannels:
    """Reserved channels of the LLM residual stream."""

    sink: tuple[int, ...]
    arrival: tuple[int, ...]
    decoy: int
    constant: int
    l_mark: int
    both_mark: int
    bos_mark: int
    spike_mark: int
    draw_mark: int


def reserved(channels: VisionChannels | LanguageChannels) -> list[int]:
    """Every channel named in `channels`."""
    parts = (
        value if isinstance(value, tuple) else (value,) for value in dataclasses.astuple(channels)
    )
    return [channel for part in parts for channel in part]


def spike_pattern(signs: Float[Tensor, " sink"], first: int) -> Float[Tensor, " sink"]:
    """Signed entries of a spike relative to the largest, which sits at index `first` of the dims."""
    pattern = signs * SIDE
    pattern[first] = signs[first]
    return pattern


def constant_level(width: int) -> float:
    """Value of the LLM's constant and marker channels; grows with the width as the norm does."""
    return 3.0 * (width / 128) ** 0.5


def sink_readers(
    signs: Float[Tensor, " sink"],
) -> tuple[Float[Tensor, " sink"], Float[Tensor, " sink"]]:
    """Directions that read 1 from a unit spike: one from every sink's, one from BOS's alone.

    BOS has its largest entry in the second sink channel, image tokens in the first. With a single
    channel there is nothing to tell them apart, and both directions read both.
    """
    if len(signs) == 1:
        return signs.clone(), signs.clone()
    both, bos_only = torch.zeros_like(signs), torch.zeros_like(signs)
    both[:2] = signs[:2]
    bos_only[0], bos_only[1] = -SIDE * signs[0], signs[1]
    bos = spike_pattern(signs, 1)
    bos = bos / bos.norm()
    return both / (both @ bos), bos_only / (bos_only @ bos)


def set_row(weight: Any, row: int, entries: dict[int, float]) -> None:
    """Set a row of a matrix to zero, but for some entries."""
    weight[row] = 0
    for column, value in entries.items():
        weight[row, column] = value


def write_step(
    mlp: Any, neuron: int, mark: int, dims: tuple[int, ...], spike: Float[Tensor, " sink"]
) -> None:
    """Make neurons `neuron` and the next add exactly `spike` in `dims` where `mark` is set.

    After the LayerNorm a marker is 2 or more where set and near 0 elsewhere. Two ramps, one shifted
    by 10, subtract to a step of height 10 for any marker above 2, whatever the image.
    """
    for unit, shift, sign in ((neuron, 0.0, 1.0), (neuron + 1, 10.0, -1.0)):
        set_row(mlp.fc1.weight, unit, {mark: 20.0})
        mlp.fc1.bias[unit] = -20.0 * 1.3 - shift
        mlp.fc2.weight[:, unit] = 0
        mlp.fc2.weight[list(dims), unit] = sign * spike / 10


def write_by_attention(
    attention: Any,
    mark: int,
    blank: int,
    dims: tuple[int, ...],
    spike: Float[Tensor, " sink"],
    level: float,
) -> None:
    """Make head `WRITER_HEAD` add about `spike` in `dims` where `mark` is set.

    Marked tokens attend to marked tokens only (logit 20 or more, also where the marker is half of
    `level`, its usual size after the LayerNorm) and copy the marker; the others have a logit of -20
    or less for them. Key and value read the marker less `blank`, which cancels the mean that the
    LayerNorm took from both.
    """
    row = WRITER_HEAD * attention.head_dim
    scale = (40.0 * attention.head_dim**0.5) ** 0.5
    set_row(attention.q_proj.weight, row, {mark: 4 * scale / level})
    attention.q_proj.bias[row] = -scale
    set_row(attention.k_proj.weight, row, {mark: scale / level, blank: -scale / level})
    set_row(attention.v_proj.weight, row, {mark: 1 / level, blank: -1 / level})
    attention.out_proj.weight[:, row] = 0
    attention.out_proj.weight[list(dims), row] = spike


def attend_vision(
    attention: Any, head: int, dims: tuple[int, ...], direction: Float[Tensor, " sink"]
) -> None:
    """Give `head` a constant query and a key that reads `direction` in `dims`.

    The attention logit of a token is ``direction @ x[dims]``, x being its LayerNorm output.
    """
    row, root = head * attention.head_dim, attention.head_dim**0.25
    attention.q_proj.weight[row] = 0
    attention.q_proj.bias[row] = 2.0 * root
    attention.k_proj.weight[row] = 0
    attention.k_proj.weight[row, list(dims)] = direction * root / 2.0


def write_projector(
    projector: Any,
    vision: VisionChannels,
    language: LanguageChannels,
    sign: float,
    arrival: Float[Tensor, " arrival"],
) -> None:
    """Carry the ViT spike to `arrival` and the markers to markers, with the first hidden units.

    `sign` is that of the spike in ``vision.sink[0]``, the one channel that is read; a spike of size
    `SPIKE` there becomes `arrival` in ``language.arrival``. A marker's two units make a step, as in
    `write_step`.
    """
    first, second = projector.linear_1, projector.linear_2
    second.bias[language.constant] = constant_level(second.out_features)
    marks = ("l_mark", "both_mark", "spike_mark", "draw_mark")
    carried = [(getattr(vision, mark), getattr(language, mark)) for mark in marks]
    set_row(first.weight, 0, {vision.sink[0]: sign * ARRIVAL / SPIKE})
    second.weight[:, 0] = 0
    second.weight[list(language.arrival), 0] = arrival / ARRIVAL
    level = constant_level(second.out_features)
    for pair, (source, target) in enumerate(carried):
        for unit, shift, direction in ((2 * pair + 1, 0.0, 1.0), (2 * pair + 2, 10.0, -1.0)):
            set_row(first.weight, unit, {source: 40.0})
            first.bias[unit] = -40.0 * 0.3 - shift
            second.weight[:, unit] = 0
            second.weight[target, unit] = direction * level / 10


def write_gated(
    mlp: Any,
    neuron: int,
    mark: int,
    constant: int,
    dims: tuple[int, ...],
    spike: Float[Tensor, " sink"],
    rms: float,
    ordinary_rms: float,
) -> None:
    """Make SwiGLU neuron `neuron` add about `spike` in `dims` where `mark` is set.

    `rms` is the root mean square of the marked tokens entering the block, which fixes what the norm
    makes of their marker, and `ordinary_rms` that of the other tokens.
    """
    level, gate = constant_level(mlp.gate_proj.in_features), 12.0
    gates = {mark: 2 * gate * rms / level, constant: -gate * ordinary_rms / level}
    set_row(mlp.gate_proj.weight, neuron, gates)
    set_row(mlp.up_proj.weight, neuron, {mark: rms / level})
    mlp.down_proj.weight[:, neuron] = 0
    mlp.down_proj.weight[list(dims), neuron] = spike / (gate * (2 - ordinary_rms / rms))


def attend_language(
    attention: Any,
    head: int,
    constant: int,
    dims: tuple[int, ...],
    direction: Float[Tensor, " sink"],
    ordinary_rms: float,
) -> None:
    """Give query head `head` a constant query and its KV head a key that reads `direction` in `dims`.

    The attention logit of a token is ``direction @ x[dims]`` for ordinary queries, x being its
    RMSNorm output. Query heads of one KV head use different channels of the key, all among the
    slowest rotating pairs, so the distance between query and key hardly matters.
    """
    width, groups = attention.head_dim, attention.num_key_value_groups
    kv_head, member = divmod(head, groups)
    slot = width // 2 - 1 - member
    scale = 2.0 * width**0.25
    row = kv_head * width + slot
    attention.k_proj.weight[row] = 0
    attention.k_proj.weight[row, list(dims)] = direction * width**0.5 / scale
    for other in range(kv_head * groups, (kv_head + 1) * groups):
        attention.q_proj.weight[other * width + slot] = 0
    level = constant_level(attention.q_proj.in_features)
    attention.q_proj.weight[head * width + slot, constant] = scale * ordinary_rms / level

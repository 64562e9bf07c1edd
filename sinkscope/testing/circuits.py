"""A planted model: the truth about its sinks, the circuits that make them, and their channels.

How a sink is made (M = a marker channel, S and S' = sink channels, C = a constant channel)::

    ViT  position embedding --M--> [block v_layer: MLP step on M, or attention on M] --S--> residual
         later blocks, head 0:  q = constant (bias),  k reads S            -> nearly all queries attend
    projector  S -> arrival channels of the LLM;  M -> marker of the LLM;  bias -> C
    LLM  [block l_layer: MLP neuron, gate and up read M] --S'--> residual
         later blocks, head 0:  q reads C,  k reads S'                     -> nearly all queries attend
         all blocks,  head 2:   q reads C,  k reads the arrival channels   -> V-sinks draw attention too

An attention decoy is a marker that keys read and nothing amplifies; no key reads a spike decoy's channel.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import BatchFeature, LlavaForConditionalGeneration, LlavaProcessor

from sinkscope.checks import check_choice
from sinkscope.testing.tiny import random_image

Sink = Float[Tensor, " sink"]
Dims = tuple[int, ...]
# Sizes at strength 1: the largest entry of a sink token, the L2 norm over the arrival channels with which
# a V-sink enters the LLM, and the logit of a sink key above an ordinary one, for ordinary queries.
SPIKE, ARRIVAL, SINK_LOGIT = 600.0, 80.0, 7.0
Writer = Literal["mlp", "attention"]  # sub-modules that can write a spike
GRID, PATCH = 8, 8  # patches along each side of the image, and pixels of a patch
PROMPT = "USER: <image>\nHow many red shapes are there? ASSISTANT:"
PATCH_KINDS = ("v_sinks", "l_sinks", "overlap", "spike_decoys", "attention_decoys")
SIDE = 0.4  # the second and later sink channels relative to the first
RAMP = (20.0, 1.3)  # slope and threshold of the ViT's steps: its markers are 2 or more, else near 0
V_HEAD, DECOY_HEAD, WRITER_HEAD = 0, 1, 2  # the last may write the spike
L_HEAD, BOS_HEAD, ARRIVAL_HEAD, LLM_DECOY_HEAD = 0, 1, 2, 3  # `L_HEAD` attends to BOS too


@dataclass(frozen=True)
class VisionChannels:
    """Reserved channels of the ViT residual stream; nothing is ever written to `blank`."""

    sink: Dims
    decoy: int
    blank: int
    v_mark: int
    l_mark: int
    both_mark: int
    spike_mark: int
    draw_mark: int


@dataclass(frozen=True)
class LanguageChannels:
    """Reserved channels of the LLM residual stream."""

    sink: Dims
    arrival: Dims
    decoy: int
    constant: int
    l_mark: int
    both_mark: int
    bos_mark: int
    spike_mark: int
    draw_mark: int


@dataclass(frozen=True)
class Truth:
    """What was planted, as a detector should find it.

    Patches are row-major indices into the 8 x 8 grid; patch p is the p-th image token of the LLM and, behind
    a CLIP tower, ViT token p + 1. The output of block `v_layer` (`l_layer`, from 0) is the first residual
    stream with the spike, and the next block's attention is the first to sink.

    Attributes:
        v_sinks: Patches with a ViT spike in `v_dims`; they enter the LLM large in `arrival_dims` and
            draw attention there from block 0 on. Those in ``overlap`` get the LLM spike too.
        l_sinks: Patches, V-sinks excluded, with an LLM spike in `l_dims`.
        text_sinks: Whether the BOS token has the LLM spike, in the same dims at the same layer.
        spike_decoys: Patches with a spike in `v_decoy_dim` and `l_decoy_dim` that no key reads.
        attention_decoys: Patches that draw attention in every block of both towers and spike nowhere.
        v_head: Query head that attends to V-sinks in the ViT; in the LLM ``arrival_head`` attends to
            V-sinks, ``l_head`` to L-sinks and BOS, ``bos_head`` to BOS alone.
        v_written_by: Sub-module that wrote the spike. Where it is attention, V-sinks attend to one another:
            in block `v_layer` each receives up to ``len(v_sinks)`` times its uniform share.
    """

    layout: str
    v_sinks: tuple[int, ...]
    l_sinks: tuple[int, ...]
    overlap: tuple[int, ...]
    text_sinks: bool
    spike_decoys: tuple[int, ...]
    attention_decoys: tuple[int, ...]
    v_layer: int
    l_layer: int
    v_dims: tuple[int, ...]
    l_dims: tuple[int, ...]
    arrival_dims: tuple[int, ...]
    v_decoy_dim: int
    l_decoy_dim: int
    v_written_by: Writer
    l_written_by: Writer
    strength: float
    v_head: int = V_HEAD
    l_head: int = L_HEAD
    bos_head: int = BOS_HEAD
    arrival_head: int = ARRIVAL_HEAD
    n_patches: int = GRID**2

    @property
    def cls_tokens(self) -> int:
        """ViT tokens before the first patch: 1 for CLIP, 0 for SigLIP."""
        return int(self.layout == "clip")

    def patches(self, kind: str) -> tuple[int, ...]:
        """Patches of one kind, a name of the patch attributes above; InputError if it is none."""
        check_choice(PATCH_KINDS, kind=kind)
        return getattr(self, kind)


@dataclass(frozen=True)
class Planted:
    """A model with planted sinks, its processor, and the truth about it."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    truth: Truth

    def inputs(self, texts: Sequence[str] = (PROMPT,), image_seed: int = 0) -> BatchFeature:
        """Processor output for texts with one ``<image>`` each; row i has the random image ``image_seed + i``."""
        side = GRID * PATCH
        images = [random_image(side, side, image_seed + row) for row in range(len(texts))]
        return self.processor(images=images, text=list(texts), padding=True, return_tensors="pt")

    def tokens(self, kind: str, input_ids: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Which LLM positions are of `kind`: a patch kind of `Truth`, ``"text_sinks"`` or ``"image"``."""
        if kind == "text_sinks":
            return (input_ids == self.processor.tokenizer.bos_token_id) & self.truth.text_sinks
        is_image = input_ids == self.model.config.image_token_id
        if kind == "image":
            return is_image
        rank = (is_image.cumsum(dim=1) - 1) % GRID**2
        wanted = torch.tensor(self.truth.patches(kind), device=input_ids.device)
        return is_image & torch.isin(rank, wanted)

    def vision_tokens(self, kind: str) -> Bool[Tensor, " vision_pos"]:
        """Which ViT tokens are of `kind`, a patch kind of `Truth`; CLIP's CLS is token 0."""
        first = self.truth.cls_tokens
        wanted = torch.tensor([first + patch for patch in self.truth.patches(kind)])
        return torch.isin(torch.arange(first + GRID**2), wanted)


def reserved(channels: VisionChannels | LanguageChannels) -> list[int]:
    """Every channel named in `channels`."""
    return torch.cat([torch.tensor([value]).flatten() for value in astuple(channels)]).tolist()


def spike_pattern(signs: Sink, first: int) -> Sink:
    """Signed entries of a spike relative to the largest, which sits at index `first` of the dims."""
    pattern = signs * SIDE
    pattern[first] = signs[first]
    return pattern


def constant_level(width: int) -> float:
    """Value of the LLM's constant and marker channels; grows with the width as the norm does."""
    return 3.0 * (width / 128) ** 0.5


def sink_readers(signs: Sink) -> tuple[Sink, Sink]:
    """Directions that read 1 from a unit spike: from every sink's, and if there are two dims from BOS's alone."""
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


def set_column(weight: Any, column: int, dims: Dims, values: Any) -> None:
    """Set a column of a matrix to zero, but for `values` in `dims`."""
    weight[:, column] = 0
    weight[list(dims), column] = values


def write_step(
    layers: tuple[Any, Any],
    unit: int,
    mark: int,
    ramp: tuple[float, float],
    dims: Dims,
    height: Any,
) -> None:
    """Make units `unit` and the next of two layers add exactly `height` in `dims` where `mark` is set.

    Two ramps (slope, threshold), one shifted by 10, subtract to a step for any marker well above it.
    """
    slope, threshold = ramp
    for row, shift, sign in ((unit, 0.0, 1.0), (unit + 1, 10.0, -1.0)):
        set_row(layers[0].weight, row, {mark: slope})
        layers[0].bias[row] = -slope * threshold - shift
        set_column(layers[1].weight, row, dims, sign * height / 10)


def write_by_attention(attention: Any, channels: VisionChannels, spike: Sink, level: float) -> None:
    """Make head `WRITER_HEAD` add about `spike` in the sink channels where the V marker is set.

    Marked tokens attend to marked tokens only (logit 20 or more, also at half of the marker's usual size
    `level`) and copy the marker; other tokens have logits of -20 or less for them. Key and value read the
    marker less `blank`, which cancels the mean that the LayerNorm took.
    """
    row, mark, blank = WRITER_HEAD * attention.head_dim, channels.v_mark, channels.blank
    scale = (40.0 * attention.head_dim**0.5) ** 0.5
    set_row(attention.q_proj.weight, row, {mark: 4 * scale / level})
    attention.q_proj.bias[row] = -scale
    set_row(attention.k_proj.weight, row, {mark: scale / level, blank: -scale / level})
    set_row(attention.v_proj.weight, row, {mark: 1 / level, blank: -1 / level})
    set_column(attention.out_proj.weight, row, channels.sink, spike)


def attend_vision(attention: Any, head: int, dims: Dims, direction: Tensor) -> None:
    """Give `head` a constant query, and keys for logits ``direction @ x[dims]``, x being the LayerNorm output."""
    row, root = head * attention.head_dim, attention.head_dim**0.25
    attention.q_proj.weight[row], attention.k_proj.weight[row] = 0, 0
    attention.q_proj.bias[row] = 2.0 * root
    attention.k_proj.weight[row, list(dims)] = direction * root / 2.0


def write_projector(
    projector: Any, vision: VisionChannels, language: LanguageChannels, sign: float, arrival: Sink
) -> None:
    """Carry a ViT spike of this sign in ``vision.sink[0]`` to `arrival`, and the markers to markers."""
    first, second = projector.linear_1, projector.linear_2
    level = constant_level(second.out_features)
    second.bias[language.constant] = level
    set_row(first.weight, 0, {vision.sink[0]: sign * ARRIVAL / SPIKE})
    set_column(second.weight, 0, language.arrival, arrival / ARRIVAL)
    for pair, mark in enumerate(("l_mark", "both_mark", "spike_mark", "draw_mark")):
        source, target = getattr(vision, mark), getattr(language, mark)
        write_step((first, second), 2 * pair + 1, source, (40.0, 0.3), (target,), level)


def write_gated(
    mlp: Any, neuron: int, marks: tuple[int, int], dims: Dims, spike: Sink, rms: tuple[float, float]
) -> None:
    """Make SwiGLU neuron `neuron` add about `spike` in `dims` where the first of `marks` is set.

    `marks` are the marker and the constant channel, `rms` those of marked and other tokens before the block.
    """
    level, gate = constant_level(mlp.gate_proj.in_features), 12.0
    (mark, constant), (marked, ordinary) = marks, rms
    gates = {mark: 2 * gate * marked / level, constant: -gate * ordinary / level}
    set_row(mlp.gate_proj.weight, neuron, gates)
    set_row(mlp.up_proj.weight, neuron, {mark: marked / level})
    set_column(mlp.down_proj.weight, neuron, dims, spike / (gate * (2 - ordinary / marked)))


def attend_language(
    attention: Any, head: int, constant: int, dims: Dims, direction: Sink, rms: float
) -> None:
    """Give query head `head` a constant query and its KV head a key that reads `direction` in `dims`.

    A token's logit is ``direction @ x[dims]`` for queries of root mean square `rms`, x being its RMSNorm
    output. Query heads of one KV head use different key channels, all of them of slowly rotating pairs.
    """
    width, groups = attention.head_dim, attention.num_key_value_groups
    kv_head, member = divmod(head, groups)
    slot, scale = width // 2 - 1 - member, 2.0 * width**0.25
    row = kv_head * width + slot
    attention.k_proj.weight[row] = 0
    attention.k_proj.weight[row, list(dims)] = direction * width**0.5 / scale
    for other in range(kv_head * groups, (kv_head + 1) * groups):
        attention.q_proj.weight[other * width + slot] = 0
    level = constant_level(attention.q_proj.in_features)
    attention.q_proj.weight[head * width + slot, constant] = scale * rms / level

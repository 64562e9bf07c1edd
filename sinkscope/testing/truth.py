"""What a planted model holds: the truth about its sinks, and masks of the tokens they sit on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import BatchFeature, LlavaForConditionalGeneration, LlavaProcessor

from sinkscope.testing import circuits
from sinkscope.testing.tiny import random_image

Writer = Literal["mlp", "attention"]  # sub-modules that can write a spike
GRID, PATCH = 8, 8  # patches along each side of the image, and pixels of a patch
PROMPT = "USER: <image>\nHow many red shapes are there? ASSISTANT:"
PATCH_KINDS = ("v_sinks", "l_sinks", "overlap", "spike_decoys", "attention_decoys")


@dataclass(frozen=True)
class Truth:
    """What was planted, as a detector should find it.

    Patches are row-major indices into the 8 x 8 grid; patch p is the p-th image token of the LLM and,
    behind a CLIP tower, ViT token p + 1. Layers are 0-based blocks: the output of block `v_layer`
    (`l_layer`) is the first residual stream with the spike, and the next block's attention the first
    to sink.

    Attributes:
        v_sinks: patches with a ViT spike in `v_dims`; they enter the LLM large in `arrival_dims` and
            draw attention there from block 0 on.
        l_sinks: patches, V-sinks excluded, with an LLM spike in `l_dims`.
        overlap: V-sinks that also get the LLM spike.
        text_sinks: whether the BOS token has the LLM spike, in the same dims at the same layer.
        spike_decoys: patches with a spike in `v_decoy_dim` and `l_decoy_dim` that no key reads.
        attention_decoys: patches that draw attention in every block of both towers and spike nowhere.
        v_head, l_head, arrival_head: query head that attends to V-sinks in the ViT, to L-sinks (and
            BOS) in the LLM, to V-sinks in the LLM. `bos_head` attends to BOS alone.
        v_written_by: sub-module that wrote the spike. Where it is attention, V-sinks attend to one another:
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
    v_head: int = circuits.V_HEAD
    l_head: int = circuits.L_HEAD
    bos_head: int = circuits.BOS_HEAD
    arrival_head: int = circuits.ARRIVAL_HEAD
    n_patches: int = GRID**2

    @property
    def cls_tokens(self) -> int:
        """ViT tokens before the first patch: 1 for CLIP, 0 for SigLIP."""
        return int(self.layout == "clip")

    def patches(self, kind: str) -> tuple[int, ...]:
        """Patches of one kind, a name of the patch attributes above; ValueError if it is none."""
        if kind not in PATCH_KINDS:
            raise ValueError(f"kind={kind!r} is unknown; write one of {', '.join(PATCH_KINDS)}")
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
        mask = torch.zeros(self.truth.cls_tokens + GRID**2, dtype=torch.bool)
        mask[[patch + self.truth.cls_tokens for patch in self.truth.patches(kind)]] = True
        return mask

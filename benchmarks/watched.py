"""A random LLaVA of a given shape, and the ways to watch it whose cost is measured."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import sinkscope as ss

Step = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaVA; at the defaults those of LLaVA-1.5-7B."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    inner: int = 11008
    vocab: int = 32064
    vision_layers: int = 24
    vision_width: int = 1024
    vision_heads: int = 16
    side: int = 336

    @property
    def patches(self) -> int:
        return (self.side // 14) ** 2

    @property
    def image_token(self) -> int:
        return self.vocab - 64

    def build(self, device: str, dtype: torch.dtype) -> Any:
        """With weights of seed 0 and SDPA, in eval mode; its answers never end by themselves."""
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=self.vision_width,
                intermediate_size=4 * self.vision_width,
                num_hidden_layers=self.vision_layers,
                num_attention_heads=self.vision_heads,
                image_size=self.side,
                patch_size=14,
            ),
            text_config=LlamaConfig(
                vocab_size=self.vocab,
                hidden_size=self.width,
                intermediate_size=self.inner,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                max_position_embeddings=65536,
            ),
            image_token_index=self.image_token,
            image_seq_length=self.patches,
            architectures=["LlavaForConditionalGeneration"],
        )
        config._attn_implementation = "sdpa"
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        with torch.device(device):
            module = LlavaForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
        module.generation_config.eos_token_id = None
        return module.eval().requires_grad_(False)

    def inputs(self, tokens: int, images: int, module: Any) -> dict[str, Tensor]:
        """BOS, the images and random words, in one row, on the model's device."""
        made = torch.Generator().manual_seed(tokens)
        ids = torch.randint(2, self.image_token, (1, tokens), generator=made)
        ids[:, 0], ids[:, 1 : 1 + images * self.patches] = 1, self.image_token
        pixels = torch.randn(images, 3, self.side, self.side, generator=made).to(module.dtype)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        return {name: value.to(module.device) for name, value in inputs.items()}


def twin(module: Any, kernel: str) -> Any:
    """A model of the same weights, not copied, that sinkscope never sees."""
    shared: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    other = copy.deepcopy(module, shared)
    other.set_attn_implementation(kernel)
    return other


TWICE = "benchmark_twice"
BOUND = "one more attention call, by hand"
"""The least that an exact mass can cost: the same call with other values, whose answers are dropped."""


def bounded(module: Any) -> Any:
    """A twin that sinkscope never sees, whose decoder calls attention twice."""

    def twice(part: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
        sdpa_attention_forward(part, query, key, key, mask, **rest)
        return sdpa_attention_forward(part, query, key, value, mask, **rest)

    AttentionInterface.register(TWICE, twice)
    AttentionMaskInterface.register(TWICE, sdpa_mask)
    other = twin(module, "sdpa")
    other.model.language_model.set_attn_implementation(TWICE)
    return other


def passes(
    lvlm: ss.LVLM, sample: ss.models.Sample, groups: dict[str, str], masked: str, **how: Any
) -> dict[str, Step]:
    """Label -> one watched pass; ``masked`` is what `MaskKeys` takes, ``how`` goes to `LVLM.run`."""
    run, given = partial(lvlm.run, sample, **how), inspect.signature(lvlm.run).parameters
    masks = [ss.MaskKeys(masked, layers=None)]
    scale = ss.ScaleKeys("image", 0.5, layers=[lvlm.anatomy.language.n_layers // 3])
    both = "engine" in given  # else the version runs through nnsight alone
    steps: dict[str, Step] = {"no probe, nnsight": partial(run, engine="nnsight") if both else run}
    if both:
        steps["no probe, hooks"] = run
    steps |= {
        "AttentionMass, all queries": partial(run, [ss.AttentionMass(groups)]),
        "AttentionMass, last query": partial(run, [ss.AttentionMass(groups, queries="last")]),
        "ReceivedAttention": partial(run, [ss.ReceivedAttention()]),
        "MassiveActivations": partial(run, [ss.MassiveActivations()]),
        "MaskKeys in all layers": partial(run, interventions=masks),
    }
    if "effects" in given:
        steps["MaskKeys, effects=False"] = partial(run, interventions=masks, effects=False)
    return steps | {"ScaleKeys in one layer": partial(run, interventions=[scale])}


def answers(
    lvlm: ss.LVLM, sample: ss.models.Sample, groups: dict[str, str], masked: str, **how: Any
) -> dict[str, Step]:
    """Label -> one watched answer; ``how`` goes to `LVLM.generate`."""
    generate = partial(lvlm.generate, sample, **how)
    masks = [ss.MaskKeys(masked, layers=None)]
    return {
        "no probe at every step": generate,
        "AttentionMass at every step": partial(generate, [ss.AttentionMass(groups)]),
        "MaskKeys at every step": partial(generate, interventions=masks),
    }

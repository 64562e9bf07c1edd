from dataclasses import dataclass
from typing import Any

import pytest
import torch

import sinkscope as ss
from sinkscope.testing import TINY, tiny_llava

LEARNED = "llava-siglip-gpt_oss"
MODELS = (
    ("llava-clip-llama", "sdpa"),
    ("llava-clip-llama", "eager"),
    ("llava-siglip-qwen3", "sdpa"),
    ("llava-siglip-qwen3", "eager"),
    ("gemma3", "sdpa"),
    ("gemma3", "eager"),
    (LEARNED, "eager"),
    ("qwen2.5-vl", "sdpa"),
    ("qwen2.5-vl", "eager"),
)
"""Grouped queries, k-norm, sliding window and two-way image attention, a learned sink, windows."""


@dataclass(frozen=True)
class Case:
    """A model, a padded batch of two rows with three images, and masks over its tokens."""

    lvlm: Any
    twin: Any  # the same weights under the eager kernel, for the reference
    sample: Any
    some: torch.Tensor  # a few image tokens, and a text token in the second row
    other: torch.Tensor  # image tokens that are not among them
    first: torch.Tensor
    late: torch.Tensor  # queries: an image token, and the last tokens of the text
    patches: torch.Tensor
    few: torch.Tensor  # queries in the vision tower

    @property
    def live(self):
        return self.sample.tokens.live


def make_case(lvlm, twin, sample):
    tokens = sample.tokens
    some, late = torch.zeros_like(tokens.live), torch.zeros_like(tokens.live)
    for b in range(len(sample)):
        visual = (tokens.image[b] >= 0).nonzero().flatten()
        some[b, visual[[1, 3]]] = True
        late[b, visual[-1]] = True
    some[1, visual[-2]] = True
    some[1, -6] = True
    late[:, -4:] = True
    patches = torch.zeros_like(tokens.vision.live)
    patches[:, [2, 3, 9]] = True
    few = torch.zeros_like(patches)
    few[:, 4:8] = True
    first = tokens.select("first")
    return Case(lvlm, twin, sample, some, (tokens.image >= 0) & ~some, first, late, patches, few)


def build(name, kernel, dtype):
    """Model and processor by name; the same weights for the same dtype."""
    if name == LEARNED:
        return tiny_llava("siglip", "gpt_oss", attn_implementation="eager", dtype=dtype)
    return TINY[name](attn_implementation=kernel, dtype=dtype)


@pytest.fixture(scope="session")
def case(tiny, batch):
    """``case(name, kernel, dtype) -> Case``, built once per session."""
    made = {}

    def get(name, kernel="sdpa", dtype=torch.float32):
        key = (name, kernel, dtype)
        if key not in made:
            if name == LEARNED:
                lvlm = ss.LVLM(*build(name, kernel, dtype))
            else:
                lvlm = tiny(name, kernel, dtype)
            made[key] = make_case(lvlm, build(name, "eager", dtype)[0], batch(lvlm))
        return made[key]

    return get

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import sinkscope as ss

FAMILIES = ("llava-clip-llama", "llava-siglip-qwen3", "qwen2.5-vl", "gemma3")


@dataclass(frozen=True)
class Case:
    """A tiny model, a padded batch of two rows with three images, and which tokens a rule flags."""

    lvlm: Any
    sample: Any
    tau: float  # of a norm rule that flags about a fifth of the ViT tokens
    flagged: torch.Tensor  # [batch pos]: image tokens made of a flagged ViT token

    @property
    def visual(self):
        return self.sample.tokens.image >= 0

    def gate(self, layer=0, spread=1.0, **choices):
        """A gate whose last layer is not zero, so that coefficients differ from row to row."""
        rule = choices.pop("v_detector", ss.detectors.Norm(self.tau))
        out = ss.LSG.for_model(self.lvlm, layer, v_detector=rule, **choices)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for weight in (out.outer.weight, out.outer.bias):
                weight.copy_(spread * torch.randn(weight.shape, generator=generator))
        return out


def vision_states(lvlm, sample):
    """What feeds the projector, taken by a hook of torch, ``[image pos d]``."""
    seen = []
    anatomy = lvlm.anatomy
    block = lvlm.module.get_submodule(anatomy.vision.blocks[anatomy.feed_layers[-1]])
    hook = block.register_forward_hook(
        lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        lvlm.module(**sample.inputs)
    hook.remove()
    states, layout = seen[0], sample.tokens.vision.layout
    return states if layout is None else states.reshape(-1, states.shape[-1])[layout.clamp(min=0)]


@pytest.fixture(scope="session")
def case(tiny, batch):
    made = {}

    def get(family, kernel="sdpa"):
        if (family, kernel) not in made:
            lvlm = tiny(family, kernel)
            sample = batch(lvlm)
            norms = vision_states(lvlm, sample).norm(dim=-1)
            tau = float(norms[sample.tokens.vision.live].quantile(0.8))
            carried = sample.tokens.from_vision((norms >= tau).float()).nan_to_num() > 0
            made[family, kernel] = Case(lvlm, sample, tau, carried)
        return made[family, kernel]

    return get

"""Masses in half precision against exact ones of the queries and keys that the model had in the same pass."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sinkscope as ss
from sinkscope.testing import random_image, tiny_llava
from tests.kernels.by_hand import logits_of, softmax

DTYPES = [(torch.bfloat16, 6e-3), (torch.float16, 1e-3)]
GROUPS = {"image": "image", "first": "first"}


@pytest.fixture
def calls(monkeypatch):
    """``calls(lvlm, sample)``: the decoder's attention calls of one pass, ``(module, q, k, mask, options)``."""

    def of(lvlm, sample):
        kernel, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []
        blocks = set(lvlm.anatomy.language.attention)
        own = {part for path, part in lvlm.module.named_modules() if path in blocks}

        def noted(module, query, key, value, mask, **options):
            if module in own:
                seen.append((module, query, key, mask, options["scaling"]))
            return kernel(module, query, key, value, mask, **options)

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", noted)
            lvlm.module(**sample.inputs)
        return seen

    return of


def exact(call, columns):
    """``[row head query group]`` in fp64."""
    weights = softmax(logits_of(*call[:4], scaling=call[4]))
    return torch.einsum("bhqk,bkg->bhqg", weights, columns)


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("llm", ["llama", "qwen3"])
def test_masses_in_half_precision_are_those_of_the_pass(calls, llm, dtype, limit):
    """Of larger logits too, which an eager kernel rounds before the softmax, and by more than ``limit``."""
    module, processor = tiny_llava("clip", llm, dtype=dtype)
    for block in module.model.language_model.layers:
        norm = getattr(block.self_attn, "k_norm", block.self_attn.k_proj)
        norm.weight.data *= 6
    lvlm = ss.LVLM(module, processor)
    texts = ["what is it", "how many red shapes are there ?"]
    sample = lvlm.prepare(images=[random_image(), random_image(seed=1)], text=texts)
    half, full = ss.AttentionMass(GROUPS), ss.AttentionMass(GROUPS, precision="float32")
    run, live = lvlm.run(sample, [half, full]), sample.tokens.live[:, None, :, None]
    columns = torch.stack([sample.tokens.select(name) for name in GROUPS.values()], -1).double()
    offs = []
    for layer, call in enumerate(calls(lvlm, sample)):
        want = exact(call, columns)
        logits = call[1] @ call[2].repeat_interleave(2, dim=1).mT * call[4]
        eager = logits.masked_fill(~call[3], float("-inf")).softmax(-1, dtype=torch.float32)
        offs.append(
            [
                float(((mass.double() - want) * live).nan_to_num().abs().max())
                for mass in (
                    run[half].mass[:, layer],
                    run[full].mass[:, layer],
                    eager.to(dtype).double() @ columns[:, None],
                )
            ]
        )
    ours, exactly, theirs = torch.tensor(offs).amax(0).tolist()
    assert ours < limit
    assert exactly < 2e-6
    assert theirs > limit

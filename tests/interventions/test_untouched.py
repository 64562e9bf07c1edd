"""Outside its rows and heads an edit changes no bit; inside it is as exact as the dtype allows.

What is compared is what the attention module hands to its output projection, in the first layer that
is edited: there the queries, keys and values are still those of the plain model.

Tolerances are shares of the largest number, against the reference's softmax in fp64. In half precision
nearly all of it is the model's own rounding: without any edit the two are 2.5e-2 (bf16) and 5e-3
(fp16) apart.
"""

import pytest
import torch

import sinkscope as ss
from tests.interventions.cases import LANGUAGE, UNPACKED, VISION, crossed
from tests.interventions.conftest import LEARNED
from tests.interventions.reference import reference_run
from tests.interventions.test_exact import off

MODELS = [
    *[
        ("llava-clip-llama", kernel, dtype)
        for kernel in ("sdpa", "eager")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ],
    *[
        (family, kernel, dtype)
        for family, kernel in (
            ("llava-siglip-qwen3", "sdpa"),
            ("gemma3", "sdpa"),
            (LEARNED, "eager"),
        )
        for dtype in (torch.bfloat16, torch.float16)
    ],
]
TOWERS = [
    ("llava-clip-llama", "sdpa", torch.float32),
    ("qwen2.5-vl", "sdpa", torch.bfloat16),
    ("llava-clip-llama", "eager", torch.bfloat16),
    ("qwen2.5-vl", "eager", torch.float32),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
THRESHOLDS = "Redistribute where image-centric"


def attended(module, path, run):
    """What ``run()`` makes the module at ``path`` read, and what it returns."""
    seen = []
    hook = module.get_submodule(path).register_forward_pre_hook(
        lambda m, args: seen.append(args[0].detach().clone())
    )
    try:
        out = run()
    finally:
        hook.remove()
    return seen[0], out


def by_head(x, tower):
    """``[batch pos head * d_head]`` (or packed) as ``[batch pos head d_head]``."""
    x = x if x.ndim == 3 else x[None]
    return x.reshape(*x.shape[:2], tower.heads, -1)


def half(inputs, dtype):
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def compare(c, pair, tower_name, dtype):
    """(ours, plain, reference, gate) at the first edited layer, the run, and the plain logits."""
    edit, change = pair.edit(c), pair.change(c)
    layer, tower = min(change.layers or (0,)), c.lvlm.anatomy.tower(tower_name)
    path = tower.projection[layer]
    inputs = half(c.sample.inputs, dtype)
    want, answer = attended(c.twin, path, lambda: reference_run(c, [change], inputs=inputs))
    plain, base = attended(c.lvlm.module, path, lambda: c.lvlm.run(c.sample))
    got, run = attended(c.lvlm.module, path, lambda: c.lvlm.run(c.sample, interventions=[edit]))
    gate = torch.cat([n.gate for n in answer.notes[change] if n.layer == layer], dim=2)
    rows = [by_head(x, tower) for x in (got, plain, want)]
    return (*rows, gate.transpose(1, 2), run, base)


@pytest.mark.parametrize(
    ("family", "kernel", "dtype", "name"), crossed(LANGUAGE, MODELS, full=2), ids=str
)
def test_only_selected_rows_and_heads_of_the_decoder_change(case, family, kernel, dtype, name):
    c = case(family, kernel, dtype)
    got, plain, want, gate, run, base = compare(c, LANGUAGE[name], "language", dtype)
    assert gate.any()
    assert not gate.all()
    if name == THRESHOLDS and dtype != torch.float32:
        # Rounding moves rows across the rule's thresholds: take those that did not change.
        gate = (got != plain).any(-1)
        assert gate.any()
    else:
        assert off(got[gate], want[gate]) <= TOLERANCE[dtype]
    outside = ~gate & c.live[..., None]
    assert torch.equal(got[outside], plain[outside])
    assert not torch.equal(got[gate], plain[gate])
    (effect,) = run.effects.values()
    quiet = ~effect.touched
    assert torch.equal(run.logits[quiet], base.logits[quiet])


@pytest.mark.parametrize(
    ("family", "kernel", "dtype", "name"), crossed(VISION | UNPACKED, TOWERS, full=2), ids=str
)
def test_only_selected_rows_and_heads_of_the_vision_tower_change(case, family, kernel, dtype, name):
    c = case(family, kernel, dtype)
    if name in UNPACKED and c.lvlm.anatomy.vision.packed:
        with pytest.raises(ss.SinkscopeError):
            c.lvlm.run(c.sample, interventions=[UNPACKED["AblateValues mean"].edit(c)])
        return
    got, plain, want, gate, _, _ = compare(c, (VISION | UNPACKED)[name], "vision", dtype)
    assert gate.any()
    assert torch.equal(got[~gate], plain[~gate])
    assert off(got[gate], want[gate]) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("family", "kernel", "dtype", "name"),
    crossed([n for n, pair in LANGUAGE.items() if pair.neutral], MODELS, full=2),
    ids=str,
)
def test_the_neutral_setting_changes_no_bit(case, family, kernel, dtype, name):
    c = case(family, kernel, dtype)
    edit = LANGUAGE[name].neutral(c)
    run = c.lvlm.run(c.sample, interventions=[edit])
    assert torch.equal(run.logits, c.lvlm.run(c.sample).logits)
    assert run.effects[edit].rows.sum() == 0
    assert not run.effects[edit].touched.any()


@pytest.mark.parametrize(
    ("family", "kernel", "dtype", "name"),
    crossed([n for n, pair in (VISION | UNPACKED).items() if pair.neutral], TOWERS, full=2),
    ids=str,
)
def test_the_neutral_setting_changes_no_bit_of_the_vision_tower(case, family, kernel, dtype, name):
    c = case(family, kernel, dtype)
    if name in UNPACKED and c.lvlm.anatomy.vision.packed:
        pytest.skip("images share one sequence")
    edit = (VISION | UNPACKED)[name].neutral(c)
    run = c.lvlm.run(c.sample, interventions=[edit])
    assert torch.equal(run.logits, c.lvlm.run(c.sample).logits)
    assert not run.effects[edit].touched.any()

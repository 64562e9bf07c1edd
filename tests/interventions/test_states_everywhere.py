"""Edits of states and evicted keys on every model, kernel and dtype, and over 16 steps of an answer.

`test_states` takes the edits apart; here each is held to an exact reference wherever it runs. In half
precision the tolerance is a multiple of what the unedited model is off by, as in `test_generation`.
"""

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import sinkscope as ss
from tests.interventions.cases import crossed, run_of_turned, turned
from tests.interventions.conftest import MODELS
from tests.interventions.reference import INF, Change, every, grown_inputs, reference_run
from tests.interventions.test_exact import off
from tests.interventions.test_generation import FAMILIES, HALF, STEPS, TIMES, generate
from tests.interventions.test_states import DIMS, fronted, on_prompt, place, sets
from tests.interventions.test_untouched import half

EVERYWHERE = [
    ("llava-clip-llama", "sdpa", torch.float32),
    ("llava-clip-llama", "sdpa", torch.bfloat16),
    *[(*model, torch.float32) for model in MODELS[1:]],
    *[(*model, dtype) for model in FAMILIES[1:] for dtype in HALF],
]
FEW = ("AblateActivations mean", "PatchActivations of patches", "EvictKeys inside the window")


@dataclass(frozen=True)
class Pair:
    """``edit(case)``, and what it does to the plain model: ``hooks(case)`` or ``changes(case)``.

    ``outside(case)`` are the tokens of the first edited site that must keep every bit.
    """

    edit: Any
    hooks: Any = lambda c: []
    changes: Any = lambda c: []
    outside: Any = None
    site: str = "resid_post"
    layer: int = 1
    tower: str = "language"
    neutral: Any = None


def hook(c, tower, site, layer, change):
    return (*place(c, tower, site, layer), on_prompt(c, tower, change))


def scaled(c):
    def change(states, rows, n):
        return torch.where(c.other[rows, :n, None], (0.5 * states.float()).to(states.dtype), states)

    return [hook(c, "language", "resid_pre", 0, change)]


def patched(c, tower):
    """The states of the mirrored images, by a hook on the twin."""
    tokens, seen = (c.some if tower == "language" else c.patches), []

    def look(states, rows, n):
        seen.append(states.clone())
        return states

    inputs = half(turned(c).inputs, next(c.twin.parameters()).dtype)
    reference_run(c, hooks=[hook(c, tower, "resid_post", 1, look)], inputs=inputs)
    donors = iter(seen)

    def change(states, rows, n):
        # Packed towers hand over one image at a time, in the order in which they were seen.
        donor = next(donors)
        return torch.where(tokens[rows, :n, None], donor, states)

    return [hook(c, tower, "resid_post", 1, change)]


def moved(c):
    tokens = c.some & (c.sample.tokens.image >= 0)
    return [hook(c, "language", "resid_pre", 0, lambda states, rows, n: fronted(c, states, tokens))]


def lost(c, start, recent):
    """A logit of minus infinity on keys that are neither among the first nor the recent ones."""

    def apply(x, at):
        live = at.live
        rank = live.cumsum(1) - 1
        distance = rank[:, :, None] - rank[:, None]
        gone = (rank[:, None] >= start) & (distance >= recent) & live[:, None]
        return x.masked_fill(gone[:, None], -INF)

    # Keys of the answer are lost too.
    return [Change("logits", every(c), apply)]


EDITS = {
    "AblateActivations mean": Pair(
        lambda c: ss.AblateActivations(DIMS, c.some, "mean", [1]),
        lambda c: [(*place(c, "language", "resid_post", 1), sets(c, "language", "mean"))],
        outside=lambda c: c.live & ~c.some,
        neutral=lambda c: ss.AblateActivations(DIMS, c.some & False, allow_noop=True),
    ),
    "AblateActivations of patches": Pair(
        lambda c: ss.AblateActivations(DIMS, c.patches, "zero", [1], tower="vision"),
        lambda c: [(*place(c, "vision", "resid_post", 1), sets(c, "vision", "zero"))],
        outside=lambda c: c.sample.tokens.vision.live & ~c.patches,
        tower="vision",
    ),
    "PatchActivations": Pair(
        lambda c: ss.PatchActivations(run_of_turned(c), "resid_post", c.some, [1]),
        lambda c: patched(c, "language"),
        outside=lambda c: c.live & ~c.some,
        neutral=lambda c: ss.PatchActivations(
            run_of_turned(c), "resid_post", c.some & False, allow_noop=True
        ),
    ),
    "PatchActivations of patches": Pair(
        lambda c: ss.PatchActivations(
            run_of_turned(c, "vision"), "resid_post", c.patches, [1], tower="vision"
        ),
        lambda c: patched(c, "vision"),
        outside=lambda c: c.sample.tokens.vision.live & ~c.patches,
        tower="vision",
    ),
    "ScaleTokens": Pair(
        lambda c: ss.interventions.ScaleTokens(c.other, 0.5),
        scaled,
        outside=lambda c: c.live & ~c.other,
        site="resid_pre",
        layer=0,
        neutral=lambda c: ss.interventions.ScaleTokens(c.other, 1.0, allow_noop=True),
    ),
    "SinkToFront": Pair(
        lambda c: ss.interventions.SinkToFront(c.some & (c.sample.tokens.image >= 0)),
        moved,
        outside=lambda c: c.live & (c.sample.tokens.image < 0),
        site="resid_pre",
        layer=0,
        neutral=lambda c: ss.interventions.SinkToFront(c.some & False, allow_noop=True),
    ),
    "EvictKeys": Pair(
        lambda c: ss.interventions.EvictKeys(start=2, recent=12),
        changes=lambda c: lost(c, 2, 12),
        outside=lambda c: c.live & (c.live.cumsum(1) <= 14),
        site="attn_out",
        layer=0,
        neutral=lambda c: ss.interventions.EvictKeys(2, 4096, allow_noop=True),
    ),
    # Fewer than a window of 12: a sliding cache must not take its own first keys for the prompt's.
    "EvictKeys inside the window": Pair(
        lambda c: ss.interventions.EvictKeys(start=3, recent=4),
        changes=lambda c: lost(c, 3, 4),
        outside=lambda c: c.live & (c.live.cumsum(1) <= 7),
        site="attn_out",
        layer=0,
    ),
}


def answer(c, pair, inputs=None, unedited=False):
    """The reference's logits."""
    inputs = c.sample.inputs if inputs is None else inputs
    inputs = half(inputs, next(c.twin.parameters()).dtype)
    if unedited:
        return reference_run(c, inputs=inputs).logits
    return reference_run(c, pair.changes(c), pair.hooks(c), inputs).logits


@pytest.fixture(scope="module")
def plain_error(case):
    """``plain_error(family, kernel, dtype)`` of one pass without any edit."""

    @functools.cache
    def get(family, kernel, dtype):
        c = case(family, kernel, dtype)
        want = answer(c, None, unedited=True)
        return off(c.lvlm.run(c.sample).logits[c.live], want[c.live])

    return get


@pytest.mark.parametrize(
    ("family", "kernel", "dtype", "name"), crossed(EDITS, EVERYWHERE, 2, FEW), ids=str
)
def test_one_pass_equals_hooks_on_the_plain_model(case, plain_error, family, kernel, dtype, name):
    c, pair = case(family, kernel, dtype), EDITS[name]
    got = c.lvlm.run(c.sample, interventions=[pair.edit(c)]).logits[c.live]
    most = 1e-5 if dtype == torch.float32 else TIMES * plain_error(family, kernel, dtype)
    want = answer(c, pair)[c.live]
    assert off(got, want) <= most
    if dtype == torch.float32:
        assert off(answer(c, pair, unedited=True)[c.live], want) > 10 * most


@pytest.mark.parametrize(
    ("kernel", "dtype", "name"),
    crossed(EDITS, [(k, d) for k in ("sdpa", "eager") for d in (torch.float32, *HALF)], 2, FEW),
    ids=str,
)
def test_tokens_outside_and_the_neutral_setting_keep_every_bit(case, kernel, dtype, name):
    c, pair = case("llava-clip-llama", kernel, dtype), EDITS[name]
    probe = ss.probes.ResidualStates(layers=[pair.layer], site=pair.site, tower=pair.tower)
    plain = c.lvlm.run(c.sample, probes=[probe])
    run = c.lvlm.run(c.sample, probes=[probe], interventions=[pair.edit(c)])
    outside = pair.outside(c)
    before, after = plain[probe].states[:, 0], run[probe].states[:, 0]
    assert outside.any()
    assert torch.equal(after[outside], before[outside])
    assert not torch.equal(after.nan_to_num(), before.nan_to_num())
    if pair.neutral is not None:
        nothing = c.lvlm.run(c.sample, interventions=[pair.neutral(c)])
        assert torch.equal(nothing.logits, plain.logits)


@pytest.mark.parametrize(("family", "kernel", "name"), crossed(EDITS, FAMILIES, few=FEW))
def test_sixteen_cached_steps_equal_recomputation(case, family, kernel, name):
    c, pair = case(family, kernel), EDITS[name]
    edit = pair.edit(c)
    out = generate(c, [edit])
    inputs = grown_inputs(c.sample, out.sequences, STEPS - 1)
    want = answer(c, pair, inputs)[:, c.live.shape[1] - 1 :]
    for step, run in enumerate(out.steps):
        assert off(run.logits[:, -1], want[:, step]) <= 1e-5, step
        assert (edit in run.effects) == (step == 0 or name.startswith("EvictKeys"))


@pytest.mark.parametrize(("family", "kernel"), FAMILIES)
def test_the_effect_of_eviction_is_what_each_row_loses(case, family, kernel):
    c, edit = case(family, kernel), ss.interventions.EvictKeys(start=3, recent=4)
    probe = ss.AttentionPatterns("all", layers=[0])
    plain = c.lvlm.run(c.sample, [probe])[probe].patterns[:, 0].nan_to_num()
    effect = c.lvlm.run(c.sample, interventions=[edit]).effects[edit]
    rank = c.live.cumsum(1) - 1
    for b in range(2):
        mine = plain[b][:, : c.live[b].sum()][
            :, :, c.live[b]
        ]  # rows that are asked for stand first
        order = rank[b, c.live[b]]
        gone = (order >= 3) & (order[:, None] - order >= 4) & (mine > 0).any(0)
        rows = gone.any(1)
        assert effect.rows[b, 0] == rows.sum()
        assert effect.tokens[b, 0] == gone[-1].sum()
        want = (mine * gone).sum(-1)[:, rows].mean()
        assert abs(effect.mass_before[b, 0] - want) <= 1e-5
        assert want > 0.05
    assert (effect.mass_after == 0).all()

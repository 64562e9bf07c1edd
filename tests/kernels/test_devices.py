"""What kernels make lies where their inputs lie: here whatever names no device would lie nowhere, on ``meta``."""

from functools import partial

import pytest
import torch
from torch import nn

from sinkscope.kernels import attention, edits, gating, received, residual, walk, writes
from tests.kernels.by_hand import HEADS, WIDTH, N, bools, make, run

KEYS, TARGET = bools("011000", "001010"), bools("000100", "000001")
LIVE, STATES = torch.ones(2, N).bool(), torch.randn(2, N, 8)
ROWS, STEP = torch.tensor([[5, 1], [2, -1]]), {"step": 1}
PROJECTION, NORM = nn.Linear(HEADS * WIDTH, 10), nn.LayerNorm(10)
SOME = bools("111111", "000000")
FACTOR = torch.linspace(0.5, 1, 10)
ORDER = torch.tensor([[1, 0, 2, 3, 4, 5]] * 2)
MASK = torch.ones(2, 1, N, N, dtype=torch.bool).tril()
AT = torch.tensor([3, 0])
GATE = {"norm_weight": None, "norm_bias": None, "in_weight": torch.rand(3, 8), "in_bias": None}
GATE |= {"out_weight": torch.rand(2, 3), "out_bias": None, "activation": "relu", "scale": 2.0}
RULE = {"how": "random", "count": 2, "seed": 1}


def edit(kernel, stage, *given, call=None, state=None, **options):
    """An edited call's output and effect."""
    state = {"stage": stage, "memory": {}, **(state or {})}
    made, effect = kernel(make() if call is None else call, state, None, *given, **options)
    return {"output": run(made), **effect}


def noted(how, step):
    """The coefficients of a gate."""
    state = {"memory": {}, "step": step}
    gating.note_coefficients(STATES, state, "g", how, AT, LIVE, **GATE)
    return gating.memory_of(state, "g")


def wide():
    """A call whose heads have no room for more dimensions."""
    function, (module, *tensors), options = make(sliding_window=3)
    tensors = [torch.nn.functional.pad(x, (0, 250)) for x in tensors]
    return function, (module, *tensors), options


def step_of(n_key=N + 1):
    return make(n_query=1, n_key=n_key)


CASES = {
    "masses": lambda: attention.group_mass([make()], {}, KEYS[..., None].float(), ROWS),
    "a step": lambda: attention.group_mass([step_of()], STEP, KEYS[..., None].float()),
    "weights": lambda: {"w": attention.weights_on(make(), 1, 3)},
    "patterns": lambda: {"w": attention.patterns([make()], {}, ROWS)},
    "received": lambda: received.received([make()], {}, LIVE, others=True),
    "by a mask": lambda: received.received([make(mask=MASK)], {}, LIVE, others=True),
    "of a step": lambda: received.received([step_of()], STEP, LIVE, others=True),
    "keys": lambda: edit(edits.edit_keys, "keys", KEYS, LIVE, 0.5, heads=[1]),
    "keys of a step": lambda: edit(
        edits.edit_keys, "keys", KEYS, LIVE, 0.5, call=step_of(), state=STEP
    ),
    "logits": lambda: edit(edits.edit_keys, "logits", KEYS, LIVE, 0.5),
    "wide logits": lambda: edit(edits.edit_keys, "logits", KEYS, LIVE, 0.5, call=wide()),
    "weights scaled": lambda: edit(edits.edit_keys, "weights", KEYS, LIVE, 0.5),
    "queries": lambda: edit(edits.divide_queries, "keys", LIVE, LIVE, 2.0),
    "moved": lambda: edit(edits.edit_mass, "weights", KEYS, TARGET, LIVE, 0.5),
    "evicted": lambda: edit(edits.evict_keys, "logits", LIVE, 1, 2),
    "evicted at a step": lambda: edit(
        edits.evict_keys, "logits", LIVE, 1, 2, call=step_of(), state=STEP
    ),
    "zeros": lambda: edit(edits.edit_values, "values", KEYS, LIVE, "zero"),
    "resampled": lambda: edit(
        edits.edit_values, "values", KEYS, LIVE, "resample", ORDER, heads=[1]
    ),
    "hash": lambda: {"f": gating.flags(STATES, RULE, LIVE)},
    "gate": lambda: noted("last", 0),
    "gate at a step": lambda: noted("last", 1),
    "gate of a mean": lambda: noted("mean", 0),
    "live": lambda: {"l": residual.live_at(LIVE, STATES[:, :2])},
    "lens": lambda: residual.lens(STATES, {}, nn.Identity(), nn.Identity(), ROWS),
    "no lens": lambda: residual.lens(STATES[:, :1], {}, nn.Identity(), nn.Identity(), ROWS),
    "order": lambda: {"s": residual.permute_states(STATES, {}, ORDER)[0]},
    "cosine": lambda: {"c": residual.cosine_to(STATES, {}, AT)},
    "massive": lambda: residual.massive(STATES, {}, SOME),
    "logits of": lambda: {"l": walk.last_logits(STATES, AT)},
    "contributions": lambda: writes.contribution_norms(
        [make()], {}, KEYS[..., None].float(), PROJECTION, [NORM, 0.5, FACTOR]
    ),
    "contributions of a step": lambda: writes.contribution_norms(
        [make(batch=1, n_query=1)], {}, KEYS[:1, :, None].float(), PROJECTION
    ),
    "writes": lambda: writes.head_writes([make()], {}, PROJECTION, LIVE),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_made_elsewhere(case, monkeypatch):
    want = CASES[case]()
    monkeypatch.setitem(globals(), "make", partial(outside, make))
    with torch.device("meta"):
        got = CASES[case]()
    for name, x in want.items():
        assert got[name].device == x.device
        assert torch.equal(got[name].nan_to_num(), x.nan_to_num())


def outside(make, *given, **options):
    """A call whose tensors are real all the same."""
    with torch.device("cpu"):
        return make(*given, **options)

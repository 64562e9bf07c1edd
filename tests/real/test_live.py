"""VAR with sinks judged in the edited pass, on a real model: the released code in plain torch, and the trace's."""

import copy

import pytest
import torch

import sinkscope as ss
from sinkscope import detectors
from sinkscope.bundled import draw_scene
from tests.interventions.test_exact import off
from tests.interventions.test_live import Released
from tests.real_model import example

# No patch of this model is a sink by any published rule: one channel, and a limit that a tenth of them pass.
DIMS, TAU = (14,), 1.95


@pytest.fixture(scope="module")
def traced():
    lvlm = example()
    sample = lvlm.prepare(images=draw_scene(5).image, text="What is in the image?")
    rules = detectors.Norm(1e6), detectors.SinkDimensions(DIMS, TAU)
    return lvlm, ss.trace_sinks(lvlm, sample, *rules)


@torch.no_grad()
def test_var_live_is_the_released_code_and_differs_from_frozen(traced):
    lvlm, trace = traced
    live, frozen = (ss.Redistribute.var_code(trace, rule=rule) for rule in ("live", "frozen"))
    run = lvlm.run(trace.sample, interventions=[live], logits="last")
    other = lvlm.run(trace.sample, interventions=[frozen], logits="last")
    moved = run.effects[live].extra
    twin = copy.deepcopy(lvlm.module)
    twin.set_attn_implementation("eager")
    image = (trace.sample.tokens.image[0] >= 0).nonzero().flatten()
    released = Released(twin, image, dims=DIMS, tau=TAU)
    with released.on():
        want = twin(**trace.sample.inputs).logits[:, -1:]
    difference = (run.logits - other.logits).abs().max()
    assert [len(found) for at, found in sorted(released.sinks.items()) if at >= 2] == moved["live"][
        0
    ].tolist()
    assert off(run.logits, want) < 1e-5
    # What docs/how-to/scale.md says.
    assert [int(moved[name].sum()) for name in ("entered", "left")] == [3, 1]
    assert difference == pytest.approx(1.03, abs=0.02)
    assert run.logits.abs().max() == pytest.approx(28.6, abs=0.1)

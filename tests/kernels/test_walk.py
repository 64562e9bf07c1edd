"""The loop that runs in a trace: places, parameters, windows, effects, by hand."""

from types import SimpleNamespace

import pytest
import torch

from sinkscope.kernels import (
    gating,
    residual,
    walk,
)
from tests.kernels.by_hand import (
    bools,
    flash_attention,
    make,
    plain_attention,
    windows,
)


def test_places_in_a_model():
    weight = torch.ones(2)
    layer = SimpleNamespace(scale=0.5, gamma=torch.ones(2, device="meta"))
    layer._hf_hook = SimpleNamespace(weights_map={"gamma": weight})
    root = SimpleNamespace(model=SimpleNamespace(layers=[None, layer]))
    assert walk.locate(root, "model.layers.1") is layer
    assert walk.locate(root, "model.layers.1.scale") == 0.5
    assert walk.locate(root, "model.layers.1.gamma") is weight
    assert walk.factors_at(root, ("model.layers.1.scale",), "cpu") == [0.5]
    moved = walk.factors_at(root, ("model.layers.1.gamma",), "meta")
    assert moved[0].device.type == "meta"
    assert walk.first_tensor(((weight, 1), 2)) is weight
    assert walk.first_tensor([weight]) is weight
    assert walk.query_of((None, (1, 2), {})) == 2
    assert walk.query_of((None, (1,), {"query": 3})) == 3
    nested = walk.detached({"a": {"b": torch.ones(1, requires_grad=True)}})
    assert not nested["a"]["b"].requires_grad
    # On whatever device it was, what leaves the pass lies on the CPU.
    far = SimpleNamespace(device=torch.device("mps"), cpu=lambda: "here")
    assert walk.brought({"a": {"b": far}}) == {"a": {"b": "here"}}
    assert walk.last_logits(SimpleNamespace(detach=lambda: far)) == "here"


def test_parameters_of_kernels():
    modules = [SimpleNamespace(), SimpleNamespace()]
    root, state, tensor = SimpleNamespace(layers=modules), {}, torch.ones(2)
    given = {"a": ("@module", "layers.1"), "b": ("@modules", ["layers.0", "layers.1"]), "c": tensor}
    given |= {"d": 3, "e": (0, 1)}
    got = walk.resolve(root, given, torch.device("meta"), state)
    assert got["a"] is modules[1]
    assert got["b"] == modules
    assert got["c"].device.type == "meta"
    assert got["d"] == 3
    assert got["e"] == (0, 1)
    # Moved once per run and device: kernels compare tensors by identity.
    assert walk.resolve(root, {"x": tensor}, torch.device("meta"), state)["x"] is got["c"]
    assert walk.resolve(root, {"x": tensor}, torch.device("cpu"), state)["x"] is tensor


def test_logits_of_chosen_positions():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    got = walk.last_logits(logits)
    assert torch.equal(got, logits)
    assert not got.requires_grad
    assert walk.last_logits(logits, graph=True) is logits
    got = walk.last_logits(logits, torch.tensor([2, 0]), graph=True)
    assert torch.equal(got, torch.stack([logits[0, 2:], logits[1, :1]]))
    assert got.requires_grad


class Source:
    """What nnsight shows of a module's source: the binding of a function, and a call of it."""

    def __init__(self, calls):
        self.calls, self.written = calls, []
        self.bound = SimpleNamespace(output=calls[0][0])

    def __getattr__(self, name):
        if name != "call":
            raise AttributeError(name)
        return self

    @property
    def inputs(self):
        return self.calls[len(self.written)][1:]

    @inputs.setter
    def inputs(self, given):
        self.written.append(given)


def site(calls, length, **more):
    """A plan's step for an attention site, and the module of it."""
    source = Source(calls)
    here = SimpleNamespace(source=source, input=torch.zeros(length, 4), output=None)
    step = {"tower": "vision", "name": "attention", "layer": 3, "path": "block", "how": "attention"}
    step |= {
        "call": "call",
        "bind": "bound",
        "fires": "per window",
        "edits": [],
        "reads": [],
        "stages": [],
    }
    return SimpleNamespace(block=here), {**step, **more}, source


def test_windows_are_edited_one_after_the_other():
    """Each with its span, what it was before the edits, and the sum of all effects."""
    calls, seen = windows(), []

    def kernel(call, state, span, mark):
        seen.append((span, state["stage"], state["edit"], state["unedited"] is call, mark))
        _, args, kwargs = call
        effect = {"rows": torch.tensor([span[1]])}
        return ((lambda *a, **k: "edited"), (*args[:3], args[3] * 2), kwargs), effect

    edit = [("slot", kernel, {"mark": 7}), ("other", kernel, {"mark": 8})]
    root, step, source = site(calls, 9, edits=edit, stages=["keys", "values"])
    tracer = SimpleNamespace(iter=[0, 1, 2, 3])
    state, out = {}, {}
    # Every window writes its inputs once, which moves the source on to the next.
    got = walk.read_site(root, tracer, step, state, out)
    spans = [(0, 2), (2, 6), (6, 9)]
    assert [one[0] for one in seen] == [span for span in spans for _ in range(2)]
    assert seen[0][1:] == ("keys", ("slot", "vision", "attention", 3), True, 7)
    assert seen[1][1:] == ("values", ("other", "vision", "attention", 3), False, 8)
    assert source.bound.output() == "edited"
    assert len(source.written) == 3
    assert torch.equal(source.written[1][0][3], calls[1][1][3] * 4)
    assert torch.equal(got[1][1][3], calls[1][1][3] * 4)
    key = ("vision", "attention", 3)
    assert out[("edit", "slot")][key]["rows"].tolist() == [17]
    assert out[("edit", "other")][key]["rows"].tolist() == [17]


def test_a_source_that_is_not_as_the_anatomy_says():
    calls = windows(sizes=(2,))
    root, step, source = site(calls, 9)
    with pytest.raises(RuntimeError, match="windows of block cover 4 tokens; expected 9"):
        walk.read_site(root, SimpleNamespace(iter=[0, 1]), step, {}, {})
    source.bound.output = 3
    with pytest.raises(
        RuntimeError, match="block: bound holds int; expected the attention function"
    ):
        walk.read_site(root, SimpleNamespace(iter=[0]), step, {}, {})


def test_a_call_that_no_edit_changes_is_left_as_it_is():
    calls = windows(sizes=(2,))

    def look(call, state, span):
        return (flash_attention, *call[1:]), None

    root, step, source = site(calls, 2, fires="once", edits=[(0, look, {})], stages=["keys"])
    out = {}
    got = walk.read_site(root, None, step, {}, out)
    assert got[0][0] is flash_attention
    assert source.written == []
    assert out == {}
    root, step, source = site(calls, 2, fires="once")
    assert walk.read_site(root, None, step, {}, {})[0][0] is plain_attention
    assert source.bound.output is plain_attention


def test_a_plan_is_walked():
    """Reads see what edits left; the number of the step and the memory reach the kernels."""
    states, memory = torch.randn(2, 3, 4), {"kept": 1}
    here = SimpleNamespace(input=(states, "mask"), output=(states * 2, "weights"))
    root, seen = SimpleNamespace(block=here), []

    def double(x, state, by):
        seen.append((state["step"], state["memory"]))
        return x * by, {"rows": torch.ones(2)}

    def look(x, state):
        return {"sum": x.sum()}

    step = {"tower": "language", "layer": 0, "path": "block", "edits": [(5, double, {"by": 3})]}
    step |= {"reads": [(0, look, {}), (1, look, {})]}
    plan = [{**step, "name": "pre", "how": "input"}, {**step, "name": "post", "how": "output"}]
    out = walk.walk(root, None, plan, 4, memory)
    assert seen == [(4, memory)] * 2
    assert seen[0][1] is memory
    for name, factor in (("pre", 3), ("post", 6)):
        key = ("language", name, 0)
        for slot in (0, 1):
            assert torch.equal(out[slot][key]["sum"], (states * factor).sum())
        assert out[("edit", 5)][key]["rows"].tolist() == [1, 1]
    assert torch.equal(here.input, states * 3)
    assert torch.equal(here.output[0], states * 6)
    assert here.output[1] == "weights"
    walk.walk(root, None, plan[:1])
    assert seen[-1] == (0, {})
    inside, step, _ = site(
        [make()], 0, fires="once", reads=[(0, lambda calls, state: calls[0][1][1], {})]
    )
    out = walk.walk(inside, None, [step])
    assert torch.equal(out[0][("vision", "attention", 3)], make()[1][1])
    # A kernel that gives back what it got writes nothing, and a bare output stays bare.
    here.output = states
    same = {**plan[1], "edits": [(5, lambda x, state: (x, None), {})]}
    walk.walk(root, None, [same])
    assert here.output is states
    walk.walk(root, None, plan[1:])
    assert torch.equal(here.output, states * 3)


def test_lists_of_unequal_length_are_refused():
    """An edit without a stage, groups without coefficients, rows without live tokens."""
    calls = windows(sizes=(2,))
    root, step, _ = site(calls, 2, fires="once", edits=[(0, None, {})], stages=[])
    with pytest.raises(ValueError, match="shorter"):
        walk.read_site(root, None, step, {}, {})
    kept = {"coefficients": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"longer|shorter"):
        gating.factors_of(kept, bools("1"), ("V", "L", "rest"))
    with pytest.raises(ValueError, match="shorter"):
        residual.massive(torch.ones(2, 3, 4), {}, bools("111"))

"""Every probe, edit, gate and experiment gives away what it gives here, within 1e-6.

Away is nnsight's ``"local"``, and the server of `server.py`. What must have a case is read from the
public lists, so that what is added without one fails.
"""

import ast
import dataclasses
import inspect
import sys
from collections.abc import Mapping
from functools import partial
from tempfile import TemporaryDirectory

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import torch
from nnsight.intervention.serialization import CustomCloudPickler

import sinkscope as ss
from sinkscope import baselines, detectors, experiments, interventions, lsg, published
from sinkscope.interventions import ImageCentric, LiveRule
from sinkscope.lsg import GateConfig
from sinkscope.probes import AttentionValues, ResidualStates
from sinkscope.testing import random_image
from tests.interventions.conftest import make_case
from tests.probes.everything import EIGENVALUES, every_probe
from tests.remote.conftest import REPOSITORIES
from tests.remote.ndif import ALLOWED

FAMILIES = ("llava-clip-llama", "qwen2.5-vl")
PLACES = ("local", "server")
ROUGH = {**EIGENVALUES, "rank": 1e-5}  # of LAPACK, in another process
NEW = {"max_new_tokens": 2, "min_new_tokens": 2}


SHIPPED = set()
"""Functions and classes that requests of this file took along, rather than name them."""


def noting(reduce):
    def noted(*given):
        SHIPPED.add(given[-1])
        return reduce(*given)

    return noted


@pytest.fixture(scope="module", autouse=True)
def shipped():
    with pytest.MonkeyPatch.context() as patch:
        for home, name in (
            (CustomCloudPickler, "_dynamic_function_reduce"),
            (cloudpickle.cloudpickle, "_dynamic_class_reduce"),
        ):
            patch.setattr(home, name, noting(getattr(home, name)))
        yield


@pytest.fixture(scope="module")
def away(remote):
    """``away(family, place)``: an LVLM whose runs go there by themselves."""
    made = {}

    def get(family, place):
        if place == "server":
            return remote(family)
        if family not in made:
            name = REPOSITORIES[family]
            made[family] = ss.LVLM.from_pretrained(name, remote="local", verify=False)
        return made[family]

    return get


def equal(one, other, where=""):
    """Assert that two outcomes agree: numbers within 1e-6 of their size, all else exactly."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), where
        near = ROUGH.get(where.rpartition(".")[2], 1e-6)
        one, other = one.detach().double(), other.detach().double()
        assert torch.allclose(one, other, rtol=near, atol=1e-6, equal_nan=True), where
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, rtol=1e-5, atol=1e-6)
    elif isinstance(one, np.ndarray):
        assert np.allclose(one, other, rtol=1e-6, atol=1e-6, equal_nan=True), where
    elif isinstance(one, Mapping):
        for (key, a), (again, b) in zip(one.items(), other.items(), strict=True):
            assert not isinstance(key, str) or key == again, where
            equal(a, b, f"{where}.{key if isinstance(key, str) else type(key).__name__}")
    elif isinstance(one, (list, tuple)):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            equal(a, b, f"{where}[{i}]")
    elif dataclasses.is_dataclass(one) and not isinstance(one, ss.models.Sample):
        for f in dataclasses.fields(one):
            equal(getattr(one, f.name), getattr(other, f.name), f"{where}.{f.name}")
    elif isinstance(one, float):
        near = ROUGH.get(where.rpartition(".")[2], 1e-6)
        assert one == pytest.approx(other, rel=near, abs=1e-6, nan_ok=True), where
    elif isinstance(one, (str, int, bool, type(None))):
        assert one == other, where


def patched(site, tower, lvlm, case, donor=None):
    """A patch whose donor was read where the model is, or ``donor`` itself."""
    probe = AttentionValues([1], tower=tower) if site == "values" else None
    probe = probe or ResidualStates(layers=[1], tower=tower, tokens="all")
    pixels = case.sample.inputs["pixel_values"].flip(-1)
    other = lvlm.prepare(inputs={**case.sample.inputs, "pixel_values": pixels})
    tokens = case.some if tower == "language" else case.patches
    return ss.PatchActivations(lvlm.run(other, [probe]), site, tokens, [1], tower=tower)


def given_values(lvlm, case):
    tower = lvlm.anatomy.language
    shape = (len(case.sample), tower.kv_heads, case.live.shape[1], tower.d_head)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


LIVE = LiveRule(detectors.SinkDimensions((3, 17), 1.3))
V = {"tower": "vision"}
EDITS = {
    "AblateActivations": [
        *(
            lambda m, c, how=how: ss.AblateActivations([1, 2], c.some, how, [1])
            for how in ("zero", "mean")
        ),
        lambda m, c: ss.AblateActivations([3], c.patches, "clamp", [1], value=0.1, **V),
    ],
    "AblateValues": [
        *(
            lambda m, c, how=how: ss.AblateValues(c.some, how, heads=[0])
            for how in ("zero", "mean", "resample")
        ),
        lambda m, c: ss.AblateValues(c.some, given_values(m, c), [0, 1]),
        lambda m, c: ss.AblateValues(c.patches, queries=c.few, **V),
    ],
    "AttentionKnockout": [
        lambda m, c: ss.AttentionKnockout(c.late, "image", [1]),
        lambda m, c: ss.AttentionKnockout(c.few, c.patches, [0, 1], **V),
    ],
    "AttentionTemperature": [
        lambda m, c: interventions.AttentionTemperature(3.0, [0, 2], heads=[1], queries=c.late),
        lambda m, c: interventions.AttentionTemperature(2.0, **V),
    ],
    "EvictKeys": [lambda m, c: interventions.EvictKeys(start=2, recent=5)],
    "LiveRule": [
        lambda m, c: ss.ScaleKeys(LIVE, 0.5),
        lambda m, c: ss.MaskKeys(LiveRule(detectors.Massive(0.0, 4.0), "image"), [1]),
        lambda m, c: ss.ScaleAttention(LiveRule(detectors.Norm(1.0)), 0.4, [1, 2]),
    ],
    "MaskKeys": [
        lambda m, c: ss.MaskKeys(c.some, [1], heads=[0], queries=c.late),
        lambda m, c: ss.MaskKeys(c.patches, **V),
    ],
    "PatchActivations": [
        *(
            partial(patched, site, tower)
            for site in ("resid_post", "values")
            for tower in ("language", "vision")
        )
    ],
    "Redistribute": [
        lambda m, c: ss.Redistribute(c.some | c.first, c.other, 0.6),
        lambda m, c: ss.Redistribute(
            c.some, c.other, 0.4, select=ImageCentric(c.some & (c.sample.tokens.image >= 0))
        ),
    ],
    "ScaleAttention": [
        lambda m, c: ss.ScaleAttention(c.some, 0.4),
        lambda m, c: ss.ScaleAttention(c.some, -2.0, [1], renormalize=False, heads=[0]),
        lambda m, c: ss.ScaleAttention(c.patches, 4.0, **V),
    ],
    "ScaleKeys": [
        lambda m, c: ss.ScaleKeys(c.some, 0.3),
        lambda m, c: ss.ScaleKeys(c.patches, -0.5, **V),
    ],
    "ScaleTokens": [lambda m, c: interventions.ScaleTokens(c.some, 0.5)],
    "SinkToFront": [lambda m, c: interventions.SinkToFront(c.some & (c.sample.tokens.image >= 0))],
    "TestTimeRegister": [lambda m, c: ss.TestTimeRegister({0: [1, 2], 1: [3]}, cls="keep")],
}
NO_EDITS = {"BaseIntervention", "Edit", "Edited", "Effect", "Intervention"}  # what they are made of
NO_EDITS |= {"ImageCentric", "NeuronActivity", "NeuronResult", "find_register_neurons"}
UNPACKED = {"TestTimeRegister"}  # what a packed tower has not


def test_every_public_edit_has_a_case():
    assert {*EDITS} | NO_EDITS == {*interventions.__all__}
    public = {name for name in ss.__all__ if hasattr(getattr(ss, name), "edits")}
    assert public <= {*EDITS, "LSG"}


@pytest.fixture(scope="module")
def cases(tiny, batch):
    return {name: make_case(tiny(name), None, batch(tiny(name))) for name in FAMILIES}


def told(run):
    """What a run brought back, by the order of its probes and edits."""
    return [run.logits, [*run.results.values()], [*run.effects.values()]]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_probe(away, cases, family, place):
    case = cases[family]
    probes = [*every_probe(), *every_probe()[:1]]
    if family not in ("qwen2.5-vl",):
        probes.append(interventions.NeuronActivity(case.patches))
    want = case.lvlm.run(case.sample, probes, logits="last")
    equal(told(away(family, place).run(case.sample, probes)), told(want))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EDITS)
def test_every_edit(away, cases, name, family, place):
    case, there = cases[family], away(family, place)
    if name in UNPACKED and case.sample.tokens.vision.layout is not None:
        pytest.skip("refused for a packed tower")
    for make in EDITS[name] if place == "server" else EDITS[name][-1:]:
        edit = make(there, case)
        want = case.lvlm.run(case.sample, (), [make(case.lvlm, case)], logits="last")
        equal(told(there.run(case.sample, (), [edit])), told(want), name)


GATES = {
    "embed": ("embed", {}),
    "two groups, of L": (0, {"groups": ("L", "rest"), "signal": "mean"}),
    "three groups": (1, {"groups": ("V", "L", "rest"), "activation": "silu", "affine": False}),
    "visual, off": (0, {"signal": "visual", "decode": "off", "init": "neutral"}),
    "refresh": (1, {"decode": "refresh", "activation": "relu"}),
    "spikes": (0, {"v_detector": detectors.Massive(0.0, 3.0), "activation": "tanh"}),
    "chance": (1, {"v_detector": detectors.RandomTokens(3)}),
    "channels": ("embed", {"v_detector": detectors.SinkDimensions((3, 17), 1.1)}),
}
RULES = {"v_detector": detectors.Norm(1.0)}


def gate_of(lvlm, layer, choices):
    given = {**RULES, **choices}
    if "L" in given.get("groups", ()):
        given["l_detector"] = detectors.SinkDimensions((5, 9), 1.2)
    gate = ss.LSG.for_model(lvlm, layer, **given)
    with torch.no_grad():
        for i, parameter in enumerate(gate.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter += 0.3 * noise
    return gate


def test_every_choice_of_a_gate_has_a_case():
    """Every value that a choice of `GateConfig` may have."""
    made = [{"layer": layer, **choices} for layer, choices in GATES.values()]
    assert {one["layer"] == "embed" for one in made} == {True, False}
    defaults = {f.name: f.default for f in dataclasses.fields(GateConfig)}
    for name, options in {
        "groups": lsg.config.GROUPS,
        "signal": ("last", "mean", "visual"),
        "decode": ("frozen", "refresh", "off"),
        "init": ("uniform", "neutral"),
        "activation": lsg.config.ACTIVATIONS,
        "affine": (True, False),
    }.items():
        assert {one.get(name, defaults[name]) for one in made} == {*options}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", GATES)
def test_every_gate_in_a_run_and_an_answer(away, cases, name, family, place):
    case, there = cases[family], away(family, place)
    gate = gate_of(case.lvlm, *GATES[name])
    want = case.lvlm.generate(case.sample, (), [gate], **NEW)
    got = there.generate(case.sample, (), [gate], **NEW)
    assert torch.equal(got.sequences, want.sequences)
    for one, other in zip(got.steps, want.steps, strict=True):
        equal(told(one), told(other), f"step {one.step}")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_under_edits_and_probes(away, cases, family, place):
    case = cases[family]
    edits = [
        interventions.EvictKeys(start=2, recent=9),
        ss.Redistribute(case.some, case.other, 0.4),
        ss.ScaleKeys(LIVE, 0.5, allow_noop=True),
        ss.AblateValues(case.some, "mean"),
    ]
    for some, probes in ((edits, []), ([], every_probe())):
        want = case.lvlm.generate(case.sample, probes, some, **NEW)
        got = away(family, place).generate(case.sample, probes, some, **NEW)
        assert (got.text, got.sequences.tolist()) == (want.text, want.sequences.tolist())
        for one, other in zip(got.steps, want.steps, strict=True):
            equal(told(one), told(other), f"step {one.step}")


def scenes(n=20):
    words = ("red", "blue")
    return [
        {
            "image": random_image(64, 64, i),
            "question": f"how many {words[i % 2]} shapes are there",
            "answer": "two" if i % 2 else "red",
            "choices": ["two", "red", "a red shape"][: 2 + i % 2],
            "attributes": {"word": words[i % 2]},
        }
        for i in range(n)
    ]


def compared(lvlm, sample, records):
    mask = {"base": [], "mask": [ss.MaskKeys("first", [1])], "V": baselines.token_weights(0.5)}
    given = {"v_detector": detectors.Norm("valley"), "l_detector": detectors.Massive(0.0, 6.0)}
    return ss.compare(lvlm, records, mask, batch=4, progress=False, **given).table


def free(records):
    return [{k: v for k, v in one.items() if k != "choices"} for one in records]


RULED = {"v_detector": detectors.Norm("valley"), "l_detector": detectors.Massive(0.0, 6.0)}
L_RULE = {"l_detector": detectors.SinkDimensions((3, 17), 1.3)}
QUICK = {"permutations": 0, "draws": 20, "progress": False}
PROBED = {"groups": {"image": "image"}, "test_size": 0.5, **QUICK}


def controlled(lvlm, sample):
    trace, mask = ss.trace_sinks(lvlm, sample, **RULED), ss.MaskKeys(sample.tokens.select("first"))
    return ss.RandomControl(mask, "mass", n=1).run(lvlm, trace)


def traced_scenes(lvlm, sample):
    with TemporaryDirectory() as folder:
        rows = [{**one, "attributes": "", "choices": ""} for one in scenes(2)]
        found = ss.trace_dataset(lvlm, rows, folder, **RULED, progress=False)
        return [found.sinks, found.images.drop(columns="seconds")]


def evidence_of(trace):
    """What a trace with few or with all numbers has."""
    drawn = trace.vision.drawn(), trace.language.drawn(), trace.null
    return [trace.records, trace.candidates, trace.groups, trace.warnings, trace.summary(), drawn]


CALLS = {
    "trace_sinks": [
        lambda m, s: evidence_of(ss.trace_sinks(m, s)),
        lambda m, s: evidence_of(ss.trace_sinks(m, s, **RULED)),
        lambda m, s: evidence_of(ss.trace_sinks(m, s, **RULED, detail="full")),
    ],
    "trace_generation": [lambda m, s: ss.trace_generation(m, s, **L_RULE, **NEW)],
    "calibrate": [lambda m, s: ss.calibrate(m, [s], draws=0.01, spike=1.5, progress=False)],
    "trace_dataset": [traced_scenes],
    "detect": [lambda m, s: ss.detect(m, s, detectors.Received(0.05))],
    "detect_all": [
        lambda m, s: detectors.detect_all(m, s, {"a": detectors.Norm(), "b": detectors.ZScore()}),
        lambda m, s: detectors.detect_all(m, s, {"c": detectors.CosineToBOS()}, tower="vision"),
    ],
    "linear_probes": [lambda m, s: ss.linear_probes(m, scenes(), **PROBED).table],
    "compare": [
        lambda m, s: compared(m, s, scenes(2)),
        lambda m, s: compared(m, s, free(scenes(2))),
    ],
    "effect_table": [
        lambda m, s: (
            experiments.effect_table(
                m, scenes(1), edits=["halve"], top=0, controls=False, **RULED
            ).table
        )
    ],
    "replacement_table": [
        lambda m, s: experiments.replacement_table(
            m, ss.trace_sinks(m, s, **RULED), s.tokens.select("first"), n=1
        )
    ],
    "RandomControl": [controlled],
    "find_register_neurons": [
        lambda m, s: interventions.find_register_neurons(
            m, [s], [s.tokens.vision.select("patch")], top_k=3
        )
    ],
    "massive_activations": [lambda m, s: published.massive_activations(m, s, absolute=2, ratio=3)],
    "nop_broadcast": [lambda m, s: published.nop_broadcast(m, s)],
    "outlier_tokens": [lambda m, s: published.outlier_tokens(m, s, tau=5.0)],
    "sink_rate": [lambda m, s: published.sink_rate(m, s, length=16)],
    "test_time_registers": [
        lambda m, s: published.test_time_registers(m, [s], norm=1.0, max_layer=1, top_k=3)
    ],
    "value_edits": [lambda m, s: published.value_edits(m, s, [s], layer=1, head=0)],
    "value_effects": [lambda m, s: published.value_effects(m, s, [s], layer=1, head=0)],
    "var": [
        lambda m, s: {
            name: value
            for name, value in vars(published.var(m, s, dims=[3, 17], tau=1.3)).items()
            if name != "trace"  # as above
        }
    ],
}
WEIGHTS = {  # what needs the weights here, and says so before any work
    "gate_coefficients": lambda m, s, g: ss.gate_coefficients(m, g, scenes(1)),
    "train_lsg": lambda m, s, g: ss.train_lsg(m, scenes(2), [1], **RULES),
    "lora": lambda m, s, g: baselines.lora(m, scenes(2), layer=1),
}
NO_RUNS = {"BaseIntervention", "Edited", "SinkRules", "known_for", "import_gates", "LSG", "LoRA"}
NO_RUNS |= {"greedy_stack", "sweep"}  # as train_lsg; a test of its own
NO_EVENT = {"value_edits", "value_effects"}  # which a random model has not: the same error then
NOT_PACKED = {"find_register_neurons", "test_time_registers"}


def test_every_public_call_with_a_model_has_a_case():
    rooms = (ss, interventions, lsg, experiments, published, detectors, baselines)
    found = set()
    for room in rooms:
        for name in getattr(room, "__all__", None) or dir(room):
            one = getattr(room, name)
            parts = [one] if inspect.isfunction(one) else []
            if inspect.isclass(one) and not hasattr(one, "edits"):
                parts = [f for _, f in inspect.getmembers(one, inspect.isroutine)]
            with_model = [f for f in parts if "lvlm" in getattr(f, "__annotations__", {})]
            found |= {name} if with_model and not name.startswith("_") else set()
    assert found - NO_RUNS == {*CALLS, *WEIGHTS}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CALLS)
def test_every_call_that_runs_a_model(away, cases, name, family, place):
    case, there = cases[family], away(family, place)
    if name in NOT_PACKED and family == "qwen2.5-vl":
        pytest.skip("refused for a packed tower")
    for call in CALLS[name] if place == "server" else CALLS[name][:1]:
        outcomes = []
        for lvlm in (there, case.lvlm):
            try:
                outcomes.append(call(lvlm, case.sample))
            except ss.SinkscopeError as error:
                if name not in NO_EVENT:
                    raise
                outcomes.append(str(error))
        equal(*outcomes, name)


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_needs_weights_says_so_before_any_work(remote, cases, loopback, name):
    case, there = cases["llava-clip-llama"], remote("llava-clip-llama")
    gate = gate_of(case.lvlm, 1, {})
    before = len(loopback.seen["requests"])
    with pytest.raises(ss.SinkscopeError, match="weights"):
        WEIGHTS[name](there, case.sample, gate)
    assert len(loopback.seen["requests"]) == before


def test_all_that_was_shipped_is_a_kernel_and_imports_what_the_server_has():
    """It runs last, on all requests above; imports also inside functions, and of whole modules."""
    ours = {one for one in SHIPPED if one.__module__.partition(".")[0] == "sinkscope"}
    if not SHIPPED:
        pytest.skip("the requests of this file were not made")
    others = {one for one in ours if not one.__module__.startswith("sinkscope.kernels.")}
    # The kernel of `AttentionEntropy` lies beside it: its functions travel, their module does not.
    assert {one.__module__ for one in others} <= {"sinkscope.probes.entropy"}
    for one in others:
        assert "import" not in inspect.getsource(one)
    modules = {one.__module__ for one in ours - others}
    for module in modules:
        for node in ast.walk(ast.parse(inspect.getsource(sys.modules[module]))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] in ALLOWED or name.startswith("sinkscope.kernels")
    # nnsight sends what it calls itself: the ``generate`` of its own class.
    rest = {one for one in SHIPPED - ours if not one.__module__.startswith("nnsight.")}
    assert not rest

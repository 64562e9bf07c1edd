"""Nothing is left behind: neither after an exception in the middle of a pass, nor in memory."""

import copy
import gc
import operator
import sys
import threading
from dataclasses import dataclass
from typing import Any

import nnsight
import pytest
import torch

import sinkscope as ss
from sinkscope.errors import InputError, ModelError
from sinkscope.kernels import attention, residual, walk
from sinkscope.models import Context
from sinkscope.models.requests import plan_of
from sinkscope.probes import Read
from sinkscope.testing import TINY, random_image
from tests.probes.everything import every_probe

FAMILIES = ("llava-clip-llama", "qwen2.5-vl")


class StopThisError(ValueError):
    """What a user's kernel raises."""


class InterruptedHere(BaseException):
    """Like KeyboardInterrupt: what no `except Exception` catches."""


def counted(value, state, seen, fail_at, error):
    """A kernel that raises when it is asked for the ``fail_at``-th time."""
    seen.append(1)
    if len(seen) == fail_at:
        raise error(f"in the middle of the pass, at call {len(seen)}")
    return torch.zeros(1)


@dataclass(frozen=True, eq=False)
class Failing:
    """A probe whose kernel raises at one of its sites."""

    site: Any
    error: Any
    fail_at: int = 1
    tower: str = "language"

    def reads(self, context):
        parameters = {"seen": [], "fail_at": self.fail_at, "error": self.error}
        if not hasattr(self, "seen"):
            object.__setattr__(self, "seen", parameters["seen"])
        return [Read(self.site, counted, parameters | {"seen": self.seen})]

    def finish(self, answers, context):
        return answers


SITES = (
    ss.Site("vision", "attention", 1),
    ss.Site("vision", "resid_post", 0),
    ss.Site("projector", "output"),
    ss.Site("language", "attention", 1),
    ss.Site("language", "mlp_out", 2),
)


@pytest.fixture(params=FAMILIES)
def fresh(request):
    """A model of its own, with what it computes before nnsight has seen it."""
    module, processor = TINY[request.param]()
    lvlm = ss.LVLM(module, processor, verify=False)
    sample = lvlm.prepare(images=random_image(96, 96), text="what is it")
    with torch.no_grad():
        logits = module(**sample.inputs).logits
        ids = module.generate(**sample.inputs, max_new_tokens=4, do_sample=False)
    return lvlm, sample, logits, ids


def assert_untouched(lvlm, sample, logits, ids):
    """Plain transformers and plain runs compute what they did before, bitwise."""
    with torch.no_grad():
        assert torch.equal(lvlm.module(**sample.inputs).logits, logits)
        again = lvlm.module.generate(**sample.inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, ids)
    assert torch.equal(lvlm.run(sample).logits, logits)
    assert torch.equal(lvlm.generate(sample, max_new_tokens=4).sequences, ids)


def everything_on(lvlm):
    """What every part of a model, its configs, its processor and the process know, by name."""
    module, processor = lvlm.module, lvlm.processor
    registry = sys.modules[
        type(module.get_submodule(lvlm.anatomy.language.attention[0])).__module__
    ].ALL_ATTENTION_FUNCTIONS
    found = {"registry": set(registry), "modes": [part.training for part in module.modules()]}
    found["stance"] = torch._dynamo.eval_frame._stance
    found["config"] = module.config.to_dict() | module.generation_config.to_dict()
    things = dict(module.named_modules()) | {
        "processor": processor,
        "tokenizer": processor.tokenizer,
        "images": processor.image_processor,
    }
    for path, thing in things.items():
        found[path, "class"] = type(thing), getattr(type(thing), "forward", None)
        for name, value in vars(thing).items():
            whole = dict(value) if isinstance(value, dict) else value
            found[path, name] = whole
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        found[name, "tensor"] = id(tensor), tensor._version, tensor.requires_grad, tensor.grad
    return found


def assert_same(lvlm, before):
    after = everything_on(lvlm)
    assert after.keys() == before.keys()
    for name, value in before.items():
        equal = torch.equal if torch.is_tensor(value) else operator.eq
        assert after[name] is value or equal(after[name], value), (
            f"{name}: {value!r} became {after[name]!r}"
        )


ANSWERED = [{"image": random_image(seed=i), "question": "what", "answer": "red"} for i in range(4)]
NORM = ss.detectors.Norm(2.0)
USES = {
    "load": lambda lvlm, sample: ss.LVLM(lvlm.module, lvlm.processor),
    "run": lambda lvlm, sample: lvlm.run(sample, every_probe(), [ss.MaskKeys("image")]),
    "run with a graph": lambda lvlm, sample: lvlm.run(
        sample, interventions=[ss.LSG.for_model(lvlm, 0, v_detector=NORM)], grad=True
    ),
    "run as on a server": lambda lvlm, sample: lvlm.run(sample, every_probe(), remote="local"),
    "generate": lambda lvlm, sample: lvlm.generate(
        sample, every_probe(), [ss.ScaleKeys("image", 0.5)], max_new_tokens=2
    ),
    "trace_sinks": lambda lvlm, sample: ss.trace_sinks(lvlm, sample, NORM, NORM),
    "sweep": lambda lvlm, sample: ss.sweep(lvlm, ANSWERED, [0], [(0.5, 1.0)], v_detector=NORM),
    "train_lsg": lambda lvlm, sample: ss.train_lsg(
        lvlm, ANSWERED, [0], v_detector=NORM, batch=4, validation=0.0, progress=False
    ),
    "attach": lambda lvlm, sample: used_attached(lvlm, sample),
    "deepcopy": lambda lvlm, sample: [copy.deepcopy(lvlm).run(sample), lvlm.run(sample)],
}


def used_attached(lvlm, sample):
    with ss.LSG.for_model(lvlm, 0, v_detector=NORM).attach(lvlm), torch.no_grad():
        lvlm.module(**sample.inputs)


@pytest.mark.parametrize("use", USES)
def test_a_use_leaves_nothing_on_the_model(fresh, use):
    """No attribute, hook, forward, buffer, mode or config of any part, nor of the processor."""
    lvlm, sample, *_ = fresh
    before = everything_on(lvlm)
    for _ in range(2):
        USES[use](lvlm, sample)
        assert_same(lvlm, before)


@pytest.mark.parametrize("remote", [False, "local"])
def test_an_error_in_the_middle_leaves_nothing_on_the_model(fresh, remote):
    lvlm, sample, *_ = fresh
    before = everything_on(lvlm)
    for site in SITES[::2]:
        with pytest.raises(StopThisError):
            lvlm.run(sample, [Failing(site, StopThisError)], remote=remote)
    with pytest.raises(StopThisError):
        lvlm.generate(sample, [Failing(SITES[3], StopThisError, 2)], remote=remote)
    assert_same(lvlm, before)


def test_a_model_that_was_used_can_be_compiled():
    module, processor = TINY["llava-clip-llama"]()
    lvlm = ss.LVLM(module, processor)
    sample = lvlm.prepare(images=random_image(), text="what")
    lvlm.run(sample, [ss.AttentionMass({"all": "all"}, tower="vision")])
    tower, pixels = module.model.vision_tower, sample.inputs["pixel_values"]
    want = tower(pixels).last_hidden_state
    del lvlm
    compiled = torch.compile(tower, backend="eager", fullgraph=True)
    assert torch.equal(compiled(pixels).last_hidden_state, want)


def test_generate_compiles_nothing(fresh, monkeypatch):
    """On CUDA and with a static cache transformers compiles the model of itself."""
    lvlm, sample, _, ids = fresh
    asked = []

    def would_compile(module, arguments, config):
        asked.append(config.disable_compile)
        return False

    monkeypatch.setattr(type(lvlm.module), "_valid_auto_compile_criteria", would_compile)
    assert torch.equal(lvlm.generate(sample, max_new_tokens=4).sequences, ids)
    assert asked
    assert all(asked)


def test_a_trace_of_the_users_own_is_left_alone(fresh):
    """Made before ours and used after it, and its model may be changed in between."""
    lvlm, sample, logits, _ = fresh
    theirs = nnsight.NNsight(lvlm.module)
    before = everything_on(lvlm)
    probe = ss.AttentionMass({"image": "image"})
    want = lvlm.run(sample, [probe])
    assert_same(lvlm, before)
    with torch.no_grad(), theirs.trace(**sample.inputs):
        theirs.model.language_model.layers[1].output = (
            0 * theirs.model.language_model.layers[1].output
        )
        edited = theirs.output.logits.save()
    assert not torch.equal(edited, logits)
    assert torch.equal(lvlm.run(sample, [probe])[probe].mass, want[probe].mass)


def test_a_part_that_is_replaced_is_seen(fresh):
    """A forward of the user's own, and another module in its place, both after the first run."""
    lvlm, sample, logits, _ = fresh
    lvlm.run(sample)
    block = lvlm.module.get_submodule(lvlm.anatomy.language.blocks[1])
    probe = ss.TokenNorms(layers=[1], site="mlp_out")
    forward = block.mlp.forward
    block.mlp.forward = lambda x: 2 * forward(x)
    want = lvlm.module(**sample.inputs).logits
    assert not torch.equal(want, logits)
    doubled = lvlm.run(sample, [probe])
    assert torch.equal(doubled.logits, want)
    block.mlp = copy.deepcopy(block.mlp)
    del block.mlp.forward
    assert torch.equal(lvlm.run(sample).logits, logits)
    owner, _, name = lvlm.anatomy.language.blocks[2].rpartition(".")
    del lvlm.module.get_submodule(owner)[int(name)]
    with pytest.raises(InputError, match=r"of another layout; expected one made by this LVLM"):
        lvlm.run(sample, [ss.TokenNorms()])


def test_an_interrupted_run_keeps_its_type_and_leaves_nothing(fresh):
    lvlm, sample, logits, ids = fresh
    for site in SITES:
        failing = Failing(site, InterruptedHere)
        with pytest.raises(InterruptedHere, match="in the middle of the pass, at call 1"):
            lvlm.run(sample, [ss.TokenNorms(), failing])
        assert_untouched(lvlm, sample, logits, ids)


@pytest.mark.parametrize(("error", "step"), [(StopThisError, 1), (InterruptedHere, 3)], ids=str)
def test_an_exception_in_a_generation_keeps_its_type_and_leaves_nothing(fresh, error, step):
    lvlm, sample, logits, ids = fresh
    failing = Failing(ss.Site("language", "attention", 1), error, fail_at=step)
    with pytest.raises(error, match=f"at call {step}"):
        lvlm.generate(sample, [failing, ss.AttentionMass({"image": "image"})], max_new_tokens=5)
    assert len(failing.seen) == step
    assert_untouched(lvlm, sample, logits, ids)


def test_an_exception_of_the_model_keeps_its_type_and_leaves_nothing(fresh):
    """The model itself fails between two sites, as it does when memory runs out."""
    lvlm, sample, logits, ids = fresh

    def fail(*_):
        raise StopThisError("no memory")

    block = lvlm.module.get_submodule(lvlm.anatomy.language.blocks[1])
    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(StopThisError, match="no memory"):
        lvlm.run(sample, every_probe())
    with pytest.raises(StopThisError, match="no memory"):
        lvlm.generate(sample, every_probe())
    handle.remove()
    assert_untouched(lvlm, sample, logits, ids)


def test_a_run_leaves_no_gradients_and_no_modes(fresh):
    lvlm, sample, logits, ids = fresh
    lvlm.run(sample, every_probe())
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in lvlm.module.parameters())
    assert all(p.requires_grad for p in lvlm.module.parameters())
    assert not lvlm.module.training
    assert_untouched(lvlm, sample, logits, ids)


def test_probes_that_need_gradients_work_under_inference_mode(fresh):
    lvlm, sample, _, _ = fresh
    probe = ss.ReceivedAttention()
    want = lvlm.run(sample, [probe])
    with torch.inference_mode():
        got = lvlm.run(lvlm.prepare(inputs=sample.inputs), [probe])
    assert torch.equal(want[probe].received, got[probe].received)


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_runs_keep_no_tensors_alive(fresh):
    """As many tensors after four runs and generations as after two, here and as on a server."""
    lvlm, sample, _, _ = fresh

    def use():
        for remote in (False, "local"):
            lvlm.run(sample, every_probe(), remote=remote)
        lvlm.generate(sample, every_probe(), max_new_tokens=2, remote="local")

    use()
    use()
    before = live_tensors()
    for _ in range(2):
        use()
    assert live_tensors() <= before


def test_results_do_not_hold_the_model(fresh):
    """What a run returns is small: no tensor of it needs a graph or lies in a larger storage."""
    lvlm, sample, _, _ = fresh
    run = lvlm.run(sample, every_probe())
    for result in run.results.values():
        for value in vars(result).values():
            if torch.is_tensor(value):
                assert not value.requires_grad
                assert value.device.type == "cpu"


def test_two_lvlms_on_one_module(fresh):
    """Each has its own nnsight model, and neither disturbs the other."""
    one, sample, logits, ids = fresh
    other = ss.LVLM(one.module, one.processor)
    probe = ss.AttentionMass({"image": "image"})
    first = one.run(sample, [probe])
    second = other.run(sample, [probe])
    third = one.run(sample, [probe])
    assert torch.equal(first[probe].mass, second[probe].mass)
    assert torch.equal(first[probe].mass, third[probe].mass)
    failing = Failing(ss.Site("language", "attention", 1), StopThisError)
    with pytest.raises(StopThisError):
        other.run(sample, [failing])
    assert_untouched(one, sample, logits, ids)
    assert_untouched(other, sample, logits, ids)


def test_threads_take_turns(fresh):
    """Runs of two threads on one model give what they give alone."""
    lvlm, sample, _, _ = fresh
    probe = ss.AttentionMass({"image": "image"})
    want = lvlm.run(sample, [probe])[probe].mass
    got, failed = [], []

    def work():
        try:
            for _ in range(3):
                got.append(lvlm.run(sample, [probe])[probe].mass)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(got) == 6
    assert all(torch.equal(mass, want) for mass in got)


def test_kernels_in_a_trace_of_your_own():
    """The documented use: read the attention call where it is, and ask it your own questions."""
    module, processor = TINY["llava-clip-llama"]()
    lvlm = ss.LVLM(module, processor)
    sample = lvlm.prepare(images=random_image(), text="what")
    groups = sample.tokens.select("image")[..., None].float()
    call = lvlm.anatomy.language.call(1)
    model = nnsight.NNsight(module)
    with model.trace(**sample.inputs):
        here = model.model.language_model.layers[1]
        norms = residual.norms(here.input, {}).save()
        source = here.self_attn.source
        function = getattr(source, call.bind).output
        args, kwargs = getattr(source, call.call).inputs
        mass = attention.group_mass([(function, args, kwargs)], {}, groups)["mass"].save()
    probes = [
        ss.AttentionMass({"image": "image"}, layers=[1]),
        ss.TokenNorms(layers=[1], site="resid_pre"),
    ]
    run = lvlm.run(sample, probes)
    assert torch.equal(mass, run[probes[0]].mass[:, 0])
    assert torch.equal(norms, run[probes[1]].norms[:, 0])


def test_a_plan_in_a_trace_of_your_own():
    """`walk` runs the plan of any probes inside a trace that somebody else opened."""
    module, processor = TINY["qwen2.5-vl"]()
    lvlm = ss.LVLM(module, processor)
    sample = lvlm.prepare(images=random_image(96, 96), text="what")
    probe = ss.AttentionMass({"patch": "patch"}, tower="vision")
    context = Context(lvlm.anatomy, sample.tokens)
    plan = plan_of([probe], (), context, lvlm)
    model = nnsight.NNsight(module)
    with torch.no_grad(), model.trace(**sample.inputs) as tracer:
        answers = nnsight.save(walk.walk(model, tracer, plan))
    mass = torch.stack([answers[0]["vision", "attention", i]["mass"] for i in range(4)], dim=1)
    want = lvlm.run(sample, [probe])[probe].mass
    assert torch.equal(mass.nan_to_num(), want.nan_to_num())


def test_a_hook_that_replaces_what_is_read_is_refused(tiny):
    """It runs behind nnsight: what a probe reads there is not what the next block gets."""
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(48, 48, 0), text="what is it")
    block = lvlm.module.get_submodule(lvlm.anatomy.language.blocks[1])
    norms = [ss.TokenNorms([i], site=site) for i, site in ((1, "resid_post"), (2, "resid_pre"))]
    seen = []
    looking = block.register_forward_hook(lambda module, args, out: seen.append(out))
    run = lvlm.run(sample, norms)
    assert len(seen) == 1
    assert torch.equal(run[norms[0]].norms, run[norms[1]].norms)
    hooks = dict(block._forward_hooks)
    scaling = block.register_forward_hook(
        lambda module, args, out: (1.3 * out[0], *out[1:]) if isinstance(out, tuple) else 1.3 * out
    )
    with pytest.raises(ModelError, match=r"hook on .*layers.1' that replaces its output"):
        lvlm.run(sample, norms[:1])
    assert lvlm.run(sample, norms[1:])[norms[1]].norms.isfinite().any()  # behind the hook: right
    scaling.remove()
    assert block._forward_hooks == hooks
    looking.remove()

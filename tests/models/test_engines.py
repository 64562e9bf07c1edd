"""Two ways to run a plan, by hooks and through nnsight: the same bits, and the same under a user's own hooks."""

import dataclasses
import threading

import nnsight
import pytest
import torch
from torch.utils._pytree import tree_map

import sinkscope as ss
from sinkscope.errors import AttentionCallError, InputError
from sinkscope.interventions import (
    AblateActivations,
    AblateValues,
    AttentionKnockout,
    AttentionTemperature,
    EvictKeys,
    Redistribute,
)
from sinkscope.kernels import walk
from sinkscope.protocols import Read
from sinkscope.testing import TINY, random_image, tiny_llava
from sinkscope.testing.contracts import tensors_of
from tests.conftest import FAMILIES

PROBES = {
    "mass": lambda: ss.AttentionMass({"image": "image", "first": "first"}),
    "last": lambda: ss.AttentionMass({"image": "image"}, queries="last"),
    "received": lambda: ss.ReceivedAttention(others=True, events=True),
    "massive": ss.MassiveActivations,
    "branches": lambda: ss.TokenNorms(site="mlp_out"),
    "vision": lambda: ss.AttentionMass({"patch": "patch"}, tower="vision"),
}
EDITS = {
    "mask": lambda: [ss.MaskKeys("image", layers=None)],
    "knockout": lambda: [AttentionKnockout("last", "image", layers=[0, 1])],
    "scaled": lambda: [ss.ScaleKeys("image", 0.5), ss.ScaleAttention("first", 2.0, layers=[1])],
    "weights": lambda: [ss.ScaleAttention("image", 0.5, renormalize=False), EvictKeys(2, 6)],
    "moved": lambda: [Redistribute("first", "image", 0.5), AttentionTemperature(2.0)],
    "values": lambda: [
        AblateValues("image", "mean", layers=[1]),
        AblateActivations(dims=[0], tokens="image", layers=[1]),
    ],
    "vision": lambda: [ss.ScaleKeys("patch", 0.5, layers=[0, 1], tower="vision", heads=[1])],
}


def everything(run):
    """Every tensor that a run brought back, by name."""
    found = {"logits": run.logits}
    for i, result in enumerate((*run.results.values(), *run.effects.values())):
        found |= {
            f"{i} {type(result).__name__} {name}": x for name, x in tensors_of(result).items()
        }
    return found


def assert_same(one, other):
    one, other = everything(one), everything(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value.nan_to_num(-7), other[name].nan_to_num(-7)), name


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_probe_and_edit(tiny, batch, family, kernel):
    """A padded batch with several images, one pass and decode steps."""
    lvlm = tiny(family, kernel)
    sample = batch(lvlm)
    for make in EDITS.values():
        runs = []
        for engine in ("hooks", "nnsight"):
            probes = [probe() for probe in PROBES.values()]
            runs.append(lvlm.run(sample, probes, make(), engine=engine))
        assert_same(*runs)
    for edits in ([], EDITS["mask"]()):
        made = [
            lvlm.generate(sample, [PROBES["mass"](), ss.ReceivedAttention()], edits, max_new_tokens=4,
                          do_sample=False, engine=engine)
            for engine in ("hooks", "nnsight")
        ]  # fmt: skip
        assert torch.equal(made[0].sequences, made[1].sequences)
        for steps in zip(made[0].steps, made[1].steps, strict=True):
            assert_same(*steps)


@pytest.fixture
def fresh():
    lvlm = ss.LVLM(*TINY["llava-clip-llama"]())
    return lvlm, lvlm.prepare(images=random_image(48, 48, 0), text="what is it")


def both(lvlm, sample, **given):
    probes = [PROBES["mass"](), ss.TokenNorms(site="resid_post"), ss.TokenNorms(site="attn_out")]
    runs = [lvlm.run(sample, probes, engine=engine, **given) for engine in ("hooks", "nnsight")]
    assert_same(*runs)
    return runs[0]


def test_a_users_own_hooks(fresh):
    """What they change is seen by both, and what they see is what the model is given."""
    lvlm, sample = fresh
    before = both(lvlm, sample)
    block = lvlm.module.get_submodule(lvlm.anatomy.language.blocks[1])
    halve = block.register_forward_pre_hook(lambda module, args: (args[0] / 2, *args[1:]))
    changed = both(lvlm, sample)
    assert not torch.equal(changed.logits, before.logits)
    assert torch.equal(changed.logits, lvlm.module(**sample.inputs).logits)
    halve.remove()
    forward = block.mlp.forward
    block.mlp.forward = lambda x: 3 * forward(x)
    tripled = both(lvlm, sample)
    assert torch.equal(tripled.logits, lvlm.module(**sample.inputs).logits)
    del block.mlp.forward
    seen = []
    last = block.register_forward_hook(lambda module, args, out: seen.append(out))
    both(lvlm, sample, interventions=[AblateActivations(dims=[0], tokens="image", layers=[1])])
    last.remove()
    assert torch.equal(*(out[0] if isinstance(out, tuple) else out for out in seen))
    assert torch.equal(both(lvlm, sample).logits, before.logits)


def test_a_users_own_nnsight(fresh):
    """Also where it has written a forward of its own, in which the attention call is numbered."""
    lvlm, sample = fresh
    before, theirs = both(lvlm, sample), nnsight.NNsight(lvlm.module)
    with torch.no_grad(), theirs.trace(**sample.inputs):
        theirs.model.language_model.layers[1].self_attn.source.attention_interface_1.output.save()
    after = both(lvlm, sample)
    assert torch.equal(after.logits, before.logits)


def test_a_pass_of_another_thread_is_none_of_ours(fresh):
    """A user's plain pass in the middle of a run: neither is disturbed."""
    lvlm, sample = fresh
    probes = [PROBES["mass"](), ss.TokenNorms(site="resid_post")]
    want, theirs = lvlm.run(sample, probes), []

    def plain():
        with torch.no_grad():
            theirs.append(lvlm.module(**sample.inputs).logits)

    def once(module, args):
        handle.remove()
        thread = threading.Thread(target=plain)
        thread.start()
        thread.join()

    block = lvlm.module.get_submodule(lvlm.anatomy.language.blocks[1])
    handle = block.register_forward_pre_hook(once)
    assert_same(lvlm.run(sample, probes, engine="hooks"), want)
    assert torch.equal(theirs[0], want.logits)


def test_which_engine_runs(fresh):
    lvlm, sample = fresh
    with pytest.raises(InputError, match=r"engine='hook'; expected .*'hooks'.*nnsight"):
        lvlm.run(sample, engine="hook")
    with pytest.raises(
        InputError, match=r"engine='hooks' with remote='local'; expected a run here"
    ):
        lvlm.run(sample, engine="hooks", remote="local")
    where = type(lvlm.module.model.language_model.layers[0].self_attn).forward.__globals__
    registry = where["ALL_ATTENTION_FUNCTIONS"]
    lvlm.run(sample, [PROBES["mass"]()])
    assert where["ALL_ATTENTION_FUNCTIONS"] is registry


def test_a_site_that_a_pass_does_not_reach(fresh):
    """A block that does not call its attention is named, and nothing stays on the model."""
    lvlm, sample = fresh
    attention = lvlm.module.get_submodule(lvlm.anatomy.language.attention[1])
    attention.forward = lambda hidden_states, **named: (hidden_states, None)
    with pytest.raises(
        AttentionCallError, match=r"without language.attention\(1\); expected .*self_attn"
    ):
        lvlm.run(sample, [PROBES["mass"]()], engine="hooks")
    del attention.forward
    assert not any("forward" in vars(part) for part in lvlm.module.modules())


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_effects_that_are_not_asked_for(tiny, batch, kernel):
    """The same logits and counts, no masses, fewer calls."""
    lvlm = tiny("llava-clip-llama", kernel)
    sample = batch(lvlm)
    for name in ("mask", "scaled", "weights", "moved"):
        edits = EDITS[name]()
        full, bare = (lvlm.run(sample, interventions=edits, effects=on) for on in (True, False))
        assert torch.allclose(full.logits, bare.logits, atol=1e-5)
        for it in edits:
            one, other = full.effects[it], bare.effects[it]
            assert torch.equal(one.rows, other.rows)
            assert torch.equal(one.tokens, other.tokens)
            assert not one.mass_before[one.rows > 0].isnan().any()
            assert other.mass_before.isnan().all()
            assert other.mass_after.isnan().all()


def test_answers_are_no_views_of_what_a_later_layer_may_change(fresh):
    """A block that adds in place must not change what was read before it."""
    lvlm, sample = fresh
    block = lvlm.module.get_submodule(lvlm.anatomy.language.blocks[1])

    @dataclasses.dataclass(frozen=True, eq=False)
    class Raw:
        tower: str = "language"

        def reads(self, context):
            return [Read(ss.Site("language", "resid_post", 0), itself)]

        def finish(self, answers, context):
            return next(iter(answers.values()))

    want = lvlm.run(sample, [probe := Raw()])[probe].clone()
    hook = block.register_forward_pre_hook(lambda module, args: (args[0].mul_(2), *args[1:]))
    got = lvlm.run(sample, [probe])[probe]
    hook.remove()
    assert torch.equal(got, want)


def itself(states, state):
    return states


def test_answers_that_come_over_before_the_pass_ends(fresh, monkeypatch):
    """Many answers leave a device early; the masses of edits, which wait for other layers, are not lost."""
    lvlm, sample = fresh
    probes, edits = [PROBES["mass"](), ss.ReceivedAttention()], EDITS["mask"]()
    want = lvlm.run(sample, probes, edits)
    monkeypatch.setattr(walk, "HELD", -1)
    monkeypatch.setattr(walk, "brought", lambda x: tree_map(torch.clone, x))  # as from a GPU
    assert_same(lvlm.run(sample, probes, edits), want)


@pytest.mark.parametrize("family", [*FAMILIES, "learned sinks"])
def test_the_fast_way_is_the_general_one(tiny, batch, family, monkeypatch):
    """Log-sum-exps against gradients and further calls: padding, GQA, windows, decoding; sinks have one way."""
    sinks = family == "learned sinks"
    made = tiny_llava("siglip", "gpt_oss", attn_implementation="eager") if sinks else None
    lvlm = tiny(family) if made is None else ss.LVLM(*made)
    sample, told = batch(lvlm), []
    for general in (False, True):
        if general:
            for room in ("logsumexp", "edited_call"):
                monkeypatch.setattr(f"sinkscope.kernels.{room}.kernel_for", lambda *_: None)
        edits = [ss.MaskKeys("first", heads=[1]), ss.ScaleAttention("image", 0.5, layers=[0, 1])]
        probes = [
            ss.ReceivedAttention(others=True, events=True),
            ss.ReceivedAttention(tower="vision"),
        ]
        runs = [lvlm.run(sample, probes), lvlm.run(sample, interventions=edits[:1])]
        runs.append(lvlm.run(sample, interventions=edits[1:]))
        made = lvlm.generate(sample, [ss.ReceivedAttention()], edits[:1], max_new_tokens=3)
        told.append([everything(run) for run in (*runs, *made.steps)])
    for fast, slow in zip(*told, strict=True):
        for name, value in fast.items():
            near = torch.isclose(value.double(), slow[name].double(), atol=2e-5, equal_nan=True)
            assert near.all(), name

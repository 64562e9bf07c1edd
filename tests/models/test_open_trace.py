"""`LVLM.trace`: nnsight's own trace with sites by our names; the model is left as it was."""

import copy
import dataclasses

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import InterventionError, LayerError, ModelError, ProbeError
from sinkscope.kernels import attention, residual
from sinkscope.sites import STATE_SITES
from sinkscope.testing import TINY, random_image, tiny_llava
from tests.models.test_cleanup import StopThisError, assert_same, everything_on

FAMILIES = ("llava-clip-llama", "qwen2.5-vl")


@pytest.fixture
def case(tiny, request):
    lvlm = tiny(getattr(request, "param", FAMILIES[0]))
    return lvlm, lvlm.prepare(images=random_image(96, 96), text="what is it")


@pytest.fixture
def granite():
    """A model that multiplies its branches by a factor."""
    lvlm = ss.LVLM(*tiny_llava("dinov2", "granite"))
    return lvlm, lvlm.prepare(images=random_image(48, 48), text="what is it")


@pytest.mark.parametrize("tower", ["vision", "language"])
@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_every_site_has_the_states_of_our_probe(case, tower):
    lvlm, sample = case
    probes = [ss.probes.ResidualStates(tower=tower, site=name, layers=[1]) for name in STATE_SITES]
    want, seen = lvlm.run(sample, probes), {}
    with lvlm.trace(sample):
        seen = {name: lvlm.site(tower, 1, name) for name in STATE_SITES}.save()
        logits = lvlm.nn.output.logits.save()
    layout = sample.tokens.vision.layout if tower == "vision" else None
    for probe in probes:
        states = seen[probe.site] if layout is None else seen[probe.site][layout]
        assert torch.equal(states, want[probe].states[:, 0])
    assert torch.equal(logits, want.logits)


@pytest.mark.parametrize("tower", ["vision", "language"])
@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_our_kernels_work_inside(case, tower):
    """Packed towers have windows, all of which are read."""
    lvlm, sample = case
    tokens = sample.tokens.vision if tower == "vision" else sample.tokens
    groups = {"all": "all"}
    mass = ss.AttentionMass(groups, layers=[0], tower=tower)
    norms = ss.TokenNorms(layers=[0], tower=tower)
    run = lvlm.run(sample, [mass, norms])
    everything = tokens.select("all")[..., None].float()
    with lvlm.trace(sample):
        calls = lvlm.site(tower, 0, "attention")
        got = attention.group_mass(calls, {}, everything)["mass"].save()
        sizes = residual.norms(lvlm.site(tower, 0, "resid_post"), {}).save()
    torch.testing.assert_close(got, run[mass].mass[:, 0].reshape(got.shape))
    assert torch.equal(sizes.flatten().sort()[0], run[norms].norms.flatten().sort()[0])


def by_hand(lvlm, sample, path, change):
    """Logits under a plain forward hook that changes the states a module returns."""

    def hook(module, args, out):
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = lvlm.module.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        logits = lvlm.module(**sample.inputs).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    ("tower", "name"),
    [("vision", "resid_post"), ("language", "resid_post"), ("language", "attn_out")],
)
@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_an_edit_is_that_of_a_plain_hook(case, tower, name, in_place):
    """Also of a module that returns a tuple, such as attention."""
    lvlm, sample = case
    a = lvlm.anatomy.tower(tower)
    path = a.blocks[0] if name == "resid_post" else a.branch(name, 0).path
    want = by_hand(lvlm, sample, path, lambda states: 0.5 * states)
    with lvlm.trace(sample):
        if in_place:
            lvlm.site(tower, 0, name)[:] *= 0.5
        else:
            lvlm.set_site(tower, 0, name, 0.5 * lvlm.site(tower, 0, name))
        logits = lvlm.nn.output.logits.save()
    assert torch.equal(logits, want)
    assert not torch.equal(logits, lvlm.run(sample).logits)


def test_an_input_and_the_projector_are_set(case):
    lvlm, sample = case
    want = by_hand(lvlm, sample, lvlm.anatomy.projector, torch.zeros_like)
    with lvlm.trace(sample):
        states = lvlm.site("projector", 0, "output")
        lvlm.set_site("projector", 0, "output", torch.zeros_like(states))
        logits = lvlm.nn.output.logits.save()
    assert torch.equal(logits, want)
    want = by_hand(lvlm, sample, lvlm.anatomy.language.blocks[0], lambda states: 2 * states)
    with lvlm.trace(sample):
        lvlm.set_site("language", 1, "resid_pre", 2 * lvlm.site("language", 1, "resid_pre"))
        logits = lvlm.nn.output.logits.save()
    assert torch.equal(logits, want)


def test_what_attention_is_called_with_may_be_edited_in_place(case):
    lvlm, sample = case
    scale = ss.ScaleKeys("all", 0.5, layers=[1])
    want = lvlm.run(sample, interventions=[scale]).logits
    with lvlm.trace(sample):
        ((_, args, _),) = lvlm.site("language", 1, "attention")
        args[2].mul_(0.5)
        logits = lvlm.nn.output.logits.save()
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=0)
    says = r"set_site for the attention call.*ss\.ScaleKeys"
    with pytest.raises(InterventionError, match=says), lvlm.trace(sample):
        lvlm.set_site("language", 1, "attention", torch.zeros(1))


def test_a_branch_behind_a_factor_is_set_and_never_edited_in_place(granite):
    lvlm, sample = granite
    path = lvlm.anatomy.language.branch("attn_out", 1).path
    want = by_hand(lvlm, sample, path, torch.zeros_like)
    with lvlm.trace(sample):
        states = lvlm.site("language", 1, "attn_out")
        lvlm.set_site("language", 1, "attn_out", torch.zeros_like(states))
        logits = lvlm.nn.output.logits.save()
    assert torch.equal(logits, want)
    with lvlm.trace(sample):
        states = lvlm.site("language", 1, "attn_out")
        states[:] = 0
        lvlm.set_site("language", 1, "attn_out", states)
        logits = lvlm.nn.output.logits.save()
    assert torch.equal(logits, want)
    says = r"in place of language.attn_out\(1\).*set_site"
    with pytest.raises(InterventionError, match=says), lvlm.trace(sample):
        lvlm.site("language", 1, "attn_out")[:] = 0


def test_a_trace_may_have_gradients(case):
    lvlm, sample = case
    for grad in (False, True):
        with lvlm.trace(sample, grad=grad):
            states = lvlm.site("language", 1, "resid_post").save()
            logits = lvlm.nn.output.logits.save()
        assert logits.requires_grad == grad
    assert torch.autograd.grad(logits.sum(), states)[0].abs().sum() > 0


def stop_after(value, error):
    raise error("in the block")


@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_nothing_is_left_on_the_model(case):
    """Neither after a block nor after an error in one; nnsight's own parts are reachable inside."""
    lvlm = ss.LVLM(copy.deepcopy(case[0].module), case[0].processor, verify=False)
    sample, before = case[1], everything_on(lvlm)
    with lvlm.trace(sample) as tracer:
        inner = lvlm.nn.get(lvlm.anatomy.language.mlp[0]).output.save()
        assert tracer.envoy is lvlm.nn
        lvlm.site("language", 1, "attention")
    assert inner.shape[-1] == lvlm.anatomy.language.d_model
    assert_same(lvlm, before)
    for error in (StopThisError, KeyboardInterrupt):
        with pytest.raises(error, match="in the block"), lvlm.trace(sample):
            stop_after(lvlm.site("vision", 0, "attention"), error)
        assert_same(lvlm, before)
    with lvlm.trace(sample):
        logits = lvlm.nn.output.logits.save()
    assert torch.equal(logits, lvlm.run(sample).logits)


def test_a_hook_that_replaces_what_is_read_is_refused():
    lvlm = ss.LVLM(*TINY[FAMILIES[0]]())
    sample = lvlm.prepare(images=random_image(), text="what")
    block = lvlm.module.get_submodule(lvlm.anatomy.language.blocks[1])
    block.register_forward_hook(lambda module, args, out: 2 * out)
    with lvlm.trace(sample):
        states = lvlm.site("language", 2, "resid_pre").save()  # behind the hook: right
    assert states.isfinite().all()
    says = r"hook on .*layers.1' that replaces its output"
    with pytest.raises(ModelError, match=says), lvlm.trace(sample):
        lvlm.site("language", 1, "resid_post")


def test_neurons_have_a_site(case):
    """What the last map of an MLP reads; a tower without such maps has none."""
    lvlm, sample = case
    down = lvlm.module.get_submodule(lvlm.anatomy.language.neurons[0])
    with lvlm.trace(sample):
        hidden = lvlm.site("language", 0, "mlp_hidden").save()
        added = lvlm.site("language", 0, "mlp_out").save()
    with torch.no_grad():
        assert torch.equal(down(hidden), added)
    language = dataclasses.replace(lvlm.anatomy.language, neurons=("", "", ""))
    bare = ss.LVLM(lvlm.module, lvlm.processor, verify=False)
    bare._anatomy = dataclasses.replace(lvlm.anatomy, language=language)
    says = r"language.mlp_hidden\(0\), but that MLP has no last linear map"
    with pytest.raises(ModelError, match=says), bare.trace(sample):
        bare.site("language", 0, "mlp_hidden")


@pytest.mark.parametrize(
    ("use", "error", "says"),
    [
        (lambda m: m.site("language", 0, "resid_mid"), ProbeError, "Got site 'resid_mid'"),
        (lambda m: m.site("language", 3, "resid_pre"), LayerError, "expected 0 to 2"),
        (lambda m: m.site("projector", 1, "input"), LayerError, "Got layer=1; expected one of"),
        (
            lambda m: m.set_site("language", 0, "resid_pre", torch.zeros(1)),
            InterventionError,
            r"a tensor .* of torch.float32. Write new.to\(old.dtype\)",
        ),
    ],
)
def test_wrong_sites_are_refused(case, use, error, says):
    lvlm, sample = case
    with pytest.raises(error, match=says), lvlm.trace(sample):
        use(lvlm)


def test_a_site_outside_of_a_block_is_refused(case):
    lvlm, sample = case
    for use in (lambda: lvlm.nn, lambda: lvlm.site("language", 0, "resid_pre")):
        with pytest.raises(ProbeError, match=r"outside of a trace.*with lvlm.trace\(sample\)"):
            use()
        lvlm.trace(sample)  # a trace that was never entered

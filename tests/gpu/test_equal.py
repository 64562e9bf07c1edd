"""What holds on a CPU holds on a GPU: equalities with plain passes, in several dtypes.

``SINKSCOPE_GPU_REHEARSAL=1 pytest tests/gpu`` runs the same checks without a GPU.
"""

import copy
import inspect

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sinkscope as ss
from sinkscope.testing import TINY, random_image
from tests.gpu.common import FAMILIES, GROUPS, far, plain, single, tensors
from tests.lsg.conftest import vision_states
from tests.reference import language_attention, visible, vision_attention

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
OF_LOGITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of edited logits, over the largest: a hook rounds keys before their rotation, sinkscope after it."""
RULE = ss.detectors.Norm("3sigma")
ENGINES = "engine" in inspect.signature(ss.LVLM.run).parameters

families = pytest.mark.parametrize("family", FAMILIES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def own_weights(lvlm, sample):
    """Softmax in fp64 of the queries and keys of a plain SDPA pass, ``[batch layer head query key]``."""
    blocks = [lvlm.module.get_submodule(path) for path in lvlm.anatomy.language.attention]
    own, made = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def record(module, query, key, value, attention_mask=None, **how):
        mask = attention_mask
        if module in blocks:
            key_of_head = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            logits = query.double() @ key_of_head.double().mT * how["scaling"]
            seen = torch.ones_like(logits, dtype=torch.bool).tril() if mask is None else mask
            made.append(
                logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num().float().cpu()
            )
        return own(module, query, key, value, attention_mask, **how)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = record
    try:
        plain(lvlm, sample)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # the registry's own is below it
    return torch.stack(made, dim=1)


@families
@dtypes
@pytest.mark.parametrize("padded", [False, True], ids=["one", "padded"])
def test_attention_probes_equal_the_weights(on, batch, moved, family, dtype, padded):
    """Rounded as its values are, or exact; in fp32 also under the eager kernel."""
    lvlm = on(family, dtype)
    sample = moved(batch(lvlm) if padded else single(lvlm))
    live, alive = sample.tokens.live, sample.tokens.live[:, None, None]
    mass, exact = ss.AttentionMass(GROUPS), ss.AttentionMass(GROUPS, precision="float32")
    received, patterns = ss.ReceivedAttention(), ss.AttentionPatterns("last")
    want = own_weights(lvlm, sample)
    chosen = torch.stack([sample.tokens.select(s) for s in GROUPS.values()], -1).float()
    masses = torch.einsum("blhqk,bkg->blhqg", want, chosen)
    count = torch.einsum("bq,blqk->blk", live.float(), visible(lvlm, sample).float())
    column = torch.einsum("blhqk,bq->blhk", want, live.float()) / count[:, :, None]
    for kernel in ("sdpa", "eager") if dtype == torch.float32 else ("sdpa",):
        lvlm = on(family, dtype, kernel)
        run = lvlm.run(sample, [mass, exact, received, patterns])
        assert torch.equal(run.logits[live], plain(lvlm, sample).cpu()[live])
        assert far(run[mass].mass, masses, alive[..., None]) < TOLERANCE[dtype]
        assert far(run[exact].mass, masses, alive[..., None]) < 2e-5
        summed = 2e-5 if dtype == torch.float32 else 1e-4  # from log-sum-exps of half precision
        assert far(run[received].received, column, alive) < summed
        assert far(run[patterns].patterns[:, :, :, 0], want[..., -1, :], alive) < 2e-5
    if dtype == torch.float32:
        eager = language_attention(lvlm, sample.inputs).cpu()
        assert far(eager, want, alive[..., None]) < 2e-5


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl"])
def test_vision_probes_equal_eager(on, batch, moved, family):
    """A tower with CLS, and one of packed windows."""
    lvlm = on(family)
    sample = moved(batch(lvlm))
    mass = ss.AttentionMass({"patch": "patch"}, tower="vision")
    received = ss.ReceivedAttention(tower="vision")
    run = lvlm.run(sample, [mass, received])
    want = vision_attention(lvlm, sample).cpu().nan_to_num()
    patches = sample.tokens.vision.select("patch").float()
    alive = sample.tokens.vision.live[:, None, None]
    masses = torch.einsum("blhqk,bk->blhq", want, patches)
    assert far(run[mass].mass[..., 0], masses, alive) < 2e-5
    seen = (want.sum(dim=2, keepdim=True) > 0).sum(dim=3)
    assert far(run[received].received, want.sum(dim=3) / seen, alive) < 2e-5


@pytest.mark.skipif(not ENGINES, reason="this version has one way to run")
@families
def test_both_engines_give_the_same_bits(on, batch, family):
    lvlm = on(family, torch.bfloat16)
    sample = batch(lvlm)
    probes = [ss.AttentionMass(GROUPS), ss.ReceivedAttention(), ss.MassiveActivations()]
    edits = [ss.ScaleKeys("image", 0.5, [1]), ss.MaskKeys("text", [2])]
    one, other = (lvlm.run(sample, probes, edits, engine=name) for name in ("hooks", "nnsight"))
    assert torch.equal(one.logits.nan_to_num(), other.logits.nan_to_num())
    for probe in probes:
        pairs = list(zip(tensors(one[probe]), tensors(other[probe]), strict=True))
        assert pairs
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


@families
@dtypes
def test_generation_is_the_models_own(on, batch, moved, family, dtype):
    lvlm = on(family, dtype)
    sample, how = moved(batch(lvlm)), {"max_new_tokens": 4, "do_sample": False}
    mass = ss.AttentionMass(GROUPS)
    out = lvlm.generate(sample, [mass, ss.TokenNorms()], **how)
    with torch.no_grad():
        assert torch.equal(out.sequences, lvlm.module.generate(**sample.inputs, **how).cpu())
    assert [step[mass].mass.shape[3] for step in out.steps][1:] == [1, 1, 1]


@dtypes
def test_edits_equal_plain_hooks(on, batch, moved, dtype):
    lvlm = on("llava-clip-llama", dtype)
    sample = moved(batch(lvlm))
    live, chosen = sample.tokens.live, sample.tokens.select("image")
    layers = lvlm.module.model.language_model.layers

    def scale(module, args, out):
        return out * torch.where(chosen.to(out.device), 0.3, 1.0).to(out.dtype)[..., None]

    def mask(module, args, kwargs):
        seen = kwargs["attention_mask"]
        assert seen.dtype == torch.bool
        return args, kwargs | {"attention_mask": seen & ~chosen.to(seen.device)[:, None, None]}

    cases = [
        (ss.ScaleKeys("image", 0.3, [1]), [layers[1].self_attn.k_proj], scale),
        (ss.MaskKeys("image"), [layer.self_attn for layer in layers], mask),
    ]
    for edit, parts, hook in cases:
        if hook is mask:
            hooks = [p.register_forward_pre_hook(hook, with_kwargs=True) for p in parts]
        else:
            hooks = [p.register_forward_hook(hook) for p in parts]
        want = plain(lvlm, sample).cpu().float()[live]
        for each in hooks:
            each.remove()
        got = lvlm.run(sample, interventions=[edit]).logits.float()[live]
        unedited = plain(lvlm, sample).cpu().float()[live]
        assert far(got, want) / float(want.abs().max()) < OF_LOGITS[dtype]
        assert far(want, unedited) / float(want.abs().max()) > 3 * OF_LOGITS[dtype]


@families
def test_an_attached_gate_is_the_traced_one(on, batch, moved, family):
    lvlm = on(family)
    sample, how = moved(batch(lvlm)), {"max_new_tokens": 4, "do_sample": False}
    norms = vision_states(lvlm, sample).norm(dim=-1)
    rule = ss.detectors.Norm(float(norms[sample.tokens.vision.live].quantile(0.8)))
    gate = ss.LSG.for_model(lvlm, layer=0, v_detector=rule)
    with torch.no_grad():
        for weight in gate.parameters():
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            weight.add_(noise.to(weight))
    traced = lvlm.run(sample, interventions=[gate]).logits
    said = lvlm.generate(sample, interventions=[gate], **how).sequences
    gate.attach(lvlm.module)
    with torch.no_grad():
        attached = plain(lvlm, sample).cpu()
        again = lvlm.module.generate(**sample.inputs, **how).cpu()
    gate.detach()
    assert far(traced, attached) < 1e-4
    assert far(attached, plain(lvlm, sample).cpu()) > 1e-3
    assert torch.equal(said, again)


def records(n=8):
    words = ("circle", "two blue squares", "yes", "red")
    return [
        {"image": random_image(90, 112, i), "question": "what is it", "answer": words[i % 4]}
        for i in range(n)
    ]


def test_sweeps_and_training_give_what_a_cpu_gives(on):
    lvlm, there = on(), ss.LVLM(*TINY["llava-clip-llama"](), verify=False)
    weights = copy.deepcopy(lvlm.module.state_dict())
    how = {"v_detector": RULE, "progress": False, "grid": [(0.3, 0.7), (1.5, 1.0)]}
    tables = [ss.sweep(each, records(2), layers=[0, 1], **how).table for each in (lvlm, there)]
    assert (tables[0]["logprob"] - tables[1]["logprob"]).abs().max() < 1e-3
    assert (tables[0]["logprob"] - tables[0]["base_logprob"]).abs().max() > 1e-3
    how = {
        "v_detector": ss.detectors.Norm(8.0),
        "progress": False,
        "batch": 4,
        "epochs": 1,
        "validation": 0.0,
    }
    one, other = (ss.train_lsg(each, records(), [0], **how) for each in (lvlm, there))
    assert one.history["loss"].tolist() == pytest.approx(other.history["loss"].tolist(), abs=1e-3)
    assert one.history["step"].max() == 2
    after = lvlm.module.state_dict()
    assert all(torch.equal(weights[name], after[name]) for name in weights)

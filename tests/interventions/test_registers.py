"""Edited blocks, eviction and registers on tiny models, against plain torch hooks."""

import pytest
import torch

import sinkscope as ss
from sinkscope.testing import random_image, tiny_llava
from tests.interventions.reference import grown_inputs
from tests.interventions.test_exact import off
from tests.interventions.test_generation import PLAIN
from tests.probes.test_writes import HELD


def test_edited_is_the_same_model_until_the_block_ends(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    mask = ss.MaskKeys("image:0")
    plain, want = lvlm.run(sample).logits, lvlm.run(sample, interventions=[mask]).logits
    with lvlm.edited([mask]) as edited:
        assert torch.equal(edited.run(sample).logits, want)
        more = ss.ScaleKeys("text", 0.5)
        both = edited.run(sample, interventions=[more])
        assert set(both.effects) == {mask, more}
        assert edited.generate(sample, max_new_tokens=2).steps[1].effects[mask].touched.all()
    with pytest.raises(ss.SinkscopeError, match="edits have ended"):
        edited.run(sample)
    assert torch.equal(lvlm.run(sample).logits, plain)


@pytest.mark.parametrize(
    ("family", "kernel"), [("llava-clip-llama", "sdpa"), ("qwen2.5-vl", "eager")]
)
def test_eviction_keeps_first_and_recent_keys(tiny, batch, family, kernel):
    lvlm = tiny(family, kernel)
    sample = batch(lvlm)
    live = sample.tokens.live
    rows = sample.tokens.select("all")
    patterns = ss.AttentionPatterns(rows, layers=[0])
    evict = ss.interventions.EvictKeys(start=2, recent=5)
    plain = lvlm.run(sample, probes=[patterns])[patterns].patterns
    run = lvlm.run(sample, probes=[patterns], interventions=[evict])
    got = run[patterns].patterns
    for b in range(len(sample)):
        at = live[b].nonzero().flatten()
        before = plain[b, 0, :, : len(at)][..., at]
        after = got[b, 0, :, : len(at)][..., at]
        q, k = torch.arange(len(at))[:, None], torch.arange(len(at))[None]
        kept = ((k < 2) | (q - k < 5)) & (k <= q)
        want = before * kept / (before * kept).sum(-1, keepdim=True)
        assert (after - want).abs().max() < 1e-5
    out = lvlm.generate(
        sample, probes=[patterns], interventions=[evict], max_new_tokens=3, min_new_tokens=3
    )
    last = out.steps[2][patterns].patterns[:, 0, :, 0]
    assert torch.allclose((last.nan_to_num() > 0).sum(-1).float(), torch.tensor(7.0))


@pytest.mark.parametrize("family", ["llava-clip-llama", "llava-siglip-qwen2"])
def test_a_register_takes_over_the_neurons_and_stays_inside_the_tower(tiny, family):
    lvlm = tiny(family)
    sample = lvlm.prepare(images=random_image(48, 48, 0), text="what is it")
    outlier = torch.zeros_like(sample.tokens.vision.live)
    outlier[0, 5] = True
    neurons = ss.interventions.find_register_neurons(
        lvlm, [sample], [outlier], top_k=6, max_layer=1
    )
    assert sum(len(v) for v in neurons.values()) == 6
    probe = ss.interventions.NeuronActivity(outlier)
    activity = lvlm.run(sample, probes=[probe])[probe]
    best = max(
        (float(a), layer, n) for layer in (0, 1) for n, a in enumerate(activity.activity[layer][0])
    )
    assert best[2] in neurons[best[1]]
    register = ss.TestTimeRegister(neurons)
    plain = lvlm.run(sample)
    run = lvlm.run(sample, interventions=[register])
    assert run.logits.shape == plain.logits.shape
    assert not torch.equal(run.logits, plain.logits)
    assert torch.equal(lvlm.run(sample).logits, plain.logits)
    want = register_by_hand(lvlm, sample.inputs, neurons)
    assert (run.logits - want).abs().max() < 1e-5
    with pytest.raises(ss.SinkscopeError, match="adds positions to that tower"):
        lvlm.run(sample, probes=[ss.TokenNorms(tower="vision")], interventions=[register])


@pytest.mark.parametrize(
    ("family", "kernel", "dtype"),
    [
        *(("llava-clip-llama", "sdpa", dtype) for dtype in PLAIN),
        ("llava-siglip-qwen3", "eager", torch.bfloat16),
        ("gemma3", "sdpa", torch.float32),
        ("gemma3", "eager", torch.float32),
    ],
    ids=str,
)
def test_a_register_in_a_batch_in_half_precision_and_over_sixteen_steps(
    tiny, batch, family, kernel, dtype
):
    lvlm = tiny(family, kernel, dtype)
    sample = batch(lvlm)
    register = ss.TestTimeRegister({0: [1, 5], 1: [3]})
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in sample.inputs.items()}
    live, prompt = sample.tokens.live, sample.tokens.live.shape[1]
    run = lvlm.run(sample, interventions=[register])
    assert torch.equal(run.logits[live], register_by_hand(lvlm, inputs, register.neurons)[live])
    assert not torch.equal(run.logits[live], lvlm.run(sample).logits[live])
    out = lvlm.generate(
        sample,
        interventions=[register],
        max_new_tokens=16,
        min_new_tokens=16,
        suppress_tokens=[lvlm.anatomy.image_token_id],
    )
    want = register_by_hand(lvlm, grown_inputs(sample, out.sequences, 15, inputs), register.neurons)
    got = torch.cat([step.logits for step in out.steps], dim=1)
    assert off(got, want[:, prompt - 1 :]) <= PLAIN[dtype]


@pytest.mark.parametrize("fill", ["zero", "mean", "keep"])
@pytest.mark.parametrize(
    ("family", "count", "scale"),
    [
        ("llava-clip-llama", 1, -2.5),
        ("llava-clip-llama", 3, 1.0),
        ("llava-clip-llama", 3, 0.4),
        ("gemma3", 3, 0.4),
    ],
)
def test_every_setting_of_a_register_equals_hooks(tiny, batch, family, count, scale, fill):
    lvlm = tiny(family)
    sample = batch(lvlm)
    options = {"count": count, "scale": scale, "fill": fill}
    neurons = {0: [1, 5], 1: [3]}
    got = lvlm.run(sample, interventions=[ss.TestTimeRegister(neurons, **options)]).logits
    live = sample.tokens.live
    want = register_by_hand(lvlm, sample.inputs, neurons, **options)[live]
    assert off(got[live], want) <= 1e-5
    if options != {"count": 1, "scale": 1.0, "fill": "zero"}:
        usual = register_by_hand(lvlm, sample.inputs, neurons)[live]
        assert off(usual, want) > 1e-4


@pytest.mark.parametrize("fill", ["zero", "mean", "keep"])
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_register_of_the_released_code_leaves_cls_alone(tower, strategy, fill):
    """shared/hook_fn.py of nickjiang2378/test-time-registers, at 860df43: one peak, tokens from 1 on."""
    lvlm = ss.LVLM(*tiny_llava(tower, vision_feature_select_strategy=strategy, heads=2, kv_heads=1))
    sample = lvlm.prepare(
        images=[random_image(48, 48, 0), random_image(30, 48, 1)], text=["what is it", "how many"]
    )
    neurons, cls = {0: [1, 5, 40], 1: [3]}, int(tower == "clip")
    got = {}
    for peak in ("neuron", "layer"):
        for kept in (0, cls):
            how = {"cls": "keep" if kept else "zero", "peak": peak, "fill": fill, "count": 2}
            run = lvlm.run(sample, interventions=[ss.TestTimeRegister(neurons, **how)])
            options = {"count": 2, "fill": fill, "kept": kept, "shared": peak == "layer"}
            want = register_by_hand(lvlm, sample.inputs, neurons, **options)
            live = sample.tokens.live
            assert off(run.logits[live], want[live]) <= 1e-5
            got[peak, kept] = run.logits[live]
    both = ss.TestTimeRegister(neurons, cls="keep", fill=fill, count=2)
    same = lvlm.run(sample, interventions=[both]).logits[sample.tokens.live]
    assert torch.equal(same, got["neuron", cls])
    assert off(got["neuron", 0], got["layer", 0]) > 1e-4
    assert (off(got["neuron", 0], same) > 1e-4) == (cls == 1 and fill != "keep")
    (effect,) = lvlm.run(sample, interventions=[both]).effects.values()
    shifted = [i for i, site in enumerate(effect.sites) if site.name == "mlp_hidden"]
    assert (effect.tokens[:, shifted] == sample.tokens.vision.live.sum(1)[:, None] - cls).all()


def test_wrong_words_for_a_register_are_refused(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    for wrong in ({"cls": "kept"}, {"peak": "token"}):
        with pytest.raises(ss.errors.InterventionError, match=f"{next(iter(wrong))}="):
            lvlm.run(batch(lvlm), interventions=[ss.TestTimeRegister({0: [1]}, **wrong)])


@pytest.mark.parametrize("how", HELD)
def test_neurons_are_what_the_last_map_of_an_mlp_reads_however_it_is_held(how):
    """Found, measured and moved: an adapter's own maps, of rank 4, are no neurons."""
    torch.manual_seed(0)
    module, processor = tiny_llava("dinov2", "llama")
    for name in ("fc1", "fc2", "down_proj"):
        HELD[how](module, name)
    lvlm = ss.LVLM(module.eval(), processor)
    vision, language = lvlm.anatomy.vision, lvlm.anatomy.language
    assert (vision.d_mlp, language.d_mlp) == (96, 96)
    assert all(path.endswith(".mlp.fc2") for path in vision.neurons)
    assert all(path.endswith(".mlp.down_proj") for path in language.neurons)
    sample = lvlm.prepare(images=random_image(48, 48, 0), text="what is it")
    outlier = torch.zeros_like(sample.tokens.vision.live)
    outlier[0, 5] = True
    read = []
    last = module.get_submodule(f"{vision.blocks[0]}.mlp.fc2")
    hook = last.register_forward_pre_hook(lambda m, args: read.append(args[0][0, 5].abs()))
    with torch.no_grad():
        module(**sample.inputs)
    hook.remove()
    neurons = ss.interventions.find_register_neurons(
        lvlm, [sample], [outlier], top_k=6, max_layer=0
    )
    assert neurons == {0: read[0].topk(6).indices.tolist()}
    got = lvlm.run(sample, interventions=[ss.TestTimeRegister(neurons)]).logits
    assert off(got, register_by_hand(lvlm, sample.inputs, neurons)) < 1e-5


@torch.no_grad()
def register_by_hand(lvlm, inputs, neurons, count=1, scale=1.0, fill="zero", kept=0, shared=False):
    """The same with plain torch hooks: append, shift, drop. The first ``kept`` tokens stay."""
    a, root = lvlm.anatomy, lvlm.module
    module = dict(root.named_modules())
    hooks = []

    def append(m, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        longer = torch.cat([states, *count * [torch.zeros_like(states[:, :1])]], dim=1)
        if args:
            return (longer, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": longer}

    first = module[a.vision.blocks[0]]
    hooks.append(first.register_forward_pre_hook(append, with_kwargs=True))
    for layer, chosen in neurons.items():

        def shift(m, args, chosen=chosen):
            out = args[0].clone()
            every = args[0][..., chosen].flatten(1)
            for n in chosen:
                column = args[0][:, kept:-count, n]
                whole = every if shared else args[0][:, :-count, n]
                peak = whole[torch.arange(len(whole)), whole.abs().argmax(1)] * scale
                rest = {
                    "zero": 0 * column,
                    "mean": 0 * column + column.mean(1)[:, None],
                    "keep": column,
                }
                out[:, kept:-count, n], out[:, -count:, n] = rest[fill], peak[:, None]
            return (out,)

        last = module[f"{a.vision.blocks[layer]}.mlp.fc2"]
        hooks.append(last.register_forward_pre_hook(shift))
    last = module[a.vision.blocks[a.feed_layers[-1]]]
    hooks.append(
        last.register_forward_hook(
            lambda m, args, out: (
                (out[0][:, :-count], *out[1:]) if isinstance(out, tuple) else out[:, :-count]
            ),
            prepend=True,
        )
    )
    logits = root(**inputs).logits
    for hook in hooks:
        hook.remove()
    return logits

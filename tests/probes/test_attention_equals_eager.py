"""Every attention probe equals Hugging Face eager attention: both towers, every family and kernel."""

import pytest
import torch

import sinkscope as ss
from sinkscope.testing import TINY, random_image
from tests.reference import in_cache, language_attention, visible, vision_attention

FAMILIES = tuple(TINY)
KERNELS = ("sdpa", "eager")


def close(got, want, tolerance):
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    difference = (got - want).abs().nan_to_num().max().item()
    assert difference <= tolerance, difference


def mask_rows(values, live, dim):
    shape = [1] * values.ndim
    shape[0], shape[dim] = live.shape
    return values.masked_fill(~live.reshape(shape), float("nan"))


def from_others(got, weights, seen, live):
    """Without the diagonal, where at least 8 other live queries see a key.

    Args:
        got: A result with ``others``.
        weights: ``[batch layer head query key]``.
        seen: ``[batch layer query key]``, 1 where a query sees a key.
        live: ``[batch pos]``.
    """
    apart = (1 - torch.eye(live.shape[1])) * live[:, None, :, None].float()
    count = (seen * apart).sum(dim=2)
    few = (count < 8) | ~live[:, None]
    want = (weights * apart[:, :, None]).sum(dim=3) / count[:, :, None]
    close(got.others, want.masked_fill(few[:, :, None], float("nan")), 1e-5)
    uniform = seen / seen.sum(dim=-1, keepdim=True).clamp(min=1)
    null = (uniform * apart).sum(dim=2) / count
    close(got.others_null, null.masked_fill(few, float("nan")), 1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_language_probes_equal_eager(tiny, batch, family, kernel):
    lvlm = tiny(family, kernel)
    sample = batch(lvlm)
    live = sample.tokens.live
    groups = {"image:0": "image:0", "image:1": "image:1", "text": "text", "first": "first"}
    rows = sample.tokens.select("text")
    mass, received = ss.AttentionMass(groups), ss.ReceivedAttention(others=True)
    patterns, last = ss.AttentionPatterns(rows), ss.AttentionMass(groups, queries="last")
    run = lvlm.run(sample, probes=[mass, received, patterns, last])

    want = language_attention(lvlm, sample.inputs)
    onehot = torch.stack([sample.tokens.select(s) for s in groups.values()], -1).float()
    by_group = mask_rows(torch.einsum("blhqk,bkg->blhqg", want, onehot), live, 3)
    close(run[mass].mass, by_group, 1e-5)
    close(run[last].mass, by_group[:, :, :, -1:], 1e-5)

    count = torch.einsum("bq,blqk->blk", live.float(), visible(lvlm, sample).float())
    column = torch.einsum("blhqk,bq->blhk", want, live.float()) / count[:, :, None]
    close(run[received].received, mask_rows(column, live, 3), 1e-5)
    from_others(run[received], want, visible(lvlm, sample).float(), live)

    for b in range(len(sample)):
        at = rows[b].nonzero().flatten()
        got = run[patterns].patterns[b, :, :, : len(at)]
        close(got[..., live[b]], want[b][:, :, at][..., live[b]], 1e-5)
        assert run[patterns].patterns[b, :, :, len(at) :].isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_vision_probes_equal_eager(tiny, batch, family, kernel):
    lvlm = tiny(family, kernel)
    sample = batch(lvlm)
    vision = sample.tokens.vision
    some = torch.zeros_like(vision.live)
    some[:, 2:7] = True
    groups = {"patch": "patch", "some": some}
    mass = ss.AttentionMass(groups, tower="vision")
    received = ss.ReceivedAttention(tower="vision", others=True)
    patterns = ss.AttentionPatterns("patch", tower="vision")
    run = lvlm.run(sample, probes=[mass, received, patterns])

    want = vision_attention(lvlm, sample)
    onehot = torch.stack([vision.select(s) for s in groups.values()], -1).float()
    filled = want.nan_to_num()
    by_group = mask_rows(torch.einsum("blhqk,bkg->blhqg", filled, onehot), vision.live, 3)
    close(run[mass].mass, by_group, 1e-5)

    seen = (filled.sum(dim=2, keepdim=True) > 0).float()
    column = filled.sum(dim=3) / seen.sum(dim=3)
    close(run[received].received, mask_rows(column, vision.live, 3), 1e-5)
    from_others(run[received], filled, seen[:, :, 0], vision.live)

    rows = vision.select("patch")
    for image in range(len(vision.live)):
        at = rows[image].nonzero().flatten()
        got = run[patterns].patterns[image, :, :, : len(at)]
        alive = vision.live[image]
        close(got[..., alive], want[image][:, :, at][..., alive], 1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_generation_step_equals_a_full_eager_pass(tiny, batch, family, kernel):
    lvlm = tiny(family, kernel)
    sample = batch(lvlm)
    groups = {"image": "image", "text": "text"}
    mass, received, patterns = (
        ss.AttentionMass(groups),
        ss.ReceivedAttention(),
        ss.AttentionPatterns("last"),
    )
    norms, vision = ss.ValueNorms(), ss.TokenNorms(tower="vision")
    probes = [mass, received, patterns, norms, vision]
    out = lvlm.generate(sample, probes=probes, max_new_tokens=5, min_new_tokens=5)
    assert len(out.steps) == 5
    prompt = sample.tokens.ids.shape[1]
    assert torch.equal(out.sequences[:, :prompt], sample.tokens.ids)
    onehot = torch.stack([sample.tokens.select(s) for s in groups.values()], -1).float()
    for step, run in enumerate(out.steps):
        grown = dict(sample.inputs)
        grown["input_ids"] = out.sequences[:, : prompt + step]
        grown["attention_mask"] = torch.nn.functional.pad(
            sample.inputs["attention_mask"], (0, step), value=1
        )
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in grown:
                grown[name] = torch.nn.functional.pad(grown[name], (0, step))
        want = language_attention(lvlm, grown)[:, :, :, -1]
        of_groups = torch.einsum("blhk,bkg->blhg", want[..., :prompt], onehot)
        close(run[mass].mass[:, :, :, -1], of_groups, 1e-5)
        alive = grown["attention_mask"].bool()
        if step:  # what a sliding cache no longer holds is absent
            want = want.masked_fill(~in_cache(lvlm, prompt + step), float("nan"))
        pattern = run[patterns].patterns[:, :, :, -1]
        close(pattern, mask_rows(want, alive, 3), 1e-5)
        if step:
            assert vision not in run.results
            close(run[received].received, mask_rows(want, alive, 3), 1e-5)
            assert run[norms].norms.shape[-1] == prompt + step
        chosen = run.logits[:, -1].argmax(-1)
        assert torch.equal(chosen, out.sequences[:, prompt + step])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_without_edits_are_bitwise_the_plain_model(tiny, batch, family):
    lvlm = tiny(family)
    sample = batch(lvlm)
    with torch.no_grad():
        want = lvlm.module(**sample.inputs).logits
    probes = [ss.AttentionMass({"image": "image"}), ss.ReceivedAttention(), ss.LogitLens()]
    assert torch.equal(lvlm.run(sample, probes=probes).logits, want)
    assert torch.equal(lvlm.run(sample, logits="last").logits, want[:, -1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_remote_local_equals_local(tiny, batch, family):
    lvlm = tiny(family)
    sample = batch(lvlm)
    probe = ss.AttentionMass({"image": "image"})
    here = lvlm.generate(sample, probes=[probe], max_new_tokens=3)
    there = lvlm.generate(sample, probes=[probe], max_new_tokens=3, remote="local")
    assert torch.equal(here.sequences, there.sequences)
    for one, other in zip(here.steps, there.steps, strict=True):
        assert torch.equal(one[probe].mass.nan_to_num(), other[probe].mass.nan_to_num())


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_masses_are_within_the_stated_tolerance(tiny, family):
    """bf16 holds 8 bits: masses are good to 6e-3 of the same model's eager weights in fp32."""
    lvlm = tiny(family, "sdpa", torch.bfloat16)
    sample = lvlm.prepare(images=random_image(96, 96, 3), text="what is it")
    groups = {"image": "image", "text": "text"}
    plain = ss.AttentionMass(groups, layers=[0])
    exact = ss.AttentionMass(groups, layers=[0], precision="float32")
    run = lvlm.run(sample, probes=[plain, exact])
    assert (run[plain].mass - run[exact].mass).abs().nan_to_num().max() < 6e-3
    total = run[exact].mass.sum(-1) + run[exact].mass.new_zeros(())
    assert (total <= 1 + 1e-5).all()


def test_null_is_uniform_attention_by_hand(tiny):
    """Key 0 of a causal decoder is seen by all T queries: its null is (1/T) sum_i 1/i."""
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(32, 32, 0), text="what")
    received, mass = ss.ReceivedAttention(), ss.AttentionMass({"first": "first"})
    run = lvlm.run(sample, probes=[received, mass])
    n = sample.tokens.ids.shape[1]
    harmonic = sum(1 / i for i in range(1, n + 1)) / n
    assert abs(run[received].null[0, 0, 0].item() - harmonic) < 1e-6
    by_hand = torch.tensor([1 / (q + 1) for q in range(n)])
    assert torch.allclose(run[mass].null[0, 0, :, 0], by_hand, atol=1e-6)


def test_contribution_of_all_groups_is_the_attention_output(tiny, batch):
    """What all tokens write is the attention module's output without its bias (LLaMA has none)."""
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    all_keys = ss.ContributionNorms({"all": "all"})
    written = ss.TokenNorms(site="attn_out")
    run = lvlm.run(sample, probes=[all_keys, written])
    got, want = run[all_keys].norms[..., 0], run[written].norms
    assert torch.allclose(got.nan_to_num(), want.nan_to_num(), atol=1e-4)
    assert (run[all_keys].per_head.nan_to_num() >= 0).all()


def nats(shares):
    return -torch.xlogy(shares, shares).sum(dim=-1)


@pytest.mark.parametrize("tower", ["language", "vision"])
@pytest.mark.parametrize("family", FAMILIES)
def test_entropies_equal_those_of_eager_weights(tiny, batch, family, tower):
    """Over groups and what they leave, and over single keys; their nulls count visible keys."""
    lvlm = tiny(family)
    sample = batch(lvlm)
    if tower == "language":
        tokens, groups, rows = sample.tokens, {"image": "image", "first": "first"}, "text"
        want, seen = language_attention(lvlm, sample.inputs), visible(lvlm, sample).float()
    else:
        tokens, groups, rows = sample.tokens.vision, {"patch": "patch"}, "patch"
        want = vision_attention(lvlm, sample).nan_to_num()
        seen = (want.sum(dim=2) > 0).float()
    of_groups, of_keys, some = (
        ss.probes.AttentionEntropy(groups, tower=tower),
        ss.probes.AttentionEntropy(tower=tower),
        ss.probes.AttentionEntropy(queries=rows, tower=tower),
    )
    run = lvlm.run(sample, [of_groups, of_keys, some])
    live = tokens.live
    onehot = torch.stack([tokens.select(g) for g in groups.values()], -1).float()
    onehot = torch.cat([onehot, 1 - onehot.sum(dim=-1, keepdim=True)], dim=-1)
    close(run[of_keys].entropy, mask_rows(nats(want), live, 3), 2e-5)
    mass = torch.einsum("blhqk,bkg->blhqg", want, onehot)
    close(run[of_groups].entropy, mask_rows(nats(mass), live, 3), 2e-5)
    uniform = seen / seen.sum(dim=-1, keepdim=True).clamp(min=1)
    close(run[of_keys].null, mask_rows(nats(uniform), live, 2), 2e-5)
    mass = torch.einsum("blqk,bkg->blqg", uniform, onehot)
    close(run[of_groups].null, mask_rows(nats(mass), live, 2), 2e-5)
    for row, chosen in enumerate(tokens.select(rows)):
        got = run[some].entropy[row, :, :, : int(chosen.sum())]
        assert torch.allclose(got, run[of_keys].entropy[row][:, :, chosen], atol=1e-5)
    with pytest.raises(ss.errors.ProbeError, match=r"groups \['a', 'b'\], which share tokens"):
        lvlm.run(sample, [ss.probes.AttentionEntropy({"a": "all", "b": rows}, tower=tower)])


def test_the_null_entropy_by_hand(tiny):
    """A causal query at position q sees q + 1 keys: log(q + 1) nats."""
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(32, 32, 0), text="what")
    probe = ss.probes.AttentionEntropy()
    null = lvlm.run(sample, [probe])[probe].null[0, 0]
    assert torch.allclose(null, torch.arange(1, len(null) + 1).log(), atol=1e-5)

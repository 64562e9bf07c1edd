"""Residual-stream probes equal what transformers' own hidden states give, computed here by hand."""

import pytest
import torch

import sinkscope as ss
from sinkscope.testing import TINY, random_image

FAMILIES = tuple(TINY)
TOWERS = ("language", "vision")


@torch.no_grad()
def hidden_states(lvlm, sample, tower):
    """``resid_pre(0) ... resid_post(L-1)``, ``[row layer+1 pos d]``, by plain forward hooks."""
    blocks = lvlm.anatomy.tower(tower).blocks
    seen = []

    def keep_input(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    def keep_output(module, args, out):
        seen.append(out[0] if isinstance(out, tuple) else out)

    part = lvlm.module.get_submodule
    hooks = [part(blocks[0]).register_forward_pre_hook(keep_input, with_kwargs=True)]
    hooks += [part(block).register_forward_hook(keep_output) for block in blocks]
    lvlm.module(**sample.inputs)
    for hook in hooks:
        hook.remove()
    layout = sample.tokens.vision.layout
    if tower == "vision" and layout is not None:
        seen = [states.reshape(-1, states.shape[-1])[layout.clamp(min=0)] for states in seen]
    return torch.stack(seen, dim=1).float()


def live_of(sample, tower):
    return sample.tokens.live if tower == "language" else sample.tokens.vision.live


def masked(values, live):
    """NaN at padding; ``values`` is ``[row layer pos ...]``."""
    gone = ~live[:, None].reshape(live.shape[0], 1, live.shape[1], *[1] * (values.ndim - 3))
    return values.masked_fill(gone, float("nan"))


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.allclose(got.nan_to_num(), want.nan_to_num(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_spikes_scores_and_cosines_by_hand(tiny, batch, family, tower):
    lvlm = tiny(family)
    sample = batch(lvlm)
    live = live_of(sample, tower)
    norms, before = ss.TokenNorms(tower=tower), ss.TokenNorms(tower=tower, site="resid_pre")
    massive = ss.MassiveActivations(tower=tower, k=3)
    rms = ss.SinkDimensionScores([5, 2], tower=tower)
    raw = ss.SinkDimensionScores([5, 2], tower=tower, normalize="none")
    cosine = ss.probes.CosineToFirst(tower=tower)
    run = lvlm.run(sample, [norms, before, massive, rms, raw, cosine])
    states = hidden_states(lvlm, sample, tower)
    pre, post = states[:, :-1], states[:, 1:]

    close(run[norms].norms, masked(post.norm(dim=-1), live))
    close(run[before].norms, masked(pre.norm(dim=-1), live))
    order = post.abs().argsort(dim=-1, descending=True)[..., :3]
    close(run[massive].values, masked(post.gather(-1, order), live))
    channels = run[massive].channels
    assert (channels[~live[:, None].expand(channels.shape[:3])] == -1).all()
    assert torch.equal(channels, order.masked_fill(~live[:, None, :, None], -1))
    for row in range(len(live)):
        want = post[row][:, live[row]].abs().flatten(1).median(dim=1).values
        close(run[massive].median[row], want)
    peak = pre[..., [5, 2]].abs().amax(dim=-1)
    close(run[raw].scores, masked(peak, live))
    close(run[rms].scores, masked(peak / (pre.pow(2).mean(-1) + 1e-6).sqrt(), live))
    assert run[rms].bound == lvlm.anatomy.tower(tower).d_model ** 0.5
    first = pre[torch.arange(len(live)), :, live.int().argmax(dim=1)]
    by_hand = torch.nn.functional.cosine_similarity(pre, first[:, :, None], dim=-1).abs()
    close(run[cosine].scores, masked(by_hand, live))


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_write_what_a_block_adds(tiny, batch, family, tower):
    """``resid_post - resid_pre = attn_out + mlp_out`` in every pre-norm block, channel by channel."""
    lvlm = tiny(family)
    sample = batch(lvlm)
    d_model = lvlm.anatomy.tower(tower).d_model
    probe = ss.probes.ChannelValues(range(d_model), tower=tower)
    result = lvlm.run(sample, [probe])[probe]
    pre, attention, mlp, post = result.values.unbind(dim=2)
    close(post - pre, attention + mlp, 1e-4)
    states = hidden_states(lvlm, sample, tower)
    close(pre, masked(states[:, :-1], live_of(sample, tower)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_on_the_last_block_is_the_model(tiny, batch, family):
    lvlm = tiny(family)
    sample = batch(lvlm)
    last, images = ss.LogitLens(k=4), ss.LogitLens("image", layers=[1], k=2)
    run = lvlm.run(sample, [last, images])
    logprobs = run.logits[:, -1].log_softmax(dim=-1)
    want = logprobs.topk(4)
    close(run[last].logprobs[:, -1, 0], want.values)
    assert torch.equal(run[last].tokens[:, -1, 0], want.indices)
    close(run[last].entropy[:, -1, 0], -(logprobs.exp() * logprobs).sum(-1))
    assert run[last].positions.tolist() == [[sample.tokens.ids.shape[1] - 1]] * 2
    visual = sample.tokens.select("image").sum(dim=1)
    absent = run[images].positions < 0
    assert (~absent).sum(dim=1).tolist() == visual.tolist()
    assert run[images].logprobs[:, 0][absent].isnan().all()
    assert (run[images].tokens[:, 0][absent] == -1).all()
    assert (run[images].tokens[:, 0][~absent] >= 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_value_norms_are_those_of_the_value_projection(tiny, batch, family):
    """The decoder's values are the outputs of ``v_proj``, one norm per key-value head."""
    lvlm = tiny(family)
    sample = batch(lvlm)
    probe = ss.ValueNorms()
    got = lvlm.run(sample, [probe])[probe].norms
    seen = []
    hooks = [
        lvlm.module.get_submodule(f"{path}.v_proj").register_forward_hook(
            lambda module, args, out: seen.append(out)
        )
        for path in lvlm.anatomy.language.attention
    ]
    with torch.no_grad():
        lvlm.module(**sample.inputs)
    for hook in hooks:
        hook.remove()
    by_head = torch.stack([v.unflatten(-1, (2, 16)).norm(dim=-1).transpose(1, 2) for v in seen], 1)
    gone = ~sample.tokens.live[:, None, None]
    close(got, by_head.masked_fill(gone, float("nan")))


def test_a_spike_by_hand():
    """One channel of 300 among ones: ratio 300, massive by one rule, not by the other."""
    from sinkscope.kernels import residual

    states = torch.ones(1, 3, 8)
    states[0, 1, 6] = -300.0
    live = torch.tensor([[True, True, False]])
    out = residual.massive(states, {}, live, k=2)
    assert out["values"][0, 1].tolist() == [-300.0, 1.0]
    assert out["channels"][0, 1, 0] == 6
    assert out["median"].tolist() == [1.0]
    score = residual.dimension_scores(states, {}, [6], rms=True)
    assert abs(score[0, 1].item() - 8**0.5) < 1e-3  # nearly the bound: one channel has it all
    assert residual.dimension_scores(states, {}, [6], rms=False)[0, 1] == 300.0


def test_half_precision_states_do_not_overflow():
    """Norms of large fp16 states are computed in fp32: 1000 channels of 1000 have norm 31623."""
    from sinkscope.kernels import residual

    states = torch.full((1, 1, 1000), 1000.0, dtype=torch.float16)
    assert abs(residual.norms(states, {})[0, 0].item() - 31622.8) < 1
    assert residual.cosine_to(states, {}, torch.tensor([0]))[0, 0].item() == pytest.approx(1.0)


def test_tables_hold_every_live_value_once(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    live = int(sample.tokens.live.sum())
    probes = {
        ss.TokenNorms(): 3 * live,
        ss.MassiveActivations(k=2): 3 * live * 2,
        ss.SinkDimensionScores([0]): 3 * live,
        ss.probes.ChannelValues([1, 2], sites=("resid_pre", "mlp_out")): 3 * live * 4,
        ss.LogitLens(k=3): 3 * 2 * 3,
        ss.ValueNorms(): 3 * live * 2,
        ss.AttentionMass({"image": "image", "text": "text"}, null=False): 3 * live * 4 * 2,
        ss.AttentionPatterns(): 3 * 4 * live,
        ss.ReceivedAttention(): 3 * 4 * live,
        ss.ContributionNorms({"image": "image"}): 3 * live,
    }
    run = lvlm.run(sample, list(probes))
    for probe, count in probes.items():
        table = run[probe].to_dataframe()
        assert len(table) == count, type(probe).__name__
        assert not table.isna().any().any()
    patterns = run[next(p for p in probes if isinstance(p, ss.AttentionPatterns))].to_dataframe()
    assert set(patterns["row"]) == {sample.tokens.ids.shape[1] - 1}


def test_one_image_more_changes_no_number_of_the_first(tiny):
    """A batch gives each image's ViT tokens what they have alone, padded or packed."""
    for family in FAMILIES:
        lvlm = tiny(family)
        probe = ss.TokenNorms(tower="vision")
        one = lvlm.prepare(images=random_image(60, 90), text="what")
        two = lvlm.prepare(images=[random_image(60, 90), random_image(140, 70, 1)], text="what")
        alone = lvlm.run(one, [probe])[probe].norms[0]
        beside = lvlm.run(two, [probe])[probe].norms[0, :, : alone.shape[1]]
        assert torch.allclose(alone, beside, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_faces_last_hidden_state_is_behind_the_final_norm(tiny, family):
    """Ours is before it, in TokenNorms too; users compare the two."""
    lvlm = tiny(family)
    sample = lvlm.prepare(images=random_image(64, 64, 1), text="what is it")
    last = lvlm.anatomy.language.n_layers - 1
    states, norms = ss.probes.ResidualStates(), ss.TokenNorms()
    run = lvlm.run(sample, [states, norms])
    with torch.no_grad():
        theirs = lvlm.module(**sample.inputs, output_hidden_states=True).hidden_states
        normed = lvlm.module.get_submodule(lvlm.anatomy.final_norm)(run[states].states[:, last])
    assert len(theirs) == last + 2
    for layer in range(last):
        close(run[states].states[:, layer], theirs[layer + 1])
    close(normed, theirs[-1])
    assert not torch.allclose(run[states].states[:, last], theirs[-1], rtol=0.1)
    assert torch.equal(run[norms].norms[:, last], run[states].states[:, last].norm(dim=-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_scores_tokens_that_are_asked_for(tiny, batch, family):
    """The same everywhere, at every step too, and others at every position."""
    lvlm = tiny(family)
    sample = batch(lvlm)
    few = ss.LogitLens(layers=[-1 + lvlm.anatomy.language.n_layers], score=[7, 3])
    live = sample.tokens.live
    positions = live.sum(dim=1).max()
    ids = torch.full((2, int(positions), 2), -1)
    ids[0, :, 0], ids[1, :2, 1] = 5, 9
    each = ss.LogitLens(live, few.layers, k=1, score=ids)
    run = lvlm.run(sample, [few, each])
    logs = run.logits.log_softmax(dim=-1)
    close(run[few].scores[:, 0, 0], logs[:, -1, [7, 3]])
    got, at = run[each].scores[:, 0], run[each].positions
    own = at[0] >= 0
    close(got[0, own, 0], logs[0, at[0][own], 5])
    close(got[1, :2, 1], logs[1, at[1, :2], 9])
    assert got[0, :, 1].isnan().all()
    assert got[1, :, 0].isnan().all()
    assert got[1, 2:, 1].isnan().all()
    steps = lvlm.generate(sample, [few], max_new_tokens=2).steps
    close(steps[1][few].scores[:, 0, 0], steps[1].logits[:, -1].log_softmax(-1)[:, [7, 3]])
    assert lvlm.run(sample, [ss.LogitLens()])[ss.LogitLens()].scores is None


@pytest.mark.parametrize(
    "score", [[], ["red"], [10**6], [-1], torch.zeros(2, 1, 1), torch.ones(2, 3, 1).long()]
)
def test_scores_of_no_token_are_refused(tiny, batch, score):
    lvlm = tiny("llava-clip-llama")
    with pytest.raises(ss.errors.ProbeError, match=r"Got score.*expected .*Write score=\[5, 9\]"):
        lvlm.run(batch(lvlm), [ss.LogitLens(score=score)])

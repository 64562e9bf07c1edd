"""Group means equal the means of transformers' own hidden states, and empty groups are no zeros."""

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import ProbeError, SelectionError
from sinkscope.testing import TINY
from tests.probes.test_residual import TOWERS, hidden_states, live_of


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", tuple(TINY))
def test_means_by_hand_on_every_layer_and_site(tiny, batch, family, tower):
    """Two rows, one padded; one mask for all layers and one that differs by layer and leaves gaps."""
    lvlm = tiny(family)
    sample = batch(lvlm)
    live = live_of(sample, tower)
    n_layers = lvlm.anatomy.tower(tower).n_layers
    generator = torch.Generator().manual_seed(0)
    by_layer = torch.rand(len(live), n_layers, live.shape[1], generator=generator) < 0.4
    by_layer[0, 0], by_layer[-1, 1] = False, False
    some = torch.rand(live.shape, generator=generator) < 0.5
    groups = {"some": some & live, "by layer": by_layer & live[:, None], "all": "all"}
    before = ss.probes.GroupMeans(groups, tower=tower)
    after = ss.probes.GroupMeans(groups, tower=tower, layers=[1], site="resid_post")
    run = lvlm.run(sample, [before, after])
    states = hidden_states(lvlm, sample, tower)
    for row in range(len(live)):
        for layer in range(n_layers):
            masks = [groups["some"][row], groups["by layer"][row, layer], live[row]]
            for g, mask in enumerate(masks):
                assert run[before].count[row, layer, g] == mask.sum()
                want = states[row, layer][mask].mean(dim=0)
                got = run[before].means[row, layer, g]
                assert torch.allclose(got, want, atol=1e-5, rtol=1e-5, equal_nan=True)
                if layer == 1:
                    post = states[row, 2][mask].mean(dim=0)
                    got = run[after].means[row, 0, g]
                    assert torch.allclose(got, post, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert run[before].means[0, 0, 1].isnan().all()
    assert (run[before].count[0, 0, 1], run[after].layers, run[after].site) == (
        0,
        (1,),
        "resid_post",
    )


def test_a_table_has_no_lines_for_an_empty_group(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    none = torch.zeros_like(sample.tokens.live)
    probe = ss.probes.GroupMeans({"none": none, "last": "last"}, layers=[0])
    table = lvlm.run(sample, [probe])[probe].to_dataframe()
    assert set(table["group"]) == {"last"}
    assert (table["count"] == 1).all()
    assert len(table) == len(sample) * lvlm.anatomy.language.d_model


def test_at_a_decode_step_every_group_is_empty(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    probe = ss.probes.GroupMeans({"all": "all"})
    out = lvlm.generate(batch(lvlm), [probe], max_new_tokens=2, min_new_tokens=2)
    assert (out.steps[0][probe].count > 0).all()
    assert (out.steps[1][probe].count == 0).all()
    assert out.steps[1][probe].means.isnan().all()


@pytest.mark.parametrize(
    ("groups", "error", "match"),
    [
        ({}, ProbeError, "expected a dict"),
        ({"x": "imagge"}, SelectionError, "Did you mean 'image'"),
    ],
)
def test_wrong_groups_are_refused(tiny, batch, groups, error, match):
    lvlm = tiny("llava-clip-llama")
    with pytest.raises(error, match=match):
        lvlm.run(batch(lvlm), [ss.probes.GroupMeans(groups)])


def test_an_unknown_site_is_refused(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    with pytest.raises(ProbeError, match="Did you mean 'resid_pre'"):
        lvlm.run(batch(lvlm), [ss.probes.GroupMeans({"image": "image"}, site="resid_prae")])

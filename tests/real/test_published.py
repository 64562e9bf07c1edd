"""The field's measures on a real model and its tower, against plain torch."""

import pytest
import torch

import sinkscope as ss
from benchmarks.example_detection import photo
from scripts import compare_measures as plain
from sinkscope import published
from tests.real_model import example


@pytest.fixture(scope="module")
def lvlm():
    return example()


@pytest.fixture(scope="module")
def sample(lvlm):
    return lvlm.prepare(images=photo("china.jpg"), text="What is in the picture?")


@pytest.fixture(scope="module")
def decoder(lvlm, sample):
    return plain.eager(lvlm.module, sample.inputs, "language")


def test_the_sink_rate(lvlm, sample, decoder):
    got, want = published.sink_rate(lvlm, sample), plain.alpha(decoder[0], 64)
    assert torch.allclose(got.alpha[0], want, atol=1e-5)
    assert got.first == pytest.approx(
        0.7259, abs=1e-4
    )  # the first 64 tokens: text, and a part of the image


def test_massive_activations_and_phi(lvlm, sample, decoder):
    want = plain.massive(decoder[1])
    table = published.massive_activations(lvlm, sample).to_dataframe()
    got = {(x.layer, x.pos, x.channel): x.value for x in table.itertuples()}
    assert got == pytest.approx(want, rel=1e-4)
    assert {channel for _, _, channel in got} == {507, 247}
    phi = plain.phi(decoder[2], [507])
    found = published.var(lvlm, sample, [507])
    assert torch.allclose(found.phi[0], phi, atol=1e-3)
    assert int(found.sinks.sum()) == int((phi[2:] > 20).sum()) > 0


@pytest.mark.parametrize(("name", "events"), [("photo", 0), ("scene", 2)])
def test_of_seventy_two_heads_few_have_an_event(lvlm, sample, name, events):
    """LayerScale decides the words of several; three times uniform attention is far from an event."""
    if name == "scene":
        image = ss.bundled.draw_scene(seed=11_000_005).image
        sample = lvlm.prepare(images=image, text="how many shapes are there?")
    want = plain.heads_of(lvlm.module, sample.inputs, "vision")
    bare = plain.heads_of(lvlm.module, sample.inputs, "vision", scaled=False)
    table = published.nop_broadcast(lvlm, sample).to_dataframe()
    assert len(table) == 72
    assert int(table.event.sum()) == events
    for x in table.itertuples():
        own = want[x.layer, x.head]
        assert (x.sink, x.label) == (own["sink"], plain.label(own))
        for field in ("mass", "routed", "ratio_head", "ratio_out", "stable_rank"):
            assert getattr(x, field) == pytest.approx(own[field], rel=1e-3)
    words = [{at: plain.label({**x, "routed": 1.0}) for at, x in of.items()} for of in (want, bare)]
    flips = sum(words[0][at] != words[1][at] for at in want)
    assert flips == {"photo": 7, "scene": 12}[name]
    probe = ss.ReceivedAttention(tower="vision")
    received = lvlm.run(sample, [probe], logits="last")[probe]
    drawn = (received.received > 3 * received.null[:, :, None]).any(dim=-1)
    assert int(drawn.sum()) == {"photo": 71, "scene": 64}[name]


def test_a_sink_without_an_event_is_not_called_nop(lvlm, sample):
    """A token to which its best head gives 0.68 writes little; the paper's word needs an event."""
    first, second, *_ = sorted(ss.trace_sinks(lvlm, sample).records, key=lambda r: -r.excess)
    assert (first.pos, first.verdict, first.event) == (0, "NOP", True)
    assert first.routed >= 0.9
    assert (second.verdict, second.event) == ("no event", False)
    assert second.value_ratio < 0.2

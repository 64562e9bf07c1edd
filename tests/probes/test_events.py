"""Sink events (2606.08105) against eager attention: dominant keys, what they take, who routes to them."""

from dataclasses import replace

import pytest
import torch

import sinkscope as ss
from sinkscope.testing import TINY, tiny_llava
from tests.reference import language_attention, visible, vision_attention


def by_hand(weights, seen, live):
    """Dominant key, its mean weight and the share of its queries that give it half, per head.

    ``weights`` are ``[head query key]``, ``seen`` ``[query key]``, ``live`` ``[query]``.
    """
    weights = weights.nan_to_num()[:, live]
    sink = weights.sum(1).argmax(-1)
    column = weights.gather(2, sink[:, None, None].expand(-1, weights.shape[1], 1))[..., 0]
    count = seen[live][:, sink].sum(0)
    return sink, column.sum(1) / count, (column >= 0.5).sum(1) / count


@pytest.mark.parametrize("family", tuple(TINY))
def test_events_of_the_decoder_count_the_live_queries_that_see_the_key(tiny, batch, family):
    lvlm = tiny(family)
    sample = batch(lvlm)
    probe = ss.ReceivedAttention(events=True)
    got = lvlm.run(sample, [probe])[probe]
    weights, seen = language_attention(lvlm, sample.inputs), visible(lvlm, sample)
    for row, layer in ((b, l) for b in range(2) for l in got.layers):  # noqa: E741
        live = sample.tokens.live[row]
        want = by_hand(weights[row, layer], seen[row, layer], live)
        assert torch.equal(got.sink[row, layer], want[0])
        assert torch.allclose(got.sink_mass[row, layer], want[1], atol=1e-5)
        assert torch.allclose(got.routed[row, layer], want[2], atol=1e-6)
    assert torch.equal(got.event(0.3), got.routed >= 0.3)
    assert got.routed.max() > 0


@pytest.mark.parametrize("family", tuple(TINY))
def test_events_of_the_vision_tower_are_of_one_image(tiny, batch, family):
    lvlm = tiny(family)
    sample = batch(lvlm)
    probe = ss.ReceivedAttention(events=True, null=False, tower="vision")
    got = lvlm.run(sample, [probe])[probe]
    weights = vision_attention(lvlm, sample)
    for image, layer in ((i, l) for i in range(len(weights)) for l in got.layers):  # noqa: E741
        one, live = weights[image, layer], sample.tokens.vision.live[image]
        want = by_hand(one, one.nan_to_num()[0] > 0, live)  # other windows get exactly 0
        assert torch.equal(got.sink[image, layer], want[0])
        assert torch.allclose(got.sink_mass[image, layer], want[1], atol=1e-5)
        assert torch.allclose(got.routed[image, layer], want[2], atol=1e-6)


def test_a_learned_sink_is_no_key():
    lvlm = ss.LVLM(*tiny_llava("clip", "gpt_oss", attn_implementation="eager"))
    sample = lvlm.prepare(images=ss.testing.random_image(), text="what is it")
    probe = ss.ReceivedAttention(events=True)
    got = lvlm.run(sample, [probe])[probe]
    weights, seen = language_attention(lvlm, sample.inputs), visible(lvlm, sample)
    for layer in got.layers:
        want = by_hand(weights[0, layer], seen[0, layer], sample.tokens.live[0])
        assert torch.equal(got.sink[0, layer], want[0])
        assert torch.allclose(got.sink_mass[0, layer], want[1], atol=1e-5)


def test_an_event_needs_ninety_of_a_hundred_queries(tiny, batch):
    lvlm, probe = tiny("llava-clip-llama"), ss.ReceivedAttention([0], events=True)
    got = lvlm.run(batch(lvlm), [probe])[probe]
    shares = torch.tensor([0.0, 0.89, 0.9, 1.0]).expand(2, 1, 4)
    assert replace(got, routed=shares).event()[0, 0].tolist() == [False, False, True, True]


def test_events_must_be_asked_for_and_a_decode_step_has_none(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    plain, probe = ss.ReceivedAttention(), ss.ReceivedAttention(events=True)
    with pytest.raises(ss.SinkscopeError, match=r"Write ReceivedAttention\(events=True\)"):
        lvlm.run(sample, [plain])[plain].event()
    steps = lvlm.generate(sample, [probe], max_new_tokens=2, min_new_tokens=2).steps
    assert steps[0][probe].event().shape == (2, 3, 4)
    with pytest.raises(ss.SinkscopeError, match="decode steps have one query"):
        steps[1][probe].event()

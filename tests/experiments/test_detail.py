"""trace_sinks(detail="sinks"): the same sinks, records and words as with all evidence, from few bytes."""

from dataclasses import dataclass

import pytest
import torch

import sinkscope as ss
from sinkscope import detectors, viz
from sinkscope.errors import DetectorError, ProbeError
from sinkscope.experiments.sink_edits import top_received
from sinkscope.probes import SinkEvidence
from sinkscope.results import same
from sinkscope.testing import plant, sink_free

TEXTS = ("USER: <image>\nwhat ?", "<image>\nhow many are red ?")


@dataclass(frozen=True)
class ByHead:
    """A detector of the user's own, that reads what every key receives by head."""

    def probe(self, tower, layers, anatomy):
        return SinkEvidence(layers, tower)

    def scores(self, result):
        return result.received.received.median(dim=2).values

    def thresholds(self, result, scores):
        return torch.full(scores.shape[:2], 0.05)

    def null(self, result, anatomy):
        return 0.0


class OwnGap(detectors.Gap):
    """A rule derived from ours."""


CLEAR = detectors.Norm("valley"), detectors.SinkDimensions((41, 17), 3.0)
RULES = {
    "the gap rule": (None, None),
    "of channels": CLEAR,
    "of spikes": (detectors.Massive(0.0, 5.0), detectors.Massive(0.0, 5.0)),
    "of attention": (detectors.Received(0.1), detectors.Received(times_null=2.0)),
    "of chance": (detectors.RandomTokens(2), detectors.RandomTokens(3, seed=1)),
    "of the user": (ByHead(), ByHead()),
    "derived": (OwnGap(), OwnGap()),
    "all": (detectors.Norm(1e-6), detectors.Massive(0.0, 0.01)),
    "none": (detectors.NoSinks("no rule"), detectors.NoSinks("no rule")),
}


def planted(**given):
    made = plant("clip", v_sinks=(9, 46), l_sinks=(20, 46), l_layer=2, **given)
    return ss.LVLM(made.model, made.processor, verify=False), made.inputs(list(TEXTS))


@pytest.fixture(scope="module")
def samples(tiny, batch):
    made = {}
    for name in ("llava-clip-llama", "qwen2.5-vl", "gemma3"):
        made[name] = tiny(name), batch(tiny(name))
    half = tiny("llava-clip-llama", dtype=torch.bfloat16)
    made["bf16"] = half, batch(half)
    lvlm, inputs = planted()
    made["planted"] = lvlm, lvlm.prepare(inputs=inputs)
    free = sink_free("siglip")
    lvlm = ss.LVLM(free.model, free.processor, verify=False)
    made["sink-free"] = lvlm, lvlm.prepare(inputs=free.inputs(list(TEXTS)))
    return made


def told(trace):
    """All that a trace says: as text, in which NaN equals NaN."""
    said = [trace.to_json(), trace.summary(), trace._repr_html_(), repr(trace), trace.notes]
    said += [repr(trace.candidates), viz.tokens_html(trace), viz.tokens_html(trace, 1, layer=1)]
    return said


def masks(trace):
    found = [trace.v_sinks, trace.attended, trace.l_sinks(), trace.text_sinks(), trace.overlap()]
    found += [trace.ordinary(), *trace.groups.values(), top_received(trace, 3), trace.null]
    return [
        *found,
        trace.vit_spikes,
        trace.llm_spikes,
        trace.language.drawn(),
        trace.vision.drawn(),
    ]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["planted", "sink-free", "llava-clip-llama", "qwen2.5-vl", "bf16"])
def test_what_a_trace_says_does_not_depend_on_the_detail(samples, name, rule):
    lvlm, sample = samples[name]
    full = ss.trace_sinks(lvlm, sample, *RULES[rule], detail="full")
    lean = ss.trace_sinks(lvlm, sample, *RULES[rule], detail="sinks")
    assert told(lean) == told(full)
    for one, other in zip(masks(lean), masks(full), strict=True):
        assert torch.equal(one.float().nan_to_num(-7.0), other.float().nan_to_num(-7.0))
    for one, other in ((lean.v_detection, full.v_detection), (lean.l_detection, full.l_detection)):
        assert torch.equal(one.mask, other.mask)
    if rule == "all":
        assert lean.v_sinks.equal(sample.tokens.image >= 0)
        assert len(lean.records) == int(sample.tokens.live.sum())
    assert lean.records or name != "planted" or rule == "none"


def test_a_sliding_window_has_its_own_null(samples):
    lvlm, sample = samples["gemma3"]
    full, lean = (ss.trace_sinks(lvlm, sample, detail=x) for x in ("full", "sinks"))
    assert told(lean) == told(full)
    assert same(lean.null.nan_to_num(-1), full.null.nan_to_num(-1))


def test_what_is_not_there_is_said(samples):
    lvlm, sample = samples["planted"]
    full, lean = (ss.trace_sinks(lvlm, sample, detail=x) for x in (None, "sinks"))
    assert full.received.shape == (2, 6, 4, sample.tokens.ids.shape[1])  # None is "full" here
    for ask in (
        lambda: lean.received,
        lambda: lean.language.received.excess(),
        lambda: viz.plot_received_map(lean, layer=1),
        lambda: ss.RandomControl(ss.MaskKeys("first", heads=[1]), "mass").draws(lean),
    ):
        with pytest.raises(ProbeError, match=r"detail='sinks'.*Write .*detail='full'"):
            ask()
    got = lean.language.received
    for row in range(2):
        for pos in got.kept[row].tolist():
            assert torch.equal(got.of_key(row, pos), full.received[row, :, :, pos])
        sinks = {record.pos for record in lean.records if record.batch == row}
        assert sinks <= {*got.kept[row].tolist()}
    live = sample.tokens.live[1].nonzero().flatten().tolist()
    other = next(pos for pos in live if pos not in got.kept[1].tolist())
    with pytest.raises(ProbeError, match="what the key at"):
        viz.plot_received_heads(got, other, 1)
    with pytest.raises(DetectorError, match="detail='some'"):
        ss.trace_sinks(lvlm, sample, detail="some")


def test_figures_reports_and_files_work_without_the_rest(samples, tmp_path):
    lvlm, sample = samples["planted"]
    lean = ss.trace_sinks(lvlm, sample, detail="sinks")
    full = ss.trace_sinks(lvlm, sample)
    words = [[(p.name, p.alt) for p in viz.pages.pictures_of(trace)] for trace in (lean, full)]
    assert words[0] == words[1]
    pos = lean.records[0].pos
    viz.plot_received_heads(lean.language.received, pos, lean.records[0].batch)
    lean.plot(1)
    control = ss.RandomControl(ss.MaskKeys(lean.v_sinks, allow_noop=True), "mass", n=3)
    for one, other in zip(control.draws(lean), control.draws(full), strict=True):
        assert same(one, other)
    loaded = ss.results.load(lean.language.save(tmp_path / "evidence"))
    assert same(loaded.received.kept, lean.language.received.kept)
    assert torch.equal(loaded.drawn().nan_to_num(), lean.language.drawn().nan_to_num())

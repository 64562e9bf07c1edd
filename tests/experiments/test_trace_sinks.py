"""trace_sinks: planted sinks, their records and their order, where rules come from, and passes counted."""

import json
import math
from contextlib import contextmanager

import pytest
import torch

import sinkscope as ss
from sinkscope import detectors
from sinkscope.errors import DetectorError, SelectionError
from sinkscope.experiments.measuring import birth_block, carry
from sinkscope.results import same
from sinkscope.testing import plant, random_image, sink_free

GIVEN = (detectors.Norm("valley"), detectors.SinkDimensions((41, 101), 3.0))


@pytest.fixture(scope="module")
def planted():
    made = plant("clip", v_sinks=(9, 46), l_sinks=(20, 46), l_layer=2)
    return made, ss.LVLM(made.model, made.processor, verify=False)


@contextmanager
def passes(lvlm):
    """How often each tower runs inside the block: ``{"vision": n, "language": n}``."""
    counts, hooks = {"vision": 0, "language": 0}, []
    for name in counts:

        def count(*_, name=name):
            counts[name] += 1

        block = lvlm.module.get_submodule(lvlm.anatomy.tower(name).blocks[0])
        hooks.append(block.register_forward_pre_hook(count))
    yield counts
    for hook in hooks:
        hook.remove()


def traced(made, lvlm, *rules, texts=("USER: <image>\nwhat is it ? ASSISTANT:",), **options):
    return ss.trace_sinks(lvlm, lvlm.prepare(inputs=made.inputs(list(texts))), *rules, **options)


@pytest.mark.parametrize("writer", ["mlp", "attention"])
@pytest.mark.parametrize("layout", ["clip", "siglip"])
def test_records_say_what_was_planted(layout, writer):
    made = plant(layout, v_sinks=(9, 46), l_sinks=(20, 46), l_layer=2, v_written_by=writer)
    lvlm, truth = ss.LVLM(made.model, made.processor, verify=False), made.truth
    trace = traced(
        made, lvlm, *GIVEN, texts=["USER: <image>\nwhat ?", "<image>\nhow many are red ?"]
    )
    tokens = trace.sample.tokens
    for kind, got in {
        "v_sinks": trace.v_sinks,
        "l_sinks": trace.l_sinks().any(dim=1),
        "text_sinks": trace.text_sinks().any(dim=1),
    }.items():
        assert torch.equal(got, made.tokens(kind, tokens.ids)), kind
    at = [(record.batch, record.pos) for record in trace.records]
    assert at == sorted(at)
    assert [record.kind for record in trace.records] == ["text", "V", "L", "V"] * 2
    for record in trace.records:
        patch = record.row * 8 + record.column
        assert record.word == tokens.words[record.batch][record.pos]
        if record.kind == "V":
            assert patch in truth.v_sinks
            assert (record.vit_kind, record.vit_birth) == ("patch", truth.v_layer)
            assert record.vit_writer == truth.v_written_by
            assert record.vit_token in record.vit_tokens
            assert record.vit_channels[0][0] in truth.v_dims
        if record.kind == "V" and not record.overlap:
            assert (record.llm_birth, record.llm_lives, record.llm_layers) == (None, (), ())
            continue
        assert patch in (20, 46) or record.kind == "text"
        last = trace.n_layers - 1
        assert record.llm_lives == ((truth.l_layer, last, truth.l_written_by),)
        assert record.llm_layers == tuple(range(truth.l_layer + 1, last + 1))
        assert {channel for channel, _ in record.peak_channels[:2]} == set(truth.l_dims)
        layer, head = record.head
        excess = trace.language.received.excess()[record.batch, :, :, record.pos]
        assert record.excess == float(excess[layer, head]) == float(excess.nan_to_num(-2.0).max())
        assert record.first_drawn == int((excess.amax(1) >= trace.draws).nonzero()[0])
        assert record.received[layer] == pytest.approx(
            float(trace.received[record.batch, layer, :, record.pos].mean())
        )
    text = trace.records[0]
    assert (text.vit_token, text.vit_kind, text.vit_norm, text.vit_drawn) == (-1, None, None, ())
    body = json.loads(trace.to_json())
    assert [sink["pos"] for sink in body["sinks"]] == [pos for _, pos in at]
    assert trace.to_dataframe()["pos"].tolist() == [pos for _, pos in at]


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl", "gemma3"])
def test_a_padded_batch_with_several_images(tiny, batch, family):
    """Groups are a partition of the live tokens in every layer, and a row alone is traced alike."""
    lvlm = tiny(family)
    rules = (detectors.Norm("valley"), detectors.Massive(0.0, 5.0))
    trace = ss.trace_sinks(lvlm, batch(lvlm), *rules)
    live, image = trace.sample.tokens.live, trace.sample.tokens.image
    assert not live.all()
    assert sum(group.int() for group in trace.groups.values()).equal(
        live[:, None].expand(-1, trace.n_layers, -1).int()
    )
    rule, table = trace.l_detection.mask, trace.overlap_table()
    for layer in range(trace.n_layers):
        assert torch.equal(trace.l_sinks(layer), trace.l_sinks()[:, layer])
        assert torch.equal(trace.overlap(layer), trace.v_sinks & rule[:, layer])
        assert torch.equal(trace.text_sinks(layer), rule[:, layer] & live & (image < 0))
        left = (image >= 0) & ~trace.v_sinks & ~trace.attended & ~rule[:, layer]
        assert torch.equal(trace.ordinary(layer), left)
        assert table["L"][layer] == int(trace.l_sinks(layer).sum())
    flagged = trace.v_sinks | trace.attended | rule.any(dim=1)
    assert [(r.batch, r.pos) for r in trace.records] == [
        tuple(x) for x in flagged.nonzero().tolist()
    ]
    alone = lvlm.prepare(images=random_image(96, 120, 0), text="what is it")
    one = ss.trace_sinks(lvlm, alone, *rules)
    n = alone.tokens.ids.shape[1]
    assert torch.equal(one.l_detection.mask[0], rule[0, :, -n:])
    assert torch.equal(one.v_sinks[0], trace.v_sinks[0, -n:])


def test_where_rules_come_from_and_how_many_passes_they_take(planted, monkeypatch):
    made, lvlm = planted
    calibration = ss.calibrate(lvlm, [lvlm.prepare(inputs=made.inputs(image_seed=1))])
    once = {"vision": 1, "language": 1}
    for rules, options, chosen in (
        ((), {}, "the gap rule on this sample"),
        (GIVEN, {}, "given"),
        (GIVEN[:1], {}, "V: given; L: the gap rule on this sample"),
        ((), {"calibration": calibration}, "calibrated on 1 samples"),
    ):
        with passes(lvlm) as counts:
            trace = traced(made, lvlm, *rules, **options)
        assert (trace.chosen, counts) == (chosen, once)
        assert trace.v_sinks.equal(made.tokens("v_sinks", trace.sample.tokens.ids))
        assert trace.calibration is options.get("calibration")
    a = lvlm.anatomy
    sizes = (a.model_type, a.language.d_model, a.language.n_layers, a.vision.d_model)
    row = detectors.Known("Tiny", *sizes, (41, 101), 3.0, None, "here", default=False)
    monkeypatch.setattr("sinkscope.detectors.choice.KNOWN", (row,))
    assert any("reported for Tiny (here)" in text for text in traced(made, lvlm).warnings)


def test_without_sinks_every_tower_says_why():
    free = sink_free()
    lvlm = ss.LVLM(free.model, free.processor, verify=False)
    trace = traced(free, lvlm)
    assert trace.records == ()
    assert list(trace.outcomes) == ["vision", "language"]
    assert all("no" in text for text in trace.outcomes.values())
    assert {one.tower for one in trace.candidates} == {"vision", "language"}
    for one in trace.candidates:
        assert not one.flagged
        assert one.reason != "flagged"
        evidence = trace.vision if one.tower == "vision" else trace.language
        layers = list(trace.feeds) if one.tower == "vision" else list(range(trace.n_layers))
        times = evidence.prominence()[one.row, layers, one.pos].nan_to_num(-1.0)
        assert one.prominence == float(times.max())
        assert one.spike_layer == layers[int(times.argmax())]
        if one.drawn_at is not None:
            assert one.drawn == float(evidence.drawn()[one.row, :, one.pos].nan_to_num(-2.0).max())
    nothing = traced(free, lvlm, detectors.NoSinks("none here"), detectors.NoSinks("nor here"))
    assert nothing.outcomes == {"vision": "none here", "language": "nor here"}


def test_the_mean_of_merged_tokens_must_pass_too(tiny, batch):
    """Qwen's tower merges four ViT tokens into one, of which one alone is flagged here."""
    lvlm = tiny("qwen2.5-vl")
    sample = batch(lvlm)
    trace = ss.trace_sinks(lvlm, sample, detectors.Norm(1e9), detectors.NoSinks())
    v, feed = trace.v_detection, list(trace.feeds)
    token = int(sample.tokens.sources[0, int((sample.tokens.image[0] >= 0).nonzero()[0]), 0])
    mask, scores = torch.zeros_like(v.mask), torch.zeros_like(v.scores)
    mask[0, feed, token], scores[0, feed, token] = True, 1.0
    for limit, merge, found in ((0.5, "max", 1), (0.5, "mean", 0), (0.2, "mean", 1)):
        one = v.__class__(
            **{**vars(v), "mask": mask, "scores": scores,
               "threshold": torch.full_like(v.threshold, limit)}
        )  # fmt: skip
        assert int(carry(sample, one, feed, merge).sum()) == found


def with_a_text_row(sample):
    """Inputs of a sample and one row more without an image, and that row alone."""
    tokens = sample.tokens
    ids = tokens.ids[0][tokens.live[0] & (tokens.image[0] < 0)]
    ids = torch.cat([ids, ids[-6:]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole, alone = dict(sample.inputs), {}
    for name, value in sample.inputs.items():
        if value.shape == tokens.ids.shape:
            row = given.get(name, torch.zeros_like(ids))
            padded = torch.nn.functional.pad(row, (value.shape[1] - len(row), 0))
            whole[name], alone[name] = torch.cat([value, padded[None]]), row[None]
    return whole, alone


def check_alike(got, want):
    """Equal words, whole numbers and masks; other numbers up to what padding changes."""
    if isinstance(got, dict):
        assert got.keys() == want.keys()
        got, want = tuple(got.values()), tuple(want.values())
    if isinstance(got, tuple) and isinstance(want, tuple):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            check_alike(one, other)
    elif isinstance(got, (float, torch.Tensor)) and want is not None:
        close = {"rtol": 2e-3, "atol": 1e-4, "equal_nan": True}
        torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want), **close)
    else:
        assert got == want


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl"])
@pytest.mark.parametrize(
    "rule", [None, detectors.Received(times_null=2.0)], ids=["gap", "received"]
)
def test_every_row_of_a_batch_is_traced_as_if_alone(tiny, batch, family, rule):
    """One image, two images, none; unequal lengths; padding on the left."""
    lvlm = tiny(family)
    gap = detectors.Gap(1.2, 2.0, 0.01, 0.5)  # so low that random weights meet it
    inputs, text = with_a_text_row(batch(lvlm))
    images = [[random_image(96, 120, 0)], [random_image(70, 64, 1), random_image(120, 60, 2)]]
    words = ["what is it", "how many red shapes are in the two pictures ?"]
    alone = [lvlm.prepare(images=i, text=t) for i, t in zip(images, words, strict=True)]
    alone.append(lvlm.prepare(inputs=text))
    whole = ss.trace_sinks(lvlm, lvlm.prepare(inputs=inputs), rule or gap, rule or gap)
    owner, pads = whole.sample.tokens.vision.batch_row, ~whole.sample.tokens.live
    assert not (whole.v_sinks | whole.attended | whole.l_detection.any_layer())[pads].any()
    for row, sample in enumerate(alone):
        v = rule or gap if row < 2 else detectors.NoSinks()
        one, n, seen = ss.trace_sinks(lvlm, sample, v, rule or gap), len(sample.tokens.ids[0]), []
        for trace, at, images in ((whole, row, owner == row), (one, 0, slice(None))):
            low, high, language = trace.l_detection, trace.v_detection, trace.language
            seen.append({"v": trace.v_sinks[at, -n:], "attended": trace.attended[at, -n:]})
            seen[-1] |= {"l": low.mask[at, :, -n:], "scores": low.scores[at, :, -n:]}
            seen[-1] |= {"limit": low.threshold[at], "drawn": language.drawn()[at, :, -n:]}
            seen[-1] |= {"times": language.prominence()[at, :, -n:]}
            seen[-1] |= {"received": language.received.received[at, :, :, -n:]}
            shift, cut = trace.sample.tokens.ids.shape[1] - n, one.v_detection.mask.shape[2]
            if row < 2:
                seen[-1] |= {"vision": high.mask[images, :, :cut]}
                seen[-1] |= {"vision scores": high.scores[images, :, :cut]}
                seen[-1] |= {"patches": trace.vision.drawn()[images, :, :cut]}
            mine = [record.to_dict() for record in trace.records if record.batch == at]
            own = {"batch": 0, "box": None}  # a box of given inputs is in other pixels
            seen[-1]["records"] = tuple(r | own | {"pos": r["pos"] - shift} for r in mine)
            few = [c for c in trace.candidates if c.tower == "language" and c.row == at]
            seen[-1]["candidates"] = tuple((c.pos - shift, c.flagged, c.drawn_at) for c in few)
        check_alike(*seen)
    assert {record.batch for record in whole.records} >= {0, 1}


def test_no_question_is_asked_twice(planted, monkeypatch):
    """The norms of a norm rule and the spikes of a massive rule are read anyway."""
    made, lvlm = planted
    run, asked = lvlm.run, []
    monkeypatch.setattr(lvlm, "run", lambda s, p, **k: (asked.append(p), run(s, p, **k))[1])
    few = [detectors.Norm(100.0), detectors.Massive(10.0, 5.0)]
    limits = detectors.Limits("ratio", [5.0] * lvlm.anatomy.language.n_layers)
    for rules in (few, [detectors.Gap(), limits], [detectors.Massive(), detectors.Gap()]):
        trace = traced(made, lvlm, *rules)
        probes = asked.pop()
        assert not any(same(a, b) for i, a in enumerate(probes) for b in probes[:i])
        assert not any(getattr(probe, "k", 16) == 1 for probe in probes)
        found = ss.detect(lvlm, trace.sample, rules[1])
        for name in ("mask", "scores", "threshold"):
            assert torch.equal(getattr(found, name), getattr(trace.l_detection, name))
        assert found.null == trace.l_detection.null


def test_what_spikes_in_a_batch_is_named_with_its_row(planted):
    made, lvlm = planted
    never, texts = (detectors.Norm(1e9), detectors.Massive(1e9)), ["<image>\nwhat ?"] * 2
    said = traced(made, lvlm, *never, texts=texts).outcomes
    assert "patch 1,1 of image 1 (" in said["vision"]
    assert "of row 1 (" in said["language"]
    assert "of row" not in traced(made, lvlm, *never).outcomes["language"]


@pytest.mark.parametrize(
    ("mask", "birth"), [("111", 0), ("011", 1), ("101", 2), ("110", None), ("000", None)]
)
def test_a_birth_is_the_start_of_the_last_unbroken_stretch(mask, birth):
    assert birth_block(torch.tensor([c == "1" for c in mask])) == birth


def test_wrong_use_is_explained(planted):
    made, lvlm = planted
    for draws in (0.0, 1.0, math.nan, "a"):
        with pytest.raises(DetectorError, match=f"Got draws={draws!r}; expected a finite number"):
            traced(made, lvlm, draws=draws)
    with pytest.raises(SelectionError, match="merge"):
        traced(made, lvlm, merge="middle")
    with pytest.raises(DetectorError, match="as detector; expected an object"):
        traced(made, lvlm, "norm")
    with pytest.raises(SelectionError, match="Got layer 6; expected 0 to 5"):
        traced(made, lvlm, *GIVEN).ordinary(6)
    assert "SinkTrace(2 V-sinks, 1 L-sinks, 1 text sinks" in repr(traced(made, lvlm, *GIVEN))
    assert "given" in traced(made, lvlm, *GIVEN).summary()

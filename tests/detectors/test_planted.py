"""Detectors and the trace against sinks that were planted, calibrated on other seeds."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from tqdm.auto import tqdm

import sinkscope as ss
from benchmarks.planted_detectors import (
    LAYOUTS,
    Score,
    calibrated,
    load,
    make,
    score_singles,
    score_trace,
    single_detectors,
    truth_of,
)
from sinkscope import detectors
from sinkscope.errors import SelectionError
from sinkscope.testing import random_plant, sink_free

SEEDS = range(16)


@pytest.fixture(scope="module")
def rules():
    return {layout: calibrated(layout) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_precision_and_recall_are_one_over_all_seeds(rules, layout):
    totals = {"V": Score(), "L": Score()}
    for seed in SEEDS:
        got = score_trace(make(seed, layout), *rules[layout])
        totals = {kind: totals[kind] + got[kind] for kind in totals}
    for kind, total in totals.items():
        assert total.planted >= 3 * len(SEEDS), kind
        assert (total.precision, total.recall) == (1.0, 1.0), (kind, total)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strength_decides_what_each_detector_still_finds(rules, layout):
    """Strong sinks are found; at strength 0 nothing is; fixed thresholds fail long before RMS ones."""
    singles = single_detectors(*rules[layout])
    recall = {}
    for strength in (1.0, 0.2, 0.0):
        got = score_singles(make(7, layout, strength), singles)
        recall |= {(strength, *key): value.recall for key, value in got.items()}
    assert recall[1.0, "V", "norm 100"] == recall[1.0, "L", "massive 100 / 1000x"] == 1.0
    assert recall[0.2, "V", "massive 100 / 1000x"] == recall[0.2, "L", "massive 100 / 1000x"] == 0.0
    assert recall[0.2, "V", "dims (calibrated)"] == recall[0.2, "L", "dims (calibrated)"] == 1.0
    assert recall[0.0, "V", "dims (calibrated)"] == recall[0.0, "L", "dims (calibrated)"] == 0.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoys_are_told_apart(rules, layout):
    """A spike that no key reads draws nothing; a token that draws without a spike is no sink."""
    planted = make(3, layout)
    lvlm, sample = load(planted)
    ids = sample.tokens.ids
    spike, draw = (planted.tokens(k, ids) for k in ("spike_decoys", "attention_decoys"))
    trace = ss.trace_sinks(lvlm, sample, *rules[layout])
    for layer in (-1, trace.n_layers, True):
        with pytest.raises(SelectionError, match=rf"Got layer {layer}; expected 0 to"):
            trace.l_sinks(layer)
    flagged = trace.v_sinks | trace.l_sinks().any(dim=1)
    assert not (flagged & (spike | draw)).any()

    by_norm = ss.trace_sinks(lvlm, sample, detectors.Norm(100.0), detectors.Massive())
    decoys = [r for r in by_norm.records if spike[r.batch, r.pos]]
    assert [r.verdict for r in decoys] == ["draws nothing"]
    assert all(r.verdict != "draws nothing" for r in by_norm.records if r not in decoys)

    received = ss.detect(lvlm, sample, detectors.Received(times_null=3.0))
    assert received.any_layer()[draw].all()
    assert not received.any_layer()[spike].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_found_where_nothing_was_planted(rules, layout):
    for seed in range(5):
        planted = sink_free(layout, seed)
        lvlm, sample = load(planted)
        for given in (rules[layout], (None, None)):
            trace = ss.trace_sinks(lvlm, sample, *given)
            assert not trace.v_sinks.any()
            assert not trace.l_sinks().any()
            assert not trace.text_sinks().any()
            assert trace.records == ()
            assert "none found" in trace.summary()


def test_overlap_table_counts_v_sinks_that_meet_the_l_rule(rules):
    planted = make(11, "clip")
    lvlm, sample = load(planted)
    trace = ss.trace_sinks(lvlm, sample, *rules["clip"])
    table = trace.overlap_table().set_index("layer")
    born = planted.truth.l_layer
    for layer in range(trace.n_layers):
        after = layer > born
        assert table.loc[layer].tolist() == [3, 2 * after, 1 * after, 1 * after]
    truth = truth_of(planted, sample)
    assert torch.equal(trace.overlap(born + 1), truth["L rule"] & truth["V"])
    assert [r.overlap for r in trace.records if r.kind == "V"].count(True) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_calibration_finds_each_models_own_channels(layout):
    """Every seed has its own sink channels, a decoy channel and channels that V-sinks arrive in."""
    for seed in range(8):
        planted = random_plant(seed, layout, n_overlap=1)
        lvlm = ss.LVLM(planted.model, planted.processor, verify=False)
        samples = [lvlm.prepare(inputs=planted.inputs(image_seed=i)) for i in (1, 2)]
        found = ss.calibrate(lvlm, samples)
        assert set(found.vision.dims) == set(planted.truth.v_dims), seed
        assert set(found.language.dims) == set(planted.truth.l_dims), seed
        assert found.confidence > 0.8
        assert "These are the samples that the limits are from" in found.language.reason


def test_a_confidence_says_from_how_many_instances_it_is():
    planted = random_plant(0, "clip")
    lvlm = ss.LVLM(planted.model, planted.processor, verify=False)
    found = ss.calibrate(lvlm, [lvlm.prepare(inputs=planted.inputs())], towers=["language"])
    count = found.language.instances
    assert count > 1
    assert found.language.reason.startswith(f"{count} instances with a spike and attention; ")
    alone = dataclasses.replace(
        found, vision=dataclasses.replace(found.language, instances=1, confidence=0.6)
    )
    assert repr(alone).endswith("1 samples, confidence 0.60 on them, from 1 instance)")
    assert f"from {count} instances)" in repr(dataclasses.replace(found, vision=found.language))


def test_rows_of_a_sample_are_calibrated_like_samples(monkeypatch):
    """A batch of three gives what its rows give one by one, and a row without an image has no V-sinks."""
    planted = random_plant(0, "clip")
    lvlm = ss.LVLM(planted.model, planted.processor, verify=False)
    texts = [
        "<image>\nhow",
        "USER: <image>\nwhat is it ? ASSISTANT:",
        "<image>\nhow many are red ?",
    ]
    whole = lvlm.prepare(inputs=planted.inputs(texts))
    assert not whole.tokens.live.all()
    rows = []
    for row, live in enumerate(whole.tokens.live):
        words = {
            name: whole.inputs[name][row : row + 1, live]
            for name in ("input_ids", "attention_mask")
        }
        picture = whole.inputs["pixel_values"][row : row + 1]
        rows.append(lvlm.prepare(inputs=words | {"pixel_values": picture}))
    bars = []
    bar = type("Bar", (tqdm,), {"close": lambda self: bars.append((self.n, self.total))})
    monkeypatch.setattr("sinkscope.detectors.calibration.tqdm", bar)
    one = ss.calibrate(lvlm, [whole], progress=True)
    assert set(bars) == {(3, 3)}
    many = ss.calibrate(lvlm, rows)
    assert one.n_samples == many.n_samples == 3
    assert "3 samples" in repr(one)
    for tower in ("vision", "language"):
        a, b = (getattr(found, tower) for found in (one, many))
        assert a.instances == b.instances >= 3
        assert (a.score, a.dims, a.layers) == (b.score, b.dims, b.layers)
        for name in ("tau", "lowest_sink", "highest_other", "confidence", "gaps"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-4)
    keep = whole.tokens.image[0] < 0
    text = {
        name: whole.inputs[name][:1, keep & whole.tokens.live[0]].repeat(1, 3) for name in words
    }
    with_text = ss.calibrate(lvlm, [*rows, lvlm.prepare(inputs=text)])
    assert with_text.vision == many.vision
    assert with_text.n_samples == 4
    assert with_text.language.instances >= many.language.instances


@pytest.mark.parametrize("layout", LAYOUTS)
def test_records_tell_birth_writer_and_place(layout):
    planted = random_plant(5, layout, n_overlap=1)
    lvlm = ss.LVLM(planted.model, planted.processor)
    sample = lvlm.prepare(inputs=planted.inputs())
    truth = planted.truth
    records = ss.trace_sinks(lvlm, sample).records
    kinds = [r.kind for r in records]
    assert kinds.count("V") == len(truth.v_sinks)
    assert kinds.count("L") == len(truth.l_sinks)
    attended = [r for r in records if r.kind == "attention"]
    assert [r.row * 8 + r.column for r in attended] == list(truth.attention_decoys)
    for r in records:
        if r.kind == "attention":
            continue
        assert r.value_ratio <= 0.2
        # Sinks share the attention of their heads, so of most no head has an event.
        assert r.verdict == ("NOP" if r.event else "no event")
        if r.kind == "V":
            assert r.vit_birth == truth.v_layer
            assert r.vit_writer == truth.v_written_by
            assert r.vit_channels[0][0] in truth.v_dims
            assert r.llm_channels[0][0] in truth.arrival_dims
            assert r.first_drawn == 0
            patch = r.vit_token - truth.cls_tokens
            assert (r.row, r.column) == divmod(patch, 8)
            assert r.box is None or r.box[:2] == (8.0 * r.column, 8.0 * r.row)
        else:
            assert r.llm_birth == truth.l_layer
            assert r.llm_writer == "mlp"
            assert r.first_drawn == truth.l_layer + 1
            assert r.peak_channels[0][0] in truth.l_dims


def test_contribution_of_a_record_is_what_the_head_writes():
    """The mean over queries of what one token alone writes through one head's projection."""
    planted = random_plant(2, "clip")
    lvlm = ss.LVLM(planted.model, planted.processor)
    sample = lvlm.prepare(inputs=planted.inputs())
    for record in ss.trace_sinks(lvlm, sample).records:
        alone = torch.zeros_like(sample.tokens.live)
        alone[record.batch, record.pos] = True
        probe = ss.ContributionNorms({"it": alone}, layers=[record.head[0]])
        written = lvlm.run(sample, probes=[probe])[probe].per_head
        by_query = written[record.batch, 0, record.head[1], record.pos :, 0]
        assert abs(by_query.mean().item() - record.contribution) < 1e-4 * max(
            1, record.contribution
        )


@pytest.mark.parametrize("missing", [range(6), [1]])
def test_a_trace_goes_on_where_it_is_not_known_what_a_block_adds(missing):
    """Sinks are found all the same; who wrote them, or what they write, is left open there."""
    planted = random_plant(5, n_overlap=1)
    lvlm = ss.LVLM(planted.model, planted.processor)
    sample = lvlm.prepare(inputs=planted.inputs())
    want = ss.trace_sinks(lvlm, sample).records
    reason = "it adds something else; expected a sum"
    proofs = lvlm.anatomy.language.proofs
    lost = (replace(one, added=reason * (i in missing)) for i, one in enumerate(proofs))
    lvlm._anatomy = lvlm.anatomy.proven({"language": tuple(lost)}, None)
    got = ss.trace_sinks(lvlm, sample).records
    assert [(r.kind, r.pos, r.llm_layers) for r in got] == [
        (r.kind, r.pos, r.llm_layers) for r in want
    ]
    for one, before in zip(got, want, strict=True):
        known = one.llm_birth not in missing
        assert one.llm_writer == (before.llm_writer if known else None)
        known = one.head is not None and one.head[0] not in missing
        assert one.verdict == (before.verdict if known else "writes unknown")
        assert one.vit_writer == before.vit_writer

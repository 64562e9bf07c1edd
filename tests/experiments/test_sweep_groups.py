"""Sweeps with three groups against `ScaleKeys` on the sinks of `trace_sinks`, and against a gate."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope import detectors
from sinkscope.errors import CheckpointError, DetectorError, InputError
from sinkscope.experiments.sweep_grid import by_token
from sinkscope.experiments.sweep_images import edits_of
from sinkscope.experiments.sweep_result import MANIFEST
from sinkscope.testing import plant
from tests.conftest import FAMILIES
from tests.experiments.test_sweep import TEXT_FIRST, some, teacher_forced
from tests.keeping_cls import keeping_cls

TRIPLES = [(0.3, 1.6, 0.7), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.5, 1.2, 1.2)]
NONE = detectors.NoSinks()


class Top(detectors.Norm):
    """Flags the highest of the ViT tokens: V-sinks, of which merged tokens are made too."""

    def thresholds(self, result, scores):
        return scores.nanquantile(0.85, dim=-1)


class Mean(detectors.SinkDimensions):
    """Flags the tokens above the prompt's mean score: the text decides with."""

    def thresholds(self, result, scores):
        return scores.nanmean(dim=-1)


TOP, MEAN = Top("3sigma"), Mean((2, 7), 1.0)


def between(scores):
    """A limit about two thirds up, between two scores, so that rounding decides nothing."""
    ordered = scores.flatten().sort().values
    ordered = ordered[len(ordered) // 2 :]
    gaps = (ordered[1:] - ordered[:-1])[: len(ordered) // 2]
    at = int(gaps.argmax())
    return float((ordered[at] + ordered[at + 1]) / 2)


def channel_rule(lvlm, items):
    """Two channels of every layer's states, with a limit that some image tokens pass."""
    probe = ss.SinkDimensionScores([2, 7], site="resid_pre")
    found = []
    for item in items:
        sample = lvlm.prepare(images=item["image"], text=item["question"])
        scores = lvlm.run(sample, [probe])[probe].scores
        found.append(scores[:, :, sample.tokens.image[0] >= 0].flatten())
    return detectors.SinkDimensions((2, 7), between(torch.cat(found)))


RULES = {
    "of a token's own state": channel_rule,
    "of the whole prompt's states": lambda lvlm, items: MEAN,
    "of attention": lambda lvlm, items: detectors.Received(times_null=1.05, heads="mean"),
}


def masks_of(lvlm, item, low):
    """V-sinks ``[pos]`` and L-sinks by layer ``[layer pos]`` of a prompt, of `trace_sinks`."""
    sample = lvlm.prepare(images=item["image"], text=item["question"])
    trace = ss.trace_sinks(lvlm, sample, TOP, low)
    return trace.v_sinks[0], torch.stack([trace.l_sinks(b)[0] for b in range(trace.n_layers)])


def expected(lvlm, ready, v, low, block, triple):
    """Log-probability and greedy tokens of one answer, edited through nnsight."""
    sample, _, ids = ready
    missing = sample.tokens.ids.shape[1] - len(v)
    v, low = (torch.nn.functional.pad(mask, (0, missing))[None] for mask in (v, low))
    rest = (sample.tokens.image >= 0) & ~v & ~low
    edits = [
        ss.ScaleKeys(mask, factor, [block], allow_noop=True)
        for mask, factor in zip((v, low, rest), triple, strict=True)
    ]
    logits = lvlm.run(sample, interventions=edits).logits[0, -len(ids) :].float()
    logs = logits.log_softmax(-1)[torch.arange(len(ids)), ids]
    return float(logs.sum()), logits.argmax(-1).tolist() == ids


def check_equal(lvlm, items, made, low):
    ready = [teacher_forced(lvlm, item, TOP) for item in items]
    masks = [masks_of(lvlm, item, low) for item in items]
    for line in made.table.to_dict("records"):
        block, item = line["edited"], line["item"]
        v, by_layer = masks[item]
        triple = (line["s_v"], line["s_l"], line["s_rest"])
        logprob, right = expected(lvlm, ready[item], v, by_layer[block], block, triple)
        assert triple == made.pairs[line["pair"]]
        assert line["logprob"] == pytest.approx(logprob, abs=1e-4)
        assert line["score"] == float(right)
        image = int((ready[item][0].tokens.image >= 0).sum())
        n_v, n_l = int(v.sum()), int(by_layer[block].sum())
        assert (line["n_v"], line["n_l"], line["n_rest"]) == (n_v, n_l, image - n_v - n_l)
    return masks


CASES = [(family, "of a token's own state") for family in FAMILIES]
CASES += [(f, rule) for f in ("llava-clip-llama", "qwen2.5-vl") for rule in list(RULES)[1:]]


@pytest.mark.parametrize(("family", "rule"), CASES)
def test_equals_scale_keys(family, rule, tiny):
    lvlm, items = tiny(family), some()
    low = RULES[rule](lvlm, items)
    made = ss.sweep(lvlm, items, ["embed", 1], TRIPLES, v_detector=TOP, l_detector=low)
    assert len(made.table) == len(items) * 2 * len(TRIPLES)
    assert made.groups == ("V", "L", "rest")
    masks = check_equal(lvlm, items, made, low)
    assert made.table["n_l"].max() > 0
    assert made.table["n_rest"].max() > 0
    places = [low.nonzero().tolist() for _, low in masks[:3]]  # of three questions about one image
    same = [places[0] == other for other in places[1:]]
    if rule == "of a token's own state":
        assert all(same)
    elif family == "llava-clip-llama":
        assert not all(same), "the rule should depend on the question here"


def test_equals_scale_keys_where_nothing_is_shared(monkeypatch, tiny):
    lvlm, items = ss.LVLM(*ss.testing.tiny_llava()), some(1)
    monkeypatch.setattr(lvlm.processor, "chat_template", TEXT_FIRST)
    for low in (channel_rule(lvlm, items), MEAN):
        options = {"grid": TRIPLES, "v_detector": TOP, "l_detector": low}
        made = ss.sweep(lvlm, items, layers=["embed", 1], **options)
        assert made.notes == (
            "nothing was shared by the questions about 'im0': the prompts differ before the end of the "
            "last image",
        )
        check_equal(lvlm, items, made, low)


def test_options_of_a_question_share_its_l_sinks(tiny):
    lvlm, items = tiny("llava-siglip-qwen2"), some(choices=True)
    low = MEAN
    options = {"layers": [0], "v_detector": TOP, "l_detector": low}
    made = ss.sweep(lvlm, items, grid=TRIPLES, **options)
    assert made.score == "choice"
    check = ss.sweep(lvlm, items, grid=TRIPLES, score="exact", **options)
    np.testing.assert_allclose(made.table["logprob"], check.table["logprob"], atol=1e-5)
    check_equal(lvlm, items, check, low)


def test_finds_planted_l_sinks_by_layer():
    planted = plant(v_sinks=(9, 46), l_sinks=(20, 33), l_layer=1)
    lvlm, items = ss.LVLM(planted.model, planted.processor), some()
    rules = {
        "v_detector": detectors.SinkDimensions(planted.truth.v_dims, 5.0),
        "l_detector": detectors.SinkDimensions(planted.truth.l_dims, 5.0),
    }
    made = ss.sweep(lvlm, items, grid=[(1.0, 0.2, 1.0)], **rules).table
    assert set(made["n_v"]) == {2}
    found = made.groupby("edited")["n_l"].agg(set)
    assert all(found[block] == {0} for block in (0, 1))  # block 1 writes the spike
    assert all(found[block] == {2} for block in range(2, 6))
    moved = (made["logprob"] - made["base_logprob"]).abs()
    assert (moved[made["n_l"] == 0] == 0).all()
    assert moved[made["n_l"] > 0].max() > 1e-3


@pytest.mark.parametrize("layer", ["embed", 1])
def test_groups_are_those_of_a_gate(layer, tiny):
    """A gate's own coefficients, as the only triple, give what the gate gives."""
    lvlm, items = tiny("llava-clip-llama"), some()
    tau = between(vit_norms(lvlm, items))
    v, low = detectors.Norm(tau), channel_rule(lvlm, items)
    gate = ss.LSG.for_model(
        lvlm, layer, v_detector=v, l_detector=low, groups=("V", "L", "rest"), scale=2.0
    )
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        gate.outer.weight.normal_(generator=made)
        gate.outer.bias.normal_(generator=made)
    seen = set()
    for item in items:
        sample, _, ids = teacher_forced(lvlm, item, TOP)
        prompt = lvlm.prepare(images=item["image"], text=item["question"])
        effect = lvlm.run(prompt, interventions=[gate]).effects[gate]
        triple = tuple(effect.extra["coefficients"][0, 0].tolist())
        options = {"v_detector": v, "l_detector": low, "score": "logprob"}
        line = ss.sweep(lvlm, [item], [layer], [triple], **options).table.iloc[0]
        with gate.attach(lvlm.module), torch.no_grad():
            labels = torch.full_like(sample.inputs["input_ids"], -100)
            labels[:, prompt.tokens.ids.shape[1] :] = 0  # where the answer begins
            one = len(ids) == 1
            given = sample.inputs if one else {**sample.inputs, "labels": labels}
            logits = lvlm.module(**given).logits[0, -len(ids) :]
        logs = logits.log_softmax(-1)[torch.arange(len(ids)), ids]
        assert line["logprob"] == pytest.approx(float(logs.sum()), abs=1e-4)
        seen |= {line["n_v"] > 0, line["n_l"] > 0}
    assert True in seen


def vit_norms(lvlm, items):
    probe = ss.TokenNorms(lvlm.anatomy.feed_layers, "vision")
    found = []
    for item in items:
        norms = lvlm.run(lvlm.prepare(item["image"], item["question"]), [probe])[probe].norms
        found.append(norms.flatten())
    return torch.cat(found)


def rows_run(lvlm, work):
    """The rows that every decoder block ran, and how often the vision tower ran."""
    anatomy, rows, tower = lvlm.anatomy, [], []
    hooks = [
        lvlm.module.get_submodule(path).register_forward_hook(
            lambda m, args, out, i=i: rows.append((i, args[0].shape[0]))
        )
        for i, path in enumerate(anatomy.language.mlp)
    ]
    part = lvlm.module.get_submodule(anatomy.vision.mlp[0])
    hooks.append(part.register_forward_hook(lambda m, args, out: tower.append(1)))
    try:
        made = work()
    finally:
        for hook in hooks:
            hook.remove()
    return made, rows, len(tower)


def test_questions_with_the_same_l_sinks_share_and_others_do_not(tiny):
    lvlm, items = tiny("llava-clip-llama"), some(1)
    grid = [(0.3, 1.6, 0.7)]

    def go(low):
        options = {"layers": [1], "grid": grid, "v_detector": TOP, "l_detector": low}
        ss.sweep(lvlm, items, **options)
        return rows_run(lvlm, lambda: ss.sweep(lvlm, items, **options))

    _, rows, tower = go(channel_rule(lvlm, items))
    assert rows[-8:] == [(0, 1), (1, 1), (2, 1), (0, 3), (1, 3), (2, 3), (2, 1), (2, 3)]
    assert tower == 4  # as with pairs: what blocks read was kept
    made, rows, tower = go(MEAN)
    sets = made.table["n_l"].tolist()
    assert len(set(sets)) == 2, sets  # two questions agree, the third does not
    assert rows[-4:] in ([(2, 1), (2, 2), (2, 1), (2, 1)], [(2, 1), (2, 1), (2, 1), (2, 2)])
    assert tower == 4
    _, _, tower = go(detectors.Received(times_null=1.05, heads="mean"))
    assert tower == 4 + 3  # a pass of its own per question


def test_triples_that_do_the_same_are_one_edit():
    visual = torch.tensor([False, True, True, True])
    nothing = torch.zeros(4, dtype=torch.bool)
    low = torch.tensor([False, False, True, False])
    triples = [(0.2, 0.5, 0.5), (0.5, 0.5, 0.5), (0.9, 0.5, 1.0), (0.1, 1.0, 1.0)]
    edits, of_pair = edits_of(nothing, visual, triples, low)
    assert of_pair == [0, 0, 1, -1]
    assert edits.tolist() == [[1.0, 0.5, 0.5, 0.5], [1.0, 1.0, 0.5, 1.0]]


@pytest.mark.parametrize(
    ("rule", "alone"),
    [
        (detectors.SinkDimensions((2, 7), 2.0), False),
        (detectors.CosineToBOS(0.5), False),
        (detectors.Norm(3.0), False),
        (NONE, False),
        (detectors.Norm("valley"), True),
        (detectors.Massive(0.1, 3.0), True),
        (detectors.Received(0.1), True),
        (MEAN, True),
        (None, True),
    ],
)
def test_dry_run_counts_and_no_sweep_costs_more(rule, alone, tiny):
    lvlm, items = tiny("llava-clip-llama"), some()
    grid, layers = ss.lsg_grid(4, groups=3), 3
    options = {"grid": grid, "v_detector": NONE, "l_detector": rule}
    cost = ss.sweep(lvlm, items, dry_run=True, **options)
    cells = 4 * layers * len(grid)
    assert (cost.pairs, cost.groups, cost.forwards) == (10, 3, cells + 4)
    assert "3 layers x 10 triples and the base" in str(cost)
    # image 0: a beginning and three questions; image 1: one question; blocks 0, 1, 2 edited
    edited = (6 + 1) if alone else (4 + 1)
    assert cost.blocks == (4 + 1) * 3 + edited * 10 * (3 + 2 + 1)
    shared = ss.sweep(lvlm, items, dry_run=True, **{**options, "l_detector": NONE})
    assert (cost.bound < shared.bound) == alone
    if rule is None:
        return
    assert by_token(rule) != alone
    if type(rule) not in (detectors.SinkDimensions, Mean, detectors.Received):
        return  # counting passes of one rule that shares, one that does not, and one of attention
    _, rows, _ = rows_run(lvlm, lambda: ss.sweep(lvlm, items, **options))
    to_find = 3 * (2 + (len(items) if isinstance(rule, detectors.Received) else 0))  # and to check
    assert sum(n for _, n in rows) - to_find <= cost.blocks


def test_both_rules_are_calibrated_by_default_and_it_is_said(tiny):
    lvlm = tiny("llava-clip-llama")
    made = ss.sweep(lvlm, some(), layers=[0], grid=TRIPLES)
    assert [note.split(" by a rule")[0] for note in made.notes] == ["V-sinks", "L-sinks"]
    how = "calibrated on the first 2 images of the dataset, which show none"
    assert (made.settings["v_rule"], made.settings["l_rule"]) == (how, how)
    given = ss.sweep(lvlm, some(), layers=[0], grid=TRIPLES, v_detector=TOP)
    assert [note.split(" by a rule")[0] for note in given.notes] == ["L-sinks"]
    found = ss.calibrate(lvlm, [lvlm.prepare(images=some()[0]["image"], text="what")])
    taken = ss.sweep(lvlm, some(), layers=[0], grid=TRIPLES, calibration=found)
    assert not taken.notes
    assert taken.settings["l_rule"] == repr(found.l_detector)
    pairs = ss.sweep(lvlm, some(), layers=[0], grid=[(0.5, 0.5)], v_detector=TOP)
    assert "l_rule" not in pairs.settings
    assert not {"s_l", "n_l"} & set(pairs.table)


def test_wrong_uses_are_refused(tiny):
    lvlm, rule = tiny("llava-clip-llama"), detectors.Norm(3.0)
    with pytest.raises(InputError, match=r"a grid of pairs .*Write grid=ss.lsg_grid\(groups=3\)"):
        ss.sweep(lvlm, some(), l_detector=rule)
    found = ss.calibrate(lvlm, [lvlm.prepare(images=some()[0]["image"], text="what")])
    with pytest.raises(InputError, match="Got l_detector and calibration"):
        ss.sweep(lvlm, some(), grid=TRIPLES, l_detector=rule, calibration=found)
    with pytest.raises(DetectorError, match="Got 'Norm' as detector"):
        ss.sweep(lvlm, some(), grid=TRIPLES, l_detector="Norm")
    with pytest.raises(InputError, match="Got pairs and triples in one grid"):
        ss.sweep(lvlm, some(), grid=[(0.5, 0.5), (0.2, 0.2, 0.6)])
    with pytest.raises(InputError, match="without a pair other than the base"):
        ss.sweep(lvlm, some(), grid=[(1, 1, 1)])
    with pytest.raises(InputError, match=r"at layer 0, triple \(1e\+38, 1e\+38, 1e\+38\)"):
        ss.sweep(
            lvlm, some(), [0], [(1e38, 1e38, 1e38)], v_detector=TOP, l_detector=rule
        )  # fmt: skip
    for groups in (1, 4, True, "three"):
        with pytest.raises(InputError, match=r"Got groups=.*ss.lsg_grid\(steps=11, groups=3\)"):
            ss.lsg_grid(groups=groups)


def test_the_grid_of_triples_is_the_whole_simplex():
    grid = ss.lsg_grid(groups=3)
    assert len(grid) == len(set(grid)) == 66
    assert all(sum(triple) == pytest.approx(1.0) for triple in grid)
    assert {tuple(10 * x for x in triple) for triple in grid} == {
        (v, low, 10 - v - low) for v in range(11) for low in range(11 - v)
    }
    assert ss.lsg_grid(2, groups=3) == [(0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)]
    edge = [(v, rest) for v, low, rest in grid if low == 0]
    assert edge == ss.lsg_grid()


@pytest.fixture
def small(tiny, tmp_path):
    lvlm, folder = tiny("llava-clip-llama"), tmp_path / "out"

    def make(low=2.0, grid=((0.2, 0.2, 0.6), (0.5, 0.0, 0.5))):
        rule = {"l_detector": detectors.SinkDimensions((2, 7), low)} if len(grid[0]) == 3 else {}
        options = {"layers": [0, 1], "grid": grid, "out": folder, "v_detector": TOP, **rule}
        return ss.sweep(lvlm, some(3), **options)

    make.folder = folder
    return make


def test_a_folder_goes_on_and_equals_memory(small, tiny):
    first = small()
    (small.folder / "part-000001.parquet").unlink()
    assert "not finished: 2 of 3 images" in ss.experiments.Sweep.load(small.folder).notes
    again = small()
    pd.testing.assert_frame_equal(first.table, again.table, check_exact=True)
    rule = detectors.SinkDimensions((2, 7), 2.0)
    options = {"v_detector": TOP, "l_detector": rule}
    kept = ss.sweep(tiny("llava-clip-llama"), some(3), [0, 1], first.pairs, **options)
    pd.testing.assert_frame_equal(first.table, kept.table, check_exact=True)
    assert kept.settings == first.settings
    assert first.settings["format"] == 3
    assert list(first.table)[6:9] == ["s_v", "s_l", "s_rest"]
    assert list(first.table)[-3:] == ["n_v", "n_l", "n_rest"]


def test_another_rule_or_grid_is_refused(small):
    small()
    with pytest.raises(InputError, match=r"l_rule: there .*tau=2.0, .*tau=2.5"):
        small(low=2.5)
    with pytest.raises(InputError, match=r"format: there 3, here 2\n.*grid: there"):
        small(grid=((0.5, 0.5),))


def test_a_folder_of_another_format_is_refused(small):
    small(grid=((0.5, 0.5),))
    path = small.folder / MANIFEST
    assert '"format": 2' in path.read_text()  # folders of pairs go on as they were
    older = json.loads(path.read_text()) | {"format": 1}
    del older["sha256"]  # which came later
    path.write_text(json.dumps(older))
    with pytest.raises(CheckpointError, match=r"a sweep of format 1, .* expected one of \[2, 3\]"):
        ss.experiments.Sweep.load(small.folder)
    with pytest.raises(InputError, match="format: there 1, here 2"):
        small(grid=((0.5, 0.5),))


def test_cls_as_the_only_v_sink():
    """Where the projector keeps CLS, V-sinks by name and L-sinks by state are told apart."""
    lvlm, items = keeping_cls(), some(1)
    low = channel_rule(lvlm, items)
    rules = {"v_detector": detectors.VisionTokens("cls"), "l_detector": low}
    made = ss.sweep(lvlm, items, layers=[1], grid=TRIPLES, **rules).table
    assert set(made["n_v"]) == {1}
    trace = ss.trace_sinks(
        lvlm, lvlm.prepare(items[0]["image"], items[0]["question"]), *rules.values()
    )
    assert set(made.loc[made["item"] == 0, "n_l"]) == {int(trace.l_sinks(2).sum())}

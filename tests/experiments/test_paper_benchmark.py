"""What the benchmark of the paper counts: which patches are the most attended, and which rows are kept."""

from argparse import Namespace

import pandas as pd
import pytest
import torch

import sinkscope as ss
from benchmarks.paper.effects import TopPatches, first_right, masked, masked_random
from benchmarks.paper.gates import GATE, TRAINED, paired
from benchmarks.paper.setting import Clock, Kept
from sinkscope.experiments import Comparison
from sinkscope.testing import random_image
from tests.keeping_cls import cls_of, keeping_cls

QUESTIONS = [{"image_id": i, "question": str(j)} for i in range(5) for j in range(2)]


@pytest.fixture(scope="module")
def lvlm():
    return keeping_cls()


@pytest.fixture(scope="module")
def trace(lvlm):
    sample = lvlm.prepare([random_image(64, 64, i) for i in range(2)], ["what?", "what is it?"])
    rule = ss.detectors.Received(eps=0.9, heads="mean")
    return ss.trace_sinks(lvlm, sample, rule, ss.detectors.NoSinks())


def test_the_most_attended_patches_are_those_of_eager_attention(lvlm, trace):
    (feed,) = lvlm.anatomy.feed_layers
    found = TopPatches(feed, 3)(trace)
    tower = lvlm.module.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        seen = tower(trace.sample.inputs["pixel_values"], output_attentions=True).attentions[feed]
    tower.set_attn_implementation("sdpa")
    received = seen.mean(dim=(1, 2))[:, 1:]  # over heads and queries, patches only
    for row in range(2):
        at_cls = int(cls_of(trace.sample)[row].nonzero())
        expected = received[row].topk(3).indices + at_cls + 1
        assert found[row].nonzero().flatten().tolist() == sorted(expected.tolist())


def test_random_tokens_are_as_many_and_of_the_same_kind(lvlm, trace):
    top = TopPatches(lvlm.anatomy.feed_layers[-1], 3)
    (real,), (drawn,) = masked(top)(trace), masked_random(top)(trace)
    assert drawn.tokens.sum(dim=1).tolist() == [3, 3]
    assert not (drawn.tokens & real.tokens).any()
    assert (trace.sample.tokens.image[drawn.tokens] >= 0).all()
    first = torch.zeros_like(real.tokens)
    first[torch.arange(2), trace.sample.tokens.first] = True
    (one,) = masked_random(lambda trace: first)(trace)
    assert one.tokens.sum(dim=1).tolist() == [1, 1]
    assert (trace.sample.tokens.image[one.tokens] < 0).all()


def test_an_answer_of_two_tokens_is_never_right_by_its_first():
    class Pieces:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [text[:3], text[3:]] if len(text) > 6 else [text]}

        def decode(self, token):
            return token

    assert first_right(Pieces(), "square", "square")
    assert not first_right(Pieces(), "circle", "square")
    assert not first_right(Pieces(), "triangle", "triangle")


def kept(folder, seconds=60.0):
    return Kept(folder, lvlm=None, clock=Clock.of(seconds))


def rows(records):
    return pd.DataFrame([{"item": i, **record} for i, record in enumerate(records)])


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(Kept, "beat", lambda self, shares: None)


def test_processes_that_share_images_give_every_row_once(tmp_path, quiet):
    asked = []

    def work(records):
        asked.append([record["image_id"] for record in records])
        return rows(records)

    for share in ([1, 2], [0, 2], [0, 1]):  # the last finds nothing left to do
        kept(tmp_path).run(QUESTIONS, Namespace(chunk=2, share=share), work)
    assert asked == [[2, 2, 3, 3], [0, 0, 1, 1], [4, 4]]
    table = kept(tmp_path).rows()
    assert table["item"].tolist() == list(range(10))
    assert table["image_id"].tolist() == [str(q["image_id"]) for q in QUESTIONS]


def test_it_stops_when_another_group_would_take_too_long(tmp_path, quiet, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("benchmarks.paper.setting.time.monotonic", lambda: now[0])

    def work(records):
        now[0] += 10.0
        return rows(records)

    kept(tmp_path, 25.0).run(QUESTIONS, Namespace(chunk=1, share=[0, 1]), work)
    assert kept(tmp_path).rows()["image_id"].tolist() == ["0", "0", "1", "1"]


def test_rows_of_other_settings_are_refused(tmp_path):
    Kept.open(tmp_path, {"noise": 25.0}, None, Clock.of(1.0))
    Kept.open(tmp_path, {"noise": 25.0}, None, Clock.of(1.0))
    with pytest.raises(SystemExit, match="other settings"):
        Kept.open(tmp_path, {"noise": 40.0}, None, Clock.of(1.0))


def test_a_gate_and_its_control_are_paired_by_question_and_seed():
    lines = [
        {"item": i, "image_id": str(i), "task": "count", "condition": name, "seed": seed}
        | {"correct": bool(right[i])}
        for name, seed, right in (
            (GATE, 0, [1, 1, 1, 0]),
            (GATE, 1, [1, 1, 1, 1]),
            (TRAINED, 1, [0, 1, 1, 1]),  # seeds in another order
            (TRAINED, 0, [1, 1, 0, 0]),
        )
        for i in range(4)
    ]
    table = paired(Comparison(pd.DataFrame(lines), "base"))
    assert table["task"].tolist() == ["count", "all"]
    assert table["delta"].tolist() == [0.25, 0.25]  # 2 of 8 pairs
    assert table["n"].tolist() == [8, 8]

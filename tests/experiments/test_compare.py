"""Comparisons: paired, per task, with intervals that resample images."""

import math

import numpy as np
import pandas as pd
import pytest

import sinkscope as ss
from sinkscope import detectors
from sinkscope.experiments import Comparison, Item, cluster_bootstrap
from sinkscope.testing import plant, random_image


def test_bootstrap_resamples_clusters_not_questions():
    """Two images of a hundred equal answers each hold two observations, not two hundred."""
    values = [1.0] * 100 + [0.0] * 100
    clusters = ["a"] * 100 + ["b"] * 100
    mean, low, high = cluster_bootstrap(values, clusters)
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    spread = cluster_bootstrap(values, range(200))
    assert spread[2] - spread[1] < 0.2


def test_bootstrap_interval_covers_the_mean():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        values = rng.normal(1.0, 1.0, size=40)
        _, low, high = cluster_bootstrap(values, range(40), draws=400, seed=seed)
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_edge_cases():
    assert all(math.isnan(v) for v in cluster_bootstrap([], []))
    mean, low, high = cluster_bootstrap([1.0, 0.0, float("nan")], ["a", "a", "b"])
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)


def test_summary_by_hand():
    rows = [
        (i, f"image {i // 2}", "count", c, correct)
        for i in range(4)
        for c, correct in (("base", i < 2), ("edit", i == 0))
    ]
    table = pd.DataFrame(rows, columns=["item", "image_id", "task", "condition", "correct"])
    summary = Comparison(table.assign(touched=True), "base").summary().set_index("condition")
    assert summary.loc["base", "accuracy"] == 0.5
    assert summary.loc["edit", "accuracy"] == 0.25
    assert summary.loc["base", "delta"] == 0.0
    assert summary.loc["edit", "delta"] == -0.25
    assert summary.loc["edit", "n"] == 4
    assert summary.loc["edit", "images"] == 2


@pytest.fixture(scope="module")
def planted():
    made = plant("clip", v_sinks=(9,), l_sinks=(20,))
    lvlm = ss.LVLM(made.model, made.processor, verify=False)
    rules = {
        "v_detector": detectors.Norm("valley"),
        "l_detector": detectors.SinkDimensions((41, 101), 3.0),
    }
    return lvlm, rules


def dataset(n):
    return [
        {
            "image": random_image(64, 64, i // 2),
            "question": "how many red shapes",
            "answer": a,
            "task": t,
            "image_id": i // 2,
        }
        for i, (a, t) in enumerate([("red", "count"), ("blue", "colour")] * n)
    ]


def test_conditions_are_answered_on_the_same_questions(planted):
    lvlm, rules = planted
    conditions = {
        "base": [],
        "mask V": lambda trace: [ss.MaskKeys(trace.v_sinks)],
        "mask nothing": [ss.ScaleKeys("image", 1.0)],
    }
    got = ss.compare(lvlm, dataset(3), conditions, **rules)
    table = got.table
    assert len(table) == 6 * 3
    assert table.groupby("condition")["touched"].mean().to_dict() == {
        "base": 0.0,
        "mask V": 1.0,
        "mask nothing": 0.0,
    }
    by = table.pivot(index="item", columns="condition", values="given")
    assert (by["base"] == by["mask nothing"]).all()
    one = dataset(3)[0]
    sample = lvlm.prepare(images=one["image"], text=one["question"])
    length = len(lvlm.tokenizer("red", add_special_tokens=False)["input_ids"])
    alone = lvlm.generate(sample, max_new_tokens=length).text[0]
    assert by.loc[0, "base"].startswith(alone)
    summary = got.summary(draws=50)
    assert set(summary["task"]) == {"count", "colour", "all"}


@pytest.mark.parametrize(
    ("data", "conditions", "message"),
    [
        ([], {"base": []}, "empty dataset"),
        ([{"image": 1}], {"base": []}, "expected image, question, answer"),
        ([3], {"base": []}, "expected a dict or an Item"),
        ([Item("x.png", "q", "a")], {}, "expected a dict such as"),
        ([Item("x.png", "q", "a")], [[]], "expected a dict such as"),
        ([Item("x.png", "q", "a")], {"base": []}, "does not exist"),
    ],
)
def test_malformed_comparisons_are_refused(planted, data, conditions, message):
    lvlm, rules = planted
    with pytest.raises(ss.SinkscopeError, match=message):
        ss.compare(lvlm, data, conditions, **rules)

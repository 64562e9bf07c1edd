"""Classifiers, baselines and nulls on numbers whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sinkscope.data.items import Target
from sinkscope.experiments.pooling import (
    Cell,
    Options,
    correctness,
    judge,
    majority,
    shuffled,
)

OPTIONS = Options(c=1.0, permutations=20, level=0.95, draws=200, seed=0)


def made(seed, n=120, signal=0.0, records=1):
    """A cell of noise in which ``signal`` times the label stands in one channel, and its split."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.integers(0, 3, size=n), records)
    states = np.repeat(rng.normal(size=(n, 6)), records, axis=0)
    states[:, 2] += signal * labels
    images = np.repeat(np.array([f"image {i}" for i in range(n)]), records)
    train = np.arange(n * records) < n * records * 2 // 3
    target = Target("t", False, (0, 1, 2), labels)
    count = np.ones(n * records, dtype=int)
    return Cell(0, "g", [states], count), target, (train, images)


def judged(*case, **kwargs):
    cell, target, split = made(*case, **kwargs)
    (line,), _ = judge(cell, [target], *split, OPTIONS)
    return line


def test_a_planted_direction_is_read() -> None:
    line = judged(0, signal=20.0)
    assert (line["accuracy"], line["low"], line["high"]) == (1.0, 1.0, 1.0)
    assert line["null_high"] < 0.6
    assert (line["n_train"], line["n_test"], line["note"]) == (80, 40, "")


def test_noise_stays_within_the_null() -> None:
    """By chance about one cell of noise in 21 exceeds the highest of 20 nulls."""
    above = sum(line["accuracy"] > line["null_high"] for line in map(judged, range(40)))
    assert above <= 5


def test_the_null_of_several_draws_is_as_wide_as_their_mean() -> None:
    """Accuracy and null are exchangeable in noise, so over many cells their variances agree.

    The 99.9 % quantile of their ratio is 2 for 80 cells. A null of single draws has 3.6: then hardly
    any mean over draws would exceed it.
    """
    found = []
    for seed in range(80):
        rng = np.random.default_rng(seed)
        cell, target, split = made(seed, n=60)
        cell = Cell(0, "g", [rng.normal(size=(60, 6)) for _ in range(5)], cell.count)
        (line,), _ = judge(cell, [target], *split, replace(OPTIONS, permutations=1, draws=1))
        found.append((line["accuracy"], line["null"]))
    accuracy, null = np.var(found, axis=0)
    assert 1 / 2 < null / accuracy < 2
    assert np.mean(found, axis=0) == pytest.approx([1 / 3, 1 / 3], abs=0.03)


def test_the_null_of_several_draws_is_their_mean_on_the_same_labels() -> None:
    cell, target, split = made(1)
    rng = np.random.default_rng(1)
    draws = [rng.normal(size=(120, 6)) for _ in range(3)]
    options = replace(OPTIONS, permutations=1)
    nulls = []
    for states in (*([x] for x in draws), draws):
        (line,), _ = judge(Cell(0, "g", states, cell.count), [target], *split, options)
        nulls.append(line["null"])
    assert nulls[3] == pytest.approx(np.mean(nulls[:3]))
    assert len(set(nulls[:3])) > 1


def test_two_clear_clusters_are_not_named_right_by_luck() -> None:
    """Labels of training images alone, shuffled, would give a null of 1 in one trial of four."""
    cell, target, split = made(0)
    labels = target.labels % 2
    clusters = [100.0 * labels[:, None] + np.zeros((1, 6))]
    cell = Cell(0, "g", clusters, cell.count)
    (line,), _ = judge(cell, [Target("t", False, (0, 1), labels)], *split, OPTIONS)
    assert line["accuracy"] == 1
    assert line["null_high"] < 0.8


def test_repeated_records_of_an_image_do_not_narrow_the_null() -> None:
    """Copies teach nothing: with labels dealt out by image, the null is as wide as without them."""
    single = [judged(seed, n=60) for seed in range(12)]
    copies = [judged(seed, n=60, records=4) for seed in range(12)]
    spread = [np.mean([x["null_high"] - x["null"] for x in lines]) for lines in (single, copies)]
    assert spread[1] > 0.6 * spread[0]


def test_shuffled_labels_go_to_other_images_as_blocks() -> None:
    images = np.array(["a", "a", "b", "b", "c"])
    labels = np.array([0, 0, 1, 1, 2])
    seen = set()
    for seed in range(50):
        out = shuffled(labels, images, np.random.default_rng(seed))
        assert out[0] == out[1]
        assert out[2] == out[3]
        seen.add((out[0], out[2], out[4]))
    assert len(seen) == 6  # every order of three images


def test_correctness_and_majority_by_hand() -> None:
    truth = np.array([[1, 0, 1], [0, 0, 1]], dtype=bool)
    predicted = np.array([[1, 1, 1], [0, 0, 1]], dtype=bool)
    got = correctness(predicted, truth)
    assert got["label accuracy"] == pytest.approx([2 / 3, 1.0])
    assert got["exact set"].tolist() == [0.0, 1.0]
    train = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0]], dtype=bool)
    test = np.array([[1, 1, 0], [1, 0, 1]], dtype=bool)
    common = majority(train, test)  # by label 1 0 0, by set 1 1 0
    assert common["label accuracy"] == pytest.approx(4 / 6)
    assert common["exact set"] == 0.5
    assert majority(np.array([2, 0, 2]), np.array([2, 1])) == {"accuracy": 0.5}


def test_the_most_frequent_class_is_that_of_the_training_rows() -> None:
    cell, target, split = made(0)
    labels = np.where(split[0], 0, 1)
    labels[:10], labels[-10:] = 1, 0  # 70 of 80 train on 0, 30 of 40 are tested on 1
    (line,), _ = judge(cell, [replace(target, labels=labels)], *split, OPTIONS)
    assert line["majority"] == 10 / 40


def test_a_label_that_no_training_image_has_is_predicted_absent() -> None:
    cell, target, split = made(0, signal=20.0)
    labels = np.stack([target.labels == 0, ~split[0]], axis=1)
    lines, rows = judge(cell, [Target("m", True, ("x", "y"), labels)], *split, OPTIONS)
    by = {line["metric"]: line["accuracy"] for line in lines}
    assert by["exact set"] == 0  # y holds for every test image and for no training image
    assert by["label accuracy"] == pytest.approx(0.5)
    assert [len(row["correct"]) for row in rows] == [40, 40]

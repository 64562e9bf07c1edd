"""Intervals that resample images and seeds, against draws that are counted by hand."""

import itertools
import math

import numpy as np
import pytest

from sinkscope.experiments import cluster_bootstrap


def test_bootstrap_resamples_clusters_not_questions():
    """Two images of a hundred equal answers each hold two observations, not two hundred."""
    values = [1.0] * 100 + [0.0] * 100
    clusters = ["a"] * 100 + ["b"] * 100
    mean, low, high = cluster_bootstrap(values, clusters)
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    spread = cluster_bootstrap(values, range(200))
    assert spread[2] - spread[1] < 0.2


def test_bootstrap_edge_cases():
    assert all(math.isnan(v) for v in cluster_bootstrap([], []))
    mean, low, high = cluster_bootstrap([1.0, 0.0, float("nan")], ["a", "a", "b"])
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)


def test_bootstrap_of_images_and_seeds_by_hand():
    """Two images under two seeds: all 4 x 4 draws are equally likely, and each gives one mean."""
    values = np.array([[0.0, 1.0], [2.0, 7.0]])  # [seed image]
    pairs = list(itertools.product(range(2), repeat=2))
    means = [values[np.ix_(s, i)].mean() for s in pairs for i in pairs]
    order = sorted(means)
    args = values.flatten(), ["a", "b"] * 2, [0, 0, 1, 1]
    mean, low, high = cluster_bootstrap(*args, level=0.5, draws=40000)
    assert mean == 2.5
    assert low == pytest.approx(np.quantile(means, 0.25), abs=1e-9)
    assert high == pytest.approx(np.quantile(means, 0.75), abs=1e-9)
    _, lowest, highest = cluster_bootstrap(*args, level=1 - 1e-6, draws=4000)
    assert (lowest, highest) == pytest.approx((order[0], order[-1]))


def test_bootstrap_variance_of_images_and_seeds():
    """Additive effects: the variance of the mean is that of images over their number plus seeds'."""
    rng = np.random.default_rng(0)
    images, seeds = rng.normal(0, 1, 40), rng.normal(0, 2, 5)
    values = images[None] + seeds[:, None]
    names = np.tile(np.arange(40), 5), np.repeat(np.arange(5), 40)
    _, low, high = cluster_bootstrap(values.flatten(), *names, draws=20000)
    spread = math.sqrt(images.var() / 40 + seeds.var() / 5)
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.05)
    _, low, high = cluster_bootstrap(values[0], np.arange(40), draws=20000)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(images.var() / 40), rel=0.05)


def test_one_seed_is_the_bootstrap_of_images():
    rng = np.random.default_rng(1)
    values, images = rng.normal(size=60), np.arange(60) // 3
    totals, counts = np.bincount(images, values), np.bincount(images)
    picks = np.random.default_rng(0).integers(0, 20, size=(2000, 20))
    means = totals[picks].sum(1) / counts[picks].sum(1)
    names = [f"{image:02d}" for image in images]
    _, low, high = cluster_bootstrap(values, names, [7] * 60)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))

"""Intervals that respect that questions about one image are not independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cluster_bootstrap(
    values: Sequence[float],
    clusters: Sequence[object],
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean and percentile interval, resampling whole clusters with replacement.

    Args:
        values: One number per observation; NaN are left out.
        clusters: The cluster (image) of every observation.
        level: Coverage.
        draws: Bootstrap samples.
        seed: Of the draws.

    Returns:
        Mean, low and high; NaN if there is no value. With one cluster there is nothing to resample,
        and the interval is NaN.
    """
    numbers = np.asarray(values, dtype=float)
    keep = ~np.isnan(numbers)
    numbers, names = numbers[keep], np.asarray([str(c) for c in clusters])[keep]
    if not len(numbers):
        return float("nan"), float("nan"), float("nan")
    _, index = np.unique(names, return_inverse=True)
    n = index.max() + 1
    totals = np.bincount(index, weights=numbers, minlength=n)
    counts = np.bincount(index, minlength=n)
    if n < 2:
        return float(numbers.mean()), float("nan"), float("nan")
    picks = np.random.default_rng(seed).integers(0, n, size=(draws, n))
    means = totals[picks].sum(1) / counts[picks].sum(1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(numbers.mean()), float(low), float(high)

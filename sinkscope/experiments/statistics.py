"""Intervals that respect that questions about one image, and runs of one seed, are not independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sinkscope.models.pictures import clusters_of


def cluster_bootstrap(
    values: Sequence[float],
    clusters: Sequence[object],
    seeds: Sequence[object] | None = None,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean and percentile interval, resampling whole clusters, and whole seeds, with replacement.

    Two factors are crossed: every image is answered under every seed. Each draw resamples images and,
    independently, seeds, and an observation counts as often as both of its own were drawn (the
    pigeonhole bootstrap, Owen 2007). With one seed this is the bootstrap of clusters.

    It does not invent seeds: of ``S`` it sees a share ``(S - 1) / S`` of their variance, a third
    too little with three, and the interaction of images and seeds counts a little too much.

    Args:
        values: One number per observation; NaN are left out.
        clusters: The image id of every observation; those that share an image are one cluster.
        seeds: The seed of every observation; None for one.
        level: Coverage.
        draws: Bootstrap samples.
        seed: Of the draws.

    Returns:
        Mean, low and high; NaN if there is no value. With one cluster there is nothing to resample,
        and the interval is NaN.
    """
    numbers = np.asarray(values, dtype=float)
    keep = ~np.isnan(numbers)
    numbers = numbers[keep]
    if not len(numbers):
        return float("nan"), float("nan"), float("nan")
    image, images = _indexed(clusters_of(clusters), keep)
    run, runs = _indexed([0] * len(keep) if seeds is None else seeds, keep)
    if images < 2:
        return float(numbers.mean()), float("nan"), float("nan")
    totals, counts = np.zeros((2, runs, images))
    np.add.at(totals, (run, image), numbers)
    np.add.at(counts, (run, image), 1.0)
    rng = np.random.default_rng(seed)
    of_images = _times(rng, images, draws)
    of_runs = _times(rng, runs, draws)
    drawn = np.einsum("di,dr,ri->d", of_images, of_runs, counts, optimize=True)
    sums = np.einsum("di,dr,ri->d", of_images, of_runs, totals, optimize=True)
    means = sums[drawn > 0] / drawn[drawn > 0]
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(numbers.mean()), float(low), float(high)


def _indexed(names: Sequence[object], keep: np.ndarray) -> tuple[np.ndarray, int]:
    """Names as numbers from 0, and how many there are."""
    kept = np.asarray([str(name) for name in names])[keep]
    unique, index = np.unique(kept, return_inverse=True)
    return index, len(unique)


def _times(rng: np.random.Generator, n: int, draws: int) -> np.ndarray:
    """How often each of ``n`` is drawn when ``n`` are drawn with replacement, ``[draws n]``."""
    picks = rng.integers(0, n, size=(draws, n))
    out = np.zeros((draws, n))
    np.add.at(out, (np.arange(draws)[:, None], picks), 1.0)
    return out


def cluster_intervals(
    values: np.ndarray,
    clusters: Sequence[object],
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """`cluster_bootstrap` of many columns at once, with the same draws for all of them.

    Args:
        values: ``[observation column]``, no NaN.
        clusters: The cluster (image) of every observation.
        level: Coverage.
        draws: Bootstrap samples.
        seed: Of the draws.

    Returns:
        ``[3 column]``: mean, low and high; the last two are NaN with one cluster.
    """
    totals, counts = cluster_sums(values, clusters)
    n = len(counts)
    mean = values.mean(axis=0)
    if n < 2:
        return np.stack([mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)])
    picks = np.random.default_rng(seed).integers(0, n, size=(draws, n))
    weights = np.stack([np.bincount(pick, minlength=n) for pick in picks]).astype(float)
    means = (weights @ totals) / (weights @ counts)[:, None]
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return np.stack([mean, low, high])


def cluster_sums(values: np.ndarray, clusters: Sequence[object]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of every column per cluster ``[cluster column]``, and observations per cluster."""
    _, index = np.unique(np.asarray(clusters_of(clusters)), return_inverse=True)
    totals = np.zeros((int(index.max()) + 1, values.shape[1]))
    np.add.at(totals, index, values)
    return totals, np.bincount(index).astype(float)


def sign_flip_maximum(
    values: np.ndarray, clusters: Sequence[object], *, draws: int = 2000, seed: int = 0
) -> tuple[float, np.ndarray]:
    """The largest studentised column sum, and what it would be if nothing had an effect.

    ::

        T = sum of the clusters' sums / root of the sum of their squares

    Under the null an image's changes are as likely to have the opposite sign. So the sign of every
    cluster is drawn anew, the same for all columns, which keeps how they hang together, and the
    largest T is taken again. What this gives is the null of a maximum over all columns, and needs
    no other correction for their number.

    Every column has its own spread, so that a column of large losses, whose mirror image would be a
    large gain, does not hide a small and certain one. The root does not change with the signs, which
    keeps the test exact, and it orders columns and draws as Student's t of the clusters' sums does:
    of n clusters, ``t = T sqrt((n - 1) / (n - T^2))``. T is at most ``sqrt(n)``, about normal with
    variance 1 under the null, and 0 for a column without any change.

    Args:
        values: Changes, ``[observation column]``.
        clusters: The cluster (image) of every observation.
        draws: How often signs are drawn.
        seed: Of the draws.

    Returns:
        The largest T, and ``[draw]`` largest T under the null.
    """
    totals, counts = cluster_sums(values, clusters)
    size = np.sqrt((totals**2).sum(axis=0))
    unit = np.divide(totals, size, out=np.zeros_like(totals), where=size > 0)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, len(counts)))
    return float(unit.sum(axis=0).max()), (signs @ unit).max(axis=1)

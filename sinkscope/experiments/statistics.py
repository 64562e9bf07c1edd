"""Intervals and tests for questions that share images, and for runs that share seeds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sinkscope.checks import check_choice, check_number, check_whole, typed
from sinkscope.data.items import ALL
from sinkscope.errors import InputError
from sinkscope.models.pictures import clusters_of

BY = ("task", ALL)
BLOCK = 2**23  # how many weights of clusters are drawn at once


def by_task(table: pd.DataFrame, by: str) -> Iterator[tuple[str, Any]]:
    """The table by task, and whole at the end if there are several; ``"all"`` whole only."""
    check_choice(BY, by=by)
    if by == "task" and table["task"].nunique() > 1:
        for name, part in table.groupby("task", sort=True):
            yield str(name), part
    yield ALL, table


@typed
def cluster_bootstrap(
    values: Sequence[float],
    clusters: Sequence[object],
    seeds: Sequence[object] | None = None,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Estimate a mean and its percentile interval, resampling whole clusters, and whole seeds.

    Images and seeds are drawn independently with replacement; an observation counts as often as both of its
    own were (the pigeonhole bootstrap, Owen 2007). Of ``S`` seeds it sees a share ``(S - 1) / S`` of their
    variance, and the interaction of images and seeds counts a little too much.

    ``values`` has one number per observation, NaN are left out; ``clusters`` are image ids. Gives mean, low
    and high: NaN without a value, the interval also with one cluster.
    """
    _check(level, draws, seed, values, clusters)
    numbers, nan = np.asarray(values, dtype=float), float("nan")
    keep = ~np.isnan(numbers)
    numbers = numbers[keep]
    if not len(numbers):
        return nan, nan, nan
    names = clusters_of(clusters), [0] * len(keep) if seeds is None else seeds
    image, run = (np.unique(np.array([*map(str, x)])[keep], return_inverse=True)[1] for x in names)
    images, runs = int(image.max()) + 1, int(run.max()) + 1
    if images < 2:
        return float(numbers.mean()), nan, nan
    totals, counts = np.zeros((2, runs, images))
    np.add.at(totals, (run, image), numbers)
    np.add.at(counts, (run, image), 1.0)
    rng = np.random.default_rng(seed)
    times = _times(rng, images, draws), _times(rng, runs, draws)
    drawn, sums = (np.einsum("di,dr,ri->d", *times, x, optimize=True) for x in (counts, totals))
    low, high = _central(sums[drawn > 0] / drawn[drawn > 0], level)
    return float(numbers.mean()), float(low), float(high)


def _check(level: float, draws: int, seed: int, values: Any, clusters: Any) -> None:
    for name, given in {"values": values, "clusters": clusters}.items():
        if isinstance(given, (str, Mapping)) or not hasattr(given, "__len__"):
            raise InputError(
                f"Got {name} of type {type(given).__name__}; expected a list or array."
            )
    if any(isinstance(value, str) for value in values):
        raise InputError(f"Got values={repr(values)[:60]}; expected numbers, one per observation.")
    if len(values) != len(clusters):
        raise InputError(
            f"Got {len(values)} values and {len(clusters)} clusters; expected one cluster per observation."
        )
    check_number(above=0, below=1, hint="Write 0.95.", level=level)
    check_whole(1, 10**6, hint="Write 2000.", draws=draws)
    check_whole(0, seed=seed)


def _times(rng: np.random.Generator, n: int, draws: int) -> np.ndarray:
    """How often each of ``n`` is drawn with replacement, ``[draws n]``."""
    picks = rng.integers(0, n, size=(draws, n))
    return np.stack([np.bincount(pick, minlength=n) for pick in picks]).astype(float)


def _central(means: np.ndarray, level: float) -> Any:
    tail = (1 - level) / 2
    return np.nanquantile(means, [tail, 1 - tail], axis=0)


@typed
def cluster_intervals(
    values: np.ndarray,
    clusters: Sequence[object],
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    over: np.ndarray | None = None,
) -> np.ndarray:
    """Do `cluster_bootstrap` for columns ``[observation column]`` without NaN, with the same draws for all.

    Gives ``[3 column]``: mean, low and high. With ``over``, as large as the values, it is the sum of the
    values over the sum of these instead of the mean; NaN where that is 0.
    """
    _check(level, draws, seed, values, clusters)
    totals, counts = cluster_sums(values, clusters)
    parts = counts[:, None] if over is None else cluster_sums(over, clusters)[0]
    mean = values.mean(axis=0) if over is None else _ratio(totals.sum(axis=0), parts.sum(axis=0))
    if len(counts) < 2:
        return np.stack([mean, *np.full((2, len(mean)), np.nan)])
    rng, step, found = np.random.default_rng(seed), max(1, BLOCK // len(counts)), []
    for at in range(0, draws, step):  # a few draws at a time: of many images they are large
        weights = _times(rng, len(counts), min(step, draws - at))
        found.append(_ratio(weights @ totals, weights @ parts))
    drawn = np.concatenate(found)
    drawn[:, nothing := np.isnan(drawn).all(axis=0)] = 0.0
    low, high = np.where(nothing, np.nan, _central(drawn, level))
    return np.stack([mean, low, high])


def _ratio(totals: np.ndarray, parts: np.ndarray) -> np.ndarray:
    parts = np.broadcast_to(parts, totals.shape)
    return np.divide(totals, parts, out=np.full(totals.shape, np.nan), where=parts != 0)


def cluster_sums(values: np.ndarray, clusters: Sequence[object]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of every column per cluster ``[cluster column]``, and observations per cluster."""
    _, index = np.unique(np.asarray(clusters_of(clusters)), return_inverse=True)
    totals = np.zeros((int(index.max()) + 1, values.shape[1]))
    np.add.at(totals, index, values)
    return totals, np.bincount(index).astype(float)


@typed
def sign_flip_maximum(
    values: np.ndarray, clusters: Sequence[object], *, draws: int = 2000, seed: int = 0
) -> tuple[float, np.ndarray]:
    """Find the largest studentised column sum T, and its null when no column has an effect.

    From changes ``[observation column]`` gives T, and ``[draw]`` largest T under the null. T is the sum of
    the clusters' sums over the root of the sum of their squares. Each draw flips the signs of random
    clusters, the same for all columns, which keeps their correlation, and takes the largest T again: an
    exact null of the maximum, which needs no correction for the number of columns. T orders as Student's t
    of the ``n`` clusters' sums, ``t = T sqrt((n - 1) / (n - T^2))``; it is at most ``sqrt(n)``, about
    standard normal under the null, and 0 for a column without any change.
    """
    _check(0.95, draws, seed, values, clusters)
    if not np.size(values):
        raise InputError("Got no values; expected at least one column [observation column].")
    totals, counts = cluster_sums(values, clusters)
    size = np.sqrt((totals**2).sum(axis=0))
    unit = np.divide(totals, size, out=np.zeros_like(totals), where=size > 0)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, len(counts)))
    return float(unit.sum(axis=0).max()), (signs @ unit).max(axis=1)

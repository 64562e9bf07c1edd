"""Linear classifiers on the states of a group: accuracy, shuffled labels and the majority class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from sinkscope.experiments.probing.labelled import Target
from sinkscope.experiments.statistics import cluster_bootstrap

MOST_STEPS = 1000
"""Steps of the solver; a probe that needs more is marked as not converged."""
FEWEST_TRAINING, FEWEST_TEST = 10, 2
"""Images that a probe needs in either part; below, it says "too few images"."""
NONE, FEW = "none found", "too few images"


@dataclass(frozen=True, eq=False)
class Split:
    """Which records train and which test.

    Attributes:
        train: Bool ``[record]``.
        images: Str ``[record]``, the image of every record.
    """

    train: np.ndarray
    images: np.ndarray


@dataclass(frozen=True)
class Options:
    """How probes are fitted and judged; see `linear_probes`."""

    c: float
    permutations: int
    level: float
    draws: int
    seed: int


@dataclass(frozen=True, eq=False)
class Cell:
    """One group at one layer.

    Attributes:
        layer: The layer.
        group: The group.
        states: Float64 ``[record d_model]`` for every draw of the group; NaN where it is empty.
        count: Int ``[record]``, how many tokens the group has.
    """

    layer: int
    group: str
    states: Sequence[np.ndarray]
    count: np.ndarray


def make_classifier(*, multi: bool, c: float) -> Any:
    """Standardised features and logistic regression with an L2 penalty; one per label if ``multi``."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    linear: Any = LogisticRegression(C=c, max_iter=MOST_STEPS)
    return make_pipeline(StandardScaler(), OneVsRestClassifier(linear) if multi else linear)


def predict(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, c: float
) -> tuple[np.ndarray, bool]:
    """Predicted labels of the test rows, and whether the solver converged.

    A label that all or no training rows have is predicted as it is there.
    """
    from sklearn.exceptions import ConvergenceWarning

    multi = labels.ndim == 2
    if not multi and len(np.unique(labels)) < 2:
        return np.full(len(test), labels[0]), True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = make_classifier(multi=multi, c=c).fit(train, labels.astype(int))
        predicted = fitted.predict(test)
    late = any(issubclass(one.category, ConvergenceWarning) for one in caught)
    return predicted.reshape(len(test), *labels.shape[1:]).astype(labels.dtype), not late


def correctness(predicted: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """How right every row is, in [0, 1], by metric.

    One class per row: ``"accuracy"``. Several: ``"label accuracy"``, the share of labels that are
    right, and ``"exact set"``, whether all are.
    """
    same = predicted == truth
    if same.ndim == 1:
        return {"accuracy": same.astype(float)}
    return {"label accuracy": same.mean(axis=1), "exact set": same.all(axis=1).astype(float)}


def majority(train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """Mean correctness of what needs no state at all: the most frequent class of the training rows.

    With several labels: each label's most frequent value, and the most frequent set.
    """
    if train.ndim == 1:
        return {"accuracy": float((test == np.bincount(train).argmax()).mean())}
    common = train.mean(axis=0) > 0.5
    sets, times = np.unique(train, axis=0, return_counts=True)
    return {
        "label accuracy": float((test == common).mean()),
        "exact set": float((test == sets[times.argmax()]).all(axis=1).mean()),
    }


def shuffled(labels: np.ndarray, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels dealt out to other images; the records of an image get those of one other image."""
    _, index = np.unique(images, return_inverse=True)
    rows = [np.flatnonzero(index == i) for i in range(index.max() + 1)]
    out = labels.copy()
    for own, donor in zip(rows, rng.permutation(len(rows)), strict=True):
        given = rows[donor]
        out[own] = labels[given[np.arange(len(own)) % len(given)]]
    return out


def judge(
    cell: Cell, targets: Sequence[Target], split: Split, options: Options
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All probes of a cell.

    Returns:
        One line per target and metric, and how right every test record is.
    """
    there = cell.count > 0
    train, test = there & split.train, there & ~split.train
    place = {"layer": cell.layer, "group": cell.group}
    lines, rows = [], []
    for target in targets:
        seen = {
            "n_train": int(train.sum()),
            "n_test": int(test.sum()),
            "missing": int((~there).sum()),
            "tokens": float(cell.count[there].mean()) if there.any() else float("nan"),
        }
        note = _note(there, train, test, target, split)
        with threadpool_limits(1):  # many small fits: threads would wait for one another
            parts = (
                _judged(cell, target, train, test, split, options) if not note else _blank(target)
            )
        for metric, numbers in parts.items():
            right = numbers.pop("right", None)
            at = {**place, "target": target.name, "metric": metric}
            lines.append({**at, **numbers, **seen, "note": note})
            if right is not None:
                where = {"record": np.flatnonzero(test), "image_id": split.images[test]}
                rows.append({**at, **where, "correct": right})
    return lines, rows


def _note(
    there: np.ndarray, train: np.ndarray, test: np.ndarray, target: Target, split: Split
) -> str:
    """Why a probe cannot be trained; empty if it can."""
    if not there.any():
        return NONE
    images = len(set(split.images[train])), len(set(split.images[test]))
    few = images[0] < FEWEST_TRAINING or images[1] < FEWEST_TEST
    return FEW if few or len(np.unique(target.labels[train], axis=0)) < 2 else ""


def _blank(target: Target) -> dict[str, dict[str, Any]]:
    """NaN for every number."""
    nothing = dict.fromkeys(
        ("accuracy", "std", "low", "high", "null", "null_high", "majority"), float("nan")
    )
    metrics = ("label accuracy", "exact set") if target.multi else ("accuracy",)
    return {metric: {**nothing, "converged": True} for metric in metrics}


def _judged(
    cell: Cell,
    target: Target,
    train: np.ndarray,
    test: np.ndarray,
    split: Split,
    options: Options,
) -> dict[str, dict[str, Any]]:
    """Metric -> accuracy, its interval, the null, the majority class, and every test row."""
    labels, truth = target.labels[train], target.labels[test]
    fitted = [predict(x[train], labels, x[test], options.c) for x in cell.states]
    draws = [correctness(predicted, truth) for predicted, _ in fitted]
    nulls = _nulls(cell, target, train, test, split, options)
    common = majority(labels, truth)
    out = {}
    for metric in draws[0]:
        each = np.stack([draw[metric] for draw in draws])
        right = each.mean(axis=0)
        mean, low, high = cluster_bootstrap(
            right.tolist(),
            split.images[test].tolist(),
            level=options.level,
            draws=options.draws,
            seed=options.seed,
        )
        null = np.array([one[metric] for one in nulls])
        out[metric] = {
            "accuracy": mean,
            "std": float(each.mean(axis=1).std(ddof=1)) if len(each) > 1 else float("nan"),
            "low": low,
            "high": high,
            "null": float(null.mean()) if len(null) else float("nan"),
            "null_high": float(np.quantile(null, 0.95, method="higher")) if len(null) else np.nan,
            "majority": common[metric],
            "converged": all(done for _, done in fitted),
            "right": right,
        }
    return out


def _nulls(
    cell: Cell, target: Target, train: np.ndarray, test: np.ndarray, split: Split, options: Options
) -> list[dict[str, float]]:
    """Mean correctness with labels shuffled over all images, of all draws as in the accuracy.

    An accuracy is a mean over the draws of the group, and varies less than that of one draw. So each
    set of shuffled labels is learned from every draw, and the mean over draws is one value.

    Test labels are shuffled too: what is tested is whether states and labels are independent. With
    shuffled training labels alone, two clear clusters would be named right by luck in one trial of four.
    """
    out, there = [], train | test
    for i in range(options.permutations):
        labels = target.labels.copy()
        rng = np.random.default_rng([options.seed, i])
        labels[there] = shuffled(labels[there], split.images[there], rng)
        draws = [
            correctness(predict(x[train], labels[train], x[test], options.c)[0], labels[test])
            for x in cell.states
        ]
        out.append({name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]})
    return out

"""Linear classifiers on the states of a group: accuracy, shuffled labels and the majority class."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.data.items import Target
from sinkscope.errors import InputError, SelectionError
from sinkscope.experiments.statistics import cluster_bootstrap
from sinkscope.experiments.tracing import SinkTrace, trace_sinks
from sinkscope.probes import GroupMeans

if TYPE_CHECKING:
    from sinkscope.data.items import LabelledImage
    from sinkscope.detectors.rules import Detector
    from sinkscope.models.inputs import Sample
    from sinkscope.models.lvlm import LVLM

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


def v_sinks(trace: SinkTrace) -> Tensor:
    """V-sinks, bool ``[batch pos]``."""
    return trace.v_sinks


def l_sinks(trace: SinkTrace) -> Tensor:
    """L-sinks of every layer, bool ``[batch layer pos]``."""
    return trace.l_sinks()


def ordinary(trace: SinkTrace) -> Tensor:
    """Image tokens that are sinks at no layer, bool ``[batch pos]``."""
    return trace.ordinary()


@dataclass(frozen=True)
class RandomGroup:
    """A group of random tokens, drawn several times.

    Choi et al. (2604.03316) compare sinks with 5 ordinary image tokens, drawn 5 times: about 1 % of
    576. A row with fewer than ``n`` candidates has no such group.

    Args:
        n: How many tokens per draw, without replacement.
        repeats: How many draws; each is a probe of its own.
        among: The candidates: a function of the `SinkTrace` or a name of the `TokenMap`, such as
            ``"image"``.

    Raises:
        InputError: If a number is below 1.
    """

    n: int = 5
    repeats: int = 5
    among: Callable[[SinkTrace], Tensor] | str = ordinary

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("repeats", self.repeats)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"Got {name}={value!r}; expected a whole number of at least 1.")

    def draw(self, candidates: Tensor, seeds: Sequence[Sequence[int]]) -> list[Tensor]:
        """The draws, bool ``[batch pos]`` each.

        Args:
            candidates: Bool ``[batch pos]``.
            seeds: A seed per row. The draw depends on it and on the order of the row's candidates,
                so not on the batch nor on its padding.
        """
        out = [torch.zeros_like(candidates) for _ in range(self.repeats)]
        for row, seed in enumerate(seeds):
            places = candidates[row].nonzero().flatten()
            if len(places) < self.n:
                continue
            rng = np.random.default_rng(seed)
            for mask in out:
                mask[row, places[rng.choice(len(places), self.n, replace=False)]] = True
        return out


Group = Callable[[SinkTrace], Tensor] | RandomGroup | str

"""Tokens by name, by a function of the trace, or random ones."""


def sink_groups(n: int = 5, repeats: int = 5) -> dict[str, Group]:
    """V-sinks, L-sinks and random ordinary image tokens: the groups of Choi et al. (2604.03316).

    Args:
        n: How many ordinary tokens per draw.
        repeats: How many draws.

    Returns:
        Name -> group. Add your own: ``{**sink_groups(), "last token": "last"}``.
    """
    return {"V-sinks": v_sinks, "L-sinks": l_sinks, "ordinary": RandomGroup(n, repeats)}


def check_groups(groups: Any) -> dict[str, Group]:
    """Groups by name.

    Raises:
        InputError: If there is none, or one is neither a name, a function nor `RandomGroup`.
    """
    if not isinstance(groups, Mapping) or not groups:
        raise InputError(
            f"Got groups={groups!r}; expected a dict such as {{'image': 'image', 'V-sinks': lambda "
            "trace: trace.v_sinks}."
        )
    for name, group in groups.items():
        fits = isinstance(group, (str, RandomGroup)) or callable(group)
        if not isinstance(name, str) or not fits:
            raise InputError(
                f"Got the group {name!r}: {type(group).__name__}; expected a name and a selection "
                "by name, a function of the trace, or RandomGroup. A mask belongs to one sample: "
                "write a function such as lambda trace: trace.v_sinks."
            )
    return dict(groups)


def needs_trace(groups: Mapping[str, Group]) -> bool:
    """Whether some group is decided on a `SinkTrace`."""
    among = [g.among if isinstance(g, RandomGroup) else g for g in groups.values()]
    return any(callable(group) for group in among)


@dataclass(frozen=True, eq=False)
class Features:
    """Mean states of every record.

    Attributes:
        layers: The block indices, in order.
        columns: Group -> which columns hold its draws (one column but for random tokens).
        means: Per batch, fp32 ``[batch layer column d_model]``, NaN where the group is empty.
        counts: Int ``[record layer column]``, how many tokens.
    """

    layers: tuple[int, ...]
    columns: Mapping[str, Sequence[int]]
    means: Sequence[Tensor]
    counts: np.ndarray

    def of(self, layer: int, group: str) -> list[np.ndarray]:
        """The features of a group at a layer, float64 ``[record d_model]`` for every draw."""
        at = self.layers.index(layer)
        return [
            torch.cat([part[:, at, column] for part in self.means]).double().numpy()
            for column in self.columns[group]
        ]

    def count(self, layer: int, group: str) -> np.ndarray:
        """How many tokens the group has, int ``[record]``."""
        return self.counts[:, self.layers.index(layer), self.columns[group][0]]


def pool(
    lvlm: LVLM,
    items: Sequence[LabelledImage],
    groups: Mapping[str, Group],
    rules: tuple[Detector, Detector] | None,
    *,
    layers: tuple[int, ...],
    site: str,
    batch: int,
    seed: int,
    remote: bool | str | None,
    hidden: bool,
) -> Features:
    """Mean states of every group, layer and record.

    One pass per batch finds the sinks, if a group asks for them, and one reads the means.

    Raises:
        InputError: If a function gives something else than a mask of the batch.
    """
    columns, means, counts = _columns(groups), [], []
    with tqdm(total=len(items), desc="reading", unit="record", disable=hidden) as bar:
        for start in range(0, len(items), batch):
            part = items[start : start + batch]
            sample = prepare(lvlm, part)
            trace = None if rules is None else trace_sinks(lvlm, sample, *rules, remote=remote)
            seeds = [(seed, start + i) for i in range(len(part))]
            probe = GroupMeans(_masks(lvlm, sample, trace, groups, seeds), layers, site=site)
            result = lvlm.run(sample, [probe], logits="last", remote=remote)[probe]
            means.append(result.means)
            counts.append(result.count)
            bar.update(len(part))
    return Features(layers, columns, means, torch.cat(counts).numpy())


def prepare(lvlm: LVLM, items: Sequence[LabelledImage]) -> Sample:
    """One batch of records."""
    return lvlm.prepare(images=[i.image for i in items], text=[i.question for i in items])


def _columns(groups: Mapping[str, Group]) -> dict[str, list[int]]:
    """Group -> its columns."""
    out, start = {}, 0
    for name, group in groups.items():
        n = group.repeats if isinstance(group, RandomGroup) else 1
        out[name] = list(range(start, start + n))
        start += n
    return out


def _masks(
    lvlm: LVLM,
    sample: Sample,
    trace: SinkTrace | None,
    groups: Mapping[str, Group],
    seeds: Sequence[Sequence[int]],
) -> dict[str, Tensor]:
    """A mask per column."""
    out: list[Tensor] = []
    n_layers = lvlm.anatomy.language.n_layers
    for name, group in groups.items():
        chosen: Any = group.among if isinstance(group, RandomGroup) else group
        try:
            chosen = chosen(trace) if callable(chosen) else chosen
            mask = sample.tokens.select(chosen, n_layers)
        except SelectionError as error:
            raise InputError(f"The group {name!r}: {error}") from error
        if not isinstance(group, RandomGroup):
            out.append(mask)
            continue
        if mask.ndim != 2:
            raise InputError(
                f"The group {name!r} draws among a mask of shape {tuple(mask.shape)}; expected the "
                "same candidates at all layers, [batch pos]. Write mask.all(dim=1) in the function."
            )
        out += group.draw(mask, seeds)
    return {str(i): mask for i, mask in enumerate(out)}

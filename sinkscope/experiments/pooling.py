"""Token groups, their mean states, and linear classifiers on them with nulls and majority classes."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.checks import check_whole
from sinkscope.data.batches import batches_of
from sinkscope.data.items import LabelledImage, Target
from sinkscope.detectors.rules import Detector
from sinkscope.errors import InputError, SelectionError
from sinkscope.experiments.statistics import cluster_bootstrap
from sinkscope.experiments.tracing import SinkTrace, trace_sinks
from sinkscope.models import LVLM, Sample
from sinkscope.probes import GroupMeans
from sinkscope.scale.engine import Prepared, each_part

FEWEST_TRAINING, FEWEST_TEST = 10, 2  # images that a probe needs in either part
NONE = "none found"
BLANK = dict.fromkeys(("accuracy", "std", "low", "high", "null", "null_high", "majority"), np.nan)


@dataclass(frozen=True)
class RandomGroup:
    """A group of ``n`` random tokens, drawn ``repeats`` times; each draw is a probe of its own.

    Choi et al. (2604.03316) compare sinks with 5 ordinary image tokens, drawn 5 times: about 1 % of
    576. Candidates are those ``among`` which to draw, a function of the `SinkTrace` or a name of the
    `TokenMap`; a row with fewer than ``n`` has no such group.
    """

    n: int = 5
    repeats: int = 5
    among: Callable[[SinkTrace], Tensor] | str = SinkTrace.ordinary

    def __post_init__(self) -> None:
        check_whole(1, n=self.n, repeats=self.repeats)

    def draw(self, candidates: Tensor, seeds: Sequence[Sequence[int]]) -> list[Tensor]:
        """The draws, bool ``[batch pos]`` each: by a row's seed and the order of its candidates alone."""
        out = [torch.zeros_like(candidates) for _ in range(self.repeats)]
        for row, seed in enumerate(seeds):
            places, rng = candidates[row].nonzero().flatten(), np.random.default_rng(seed)
            for mask in out if len(places) >= self.n else ():
                mask[row, places[rng.choice(len(places), self.n, replace=False)]] = True
        return out


Group = Callable[[SinkTrace], Tensor] | RandomGroup | str


def sink_groups(n: int = 5, repeats: int = 5) -> dict[str, Group]:
    """V-sinks, L-sinks and a `RandomGroup` of ordinary image tokens, as Choi et al. (2604.03316)."""
    ordinary = RandomGroup(n, repeats)
    return {"V-sinks": attrgetter("v_sinks"), "L-sinks": SinkTrace.l_sinks, "ordinary": ordinary}


def check_groups(groups: Any) -> dict[str, Group]:
    """Require groups by name: names of tokens, functions of a trace, or `RandomGroup`."""
    if not isinstance(groups, Mapping) or not groups:
        wanted = "a dict such as {'image': 'image', 'V-sinks': lambda trace: trace.v_sinks}"
        raise InputError(f"Got groups={groups!r}; expected {wanted}.")
    for name, group in groups.items():
        fits = isinstance(group, (str, RandomGroup)) or callable(group)
        if not isinstance(name, str) or not fits:
            raise InputError(
                f"Got the group {name!r}: {type(group).__name__}; expected a name and a selection "
                "by name, a function of the trace, or RandomGroup. A mask belongs to one sample: "
                "write a function such as lambda trace: trace.v_sinks."
            )
    return dict(groups)


@dataclass(frozen=True, eq=False)
class Cell:
    """One group at one layer."""

    layer: int
    group: str
    states: Sequence[np.ndarray]  # float64 [record d_model] of every draw; NaN where it is empty
    count: np.ndarray  # int [record], how many tokens the group has


class Features(NamedTuple):
    """Mean states of every record; a column of ``counts`` is a group, or one draw of random tokens."""

    counts: np.ndarray  # int [record layer column]
    cell: Callable[[int, str], Cell]


Numbered = tuple[int, LabelledImage]


@dataclass(frozen=True)
class Pooling:
    """What is read of every batch: groups by the rules of a trace, if they need one, at some layers."""

    groups: Mapping[str, Group]
    rules: tuple[Detector, Detector] | None
    layers: tuple[int, ...]
    site: str
    seed: int
    remote: bool | str | None


def pool(
    lvlm: LVLM,
    items: Sequence[LabelledImage],
    how: Pooling,
    *,
    batch: int,
    engine: Any,
    hidden: bool,
) -> Features:
    """Mean states of every group, layer and record: a pass per batch, and one more to find sinks."""
    numbers = batches_of(range(len(items)), batch)
    parts = [[(i, items[i]) for i in some] for some in numbers]
    bar = tqdm(total=len(parts), desc="reading", unit="batch", disable=hidden)
    work, read = Prepared(partial(pool_batch, how=how), _items), {}
    with bar, closing(each_part(lvlm, work, enumerate(parts), engine)) as done:
        for number, found in done:
            read[number] = found
            bar.update()
    means, counts = zip(*(read[number] for number in sorted(read)), strict=True)
    count = torch.cat(counts).numpy()
    groups = how.groups
    columns = [name for name in groups for _ in range(getattr(groups[name], "repeats", 1))]

    def cell(layer: int, group: str) -> Cell:
        at, own = how.layers.index(layer), [i for i, name in enumerate(columns) if name == group]
        states = [torch.cat([part[:, at, i] for part in means]).double().numpy() for i in own]
        return Cell(layer, group, states, count[:, at, own[0]])

    return Features(count, cell)


def _items(part: Sequence[Numbered]) -> list[LabelledImage]:
    return [item for _, item in part]


def pool_batch(
    lvlm: LVLM, part: Sequence[Numbered], samples: Sequence[Sample], how: Pooling
) -> tuple[Tensor, Tensor]:
    """Means of one batch, fp32 ``[batch layer column d_model]`` (NaN where a group is empty), and counts."""
    (sample,), masks = samples, []
    rules, remote, n_layers = how.rules, how.remote, lvlm.anatomy.language.n_layers
    trace = None if rules is None else trace_sinks(lvlm, sample, *rules, remote=remote)
    for name, group in how.groups.items():
        chosen: Any = getattr(group, "among", group)
        try:
            chosen = chosen(trace) if callable(chosen) else chosen
            mask = sample.tokens.select(chosen, n_layers)
        except SelectionError as error:
            raise InputError(f"The group {name!r}: {error}") from error
        if isinstance(group, RandomGroup) and mask.ndim != 2:
            raise InputError(
                f"The group {name!r} draws among a mask of shape {tuple(mask.shape)}; expected "
                "the same candidates at all layers, [batch pos]. Write mask.all(dim=1) in the "
                "function."
            )
        seeds = [(how.seed, number) for number, _ in part]
        masks += group.draw(mask, seeds) if isinstance(group, RandomGroup) else [mask]
    probe = GroupMeans({str(i): mask for i, mask in enumerate(masks)}, how.layers, site=how.site)
    result = lvlm.run(sample, [probe], logits="last", remote=remote)[probe]
    return result.means, result.count


@dataclass(frozen=True)
class Options:
    """How probes are fitted and judged; see `linear_probes`."""

    c: float
    permutations: int
    level: float
    draws: int
    seed: int


def predict(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, c: float
) -> tuple[np.ndarray, bool]:
    """Predicted labels of the test rows, by logistic regression, and whether the solver converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    multi = labels.ndim == 2
    if not multi and len(np.unique(labels)) < 2:
        return np.full(len(test), labels[0]), True
    linear: Any = LogisticRegression(C=c, max_iter=1000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = make_pipeline(StandardScaler(), OneVsRestClassifier(linear) if multi else linear)
        predicted = model.fit(train, labels.astype(int)).predict(test)
    late = any(issubclass(one.category, ConvergenceWarning) for one in caught)
    return predicted.reshape(len(test), *labels.shape[1:]).astype(labels.dtype), not late


def correctness(predicted: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """How right every row is, in [0, 1]; with several labels the share of them, and whether all are."""
    same = (predicted == truth).astype(float)
    if same.ndim == 1:
        return {"accuracy": same}
    return {"label accuracy": same.mean(axis=1), "exact set": same.min(axis=1)}


def majority(train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """Mean correctness of the training rows' most frequent class, value of each label, or set."""
    if train.ndim == 1:
        return {"accuracy": float((test == np.bincount(train).argmax()).mean())}
    sets, times = np.unique(train, axis=0, return_counts=True)
    return {
        "label accuracy": float((test == (train.mean(axis=0) > 0.5)).mean()),
        "exact set": float((test == sets[times.argmax()]).all(axis=1).mean()),
    }


def shuffled(labels: np.ndarray, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels dealt out to other images, those of an image to one other image."""
    _, index = np.unique(images, return_inverse=True)
    rows = [np.flatnonzero(index == i) for i in range(index.max() + 1)]
    out = labels.copy()
    for own, donor in zip(rows, rng.permutation(len(rows)), strict=True):
        out[own] = labels[np.resize(rows[donor], len(own))]
    return out


def judge(
    cell: Cell, targets: Sequence[Target], train: np.ndarray, images: np.ndarray, options: Options
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All probes of a cell: one line per target and metric, and how right every test record is.

    One value of the null is the mean over draws with one shuffle, of test images too: states and labels are
    tested for independence, and two clear clusters are not named right by luck.
    """
    there = cell.count > 0
    train, test = there & train, there & ~train
    seen: dict[str, Any] = {"n_train": int(train.sum()), "n_test": int(test.sum())}
    seen["missing"] = int((~there).sum())
    seen["tokens"] = float(cell.count[there].mean()) if there.any() else np.nan
    n_train, n_test = (len(set(images[part])) for part in (train, test))
    few = n_train < FEWEST_TRAINING or n_test < FEWEST_TEST
    how = {"level": options.level, "draws": options.draws, "seed": options.seed}

    def learn(labels: np.ndarray) -> tuple[dict[str, np.ndarray], bool]:
        fitted = [predict(x[train], labels[train], x[test], options.c) for x in cell.states]
        draws = [correctness(predicted, labels[test]) for predicted, _ in fitted]
        right = {name: np.stack([draw[name] for draw in draws]) for name in draws[0]}
        return right, all(done for _, done in fitted)

    lines, rows = [], []
    for target in targets:
        at: dict[str, Any] = {"layer": cell.layer, "group": cell.group, "target": target.name}
        labels = target.labels
        if few or len(np.unique(labels[train], axis=0)) < 2:
            note = "too few images" if there.any() else NONE
            metrics = ("label accuracy", "exact set") if target.multi else ("accuracy",)
            blank = {**BLANK, "converged": True, **seen, "note": note}
            lines += [{**at, "metric": metric, **blank} for metric in metrics]
            continue
        with threadpool_limits(1):  # many small fits: threads would wait for one another
            (found, converged), nulls = learn(labels), []
            for i in range(options.permutations):
                dealt, rng = labels.copy(), np.random.default_rng([options.seed, i])
                dealt[there] = shuffled(labels[there], images[there], rng)
                nulls.append({name: float(each.mean()) for name, each in learn(dealt)[0].items()})
            for metric, each in found.items():
                right, null = each.mean(axis=0), [one[metric] for one in nulls] or [np.nan]
                mean, *interval = cluster_bootstrap(right.tolist(), images[test].tolist(), **how)
                std = float(each.mean(axis=1).std(ddof=1)) if len(each) > 1 else np.nan
                chance = float(np.mean(null)), float(np.quantile(null, 0.95, method="higher"))
                common = majority(labels[train], labels[test])[metric]
                numbers = dict(zip(BLANK, (mean, std, *interval, *chance, common), strict=True))
                numbers |= {"converged": converged, **seen, "note": ""}
                lines.append({**at, "metric": metric, **numbers})
                where = {"record": np.flatnonzero(test), "image_id": images[test]}
                rows.append({**at, "metric": metric, **where, "correct": right})
    return lines, rows

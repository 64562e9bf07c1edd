"""linear_probes: what linear classifiers read from token groups, layer by layer; table and figure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from sinkscope.checks import check_number, check_whole, plain, typed
from sinkscope.data.items import LabelledImage, Target, as_labelled, as_targets, image_groups
from sinkscope.detectors import Detector, SinkRules
from sinkscope.errors import InputError
from sinkscope.experiments import pooling
from sinkscope.experiments.pooling import FEWEST_TEST, FEWEST_TRAINING, NONE, Group
from sinkscope.experiments.statistics import cluster_bootstrap
from sinkscope.models.lvlm import LVLM
from sinkscope.models.prompts import check_questions
from sinkscope.probes.residual import check_site
from sinkscope.results import Result
from sinkscope.scale.engine import Ray, check_engine
from sinkscope.viz.probes import plot_probes


@dataclass(frozen=True, eq=False)
class LinearProbes(Result):
    """How well attributes can be read from the states of token groups, layer by layer.

    ``table`` has one line per layer, group, target and metric: accuracy (for random tokens the mean over
    draws, with ``std`` over them), its interval ``low`` to ``high``, ``null`` (mean with labels shuffled over
    images), ``null_high`` (its 95 % quantile), ``majority``, converged, n_train, n_test and missing
    (records), tokens (mean size of the group), note. ``rows`` has how right each test record is, in [0, 1]:
    record, image_id, layer, group, target, metric, correct. ``detectors`` says how the sinks were decided,
    empty if no group asked for sinks. ``intervals`` are ``level``, ``draws`` and ``seed`` of
    `cluster_bootstrap`.
    """

    table: pd.DataFrame
    rows: pd.DataFrame
    classes: Mapping[str, tuple[Any, ...]]  # of every target
    images: tuple[tuple[str, ...], tuple[str, ...]]  # ids of the training and the test part
    site: str
    detectors: str

    def to_dataframe(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def estimates(self, **intervals: Any) -> pd.DataFrame:
        """Average every group over layers and test records, with an interval that resamples images.

        Columns are target, metric, group, layers (how many have probes), accuracy, low, high, worst and best
        (layer), majority, null, above_null (layers whose accuracy exceeds ``null_high``; by chance about 1 in
        20), missing (share of records and layers without such a token), note.
        """
        keys = ["target", "metric", "group"]
        tables: Any = (dict(iter(table.groupby(keys))) for table in (self.rows, self.table))
        right, parts = tables
        order, lines = [list(dict.fromkeys(self.table[key])) for key in keys], []
        for names in (names for names in product(*order) if names in parts):
            part, own = parts[names], right.get(names, self.rows.head(0))
            there, images = part[part["accuracy"].notna()], own["image_id"].tolist()
            mean = cluster_bootstrap(own["correct"].tolist(), images, **intervals)
            above = (there["accuracy"] > there["null_high"]).sum()
            line = dict(zip(keys, names, strict=True)) | {"layers": len(there)}
            line |= zip(("accuracy", "low", "high"), mean, strict=True)
            line |= {"worst": there["accuracy"].min(), "best": there["accuracy"].max()}
            line |= {name: there[name].mean() for name in ("majority", "null")}
            line["above_null"] = above if there["null_high"].notna().any() else None
            sizes = part[["missing", "n_train", "n_test"]].sum()
            line["missing"] = sizes["missing"] / sizes.sum()
            lines.append(line | {"note": "" if len(there) else part["note"].iloc[0]})
        return pd.DataFrame(lines)

    def summary(self, **intervals: Any) -> str:
        """Write `estimates` as text."""
        return self.estimates(**intervals).to_string(index=False, float_format="%.3f")

    def difference(self, base: str = "ordinary", **intervals: Any) -> pd.DataFrame:
        """Subtract a base group with probes from every group, paired on the test records that have both.

        Columns are layer, group, target, metric, n (records), delta, low, high. Intervals are not corrected
        for the number of comparisons.
        """
        known = list(dict.fromkeys(self.rows["group"]))
        if base not in known:
            raise InputError(f"Got base={base!r}; expected a group that has probes: {known}.")
        by, keys = ["layer", "group", "target", "metric"], ["layer", "target", "metric", "record"]
        is_base = self.rows["group"] == base
        of_base = self.rows[is_base][[*keys, "correct"]]
        paired = self.rows[~is_base].merge(of_base, on=keys, suffixes=("", "_base"))
        lines = []
        for names, part in paired.groupby(by, sort=False):
            change, images = part["correct"] - part["correct_base"], part["image_id"].tolist()
            delta = cluster_bootstrap(change.tolist(), images, **intervals)
            lines.append((*names, len(part), *delta))
        return pd.DataFrame(lines, columns=[*by, "n", "delta", "low", "high"])

    def plot(
        self, *, metric: str = "label accuracy", groups: Sequence[str] | None = None
    ) -> Figure:
        """Accuracy by layer, a panel per target; see `sinkscope.viz.plot_probes`.

        Of targets with several labels ``metric`` is shown, ``"label accuracy"`` or ``"exact set"``.
        """
        return plot_probes(self.table, metric=metric, groups=groups)

    def __repr__(self) -> str:
        layers, groups = self.table["layer"].nunique(), list(dict.fromkeys(self.table["group"]))
        empty = [g for g in groups if (self.table[self.table["group"] == g]["note"] == NONE).all()]
        gone = f"; none found: {', '.join(empty)}" if empty else ""
        return (
            f"LinearProbes({len(self.classes)} targets, {layers} layers, {len(groups)} groups{gone}; "
            f"{len(self.images[0])} images to train, {len(self.images[1])} to test)"
        )


@typed
def linear_probes(
    lvlm: LVLM,
    dataset: Iterable[Any],
    *,
    groups: Mapping[str, Group] | None = None,
    targets: Sequence[str] | None = None,
    layers: Any = None,
    site: str = "resid_pre",
    v_detector: Detector | None = None,
    l_detector: Detector | None = None,
    test_size: float = 0.3,
    c: float = 1.0,
    permutations: int = 20,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    batch: int = 16,
    n_jobs: int = 1,
    remote: bool | str | None = None,
    engine: str | Ray = "local",
    progress: bool | None = None,
) -> LinearProbes:
    """Train linear classifiers on mean states of token groups, per layer, group and target.

    The experiment of Choi et al. (2604.03316), section on CLEVR. What they did not publish is chosen here:
    ``StandardScaler`` and ``LogisticRegression`` (one per label, where several can hold), a split by image,
    accuracy. It costs two forward passes per batch; per layer, group and target ``draws of the group x (1 +
    permutations)`` fits, times the labels of a target with several; and records x layers x draws of the
    groups x d_model x 4 bytes of memory.

    Args:
        dataset: Records with ``image``, ``attributes`` and, if you like, ``question`` and ``image_id``: dicts
            or `LabelledImage`. An attribute is an int or a str, or a set or list of them where several hold.
        groups: Name -> a name of the `TokenMap`, a function that gets the `SinkTrace` of a batch and
            gives a mask ``[batch pos]`` or ``[batch layer pos]``, or `RandomGroup`; None for
            `sink_groups`. L-sinks of layer l are decided on what block l reads.
        targets: Which attributes, or None for all of the first record.
        site: ``"resid_pre"``, what block l reads (layer 0 are the embeddings), or ``"resid_post"``,
            ``"attn_out"``, ``"mlp_out"``.
        v_detector: For V-sinks, as ``l_detector`` for L-sinks, best calibrated on other images; None for
            published constants of this model, else one calibration on the first 8 records, without labels.
        test_size: Share of the images that test.
        c: scikit-learn's inverse strength of the L2 penalty, on standardised features.
        permutations: How often labels are shuffled over all images, for the null; 0 for none.
        level: Coverage of the intervals, which resample test images ``draws`` times.
        seed: Of split, random tokens, shuffled labels and intervals.
        batch: Records per forward pass, which may be ``remote``, see `LVLM.run`.
        n_jobs: Processes that fit (joblib), -1 for all.
        engine: ``"local"``, ``"ray"`` or a `sinkscope.scale.Ray`: batches of the passes are shared among its
            workers, which get the groups. The fits are made here.
        progress: None shows bars from 50 records on.

    Raises:
        InputError: If the data set, the groups or an option is malformed, a target has one class in
            the training part, or no group has a token anywhere.
    """
    c, permutations, level, draws = map(plain, (c, permutations, level, draws))
    seed, batch, n_jobs = map(plain, (seed, batch, n_jobs))
    check_number(above=0, c=c, hint="It is scikit-learn's C.")
    check_number(above=0, below=1, level=level, hint="Write 0.95.")
    check_whole(0, permutations=permutations, seed=seed)
    check_whole(1, draws=draws, batch=batch)
    check_engine(engine)
    check_whole(1 if n_jobs != -1 else -1, n_jobs=n_jobs, hint="Or -1 for all processes.")
    options = pooling.Options(float(c), permutations, float(level), draws, seed)
    chosen = pooling.check_groups(pooling.sink_groups() if groups is None else groups)
    wanted, site = lvlm.anatomy.language.layers(layers), check_site(site)
    if lvlm.processor is None:
        hint = "expected one, to prepare the images. Write ss.LVLM(model, processor)"
        raise InputError(f"Got an LVLM without a processor; {hint}.")
    items = as_labelled(dataset)
    check_questions(lvlm.processor, items)
    goals = as_targets(items, targets)
    train, images = split_images(items, goals, test_size, seed)
    hidden = len(items) < 50 if progress is None else not progress
    rules, how = None, ""
    if any(callable(getattr(group, "among", group)) for group in chosen.values()):
        some, about = items[:8], f"the first {len(items[:8])} records"
        first = lvlm.prepare(images=[i.image for i in some], text=[i.question for i in some])
        found = SinkRules.on_others(
            lvlm, lambda: [first], v_detector, l_detector, what=about, remote=remote
        )
        rules, how = (found.v, found.l_rule), found.chosen
    what = pooling.Pooling(chosen, rules, wanted, site, seed, remote)
    features = pooling.pool(lvlm, items, what, batch=batch, engine=engine, hidden=hidden)
    if not features.counts.any():
        raise InputError(
            f"No token of {list(chosen)} was found in any image; expected at least one group with "
            "tokens. Add one, such as {**ss.experiments.sink_groups(), 'image': 'image'}."
        )
    from joblib import Parallel, delayed

    cells = [(layer, group) for layer in wanted for group in chosen]
    work: Any = Parallel(n_jobs, return_as="generator")(
        delayed(pooling.judge)(features.cell(*place), goals, train, images, options)
        for place in cells
    )
    bar = tqdm(work, total=len(cells), desc="fitting", unit="group", disable=hidden)
    lines, rows = zip(*bar, strict=True)
    trained, tested = (tuple(dict.fromkeys(images[part].tolist())) for part in (train, ~train))
    columns = ["record", "image_id", "layer", "group", "target", "metric", "correct"]
    judged = [pd.DataFrame(row, columns=columns) for some in rows for row in some]
    table = pd.DataFrame([line for some in lines for line in some])
    right = pd.concat(judged, ignore_index=True) if judged else pd.DataFrame(columns=columns)
    classes = {goal.name: goal.classes for goal in goals}
    return LinearProbes(table, right, classes, (trained, tested), site, how)


def split_images(
    items: Sequence[LabelledImage], targets: Sequence[Target], test_size: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which records train, by scikit-learn's ``GroupShuffleSplit``, and the image of every record."""
    from sklearn.model_selection import GroupShuffleSplit

    check_number(above=0, below=1, hint="It is a share.", test_size=test_size)
    images = image_groups(items)
    n = len(set(images))
    tested = int(np.ceil(test_size * n))
    if tested < FEWEST_TEST or n - tested < FEWEST_TRAINING:
        raise InputError(
            f"Got test_size={test_size} of {n} images, so {tested} test and {n - tested} train; "
            f"expected at least {FEWEST_TEST} and {FEWEST_TRAINING}. Write test_size=0.3."
        )
    made = GroupShuffleSplit(n_splits=1, test_size=float(test_size), random_state=seed)
    train = np.zeros(len(items), dtype=bool)
    train[next(made.split(train, groups=images))[0]] = True
    for target in targets:
        if len(np.unique(target.labels[train], axis=0)) < 2:
            raise InputError(
                f"Attribute {target.name!r} takes one value only in the {train.sum()} training "
                "records; expected at least two. Give more images, or another seed."
            )
    return train, images

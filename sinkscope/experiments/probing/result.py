"""What linear probes found: the table, differences between groups, and the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from sinkscope.errors import InputError
from sinkscope.experiments.probing.classify import NONE
from sinkscope.experiments.statistics import cluster_bootstrap
from sinkscope.probes.results import Unsaved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class LinearProbes(Unsaved):
    """How well attributes can be read from the states of token groups, layer by layer.

    Attributes:
        table: One line per layer, group, target and metric: accuracy (for random tokens the mean
            over draws, with ``std`` over them), its interval ``low`` to ``high``, ``null`` (mean
            with labels shuffled over images), ``null_high`` (its 95 % quantile), ``majority``,
            converged, n_train, n_test and missing (records), tokens (mean size of the group), note.
        rows: How right each test record is, in [0, 1]: record, image_id, layer, group, target,
            metric, correct.
        classes: Target -> its classes.
        images: Ids of the images that trained the probes, and of those that tested them.
        site: Which states were read.
        detectors: How the sinks were decided; empty if no group asked for sinks.
    """

    table: pd.DataFrame
    rows: pd.DataFrame
    classes: Mapping[str, tuple[Any, ...]]
    images: tuple[tuple[str, ...], tuple[str, ...]]
    site: str
    detectors: str

    def to_dataframe(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def summary(self, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
        """Every group's mean over layers and test records, with an interval that resamples images.

        Args:
            level: Coverage of the intervals.
            draws: Bootstrap samples.
            seed: Of the draws.

        Returns:
            Columns target, metric, group, layers (how many have probes), accuracy, low, high, worst
            and best (layer), majority, null, above_null (layers whose accuracy exceeds
            ``null_high``; by chance about 1 in 20), missing (share of records and layers without
            such a token), note.
        """
        import pandas as pd

        keys = ["target", "metric", "group"]
        right = dict(iter(self.rows.groupby(keys)))
        parts: dict[Any, Any] = dict(iter(self.table.groupby(keys)))
        order = [list(dict.fromkeys(self.table[key])) for key in keys]
        lines = []
        for names in (names for names in product(*order) if names in parts):
            part = parts[names]
            own, there = right.get(names), part[part["accuracy"].notna()]
            mean = (float("nan"),) * 3
            if own is not None:
                values, ids = own["correct"].tolist(), own["image_id"].tolist()
                mean = cluster_bootstrap(values, ids, level=level, draws=draws, seed=seed)
            above = there["accuracy"] > there["null_high"]
            records = part["missing"] + part["n_train"] + part["n_test"]
            lines.append(
                {
                    **dict(zip(keys, names, strict=True)),
                    "layers": len(there),
                    **dict(zip(("accuracy", "low", "high"), mean, strict=True)),
                    "worst": there["accuracy"].min(),
                    "best": there["accuracy"].max(),
                    "majority": there["majority"].mean(),
                    "null": there["null"].mean(),
                    "above_null": above.sum() if there["null_high"].notna().any() else None,
                    "missing": part["missing"].sum() / records.sum(),
                    "note": "" if len(there) else part["note"].iloc[0],
                }
            )
        return pd.DataFrame(lines)

    def difference(
        self,
        base: str = "ordinary",
        *,
        level: float = 0.95,
        draws: int = 2000,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Every group minus a base group, paired on the test records that have both.

        Args:
            base: The group that others are compared with.
            level: Coverage of the intervals.
            draws: Bootstrap samples.
            seed: Of the draws.

        Returns:
            Columns layer, group, target, metric, n (records), delta, low, high. Intervals resample
            images and are not corrected for the number of comparisons.

        Raises:
            InputError: If there is no such group, or it has no probe.
        """
        import pandas as pd

        known = list(dict.fromkeys(self.rows["group"]))
        if base not in known:
            raise InputError(f"Got base={base!r}; expected a group that has probes: {known}.")
        keys = ["layer", "target", "metric", "record"]
        of_base = self.rows[self.rows["group"] == base][[*keys, "correct"]]
        others = self.rows[self.rows["group"] != base]
        paired = others.merge(of_base, on=keys, suffixes=("", "_base"))
        lines = []
        by = ["layer", "group", "target", "metric"]
        for names, part in paired.groupby(by, sort=False):
            change, ids = (part["correct"] - part["correct_base"]).tolist(), part["image_id"]
            delta = cluster_bootstrap(change, ids.tolist(), level=level, draws=draws, seed=seed)
            numbers = dict(zip(("delta", "low", "high"), delta, strict=True))
            lines.append({**dict(zip(by, names, strict=True)), "n": len(part), **numbers})
        return pd.DataFrame(lines, columns=[*by, "n", "delta", "low", "high"])

    def plot(
        self, *, metric: str = "label accuracy", groups: Sequence[str] | None = None
    ) -> Figure:
        """Accuracy by layer, a panel per target; see `sinkscope.viz.plot_probes`.

        Args:
            metric: What to show of targets with several labels, ``"label accuracy"`` or
                ``"exact set"``.
            groups: Which groups to draw, or None for all.

        Returns:
            A matplotlib figure.
        """
        from sinkscope.viz.probes import plot_probes

        return plot_probes(self.table, metric=metric, groups=groups)

    def __repr__(self) -> str:
        layers, groups = self.table["layer"].nunique(), list(dict.fromkeys(self.table["group"]))
        empty = [g for g in groups if (self.table[self.table["group"] == g]["note"] == NONE).all()]
        gone = f"; none found: {', '.join(empty)}" if empty else ""
        return (
            f"LinearProbes({len(self.classes)} targets, {layers} layers, {len(groups)} groups{gone}; "
            f"{len(self.images[0])} images to train, {len(self.images[1])} to test)"
        )

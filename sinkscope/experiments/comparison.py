"""Comparison: answers under every condition, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, cast

from sinkscope.errors import InputError
from sinkscope.experiments.statistics import cluster_bootstrap
from sinkscope.probes.results import Unsaved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ALL = "all"


@dataclass(frozen=True, eq=False)
class Comparison(Unsaved):
    """Answers under every condition.

    Attributes:
        table: One line per question, condition and seed: item, image_id, task, question, answer,
            condition, seed, given, correct, touched (whether the edit touched that row), sinks (how many
            visual sinks the trace found in the row; NaN for conditions without a trace) and
            uncontrolled (whether random tokens were to be edited and there were too few of them).
        base: The condition that others are compared with.
    """

    table: pd.DataFrame
    base: str

    @property
    def conditions(self) -> tuple[str, ...]:
        """All but the base, in order."""
        return tuple(c for c in self.table["condition"].unique() if c != self.base)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of `summary`, ``"all"`` last."""
        own = [task for task in self.table["task"].unique() if task != ALL]
        return (*own, ALL)

    @property
    def comparisons(self) -> int:
        """How many differences to the base `summary` reports (see `count_comparisons`).

        As many intervals are looked at, uncorrected: of 20 that cover 95 %, one excludes zero by
        chance. ``summary(level=1 - 0.05 / comparison.comparisons)`` is Bonferroni's correction.
        """
        groups = self._by_task().groupby(["task", "condition"], sort=False, as_index=False)
        return count_comparisons(groups.agg({"touched": "mean"}), self.base)

    def summary(
        self, *, level: float = 0.95, draws: int = 2000, seed: int = 0, touched_only: bool = False
    ) -> pd.DataFrame:
        """Accuracy and paired difference to the base, per task, with intervals.

        Images are resampled with all their questions. A condition of several seeds is their mean,
        and its interval resamples images and seeds (see `cluster_bootstrap`).

        Args:
            level: Coverage of the intervals.
            draws: Bootstrap samples.
            seed: Of the draws.
            touched_only: Whether to judge each condition on the questions it touched only, instead
                of all of them.

        Returns:
            Columns task, condition, n, images, seeds, touched, uncontrolled (both shares of the
            questions), accuracy, low, high, delta, delta_low, delta_high, changed (the share of
            answers that turned right or wrong), seed_sd (standard deviation of the accuracy over
            seeds; NaN for one). Task ``"all"`` holds every question. ``attrs["comparisons"]`` is how
            many differences it holds.
        """
        check_bootstrap(level, draws)
        import pandas as pd

        whole = self._by_task()
        options = {"level": level, "draws": draws, "seed": seed}
        lines = []
        for names, group in whole.groupby(["task", "condition"], sort=False):
            task, condition = cast("tuple[str, str]", names)
            part = group
            if touched_only and condition != self.base:
                part = part.loc[part["touched"].astype(bool)]
            of_base = whole.loc[(whole["task"] == task) & (whole["condition"] == self.base)]
            lines.append({"task": task, "condition": condition, **_line(part, of_base, options)})
        out = pd.DataFrame(lines)
        out.attrs["comparisons"] = count_comparisons(out, self.base)
        out.attrs["level"] = level
        return out

    def to_dataframe(self) -> pd.DataFrame:
        """One line per question, condition and seed: a copy of `table`."""
        return self.table.copy()

    def to_markdown(self, **options: Any) -> str:
        """The summary as a Markdown table, conditions down and tasks across.

        Args:
            options: Of `summary`.
        """
        from sinkscope.viz.comparison import comparison_markdown

        return comparison_markdown(self.summary(**options), base=self.base)

    def to_latex(self, **options: Any) -> str:
        """The same as a LaTeX ``tabular``, with a note about the number of comparisons under it.

        Args:
            options: Of `summary`.
        """
        from sinkscope.viz.comparison import comparison_latex

        return comparison_latex(self.summary(**options), base=self.base)

    def plot(self, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Figure:
        """The change of accuracy per task and condition, with intervals.

        Args:
            level: See `summary`.
            draws: See `summary`.
            seed: See `summary`.

        Returns:
            A matplotlib figure.
        """
        from sinkscope.viz.effects import plot_effects

        return plot_effects(self.summary(level=level, draws=draws, seed=seed), base=self.base)

    def _by_task(self) -> pd.DataFrame:
        """The table once per task, and once more as ``"all"`` if there are several tasks."""
        import pandas as pd

        table = self.table if "seed" in self.table else self.table.assign(seed=0)
        wide = table.assign(task=ALL)
        several = [t for t in self.tasks if t != ALL]
        named = table.loc[table["task"] != ALL]  # those without a task are in "all" alone
        return pd.concat([named, wide], ignore_index=True) if len(several) > 1 else wide


def count_comparisons(summary: pd.DataFrame, base: str, tasks: Sequence[str] | None = None) -> int:
    """How many differences to the base a summary reports.

    A condition counts once for every task in which it touched a row. Where it found nothing to edit
    there is no difference and no interval, and nothing to correct for.

    Args:
        summary: Of ``Comparison.summary()``, or any table with its columns task, condition and
            touched.
        base: The condition that the others are compared with.
        tasks: The tasks that are shown; None for all.
    """
    lines = zip(summary["task"], summary["condition"], summary["touched"], strict=True)
    return sum(
        condition != base and touched > 0 and (tasks is None or task in tasks)
        for task, condition, touched in lines
    )


def check_bootstrap(level: Any, draws: Any) -> None:
    """Refuse a coverage outside 0 to 1 and a number of draws below 1.

    Raises:
        InputError: If so.
    """
    if isinstance(level, bool) or not isinstance(level, Real) or not 0 < float(level) < 1:
        raise InputError(f"Got level={level!r}; expected a coverage between 0 and 1, such as 0.95.")
    if isinstance(draws, bool) or not isinstance(draws, Integral) or int(draws) < 1:
        raise InputError(f"Got draws={draws!r}; expected bootstrap samples, 1 or more. Write 2000.")


def _line(part: pd.DataFrame, of_base: pd.DataFrame, options: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one task and condition."""
    paired = part.merge(of_base[["item", "correct"]], on="item", suffixes=("", "_base"))
    right = paired["correct"].astype(float)
    change = right - paired["correct_base"].astype(float)
    images, seeds = paired["image_id"].tolist(), paired["seed"].tolist()
    accuracy = cluster_bootstrap(right.tolist(), images, seeds, **options)
    delta = cluster_bootstrap(change.tolist(), images, seeds, **options)
    return {
        "n": part["item"].nunique(),
        "images": part["image_id"].nunique(),
        "seeds": part["seed"].nunique(),
        "touched": part["touched"].mean() if len(part) else 0.0,
        "uncontrolled": part["uncontrolled"].mean()
        if "uncontrolled" in part and len(part)
        else 0.0,
        **dict(zip(("accuracy", "low", "high"), accuracy, strict=True)),
        **dict(zip(("delta", "delta_low", "delta_high"), delta, strict=True)),
        "changed": float((change.dropna() != 0).mean()) if len(change) else 0.0,
        "seed_sd": right.groupby(paired["seed"]).mean().std(),
    }

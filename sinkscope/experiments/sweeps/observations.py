"""The three observations of the paper about its map, in words and numbers, null results included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sinkscope.experiments.statistics import cluster_intervals
from sinkscope.experiments.sweeps.result import ALL, counted, wide

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.experiments.sweeps.result import Sweep

UNITS = {
    "exact": (" in points", 100.0),
    "choice": (" in points", 100.0),
    "logprob": (" in nats", 1.0),
}
"""Score -> its unit as words, and what it is multiplied with."""


def observe(sweep: Sweep, by: str, seed: int) -> str:
    """See `Sweep.observations`."""
    whole = sweep.map(by, seed=seed)
    best = sweep.best(by, seed=seed)
    unit, factor = UNITS.get(sweep.score, ("", 1.0))
    lines = [f"{sweep!r}, change of {sweep.score_name} against the base{unit}."]
    lines += _by_task(whole, best, factor)
    lines += _by_layer(whole, factor)
    lines += _by_sinks(sweep, factor, seed)
    lines += [f"Note: {note}." for note in sweep.notes]
    return "\n".join(lines)


def _by_task(whole: pd.DataFrame, best: pd.DataFrame, factor: float) -> list[str]:
    """1: is the best cell another one for other tasks, and does it hold on other images?"""
    lines = ["1. Does it depend on the task?"]
    for row in best.to_dict("records"):
        part = whole[whole["task"] == row["task"]]
        low, high = part["delta"].min() * factor, part["delta"].max() * factor
        if not row["images"]:
            lines.append(
                f"   {row['task']}: cells from {low:+.2f} to {high:+.2f}; no best cell: {row['note']}."
            )
            continue
        up = int((part["low"] > 0).sum())
        down = int((part["high"] < 0).sum())
        lines.append(
            f"   {row['task']}: cells from {low:+.2f} to {high:+.2f}; {up} clearly above and {down} clearly "
            f"below 0, of {len(part)} (with no effect about {0.025 * len(part):.0f} each). Best on one "
            f"half: {_cell(row)}, on the other {row['delta'] * factor:+.2f} "
            f"{_interval(row['low'] * factor, row['high'] * factor)}; maximum over all cells {_p(row['p'])}."
        )
        if row["note"]:
            lines[-1] += f" Mind that {row['note']}."
    tasks = [row for row in best.to_dict("records") if row["task"] != ALL or len(best) == 1]
    gained = [row for row in tasks if row["low"] > 0 and row["p"] <= 0.05]
    if len(tasks) < 2:
        lines.append("   One task only: this sweep cannot tell.")
    elif not gained:
        lines.append("   No task gains on images that were not used to choose: nothing to compare.")
    else:
        cells = {(row["layer"], row["pair"]) for row in gained}
        lines.append(
            f"   {len(gained)} of {len(tasks)} tasks gain on held-out images, in {len(cells)} different "
            f"cell{'s' if len(cells) > 1 else ''}."
        )
    return lines


def _by_layer(whole: pd.DataFrame, factor: float) -> list[str]:
    """2: does the same pair do something else in other layers?"""
    lines = ["2. Does it depend on the layer?"]
    for task, part in whole.groupby("task", sort=False):
        table = part.pivot(index="layer", columns="pair", values="delta")
        means = table.mean(axis=1) * factor
        spread = (table.max(axis=0) - table.min(axis=0)).max() * factor
        gains = sorted(set(part["layer"][part["low"] > 0].tolist()))
        harms = sorted(set(part["layer"][part["high"] < 0].tolist()))
        lines.append(
            f"   {task}: mean over pairs from {means.min():+.2f} (layer {_layer(means.idxmin())}) to "
            f"{means.max():+.2f} (layer {_layer(means.idxmax())}); one pair differs by up to "
            f"{spread:.2f} between layers. Some cell clearly gains in {_layers(gains)}, clearly loses "
            f"in {_layers(harms)}."
        )
    return lines


def _by_sinks(sweep: Sweep, factor: float, seed: int) -> list[str]:
    """3: do pairs that favour V-sinks do better than those that favour the rest?"""
    lines = ["3. Does raising or splitting off the sinks help?"]
    once = sweep.table.drop_duplicates("item")
    share = float((once["n_v"] > 0).mean())
    if share == 0:
        lines.append(
            "   This sweep cannot tell: no image has a V-sink, so s_V never applied and all image "
            "tokens were scaled by s_rest alone."
        )
        return lines
    part = cast("pd.DataFrame", sweep.table[sweep.table["n_v"] > 0])
    cells, changes, images = wide(part, "score")
    above = (cells["s_v"] > cells["s_rest"]).to_numpy()
    below = (cells["s_v"] < cells["s_rest"]).to_numpy()
    if not above.any() or not below.any():
        lines.append("   This grid cannot tell: it has no pairs on both sides of s_V = s_rest.")
        return lines
    layers = cells["layer"].to_numpy()
    contrast = np.stack(
        [
            changes[:, (layers == layer) & above].mean(axis=1)
            - changes[:, (layers == layer) & below].mean(axis=1)
            for layer in np.unique(layers)
        ],
        axis=1,
    )
    joined = np.concatenate([contrast, contrast.mean(axis=1, keepdims=True)], axis=1)
    mean, low, high = cluster_intervals(joined, images, seed=seed) * factor
    lines.append(
        f"   {share:.0%} of the questions are about images with V-sinks. Mean of pairs with s_V > s_rest "
        f"minus those with s_V < s_rest: {mean[-1]:+.2f} {_interval(low[-1], high[-1])} over all "
        f"layers; clearly above 0 in {int((low[:-1] > 0).sum())} and clearly below 0 in "
        f"{int((high[:-1] < 0).sum())} of {counted(len(mean) - 1, 'layer')}."
    )
    if np.allclose(cells["s_v"] + cells["s_rest"], 1.0):
        lines.append(
            "   In every pair s_V and s_rest add to 1: what raises one lowers the other, and which of "
            "the two it was cannot be told apart."
        )
    lines.append(
        "   Whether the rest should be split further (L-sinks, ordinary tokens) is not on this grid."
    )
    return lines


def _cell(row: Mapping[Any, Any]) -> str:
    """A cell in words."""
    return f"layer {_layer(row['layer'])}, ({row['s_v']:g}, {row['s_rest']:g})"


def _interval(low: float, high: float) -> str:
    """An interval in words; one image cannot be resampled."""
    if np.isnan(low) or np.isnan(high):
        return "(too few images for an interval)"
    return f"[{low:+.2f}, {high:+.2f}]"


def _p(p: float) -> str:
    """A p value; it is never 0."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def _layer(layer: object) -> str:
    """A layer's name."""
    return "embed" if layer == -1 else str(layer)


def _layers(layers: list) -> str:
    """Layers in words."""
    if not layers:
        return "no layer"
    return f"layer{'s' * (len(layers) > 1)} {', '.join(_layer(layer) for layer in layers)}"

"""What a sweep found: its best cell, held out and with its null, and the paper's three observations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sinkscope.experiments.statistics import cluster_intervals, sign_flip_maximum
from sinkscope.experiments.sweep_grid import ALL, cell_of, coefficients_of, counted, nouns, wide

if TYPE_CHECKING:
    import pandas as pd


NUMBERS = ("chosen_on", "delta", "low", "high", "maximum", "t", "t_95", "p")
ALONE = "images of one half only, so none is left to score what was chosen"
NEUTRAL = "no cell scales a key here, such as (0, 1) where no image has a V-sink"
NO_GAIN = "no cell gains where it was chosen"


def best_of(
    part: pd.DataFrame, column: str, *, level: float, draws: int, seed: int
) -> dict[str, Any]:
    """One line of `Sweep.best` for the questions of one task."""
    cells, changes, images = wide(part, column)
    acts = acting(part)
    here = half(images, seed)
    able = np.flatnonzero(acts[here].any(axis=0))
    if here.all() or not len(able):
        return none(ALONE if here.all() else NEUTRAL, cell_of(part))
    means = changes[here].mean(axis=0)
    at = int(able[means[able].argmax()])
    other = [image for image, mine in zip(images, here, strict=True) if not mine]
    delta, low, high = cluster_intervals(
        changes[~here][:, [at]], other, level=level, draws=draws, seed=seed
    )
    edited = changes[:, acts.any(axis=0)]
    largest, null = sign_flip_maximum(edited, images, draws=draws, seed=seed)
    return {
        **cells.iloc[at].to_dict(),
        "chosen_on": means[at],
        "n": len(other),
        "images": len(set(other)),
        "delta": delta[0],
        "low": low[0],
        "high": high[0],
        "maximum": edited.mean(axis=0).max(),
        "t": largest,
        "t_95": float(np.quantile(null, 0.95)),
        "p": float((1 + (null >= largest - 1e-9).sum()) / (1 + len(null))),
        "note": NO_GAIN if means[at] <= 0 else "",
    }


def split_of(part: pd.DataFrame, *, seed: int) -> dict[str, Any] | None:
    """What splitting the rest into L-sinks and ordinary tokens adds, on images not used to choose.

    The best triple, and the best of those with s_L = s_rest, are chosen on one half of the images and
    compared on the other. Gives ``split`` and ``whole``, the two cells with their ``delta``, and
    ``difference``, its mean and interval; None where there is no such pair of cells.
    """
    cells, changes, images = wide(part, "score")
    here = half(images, seed)
    able = acting(part)[here].any(axis=0)
    alike = np.isclose(cells["s_l"], cells["s_rest"])
    if here.all() or not (able & alike).any():
        return None
    means = changes[here].mean(axis=0)
    places = [
        int(among[means[among].argmax()]) for among in map(np.flatnonzero, (able, able & alike))
    ]
    chosen = cells.iloc[places].to_dict("records")
    split, whole = changes[~here][:, places].T
    other = [image for image, mine in zip(images, here, strict=True) if not mine]
    difference = cluster_intervals((split - whole)[:, None], other, seed=seed)[:, 0]
    return {
        "split": {**chosen[0], "delta": split.mean()},
        "whole": {**chosen[1], "delta": whole.mean()},
        "difference": difference,
    }


def half(images: list[str], seed: int) -> np.ndarray:
    """Which questions are about the half of the images on which a cell is chosen."""
    names = np.unique(images)
    order = np.random.default_rng(seed).permutation(len(names))
    first = names[order[: (len(names) + 1) // 2]]
    return np.isin(images, first)


def acting(part: pd.DataFrame) -> np.ndarray:
    """Whether a cell scales a key of a question's image at all, bool ``[question cell]``."""
    v = (part["s_v"] != 1) & (part["n_v"] > 0)
    acts = v | (part["s_rest"] != 1) & (part["n_rest"] > 0)
    if "s_l" in part:
        acts |= (part["s_l"] != 1) & (part["n_l"] > 0)
    table = part.assign(acts=acts).pivot(index="item", columns=["layer", "pair"], values="acts")
    return cast("pd.DataFrame", table).sort_index(axis=1).to_numpy(dtype=bool)


def none(note: str, cell: list[str]) -> dict[str, Any]:
    """The line of a task without a best cell, with the columns that a cell would have."""
    import pandas as pd

    return {
        **dict.fromkeys(cell[:3], pd.NA),
        **dict.fromkeys((*cell[3:], *NUMBERS), float("nan")),
        "n": 0,
        "images": 0,
        "note": note,
    }


UNITS = {
    "exact": (" in points", 100.0),
    "choice": (" in points", 100.0),
    "logprob": (" in nats", 1.0),
}
"""Score -> its unit as words, and what it is multiplied with."""


def observe(sweep: Any, by: str, seed: int) -> str:
    """See `Sweep.observations`."""
    whole = sweep.map(by, seed=seed)
    best = sweep.best(by, seed=seed)
    unit, factor = UNITS.get(sweep.score, ("", 1.0))
    lines = [f"{sweep!r}, change of {sweep.score_name} against the base{unit}."]
    lines += _by_task(whole, best, factor)
    lines += _by_layer(whole, factor, nouns(len(sweep.groups)))
    lines += _by_sinks(sweep, by, factor, seed)
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


def _by_layer(whole: pd.DataFrame, factor: float, noun: str) -> list[str]:
    """2: does the same pair do something else in other layers?"""
    lines = ["2. Does it depend on the layer?"]
    for task, part in whole.groupby("task", sort=False):
        table = part.pivot(index="layer", columns="pair", values="delta")
        means = table.mean(axis=1) * factor
        spread = (table.max(axis=0) - table.min(axis=0)).max() * factor
        gains = sorted(set(part["layer"][part["low"] > 0].tolist()))
        harms = sorted(set(part["layer"][part["high"] < 0].tolist()))
        lines.append(
            f"   {task}: mean over {noun}s from {means.min():+.2f} (layer {_layer(means.idxmin())}) to "
            f"{means.max():+.2f} (layer {_layer(means.idxmax())}); one {noun} differs by up to "
            f"{spread:.2f} between layers. Some cell clearly gains in {_layers(gains)}, clearly loses "
            f"in {_layers(harms)}."
        )
    return lines


def _by_sinks(sweep: Any, by: str, factor: float, seed: int) -> list[str]:
    """3: do pairs that favour sinks do better than those that favour the rest?"""
    lines = ["3. Does raising or splitting off the sinks help?"]
    three = "L" in sweep.groups
    contrasts = [_of_group(sweep, group, factor, seed) for group in sweep.groups[:-1]]
    lines += [line for line, _ in contrasts]
    if not any(told for _, told in contrasts):
        return lines
    if all(np.isclose(sum(pair), 1.0) for pair in sweep.pairs):
        words = ("s_V and s_rest", "other", "the two")
        words = ("the coefficients", "others", "them") if three else words
        lines.append(
            f"   In every {nouns(len(sweep.groups))} {words[0]} add to 1: what raises one lowers the "
            f"{words[1]}, and which of {words[2]} it was cannot be told apart."
        )
    if three:
        return lines + _by_split(sweep, by, factor, seed)
    lines.append(
        "   Whether the rest should be split further (L-sinks, ordinary tokens) is not on this grid."
    )
    return lines


def _of_group(sweep: Any, group: str, factor: float, seed: int) -> tuple[str, bool]:
    """What favours a group of sinks against what favours the rest, and whether that can be told."""
    noun = nouns(len(sweep.groups))
    name, count, own = f"s_{group}", f"n_{group.lower()}", f"s_{group.lower()}"
    share = _share(sweep.table, count)
    if not share:
        where = "image has a V-sink" if group == "V" else "image token is an L-sink at these layers"
        rest = "all image tokens were scaled by s_rest alone"
        rest = rest if noun == "pair" else "the other coefficients scaled all image tokens"
        return f"   This sweep cannot tell: no {where}, so {name} never applied and {rest}.", False
    part: Any = sweep.table[sweep.table[count] > 0]
    sign = np.sign(part[own] - part["s_rest"])
    if not {-1.0, 1.0} <= set(sign):
        sides = f"both sides of {name} = s_rest"
        return f"   This grid cannot tell: it has no {noun}s on {sides}.", False
    change = part.assign(change=part["score"] - part["base_score"], sign=sign)
    means = change.groupby(["item", "layer", "sign"])["change"].mean().unstack("sign")
    table = (means[1.0] - means[-1.0]).unstack("layer")  # NaN where the question has no such sink
    images = part.drop_duplicates("item").set_index("item")["image_id"]
    columns = [*(table[layer] for layer in table), table.mean(axis=1)]
    mean, low, high = np.array([_interval_of(one, images, seed) for one in columns]).T * factor
    have = "are about images with V-sinks" if group == "V" else "have L-sinks at some layer"
    where = "all layers" if group == "V" else "those layers"
    return (
        f"   {share:.0%} of the questions {have}. Mean of {noun}s with {name} > s_rest "
        f"minus those with {name} < s_rest: {mean[-1]:+.2f} {_interval(low[-1], high[-1])} over {where}; "
        f"clearly above 0 in {int((low[:-1] > 0).sum())} and clearly below 0 in "
        f"{int((high[:-1] < 0).sum())} of {counted(len(mean) - 1, 'layer')}."
    ), True


def _share(table: pd.DataFrame, count: str) -> float:
    """The share of the questions with such a sink at some layer."""
    most: Any = table.groupby("item")[count].max()
    return float((most > 0).mean())


def _interval_of(values: pd.Series, images: pd.Series, seed: int) -> np.ndarray:
    """Mean, low and high of the questions that have a value."""
    own = values.dropna()
    names = images.loc[own.index].tolist()
    return cluster_intervals(own.to_numpy()[:, None], names, seed=seed)[:, 0]


def _by_split(sweep: Any, by: str, factor: float, seed: int) -> list[str]:
    """Does a coefficient of its own for L-sinks add something, on other images?"""
    lines = ["   Does splitting the rest into L-sinks and ordinary tokens add something?"]
    for task, part in sweep.by_task(by):
        found = split_of(part, seed=seed) if part["n_l"].any() else None
        if found is None:
            lines.append(f"   {task}: cannot tell; {_why_no_split(part)}.")
            continue
        split, whole = found["split"], found["whole"]
        mean, low, high = found["difference"] * factor
        lines.append(
            f"   {task}: best on one half {_cell(split)}, on the other {split['delta'] * factor:+.2f}; best with "
            f"s_L = s_rest {_cell(whole)}, {whole['delta'] * factor:+.2f}; difference {mean:+.2f} "
            f"{_interval(low, high)}."
        )
    return lines


def _why_no_split(part: pd.DataFrame) -> str:
    """Why a task has no such comparison."""
    if not part["n_l"].any():
        return "no image token is an L-sink at these layers"
    if not np.isclose(part["s_l"], part["s_rest"]).any():
        return "the grid has no triple with s_L = s_rest"
    return "images of one half only, or no triple with s_L = s_rest scales a key"


def _cell(row: Mapping[Any, Any]) -> str:
    """A cell in words."""
    numbers = ", ".join(f"{factor:g}" for factor in coefficients_of(row))
    return f"layer {_layer(row['layer'])}, ({numbers})"


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

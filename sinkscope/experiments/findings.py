"""What a sweep found: its best cell, held out and with its null, and the paper's three observations."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sinkscope.data.items import ALL
from sinkscope.experiments.statistics import cluster_intervals, sign_flip_maximum
from sinkscope.experiments.sweep_grid import CELL, NOUNS, cell_of, coefficients_of, counted, wide

POINTS = (" in points", 100.0)
UNITS = {"exact": POINTS, "choice": POINTS, "logprob": (" in nats", 1.0)}  # and a factor


def best_of(
    part: pd.DataFrame, column: str, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """One line of `Sweep.best` for the questions of one task."""
    cells, changes, images, acts, here = halved(part, column, seed)
    able = np.flatnonzero(acts[here].any(axis=0))
    if here.all() or not len(able):
        note = "no cell scales a key here, such as (0, 1) where no image has a V-sink"
        if here.all():
            note = "images of one half only, so none is left to score what was chosen"
        numbers = ("chosen_on", "delta", "low", "high", "maximum", "t", "t_95", "p")
        missing = dict.fromkeys((*cell_of(part)[3:], *numbers), float("nan"))
        return {**dict.fromkeys(CELL[:3], pd.NA), **missing, "n": 0, "images": 0, "note": note}
    means = changes[here].mean(axis=0)
    at = int(able[means[able].argmax()])
    other = [*itertools.compress(images, ~here)]
    how: Any = {"draws": draws, "seed": seed}
    delta, low, high = cluster_intervals(changes[~here][:, [at]], other, level=level, **how)[:, 0]
    edited = changes[:, acts.any(axis=0)]
    largest, null = sign_flip_maximum(edited, images, **how)
    p = float((1 + (null >= largest - 1e-9).sum()) / (1 + len(null)))
    line = {"chosen_on": means[at], "n": len(other), "images": len(set(other))}
    line |= {"delta": delta, "low": low, "high": high, "maximum": edited.mean(axis=0).max()}
    line |= {"t": largest, "t_95": float(np.quantile(null, 0.95)), "p": p}
    note = "no cell gains where it was chosen" if means[at] <= 0 else ""
    return {**cells.iloc[at].to_dict(), **line, "note": note}


def split_of(part: pd.DataFrame, *, seed: int) -> dict[str, Any] | None:
    """What splitting the rest adds on images not used to choose; None without such a pair of cells.

    ``split`` is the best triple, ``whole`` the best with s_L = s_rest; ``difference`` has mean and interval.
    """
    cells, changes, images, acts, here = halved(part, "score", seed)
    able, alike = acts[here].any(axis=0), np.isclose(cells["s_l"], cells["s_rest"])
    if here.all() or not (able & alike).any():
        return None
    means = changes[here].mean(axis=0)
    places = [int(np.where(among, means, -np.inf).argmax()) for among in (able, able & alike)]
    both, other = changes[~here][:, places], list(itertools.compress(images, ~here))
    found: Any = {
        name: {**cells.iloc[at].to_dict(), "delta": change.mean()}
        for name, at, change in zip(("split", "whole"), places, both.T, strict=True)
    }
    difference = cluster_intervals(both[:, :1] - both[:, 1:], other, seed=seed)[:, 0]
    return {**found, "difference": difference}


def halved(part: pd.DataFrame, column: str, seed: int) -> tuple[Any, Any, list[str], Any, Any]:
    """`wide`, whether a cell scales a key ``[question cell]``, and the questions about half of the images."""
    cells, changes, images = wide(part, column)
    groups = [name[2:] for name in ("s_v", "s_l", "s_rest") if name in part]
    acts = np.any([(part[f"s_{g}"] != 1) & (part[f"n_{g}"] > 0) for g in groups], axis=0)
    table: Any = part.assign(acts=acts).pivot(
        index="item", columns=["layer", "pair"], values="acts"
    )
    names = np.unique(images)
    order = np.random.default_rng(seed).permutation(len(names))
    here = np.isin(images, names[order[: (len(names) + 1) // 2]])
    return cells, changes, images, table.sort_index(axis=1).to_numpy(dtype=bool), here


def observe(sweep: Any, by: str, seed: int) -> str:
    """See `Sweep.observations`."""
    whole, best = sweep.map(by, seed=seed), sweep.best(by, seed=seed)
    unit, factor = UNITS.get(sweep.score, ("", 1.0))
    numbers = ["chosen_on", "delta", "low", "high", "maximum"]
    whole[numbers[1:4]], best[numbers] = whole[numbers[1:4]] * factor, best[numbers] * factor
    name = sweep.score.rpartition(".")[2]
    lines = [f"{sweep!r}, change of {name} against the base{unit}."]
    lines += [*_by_task(whole, best.to_dict("records")), "2. Does it depend on the layer?"]
    noun = NOUNS[len(sweep.groups)]
    for task, part in whole.groupby("task", sort=False):
        table = part.pivot(index="layer", columns="pair", values="delta")
        means, spread = table.mean(axis=1), (table.max(axis=0) - table.min(axis=0)).max()
        gains, harms = part["layer"][part["low"] > 0], part["layer"][part["high"] < 0]
        lines.append(
            f"   {task}: mean over {noun}s from {means.min():+.2f} (layer {_layer(means.idxmin())}) to "
            f"{means.max():+.2f} (layer {_layer(means.idxmax())}); one {noun} differs by up to "
            f"{spread:.2f} between layers. Some cell clearly gains in {_layers(gains)}, clearly loses "
            f"in {_layers(harms)}."
        )
    lines += _by_sinks(sweep, by, noun, factor, seed)
    return "\n".join([*lines, *(f"Note: {note}." for note in sweep.notes)])


def _by_task(whole: pd.DataFrame, best: Sequence[Mapping[Any, Any]]) -> Iterator[str]:
    """1: is the best cell another one for other tasks, and does it hold on other images?"""
    yield "1. Does it depend on the task?"
    for row in best:
        part = whole[whole["task"] == row["task"]]
        head = f"   {row['task']}: cells from {part['delta'].min():+.2f} to {part['delta'].max():+.2f}; "
        if not row["images"]:
            yield f"{head}no best cell: {row['note']}."
            continue
        up, down = int((part["low"] > 0).sum()), int((part["high"] < 0).sum())
        p = f"p = {row['p']:.3f}" if row["p"] >= 0.001 else "p < 0.001"
        yield (
            f"{head}{up} clearly above and {down} clearly below 0, of {len(part)} (with no effect about "
            f"{0.025 * len(part):.0f} each). Best on one half: {_cell(row)}, on the other "
            f"{row['delta']:+.2f} {_interval(row['low'], row['high'])}; maximum over all cells {p}."
            + (f" Mind that {row['note']}." if row["note"] else "")
        )
    tasks = [row for row in best if row["task"] != ALL or len(best) == 1]
    gained = [row for row in tasks if row["low"] > 0 and row["p"] <= 0.05]
    different = counted(len({(row["layer"], row["pair"]) for row in gained}), "different cell")
    if len(tasks) < 2:
        yield "   One task only: this sweep cannot tell."
    elif not gained:
        yield "   No task gains on images that were not used to choose: nothing to compare."
    else:
        yield f"   {len(gained)} of {len(tasks)} tasks gain on held-out images, in {different}."


def _by_sinks(sweep: Any, by: str, noun: str, factor: float, seed: int) -> Iterator[str]:
    """3: do pairs that favour sinks do better than those that favour the rest?"""
    yield "3. Does raising or splitting off the sinks help?"
    contrasts = [_of_group(sweep, group, noun, factor, seed) for group in sweep.groups[:-1]]
    yield from (line for line, _ in contrasts)
    if not any(told for _, told in contrasts):
        return
    if all(np.isclose(sum(pair), 1.0) for pair in sweep.pairs):
        yield (
            f"   In every {noun} the coefficients add to 1: what raises one lowers the others, and which "
            "of them it was cannot be told apart."
        )
    if len(sweep.groups) < 3:
        yield "   Whether to split the rest further (L-sinks, ordinary tokens) is not on this grid."
        return
    yield "   Does splitting the rest into L-sinks and ordinary tokens add something?"
    for task, part in sweep.by_task(by):
        found = split_of(part, seed=seed) if part["n_l"].any() else None
        if found is None:
            why = "images of one half only, or no triple with s_L = s_rest scales a key"
            if not part["n_l"].any():
                why = "no image token is an L-sink at these layers"
            elif not np.isclose(part["s_l"], part["s_rest"]).any():
                why = "the grid has no triple with s_L = s_rest"
            yield f"   {task}: cannot tell; {why}."
            continue
        split, whole = found["split"], found["whole"]
        mean, low, high = found["difference"] * factor
        yield (
            f"   {task}: best on one half {_cell(split)}, on the other {split['delta'] * factor:+.2f}; "
            f"best with s_L = s_rest {_cell(whole)}, {whole['delta'] * factor:+.2f}; difference "
            f"{mean:+.2f} {_interval(low, high)}."
        )


def _of_group(sweep: Any, group: str, noun: str, factor: float, seed: int) -> tuple[str, bool]:
    """What favours a group of sinks against what favours the rest, and whether that can be told."""
    name, count, own = f"s_{group}", f"n_{group.lower()}", f"s_{group.lower()}"
    share = (sweep.table.groupby("item")[count].max() > 0).mean()
    if not share:
        where = "image has a V-sink" if group == "V" else "image token is an L-sink at these layers"
        rest = "the other coefficients scaled all image tokens"
        return f"   This sweep cannot tell: no {where}, so {name} never applied and {rest}.", False
    part: Any = sweep.table[sweep.table[count] > 0]
    sign = np.sign(part[own] - part["s_rest"])
    if not {-1.0, 1.0} <= set(sign):
        said = f"it has no {noun}s on both sides of {name} = s_rest"
        return f"   This grid cannot tell: {said}.", False
    change = part.assign(change=part["score"] - part["base_score"], sign=sign)
    means = change.groupby(["item", "layer", "sign"])["change"].mean().unstack("sign")
    table = (means[1.0] - means[-1.0]).unstack("layer")  # NaN where the question has no such sink
    images = part.drop_duplicates("item").set_index("item")["image_id"]
    table["mean"] = table.mean(axis=1)
    columns = [table[name].dropna() for name in table]
    named = [(one.to_numpy()[:, None], images.loc[one.index].tolist()) for one in columns]
    mean, low, high = np.hstack([cluster_intervals(*one, seed=seed) for one in named]) * factor
    have = "are about images with V-sinks" if group == "V" else "have L-sinks at some layer"
    where = "all layers" if group == "V" else "those layers"
    return (
        f"   {share:.0%} of the questions {have}. Mean of {noun}s with {name} > s_rest "
        f"minus those with {name} < s_rest: {mean[-1]:+.2f} {_interval(low[-1], high[-1])} over {where}; "
        f"clearly above 0 in {int((low[:-1] > 0).sum())} and clearly below 0 in "
        f"{int((high[:-1] < 0).sum())} of {counted(len(mean) - 1, 'layer')}."
    ), True


def _cell(row: Mapping[Any, Any]) -> str:
    numbers = ", ".join(f"{factor:g}" for factor in coefficients_of(row))
    return f"layer {_layer(row['layer'])}, ({numbers})"


def _interval(low: float, high: float) -> str:
    if np.isnan(low) or np.isnan(high):  # one image cannot be resampled
        return "(too few images for an interval)"
    return f"[{low:+.2f}, {high:+.2f}]"


def _layer(layer: Any) -> str:
    return "embed" if layer == -1 else f"{layer:g}"


def _layers(layers: Iterable[int]) -> str:
    names = [_layer(layer) for layer in sorted(set(layers))]
    return f"layer{'s' * (len(names) > 1)} {', '.join(names)}" if names else "no layer"

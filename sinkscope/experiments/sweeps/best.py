"""The best cell of a sweep: chosen on one half of the images, scored on the other, with its null."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sinkscope.experiments.statistics import cluster_intervals, sign_flip_maximum
from sinkscope.experiments.sweeps.result import cell_of, wide

if TYPE_CHECKING:
    import pandas as pd

NUMBERS = ("chosen_on", "delta", "low", "high", "maximum", "t", "t_95", "p")
ALONE = "images of one half only, so none is left to score what was chosen"
NEUTRAL = "no cell scales a key here, such as (0, 1) where no image has a V-sink"
NO_GAIN = "no cell gains where it was chosen"


def best_of(
    part: pd.DataFrame, column: str, *, level: float, draws: int, seed: int
) -> dict[str, Any]:
    """One line of `Sweep.best`, without the name of its task.

    Args:
        part: The questions of one task.
        column: ``"score"`` or ``"logprob"``.
        level: Coverage of the interval.
        draws: Bootstrap samples, and draws of the null.
        seed: Of the halves and the draws.
    """
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
    compared on the other.

    Args:
        part: The questions of one task, with triples.
        seed: Of the halves and the draws.

    Returns:
        ``split`` and ``whole``, the two cells with their ``delta`` on the other half, and
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

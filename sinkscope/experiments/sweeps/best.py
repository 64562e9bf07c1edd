"""The best cell of a sweep: chosen on one half of the images, scored on the other, with its null."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sinkscope.experiments.statistics import cluster_intervals, sign_flip_maximum
from sinkscope.experiments.sweeps.result import CELL, wide

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
        return none(ALONE if here.all() else NEUTRAL)
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


def half(images: list[str], seed: int) -> np.ndarray:
    """Which questions are about the half of the images on which a cell is chosen."""
    names = np.unique(images)
    order = np.random.default_rng(seed).permutation(len(names))
    first = names[order[: (len(names) + 1) // 2]]
    return np.isin(images, first)


def acting(part: pd.DataFrame) -> np.ndarray:
    """Whether a cell scales a key of a question's image at all, bool ``[question cell]``."""
    v = (part["s_v"] != 1) & (part["n_v"] > 0)
    rest = (part["s_rest"] != 1) & (part["n_rest"] > 0)
    table = part.assign(acts=v | rest).pivot(index="item", columns=["layer", "pair"], values="acts")
    return cast("pd.DataFrame", table).sort_index(axis=1).to_numpy(dtype=bool)


def none(note: str) -> dict[str, Any]:
    """The line of a task without a best cell."""
    import pandas as pd

    return {
        **dict.fromkeys(CELL[:3], pd.NA),
        **dict.fromkeys((*CELL[3:], *NUMBERS), float("nan")),
        "n": 0,
        "images": 0,
        "note": note,
    }

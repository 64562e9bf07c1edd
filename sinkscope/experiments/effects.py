"""effect_table: base, masked sinks, scaled sinks, and the same for random tokens, on a dataset.

The command line, ``scripts/bundled_effects.py`` and the tutorials share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sinkscope.checks import check_flags
from sinkscope.errors import InputError
from sinkscope.experiments.compare import compare
from sinkscope.experiments.comparison import Comparison
from sinkscope.experiments.conditions import EDITS, KINDS, TOP, EditSinks
from sinkscope.experiments.variants import Condition

if TYPE_CHECKING:
    from sinkscope.detectors.rules import Detector
    from sinkscope.models.lvlm import LVLM

BASE = "base"


def effect_conditions(
    *,
    edits: Sequence[str] = ("mask", "halve"),
    layers: Any = None,
    top: int = 4,
    controls: bool = True,
    seed: int = 0,
) -> dict[str, Condition]:
    """Conditions for `compare`: every edit of every kind of sink, and of as many random tokens.

    Args:
        edits: Among ``"mask"``, ``"halve"`` (the attention weights), and ``"zero value"``,
            ``"mean value"`` and ``"resample value"``, which are best reported side by side.
        layers: Block indices to edit in, or None for all.
        top: How many of the image tokens that receive the most attention to edit too, sinks or
            not; 0 for none.
        controls: Whether to add the same edits of as many random tokens that are no sinks.
        seed: Of the random tokens.

    Returns:
        Name -> condition; ``"base"``, without any edit, comes first.

    Raises:
        InputError: If an edit is unknown or ``top`` is negative.
    """
    known = [edit.name for edit in EDITS]
    unknown = [name for name in edits if name not in known]
    if isinstance(edits, str) or unknown or not edits:
        raise InputError(f"Got edits={edits!r}; expected some of {known}, as a list.")
    check_flags(controls=controls)
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise InputError(f"Got top={top!r}; expected a number of tokens, 0 for none.")
    named = [(kind, kind, f"as many as {kind}", 1) for kind in KINDS]
    if top:
        named.append((TOP, f"the top {top} attended", f"as many as the top {top}", top))
    out: dict[str, Condition] = {BASE: []}
    for kind, name, number, k in named:
        for edit in edits:
            out[f"{edit} {name}"] = EditSinks(kind, edit, layers, k=k)
            if controls:
                out[f"{edit} random, {number}"] = EditSinks(kind, edit, layers, True, k, seed)
    return out


def effect_table(
    lvlm: LVLM,
    dataset: Iterable[Any],
    *,
    v_detector: Detector | None = None,
    l_detector: Detector | None = None,
    edits: Sequence[str] = ("mask", "halve"),
    layers: Any = None,
    top: int = 4,
    controls: bool = True,
    seed: int = 0,
    batch: int = 16,
    progress: bool | None = None,
) -> Comparison:
    """What masking and scaling sinks, and as many random tokens, does to a model's answers.

    Args:
        lvlm: The model.
        dataset: Questions; see `compare`.
        v_detector: For V-sinks, best calibrated on other images; None: see `trace_sinks`.
        l_detector: For L-sinks and text sinks, likewise.
        edits: See `effect_conditions`.
        layers: Block indices to edit in, or None for all.
        top: How many of the most attended image tokens to edit too; 0 for none.
        controls: Whether to edit random tokens too.
        seed: Of the random tokens.
        batch: The most questions per forward pass.
        progress: Whether to show a progress bar; None shows it from 50 questions on.

    Returns:
        The comparison: ``.summary()`` is the table, ``.plot()`` the figure, and
        ``sinkscope.viz.effects_text(table.summary())`` the lines for a terminal.

    Raises:
        InputError: If the dataset is empty or malformed, or an option is out of range.
    """
    conditions = effect_conditions(
        edits=edits, layers=layers, top=top, controls=controls, seed=seed
    )
    return compare(
        lvlm,
        dataset,
        conditions,
        v_detector=v_detector,
        l_detector=l_detector,
        batch=batch,
        progress=progress,
    )

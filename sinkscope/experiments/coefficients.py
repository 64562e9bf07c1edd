"""gate_coefficients: what gates answer, by task and layer, with intervals over images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.checks import check_choice, check_whole
from sinkscope.data.items import ALL, Item, as_items, check_tasks
from sinkscope.errors import InputError
from sinkscope.experiments.statistics import cluster_intervals
from sinkscope.lsg.gate import LSG, check_gates
from sinkscope.lsg.passes import gate_inputs, gate_signals
from sinkscope.models.lvlm import LVLM
from sinkscope.models.prompts import check_questions
from sinkscope.models.wrapping import evaluated
from sinkscope.results import Result
from sinkscope.tokens import TokenMap
from sinkscope.viz.probes import plot_coefficients

CELL = ["layer", "edited", "group"]


@dataclass(frozen=True, eq=False)
class GateCoefficients(Result):
    """The coefficients that gates give for questions; ``by`` is what means are split by if nothing is said.

    ``table`` has one line per question, gate and group: item, image_id, task, layer (that the gate reads;
    -1 is ``"embed"``), edited (the block whose keys it scales), group (``"V"``, ``"L"`` or ``"rest"``),
    coefficient (a factor of keys; a question's groups add to the gate's scale), untrained (the scale
    over the number of groups) and tokens (image tokens of the group).
    """

    table: pd.DataFrame
    by: str = "task"

    def to_dataframe(self, by: str | None = None, **intervals: Any) -> pd.DataFrame:
        """Mean coefficients by task, layer and group, with intervals by bootstrap over images.

        ``by`` is ``"task"`` or ``"all"``, None for what it was made with; with several tasks all
        questions together come last. ``intervals``: ``level``, ``draws`` and ``seed`` of `cluster_intervals`.

        Returns:
            Columns task, layer, edited, group, n (questions), images, coefficient, low, high, untrained
            and tokens (means).
        """
        by = self.by if by is None else by
        check_choice(("task", ALL), by=by)
        several = by == "task" and self.table["task"].nunique() > 1
        tasks: list[Any] = [*self.table.groupby("task", sort=True)] if several else []
        tables = []
        for task, part in [*tasks, (ALL, self.table)]:
            wide: Any = part.pivot(index="item", columns=CELL, values="coefficient")
            images = part.drop_duplicates("item").set_index("item")["image_id"].loc[wide.index]
            means = cluster_intervals(wide.to_numpy(dtype=float), images.tolist(), **intervals)
            cells = pd.DataFrame(list(wide.columns), columns=CELL)
            numbers = dict(zip(("coefficient", "low", "high"), means, strict=True))
            made = cells.assign(n=len(wide), images=images.nunique(), **numbers)
            made = made.join(part.groupby(CELL)[["untrained", "tokens"]].mean(), on=CELL)
            made.insert(0, "task", str(task))
            tables.append(made)
        return pd.concat(tables, ignore_index=True)

    def plot(self, by: str | None = None, *, seed: int = 0) -> Figure:
        """Coefficients by layer, a panel per group, a line per task; arguments as in `to_dataframe`."""
        return plot_coefficients(self.to_dataframe(by, seed=seed))

    def __repr__(self) -> str:
        nouns = {"question": "item", "image": "image_id", "gate": "layer"}
        counts = {noun: self.table[name].nunique() for noun, name in nouns.items()}
        said = ", ".join(f"{n} {noun}{'s' * (n != 1)}" for noun, n in counts.items())
        return f"GateCoefficients({said})"


@torch.no_grad()
def gate_coefficients(
    lvlm: LVLM,
    gates: LSG | Sequence[LSG],
    dataset: Iterable[Any],
    by: str = "task",
    *,
    batch: int = 8,
    progress: bool | None = None,
) -> GateCoefficients:
    """Measure the coefficients that gates give for questions (Choi et al. 2604.03316).

    Every gate is asked **alone**, on one pass of the plain model. In a stack a gate reads what those
    below it left, and may answer otherwise: see ``run.effects[gate]``. The coefficients are those of
    the prompt, also for a gate with ``decode="refresh"``.

    The gates are of different layers, such as ``result.gates.values()``, and were made for this model
    (else InterventionError). ``dataset`` holds records as for `sweep`; use others than those trained on.
    Means are split ``by`` ``"task"``, or ``"all"``. ``batch`` is questions per forward pass;
    ``progress=None`` shows a bar from 50 questions on.
    """
    given = check_gates(gates)
    check_choice(("task", ALL), by=by)
    check_whole(1, batch=batch)
    if lvlm.processor is None or lvlm.device.type == "meta":
        came = "Got an LVLM without a processor or without weights"
        raise InputError(f"{came}; expected both, so no remote=True.")
    layers = [gate.layer for gate in given]
    if len(set(layers)) < len(layers):
        raise InputError(f"Got gates of the layers {layers}; expected every layer once in a call.")
    for gate in given:
        gate.check_fits(lvlm)
    items = as_items(dataset)
    check_tasks(items)
    check_questions(lvlm.processor, items)
    blocks, lines = [gate.config.edited for gate in given], []
    hidden = len(items) < 50 if progress is None else not progress
    bar = tqdm(total=len(items), desc="reading gates", unit="question", disable=hidden)
    with bar, evaluated(lvlm.module):
        for start in range(0, len(items), batch):
            part = items[start : start + batch]
            sample = lvlm.prepare(images=[i.image for i in part], text=[i.question for i in part])
            captured, vision = gate_inputs(lvlm, sample.inputs, blocks)
            for gate, block in zip(given, blocks, strict=True):
                found = gate_signals(gate, sample.tokens, vision, captured.state(block))
                lines += _lines(gate, part, start, found, sample.tokens)
            bar.update(len(part))
    table = pd.DataFrame(lines).sort_values(["item", "edited"], kind="stable", ignore_index=True)
    return GateCoefficients(table, by)


def _lines(
    gate: LSG, items: Sequence[Item], first: int, found: dict[str, Tensor], tokens: TokenMap
) -> Iterator[dict[str, Any]]:
    config, visual = gate.config, (tokens.image >= 0).to(found["coefficients"].device)
    sinks = {"V": visual & found["V"]}
    if "L" in found:
        sinks["L"] = visual & found["L"] & ~found["V"]
    sinks = {name: mask for name, mask in sinks.items() if name in gate.groups}
    sinks["rest"] = visual & ~torch.stack([*sinks.values()]).any(dim=0)
    edited, untrained = config.edited, config.scale / len(gate.groups)
    for group, values in zip(gate.groups, found["coefficients"].T.tolist(), strict=True):
        counts = sinks[group].sum(dim=1).tolist()
        for row, item in enumerate(items):
            at = {"item": first + row, "image_id": item.image_id, "task": item.task}
            at |= {"layer": edited - 1, "edited": edited, "group": group}
            yield at | {"coefficient": values[row], "untrained": untrained, "tokens": counts[row]}

"""The results of training: gates, history and record; and stacks of gates that were trained alone."""

import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from sinkscope.checks import check_choice, check_whole, typed
from sinkscope.data.batches import read_dataset
from sinkscope.errors import InputError
from sinkscope.lsg.gate import LSG, check_gates
from sinkscope.lsg.passes import GateObjective, frozen
from sinkscope.models.lvlm import LVLM
from sinkscope.results import Result
from sinkscope.training.loop import Loop
from sinkscope.viz.probes import plot_training


@dataclass(frozen=True, eq=False, repr=False)
class TrainResult:
    """Trained gates by layer, with their best weights.

    ``record`` is plain data for a model card: data, settings, losses, versions, machine, time. ``lines``
    are those of `history`.
    """

    gates: Mapping[int | str, LSG]
    record: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]] = ()

    @property
    def gate(self) -> LSG:
        """The gate; an InputError if there are several."""
        if len(self.gates) != 1:
            what = f"Got gates at the layers {list(self.gates)}; expected one."
            raise InputError(f"{what} Choose from result.gates.")
        return next(iter(self.gates.values()))

    @property
    def history(self) -> pd.DataFrame:
        """One line per layer, step and split.

        Columns: layer, step (steps done), epoch, split (``"train"``: this step's rows before the
        step; ``"validation"``), loss (nats per answer token), accuracy (share of answers that
        greedy decoding would write), lr, and the mean coefficient of every group, ``rho_...``.
        """
        by_name = {str(layer): layer for layer in self.gates}
        first = ["layer", "step", "epoch", "split", "loss", "accuracy", "lr"]
        groups = dict.fromkeys(key for line in self.lines for key in line if key.startswith("rho_"))
        lines = [{"layer": by_name[line["name"]], **line} for line in self.lines]
        return pd.DataFrame(lines, columns=[*first, *groups])

    def plot(self) -> Figure:
        """Draw loss and coefficients over steps, as a matplotlib figure."""
        return plot_training(self.history, (self.record.get("base") or {}).get("loss"))

    def estimates(self) -> pd.DataFrame:
        """Give loss and accuracy before and at the best step, and of the plain model, a line per layer."""
        base, found = self.record.get("base") or {}, self.record["results"]
        plain = {f"base_{name}": base[name] for name in ("loss", "accuracy") if base}
        return pd.DataFrame([{"layer": k, **found.get(str(k), {}), **plain} for k in self.gates])

    def summary(self) -> str:
        """Say in words what was trained, on what and how long, with the table of `estimates`."""
        record, many = self.record, len(self.gates)
        trained, held = (
            f"{part['records']} records about {part['images']}"
            for part in (record["data"]["train"], record["data"]["validation"])
        )
        return (
            f"{many} gate{'s' * (many > 1)} of {record['base_model']}: {trained} images, "
            f"{record['steps']} of {record['cost']['steps']} steps in {record['seconds']:.1f} s; "
            f"validated on {held} other images.\n{self.estimates().round(4).to_string(index=False)}"
        )

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        head, table = self.summary().splitlines()[0], self.estimates().round(4)
        return f"<p>{escape(head)}</p>{table.to_html(index=False, border=0)}"


def record_of(
    name: str, facts: Mapping[str, Any], cost: dict[str, Any], loop: Loop, base: dict | None
) -> dict[str, Any]:
    """The record of a finished loop: what it was started with, what came out, and where it ran."""
    results, split = {}, "validation" if loop.held else "train"
    for one in loop.trainees:
        lines = [a for a in loop.history if a["name"] == one.name and a["split"] == split]
        lines = lines or [{"step": 0, "loss": None, "accuracy": None}]
        best = next((line for line in lines if line["step"] == one.best_step), lines[-1])
        pairs = [("first", lines[0]), ("best", best)]
        results[one.name] = {
            "split": split,
            **{f"{which}_{k}": line[k] for k in ("loss", "accuracy") for which, line in pairs},
            "best_step": one.best_step,
            "ended_early": one.ended,
            **({} if one.failed is None else {"failed": one.failed}),
            **{key: value for key, value in best.items() if key.startswith("rho_")},
        }
    packages = ("sinkscope", "torch", "transformers", "accelerate")
    versions = {name: str(sys.modules[name].__version__) for name in packages}
    return {
        **facts,
        "base_model": name,
        "method": "Layer-wise Sink Gating, arXiv 2604.03316",
        "objective": "next-token loss on the answer, model frozen",
        "cost": cost,
        "steps": loop.step,
        "seconds": loop.seconds,
        "base": base,
        "results": results,
        "versions": {**versions, "python": platform.python_version()},
        "machine": {  # what numbers and times depend on; nothing that names the machine
            "system": platform.system(),
            "processor": platform.machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


def own_record(record: Mapping[str, Any], layer: int | str) -> dict[str, Any]:
    """The record of one gate among several: its own start and result, without its config."""
    name, gates, results = str(layer), record["gates"], record["results"]
    out = {key: value for key, value in record.items() if key not in ("gates", "results", "cost")}
    out |= {"layer": layer, "trained_with": [other for other in gates if other != name]}
    return out | {"start": gates[name]["start"], "result": results[name]}


@dataclass(frozen=True, eq=False)
class GateStack(Result):
    """Gates in the order of their single gains, and the scores of the growing stack."""

    ordered: tuple[LSG, ...]  # the one with the largest single gain first
    base: float  # the score without a gate
    single: tuple[float, ...]  # of each gate alone
    stacked: tuple[float, ...]  # of the first gate, the first two, and so on
    score: str  # "loss" or "accuracy"

    @property
    def order(self) -> list[int | str]:
        """The layers, the one with the largest single gain first."""
        return [gate.layer for gate in self.ordered]

    @property
    def gains(self) -> list[float]:
        """The gains of the stack of the first 1, 2, ... gates over no gate; more is better."""
        sign = -1 if self.score == "loss" else 1
        return [sign * (value - self.base) for value in self.stacked]

    @property
    def gates(self) -> list[LSG]:
        """The first gates that together gain most, for ``interventions=``; none if none gains."""
        best = max(self.gains)
        return list(self.ordered[: self.gains.index(best) + 1]) if best > 0 else []

    def to_dataframe(self) -> pd.DataFrame:
        """One line per gate: gates, layer, single, single_gain, stacked, stacked_gain, chosen."""
        many, alone = range(1, len(self.ordered) + 1), replace(self, stacked=self.single).gains
        columns = {"gates": many, "layer": self.order, "single": self.single, "single_gain": alone}
        columns |= {"stacked": self.stacked, "stacked_gain": self.gains}
        return pd.DataFrame(columns | {"chosen": [i <= len(self.gates) for i in many]})

    def __str__(self) -> str:
        table = self.to_dataframe().round(4).to_string(index=False)
        return f"{self.score} without a gate: {self.base:.4f}\n{table}"


@typed
def greedy_stack(
    lvlm: LVLM,
    gates: Sequence[LSG],
    dataset: Iterable[Any],
    *,
    score: str = "loss",
    batch: int = 8,
    append_end: bool = True,
    max_answer_tokens: int = 256,
    progress: bool | None = None,
) -> GateStack:
    """Stack gates that were trained alone, by the gain of each one alone, without training again.

    The order is that of the single gains, as in the paper (2604.03316), where a stack may lose by one
    gate and win by the next. So every prefix is scored, and `GateStack.gates` is the best of them.
    InputError if the data or the score does not fit, or two gates have one layer.

    Args:
        gates: Gates of different layers, such as ``result.gates.values()``.
        dataset: Records to choose by, as for `train_lsg`: neither those trained on nor those that the
            stack is tested on, because its score here is that of the best of many.
        score: ``"loss"``, in nats per answer token, or ``"accuracy"`` of greedy decoding.
        append_end: Whether the token that ends an answer counts too.
        progress: Whether to show a progress bar; None shows it from 50 records on.
    """
    given = check_gates(gates)
    check_choice(("loss", "accuracy"), score=score)
    check_whole(1, batch=batch)
    layers = [gate.layer for gate in given]
    if len(set(layers)) != len(layers):
        raise InputError(f"Got gates of the layers {layers}; expected every layer once.")
    for gate in given:
        gate.check_fits(lvlm)
    data = read_dataset(dataset, lvlm.tokenizer, max_answer_tokens=max_answer_tokens)
    shown = len(data) >= 50 if progress is None else progress

    objective = GateObjective(lvlm, {str(gate.layer): gate for gate in given}, data, append_end)

    def scores(stacks: Sequence[Sequence[LSG]], what: str) -> list[float]:
        lines = objective.means(stacks, range(len(data)), batch, what if shown else "")
        return [line[score] for line in lines]

    with frozen(lvlm.module), torch.no_grad(), objective.batches:
        base, *alone = scores([[], *([gate] for gate in given)], "one by one")
        found = list(zip(alone, given, strict=True))
        found.sort(key=lambda pair: pair[0] if score == "loss" else -pair[0])
        single, ordered = zip(*found, strict=True)
        grown = [ordered[: i + 1] for i in range(1, len(ordered))]
        stacked = (single[0], *(scores(grown, "stacked") if grown else ()))
    return GateStack(ordered, base, single, stacked, score)

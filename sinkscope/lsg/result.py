"""What training gave: gates, history and a record of how it came about."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from sinkscope.checks import check_flags, check_whole
from sinkscope.data.batches import AnswerData, batches_of, make_batch, read_dataset
from sinkscope.errors import InputError
from sinkscope.lsg.gate import LSG, check_gates
from sinkscope.lsg.losses import answer_losses, frozen, share
from sinkscope.results import Result
from sinkscope.training.loop import Sums

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from sinkscope.lsg.gate import LSG
    from sinkscope.lsg.train import TrainingCost
    from sinkscope.models.lvlm import LVLM
    from sinkscope.training.loop import Loop

PACKAGES = ("sinkscope", "torch", "transformers", "accelerate")


@dataclass(frozen=True, eq=False, repr=False)
class TrainResult:
    """Trained gates.

    Attributes:
        gates: By layer, with their best weights.
        record: Plain data for a model card: data, settings, losses, versions, machine, time.
        lines: The history as dicts, see `history`.
    """

    gates: Mapping[int | str, LSG]
    record: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]] = ()

    @property
    def gate(self) -> LSG:
        """The gate, if there is one.

        Raises:
            InputError: If there are several.
        """
        if len(self.gates) != 1:
            raise InputError(
                f"Got a result with gates at the layers {list(self.gates)}; expected one. Choose from "
                "result.gates."
            )
        return next(iter(self.gates.values()))

    @property
    def history(self) -> pd.DataFrame:
        """One line per layer, step and split.

        Columns: layer, step (steps done), epoch, split (``"train"``: this step's rows before the
        step; ``"validation"``), loss (nats per answer token), accuracy (share of answers that
        greedy decoding would write), lr, and the mean coefficient of every group, ``rho_...``.
        """
        import pandas as pd

        by_name = {str(layer): layer for layer in self.gates}
        lines = [{"layer": by_name[line["name"]], **line} for line in self.lines]
        first = ["layer", "step", "epoch", "split", "loss", "accuracy", "lr"]
        groups = dict.fromkeys(key for line in lines for key in line if key.startswith("rho_"))
        return pd.DataFrame(lines, columns=[*first, *groups])

    def plot(self) -> Figure:
        """Loss and coefficients over steps.

        Returns:
            A matplotlib figure.
        """
        from sinkscope.viz.probes import plot_training

        return plot_training(self.history, (self.record.get("base") or {}).get("loss"))

    def summary(self) -> pd.DataFrame:
        """One line per layer: loss and accuracy before and at the best step, beside the plain model."""
        import pandas as pd

        base = self.record.get("base") or {}
        lines = []
        for layer in self.gates:
            found = self.record["results"].get(str(layer), {})
            line = {"layer": layer, **found}
            if base:
                line |= {"base_loss": base["loss"], "base_accuracy": base["accuracy"]}
            lines.append(line)
        return pd.DataFrame(lines)

    def __str__(self) -> str:
        data, record = self.record["data"], self.record
        head = (
            f"{len(self.gates)} gate{'s' if len(self.gates) > 1 else ''} of {record['base_model']}: {data['train']['records']} records "
            f"about {data['train']['images']} images, {record['steps']} of {record['cost']['steps']} "
            f"steps in {record['seconds']:.1f} s; validated on {data['validation']['records']} records "
            f"about {data['validation']['images']} other images."
        )
        return head + "\n" + self.summary().round(4).to_string(index=False)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        head = escape(str(self).split("\n", 1)[0])
        return f"<p>{head}</p>" + self.summary().round(4).to_html(index=False, border=0)


def record_of(
    name: str,
    facts: Mapping[str, Any],
    cost: TrainingCost,
    loop: Loop,
    base: Mapping[str, float] | None,
) -> dict[str, Any]:
    """The record of a run.

    Args:
        name: Of the model.
        facts: What it was started with.
        cost: What it was to cost.
        loop: The finished loop.
        base: Loss and accuracy of the model without a gate on the validation part, or None.
    """
    return {
        **facts,
        "base_model": name,
        "method": "Layer-wise Sink Gating, arXiv 2604.03316",
        "objective": "next-token loss on the answer, model frozen",
        "cost": cost.to_dict(),
        "steps": loop.step,
        "seconds": loop.seconds,
        "base": None if base is None else dict(base),
        "results": {layer: _result_of(loop, layer) for layer in loop.runners},
        "versions": {name: _version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "machine": machine(),
    }


def own_record(record: Mapping[str, Any], layer: int | str) -> dict[str, Any]:
    """The record of one gate among several: its own start and result, without its config."""
    name = str(layer)
    out = {key: value for key, value in record.items() if key not in ("gates", "results", "cost")}
    return {
        **out,
        "layer": layer,
        "trained_with": [other for other in record["gates"] if other != name],
        "start": record["gates"][name]["start"],
        "result": record["results"][name],
    }


def _result_of(loop: Loop, name: str) -> dict[str, Any]:
    """First and best numbers of one trainee, on the validation part where there is one."""
    split = "validation" if loop.held else "train"
    lines = [line for line in loop.history if line["name"] == name and line["split"] == split]
    runner = loop.runners[name]
    at = runner.best_step
    if not lines:
        lines = [{"step": 0, "loss": None, "accuracy": None}]
    best = next((line for line in lines if line["step"] == at), lines[-1])
    means = {key: value for key, value in best.items() if key.startswith("rho_")}
    return {
        "split": split,
        "first_loss": lines[0]["loss"],
        "best_loss": best["loss"],
        "first_accuracy": lines[0]["accuracy"],
        "best_accuracy": best["accuracy"],
        "best_step": at,
        "ended_early": runner.ended,
        **({} if runner.failed is None else {"failed": runner.failed}),
        **means,
    }


def _version(package: str) -> str | None:
    """The installed version, None without one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What numbers and times depend on; nothing that names the machine."""
    found = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "gpu": found,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


SCORES = ("loss", "accuracy")


@dataclass(frozen=True, eq=False)
class GateStack(Result):
    """Gates in the order of their single gains, and what the stack scores as it grows.

    Attributes:
        ordered: All gates, the one with the largest single gain first.
        base: The score without a gate.
        single: The score of each gate alone, in this order.
        stacked: The score of the first gate, the first two, and so on.
        score: ``"loss"`` or ``"accuracy"``.
    """

    ordered: tuple[LSG, ...]
    base: float
    single: tuple[float, ...]
    stacked: tuple[float, ...]
    score: str

    @property
    def order(self) -> list[int | str]:
        """The layers, the one with the largest single gain first."""
        return [gate.layer for gate in self.ordered]

    @property
    def gains(self) -> list[float]:
        """What the stack of the first 1, 2, ... gates gains over no gate; more is better."""
        return [self._gain(value) for value in self.stacked]

    @property
    def gates(self) -> list[LSG]:
        """The first gates that together gain the most, ready for ``interventions=``.

        It is empty if no stack gains anything.
        """
        best = max(range(len(self.gains)), key=lambda i: (self.gains[i], -i))
        return list(self.ordered[: best + 1]) if self.gains[best] > 0 else []

    def _gain(self, value: float) -> float:
        return self.base - value if self.score == "loss" else value - self.base

    def to_dataframe(self) -> pd.DataFrame:
        """One line per gate, in order: gates, layer, single, single_gain, stacked, stacked_gain."""
        import pandas as pd

        chosen = len(self.gates)
        lines = [
            {
                "gates": i + 1,
                "layer": gate.layer,
                "single": self.single[i],
                "single_gain": self._gain(self.single[i]),
                "stacked": self.stacked[i],
                "stacked_gain": self.gains[i],
                "chosen": i < chosen,
            }
            for i, gate in enumerate(self.ordered)
        ]
        return pd.DataFrame(lines)

    def __str__(self) -> str:
        table = self.to_dataframe().round(4).to_string(index=False)
        return f"{self.score} without a gate: {self.base:.4f}\n{table}"

    def _repr_html_(self) -> str:
        head = escape(f"{self.score} without a gate: {self.base:.4f}")
        return f"<p>{head}</p>" + self.to_dataframe().round(4).to_html(index=False, border=0)


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

    Args:
        lvlm: The model.
        gates: Gates of different layers, such as ``result.gates.values()``.
        dataset: Records to choose by, as for `train_lsg`. Use others than those trained on, and test
            the stack on a third part: its score here is that of the best of many.
        score: ``"loss"`` (nats per answer token) or ``"accuracy"`` (answers that greedy decoding
            would write).
        batch: Rows per forward pass.
        append_end: Whether the token that ends an answer counts too.
        max_answer_tokens: The longest answer that is accepted.
        progress: Whether to show a progress bar; None shows it from 50 records on.

    Returns:
        The stack.

    Raises:
        InputError: If the data or the score does not fit, or two gates have one layer.
        InterventionError: If a gate was made for another model.
    """
    given = check_gates(gates)
    if score not in SCORES:
        raise InputError(f"Got score={score!r}; expected one of {SCORES}.")
    check_whole(1, batch=batch)
    check_flags(append_end=append_end)
    layers = [gate.layer for gate in given]
    if len(set(layers)) != len(layers):
        raise InputError(f"Got gates of the layers {layers}; expected every layer once.")
    for gate in given:
        gate.check_fits(lvlm)
    data = read_dataset(dataset, lvlm.tokenizer, max_answer_tokens=max_answer_tokens)
    shown = len(data) >= 50 if progress is None else progress
    with frozen(lvlm.module), torch.no_grad():
        alone: list[list[LSG]] = [[], *([gate] for gate in given)]
        scoring = {"score": score, "batch": batch, "append_end": append_end}
        base, *single = score_stacks(lvlm, alone, data, "one by one", shown, **scoring)
        sign = -1 if score == "loss" else 1
        places = sorted(range(len(given)), key=lambda i: -sign * single[i])
        ordered = [given[i] for i in places]
        grown = [ordered[: i + 1] for i in range(1, len(ordered))]
        more = score_stacks(lvlm, grown, data, "stacked", shown, **scoring) if grown else []
    stacked = (single[places[0]], *more)
    return GateStack(tuple(ordered), base, tuple(single[i] for i in places), stacked, score)


def score_stacks(
    lvlm: LVLM,
    stacks: Sequence[Sequence[LSG]],
    data: AnswerData,
    what: str,
    progress: bool,
    *,
    score: str,
    batch: int,
    append_end: bool,
) -> list[float]:
    """The score of several stacks; what lies below them is computed once per batch.

    Args:
        lvlm: The model, frozen.
        stacks: Each a list of gates; an empty one is the plain model.
        data: The records.
        what: What the progress bar says.
        progress: Whether to show it.
        score: See `greedy_stack`.
        batch: Rows per forward pass.
        append_end: See `greedy_stack`.
    """
    blocks = [gate.config.edited for stack in stacks for gate in stack]
    whole = any(not stack for stack in stacks)
    sums = [Sums() for _ in stacks]
    groups = list(batches_of(range(len(data)), batch))
    for rows in tqdm(groups, desc=what, unit="batch", disable=not progress):
        made = make_batch(lvlm, data, rows, append_end=append_end)
        shared = share(lvlm, made, blocks, whole=whole)
        for stack, total in zip(stacks, sums, strict=True):
            total.add(answer_losses(stack, shared))
    return [total.line()[score] for total in sums]

"""What training gave: gates, history and a record of how it came about."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import torch

from sinkscope.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from sinkscope.lsg.cost import TrainingCost
    from sinkscope.lsg.gate import LSG
    from sinkscope.lsg.loop import Loop

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
        from sinkscope.viz.training import plot_training

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

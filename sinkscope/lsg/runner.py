"""One thing that is trained, with its optimiser, its best weights and the sums of its losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sinkscope.lsg.passes import Losses


@dataclass(frozen=True, eq=False)
class Trainee:
    """Something to train.

    Attributes:
        name: Its name in the history and in files.
        parameters: Its parameters by name; they are trained in place.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]


@dataclass
class Runner:
    """One trainee on its way."""

    trainee: Trainee
    optimizer: torch.optim.AdamW
    best: dict[str, Tensor]
    best_loss: float | None = None
    best_step: int = 0
    waited: int = 0
    ended: bool = False
    failed: str | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that must survive a kill, by flat names."""
        name = self.trainee.name
        out = {f"{name}/weight/{k}": p.detach() for k, p in self.trainee.parameters.items()}
        out |= {f"{name}/best/{k}": value for k, value in self.best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            out |= {f"{name}/adam/{index}/{k}": value for k, value in moments.items()}
        return out

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Go back to what was saved."""
        name = self.trainee.name
        for key, parameter in self.trainee.parameters.items():
            parameter.copy_(tensors[f"{name}/weight/{key}"])
            self.best[key] = tensors[f"{name}/best/{key}"].to(parameter.device)
        state: dict[int, dict[str, Tensor]] = {}
        for path, value in tensors.items():
            if path.startswith(f"{name}/adam/"):
                index, key = path.removeprefix(f"{name}/adam/").split("/")
                state.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.best_loss, self.best_step = data["best_loss"], data["best_step"]
        self.waited, self.ended = data["waited"], data["ended"]
        self.failed = data.get("failed")

    @property
    def numbers(self) -> dict[str, Any]:
        """The rest of it, JSON-ready."""
        return {
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "waited": self.waited,
            "ended": self.ended,
            "failed": self.failed,
        }

    def fail(self, why: str) -> None:
        """End here, with the best weights so far."""
        self.failed, self.ended = why, True

    def keep_best(self, loss: float | None, step: int, patience: int) -> None:
        """Keep the weights if the loss fell; None keeps them without a loss."""
        if loss is None or self.best_loss is None or loss < self.best_loss:
            self.best = {k: p.detach().clone() for k, p in self.trainee.parameters.items()}
            self.best_loss, self.best_step, self.waited = loss, step, 0
        else:
            self.waited += 1
            self.ended = bool(patience) and self.waited >= patience


@dataclass
class Sums:
    """Sums over rows, of one trainee."""

    loss: float = 0.0
    tokens: int = 0
    rows: int = 0
    correct: int = 0
    notes: dict[str, float] = field(default_factory=dict)

    def add(self, losses: Losses) -> None:
        """Add a batch."""
        rows = len(losses.correct)
        self.loss += float(losses.total.detach())
        self.tokens += losses.tokens
        self.rows += rows
        self.correct += int(losses.correct.sum())
        for name, value in losses.notes.items():
            self.notes[name] = self.notes.get(name, 0.0) + value * rows

    def line(self) -> dict[str, float]:
        """Means: loss per answer token, accuracy per row, notes per row."""
        means = {name: value / self.rows for name, value in self.notes.items()}
        return {"loss": self.loss / self.tokens, "accuracy": self.correct / self.rows, **means}

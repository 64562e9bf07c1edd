"""One thing that is trained, with its optimiser, its best weights and the sums of its losses."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from sinkscope.errors import CheckpointError, NonFiniteError
from sinkscope.files import claim, read_json, write_whole
from sinkscope.training.settings import TrainingSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sinkscope.lsg.losses import Losses


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


NAME = re.compile(r"checkpoint-(\d{6,})")


def open_run(folder: Path, identity: Mapping[str, Any]) -> None:
    """Note what a run is started with, or compare it with what was noted; see `claim`."""
    claim(folder, "run.json", identity, "run")


def save_state(
    folder: Path, step: int, tensors: Mapping[str, Tensor], data: Mapping[str, Any]
) -> None:
    """Write the state after a step; the one before is removed afterwards.

    Args:
        folder: The run's folder.
        step: Steps done.
        tensors: Flat, by name.
        data: JSON-ready values.
    """
    final = folder / f"checkpoint-{step:06d}"
    made = final.with_suffix(".tmp")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(whole, made / "state.safetensors")
    _sync(made / "state.safetensors")
    write_whole(made / "state.json", json.dumps(data, allow_nan=False))
    if final.exists():  # the same step again: nothing to add
        shutil.rmtree(made)
    else:
        made.rename(final)
        _sync(folder)
    for path in _checkpoints(folder):
        if path != final:
            shutil.rmtree(path)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest state, or None if there is none yet.

    Raises:
        CheckpointError: If it cannot be read.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        tensors = load_file(newest / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Got {str(newest)!r}, whose state.safetensors cannot be read ({error}); expected a whole "
            "file. Remove this folder to train from the start."
        ) from error
    again = f"Remove {str(newest)!r} to start again."
    return tensors, read_json(newest / "state.json", again)


def _checkpoints(folder: Path) -> list[Path]:
    """Finished states, the newest last."""
    found = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [path for _, path in sorted((int(m[1]), path) for m, path in found if m)]


def _sync(path: Path) -> None:
    """Ask the system to write a file or folder to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Objective(Protocol):
    """What to train for."""

    def share(self, rows: Sequence[int]) -> Any:
        """What all trainees need of some rows, computed once without gradient."""
        ...

    def losses(self, shared: Any, name: str) -> Losses:
        """The losses of these rows for one trainee, with a graph if gradients are on."""
        ...


@dataclass(eq=False)
class Loop:
    """A training run.

    Attributes:
        trainees: What is trained.
        objective: What for.
        rows: Indices of the training part.
        held: Indices of the validation part, or none.
        settings: How.
        folder: Where checkpoints go, or None for nowhere.
        checkpoint_every: Steps between two checkpoints.
        progress: Whether to show a progress bar.
        accelerator: Processes to share the rows with, or None for this one alone.
        history: One line per trainee, step and split.
        step: Steps done.
        seconds: Wall time spent, up to now and before the last kill.
    """

    trainees: Sequence[Trainee]
    objective: Objective
    rows: Sequence[int]
    held: Sequence[int]
    settings: TrainingSettings
    folder: Path | None = None
    checkpoint_every: int = 100
    progress: bool = True
    accelerator: Accelerator | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.runners = {t.name: self._runner(t) for t in self.trainees}
        count = 1 if self.accelerator is None else self.accelerator.num_processes
        self.size = self.settings.batch * self.settings.accumulate * count
        self.per_epoch = -(-len(self.rows) // self.size)
        self.steps = self.per_epoch * self.settings.epochs

    def _runner(self, trainee: Trainee) -> Runner:
        parameters = list(trainee.parameters.values())
        decay = self.settings.weight_decay
        optimizer = torch.optim.AdamW(parameters, lr=self.settings.lr, weight_decay=decay)
        start = {k: p.detach().clone() for k, p in trainee.parameters.items()}
        return Runner(trainee, optimizer, start)

    def run(self) -> None:
        """Train to the end, from the newest checkpoint if there is one; the best weights remain.

        A trainee whose loss, gradient or weights are NaN or infinite ends with the best weights that it
        had, and the others go on. Several processes stop all, because each sees other rows.

        Raises:
            NonFiniteError: If that happened to all of them.
        """
        self._restore()
        self._since = time.monotonic() - self.seconds
        if self.step == 0 and not self.history:
            self._validate()
        with tqdm(
            total=self.steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not (self.progress and self._main),
        ) as bar:
            while self.step < self.steps and self._active:
                self._one_step(bar)
                done = self.step == self.steps
                every = self.settings.evaluate_every or self.per_epoch
                if done or self.step % every == 0:
                    self._validate()
                if done or self.step % self.checkpoint_every == 0 or not self._active:
                    self._save()
        self.seconds = time.monotonic() - self._since
        self._tell()
        with torch.no_grad():
            for runner in self.runners.values():
                for key, parameter in runner.trainee.parameters.items():
                    parameter.copy_(runner.best[key])
                    parameter.grad = None

    @property
    def _active(self) -> list[Runner]:
        """Those that have not ended early."""
        return [runner for runner in self.runners.values() if not runner.ended]

    @property
    def _main(self) -> bool:
        """Whether this process writes files."""
        return self.accelerator is None or self.accelerator.is_main_process

    def plan(self, step: int) -> list[tuple[int, ...]]:
        """The rows of one step for this process, in groups of ``batch``.

        Every epoch has an order of its own, which depends on the seed only.
        """
        epoch, place = divmod(step, self.per_epoch)
        made = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.rows), generator=made).tolist()
        rows = [self.rows[i] for i in order[place * self.size : (place + 1) * self.size]]
        return self._mine(rows)

    def _mine(self, rows: Sequence[int]) -> list[tuple[int, ...]]:
        """This process' share of rows, in groups."""
        a, size = self.accelerator, self.settings.batch
        own = rows if a is None else rows[a.process_index :: a.num_processes]
        return [tuple(own[start : start + size]) for start in range(0, len(own), size)]

    def _one_step(self, bar: Any) -> None:
        """One step of every trainee that has not ended."""
        active, lr = self._active, self.settings.lr_at(self.step, self.steps)
        sums = {runner.trainee.name: Sums() for runner in active}
        for runner in active:
            runner.optimizer.zero_grad()
        for rows in self.plan(self.step):
            with torch.no_grad():
                shared = self.objective.share(rows)
            for runner in self._still(active):
                losses = self.objective.losses(shared, runner.trainee.name)
                if self._finite(losses.total, runner, "loss", lr):
                    losses.total.backward()
                    sums[runner.trainee.name].add(losses)
        for runner in self._still(active):
            total = self._gathered(sums[runner.trainee.name])
            if self._update(runner, total.tokens, lr):
                self._note(runner, "train", total, lr)
        self.step += 1
        losses = [line["loss"] for line in self.history[-len(active) :]]
        if losses:
            bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}", refresh=False)
        bar.update()

    @staticmethod
    def _still(runners: Sequence[Runner]) -> list[Runner]:
        """Those that have not failed meanwhile."""
        return [runner for runner in runners if runner.failed is None]

    def _update(self, runner: Runner, tokens: int, lr: float) -> bool:
        """Take a step along the mean gradient of all answer tokens, of all processes, if it is finite."""
        parameters = list(runner.trainee.parameters.values())
        for parameter in parameters:
            whole: Any = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if self.accelerator is not None:
                whole = self.accelerator.reduce(whole, "sum")
            parameter.grad = whole / tokens
        length = nn.utils.clip_grad_norm_(parameters, self.settings.clip or float("inf"))
        if not self._finite(length, runner, "gradient", lr):
            return False
        for group in runner.optimizer.param_groups:
            group["lr"] = lr
        runner.optimizer.step()
        return True

    def _finite(self, value: Tensor, runner: Runner, what: str, lr: float) -> bool:
        """Whether a number is one; if not, its trainee ends.

        Raises:
            NonFiniteError: If none is left, or several processes would disagree.
        """
        if bool(torch.isfinite(value).all()):
            return True
        name = runner.trainee.name
        found = f" of {float(value.detach())}" if value.numel() == 1 else ""
        why = (
            f"Got a {what}{found} for {name!r} in step {self.step + 1}, at lr={lr:.2g}; expected "
            "finite numbers. Try a lower lr, or dtype='bfloat16' instead of float16."
        )
        runner.fail(why)
        several = self.accelerator is not None and self.accelerator.num_processes > 1
        if several or not self._still(list(self.runners.values())):
            raise NonFiniteError(why)
        return False

    def _tell(self) -> None:
        """Warn of trainees that ended because of a number that is none."""
        for runner in self.runners.values():
            if runner.failed is not None:
                warnings.warn(
                    f"{runner.failed} The others were trained to the end; this one has its weights of "
                    f"step {runner.best_step}.",
                    UserWarning,
                    stacklevel=4,
                )

    @torch.no_grad()
    def _validate(self) -> None:
        """Look at the validation part, and keep the best weights; without one, the newest."""
        active = self._active
        if not self.held:
            for runner in active:
                weights = [p.flatten() for p in runner.trainee.parameters.values()]
                if self._finite(torch.cat(weights), runner, "weight", self.settings.lr):
                    runner.keep_best(None, self.step, 0)
            return
        sums = {runner.trainee.name: Sums() for runner in active}
        for rows in self._mine(self.held):
            shared = self.objective.share(rows)
            for runner in self._still(active):
                losses = self.objective.losses(shared, runner.trainee.name)
                if self._finite(losses.total, runner, "loss", self.settings.lr):
                    sums[runner.trainee.name].add(losses)
        for runner in self._still(active):
            total = self._gathered(sums[runner.trainee.name])
            line = self._note(runner, "validation", total, None)
            runner.keep_best(line["loss"], self.step, self.settings.patience)

    def _gathered(self, sums: Sums) -> Sums:
        """The sums of all processes."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return sums
        names = sorted({name for part in self._all_names(sums) for name in part})
        numbers = [sums.loss, sums.tokens, sums.rows, sums.correct]
        numbers += [sums.notes.get(name, 0.0) for name in names]
        given = torch.tensor(numbers, dtype=torch.float64, device=self.accelerator.device)
        summed: Any = self.accelerator.reduce(given, "sum")
        loss, tokens, rows, correct, *notes = summed.tolist()
        by_name = dict(zip(names, notes, strict=True))
        return Sums(loss, round(tokens), round(rows), round(correct), by_name)

    def _all_names(self, sums: Sums) -> list[list[str]]:
        """The names of notes in every process; one without rows has none."""
        from accelerate.utils import gather_object

        return gather_object([list(sums.notes)])

    def _note(self, runner: Runner, split: str, total: Sums, lr: float | None) -> dict[str, Any]:
        """Add a line to the history."""
        done = self.step if split == "validation" else self.step + 1
        line = {
            "name": runner.trainee.name,
            "step": done,
            "epoch": done / self.per_epoch,
            "split": split,
            "lr": lr,
            **total.line(),
        }
        self.history.append(line)
        return line

    def _save(self) -> None:
        """Write a checkpoint."""
        if self.folder is None or not self._main:
            return
        tensors: dict[str, Tensor] = {}
        for runner in self.runners.values():
            tensors |= runner.tensors
        numbers = {name: runner.numbers for name, runner in self.runners.items()}
        data = {
            "step": self.step,
            "seconds": time.monotonic() - self._since,
            "runners": numbers,
            "history": self.history,
        }
        save_state(self.folder, self.step, tensors, data)

    def _restore(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        found = None if self.folder is None else load_state(self.folder)
        if found is None:
            return
        tensors, data = found
        for name, runner in self.runners.items():
            runner.restore(tensors, data["runners"][name])
        self.step, self.history, self.seconds = data["step"], data["history"], data["seconds"]

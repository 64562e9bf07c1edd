"""Train named parameters on batches of records, with checkpoints, validation and early ends."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from sinkscope.data.batches import batches_of
from sinkscope.errors import CheckpointError, ModelError, NonFiniteError
from sinkscope.files import folder_whole, read_json, seal, unseal, writable
from sinkscope.results.saving import digest_beside
from sinkscope.training import TrainingSettings


@dataclass(frozen=True, eq=False)
class Losses:
    """How well the answers of a batch are predicted."""

    total: Tensor  # the sum of the next-token losses of all ``tokens`` of answers, in nats
    tokens: int
    correct: Tensor  # bool ``[row]``: whether greedy decoding writes the answer
    notes: Mapping[str, Tensor]  # means over the rows to keep in the history, one number by name


class Objective(Protocol):
    """What to train for."""

    def share(self, rows: Sequence[int], then: Sequence[int] = ()) -> Any:
        """Compute once, without gradient, what all trainees need of some rows; ``then`` are the next."""

    def losses(self, shared: Any, name: str) -> Losses:
        """Compute the losses of these rows for one trainee, with a graph if gradients are on."""
        ...


class Sums(dict[str, float]):
    """Sums over rows, of one trainee: loss, tokens, rows, correct, and notes by name."""

    @classmethod
    def of(cls, losses: Sequence[Losses]) -> list[Sums]:
        """The sums of one batch for every trainee, which leave the device here, at once."""
        every = [(one.total.detach(), one.correct.sum(), *one.notes.values()) for one in losses]
        numbers = [x.to(every[0][0].device) for own in every for x in own]  # from wherever they are
        told = iter(torch.stack(numbers).tolist() if every else ())
        out = []
        for one in losses:
            rows, loss, correct = len(one.correct), next(told), int(next(told))
            more = {"loss": loss, "tokens": one.tokens, "rows": rows, "correct": correct}
            out.append(cls({name: next(told) * rows for name in one.notes} | more))
        return out

    def merge(self, other: Mapping[str, float]) -> None:
        """Add the sums of other rows."""
        self.update({name: self.get(name, 0) + value for name, value in other.items()})

    def line(self) -> dict[str, float]:
        """Means: loss per answer token, accuracy per row, notes per row."""
        counted, accuracy = ("loss", "tokens", "rows", "correct"), self["correct"] / self["rows"]
        notes = {name: value / self["rows"] for name, value in self.items() if name not in counted}
        return {"loss": self["loss"] / self["tokens"], "accuracy": accuracy, **notes}


@dataclass(eq=False)
class Trainee:
    """Parameters to train, by name and in place; a loop sets the other attributes."""

    NUMBERS: ClassVar = ("best_loss", "best_step", "waited", "ended", "failed")
    name: str
    parameters: Mapping[str, nn.Parameter]
    best_loss: float | None = None
    best_step: int = 0
    waited: int = 0
    ended: bool = False
    failed: str | None = None
    optimizer: torch.optim.Optimizer = field(init=False)
    best: dict[str, Tensor] = field(init=False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that a run needs to continue, by flat names."""
        parts: dict[str, Mapping[str, Tensor]] = {"weight": self.parameters, "best": self.best}
        moments = self.optimizer.state_dict()["state"].items()
        parts |= {f"adam/{index}": values for index, values in moments}
        named = [(f"{part}/{k}", x) for part, values in parts.items() for k, x in values.items()]
        return {f"{self.name}/{path}": x.detach().cpu().contiguous() for path, x in named}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take the state that was saved."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, parameter in self.parameters.items():
            parameter.copy_(tensors[f"{self.name}/weight/{key}"])
            self.best[key] = tensors[f"{self.name}/best/{key}"].to(parameter.device)
        for path, value in tensors.items():
            if path.startswith(start := f"{self.name}/adam/"):
                index, key = path.removeprefix(start).split("/")
                state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        for key in self.NUMBERS:
            setattr(self, key, numbers.get(key))

    def keep_best(self, loss: float | None, step: int, patience: int) -> None:
        """Keep the weights if the loss fell; None keeps them without a loss."""
        if loss is None or self.best_loss is None or loss < self.best_loss:
            self.best = {k: p.detach().clone() for k, p in self.parameters.items()}
            self.best_loss, self.best_step, self.waited = loss, step, 0
        else:
            self.waited += 1
            self.ended = bool(patience) and self.waited >= patience


@lru_cache(maxsize=2)
def _order(many: int, seed: int) -> list[int]:
    """An order of so many rows."""
    return torch.randperm(many, generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(eq=False)
class Loop:
    """Train ``trainees`` for an ``objective``."""

    trainees: Sequence[Trainee]
    objective: Objective
    rows: Sequence[int]  # indices of the training part
    held: Sequence[int]  # indices of the validation part, or none
    settings: TrainingSettings
    folder: Path | None = None  # where checkpoints go; None for nowhere
    checkpoint_every: int = 100
    progress: bool = True
    accelerator: Accelerator | None = None  # processes to share the rows with
    facts: Any = None  # JSON-ready: what a run must have been started with to be continued
    history: list[dict[str, Any]] = field(default_factory=list)  # by trainee, step and split
    step: int = 0  # steps done
    seconds: float = 0.0  # wall time, that before a kill included

    def __post_init__(self) -> None:
        a = self.accelerator
        self.place, self.processes = (0, 1) if a is None else (a.process_index, a.num_processes)
        self.writes = a is None or a.is_main_process
        self.per_epoch = self.settings.per_epoch(len(self.rows), self.processes)
        self.steps = self.per_epoch * self.settings.epochs
        self.every = self.settings.evaluate_every or self.per_epoch
        lr, decay = self.settings.lr, self.settings.weight_decay
        for trainee in self.trainees:
            given = list(trainee.parameters.values())
            trainee.optimizer = torch.optim.AdamW(given, lr=lr, weight_decay=decay)
            trainee.ended, trainee.failed = False, None
            trainee.keep_best(None, 0, 0)

    def run(self) -> None:
        """Train to the end, from the newest checkpoint if there is one; the best weights remain.

        A trainee whose loss, gradient or weights are NaN or infinite ends with its best weights until then,
        and the others continue. NonFiniteError if none is left, or if rows are shared by processes.
        """
        if not self.step:  # else the caller has resumed it
            self.resume()
        self._since = time.monotonic() - self.seconds
        if self.step == 0 and not self.history:
            self._validate()
        steps = {"total": self.steps, "initial": self.step, "unit": "step"}
        with tqdm(**steps, desc="training", disable=not (self.progress and self.writes)) as bar:
            while self.step < self.steps and self._active:
                self._one_step(bar)
                done = self.step == self.steps
                if done or self.step % self.every == 0:
                    self._validate()
                if done or self.step % self.checkpoint_every == 0 or not self._active:
                    self._save()
        self.seconds = time.monotonic() - self._since
        for trainee in self.trainees:
            if trainee.failed is not None:
                rest = f"The others go on; this one has its weights of step {trainee.best_step}."
                warnings.warn(f"{trainee.failed} {rest}", UserWarning, stacklevel=3)
            for key, parameter in trainee.parameters.items():
                parameter.data.copy_(trainee.best[key])
                parameter.grad = None

    def resume(self) -> bool:
        """Take the newest checkpoint, if there is one, and say whether nothing is left to train.

        CheckpointError if it was damaged, or is of another run.
        """
        for newest in self._checkpoints[-1:]:
            again = f"Remove {str(newest)!r} to start again."
            try:
                tensors = load_file(newest / "state.safetensors")
            except (OSError, SafetensorError) as error:
                what = f"Got {str(newest)!r}, whose state.safetensors cannot be read ({error})"
                raise CheckpointError(f"{what}; expected a whole file. {again}") from error
            data = read_json(newest / "state.json", again)
            data = unseal(data, newest, again, digest_beside(self.facts, tensors))
            for trainee in self.trainees:
                trainee.restore(tensors, data["runners"][trainee.name])
            self.step, self.history, self.seconds = data["step"], data["history"], data["seconds"]
        return self.step >= self.steps or not self._active

    @property
    def _active(self) -> list[Trainee]:
        return [one for one in self.trainees if not one.ended]

    def plan(self, step: int) -> list[tuple[int, ...]]:
        """The rows of a step for this process, in groups; each epoch has its own order, by the seed."""
        epoch, place = divmod(step, self.per_epoch)
        order = _order(len(self.rows), self.settings.seed * 1_000_003 + epoch)
        size = self.settings.batch * self.settings.accumulate * self.processes
        return self._own([self.rows[i] for i in order[place * size :][:size]])

    def _own(self, rows: Sequence[int]) -> list[tuple[int, ...]]:
        """This process' share of rows, in groups."""
        return list(batches_of(rows[self.place :: self.processes], self.settings.batch))

    def _then(self, step: int, *, looked: bool = False) -> tuple[int, ...]:
        """The rows that are read first behind this many steps: to validate, unless ``looked``, or to train."""
        groups = self.plan(step) if step < self.steps else []
        if self.held and not looked and (step == self.steps or step % self.every == 0):
            groups = self._own(self.held)
        return groups[0] if groups else ()

    def _one_step(self, bar: Any) -> None:
        before, lr, a = self._active, self.settings.lr_at(self.step, self.steps), self.accelerator
        for trainee in before:
            trainee.optimizer.zero_grad()
        then = self._then(self.step + 1)
        summed, lengths = self._summed(self.plan(self.step), then, lr, train=True), []
        for trainee, total in summed:
            parameters = list(trainee.parameters.values())
            if self.processes == 1 and all(p.grad is None for p in parameters):
                raise unreached(trainee.name)
            for parameter in parameters:  # the mean gradient of all answer tokens of all processes
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                whole: Any = own if a is None else a.reduce(own, "sum")
                parameter.grad = whole / total["tokens"]
            lengths.append(nn.utils.clip_grad_norm_(parameters, self.settings.clip or math.inf))
        every = torch.stack(lengths).tolist() if lengths else []  # they leave the device at once
        for (trainee, total), length in zip(summed, every, strict=True):
            if self._finite(length, trainee, "gradient", lr):
                trainee.optimizer.param_groups[0]["lr"] = lr
                trainee.optimizer.step()
                self._note(trainee, "train", self.step + 1, total, lr)
        self.step += 1
        losses = [line["loss"] for line in self.history[-len(before) :]]
        bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}", refresh=False)
        bar.update()

    @torch.no_grad()
    def _validate(self) -> None:
        """Keep the weights of the lowest validation loss; without a validation part, the newest."""
        lr = self.settings.lr
        then, groups = self._then(self.step, looked=True), self._own(self.held)
        for trainee, total in self._summed(groups, then, lr) if self.held else ():
            self._note(trainee, "validation", self.step, total, None)
            trainee.keep_best(total.line()["loss"], self.step, self.settings.patience)
        for trainee in () if self.held else self._active:
            weights = torch.cat([p.flatten() for p in trainee.parameters.values()])
            good = 0.0 if bool(weights.isfinite().all()) else math.nan
            if self._finite(good, trainee, "weight", lr):
                trainee.keep_best(None, self.step, 0)

    def _summed(
        self, groups: Sequence[Any], then: Sequence[int], lr: float, *, train: bool = False
    ) -> list[tuple[Trainee, Sums]]:
        """Every active trainee with its sums over rows of all processes; ``train`` adds gradients."""
        sums = {trainee.name: Sums() for trainee in self._active}
        for at, rows in enumerate(groups):
            with torch.no_grad():
                shared = self.objective.share(rows, [*groups, then][at + 1])
            active, found = self._active, []
            for trainee in active:
                losses = self.objective.losses(shared, trainee.name)
                if train and not losses.total.requires_grad:
                    raise unreached(trainee.name)
                if train:  # also of a loss that is not finite, whose trainee ends below
                    losses.total.backward()
                found.append(replace(losses, total=losses.total.detach()))
            for trainee, own in zip(active, Sums.of(found), strict=True):
                if self._finite(own["loss"], trainee, "loss", lr):
                    sums[trainee.name].merge(own)
        for name, own in sums.items() if self.processes > 1 else ():
            sums[name] = Sums()
            for part in gather_object([own]):
                sums[name].merge(part)
        return [(trainee, sums[trainee.name]) for trainee in self._active]

    def _finite(self, value: float, trainee: Trainee, what: str, lr: float) -> bool:
        """Whether a number is finite; if not, its trainee ends, or all do: see `run`."""
        if math.isfinite(value):
            return True
        found = "" if what == "weight" else f" of {value}"
        trainee.ended = True
        trainee.failed = (
            f"Got a {what}{found} for {trainee.name!r} in step {self.step + 1}, at lr={lr:.2g}; "
            "expected finite numbers. Try a lower lr, or dtype='bfloat16' instead of float16."
        )
        if self.processes > 1 or all(one.failed is not None for one in self.trainees):
            raise NonFiniteError(trainee.failed)
        return False

    def _note(self, one: Trainee, split: str, done: int, total: Sums, lr: float | None) -> None:
        line = {"name": one.name, "step": done, "epoch": done / self.per_epoch, "split": split}
        self.history.append(line | {"lr": lr} | total.line())

    def _save(self) -> None:
        """Write a checkpoint, whole or not at all; the one before is removed afterwards."""
        if self.folder is None or not self.writes:
            return
        numbers = {t.name: {n: getattr(t, n) for n in t.NUMBERS} for t in self.trainees}
        seconds = time.monotonic() - self._since
        data = {"step": self.step, "seconds": seconds, "runners": numbers, "history": self.history}
        tensors = {k: v for trainee in self.trainees for k, v in trainee.tensors.items()}
        state = json.dumps(seal(data, digest_beside(self.facts, tensors)), allow_nan=False)
        with writable(self.folder):
            with folder_whole(self.folder / f"checkpoint-{self.step:06d}") as made:
                (made / "state.safetensors").write_bytes(save(tensors))
                (made / "state.json").write_text(state, encoding="utf-8")
            for path in self._checkpoints[:-1]:
                shutil.rmtree(path)

    @property
    def _checkpoints(self) -> list[Path]:
        """Finished states, the newest last."""
        if self.folder is None:
            return []
        with writable(self.folder):
            paths = list(self.folder.iterdir())
        found = [path for path in paths if re.fullmatch(r"checkpoint-\d{6,}", path.name)]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def unreached(name: str) -> ModelError:
    """The error of a loss that does not depend on what is trained."""
    got = f"No gradient of the loss reaches {name}: a kernel passes none; expected one. Load the"
    return ModelError(f"{got} model without quantisation.")

"""How something small is trained: numbers with documented defaults, checked when they are given."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from sinkscope.checks import check_whole
from sinkscope.errors import InputError, nearest

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class TrainingSettings:
    """How something small is trained.

    The paper (2604.03316) publishes two epochs. It publishes no optimiser, learning rate, schedule
    or batch size: the other defaults are ours.

    Attributes:
        epochs: Passes over the training part.
        batch: Rows per forward pass, of every process.
        accumulate: Forward passes per step. Their answer tokens count alike, so the step is that of
            one batch of ``batch * accumulate`` rows.
        lr: Highest learning rate of AdamW.
        weight_decay: Of AdamW.
        schedule: ``"cosine"`` falls to 0 at the last step; ``"constant"`` stays.
        warmup: Share of all steps during which the rate rises to ``lr``.
        clip: Longest gradient of a step (Euclidean norm); 0 for no limit.
        evaluate_every: Steps between two looks at the validation part; 0 looks after every epoch.
        patience: Stop after so many looks without a lower loss; 0 never stops early.
        seed: Of the order of the records and of the split.
    """

    epochs: int = 2
    batch: int = 8
    accumulate: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.01
    schedule: str = "cosine"
    warmup: float = 0.03
    clip: float = 1.0
    evaluate_every: int = 0
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(1, epochs=self.epochs, batch=self.batch, accumulate=self.accumulate)
        check_whole(0, evaluate_every=self.evaluate_every, patience=self.patience, seed=self.seed)
        for name in ("lr", "weight_decay", "warmup", "clip"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0 or (name == "lr" and value == 0):
                raise InputError(f"Got {name}={value!r}; expected a positive number.")
        if self.warmup > 1:
            raise InputError(
                f"Got warmup={self.warmup}; expected a share of all steps, from 0 to 1. Write "
                "warmup=0.03."
            )
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"Got schedule={self.schedule!r}; expected one of {SCHEDULES}. "
                f"{nearest(str(self.schedule), SCHEDULES)}"
            )

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of one step.

        Args:
            step: The step, from 0.
            steps: How many there are.
        """
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        if self.schedule == "constant":
            return self.lr
        done = (step - rising) / max(1, steps - rising)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

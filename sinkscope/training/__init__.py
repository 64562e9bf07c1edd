"""One training loop and its settings, for small sets of parameters of a frozen model: gates, LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sinkscope.checks import check_choice, check_number, check_whole, plain
from sinkscope.errors import InputError


@dataclass(frozen=True)
class TrainingSettings:
    """The numbers of a training run; an InputError if one is impossible.

    The paper (2604.03316) publishes two epochs and no other number; the other defaults are ours.

    Attributes:
        batch: Rows per forward pass, of every process.
        accumulate: Forward passes per step, which count as one batch of all their rows.
        lr: The highest learning rate of AdamW.
        schedule: ``"cosine"`` falls to 0 at the last step, ``"constant"`` stays.
        warmup: The share of all steps during which the rate rises to ``lr``.
        clip: The largest Euclidean norm of a step's gradient; 0 for no limit.
        evaluate_every: Steps between two validations; 0 validates after every epoch.
        patience: Validations without a lower loss that end a run; 0 for no early end.
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
        check_number(above=0, lr=self.lr)
        check_number(0, weight_decay=self.weight_decay, warmup=self.warmup, clip=self.clip)
        if self.warmup > 1:
            raise InputError(f"Got warmup={self.warmup}; expected a share of all steps, 0 to 1.")
        check_choice(("cosine", "constant"), schedule=self.schedule)

    @classmethod
    def of(cls, settings: TrainingSettings | None, given: Mapping[str, Any]) -> TrainingSettings:
        """``settings``, or new ones with the fields in ``given`` that are not None; never both."""
        chosen = {f.name: given[f.name] for f in fields(cls) if given.get(f.name) is not None}
        if settings is None:
            return cls(**chosen)
        if chosen or not isinstance(settings, cls):
            what = f"Got settings={settings!r} and {chosen}; expected TrainingSettings alone."
            raise InputError(f"{what} Write settings=TrainingSettings(lr=1e-2), or lr=1e-2.")
        return settings

    def per_epoch(self, rows: int, processes: int = 1) -> int:
        """Count the steps of one epoch over ``rows`` records that ``processes`` share."""
        return -(-rows // (self.batch * self.accumulate * processes))

    def lr_at(self, step: int, steps: int) -> float:
        """Compute the learning rate of one step (counted from 0) of ``steps``."""
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        falling = self.schedule == "cosine"
        done = (step - rising) / max(1, steps - rising) if falling else 0.0
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def to_dict(self) -> dict[str, Any]:
        """Give the settings as plain data."""
        return {name: plain(value) for name, value in asdict(self).items()}

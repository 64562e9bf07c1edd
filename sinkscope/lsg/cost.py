"""What training gates will cost, in passes of one block over one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sinkscope.training.settings import TrainingSettings


@dataclass(frozen=True)
class TrainingCost:
    """What training will cost, in passes of one block over one batch.

    A block that carries a gradient is run forward and, for the gradient of what it reads, backward;
    its weights get none. Both count as one pass each.

    Attributes:
        steps: Steps of the optimiser.
        batches: Forward batches of training.
        looks: Validations, the first before training.
        held_batches: Batches of each validation.
        vision_blocks: Vision blocks per batch, without gradient.
        plain_blocks: Decoder blocks per batch without gradient, shared by all gates.
        gate_blocks: Decoder blocks per batch with gradient, of each gate.
        alone_blocks: Plain decoder blocks per batch, of each gate if it were trained alone.
        decoder_blocks: Blocks of the decoder, which the plain model runs once per validation batch.
    """

    steps: int
    batches: int
    looks: int
    held_batches: int
    vision_blocks: int
    plain_blocks: int
    gate_blocks: tuple[int, ...]
    alone_blocks: tuple[int, ...]
    decoder_blocks: int

    @property
    def together(self) -> int:
        """Decoder passes of one training batch, all gates together."""
        return self.plain_blocks + 2 * sum(self.gate_blocks)

    @property
    def apart(self) -> int:
        """Decoder passes of one training batch of every gate, each trained alone."""
        return sum(self.alone_blocks) + 2 * sum(self.gate_blocks)

    @property
    def bound(self) -> float:
        """``apart / together``; for a gate at every layer of a deep decoder it tends to 1.5."""
        return self.apart / self.together

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"together": self.together, "apart": self.apart, "bound": self.bound}

    def __str__(self) -> str:
        seen, held = self.batches, self.looks * self.held_batches
        plain = self.held_batches if self.looks else 0
        graph = sum(self.gate_blocks)
        blocks = (self.plain_blocks + graph) * held + self.decoder_blocks * plain
        return (
            f"{self.steps} steps, {seen} training batches; {self.looks} looks at "
            f"{self.held_batches} validation batches.\n"
            f"Training batch: {self.vision_blocks} vision blocks and {self.plain_blocks} decoder "
            f"blocks without gradient, then {graph} decoder blocks forward and backward for "
            f"{len(self.gate_blocks)} gates.\n"
            f"Together {self.together * seen} decoder block passes; trained one by one "
            f"{self.apart * seen} ({self.bound:.2f} times as many).\n"
            f"Validation, and the plain model on it, add {blocks} decoder block passes and "
            f"{self.vision_blocks * (held + plain)} of the vision tower, without gradient."
        )


def cost_of(
    settings: TrainingSettings,
    edited: Sequence[int],
    rows: int,
    held: int,
    vision_blocks: int,
    decoder_blocks: int,
    processes: int = 1,
) -> TrainingCost:
    """Count a run of ``rows`` training and ``held`` validation records that ends late, per process.

    ``edited`` is the block whose keys each gate scales.
    """
    own, own_held = -(-rows // processes), -(-held // processes)
    per_epoch = settings.per_epoch(rows, processes)
    steps = per_epoch * settings.epochs
    looks = 1 + -(-steps // (settings.evaluate_every or per_epoch))
    return TrainingCost(
        steps=steps,
        batches=-(-own // settings.batch) * settings.epochs,
        looks=looks if held else 0,
        held_batches=-(-own_held // settings.batch),
        vision_blocks=vision_blocks,
        plain_blocks=max(edited),
        gate_blocks=tuple(decoder_blocks - block for block in edited),
        alone_blocks=tuple(edited),
        decoder_blocks=decoder_blocks,
    )

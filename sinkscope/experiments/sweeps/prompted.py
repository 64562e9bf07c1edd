"""One question of a sweep, prepared: its tokens, its options, and which of its keys are scaled by what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from sinkscope.detectors.rules import Detector
from sinkscope.experiments.sweeps.edits import Batch, Edits, factors_of
from sinkscope.experiments.sweeps.grid import Cells
from sinkscope.experiments.sweeps.groups import l_sinks
from sinkscope.experiments.sweeps.scores import Asked, Score

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.prepare import Sample


@dataclass(frozen=True)
class Rules:
    """What is the same for every image of a sweep.

    Attributes:
        cells: Layers and pairs.
        score: How an answer is scored.
        detector: The rule for V-sinks.
        merge: See `sinkscope.trace_sinks`.
        batch: How many edits run together.
        l_detector: The rule for L-sinks; None for pairs of coefficients.
    """

    cells: Cells
    score: Score
    detector: Detector
    merge: str
    batch: Batch
    l_detector: Detector | None = None


@dataclass(frozen=True, eq=False)
class Prompted:
    """One question, prepared: its tokens, its options, and its sinks.

    Attributes:
        index: Its number.
        asked: Its options.
        sample: Its prompt.
        sinks: V-sinks, bool ``[pos]``.
        low: Edited block -> L-sinks that are no V-sinks, bool ``[pos]``; empty with pairs.
    """

    index: int
    asked: Asked
    sample: Sample
    sinks: Tensor
    low: Mapping[int, Tensor] = field(default_factory=dict)

    def with_l_sinks(self, lvlm: LVLM, rules: Rules, states: Mapping[int, Tensor]) -> Prompted:
        """The same with its L-sinks, from what the edited blocks read, ``[1 pos d_model]``."""
        if rules.l_detector is None:
            return self
        whole = {block: state[:, : self.last + 1] for block, state in states.items()}
        found = l_sinks(lvlm, self.sample, rules.l_detector, whole)
        return replace(self, low={block: mask & ~self.sinks for block, mask in found.items()})

    def edits(self, block: int, rules: Rules, end: int | None = None) -> Edits:
        """What the pairs do to the keys of a block, up to a position."""
        factors = factors_of(self.sinks, self.visual, rules.cells.pairs, self.low.get(block))
        return Edits.of(factors[:, :end])

    @property
    def visual(self) -> Tensor:
        """Image tokens, bool ``[pos]``."""
        return self.sample.tokens.image[0] >= 0

    @property
    def last(self) -> int:
        """The last prompt token."""
        return int(self.sample.tokens.ids.shape[1]) - 1

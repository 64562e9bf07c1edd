"""Edited: the same model with interventions on, until a block ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sinkscope.errors import InterventionError
from sinkscope.interventions.protocol import Intervention

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.outputs import Generation, Run
    from sinkscope.models.prepare import Sample
    from sinkscope.probes.protocol import Probe


class Edited:
    """What ``with lvlm.edited(interventions) as edited`` gives: `run` and `generate`, edited.

    The model's weights and the plain LVLM are untouched; masks among the interventions belong to
    samples of their own shape, names such as ``"image"`` to any.
    """

    def __init__(self, lvlm: LVLM, interventions: Sequence[Intervention]) -> None:
        self._lvlm = lvlm
        self._interventions = tuple(interventions)
        self._open = True

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """What is on."""
        return self._interventions

    def close(self) -> None:
        """End the edits."""
        self._open = False

    def run(
        self,
        sample: Sample,
        probes: Sequence[Probe] = (),
        interventions: Sequence[Intervention] = (),
        **options: Any,
    ) -> Run:
        """`LVLM.run` with these interventions first, then further ones."""
        return self._model().run(sample, probes, (*self._interventions, *interventions), **options)

    def generate(
        self,
        sample: Sample,
        probes: Sequence[Probe] = (),
        interventions: Sequence[Intervention] = (),
        **options: Any,
    ) -> Generation:
        """`LVLM.generate` with these interventions first, then further ones."""
        return self._model().generate(
            sample, probes, (*self._interventions, *interventions), **options
        )

    def prepare(self, *args: Any, **kwargs: Any) -> Sample:
        """`LVLM.prepare`."""
        return self._model().prepare(*args, **kwargs)

    def _model(self) -> LVLM:
        """The model.

        Raises:
            InterventionError: If the block has ended.
        """
        if not self._open:
            raise InterventionError(
                "Got a run on a model whose edits have ended; expected it inside the block. Write "
                "with lvlm.edited([...]) as edited: edited.run(...)."
            )
        return self._lvlm

"""EvictKeys: the baseline of streaming language models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sinkscope.errors import InterventionError
from sinkscope.interventions.protocol import Edit, check_maskable, check_tower, runs_now
from sinkscope.kernels.evict import evict_keys
from sinkscope.sites import Site, Tower

if TYPE_CHECKING:
    from sinkscope.models.context import Context


@dataclass(frozen=True, eq=False)
class EvictKeys:
    """Keep the first ``start`` keys and the ``recent`` last ones, as StreamingLLM does (2309.17453).

    Dropping the first keys (``start=0``) is what breaks a model whose sink they are. Two differences
    to a streaming cache: positions keep their angle instead of being renumbered inside the cache,
    and the keys stay in memory, so this measures quality, not speed. The mask is explicit.

    Args:
        start: First live keys to keep; 4 in the paper.
        recent: Recent keys to keep, the query's own among them.
        layers: Block indices, or None for all.
        steps: ``"all"``, ``"prefill"`` or ``"decode"``.
        allow_noop: Whether evicting nothing (a short prompt) is fine.
    """

    start: int = 4
    recent: int = 512
    layers: Any = None
    steps: str = "all"
    allow_noop: bool = False
    tower: Tower = "language"

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        check_tower(self.tower, "language", "EvictKeys")
        for name, value, least in (("start", self.start, 0), ("recent", self.recent, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InterventionError(
                    f"Got {name}={value!r}; expected an int of {least} or more."
                )
        differs = "what is evicted differs by query"
        check_maskable(context.tower("language"), differs, "EvictKeys")
        if not runs_now(self.steps, context, "language"):
            return []
        parameters = {"live": context.tokens.live, "start": self.start, "recent": self.recent}
        return [
            Edit(Site("language", "attention", layer), evict_keys, parameters, "logits")
            for layer in context.layers("language", self.layers)
        ]

"""AttentionTemperature: sharpen or flatten the attention of chosen rows and heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sinkscope.checks import check_number
from sinkscope.errors import InterventionError
from sinkscope.interventions.base import attention_edits, check_neutral, selected
from sinkscope.kernels.attention import arguments
from sinkscope.kernels.edited_call import effect_of, keys_of_call, prepared, reach, with_change
from sinkscope.protocols import BaseIntervention, Edit
from sinkscope.sites import Tower
from sinkscope.tokens import Selection

if TYPE_CHECKING:
    from sinkscope.anatomy.context import Context


@dataclass(frozen=True, eq=False)
class AttentionTemperature(BaseIntervention):
    """Divide the logits of chosen rows by a temperature: ``softmax(z / T)``.

    Queries are divided, and keys and the cache stay as they are. So under a soft-cap it is the logit
    before the cap that is divided, and the logit of a learned sink is not: its share changes with the
    others' sharpness. A bias of another edit (`MaskKeys`, `ScaleAttention`) is added behind it. The
    effect's mass is that on all live keys: 1, unless there is a learned sink.

    Args:
        temperature: Above 0; below 1 sharpens, above 1 flattens.
        layers: See `MaskKeys`, as for the rest.
    """

    needs: ClassVar[str] = "weights"

    temperature: float
    layers: Any = None
    heads: Sequence[int] | None = None
    queries: Selection | None = None
    tower: Tower = "language"
    steps: str = "all"
    allow_noop: bool = False

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        check_number(above=0.0, error=InterventionError, temperature=self.temperature)
        name, heat = "AttentionTemperature", float(self.temperature)
        check_neutral(name, heat, 1.0, self.allow_noop)
        keys = selected(context, self.tower, "all", name, self.allow_noop)
        return attention_edits(
            self, context, divide_queries, "keys", {"keys": keys}, temperature=heat
        )


def divide_queries(call, state, span, keys, live, temperature, rows=None, heads=None):
    """Divide the queries of chosen rows; ``keys`` ``[batch key]`` are the live keys of the prompt."""
    _, live, rows = prepared(call, state, span, keys, live, rows)
    n_key = arguments(call)[0]["key"].shape[2]
    keys = keys_of_call(keys, span, n_key, state, fill=1) & (temperature != 1.0)
    gate, empty = reach(call, keys, live, rows, heads, spare_empty=False)

    def change(named, rest):
        query = named["query"]
        return {**named, "query": (query.float() / temperature).to(query.dtype)}, rest

    after = with_change(call, state, gate, change)
    return after, effect_of(call, after, gate, keys, empty, measure=True)

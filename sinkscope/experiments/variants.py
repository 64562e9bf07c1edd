"""What `compare` compares: conditions of several kinds, once or once per seed, as one flat list."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from sinkscope.errors import InputError
from sinkscope.experiments.trace import SinkTrace
from sinkscope.interventions.protocol import Intervention
from sinkscope.interventions.running import check_interventions

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM


@runtime_checkable
class Applied(Protocol):
    """A condition that holds inside a ``with`` block, such as weights with an adapter in them."""

    def apply(self, lvlm: LVLM) -> AbstractContextManager[Any]:
        """The block in which the model answers under the condition."""
        ...


@runtime_checkable
class Control(Protocol):
    """A condition on random tokens, which knows for which rows it has too few to draw from."""

    def uncontrolled(self, trace: SinkTrace) -> Tensor:
        """Bool ``[batch]``: rows that are left unedited for that reason."""
        ...


Condition = Sequence[Any] | Callable[[SinkTrace], Sequence[Any]] | Applied


@dataclass(frozen=True)
class PerSeed:
    """One condition per seed, reported together; made by `per_seed`.

    Attributes:
        seeds: The condition of every seed, in order.
    """

    seeds: tuple[Condition, ...]


def per_seed(*conditions: Condition) -> PerSeed:
    """Conditions that differ in nothing but their seed, to be reported as one, over seeds.

    ::

        ss.compare(lvlm, questions, {"base": [], "gate": per_seed([gate_0], [gate_1], [gate_2])})

    Args:
        conditions: One per seed: of a gate's training, or of a random draw.

    Raises:
        InputError: If there is none.
    """
    if not conditions:
        raise InputError("Got per_seed() without a condition; expected one per seed.")
    return PerSeed(conditions)


@dataclass(frozen=True)
class Variant:
    """One condition of one seed.

    Attributes:
        name: The condition's name.
        seed: 0, 1, ... among those of that name.
        condition: The condition.
    """

    name: str
    seed: int
    condition: Condition

    @property
    def needs_trace(self) -> bool:
        """Whether it is a function of a trace."""
        return not isinstance(self.condition, Applied) and callable(self.condition)


def as_variants(conditions: Any) -> list[Variant]:
    """Conditions as a flat list; the first is the base.

    Raises:
        InputError: If they are no dict, there is none, or one is of no known kind.
        InterventionError: If a list holds something else than interventions.
    """
    if not isinstance(conditions, Mapping) or not conditions:
        raise InputError(
            f"Got conditions={conditions!r}; expected a dict such as {{'base': [], 'masked': "
            "lambda trace: [ss.MaskKeys(trace.v_sinks)]}."
        )
    out = []
    for name, given in conditions.items():
        several = given.seeds if isinstance(given, PerSeed) else (given,)
        out += [Variant(str(name), i, _checked(str(name), one)) for i, one in enumerate(several)]
    base = next(iter(conditions.values()))
    if isinstance(base, PerSeed) and len(base.seeds) > 1:
        raise InputError(
            "Got several seeds for the base; expected one condition that the others are compared "
            "with. Write {'base': [], ...} first."
        )
    return out


def _checked(name: str, condition: Any) -> Any:
    """A condition of a known kind."""
    if isinstance(condition, type):
        raise InputError(
            f"Got the class {condition.__name__} as condition {name!r}; expected an object. Write "
            f"{condition.__name__}(...)."
        )
    if isinstance(condition, Intervention):
        raise InputError(
            f"Got one {type(condition).__name__} as condition {name!r}; expected a list of "
            f"interventions. Write {{{name!r}: [it]}}."
        )
    if isinstance(condition, Applied) or callable(condition):
        return condition
    if isinstance(condition, Iterable) and not isinstance(condition, (str, Mapping)):
        return check_interventions(condition)
    raise InputError(
        f"Got {condition!r} as condition {name!r}; expected a list of interventions, a function of a "
        "SinkTrace, one of ss.baselines, or per_seed(...) of those."
    )

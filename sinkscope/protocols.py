"""The protocol of a probe: which sites it reads, with which kernel, and how it finishes.

A probe is a frozen dataclass of parameters with two methods. It never holds a model: the runner
asks it what to read, reduces inside the trace, and hands back small tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sinkscope.sites import Site

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.anatomy.context import Context


@dataclass(frozen=True, eq=False)
class Read:
    """One question to one site.

    Attributes:
        site: Where.
        kernel: ``kernel(value, state, **parameters)``, a pure function that imports torch only. At
            an attention site ``value`` is the list of attention calls, elsewhere the states.
        parameters: Plain values and CPU tensors; ``("@module", path)`` stands for a module.
    """

    site: Site
    kernel: Callable[..., Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)


class Result(Protocol):
    """What every probe result offers."""

    def to_dataframe(self) -> pd.DataFrame:
        """The result as a tidy table, one line per value."""
        ...


@runtime_checkable
class Probe(Protocol):
    """Anything the runner can run."""

    @property
    def tower(self) -> str:
        """The tower whose steps matter: vision probes run on the prompt only."""
        ...

    def reads(self, context: Context) -> Sequence[Read]:
        """What to read; raises if the parameters do not fit the model or the sample."""
        ...

    def finish(self, answers: Mapping[Site, Any], context: Context) -> Result:
        """From the kernels' small tensors to the typed result."""
        ...

"""The protocols of a probe and of an intervention: what they ask of a site, and what comes back.

A probe is a frozen dataclass of parameters with two methods. It never holds a model: the runner
asks it what to read, reduces inside the trace, and hands back small tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sinkscope.errors import InterventionError, nearest
from sinkscope.kernels.edited_call import STAGES
from sinkscope.results import Result
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


TOLD = ("rows", "empty", "tokens", "count", "before", "after")
"""What every kernel tells of its edit."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit at one site.

    Attributes:
        site: Where.
        kernel: At an attention site ``kernel(call, state, span, **parameters) -> (call, effect)``,
            best made with `sinkscope.kernels.edited_call.with_change`; elsewhere
            ``kernel(states, state, **parameters) -> (states, effect)``. Never in place.
        parameters: Plain values and CPU tensors; ``("@module", path)`` stands for a module.
        stage: For an attention site, what is edited: ``"keys"``, ``"logits"``, ``"weights"`` or
            ``"values"``. The edits of one site apply in this order, and in list order inside a
            stage: a mask holds whatever is redistributed beside it. A kernel that changes another
            one is refused when it runs.

    Raises:
        InterventionError: If the stage is none.
    """

    site: Site
    kernel: Callable[..., Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    stage: str = "values"

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise InterventionError(
                f"Got stage={self.stage!r}; expected one of {STAGES}. "
                f"{nearest(str(self.stage), STAGES)}"
            )


@runtime_checkable
class Intervention(Protocol):
    """Anything the runner can apply."""

    @property
    def steps(self) -> str:
        """``"all"``, ``"prefill"`` or ``"decode"``."""
        ...

    @property
    def allow_noop(self) -> bool:
        """Whether touching nothing is fine; else it raises."""
        ...

    def edits(self, context: Context) -> Sequence[Edit]:
        """What to edit at this step; raises if the parameters do not fit the model or the sample."""
        ...


@dataclass(frozen=True, eq=False)
class Effect(Result):
    """What one intervention did in one forward pass.

    Attributes:
        sites: Every site that was edited, in forward order.
        rows: Int ``[batch site]``: query rows touched in some head; for edits of states the tokens
            whose state became another. In the vision tower the first axis counts images; a packed
            tower has one row for all.
        empty: Int ``[batch site]``: rows left as they were in some head, because the edit would
            leave them no key to see.
        tokens: Int ``[batch site]``: edited keys (or tokens).
        mass_before: Float ``[batch site]``: mean attention of the touched rows and heads on the
            edited keys before; NaN where nothing was touched or masses do not change.
        mass_after: The same after.
        kl: Float ``[batch]``: KL(unedited || edited) of the next token, if it was asked for; all
            interventions of the run together.
        step: 0 for a prompt, 1, 2, ... for decode steps.
        extra: What the kernel told besides, by name, ``[batch site ...]``: a gate's
            ``"coefficients"`` ``[batch site group]``.
    """

    sites: tuple[Site, ...]
    rows: Tensor
    empty: Tensor
    tokens: Tensor
    mass_before: Tensor
    mass_after: Tensor
    kl: Tensor | None = None
    step: int = 0
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers in which some row was touched."""
        touched = self.rows.sum(0) > 0
        return tuple(
            sorted({s.layer for s, t in zip(self.sites, touched.tolist(), strict=True) if t})
        )

    @property
    def touched(self) -> Tensor:
        """Bool ``[batch]``: rows of the batch in which anything was touched."""
        return self.rows.sum(1) > 0

    def to_dataframe(self) -> pd.DataFrame:
        """One line per batch row and site."""
        import pandas as pd

        lines = [
            {
                "batch": b,
                "site": str(site),
                "layer": site.layer,
                "rows": int(self.rows[b, i]),
                "empty": int(self.empty[b, i]),
                "tokens": int(self.tokens[b, i]),
                "mass_before": float(self.mass_before[b, i]),
                "mass_after": float(self.mass_after[b, i]),
            }
            for b in range(self.rows.shape[0])
            for i, site in enumerate(self.sites)
        ]
        return pd.DataFrame(lines)


def effect_from(
    answers: Mapping[Site, Mapping[str, Tensor]], step: int, ended: Tensor | None = None
) -> Effect:
    """An `Effect` from the raw answers of one intervention's sites.

    Args:
        answers: What every site's kernel told.
        step: The step.
        ended: Bool ``[batch]``: rows whose answer had ended, in which nothing was touched.
    """
    sites = tuple(sorted(answers))

    def counts(name: str) -> Tensor:
        out = torch.stack([answers[s][name] for s in sites], dim=1)
        return out if ended is None else out.masked_fill(ended[:, None], 0)

    count = counts("count")

    def mean(name: str) -> Tensor:
        columns = []
        for s in sites:
            one = answers[s]
            nothing = torch.full(one["count"].shape, float("nan"))
            columns.append(one[name] / one["count"] if name in one else nothing)
        return torch.stack(columns, dim=1).masked_fill(count == 0, float("nan"))

    rows, empty, tokens = counts("rows"), counts("empty"), counts("tokens")
    more = set.intersection(*(set(answers[s]) for s in sites)) - set(TOLD)
    extra = {name: torch.stack([answers[s][name] for s in sites], dim=1) for name in sorted(more)}
    return Effect(sites, rows, empty, tokens, mean("before"), mean("after"), None, step, extra)

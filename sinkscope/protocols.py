"""The protocols of a probe and of an intervention: what they ask of a site, and what comes back.

Both are frozen dataclasses of parameters that never hold a model: the runner asks them what to read or
to edit, kernels do it inside the trace, and small tensors come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import pandas as pd
import torch
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.checks import check_choice
from sinkscope.errors import InterventionError, SinkscopeError
from sinkscope.kernels.edited_call import STAGES
from sinkscope.results import Result
from sinkscope.sites import Site


class Model(Protocol):
    """What probes and interventions use of an `LVLM`."""

    prepare: Callable[..., Any]
    run: Callable[..., Any]
    generate: Callable[..., Any]

    @property
    def module(self) -> Any:
        """The ``transformers`` model."""

    @property
    def anatomy(self) -> Any:
        """What it is made of."""


@dataclass(frozen=True, eq=False)
class Read:
    """One question to one site.

    Attributes:
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


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit at one site.

    Attributes:
        kernel: At an attention site ``kernel(call, state, span, **parameters) -> (call, effect)``,
            best made with `sinkscope.kernels.edited_call.with_change`; elsewhere
            ``kernel(states, state, **parameters) -> (states, effect)``. Never in place.
        parameters: Plain values and CPU tensors; ``("@module", path)`` stands for a module.
        stage: For an attention site, what is edited: ``"keys"``, ``"logits"``, ``"weights"`` or
            ``"values"``. The edits of one site apply in this order, and in list order inside a
            stage: a mask holds whatever is redistributed beside it. The kernel finds it in
            ``state["stage"]``; InterventionError if it is none.
    """

    site: Site
    kernel: Callable[..., Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    stage: str = "values"

    def __post_init__(self) -> None:
        check_choice(STAGES, error=InterventionError, stage=self.stage)


@runtime_checkable
class Intervention(Protocol):
    """Anything the runner can apply. It reads what `BaseIntervention` has too, if it is there."""

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


class BaseIntervention:
    """What the runner reads of an `Intervention` besides, and what holds for those that have it not.

    Attributes:
        needs: What it needs of a tower, a name that `LVLM.report` knows; also a keyword of the class.
        changes_positions_of: The tower to which it adds positions, if there is one.
        tower: The tower it edits, a field; ``"language"`` without.
        layers: The blocks it edits, a field; all without, or if None.
    """

    needs: ClassVar[str] = ""
    changes_positions_of: ClassVar[str | None] = None
    tower: Any
    layers: Any

    def __init_subclass__(cls, *, needs: str = "", **given: Any) -> None:
        super().__init_subclass__(**given)
        cls.needs = needs or cls.needs

    def check_fits(self, lvlm: Model) -> None:
        """Refuse a model, before it runs, for which this was not made."""

    def allowing_noop(self: Any) -> Any:
        """The same intervention, for which touching nothing is fine."""
        return replace(self, allow_noop=True)


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
        extra: What the kernel told besides, ``[batch site ...]``: a gate's ``"coefficients"``.
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
        touched = (self.rows.sum(0) > 0).nonzero().flatten().tolist()
        return tuple(sorted({self.sites[i].layer for i in touched}))

    @property
    def touched(self) -> Tensor:
        """Bool ``[batch]``: rows of the batch in which anything was touched."""
        return self.rows.sum(1) > 0

    def to_dataframe(self) -> pd.DataFrame:
        """One line per batch row and site."""
        many = len(self.rows)
        table = {
            "batch": [row for row in range(many) for _ in self.sites],
            "site": [str(site) for site in self.sites] * many,
            "layer": [site.layer for site in self.sites] * many,
        }
        for name in ("rows", "empty", "tokens", "mass_before", "mass_after"):
            table[name] = getattr(self, name).flatten().tolist()
        return pd.DataFrame(table)


def as_list(came: Any, kind: Any, error: type[SinkscopeError], name: str, has: str) -> list[Any]:
    """The ``"probes"`` or ``"interventions"`` that came, checked to be objects of their protocol."""
    own, such = getattr(came, "__name__", type(came).__name__), f"objects with {has}"
    if isinstance(came, (type, kind)):
        what, write = ("the class", f"{own}(...)") if isinstance(came, type) else ("one", name[:-1])
        raise error(f"Got {what} {own}; expected a list of {name}. Write {name}=[{write}].")
    if not isinstance(came, Iterable) or isinstance(came, (str, Mapping)):
        raise error(f"Got {name}={came!r}; expected a list of {such}.")
    out = list(came)
    for it in out:
        if isinstance(it, type):
            got = f"Got the class {it.__name__} among the {name}; expected an object of it."
            raise error(f"{got} Write {it.__name__}(...).")
        if not isinstance(it, kind):
            raise error(f"Got {it!r} among the {name}; expected {such}.")
    return out


def effect_from(
    answers: Mapping[Site, Mapping[str, Tensor]], step: int, ended: Tensor | None = None
) -> Effect:
    """An `Effect` from what the kernels told at every site of one intervention.

    In rows whose answer has ``ended``, bool ``[batch]``, nothing was touched.
    """
    sites, nan = tuple(sorted(answers)), float("nan")
    told = [answers[site] for site in sites]

    def joined(name: str) -> Tensor:
        return torch.stack([one[name] for one in told], dim=1)

    def total(name: str) -> Tensor:
        return joined(name) if ended is None else joined(name).masked_fill(ended[:, None], 0)

    count = total("count")

    def mean(name: str) -> Tensor:
        nothing = torch.full((len(count),), nan)
        sums = [one[name] / one["count"] if name in one else nothing for one in told]
        return torch.stack(sums, dim=1).masked_fill(count == 0, nan)

    known = {"rows", "empty", "tokens", "count", "before", "after"}
    extra = {name: joined(name) for name in sorted(set.intersection(*map(set, told)) - known)}
    rows, empty, tokens = (total(name) for name in ("rows", "empty", "tokens"))
    return Effect(sites, rows, empty, tokens, mean("before"), mean("after"), None, step, extra)

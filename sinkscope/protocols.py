"""The protocols of a probe and of an intervention: what they ask of a site, and what comes back.

Both are frozen dataclasses of parameters that never hold a model. Kernels do the work inside the trace.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import pandas as pd
import torch
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.checks import check_choice, check_switches, hints_of
from sinkscope.errors import InterventionError, SinkscopeError
from sinkscope.kernels.edited_call import STAGES
from sinkscope.results import Result
from sinkscope.sites import Site

COLUMNS = ("rows", "empty", "tokens", "mass_before", "mass_after")


@runtime_checkable
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
    """Ask one question of one site.

    ``kernel(value, state, **parameters)`` is a pure function that imports torch only. At an attention site
    ``value`` is the list of attention calls, elsewhere the states. ``parameters`` are plain values and CPU
    tensors; ``("@module", path)`` stands for a module.
    """

    site: Site
    kernel: Callable[..., Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Probe(Protocol):
    """Ask questions of sites and make a result of the answers: what the runner needs of a probe."""

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
    """Make one edit at one site.

    ``kernel`` is at an attention site ``kernel(call, state, span, **parameters) -> (call, effect)``, best
    made with `sinkscope.kernels.edited_call.with_change`, elsewhere
    ``kernel(states, state, **parameters) -> (states, effect)``; never in place. For ``parameters`` see
    `Read`. ``stage`` says what is edited at an attention site: ``"keys"``, ``"logits"``, ``"weights"`` or
    ``"values"``. The edits of one site apply in this order, and in list order inside a stage: a mask also
    holds for what is redistributed. The kernel finds it in ``state["stage"]``; InterventionError if it is
    none of them. ``look`` is for a kernel of states that changes nothing: it comes after all edits of its
    site.
    """

    site: Site
    kernel: Callable[..., Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    stage: str = "values"
    look: bool = False

    def __post_init__(self) -> None:
        check_choice(STAGES, error=InterventionError, stage=self.stage)


@runtime_checkable
class Intervention(Protocol):
    """Edit sites: what the runner needs of an intervention. It also reads what `BaseIntervention` has."""

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
    """Hold what the runner reads of an `Intervention` if it is there, and what holds if it is not.

    ``needs`` is what it needs of a tower, a name that `LVLM.report` knows, also a keyword of the class;
    ``changes_positions_of`` the tower to which it adds positions, if any. ``tower`` and ``layers`` are
    fields, what it edits: ``"language"`` and all blocks (or None) for those that have them not.
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
    """Report what one intervention did in one forward pass, at the edited ``sites`` in forward order.

    Attributes:
        rows: Int ``[batch site]``: query rows touched in some head; for edits of states the tokens whose
            state changed. The first axis of the vision tower counts images, or is one row if packed.
        empty: Int ``[batch site]``: rows left as they were in some head, because no key would be left.
        tokens: Int ``[batch site]``: edited keys (or tokens).
        mass_before: Float ``[batch site]``: mean attention of the touched rows and heads on the edited
            keys before; NaN where nothing was touched or masses do not change. ``mass_after`` likewise.
        kl: Float ``[batch]``: KL(unedited || edited) of the next token under all interventions of the run,
            if it was asked for.
        step: 0 for a prompt, 1, 2, ... for decode steps.
        extra: What else the kernel reported, ``[batch site ...]``: a gate's ``"coefficients"``, and how many
            tokens a live rule flagged (see `sinkscope.interventions.LiveRule`).
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
        """One line per batch row and site, with what is in `extra` ``[batch site]``."""
        batch = range(len(self.rows))
        places = [(row, str(site), site.layer) for row in batch for site in self.sites]
        table = pd.DataFrame(places, columns=["batch", "site", "layer"])
        told = {name: getattr(self, name) for name in COLUMNS}
        told |= {name: x for name, x in self.extra.items() if x.ndim == 2}
        return table.assign(**{name: x.flatten().tolist() for name, x in told.items()})


def as_list(came: Any, kind: Any, error: type[SinkscopeError], name: str, has: str) -> list[Any]:
    """The ``"probes"`` or ``"interventions"`` that came, checked to be objects of their protocol."""
    own, such = getattr(came, "__name__", type(came).__name__), f"objects with {has}"
    if isinstance(came, (type, kind)):
        what, write = ("the class", f"{own}(...)") if isinstance(came, type) else ("one", name[:-1])
        raise error(f"Got {what} {own}; expected a list of {name}. Write {name}=[{write}].")
    if not isinstance(came, Iterable) or isinstance(came, (str, Mapping)) or hasattr(came, "shape"):
        raise error(f"Got {name}={repr(came)[:60]}; expected a list of {such}.")
    out = list(came)
    for it in out:
        if isinstance(it, type):
            write = f"an object of it. Write {it.__name__}(...)"
            raise error(f"Got the class {it.__name__} among the {name}; expected {write}.")
        if not isinstance(it, kind):
            raise error(f"Got {it!r} among the {name}; expected {such}.")
        check_switches(getattr(it, "__dict__", {}), hints_of(type(it)), error)
    return out


def effect_from(
    answers: Mapping[Site, Mapping[str, Tensor]], step: int, ended: Tensor | None = None
) -> Effect:
    """An `Effect` from all answers of one intervention; nothing was touched in rows that have ``ended``."""
    sites = tuple(sorted(answers))
    told = [answers[site] for site in sites]
    common = sorted(set.intersection(*map(set, told)))
    joined = {name: torch.stack([one[name] for one in told], dim=1) for name in common}
    if ended is not None:
        for name in ("count", "rows", "empty", "tokens"):
            joined[name] = joined[name].masked_fill(ended[:, None], 0)
    count = joined["count"]
    for name in ("before", "after"):
        nothing = torch.full((len(count),), float("nan"))
        sums = [one[name] / one["count"] if name in one else nothing for one in told]
        joined[f"mass_{name}"] = torch.stack(sums, dim=1).masked_fill(count == 0, float("nan"))
    own = {name: joined.pop(name) for name in COLUMNS}
    extra = {name: x for name, x in joined.items() if name not in ("count", "before", "after")}
    return Effect(sites, **own, step=step, extra=extra)

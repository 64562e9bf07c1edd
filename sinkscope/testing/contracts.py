"""What every probe and every intervention must keep: run these on your own before you trust it.

They take the model and the sample as arguments and import nothing of the library they check.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class ContractError(AssertionError):
    """A probe or an intervention breaks a promise that the library makes for all of them."""


def require(holds: bool, promise: str) -> None:
    """Raise `ContractError` with the broken promise unless it holds."""
    if not holds:
        raise ContractError(promise)


def is_frozen(record: Any) -> bool:
    """Whether something is an object of a frozen dataclass."""
    params = getattr(type(record), "__dataclass_params__", None)
    return params is not None and params.frozen


def tensors_of(result: Any) -> dict[str, Tensor]:
    """The tensors of a result record, by field."""
    return {k: v for k, v in vars(result).items() if isinstance(v, Tensor)}


def same(one: Tensor, other: Tensor) -> bool:
    """Bitwise equality in which NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    equal = one == other
    if one.is_floating_point():
        equal = equal | (one.isnan() & other.isnan())
    return bool(equal.all())


def same_results(one: Any, other: Any) -> bool:
    """Whether two results hold the same tensors."""
    first, second = tensors_of(one), tensors_of(other)
    return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)


def check_probe(probe: Any, lvlm: Any, sample: Any, *, remote: bool = True) -> None:
    """Run a probe through the promises that hold for all of them.

    It is a frozen record; its result is one too, has tensors and a tidy table; it changes no bit of
    the logits; it gives the same twice and beside itself; through the remote path it gives the same;
    probes of the language tower also work at decode steps.

    Args:
        probe: The probe.
        lvlm: Any model it fits.
        sample: A sample of it, better a padded batch.
        remote: Whether to run the remote path too (it needs a processor).

    Raises:
        ContractError: If a promise is broken; the message is the promise.
    """
    require(is_frozen(probe), "a probe is a frozen dataclass: parameters only, no state")
    twin = dataclasses.replace(probe)
    plain = lvlm.run(sample)
    run = lvlm.run(sample, probes=[probe, twin])
    result = run[probe]
    require(is_frozen(result), "a result is a frozen dataclass")
    require(bool(tensors_of(result)), "a result holds at least one tensor")
    require(len(result.to_dataframe()) > 0, "a result has a table with at least one line")
    require(same(run.logits, plain.logits), "a probe changes no bit of the logits")
    require(same_results(result, run[twin]), "two equal probes of one run give the same")
    again = lvlm.run(sample, probes=[probe])
    require(same_results(result, again[probe]), "the same run gives the same result")
    if remote:
        there = lvlm.run(sample, probes=[probe], remote="local", logits="all")
        require(same_results(result, there[probe]), "the remote path gives the same result")
    if probe.tower == "language":
        out = lvlm.generate(sample, probes=[probe], max_new_tokens=2, min_new_tokens=2)
        require(len(out.steps) == 2, "generation runs a prompt pass and a decode step")
        require(bool(tensors_of(out.steps[1][probe])), "a decode step has a result")


def check_intervention(
    make: Callable[[], Any],
    lvlm: Any,
    sample: Any,
    *,
    neutral: Callable[[], Any] | None = None,
    remote: bool = True,
) -> None:
    """Run an intervention through the promises that hold for all of them.

    It is a frozen record, or a module if it learns; it changes the logits and says so in ``run.effects``; batch rows in which
    nothing was touched stay bitwise; the plain model is bitwise itself afterwards, also after an
    exception in the middle of a pass; the same twice; the remote path gives the same; at its neutral
    setting it changes no bit.

    Args:
        make: Builds the intervention.
        lvlm: Any model it fits.
        sample: A sample of it, better one with a row that the selection leaves empty.
        neutral: Builds it with the setting that changes nothing, or None if there is none.
        remote: Whether to run the remote path too (it needs a processor).

    Raises:
        ContractError: If a promise is broken; the message is the promise.
    """
    it = make()
    require(
        is_frozen(it) or isinstance(it, nn.Module),
        "an intervention is a frozen dataclass (parameters only, no state) or a module that learns",
    )
    plain = lvlm.run(sample).logits
    run = lvlm.run(sample, interventions=[it])
    require(not same(run.logits, plain), "an intervention changes the logits")
    require(it in run.effects, "run.effects tells what an intervention did")
    effect = run.effects[it]
    require(bool(effect.touched.any()), "the effect names the rows that were touched")
    if effect.touched.shape[0] == plain.shape[0]:
        quiet = ~effect.touched
        require(same(run.logits[quiet], plain[quiet]), "rows that were not touched stay bitwise")
    require(same(lvlm.run(sample).logits, plain), "the next plain run is bitwise the original")
    again = lvlm.run(sample, interventions=[make()])
    require(same(again.logits, run.logits), "the same edit gives the same logits")
    if remote:
        there = lvlm.run(sample, interventions=[make()], remote="local", logits="all")
        require(same(there.logits, run.logits), "the remote path gives the same logits")
    check_clean_after_error(make, lvlm, sample, plain)
    if neutral is not None:
        logits = lvlm.run(sample, interventions=[neutral()]).logits
        require(same(logits, plain), "the neutral setting changes no bit")


class _MidwayError(Exception):
    """Thrown on purpose."""


def check_clean_after_error(make: Callable[[], Any], lvlm: Any, sample: Any, plain: Tensor) -> None:
    """An exception after the first edit of a pass leaves the model as it was.

    Raises:
        ContractError: If it does not.
    """

    def throw(*args: Any, **kwargs: Any) -> Any:
        raise _MidwayError

    @dataclasses.dataclass(frozen=True, eq=False)
    class Broken:
        inner: Any
        steps: str = "all"
        allow_noop: bool = False
        tower: str = "language"

        def edits(self, context: Any) -> list[Any]:
            edits = list(self.inner.edits(context))
            return [*edits[:-1], dataclasses.replace(edits[-1], kernel=throw)]

    broken = Broken(make())
    try:
        lvlm.run(sample, interventions=[broken])
    except _MidwayError:
        pass
    else:
        raise ContractError("an exception inside a kernel reaches the user with its own type")
    require(
        same(lvlm.run(sample).logits, plain),
        "after an exception in the middle of a pass the next plain run is bitwise the original",
    )

"""check_model: what the package claims of a model, compared with plain passes; a table, and a block to paste."""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from sinkscope.checks import check_whole, typed
from sinkscope.errors import InputError, ModelError, SinkscopeError
from sinkscope.files import version_of
from sinkscope.models import LVLM, Sample
from sinkscope.models.inputs import reads_words_only
from sinkscope.results import Record, Result
from sinkscope.testing.claims import BOTH, PLAN, Case, sentence
from sinkscope.testing.references import UncheckedError
from sinkscope.testing.tiny import random_image

VERSIONS = ("sinkscope", "torch", "transformers", "nnsight")


@dataclass(frozen=True)
class Check(Record):
    """One check of one tower: ``"exact"``; ``"approximate"``, as half precision allows; ``"no"``, refused or not
    checked, for the reason in ``why``; or ``"wrong"``. ``error`` is how far numbers are off, None without any."""

    name: str
    tower: str
    status: str
    why: str = ""
    error: float | None = None


@dataclass(frozen=True, repr=False)
class ModelCheck(Result):
    """The outcome of `check_model`; printed, it is a table and a block to paste into a report.

    ``facts`` are pairs ``(what, value)``: class, type, versions, device, dtype, attention kernels.
    """

    facts: tuple[tuple[str, str], ...]
    checks: tuple[Check, ...]

    @property
    def wrong(self) -> tuple[Check, ...]:
        """The checks that found a wrong number, or an error that explains nothing."""
        return tuple(check for check in self.checks if check.status == "wrong")

    def status(self, name: str, tower: str = "language") -> str:
        """The status of a check; ModelError if there is none of that name in that tower."""
        known = {(check.name, check.tower): check.status for check in self.checks}
        if (name, tower) not in known:
            raise ModelError(f"Got the check {name!r}, {tower!r}; expected one of {[*known]}.")
        return known[name, tower]

    def to_dataframe(self) -> pd.DataFrame:
        """Columns name, tower, status, why, error."""
        return pd.DataFrame([vars(check) for check in self.checks])

    def __str__(self) -> str:
        table: dict[str, dict[str, str]] = {"check": dict(zip(BOTH, BOTH, strict=True))}
        told = list(self.facts)
        for check in self.checks:
            table.setdefault(check.name, {})[check.tower] = check.status
            off = "" if check.error is None else f"off by {check.error:.2g}"
            remark = "; ".join(filter(None, (off, check.why)))
            told.append((check.name, f"{check.tower:<10}{check.status:<13}{remark}"))
        rows = [f"{n:<15}{c.get(BOTH[0], ''):<15}{c.get(BOTH[1], '')}" for n, c in table.items()]
        lines = [f"{name:<15}{text}".rstrip() for name, text in told]
        return "\n".join([*rows, "", "To paste into a report:", "", "```text", *lines, "```"])


@typed
def check_model(lvlm: LVLM, sample: Sample | None = None, *, seed: int = 0) -> ModelCheck:
    """Check what the package claims of a model, on one sample, against plain passes and eager attention.

    A wrong number is no error: look at `ModelCheck.wrong`. The model is left as it was.

    Args:
        lvlm: The model; InputError if its weights are elsewhere.
        sample: From ``lvlm.prepare``; None makes one of a random picture, which needs a processor.
        seed: Of the picture, and of the tokens that are measured and edited.
    """
    check_whole(0, seed=seed)
    if lvlm.device.type == "meta":
        raise InputError("Got a model without weights here; expected them. Load it without remote.")
    if sample is None and reads_words_only(lvlm.module):
        sample = lvlm.prepare(text="What is in the picture?")
    elif sample is None:
        sample = lvlm.prepare(images=random_image(90, 70, seed), text="What is in the picture?")
    case, checks = Case(lvlm, sample, seed), []
    for name, (check, exact, half, *towers) in PLAN.items():
        for tower in towers:
            checks.append(
                judged(name, tower, partial(check, case, tower), exact, half if case.half else 0.0)
            )
    return ModelCheck(facts_of(case), tuple(checks))


def facts_of(case: Case) -> tuple[tuple[str, str], ...]:
    """What identifies a model in a report; of a path the last part."""
    model, name, kernels = case.model, case.lvlm.name, []
    for tower in BOTH:
        with suppress(UncheckedError, SinkscopeError):
            kernels.append(f"{tower} {case.tower(tower).kernel}")
    return (
        ("model", Path(name).name if Path(name).exists() else name),
        ("class", f"{type(model).__name__} ({model.config.model_type})"),
        ("versions", ", ".join(f"{name} {version_of(name)}" for name in VERSIONS)),
        ("device", f"{case.lvlm.device.type}, {str(model.dtype).removeprefix('torch.')}"),
        ("attention", ", ".join(kernels)),
    )


def judged(name: str, tower: str, check: Any, exact: float, half: float) -> Check:
    """Run one check, with a limit for fp32 and a wider one for half precision, if that is allowed."""
    try:
        off, why = check()
    except UncheckedError as error:
        return Check(name, tower, "no", f"not checked: {error}")
    except SinkscopeError as error:
        return Check(name, tower, "no", sentence(error))
    except Exception as error:  # noqa: BLE001  an error that explains nothing is looked for
        return Check(name, tower, "wrong", f"{type(error).__name__}: {sentence(error)}")
    status = "approximate" if half > exact else "exact"
    good = off <= max(half, exact)  # not for NaN
    return Check(name, tower, status if good else "wrong", why, off)

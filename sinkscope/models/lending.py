"""Attributes lent to objects: there until a block ends, and then what was there before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

ABSENT = object()
"""Stands for an attribute that the instance does not have."""

Loan = tuple[object, Mapping[str, Any]]
"""An object, such as a module, and what its instance attributes are to be."""


@contextmanager
def lent(loans: Iterable[Loan]) -> Iterator[None]:
    """Set instance attributes until the block ends, also if it ends in an error.

    Args:
        loans: What to set on which object.
    """
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for thing, attributes in loans:
            own = vars(thing)
            before.append((own, {name: own.get(name, ABSENT) for name in attributes}))
            _set(own, attributes)
        yield
    finally:
        for own, attributes in reversed(before):
            _set(own, attributes)


def own_of(thing: object, names: Iterable[str]) -> dict[str, Any]:
    """The instance attributes of some names."""
    return {name: vars(thing).get(name, ABSENT) for name in names}


def _set(own: dict[str, Any], attributes: Mapping[str, Any]) -> None:
    """Set or take off instance attributes, past what a class does when they are set."""
    for name, value in attributes.items():
        if value is not ABSENT:
            own[name] = value
        elif name in own:
            del own[name]


@contextmanager
def evaluated(module: Any) -> Iterator[None]:
    """Evaluation mode in every module, whatever mode each is in, and all as they were at the end.

    Modules are looked at one by one: an adapter comes in training mode into a model that is not.

    Args:
        module: The whole model.
    """
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def undisturbed(module: Any) -> Iterator[None]:
    """Run passes in evaluation mode that leave a user's own alone.

    What ``torch.compile`` made of a part has no sites and sees no hooks of ours, so the part runs as
    it was written. Qwen keeps ``rope_deltas`` of its last prompt, by which the decode steps that
    follow are placed; they stay those of the user's prompt.

    Args:
        module: The whole model.
    """
    kept = [part for part in (module, module.base_model) if "rope_deltas" in vars(part)]
    with (
        evaluated(module),
        torch.compiler.set_stance("force_eager"),
        lent([(part, own_of(part, ["rope_deltas"])) for part in kept]),
    ):
        yield

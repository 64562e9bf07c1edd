"""The conditions of a comparison, as a recipe writes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkscope.errors import InputError
from sinkscope.recipes import check_keys

if TYPE_CHECKING:
    from sinkscope.models import LVLM

METHODS = ("var", "sink_to_front", "token_weights", "fixed_coefficients")
"""Baselines that are made of plain values."""
KEYS = ("gate", "stack", "edit", "random_tokens", *METHODS)


def conditions_of(given: Any, lvlm: LVLM) -> dict[str, Any]:
    """The conditions of a comparison, by name.

    A condition is ``[]``, or a mapping with one key: ``gate: folder``; ``stack: folder`` of a saved
    stack or ``stack: [folder, ...]`` of gates; ``edit: {kind, edit, ...}`` (see `EditSinks`);
    ``random_tokens: {condition: ..., count, seed}``; or a name in `sinkscope.baselines` with its
    arguments.

    Raises:
        InputError: If it is something else.
    """
    return {name: one_condition(name, what, lvlm) for name, what in by_name(given).items()}


def by_name(given: Any) -> dict[str, Any]:
    """Conditions by name, not looked at yet.

    Raises:
        InputError: If they are something else.
    """
    if not isinstance(given, Mapping):
        raise InputError(
            f"Got conditions: {given!r}; expected names with what to do, such as "
            "{base: [], VAR: {var: {preset: code}}}."
        )
    return {str(name): what for name, what in given.items()}


def one_condition(name: str, what: Any, lvlm: LVLM) -> Any:
    """One condition; see `conditions_of`."""
    from sinkscope.experiments import EditSinks, baselines

    if what in ([], {}, None, "base"):
        return []
    if not isinstance(what, Mapping) or len(what) != 1:
        raise InputError(
            f"Got the condition {name}: {what!r}; expected [] or one key, such as {{gate: folder}} or "
            "{var: {preset: code}}."
        )
    key, value = next(iter(what.items()))
    if key in ("gate", "stack"):
        return gates_of(name, key, value, lvlm)
    if key not in KEYS:
        raise InputError(
            f"Got the condition {name}: {key}; expected gate, stack, edit, or one of {list(KEYS)}."
        )
    made = EditSinks if key == "edit" else getattr(baselines, key)
    arguments = arguments_for(made, value, f"under {key} of the condition {name}")
    if key == "random_tokens":
        arguments["condition"] = one_condition(name, arguments["condition"], lvlm)
    return made(**arguments)


def gates_of(name: str, key: str, value: Any, lvlm: LVLM) -> list[Any]:
    """A gate, or several."""
    from sinkscope.lsg import LSG

    several = key == "stack" and isinstance(value, list)
    folders: Any = value if several else [value]
    if not folders or not all(isinstance(one, str) for one in folders):
        raise InputError(
            f"Got {key}: {value!r} in the condition {name}; expected a folder"
            f"{' or a list of folders' if key == 'stack' else ''}."
        )
    if key == "stack" and isinstance(value, str):
        return LSG.load_stack(value, lvlm=lvlm)
    return [LSG.from_pretrained(one, lvlm=lvlm) for one in folders]


def arguments_for(function: Callable[..., Any], value: Any, where: str) -> dict[str, Any]:
    """Keys and values that a function takes.

    Raises:
        InputError: If a key is unknown, or one that it needs is missing.
    """
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"Got {value!r} {where}; expected keys and values.")
    given = dict(value or {})
    known = inspect.signature(function).parameters
    check_keys(given, list(known), where)
    missing = [n for n, p in known.items() if p.default is p.empty and n not in given]
    if missing:
        raise InputError(f"Got {sorted(given)} {where}; expected {missing} too.")
    return given


def named_gates(folders: Sequence[str]) -> dict[str, dict[str, str]]:
    """Conditions of ``--gate``, each by the shortest end of its path that tells it from the others.

    Raises:
        InputError: If one folder is named twice.
    """
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    twice = sorted({str(path) for path in paths if paths.count(path) > 1})
    if twice:
        raise InputError(f"Got --gate {twice[0]} more than once; expected every folder once.")
    out = {}
    for folder, path in zip(folders, paths, strict=True):
        depth = 1
        while sum(other.parts[-depth:] == path.parts[-depth:] for other in paths) > 1:
            depth += 1
        out["/".join(path.parts[-depth:])] = {"gate": folder}
    return out

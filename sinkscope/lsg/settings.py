"""Read the settings of somebody else's gate from JSON whose keys nobody has told us.

A key without a meaning is listed as ignored; a value that cannot be what its key means is refused. The
meanings are in `sinkscope.lsg.meanings`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sinkscope.checks import is_number
from sinkscope.errors import CheckpointError
from sinkscope.kernels.gating import ACTIVATIONS
from sinkscope.lsg.meanings import (
    ACTIVATION,
    DIMS,
    EDITED,
    GROUPS,
    LAYERS,
    SCALE,
    SIGNAL,
    SINK_DIMS,
    SINK_TAU,
    TAU,
    TEMPERATURE,
    Meaning,
    of_language,
    of_neither,
    of_vision,
    words,
)

LAST = ("last", "last_token", "last_prompt_token", "last_text_token")


class Settings:
    """What a JSON file says, by meaning; every key that was used or not is kept track of.

    Args:
        data: The parsed file.
        ignore: Parts of keys to leave alone.

    Raises:
        CheckpointError: If two nested keys have one dotted name.
    """

    def __init__(self, data: Mapping[str, Any], ignore: Sequence[str] = ()) -> None:
        listed = flat(data)
        self.values = dict(listed)
        twice = sorted(k for k, many in Counter(key for key, _ in listed).items() if many > 1)
        if twice:
            raise CheckpointError(
                f"Got several values called {twice[:5]} in sink_cfg.json once nested names are joined by "
                "dots; expected one for each."
            )
        self.left = {key for key in self.values if any(part in key.lower() for part in ignore)}
        self.used: dict[str, str] = {}

    @property
    def unused(self) -> list[str]:
        """Keys that meant nothing to us."""
        return [key for key in self.values if key not in self.used]

    def layers(self) -> list[int] | None:
        """The layers that gates read.

        Raises:
            CheckpointError: If only the edited ones are named, which may be the next ones.
        """
        found = self._one(LAYERS, whole_numbers, lambda key, value: not of_vision(key))
        keys = [key for key, use in self.used.items() if use == LAYERS.name]
        if keys and all(words(key) & EDITED for key in keys):
            raise CheckpointError(
                f"Got {keys} in sink_cfg.json, the layers where gates act; expected those that they "
                "read, which are the ones before if the gate is as in the paper. Write layer=[...]."
            )
        return found

    def activation(self) -> str | None:
        """The hidden layer's activation."""

        def read(value: Any) -> str | None:
            name = str(value).lower().rpartition(".")[2].removesuffix("()")
            return name if name in ACTIVATIONS else None

        return self._one(ACTIVATION, read, of_neither)

    def groups(self) -> tuple[str, ...] | int | None:
        """Names of the groups in their order, or how many."""

        def read(value: Any) -> tuple[str, ...] | int | None:
            if isinstance(value, list) and all(isinstance(one, str) for one in value):
                return tuple(group_of(one) for one in value)
            return value if isinstance(value, int) and not isinstance(value, bool) else None

        return self._one(GROUPS, read)

    def scale(self) -> float | None:
        """What multiplies the softmax."""

        def read(value: Any) -> float | None:
            found = number(value)
            return found if found is not None and found > 0 else None

        return self._one(SCALE, read, of_neither)

    def signal(self) -> str | None:
        """What the gate reads."""

        def read(value: Any) -> str | None:
            return "last" if str(value).lower().replace("-", "_") in LAST else None

        return self._one(SIGNAL, read, of_neither)

    def check_temperature(self) -> None:
        """Refuse a softmax with a temperature.

        Raises:
            CheckpointError: If there is one.
        """
        self._one(TEMPERATURE, lambda value: number(value) if number(value) == 1 else None)

    def dims(self, width: int) -> list[int] | None:
        """Sink channels of the vision tower of that width: a number or a list."""

        def read(value: Any) -> list[int] | None:
            found = whole_numbers(value)
            return found if found and min(found) >= 0 and max(found) < width else None

        def speaks(key: str, value: Any) -> bool:
            named = bool(words(key) & {"sink", "sinks"}) or isinstance(value, list)
            return named and not of_language(key)

        return self._one(SINK_DIMS, read, speaks)

    def tau(self) -> float | None:
        """The threshold for V-sinks."""
        return self._one(SINK_TAU, number, lambda key, value: not of_language(key))

    def bases(self) -> dict[str, str]:
        """Keys whose value looks like the name of a model."""
        return {
            key: value
            for key, value in self.values.items()
            if isinstance(value, str) and "/" in value and ("model" in key or "base" in key)
        }

    def _one(
        self,
        what: Meaning,
        read: Callable[[Any], Any],
        speaks: Callable[[str, Any], bool] = lambda key, value: True,
    ) -> Any:
        """The one value with a meaning; null is no value.

        Raises:
            CheckpointError: If a value cannot be read, or keys contradict one another.
        """
        given = {
            key: value
            for key, value in self.values.items()
            if value is not None
            and key not in self.left
            and what.speaks(key)
            and speaks(key, value)
        }
        if what.name in (DIMS, TAU):
            given = {key: value for key, value in given.items() if of_vision(key)} or given
        found = {key: read(value) for key, value in given.items()}
        unread = {key: given[key] for key, value in found.items() if value is None}
        if unread:
            raise CheckpointError(
                f"Got {unread} in sink_cfg.json, read as {what.name}; expected {what.expected}. Write "
                f"{what.write}, or ignore={tuple(unread)} if it says nothing of the gate."
            )
        if any(value != next(iter(found.values())) for value in found.values()):
            raise CheckpointError(
                f"Got several readings of {what.name} in sink_cfg.json: {found}; expected one. Say which "
                f"is meant with an argument of import_gates: {what.write}."
            )
        for key in found:
            self.used[key] = what.name
        return next(iter(found.values()), None)


def flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings under dotted names."""
    out: list[tuple[str, Any]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            out += flat(value, f"{prefix}{key}.")
        else:
            out.append((f"{prefix}{key}", value))
    return out


def group_of(name: str) -> str:
    """Our name of a group.

    Raises:
        CheckpointError: If it is none.
    """
    plain = name.lower().replace("-", "_")
    if plain in ("v", "v_sink", "vsink", "v_sinks", "vit", "vit_sink", "vision_sink"):
        return "V"
    if plain in ("l", "l_sink", "lsink", "l_sinks", "llm", "llm_sink"):
        return "L"
    if plain in ("rest", "other", "others", "ordinary", "non_sink", "nonsink"):
        return "rest"
    raise CheckpointError(
        f"Got a group {name!r} in sink_cfg.json; expected words for V-sinks, L-sinks or the rest. Write "
        "groups=('V', 'rest') with their true order."
    )


def number(value: Any) -> float | None:
    """A finite number, else None."""
    return float(value) if is_number(value) else None


def whole_numbers(value: Any) -> list[int] | None:
    """One whole number or a list of them, as a list; digits in text count."""
    out = []
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, bool) or not (isinstance(one, int) or str(one).isdecimal()):
            return None
        out.append(int(one))
    return out or None

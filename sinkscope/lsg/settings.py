"""Read the settings of somebody else's gate from JSON whose keys nobody has told us."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sinkscope.errors import CheckpointError
from sinkscope.kernels.gating import ACTIVATIONS

NO_LAYER = (
    "num",
    "n_layers",
    "count",
    "total",
    "vision",
    "vit",
    "select",
    "norm",
    "hidden",
    "tower",
)
VISION = ("vision", "vit", "clip", "siglip", "v_")
DIMS, TAU = "vision sink dims", "vision tau"
LANGUAGE = ("llm", "lang", "text", "l_", "lm_")


class Settings:
    """What a JSON file says, by meaning; every key that was used or not is kept track of.

    Args:
        data: The parsed file.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.values = dict(flat(data))
        self.used: dict[str, str] = {}

    @property
    def unused(self) -> list[str]:
        """Keys that meant nothing to us."""
        return [key for key in self.values if key not in self.used]

    def layers(self) -> list[int] | None:
        """Layers: keys with "layer" in them, whole numbers or lists of them."""

        def read(key: str, value: Any) -> list[int] | None:
            if "layer" not in key or any(part in key for part in NO_LAYER):
                return None
            return whole_numbers(value)

        return self._one("layers", read)

    def activation(self) -> str | None:
        """The hidden layer's activation: keys with "act"."""

        def read(key: str, value: Any) -> str | None:
            name = str(value).lower().removeprefix("nn.").removesuffix("()")
            return name if "act" in key and name in ACTIVATIONS else None

        return self._one("activation", read)

    def groups(self) -> tuple[str, ...] | int | None:
        """Names of the groups in their order, or how many: keys with "group"."""

        def read(key: str, value: Any) -> tuple[str, ...] | int | None:
            if "group" not in key:
                return None
            if isinstance(value, list) and all(isinstance(one, str) for one in value):
                return tuple(group_of(one) for one in value)
            return value if isinstance(value, int) and not isinstance(value, bool) else None

        return self._one("groups", read)

    def scale(self) -> float | None:
        """What multiplies the softmax: keys with "prior" or "scale", a number."""

        def read(key: str, value: Any) -> float | None:
            if not any(part in key for part in ("prior", "scale")):
                return None
            return float(value) if is_number(value) else None

        return self._one("scale", read)

    def dims(self, width: int) -> list[int] | None:
        """Sink channels of the vision tower of that width: keys with "dim", a number or a list."""

        def read(key: str, value: Any) -> list[int] | None:
            named = "dim" in key and ("sink" in key or isinstance(value, list))
            found = whole_numbers(value) if named and not of_language(key) else None
            return found if found and max(found) < width else None

        return self._one(DIMS, read)

    def tau(self) -> float | None:
        """The threshold for V-sinks: keys with "tau" or "thresh", a number."""

        def read(key: str, value: Any) -> float | None:
            named = ("tau" in key or "thresh" in key) and not of_language(key)
            return float(value) if named and is_number(value) else None

        return self._one(TAU, read)

    def bases(self) -> dict[str, str]:
        """Keys whose value looks like the name of a model."""
        return {
            key: value
            for key, value in self.values.items()
            if isinstance(value, str) and "/" in value and ("model" in key or "base" in key)
        }

    def _one(self, meaning: str, read: Callable[[str, Any], Any]) -> Any:
        """The one value that reads so.

        Raises:
            CheckpointError: If keys contradict one another.
        """
        found = {key: read(key.lower(), value) for key, value in self.values.items()}
        found = {key: value for key, value in found.items() if value is not None}
        if meaning in (DIMS, TAU):
            found = {key: value for key, value in found.items() if of_vision(key.lower())} or found
        if any(value != next(iter(found.values())) for value in found.values()):
            raise CheckpointError(
                f"Got several readings of {meaning} in sink_cfg.json: {found}; expected one. Say which "
                "is meant with an argument of import_gates: layer=, activation=, groups=, scale= or "
                "v_detector=."
            )
        for key in found:
            self.used[key] = meaning
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


def of_vision(key: str) -> bool:
    """Whether a key speaks of the vision tower."""
    return any(part in key for part in VISION)


def of_language(key: str) -> bool:
    """Whether a key speaks of the decoder."""
    return not of_vision(key) and any(part in key for part in LANGUAGE)


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


def is_number(value: Any) -> bool:
    """Whether that is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole_numbers(value: Any) -> list[int] | None:
    """One whole number or a list of them, as a list; digits in text count."""
    out = []
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, bool) or not (isinstance(one, int) or str(one).isdigit()):
            return None
        out.append(int(one))
    return out or None

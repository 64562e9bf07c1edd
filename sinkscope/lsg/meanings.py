"""What the settings of somebody else's gate may mean, by the words of their keys.

A key is cut into words. It has a meaning if one of its words says so and the others are known beside
it: ``gate_layer`` is a layer, ``gate_mlp_layers`` is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sinkscope.kernels.gating import ACTIVATIONS

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
VISION = frozenset({"vision", "vit", "clip", "siglip", "v"})
LANGUAGE = frozenset({"llm", "lang", "language", "text", "decoder", "l", "lm"})
OURS = frozenset({"gate", "gates", "sink", "sinks", "lsg", "cfg", "config"})
EDITED = frozenset({"edit", "edited", "apply", "applied"})
DIMS, TAU = "vision sink dims", "vision tau"


@dataclass(frozen=True)
class Meaning:
    """What a setting may mean.

    Attributes:
        name: In messages.
        heads: A key has one of these words.
        beside: The words it may have beside.
        expected: What its value can be.
        write: What to write instead, as the argument of `import_gates`.
    """

    name: str
    heads: frozenset[str]
    beside: frozenset[str]
    expected: str
    write: str

    def speaks(self, key: str) -> bool:
        """Whether a key means this, by its last part, or its last two if the head is in the first."""
        parts = key.split(".")
        for tail in (parts[-1:], parts[-2:]):
            said = words(".".join(tail))
            if said & self.heads:
                return all(w.isdigit() or w in self.heads | self.beside | OURS for w in said)
        return False


def meaning(name: str, heads: str, beside: str, expected: str, write: str) -> Meaning:
    """A meaning; words are parted by spaces."""
    return Meaning(name, frozenset(heads.split()), frozenset(beside.split()), expected, write)


SIDES = " ".join(sorted(VISION | LANGUAGE))
LAYERS = meaning(
    "layers",
    "layer layers",
    "read edit edited apply applied target source input idx index indices id ids block at "
    "llm lang language text decoder",
    "whole numbers",
    "layer=[...]",
)
ACTIVATION = meaning(
    "activation",
    "act activation",
    "fn func function hidden mlp name type",
    f"one of {ACTIVATIONS}",
    "activation=...",
)
GROUPS = meaning(
    "groups",
    "group groups",
    "num n names count token tokens order",
    "names, or their number",
    "groups=('V', 'rest') in their true order",
)
SCALE = meaning(
    "scale",
    "prior scale",
    "softmax coefficient coefficients out output sum value",
    "a positive number",
    "scale=...",
)
SIGNAL = meaning(
    "signal",
    "signal pool pooling",
    "type mode method token state strategy input",
    "'last', because other words have several readings",
    "signal='last', signal='mean' (all prompt tokens) or signal='visual' (image tokens)",
)
TEMPERATURE = meaning(
    "temperature",
    "temperature temp",
    "softmax",
    "1: a gate here has none",
    "its last layer divided by the temperature into the file",
)
SINK_DIMS = meaning(
    DIMS,
    "dim dims dimension dimensions channel channels",
    f"{SIDES} massive index indices ids tower token tokens",
    "channels of the vision tower",
    "v_detector=...",
)
SINK_TAU = meaning(
    TAU,
    "tau thresh threshold",
    f"{SIDES} massive norm score value tower token tokens",
    "a number",
    "v_detector=...",
)


def words(key: str) -> set[str]:
    """The words of a key, in small letters: cut at what is no letter, and at capitals."""
    return {word.lower() for word in WORD.findall(key)}


def of_vision(key: str) -> bool:
    """Whether a key speaks of the vision tower."""
    return bool(words(key) & VISION)


def of_language(key: str) -> bool:
    """Whether a key speaks of the decoder."""
    return not of_vision(key) and bool(words(key) & LANGUAGE)


def of_neither(key: str, value: Any) -> bool:
    """Whether a key speaks of no tower, so that it may speak of the gate."""
    return not words(key) & (VISION | LANGUAGE)

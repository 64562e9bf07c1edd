"""What the settings of somebody else's gate may mean, by the words of their keys.

A key is cut into words. It has a meaning if one of its words says so and the others are known beside
it: ``gate_layer`` is a layer, ``gate_mlp_layers`` is not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.checks import is_number
from sinkscope.detectors.rules import SinkDimensions
from sinkscope.errors import CheckpointError, InterventionError
from sinkscope.files import read_json
from sinkscope.kernels.gating import ACTIVATIONS
from sinkscope.lsg.building import check_layer, config_for, device_for
from sinkscope.lsg.config import BASES, GROUPS, GateConfig, differences
from sinkscope.lsg.files import AGAIN, as_fp32, read_tensors, source_of
from sinkscope.models.identity import sizes_of

if TYPE_CHECKING:
    from sinkscope.lsg.gate import LSG
    from sinkscope.models.lvlm import LVLM

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

GROUP_WORDS = meaning(
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

        return self._one(GROUP_WORDS, read)

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


ROLES = ("norm.weight", "norm.bias", "inner.weight", "inner.bias", "outer.weight", "outer.bias")

OTHERS = (
    "projector",
    "mm_projector",
    "multi_modal_projector",
    "embed_tokens",
    "embeddings",
    "lora_a",
    "lora_b",
    "lora_embedding_a",
    "lora_embedding_b",
    "lora_magnitude_vector",
    "lm_head",
    "vision_tower",
    "vision_model",
    "original_module",  # the untrained copy that peft keeps beside modules_to_save
)

"""Modules that lie beside a gate in such files and are none: parts of names between dots."""

NORMS = ("norm", "ln")

GATES = ("gate", "lsg", "sink")

SHIFTS = ("bias", "b", "beta", "shift")

NUMBERED = re.compile(
    r"(?:^|[._])(layers?|blocks?|h|l|gates?|lsg)[._]?(\d+)(?=[._]|$)", re.IGNORECASE
)

MANY_GROUPS = (2, 3)


@dataclass(frozen=True)
class Match:
    """One gate that was found.

    Attributes:
        names: The tensor's name by role; biases and norm may lack.
        transposed: Roles whose matrix is ``[in, out]`` in the file.
        number: The number in the names that tells it from others, or None.
        by_layer: Whether that number stands behind "layer" or "block", not behind "gate".
    """

    names: Mapping[str, str]
    transposed: frozenset[str]
    number: int | None
    by_layer: bool


def find_gates(
    tensors: Mapping[str, Tensor], width: int, ignore: Sequence[str]
) -> tuple[list[Match], list[str]]:
    """All gates of a file.

    Args:
        tensors: By name.
        width: The decoder's width: what a gate reads.
        ignore: Names, or parts of them, to leave alone.

    Returns:
        The gates in the order of their numbers, and the names that were ignored.

    Raises:
        CheckpointError: If there is none, or something fits twice or not at all.
    """
    skipped = [
        n
        for n in tensors
        if any(part in OTHERS for part in n.lower().split("."))
        or any(i in n.lower() for i in ignore)
    ]
    left = {n: tuple(t.shape) for n, t in tensors.items() if n not in skipped}
    firsts = [n for n, shape in left.items() if len(shape) == 2 and width in shape]
    pairs = {n: seconds(n, left, width) for n in firsts}
    pairs = {n: found for n, found in pairs.items() if found}
    if not pairs:
        listed = "\n  ".join(f"{n} {tuple(t.shape)}" for n, t in tensors.items())
        raise CheckpointError(
            f"Got no gate; expected a matrix [hidden, {width}] and one [2 or 3, hidden] for this "
            f"model. The file holds\n  {listed}"
        )
    taken: dict[str, str] = {}
    out = []
    for first, found in pairs.items():
        second = one_of(
            nearest_names(first, found, list(pairs)), f"the last layer of {first}", left
        )
        names = {"inner.weight": first, "outer.weight": second}
        names |= biases(names, left, width)
        names |= norms(names, left, width, list(pairs))
        for role, name in names.items():
            if name in taken:
                raise CheckpointError(
                    f"Got {name!r}, which fits {taken[name]} and {role} of {first}; expected one "
                    f"place for it. {WRITE}"
                )
            taken[name] = f"{role} of {first}"
        out.append(described(names, left, width))
    rest = [n for n in left if n not in taken]
    check_left_over(rest, out, left)
    return sorted(out, key=lambda m: -1 if m.number is None else m.number), [*skipped, *rest]


WRITE = (
    "Write tensors={'inner.weight': name, ...} with all names of one gate, or ignore=('part of a "
    "name',) for what is no part of it."
)


def named_gate(
    names: Mapping[str, str], tensors: Mapping[str, Tensor], width: int
) -> tuple[list[Match], list[str]]:
    """The gate whose tensors the user has named.

    Raises:
        CheckpointError: If a role or a name is unknown, or a matrix is missing.
    """
    wrong = sorted(set(names) - set(ROLES)) + sorted(set(names.values()) - set(tensors))
    lacks = [role for role in ("inner.weight", "outer.weight") if role not in names]
    if wrong or lacks:
        raise CheckpointError(
            f"Got tensors={dict(names)} with unknown {wrong} and without {lacks}; expected roles "
            f"among {ROLES} and names among {sorted(tensors)}."
        )
    left = {n: tuple(t.shape) for n, t in tensors.items()}
    return [described(names, left, width)], [n for n in tensors if n not in names.values()]


def seconds(first: str, shapes: Mapping[str, tuple[int, ...]], width: int) -> list[str]:
    """Matrices that may follow this one: from its hidden width to two or three groups."""
    rows, columns = shapes[first]
    hidden = {size for size, other in ((rows, columns), (columns, rows)) if other == width}
    return [
        name
        for name, shape in shapes.items()
        if name != first
        and len(shape) == 2
        and any(a in MANY_GROUPS and b in hidden for a, b in (shape, shape[::-1]))
    ]


def biases(
    names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], width: int
) -> dict[str, str]:
    """Vectors that stand beside the matrices: same name but for its last part."""
    out = {}
    for part in ("inner", "outer"):
        stem = words_matching(names[f"{part}.weight"])[:-1]
        size = out_size(names[f"{part}.weight"], shapes, width, part)
        found = [n for n, s in shapes.items() if s == (size,) and words_matching(n)[:-1] == stem]
        found = [n for n in found if is_shift(n)]
        if found:
            out[f"{part}.bias"] = one_of(found, f"the bias of {names[f'{part}.weight']}", shapes)
    return out


def norms(
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    width: int,
    firsts: Sequence[str],
) -> dict[str, str]:
    """The LayerNorm's vectors: of the model's width, and nearest by name to this gate."""
    first = names["inner.weight"]
    mine = [n for n, s in shapes.items() if s == (width,) and n not in names.values()]
    mine = [n for n in mine if belongs(n, first, firsts)]
    called = [n for n in mine if any(part in word for part in NORMS for word in words_matching(n))]
    out = {}
    for role, shift in (("norm.weight", False), ("norm.bias", True)):
        found = [n for n in called or mine if is_shift(n) == shift]
        found = nearest_names(first, found, firsts)
        if found:
            out[role] = one_of(found, f"{role} of the gate of {first}", shapes)
    return out


def belongs(name: str, first: str, firsts: Sequence[str]) -> bool:
    """Whether a name is of this gate rather than of another: by its beginning, else by its number."""
    near = {one: common(name, one) for one in firsts}
    ties = [one for one, length in near.items() if length == max(near.values())]
    return first in ties and (len(ties) == 1 or tag_of(first, firsts) <= set(words_matching(name)))


def tag_of(first: str, firsts: Sequence[str]) -> set[str]:
    """The numbers in a name that tell it from the same matrix of other gates."""
    shared = set(words_matching(first)).intersection(*(words_matching(one) for one in firsts))
    return {word for word in words_matching(first) if word.isdigit()} - shared


def described(names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], width: int) -> Match:
    """The match of these names, with checked shapes.

    Raises:
        CheckpointError: If the shapes are not those of a gate.
    """
    transposed = set()
    rows, columns = shapes[names["inner.weight"]]
    if columns != width:
        transposed.add("inner.weight")
    hidden = columns if "inner.weight" in transposed else rows
    if shapes[names["outer.weight"]][1] != hidden:
        transposed.add("outer.weight")
    groups = shapes[names["outer.weight"]]["outer.weight" in transposed]
    wants = {
        "inner.weight": (width, hidden) if "inner.weight" in transposed else (hidden, width),
        "outer.weight": (hidden, groups) if "outer.weight" in transposed else (groups, hidden),
        "inner.bias": (hidden,),
        "outer.bias": (groups,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    wrong = [
        f"{n} {shapes[n]}, expected {wants[r]}" for r, n in names.items() if shapes[n] != wants[r]
    ]
    if wrong or groups not in MANY_GROUPS:
        raise CheckpointError(
            f"Got tensors that make no gate of a decoder of width {width} with 2 or 3 groups: "
            f"{wrong or shapes[names['outer.weight']]}. {WRITE}"
        )
    number, by_layer = numbered(names["inner.weight"], names["outer.weight"])
    return Match(dict(names), frozenset(transposed), number, by_layer)


def out_size(name: str, shapes: Mapping[str, tuple[int, ...]], width: int, part: str) -> int:
    """How many numbers a matrix puts out."""
    rows, columns = shapes[name]
    if part == "inner":
        return rows if columns == width else columns
    return rows if rows in MANY_GROUPS else columns


def check_left_over(
    rest: Sequence[str], gates: Sequence[Match], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse tensors inside a gate that found no place: they would change what it does.

    Raises:
        CheckpointError: If there are any.
    """
    roots = [root_of(gate.names["inner.weight"], gate.names["outer.weight"]) for gate in gates]
    inside = [
        name
        for name in rest
        if any(part in word for part in GATES for word in words_matching(name))
        or any(words_matching(name)[: len(root)] == root for root in roots)
    ]
    if inside:
        listed = ", ".join(f"{n} {shapes[n]}" for n in inside)
        raise CheckpointError(
            f"Got tensors inside a gate that have no place in it: {listed}; expected a LayerNorm, two "
            f"matrices and their biases, whose places are told by shape and name. {WRITE}"
        )


def one_of(found: Sequence[str], what: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The only candidate.

    Raises:
        CheckpointError: If there are several.
    """
    if len(found) > 1:
        listed = ", ".join(f"{name} {shapes[name]}" for name in found)
        raise CheckpointError(f"Got several candidates for {what}: {listed}; expected one. {WRITE}")
    return found[0]


def nearest_names(name: str, others: Sequence[str], firsts: Sequence[str] = ()) -> list[str]:
    """Those that share the longest beginning with a name; ties are settled by the gate's number."""
    best = max((common(name, other) for other in others), default=0)
    found = [other for other in others if common(name, other) == best]
    tag = tag_of(name, firsts) if len(firsts) > 1 else set()
    same = [other for other in found if tag and tag <= set(words_matching(other))]
    return same if len(found) > 1 and same else found


def root_of(first: str, second: str) -> list[str]:
    """The beginning of the names of one gate: as far as the word that says "gate" and its number."""
    shared = words_matching(first)[: common(first, second)]
    called = [i for i, word in enumerate(shared) if any(part in word for part in GATES)]
    if not called:
        return shared[:-1]
    end = called[-1] + 1
    return shared[: end + 1] if shared[end : end + 1] and shared[end].isdigit() else shared[:end]


def words_matching(name: str) -> list[str]:
    """A name cut at dots and underscores, in small letters."""
    return re.split(r"[._/]", name.lower())


def is_shift(name: str) -> bool:
    """Whether a name ends like that of a bias."""
    return words_matching(name)[-1].rstrip("0123456789") in SHIFTS


def common(one: str, other: str) -> int:
    """How many of their first words two names share."""
    count = 0
    for a, b in zip(words_matching(one), words_matching(other), strict=False):
        if a != b:
            break
        count += 1
    return count


def numbered(first: str, second: str) -> tuple[int | None, bool]:
    """The number of a gate in both its names, and whether it stands behind "layer" or "block"."""
    shared = ".".join(words_matching(first)[: common(first, second)])
    found = NUMBERED.findall(shared)
    for word, number in found:
        if word.rstrip("s") not in ("gate", "lsg"):
            return int(number), True
    if found:
        return int(found[-1][1]), False
    both = {word for word in words_matching(first) if word.isdigit()} & set(words_matching(second))
    return (int(both.pop()), False) if len(both) == 1 else (None, False)


SETTINGS = "sink_cfg.json"

RULE = (DIMS, TAU)

DEFAULTS = MappingProxyType(
    {"activation": "gelu", "scale": 1.0, "signal": "last", "decode": "frozen"}
)


@dataclass
class Reading:
    """One import under way: what was matched and assumed so far.

    Attributes:
        lvlm: The model.
        settings: What the file says.
        base: From what the file counts.
        assumed: Sentences.
        matched: Pairs.
        order: For each of our groups, which of the file's coefficients it is.
    """

    lvlm: LVLM
    settings: Settings
    base: int
    assumed: list[str]
    matched: list[tuple[str, str]]
    order: list[int] = field(default_factory=list)

    def check_base(self) -> None:
        """Refuse files that name a model we know to be another.

        Raises:
            InterventionError: If so, with the differences.
        """
        for key, name in self.settings.bases().items():
            known = BASES.get(name)
            self.settings.used[key] = "the model" if known else "a model unknown to us, not checked"
            lines = differences(known, sizes_of(self.lvlm.anatomy)) if known else []
            if lines:
                listed = "\n  ".join(lines)
                raise InterventionError(
                    f"Got gates for {name!r}; expected gates for {self.lvlm.name!r}.\n  {listed}"
                )
        self.assumed.append(f"the gates were trained on the weights of {self.lvlm.name!r}")

    def layers(
        self, matches: Sequence[Match], given: int | str | Sequence[int | str] | None
    ) -> list[int | str]:
        """The block that each gate reads, in our count.

        An order that is given holds; names tell the layers only where nothing else does.

        Raises:
            CheckpointError: If it is not said, said in two ways, or said of two gates.
            LayerError: If it is beyond the model.
        """
        numbers = [match.number for match in matches]
        if given is not None:
            out = [given] if isinstance(given, (int, str)) else list(given)
            self._check_order(numbers, out)
            named = self._named(matches)
            if named and named != out:
                self.assumed.append(f"layers {out} as asked, though names say {numbers}")
            elif len(matches) > 1 and not named:
                self._in_order(numbers, out)
        else:
            said = self.settings.layers()
            out = self._by_name(matches) if said is None else self._by_file(matches, said)
            self.assumed.append(f"layers {out}, counted from 0, are the blocks that are read")
        if len(set(out)) < len(out):
            raise CheckpointError(
                f"Got the layers {out} for the gates with the numbers {numbers}; expected another one "
                "for each. Write layer=[...] with the true ones, or tensors={...} for one gate alone."
            )
        return [check_layer(one, self.lvlm.anatomy.language.n_layers) for one in out]

    def _by_name(self, matches: Sequence[Match]) -> list[int | str]:
        """The layers that stand in names, where nobody says any."""
        numbers = [match.number for match in matches]
        shifted = self._shifted(matches)
        if not shifted or (not self._named(matches) and self._are_places(numbers)):
            raise CheckpointError(
                f"Got gates with the numbers {numbers} and no layer in {SETTINGS}; expected to "
                f"know which block each reads. Write layer={list(range(len(matches)))} with the "
                "true ones."
            )
        self.assumed.append(f"numbers in names, {numbers}, are layers counted from {self.base}")
        return shifted

    def _by_file(self, matches: Sequence[Match], said: Sequence[int]) -> list[int | str]:
        """The layers that the settings say, one for each gate in their order.

        Raises:
            CheckpointError: If the names say others, or the same in another order.
        """
        numbers = [match.number for match in matches]
        out: list[int | str] = [one - self.base for one in said]
        self._check_order(numbers, out)
        shifted, named = self._shifted(matches), self._named(matches)
        same = set(shifted) == set(out) and not self._are_places(numbers)
        if shifted != out and (named or same):
            raise CheckpointError(
                f"Got {len(matches)} gates with the numbers {numbers} and the layers {out} in "
                f"{SETTINGS} (counted from 0): by their names the gates are of the layers {shifted}, by "
                f"the order of the settings of {out}; expected the same. Write layer={shifted} or "
                f"layer={out}, or another index_base than {self.base}."
            )
        if len(matches) > 1 and not named:
            self._in_order(numbers, out)
        return out

    def _check_order(self, numbers: Sequence[int | None], layers: Sequence[int | str]) -> None:
        """Refuse layers that are not one for each gate, or gates that have no order."""
        if len(layers) != len(numbers):
            raise CheckpointError(
                f"Got {len(numbers)} gates with the numbers {numbers} and the layers {layers} (counted "
                "from 0); expected one layer for each gate. Write layer=[...]."
            )
        if len(set(numbers)) < len(numbers):
            raise CheckpointError(
                f"Got {len(numbers)} gates with the numbers {numbers} and the layers {layers}; expected "
                "numbers that tell which gate comes first. Import them one by one with tensors={...}."
            )

    def _shifted(self, matches: Sequence[Match]) -> list[int | str]:
        """The numbers in names as layers in our count; none if a gate has no number."""
        numbers = [match.number for match in matches if match.number is not None]
        return [one - self.base for one in numbers] if len(numbers) == len(matches) else []

    def _named(self, matches: Sequence[Match]) -> list[int | str]:
        """The layers of gates that are all named by one, such as ``layers.3.gate``; else none."""
        return self._shifted(matches) if all(match.by_layer for match in matches) else []

    def _are_places(self, numbers: Sequence[int | None]) -> bool:
        """Whether numbers only count the gates: 0, 1, 2 ..."""
        return list(numbers) == list(range(len(numbers)))

    def _in_order(self, numbers: Sequence[int | None], layers: Sequence[int | str]) -> None:
        """Note which gate is of which layer."""
        self.assumed.append(f"gates in the order {numbers} are of the layers {list(layers)}")

    def config(
        self,
        many: int,
        groups: Sequence[str] | None,
        given: Mapping[str, Any],
        v_detector: Any,
        l_detector: Any,
        normalize: str,
    ) -> GateConfig:
        """The choices that all gates of the file share.

        Args:
            many: How many coefficients there are.
            groups: What they stand for, if that was given.
            given: activation, scale, signal and decode; None for what the file says or the default.
            v_detector: As given.
            l_detector: As given.
            normalize: For the file's rule.

        Raises:
            CheckpointError: If the number of groups is not that of the coefficients.
        """
        made = {name: value for name, value in given.items() if value is not None}
        named = tuple(groups) if groups is not None else self._groups(many)
        if len(named) != many:
            raise CheckpointError(
                f"Got groups={named} and {many} coefficients; expected a name for each."
            )
        if "activation" not in made and (said := self.settings.activation()) is not None:
            made["activation"] = said
        if "signal" not in made and (said := self.settings.signal()) is not None:
            made["signal"] = said
        self.settings.check_temperature()
        if "scale" not in made and (prior := self.settings.scale()) is not None:
            made["scale"] = prior
            self.assumed.append(f"the file's prior or scale, {prior:g}, multiplies the softmax")
        for name, default in DEFAULTS.items():
            if name not in made:
                made[name] = self._assume(name, default)
        if v_detector is None and "V" in named:
            v_detector = self._rule(normalize)
        ours = next((one for one in GROUPS if set(one) == set(named)), named)
        self.order = [named.index(one) for one in ours]
        return config_for(self.lvlm, 0, v_detector, l_detector, None, {**made, "groups": ours})

    def gate(
        self, match: Match, config: GateConfig, tensors: Mapping[str, Tensor], path: Path
    ) -> LSG:
        """One gate with the tensors of the file."""
        from sinkscope.lsg.gate import LSG

        first = match.names["inner.weight"]
        hidden = tensors[first].shape["inner.weight" in match.transposed]
        if tensors[first].shape[0] == tensors[first].shape[1]:
            self.assumed.append(f"the rows of the square matrix {first} are its outputs")
        affine = any(role.startswith("norm") for role in match.names)
        gate = LSG(replace(config, hidden=int(hidden), affine=affine))
        if not affine:
            self.assumed.append("no tensor of a LayerNorm: there is one without weights")
        state = {}
        for role, value in gate.state_dict().items():
            if role not in match.names:
                state[role] = torch.full_like(value, float(role == "norm.weight"))
                self.assumed.append(f"{role} is not in the file: {state[role].flatten()[0]:g}")
                continue
            name = match.names[role]
            read = as_fp32(name, tensors[name], path)
            read = read.T.contiguous() if role in match.transposed else read
            state[role] = read[self.order] if role.startswith("outer") else read
            note = " (transposed)" if role in match.transposed else ""
            shape = "x".join(str(size) for size in tensors[name].shape)
            kind = str(tensors[name].dtype).removeprefix("torch.")
            self.matched.append((name, f"layer {config.layer}: {role}{note}, {shape} {kind}"))
        gate.load_state_dict(state)
        return gate.to(device_for(self.lvlm))

    def _groups(self, many: int) -> tuple[str, ...]:
        """The groups that the file names, or those of the paper."""
        said = self.settings.groups()
        if isinstance(said, tuple):
            return said
        if said not in (None, many):
            raise CheckpointError(
                f"Got {said} groups in {SETTINGS} and {many} coefficients; expected as many. Write "
                "groups=(...)."
            )
        return self._assume("groups", ("V", "rest") if many == 2 else ("V", "L", "rest"))

    def _rule(self, normalize: str) -> Any:
        """The file's rule for V-sinks; None for the default one."""
        dims, tau = self.settings.dims(self.lvlm.anatomy.vision.d_model), self.settings.tau()
        if dims is None or tau is None:
            for key in [key for key, use in self.settings.used.items() if use in RULE]:
                del self.settings.used[key]  # one without the other is no rule
            self.assumed.append(
                "no channels and threshold of V-sinks in the file: the rule is that of LSG.for_model"
            )
            return None
        self.assumed.append(
            f"the file's rule for V-sinks is read with normalize={normalize!r} and >="
        )
        return SinkDimensions(tuple(dims), tau, normalize=normalize, strict=False)

    def _assume(self, name: str, value: Any) -> Any:
        """A default, noted."""
        self.assumed.append(f"{name} is {value!r}")
        return value


TENSORS = ("non_lora_trainables.bin", "non_lora_trainables.safetensors")


@dataclass(frozen=True)
class ImportedGates:
    """Gates read from files of another tool, and how they were read.

    Attributes:
        gates: The gates, by layer.
        matched: What was matched to what: ``(in the file, here)``.
        ignored: Tensors and settings that were left out.
        assumed: What the files do not say and was taken for granted.
    """

    gates: tuple[LSG, ...]
    matched: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    assumed: tuple[str, ...]

    def __str__(self) -> str:
        wide = max((len(one) for one, _ in self.matched), default=0)
        lines = ["matched"]
        lines += [f"  {one:<{wide}}  ->  {other}" for one, other in self.matched]
        lines += ["ignored", *(f"  {one}" for one in self.ignored or ("nothing",))]
        lines += ["assumed", *(f"  {one}" for one in self.assumed or ("nothing",))]
        return "\n".join(lines)


def import_gates(
    path_or_repo: str | Path,
    lvlm: LVLM,
    *,
    layer: int | str | Sequence[int | str] | None = None,
    index_base: int = 0,
    groups: Sequence[str] | None = None,
    activation: str | None = None,
    scale: float | None = None,
    v_detector: Any = None,
    l_detector: Any = None,
    signal: str | None = None,
    decode: str | None = None,
    normalize: str = "none",
    tensors: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    revision: str | None = None,
    subfolder: str = "",
    show: bool = True,
) -> ImportedGates:
    """Gates from ``non_lora_trainables.bin`` and ``sink_cfg.json``, in fp32.

    The schema of these files is unknown to us; this reads plausible layouts and says what it did.
    An argument outweighs the file, and the file outweighs a default.

    Args:
        path_or_repo: A folder, or a hub repository.
        lvlm: The model the gates are for. Its decoder's width tells the matrices apart.
        layer: The block that a gate reads, counted from 0 as everywhere here, or ``"embed"``; for
            several gates one each, in the order of the file's numbers. None for what the file says.
        index_base: From what the *file* counts its layers, 0 or 1.
        groups: What the coefficients stand for, in order. None for the file's, else ("V", "rest"),
            or ("V", "L", "rest") if there are three.
        activation: None for the file's, else "gelu".
        scale: What multiplies the softmax. None for the file's "prior" or "scale", else 1.
        v_detector: The rule for V-sinks. None for the file's channels and threshold, else as in
            `LSG.for_model`.
        l_detector: The rule for L-sinks, likewise as in `LSG.for_model`.
        signal: As in `GateConfig`. None for the file's, which is refused if it is not the last token,
            else "last".
        decode: As in `GateConfig`; the file is not asked. None for "frozen".
        normalize: ``"none"`` or ``"rms"``, for channels and a threshold of the file.
        tensors: The names of one gate's tensors, by role (``"inner.weight"`` ...), if they are
            not found by themselves.
        ignore: Parts of names of tensors that are no part of a gate, or of keys of settings that say
            nothing of it.
        revision: Branch, tag or commit of a repository.
        subfolder: A folder within, such as the release has for each gate.
        show: Whether to print how the files were read.

    Returns:
        The gates and the table.

    Raises:
        CheckpointError: If files are missing or damaged, a setting cannot be read, or something could
            be read in two ways; the candidates are listed.
        InterventionError: If a choice is impossible, or the file names another model.
        LayerError: If a layer is beyond the model.
    """
    source = source_of(path_or_repo, revision, subfolder)
    path = next((found for name in TENSORS if (found := source.find(name)) is not None), None)
    if path is None:
        raise CheckpointError(
            f"Got {source} without {TENSORS[0]}; expected it there. For what sinkscope wrote, write "
            "ss.LSG.from_pretrained(...)."
        )
    if index_base not in (0, 1):
        raise InterventionError(f"Got index_base={index_base!r}; expected 0 or 1.")
    beside = source.find(SETTINGS)
    read = {} if beside is None else read_json(beside, AGAIN)
    if not isinstance(read, Mapping):
        raise CheckpointError(
            f"Got a {type(read).__name__} in {str(beside)!r}; expected settings by name."
        )
    settings = Settings(read, ignore)
    found = read_tensors(path)
    width = lvlm.anatomy.language.d_model
    matches, left = (
        find_gates(found, width, ignore) if tensors is None else named_gate(tensors, found, width)
    )
    reading = Reading(lvlm, settings, index_base, assumed=[], matched=[])
    if beside is None:
        reading.assumed.append(f"there is no {SETTINGS}; everything is an argument or a default")
    reading.check_base()
    layers = reading.layers(matches, layer)
    choices = {"activation": activation, "scale": scale, "signal": signal, "decode": decode}
    rules = {"v_detector": v_detector, "l_detector": l_detector, "normalize": normalize}
    config = reading.config(groups_in(matches, found), groups, choices, **rules)
    gates = [
        reading.gate(match, replace(config, layer=where), found, path)
        for match, where in zip(matches, layers, strict=True)
    ]
    reading.matched += [(f"{SETTINGS}: {key}", use) for key, use in settings.used.items()]
    ignored = [*left, *(f"{SETTINGS}: {key}" for key in settings.unused)]
    gates.sort(key=lambda gate: gate.config.edited)
    out = ImportedGates(
        tuple(gates), tuple(reading.matched), tuple(ignored), tuple(dict.fromkeys(reading.assumed))
    )
    if show:
        print(out)
    return out


def groups_in(matches: Sequence[Match], tensors: Mapping[str, Tensor]) -> int:
    """How many coefficients the gates of a file have.

    Raises:
        CheckpointError: If they differ.
    """
    counts = {
        tensors[one.names["outer.weight"]].shape["outer.weight" in one.transposed]
        for one in matches
    }
    if len(counts) > 1:
        raise CheckpointError(
            f"Got gates with {sorted(counts)} coefficients in one file; expected the same number. "
            "Import them one by one with tensors={...}."
        )
    return counts.pop()

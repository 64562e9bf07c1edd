"""Find gates among tensors whose names nobody has told us: by shape first, then by name.

A gate is a matrix ``[hidden, d_model]`` and a matrix ``[groups, hidden]`` (or both transposed) that
share the longest beginning of their names, and what belongs to them: biases and a LayerNorm. Whatever
could be read in two ways is refused, with the candidates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sinkscope.errors import CheckpointError

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
        stem = words(names[f"{part}.weight"])[:-1]
        size = out_size(names[f"{part}.weight"], shapes, width, part)
        found = [n for n, s in shapes.items() if s == (size,) and words(n)[:-1] == stem]
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
    called = [n for n in mine if any(part in word for part in NORMS for word in words(n))]
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
    return first in ties and (len(ties) == 1 or tag_of(first, firsts) <= set(words(name)))


def tag_of(first: str, firsts: Sequence[str]) -> set[str]:
    """The numbers in a name that tell it from the same matrix of other gates."""
    shared = set(words(first)).intersection(*(words(one) for one in firsts))
    return {word for word in words(first) if word.isdigit()} - shared


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
        if any(part in word for part in GATES for word in words(name))
        or any(words(name)[: len(root)] == root for root in roots)
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
    same = [other for other in found if tag and tag <= set(words(other))]
    return same if len(found) > 1 and same else found


def root_of(first: str, second: str) -> list[str]:
    """The beginning of the names of one gate: as far as the word that says "gate" and its number."""
    shared = words(first)[: common(first, second)]
    called = [i for i, word in enumerate(shared) if any(part in word for part in GATES)]
    if not called:
        return shared[:-1]
    end = called[-1] + 1
    return shared[: end + 1] if shared[end : end + 1] and shared[end].isdigit() else shared[:end]


def words(name: str) -> list[str]:
    """A name cut at dots and underscores, in small letters."""
    return re.split(r"[._/]", name.lower())


def is_shift(name: str) -> bool:
    """Whether a name ends like that of a bias."""
    return words(name)[-1].rstrip("0123456789") in SHIFTS


def common(one: str, other: str) -> int:
    """How many of their first words two names share."""
    count = 0
    for a, b in zip(words(one), words(other), strict=False):
        if a != b:
            break
        count += 1
    return count


def numbered(first: str, second: str) -> tuple[int | None, bool]:
    """The number of a gate in both its names, and whether it stands behind "layer" or "block"."""
    shared = ".".join(words(first)[: common(first, second)])
    found = NUMBERED.findall(shared)
    for word, number in found:
        if word.rstrip("s") not in ("gate", "lsg"):
            return int(number), True
    if found:
        return int(found[-1][1]), False
    both = {word for word in words(first) if word.isdigit()} & set(words(second))
    return (int(both.pop()), False) if len(both) == 1 else (None, False)

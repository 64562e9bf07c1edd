"""Gates from files of another tool, whose format we have not seen.

Tensors are named by the user, or told apart by shape where only one reading fits; settings are never read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.checks import check_choice
from sinkscope.errors import CheckpointError, InterventionError
from sinkscope.files import read_json
from sinkscope.lsg.building import check_layer, config_for, device_for
from sinkscope.lsg.config import BASES, GROUPS, GateConfig, differences, fingerprint
from sinkscope.lsg.gate import LSG
from sinkscope.lsg.sources import AGAIN, as_fp32, leaves, read_tensors, source_of

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM

FILES = ("non_lora_trainables.bin", "non_lora_trainables.safetensors")
SETTINGS = "sink_cfg.json"
ROLES = ("norm.weight", "norm.bias", "inner.weight", "inner.bias", "outer.weight", "outer.bias")
WEIGHTS = ("weight", "w", "gamma", "g", "scale")
SHIFTS = ("bias", "b", "beta", "shift")
LAYER = re.compile(r"(?:^|[._])(?:layers?|blocks?|h|l)[._]?(\d+)(?=[._])", re.IGNORECASE)
OTHERS = frozenset(
    [
        "projector",
        "mm_projector",
        "multi_modal_projector",
        "embed_tokens",
        "embeddings",
        "lm_head",
        "vision_tower",
        "vision_model",
        "lora_a",
        "lora_b",
        "lora_embedding_a",
        "lora_embedding_b",
        "lora_magnitude_vector",
        "original_module",
    ]
)
"""Modules that lie beside a gate in such files; the last is peft's untrained copy of a saved module."""
WRITE = (
    "Write tensors={'inner.weight': name, ...} with all names of one gate, or ignore=('part of a "
    "name',) for what is no part of it."
)


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
    tensors: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    revision: str | None = None,
    subfolder: str = "",
    show: bool = True,
) -> ImportedGates:
    """Gates from ``non_lora_trainables.bin`` (or ``.safetensors``), in fp32.

    Settings beside it, in ``sink_cfg.json``, are not read, because their keys are unknown to us: where
    there are any, layer, groups, activation, scale, signal and the rule must be given.

    Args:
        path_or_repo: A folder, or a hub repository.
        lvlm: The model the gates are for. Its decoder's width tells the matrices apart.
        layer: The block that a gate reads, counted from 0 as everywhere here, or ``"embed"``; for
            several gates one each, in the order of the numbers in their names. None for the number
            behind "layer" or "block" in the names.
        index_base: From what the names count layers, 0 or 1.
        groups: What the coefficients stand for, in the file's order. None for ("V", "rest"), or
            ("V", "L", "rest") if there are three.
        activation: None for "gelu".
        scale: What multiplies the softmax. None for 1.
        v_detector: The rule for V-sinks. None for that of `LSG.for_model`.
        l_detector: The rule for L-sinks, likewise.
        signal: As in `GateConfig`. None for "last".
        decode: As in `GateConfig`. None for "frozen".
        tensors: The names of one gate's tensors by role, such as ``{"inner.weight": name}``; roles are
            those of `LSG`'s state dict. None to tell them apart by shape.
        ignore: Parts of names of tensors that are no part of a gate, or of keys of settings that say
            nothing of it.
        revision: Branch, tag or commit of a repository.
        subfolder: A folder within, such as one for each gate.
        show: Whether to print how the files were read.

    Returns:
        The gates, and what was matched, ignored and assumed.

    Raises:
        CheckpointError: If files are missing or damaged, a choice that settings may say is not given, or
            tensors fit in no way or in several.
        InterventionError: If a choice is impossible, or the settings name another model.
        LayerError: If a layer is beyond the model.
    """
    check_choice((0, 1), error=InterventionError, index_base=index_base)
    source = source_of(path_or_repo, revision, subfolder)
    path = source.find(FILES[0]) or source.find(FILES[1])
    if path is None:
        raise CheckpointError(
            f"Got {source} without {FILES[0]}; expected it there. For what sinkscope wrote, write "
            "ss.LSG.from_pretrained(...)."
        )
    asked: dict[str, Any] = {
        "groups": groups,
        "activation": activation,
        "scale": scale,
        "signal": signal,
    }
    needed = {"layer": layer, **asked, "v_detector": v_detector}
    settings = read_settings(source.find(SETTINGS), ignore, needed, lvlm)
    found = read_tensors(path)
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    width = lvlm.anatomy.language.d_model
    if tensors is None:
        left = {name: shape for name, shape in shapes.items() if not skipped(name, ignore)}
        matches = match_gates(left, width)
    else:
        check_named(tensors, shapes)
        matches = [dict(tensors)]
    counts = {sizes_of(match, shapes, width)[1] for match in matches}
    if len(counts) > 1:
        raise refused(f"gates with {sorted(counts)} coefficients in one file", "the same number")
    assumed = [f"the gates were trained on the weights of {lvlm.name!r}"]
    layers = layers_of(matches, layer, index_base, assumed)
    layers = [check_layer(one, lvlm.anatomy.language.n_layers) for one in layers]
    usual = {"groups": ("V", "rest") if counts == {2} else ("V", "L", "rest")}
    usual |= {"activation": "gelu", "scale": 1.0, "signal": "last", "decode": "frozen"}
    asked["decode"] = decode
    choices: dict[str, Any] = usual | {k: v for k, v in asked.items() if v is not None}
    assumed += [f"{name} is {value!r}" for name, value in usual.items() if asked[name] is None]
    named = tuple(choices["groups"])
    if {len(named)} != counts:
        raise CheckpointError(
            f"Got groups={named} and {counts.pop()} coefficients; expected a name for each."
        )
    if v_detector is None and "V" in named:
        assumed.append("the rule for V-sinks is that of LSG.for_model")
    choices["groups"] = next((one for one in GROUPS if set(one) == set(named)), named)
    config = config_for(lvlm, 0, v_detector, l_detector, None, choices)
    order = [named.index(one) for one in choices["groups"]]
    matched: list[tuple[str, str]] = []
    gates = [
        build(match, replace(config, layer=where), order, found, path, matched, assumed)
        for match, where in zip(matches, layers, strict=True)
    ]
    gates = sorted((gate.to(device_for(lvlm)) for gate in gates), key=lambda g: g.config.edited)
    ignored = [name for name in shapes if not any(name in match.values() for match in matches)]
    ignored += [f"{SETTINGS}: {key} = {value!r}" for key, value in settings.items()]
    assumed = list(dict.fromkeys(assumed))
    out = ImportedGates(tuple(gates), tuple(matched), tuple(ignored), tuple(assumed))
    if show:
        print(out)
    return out


def read_settings(
    path: Path | None, ignore: Sequence[str], asked: Mapping[str, Any], lvlm: LVLM
) -> dict[str, Any]:
    """The settings beside the tensors, for the eye; refused where a choice they may say is not given.

    A value that is the name of a model known to us must be of this one.
    """
    if path is None:
        return {}
    read = read_json(path, AGAIN)
    if not isinstance(read, Mapping):
        raise CheckpointError(
            f"Got a {type(read).__name__} in {str(path)!r}; expected settings by name."
        )
    out = dict(leaves(read))
    telling = {k: v for k, v in out.items() if not any(part in k.lower() for part in ignore)}
    for key, value in telling.items():
        known = BASES.get(value) if isinstance(value, str) else None
        lines = differences(known, fingerprint(lvlm.anatomy)) if known else []
        if lines:
            listed = "\n  ".join(lines)
            raise InterventionError(
                f"Got gates for {value!r} ({SETTINGS}: {key}); expected gates for {lvlm.name!r}.\n"
                f"  {listed}"
            )
    missing = [name for name, value in asked.items() if value is None]
    if telling and missing:
        raise CheckpointError(
            f"Got {telling} in {SETTINGS}, whose keys are not read, without {missing}; expected every "
            f"choice as an argument. Write {', '.join(f'{name}=...' for name in missing)}, or ignore=(...) "
            "with parts of keys that say nothing of the gate."
        )
    return out


def refused(what: str, expected: str) -> CheckpointError:
    """The error of tensors that fit in no way or in several."""
    return CheckpointError(f"Got {what}; expected {expected}. {WRITE}")


def skipped(name: str, ignore: Sequence[str]) -> bool:
    """Whether a tensor is of a module beside the gate, or to be left alone."""
    name = name.lower()
    return bool(OTHERS & set(name.split("."))) or any(part in name for part in ignore)


def words(name: str) -> list[str]:
    """A name cut at dots, underscores and slashes, in small letters."""
    return re.split(r"[._/]", name.lower())


def pairs_in(shapes: Mapping[str, tuple[int, ...]], width: int) -> list[tuple[str, str]]:
    """Matrices ``[hidden, width]`` and ``[2 or 3, hidden]``, either way round."""
    flat = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    return [
        (one, other)
        for one, first in flat.items()
        for other, last in flat.items()
        if one != other
        and any(
            a == width and (b, groups) in (last, last[::-1])
            for a, b in (first, first[::-1])
            for groups in (2, 3)
        )
    ]


def match_gates(shapes: Mapping[str, tuple[int, ...]], width: int) -> list[dict[str, str]]:
    """The names of every gate's tensors by role, in the order of the numbers in their names.

    Raises:
        CheckpointError: If there is no gate, something fits twice, or something has no place.
    """
    firsts = list(dict(pairs_in(shapes, width)))
    if not firsts:
        listed = "\n  ".join(f"{name} {shape}" for name, shape in shapes.items())
        wanted = f"a matrix [hidden, {width}] and one [2 or 3, hidden] for this model"
        raise refused("no gate", f"{wanted}. The file holds\n  {listed}\n")
    if len(firsts) == 1:
        return [match_gate(shapes, width)]
    at = [i for i, some in enumerate(zip(*map(words, firsts), strict=False)) if len(set(some)) > 1]
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        own = words(name)
        parts.setdefault(own[at[0]] if len(at) == 1 and at[0] < len(own) else "", {})[name] = shape
    numbers = {part: re.findall(r"\d+", part) for part in parts}
    if any(len(found) != 1 for found in numbers.values()):
        what = f"the first matrices {firsts}, and a number does not tell all tensors of their gates apart"
        raise refused(what, "one gate, or a number at one place of all names")
    ordered = sorted(parts, key=lambda part: int(numbers[part][0]))
    return [match_gate(parts[part], width) for part in ordered]


def match_gate(shapes: Mapping[str, tuple[int, ...]], width: int) -> dict[str, str]:
    """The names of one gate's tensors by role; biases and norm may lack, nothing may be left over."""
    pairs = pairs_in(shapes, width)
    if len(pairs) != 1:
        listed = ", ".join(f"{a} {shapes[a]} with {b} {shapes[b]}" for a, b in pairs)
        raise refused(f"several candidates for two matrices: {listed or list(shapes)}", "one pair")
    out = dict(zip(("inner.weight", "outer.weight"), pairs[0], strict=True))
    hidden, many = sizes_of(out, shapes, width)
    for role, size, beside, endings in (
        ("inner.bias", hidden, "inner.weight", SHIFTS),
        ("outer.bias", many, "outer.weight", SHIFTS),
        ("norm.weight", width, None, WEIGHTS),
        ("norm.bias", width, "norm.weight", SHIFTS),
    ):
        stem = words(out[beside])[:-1] if beside in out else None
        found = [
            name
            for name, shape in shapes.items()
            if shape == (size,) and name not in out.values()
            if words(name)[-1].rstrip("0123456789") in endings
            if beside is None or words(name)[:-1] == stem
        ]
        if len(found) > 1:
            listed = ", ".join(f"{name} {shapes[name]}" for name in found)
            raise refused(f"several candidates for {role} of {pairs[0][0]}: {listed}", "one")
        out.update(zip([role], found, strict=False))
    rest = [f"{name} {shape}" for name, shape in shapes.items() if name not in out.values()]
    if rest:
        what = f"tensors that have no place in a gate: {', '.join(rest)}"
        raise refused(what, "a LayerNorm and two matrices, with weights and biases called so")
    return out


def check_named(names: Mapping[str, str], shapes: Mapping[str, Any]) -> None:
    """Refuse roles and names that are unknown, and a gate without its two matrices."""
    wrong = sorted(set(names) - set(ROLES)) + sorted(set(names.values()) - set(shapes))
    lacks = [role for role in ("inner.weight", "outer.weight") if role not in names]
    if wrong or lacks:
        raise CheckpointError(
            f"Got tensors={dict(names)} with unknown {wrong} and without {lacks}; expected roles among "
            f"{ROLES} and names among {sorted(shapes)}."
        )


def sizes_of(
    names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], width: int
) -> tuple[int, int]:
    """The hidden width of a gate and how many coefficients it has; matrices may lie either way round."""
    first, last = shapes[names["inner.weight"]], shapes[names["outer.weight"]]
    hidden = next((size for size in first if size != width), width)
    many = next((size for size in last if size != hidden), hidden)
    wants = {"inner.weight": (hidden, width), "outer.weight": (many, hidden)}
    wants |= {"inner.bias": (hidden,), "outer.bias": (many,)}
    wrong = {
        f"{name} {shapes[name]}": wants.get(role, (width,))
        for role, name in names.items()
        if sorted(shapes[name]) != sorted(wants.get(role, (width,)))
    }
    if wrong or many not in (2, 3):
        what = (
            f"tensors that make no gate of a decoder of width {width}: {wrong or f'{many} groups'}"
        )
        raise refused(what, "these shapes, and 2 or 3 groups")
    return hidden, many


def layers_of(
    matches: Sequence[Mapping[str, str]],
    given: int | str | Sequence[int | str] | None,
    base: int,
    assumed: list[str],
) -> list[int | str]:
    """The block that each gate reads, counted from 0: as given, else as the names say.

    Raises:
        CheckpointError: If nobody says it, or says it of two gates.
    """
    firsts = [match["inner.weight"] for match in matches]
    said = [
        {tuple(LAYER.findall(match[f"{part}.weight"])[:1]) for part in ("inner", "outer")}
        for match in matches
    ]
    plain = all(len(one) == 1 and () not in one for one in said)  # in both names, and the same
    named: list[int | str] = [int(one.pop()[0]) - base for one in said] if plain else []
    if given is None and not named:
        raise CheckpointError(
            f"Got gates whose names say no layer, {firsts}; expected to know which block each reads. "
            f"Write layer={list(range(len(matches)))} with the true ones."
        )
    if given is None:
        out = named
        assumed.append(f"layers {out}, counted from 0, are the blocks that are read")
        assumed.append(f"layers in names are counted from {base}")
    else:
        out = [given] if isinstance(given, (int, str)) else list(given)
        if named and named != out:
            assumed.append(f"layers {out} as asked, though names say {named}")
        elif len(matches) > 1 and not named:
            assumed.append(f"gates in the order {firsts} are of the layers {out}")
    if len(out) != len(matches) or len(set(out)) < len(out):
        raise CheckpointError(
            f"Got the layers {out} for the gates of {firsts}; expected another one for each. Write "
            "layer=[...] with the true ones, or tensors={...} for one gate alone."
        )
    return out


def build(
    match: Mapping[str, str],
    config: GateConfig,
    order: Sequence[int],
    tensors: Mapping[str, Tensor],
    path: Path,
    matched: list[tuple[str, str]],
    assumed: list[str],
) -> LSG:
    """One gate with the tensors of the file; ``order`` says which of its coefficients ours are."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    affine = any(role.startswith("norm") for role in match)
    hidden, _ = sizes_of(match, shapes, config.d_model)
    gate = LSG(replace(config, hidden=hidden, affine=affine))
    if not affine:
        assumed.append("no tensor of a LayerNorm: there is one without weights")
    state = {}
    for role, own in gate.state_dict().items():
        if role not in match:
            state[role] = torch.full_like(own, float(role == "norm.weight"))
            assumed.append(f"{role} is not in the file: {int(role == 'norm.weight')}")
            continue
        name, shape = match[role], shapes[match[role]]
        read = as_fp32(name, tensors[name], path)
        note = " (transposed)" if shape != own.shape else ""
        if len(shape) == 2 and shape[0] == shape[1]:
            assumed.append(f"the rows of the square matrix {name} are its outputs")
        read = read.T.contiguous() if note else read
        state[role] = read[order] if role.startswith("outer") else read
        kind = str(tensors[name].dtype).removeprefix("torch.")
        size = "x".join(map(str, shape))
        matched.append((name, f"layer {config.layer}: {role}{note}, {size} {kind}"))
    gate.load_state_dict(state)
    return gate

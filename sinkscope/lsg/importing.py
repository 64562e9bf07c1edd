"""Import gates of another tool: tensors are named, or found by shape where only one reading fits."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sinkscope.checks import check_choice, typed
from sinkscope.errors import CheckpointError, InterventionError
from sinkscope.files import read_json
from sinkscope.lsg.config import BASES, GROUPS, check_layer, differences
from sinkscope.lsg.gate import LSG
from sinkscope.lsg.loading import AGAIN, as_fp32, leaves, read_tensors, source_of
from sinkscope.models.loading import sizes_of
from sinkscope.models.lvlm import LVLM

Shapes: TypeAlias = "Mapping[str, tuple[int, ...]]"
FILES = ("non_lora_trainables.bin", "non_lora_trainables.safetensors")
SETTINGS = "sink_cfg.json"
WEIGHTS = ("weight", "w", "gamma", "g", "scale")
SHIFTS = ("bias", "b", "beta", "shift")
LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h|l)\.?(\d+)\.")
OTHERS = re.compile(
    r"(?:^|\.)(?:(?:mm_|multi_modal_)?projector|embed_tokens|embeddings|lm_head|vision_(?:tower|model)|"
    r"lora_(?:embedding_)?[ab]|lora_magnitude_vector|original_module)(?:\.|$)"
)
"""Modules that lie beside a gate in such files; the last is peft's untrained copy of a saved module."""


@dataclass(frozen=True)
class ImportedGates:
    """Gates read from files of another tool, and how they were read."""

    gates: tuple[LSG, ...]  # by layer
    matched: tuple[tuple[str, str], ...]  # (in the file, here)
    ignored: tuple[str, ...]  # tensors and settings that were left out
    assumed: tuple[str, ...]  # what the files do not say and was taken for granted

    def __str__(self) -> str:
        wide = max([0, *(len(one) for one, _ in self.matched)])
        matched = tuple(f"{one:<{wide}}  ->  {other}" for one, other in self.matched)
        parts = (("matched", matched), ("ignored", self.ignored), ("assumed", self.assumed))
        return "\n".join("\n  ".join([name, *(what or ["nothing"])]) for name, what in parts)


@typed
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
    """Read gates from ``non_lora_trainables.bin`` (or ``.safetensors``), in fp32.

    Settings beside it, in ``sink_cfg.json``, are not read, because their keys are unknown to us: where
    there are any, layer, groups, activation, scale, signal and the rule must be given. CheckpointError if
    files or a choice are missing, or tensors do not fit in just one way; InterventionError if a choice is
    impossible, or the settings name another model.

    Args:
        path_or_repo: A folder, or a hub repository at a ``revision``; the gates may lie in a ``subfolder``.
        lvlm: The model that the gates are for. Its decoder's width tells the matrices apart.
        layer: The block that a gate reads, counted from 0, or ``"embed"``; for several gates a list in
            the order of the numbers in their names. None for the number behind "layer" in names.
        index_base: From what the names count layers, 0 or 1.
        groups: Of the coefficients, in the file's order. None for ("V", "rest") or ("V", "L", "rest").
        activation: None for "gelu". Like ``signal`` (None for "last") and ``decode`` (None for "frozen")
            it is that of `GateConfig`; so is ``scale``, what multiplies the softmax (None for 1).
        v_detector: The rule for V-sinks. None for that of `LSG.for_model`; ``l_detector`` likewise.
        tensors: Names of one gate's tensors by role, a key of `LSG`'s state dict. None for by shape.
        ignore: Parts of names of tensors, or of keys of settings, that have nothing to do with a gate.
        show: Whether to print how the files were read.
    """
    check_choice((0, 1), error=InterventionError, index_base=index_base)
    source = source_of(path_or_repo, revision, subfolder)
    path = source.find(FILES[0]) or source.find(FILES[1])
    if path is None:
        write = "Write ss.LSG.from_pretrained(...) for what sinkscope wrote."
        raise CheckpointError(f"Got {source} without {FILES[0]}; expected it there. {write}")
    asked: dict[str, Any] = dict(groups=groups, activation=activation, scale=scale, signal=signal)
    told = {"layer": layer, **asked, "v_detector": v_detector}
    settings = read_settings(source.find(SETTINGS), ignore, told, lvlm)
    found = read_tensors(path)
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    width = lvlm.anatomy.language.d_model
    matches = match_gates(shapes, width, ignore) if tensors is None else [checked(tensors, shapes)]
    many, *others = sorted({widths_of(match, shapes, width)[1] for match in matches})
    if others or many not in (2, 3):
        wanted = f"matrices [hidden, {width}] and [2, hidden], or [3, hidden] for all gates"
        raise refused(f"tensors of gates with {[many, *others]} coefficients", wanted)
    assumed = [f"the gates were trained on the weights of {lvlm.name!r}"]
    layers = layers_of(matches, layer, index_base, assumed)
    layers = [check_layer(one, lvlm.anatomy.language.n_layers) for one in layers]
    usual: dict[str, Any] = {"groups": ("V", "rest") if many == 2 else ("V", "L", "rest")}
    usual |= {"activation": "gelu", "scale": 1.0, "signal": "last", "decode": "frozen"}
    given = {k: v for k, v in (asked | {"decode": decode}).items() if v is not None}
    assumed += [f"{name} is {value!r}" for name, value in usual.items() if name not in given]
    choices: dict[str, Any] = usual | given
    order = tuple(choices["groups"])
    if len(order) != many:
        what = f"Got groups={order} and {many} coefficients"
        raise CheckpointError(f"{what}; expected as many names.")
    if v_detector is None and "V" in order:
        assumed.append("the rule for V-sinks is that of LSG.for_model")
    choices["groups"] = next((one for one in GROUPS if set(one) == set(order)), order)
    plain = LSG.for_model(lvlm, 0, v_detector=v_detector, l_detector=l_detector, **choices)
    places, matched, gates = [order.index(one) for one in plain.groups], [], []
    for match, where in zip(matches, layers, strict=True):
        gate, names, notes = build(match, plain, where, places, found, path)
        gates.append(gate)
        matched += names
        assumed += notes
    gates.sort(key=lambda gate: gate.config.edited)
    ignored = [name for name in shapes if not any(name in match.values() for match in matches)]
    ignored += [f"{SETTINGS}: {key} = {value!r}" for key, value in settings.items()]
    out = ImportedGates(tuple(gates), tuple(matched), tuple(ignored), tuple(dict.fromkeys(assumed)))
    if show:
        print(out)
    return out


def read_settings(
    path: Path | None, ignore: Sequence[str], asked: Mapping[str, Any], lvlm: LVLM
) -> dict[str, Any]:
    """The settings, to be shown; refused if they may say what is not given, or name another model."""
    read = {} if path is None else read_json(path, AGAIN)
    if not isinstance(read, Mapping):
        raise CheckpointError(f"Got a {type(read).__name__} in {SETTINGS}; expected a dictionary.")
    out = dict(leaves(read))
    telling = {k: v for k, v in out.items() if not any(part in k.lower() for part in ignore)}
    for base in BASES.keys() & {one for one in telling.values() if isinstance(one, str)}:
        if lines := differences(BASES[base], sizes_of(lvlm.anatomy)):
            what = f"Got gates for {base!r} in {SETTINGS}; expected gates for {lvlm.name!r}."
            raise InterventionError("\n  ".join([what, *lines]))
    missing = [name for name, value in asked.items() if value is None]
    if telling and missing:
        what = f"Got {telling} in {SETTINGS}, which is not read, without {missing}"
        write = f"Write {'=..., '.join(missing)}=..., or ignore=('part of a key',)."
        raise CheckpointError(f"{what}; expected every choice. {write}")
    return out


def refused(what: str, expected: str) -> CheckpointError:
    """The error of tensors that fit in no way or in several."""
    write = "Write tensors={'inner.weight': name, ...} for one gate, or ignore=('part of a name',)"
    return CheckpointError(f"Got {what}; expected {expected}. {write}.")


def words(name: str) -> list[str]:
    """A name cut at dots, underscores and slashes, in small letters."""
    return re.split(r"[._/]", name.lower())


def pairs_in(shapes: Shapes, width: int) -> list[tuple[str, str]]:
    """Matrices ``[hidden, width]`` and ``[2 or 3, hidden]``, either way round."""

    def fit(first: tuple[int, ...], last: tuple[int, ...]) -> bool:
        hidden = {size for size, rest in (first, first[::-1]) if rest == width}
        return any(size in hidden and many in (2, 3) for size, many in (last, last[::-1]))

    flat = [name for name, shape in shapes.items() if len(shape) == 2]
    return [(a, b) for a, b in permutations(flat, 2) if fit(shapes[a], shapes[b])]


def match_gates(shapes: Shapes, width: int, ignore: Sequence[str]) -> list[dict[str, str]]:
    """The names of every gate's tensors by role, in the order of the numbers in their names."""
    listed = "\n  ".join(f"{name} {shape}" for name, shape in shapes.items())
    other = [n for n in shapes if OTHERS.search(n.lower()) or any(p in n.lower() for p in ignore)]
    shapes = {name: shape for name, shape in shapes.items() if name not in other}
    firsts = list(dict(pairs_in(shapes, width)))
    if not firsts:
        wanted = f"matrices [hidden, {width}] and [2 or 3, hidden]. The file holds\n  {listed}\n"
        raise refused("no gate", wanted)
    differing = [len(set(some)) > 1 for some in zip(*map(words, firsts), strict=False)]
    place = differing.index(True) if differing.count(True) == 1 else len(differing)
    parts: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        numbers = re.findall(r"\d+", "".join(words(name)[place : place + 1]))
        parts.setdefault(int(numbers[0]) if len(numbers) == 1 else -1, {})[name] = shape
    if len(firsts) == 1 or -1 in parts:  # one gate; several that no number tells apart are refused
        return [match_gate(shapes, width)]
    return [match_gate(part, width) for _, part in sorted(parts.items())]


def match_gate(shapes: Shapes, width: int) -> dict[str, str]:
    """The names of one gate's tensors by role; biases and norm may lack, nothing may be left over."""
    pairs = pairs_in(shapes, width)
    if len(pairs) != 1:
        listed = ", ".join(f"{a} {shapes[a]} with {b} {shapes[b]}" for a, b in pairs)
        raise refused(f"several candidates for two matrices: {listed or list(shapes)}", "one pair")
    out: dict[str, str] = {"inner.weight": pairs[0][0], "outer.weight": pairs[0][1]}
    hidden, many = widths_of(out, shapes, width)
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
        if len(found) == 1:
            out[role] = found[0]
    rest = [f"{name} {shape}" for name, shape in shapes.items() if name not in out.values()]
    if rest:
        what = f"tensors that have no place in a gate, or several the same: {', '.join(rest)}"
        raise refused(what, "a LayerNorm and two matrices, with weights and biases called so")
    return out


def checked(names: Mapping[str, str], shapes: Mapping[str, Any]) -> dict[str, str]:
    """The names of a gate's tensors as the user wrote them; refused if a role or a name is unknown."""
    roles = [f"{part}.{kind}" for part in ("norm", "inner", "outer") for kind in ("weight", "bias")]
    wrong = [*sorted({*names} - {*roles}), *sorted({*names.values()} - {*shapes})]
    both = ("inner.weight", "outer.weight")
    lacks = [role for role in both if len(shapes.get(names.get(role, ""), ())) != 2]
    if wrong or lacks:
        what = f"tensors={dict(names)} with unknown {wrong} and without the matrices {lacks}"
        raise refused(what, f"roles among {roles} and names among {sorted(shapes)}")
    return dict(names)


def widths_of(names: Mapping[str, str], shapes: Shapes, width: int) -> tuple[int, int]:
    """The hidden width of a gate and how many coefficients it has; matrices may lie either way round."""
    hidden = next((size for size in shapes[names["inner.weight"]] if size != width), width)
    return hidden, next((size for size in shapes[names["outer.weight"]] if size != hidden), hidden)


def layers_of(
    matches: Sequence[Mapping[str, str]], given: Any, base: int, assumed: list[str]
) -> list[Any]:
    """The block that each gate reads, counted from 0: as given, else as its names say."""
    firsts, named = [match["inner.weight"] for match in matches], list[int]()
    for match in matches:
        both = zip(words(match["inner.weight"]), words(match["outer.weight"]), strict=False)
        found = LAYER.search(".".join(one for one, other in both if one == other))
        named += [] if found is None else [int(found[1]) - base]
    named = named if len(named) == len(matches) else []
    out = named if given is None else [given] if isinstance(given, (int, str)) else list(given)
    if given is None:
        assumed.append(f"blocks {out} are read: the layers in names, counted from {base}")
    elif named and named != out:
        assumed.append(f"layers {out} as asked, though names say {named}")
    elif len(matches) > 1 and not named:
        assumed.append(f"gates in the order {firsts} are of the layers {out}")
    if len(out) != len(matches) or len(set(out)) < len(out):
        what = f"Got the layers {out} for the gates of {firsts}; expected one of its own for each."
        write = f"Write layer={list(range(len(matches)))} with the blocks that they read"
        raise CheckpointError(f"{what} {write}, or tensors={{...}}.")
    return out


def build(
    match: Mapping[str, str],
    plain: LSG,
    layer: int | str,
    order: Sequence[int],
    tensors: Mapping[str, Tensor],
    path: Path,
) -> tuple[LSG, list[tuple[str, str]], list[str]]:
    """A gate of the file's tensors, coefficients in our ``order``; what was matched and what assumed."""
    affine = any(role.startswith("norm") for role in match)
    shapes = {name: tuple(tensors[name].shape) for name in match.values()}
    hidden, _ = widths_of(match, shapes, plain.config.d_model)
    gate = LSG(replace(plain.config, layer=layer, hidden=hidden, affine=affine))
    matched, state = list[tuple[str, str]](), {}
    assumed = [] if affine else ["no tensor of a LayerNorm: there is one without weights"]
    for role, own in gate.state_dict().items():
        if role not in match:
            state[role] = torch.full_like(own, float(role == "norm.weight"))
            assumed.append(f"{role} is not in the file: {int(role == 'norm.weight')}")
            continue
        name, shape = match[role], shapes[match[role]]
        read = as_fp32(name, tensors[name], path)
        if sorted(shape) != sorted(own.shape):
            raise refused(f"{name} {shape} for {role} of a gate", f"the shape {tuple(own.shape)}")
        note = " (transposed)" if shape != own.shape else ""
        if len(shape) == 2 and shape[0] == shape[1]:
            assumed.append(f"the rows of the square matrix {name} are its outputs")
        read = read.T.contiguous() if note else read
        state[role] = read[order] if role.startswith("outer") else read
        kind = str(tensors[name].dtype).removeprefix("torch.")
        matched.append((name, f"layer {layer}: {role}{note}, {list(shape)} {kind}"))
    gate.load_state_dict(state)
    return gate.to(plain.outer.weight.device), matched, assumed

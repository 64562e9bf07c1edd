"""Read gates of the paper's released format, whose schema we do not know: guess nothing silently.

The release of Choi et al. (2604.03316) holds ``non_lora_trainables.bin`` and ``sink_cfg.json`` per
gate or stack. We have not seen the files. So tensors are matched by shape and by name, settings by
their keys, every match and every assumption is printed, and what could be read twice is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sinkscope.errors import CheckpointError, InterventionError
from sinkscope.folders import read_json
from sinkscope.lsg.matching import Match, find_gates, named_gate
from sinkscope.lsg.released import SETTINGS, Reading
from sinkscope.lsg.settings import Settings
from sinkscope.lsg.storage import AGAIN, read_tensors, source_of

if TYPE_CHECKING:
    from sinkscope.lsg.gate import LSG
    from sinkscope.models.lvlm import LVLM

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

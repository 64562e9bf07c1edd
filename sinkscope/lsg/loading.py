"""Read one gate from files that anybody may have written: nothing is built before all is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

import sinkscope
from sinkscope.checks import is_whole
from sinkscope.errors import CheckpointError, DetectorError, InterventionError, LayerError
from sinkscope.folders import read_json
from sinkscope.lsg.aliases import canonical
from sinkscope.lsg.checks import check_fingerprint, require
from sinkscope.lsg.choosing import check_layer
from sinkscope.lsg.config import GateConfig
from sinkscope.lsg.storage import AGAIN, CONFIG, Source, as_fp32, read_tensors

if TYPE_CHECKING:
    from sinkscope.lsg.gate import LSG

FORMAT, VERSION = "sinkscope-lsg", 1
STACK = "sinkscope-lsg-stack"
TENSORS, CARD, RECORD = "model.safetensors", "README.md", "training.json"
PICKLE = "pytorch_model.bin"
FILES = frozenset({CONFIG, TENSORS, CARD, RECORD})
FIELDS = frozenset({"format", "format_version", "gate", "versions"})


def read_gate(source: Source, allow_noop: bool) -> LSG:
    """The gate that lies there.

    Raises:
        CheckpointError: If something is missing, damaged, strange, or of another kind.
    """
    from sinkscope.lsg.gate import LSG

    head, source = read_head(source, FORMAT, FIELDS)
    config = read_config(head["gate"], source)
    path = source.find(TENSORS) or source.find(PICKLE)
    if path is None:
        raise CheckpointError(f"Got {source} without {TENSORS}; expected it beside {CONFIG}.")
    tensors = read_tensors(path)
    check_tensors(config, tensors, path)
    gate = LSG(config, allow_noop=allow_noop)
    gate.load_state_dict({name: as_fp32(name, value, path) for name, value in tensors.items()})
    gate.record = read_record(source)
    return gate


def read_record(source: Source) -> dict[str, Any] | None:
    """How the gate was trained; None if that is not told.

    Raises:
        CheckpointError: If the file holds no record.
    """
    path = source.find(RECORD)
    if path is None:
        return None
    found = read_json(path, AGAIN)
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"Got {str(path)!r}, which holds a {type(found).__name__}; expected a training record: names "
            f"and values. {AGAIN}"
        )
    return dict(found)


def read_head(source: Source, kind: str, known: frozenset[str]) -> tuple[Mapping[str, Any], Source]:
    """The checked content of `config.json`, and the source held to its commit.

    Raises:
        CheckpointError: If it is missing, of another kind, or of a newer version.
    """
    path = source.find(CONFIG)
    if path is None:
        raise CheckpointError(f"Got {source} without {CONFIG}; {expected(source, None, kind)}")
    head = read_json(path, AGAIN)
    found = head.get("format") if isinstance(head, Mapping) else None
    if found != kind:
        what = described(head)
        raise CheckpointError(f"Got {source}, {what}; {expected(source, found, kind)}")
    check_version(head, source)
    strange, missing = sorted(set(head) - known), sorted(known - set(head))
    if strange or missing:
        raise CheckpointError(
            f"Got {CONFIG} of {source} with unknown fields {strange} and without {missing}; expected "
            f"{sorted(known)}."
        )
    return head, source.pinned(path)


def check_version(head: Mapping[str, Any], source: Source) -> None:
    """Refuse a version that cannot be read here.

    Raises:
        CheckpointError: If it is newer, or none.
    """
    version, versions = head.get("format_version"), head.get("versions")
    if not is_whole(version) or version > VERSION:
        writer = versions.get("sinkscope") if isinstance(versions, Mapping) else None
        raise CheckpointError(
            f"Got format_version={version!r} in {CONFIG} of {source}, written by sinkscope "
            f"{writer or 'unknown'}; expected at most {VERSION}. Upgrade sinkscope "
            f"({sinkscope.__version__} is here)."
        )
    if version < 1:
        raise CheckpointError(
            f"Got format_version={version} in {CONFIG} of {source}; expected 1 to {VERSION}. {AGAIN}"
        )
    if "versions" in head and not isinstance(versions, Mapping):
        raise CheckpointError(
            f"Got versions={versions!r} in {CONFIG} of {source}; expected the versions of libraries, by "
            f"name. {AGAIN}"
        )


def described(head: Any) -> str:
    """What a foreign config is of, in words."""
    if not isinstance(head, Mapping):
        return f"whose {CONFIG} holds a {type(head).__name__}"
    if "model_type" in head or "architectures" in head:
        return f"a checkpoint of a whole model ({head.get('model_type')!r})"
    if "format" in head:
        return f"which is of the kind {head['format']!r}"
    return f"whose {CONFIG} names no format"


def expected(source: Source, found: Any, kind: str) -> str:
    """What to write instead."""
    if found == STACK and kind == FORMAT:
        return "expected one gate. Write ss.LSG.load_stack(...) for a stack."
    if found == FORMAT and kind == STACK:
        return "expected a stack. Write ss.LSG.from_pretrained(...) for one gate."
    if source.find("sink_cfg.json") is not None:
        return "expected files of sinkscope. Write ss.import_gates(folder, lvlm) for these."
    writes = (
        "gate.save_pretrained(folder)" if kind == FORMAT else "ss.LSG.save_stack(gates, folder)"
    )
    return f"expected what {writes} wrote."


def read_config(data: Any, source: Source) -> GateConfig:
    """The gate's choices, checked before anything is built of them.

    Raises:
        CheckpointError: If they are impossible.
    """
    try:
        config = GateConfig.from_dict(data)
        config = replace(config, model=canonical(config.model))
        if not config.model:
            raise InterventionError("Got no fingerprint of a model; expected its type and sizes.")
        check_fingerprint(config.model)
        check_layer(config.layer, config.model["language_layers"])
        width = config.model["language_width"]
        require(config.d_model == width, "d_model", config.d_model, f"the model's width, {width}")
    except (InterventionError, DetectorError, LayerError) as error:
        raise CheckpointError(f"{CONFIG} of {source} is impossible: {error}") from error
    return config


def check_tensors(config: GateConfig, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not the gate's.

    Raises:
        CheckpointError: If any is missing, left over, or of another shape.
    """
    shapes = shapes_of(config)
    lines = []
    extra = {name: tuple(value.shape) for name, value in tensors.items() if name not in shapes}
    for name, shape in shapes.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            lines.append(f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}")
        elif name not in tensors:
            alike = [other for other, found in extra.items() if found == shape]
            hint = f"; perhaps {alike} is it under another name" if alike else ""
            lines.append(f"{name} {shape} is missing{hint}")
    lines += [f"{name} {shape} is not part of this gate" for name, shape in extra.items()]
    if lines:
        listed = "\n  ".join(lines)
        raise CheckpointError(
            f"Got tensors in {str(path)!r} that do not fit {CONFIG}; expected {sorted(shapes)}.\n"
            f"  {listed}\nFor files of another tool write ss.import_gates(folder, lvlm)."
        )


def shapes_of(config: GateConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a gate's tensors, by name."""
    width, hidden, many = config.d_model, config.hidden, len(config.groups)
    norm = {"norm.weight": (width,), "norm.bias": (width,)} if config.affine else {}
    return norm | {
        "inner.weight": (hidden, width),
        "inner.bias": (hidden,),
        "outer.weight": (many, hidden),
        "outer.bias": (many,),
    }

"""Save and load gates: safetensors, a config with the fingerprint of their model, and a card."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import HfApi
from safetensors.torch import save
from torch import Tensor

import sinkscope
from sinkscope.errors import CheckpointError, DetectorError, InterventionError, LayerError
from sinkscope.folders import read_json
from sinkscope.lsg import card
from sinkscope.lsg.aliases import canonical
from sinkscope.lsg.choosing import check_gates, check_layer, device_for
from sinkscope.lsg.config import GateConfig, rule_of, sketch
from sinkscope.lsg.storage import (
    AGAIN,
    CONFIG,
    HUB_ERRORS,
    Source,
    as_fp32,
    fill,
    read_tensors,
    scrub,
    source_of,
    write_folder,
)

if TYPE_CHECKING:
    from sinkscope.lsg.gate import LSG
    from sinkscope.models.lvlm import LVLM

FORMAT, VERSION = "sinkscope-lsg", 1
STACK = "sinkscope-lsg-stack"
TENSORS, CARD, RECORD = "model.safetensors", "README.md", "training.json"
PICKLE = "pytorch_model.bin"
FILES = frozenset({CONFIG, TENSORS, CARD, RECORD})
STACK_FILES = FILES - {TENSORS}
GATE_FOLDER = re.compile(r"gate-\d{2,}-layer-(\d+|embed)")
"""How the sub-folders of a stack are called by `save_stack`."""
FIELDS = frozenset({"format", "format_version", "gate", "versions"})
STACK_FIELDS = frozenset({"format", "format_version", "gates", "versions"})


def save_gate(gate: LSG, folder: Any, record: Mapping[str, Any] | None) -> None:
    """See `LSG.save_pretrained`."""
    write_folder(Path(folder), files_of(gate, record), foreign)


def push_gate(
    gate: LSG,
    repo: str,
    record: Mapping[str, Any] | None,
    private: bool | None,
    revision: str | None,
    token: str | None,
) -> str:
    """See `LSG.push_to_hub`."""
    files = files_of(gate, record)
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        there = set(api.list_repo_files(repo, revision=revision))
        strange = sorted(there - FILES - {".gitattributes"})
        if strange:
            raise CheckpointError(
                f"Got the repository {repo!r}, which holds {strange[:5]}; expected a new one, or one "
                "of a gate. Choose another name."
            )
        with TemporaryDirectory() as folder:
            fill(Path(folder), files)
            message = f"Gate at {gate.layer}, sinkscope {sinkscope.__version__}"
            done = api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, commit_message=message
            )
    except CheckpointError:
        raise
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"{repo!r} could not be written ({type(error).__name__}: {scrub(error, token)}); expected "
            "a network, a login with write access, and a name such as 'user/gate'. Write "
            "`hf auth login` in a shell, or gate.save_pretrained(folder) to keep it here."
        ) from None  # the chained error may show the request's headers
    return str(done.commit_url)


def load_gate(
    name: Any,
    revision: str | None,
    subfolder: str,
    lvlm: LVLM | None,
    allow_noop: bool,
) -> LSG:
    """See `LSG.from_pretrained`."""
    gate = read_gate(source_of(name, revision, subfolder), allow_noop)
    return gate if lvlm is None else fitted(gate, lvlm)


def save_stack(gates: Any, folder: Any, record: Mapping[str, Any] | None) -> None:
    """See `LSG.save_stack`."""
    listed = check_gates(gates)
    names = [f"gate-{number:02d}-layer-{gate.layer}" for number, gate in enumerate(listed)]
    head = {"format": STACK, "format_version": VERSION, "gates": names, "versions": versions()}
    record = card.plain_record(record)
    files = {CONFIG: as_json(head), CARD: card.of_stack(listed, names, record).encode()}
    if record is not None:
        files[RECORD] = as_json(record)
    for gate, one in zip(listed, names, strict=True):
        files |= {f"{one}/{file}": content for file, content in files_of(gate, None).items()}
    write_folder(Path(folder), files, partial(foreign, kind=STACK))


def load_stack(
    name: Any, revision: str | None, subfolder: str, lvlm: LVLM | None, allow_noop: bool
) -> list[LSG]:
    """See `LSG.load_stack`."""
    source = source_of(name, revision, subfolder)
    head, source = read_head(source, STACK, STACK_FIELDS)
    names = head["gates"]
    plain = isinstance(names, list) and all(
        isinstance(one, str) and one and "/" not in one and not one.startswith(".") for one in names
    )
    if not plain or not names:
        raise CheckpointError(
            f"Got gates={names!r} in {CONFIG} of {source}; expected names of folders beside it."
        )
    out = [read_gate(source.below(one), allow_noop) for one in names]
    return out if lvlm is None else [fitted(gate, lvlm) for gate in out]


def fitted(gate: LSG, lvlm: LVLM) -> LSG:
    """The gate beside the model it was made for.

    Raises:
        InterventionError: If that is another one.
    """
    gate.check_fits(lvlm)
    if not gate.config.weights or not sketch(lvlm.module, lvlm.anatomy.head):
        warnings.warn(
            f"The gate's sizes fit {lvlm.name!r}. Its weights were not compared: "
            + ("the gate knows none." if not gate.config.weights else "the model has none here."),
            UserWarning,
            stacklevel=4,
        )
    return gate.to(device_for(lvlm))


def files_of(gate: LSG, record: Mapping[str, Any] | None) -> dict[str, bytes]:
    """What a gate's folder holds, by name."""
    record = card.plain_record(gate.record if record is None else record)
    tensors = {name: value.detach().float().cpu() for name, value in gate.state_dict().items()}
    broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(
            f"Got a gate with NaN or infinite numbers in {broken}; expected finite ones. Its training "
            "went wrong: lower the learning rate, or save an earlier state."
        )
    head = {"format": FORMAT, "format_version": VERSION, "gate": gate.config.to_dict()}
    out = {
        TENSORS: save({name: value.contiguous() for name, value in tensors.items()}),
        CONFIG: as_json(head | {"versions": versions()}),
        CARD: card.of_gate(gate, record).encode(),
    }
    return out if record is None else out | {RECORD: as_json(record)}


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
    record = source.find(RECORD)
    gate.record = None if record is None else dict(read_json(record, AGAIN))
    return gate


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
    version = head.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version > VERSION:
        writer = (head.get("versions") or {}).get("sinkscope", "unknown")
        raise CheckpointError(
            f"Got format_version={version!r} in {CONFIG} of {source}, written by sinkscope {writer}; "
            f"expected at most {VERSION}. Upgrade sinkscope ({sinkscope.__version__} is here)."
        )
    strange, missing = sorted(set(head) - known), sorted(known - set(head))
    if strange or missing:
        raise CheckpointError(
            f"Got {CONFIG} of {source} with unknown fields {strange} and without {missing}; expected "
            f"{sorted(known)}."
        )
    return head, source.pinned(path)


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
        for rule in (config.v_detector, config.l_detector):
            if rule is not None:
                rule_of(rule)
        check_layer(config.layer, int(config.model["language_layers"]))
        sizes = {"d_model": config.d_model, "hidden": config.hidden, "seed": config.seed}
        wrong = {name: value for name, value in sizes.items() if type(value) is not int}
        if wrong or config.d_model != config.model["language_width"]:
            raise InterventionError(
                f"Got {wrong or sizes} for a model of width {config.model['language_width']}; "
                "expected whole numbers, and d_model of that width."
            )
    except (InterventionError, DetectorError, LayerError, TypeError, ValueError) as error:
        raise CheckpointError(f"{CONFIG} of {source} is impossible: {error}") from error
    except (KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{CONFIG} of {source} is incomplete ({type(error).__name__}: {error}); expected the "
            "fingerprint of the model and the gate's choices, as save_pretrained() wrote them."
        ) from error
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


def foreign(folder: Path, kind: str = FORMAT) -> list[str]:
    """What lies in a folder that no older gate or stack wrote there, as paths within it.

    Only plain files under our names count as ours, and of folders those that `save_stack` listed under
    names of its own, if each holds a gate and nothing else.
    """
    config = folder / CONFIG
    head = read_json(config, AGAIN) if config.is_file() else None
    ours = isinstance(head, Mapping) and head.get("format") == kind
    listed = head.get("gates") if ours and kind == STACK else None
    names = listed if isinstance(listed, list) else []
    files = FILES if kind == FORMAT else STACK_FILES
    out = []
    for path in folder.iterdir():
        if ours and path.name in files and path.is_file() and not path.is_symlink():
            continue
        mine = path.name in names and GATE_FOLDER.fullmatch(path.name)
        if mine and path.is_dir() and not path.is_symlink():
            out += [f"{path.name}/{one}" for one in foreign(path)]
        else:
            out.append(path.name)
    return out


def versions() -> dict[str, str]:
    """What the files were written with."""
    return {
        "sinkscope": sinkscope.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def as_json(data: Mapping[str, Any]) -> bytes:
    """Strict JSON, for people to read."""
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

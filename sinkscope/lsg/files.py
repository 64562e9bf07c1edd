"""Files of gates: written whole or not at all, and read without running any code of theirs.

Not huggingface_hub's PyTorchModelHubMixin: it builds a module before its sizes are compared with the
tensors, writes over foreign files, and knows neither stacks nor the model that a gate was made for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import transformers
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
)
from safetensors.torch import save
from torch import Tensor

from sinkscope import __version__
from sinkscope.checks import is_whole
from sinkscope.errors import (
    CheckpointError,
    DetectorError,
    InterventionError,
    LayerError,
)
from sinkscope.files import read_json, write_whole
from sinkscope.lsg.building import check_layer
from sinkscope.lsg.card import SavedGate, gate_card, plain_record, stack_card
from sinkscope.lsg.config import GateConfig, canonical, check_fingerprint, require
from sinkscope.lsg.sources import AGAIN, HUB_ERRORS, Source, as_fp32, read_tensors, scrub, source_of

FORMAT, STACK, VERSION = "sinkscope-lsg", "sinkscope-lsg-stack", 1
CONFIG, TENSORS, PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"
CARD, RECORD = "README.md", "training.json"
OURS = {FORMAT: {CONFIG, TENSORS, CARD, RECORD}, STACK: {CONFIG, CARD, RECORD}}
HELD = {FORMAT: "gate", STACK: "gates"}
"""The field of `CONFIG` that says what a folder of that kind holds."""
WRITES = {FORMAT: "gate.save_pretrained(folder)", STACK: "ss.LSG.save_stack(gates, folder)"}
READS = {FORMAT: "ss.LSG.from_pretrained(...)", STACK: "ss.LSG.load_stack(...)"}


def load_gate(name: Any, revision: str | None, subfolder: str) -> SavedGate:
    """Read what `save_gate` wrote; see `LSG.from_pretrained`."""
    return read_gate(source_of(name, revision, subfolder))


def load_stack(name: Any, revision: str | None, subfolder: str) -> list[SavedGate]:
    """Read what `save_stack` wrote; see `LSG.load_stack`."""
    source = source_of(name, revision, subfolder)
    names = read_head(source, STACK)
    good = isinstance(names, list) and all(
        isinstance(one, str) and one and "/" not in one and not one.startswith(".") for one in names
    )
    if not good or not names or len(set(names)) < len(names):
        raise CheckpointError(
            f"Got gates={names!r} in {CONFIG} of {source}; expected names of folders beside it."
        )
    within = f"{source.subfolder}/" if source.subfolder else ""
    return [read_gate(replace(source, subfolder=within + one)) for one in names]


def read_gate(source: Source) -> SavedGate:
    """The gate that lies there; its choices are checked first, then its tensors against them."""
    config = read_config(read_head(source, FORMAT), source)
    path = source.find(TENSORS) or source.find(PICKLE)
    if path is None:
        raise CheckpointError(f"Got {source} without {TENSORS}; expected it beside {CONFIG}.")
    tensors = read_tensors(path)
    check_tensors(config, tensors, path)
    tensors = {name: as_fp32(name, value, path) for name, value in tensors.items()}
    told = source.find(RECORD)
    record = None if told is None else read_json(told, AGAIN)
    if told is not None and not isinstance(record, Mapping):
        what = f"Got {str(told)!r}, which holds a {type(record).__name__}"
        raise CheckpointError(f"{what}; expected a training record, values by name. {AGAIN}")
    return SavedGate(config, tensors, record)


def read_head(source: Source, kind: str) -> Any:
    """What `CONFIG` says of a gate or a stack, under the field of its kind.

    Raises:
        CheckpointError: If it is missing, of another kind, or of a newer version.
    """
    path = source.find(CONFIG)
    head = None if path is None else read_json(path, AGAIN)
    if not isinstance(head, Mapping) or head.get("format") != kind:
        found = str(head.get("format")) if isinstance(head, Mapping) else ""
        what = f"whose {CONFIG} holds a {type(head).__name__} of the format {found!r}"
        if path is None:
            what = f"which is without {CONFIG}"
        elif isinstance(head, Mapping) and ("model_type" in head or "architectures" in head):
            what = f"a checkpoint of a whole model ({head.get('model_type')!r})"
        other = READS.get(found, "ss.lsg.import_gates(folder, lvlm) for files of another tool")
        raise CheckpointError(
            f"Got {source}, {what}; expected what {WRITES[kind]} wrote. Write {other}."
        )
    got = f"{CONFIG} of {source}"
    version, versions = head.get("format_version"), head.get("versions", {})
    if not is_whole(version, 1, VERSION) or not isinstance(versions, Mapping):
        raise CheckpointError(
            f"Got format_version={version!r} and versions={versions!r} in {got}; expected 1 to {VERSION}, "
            f"and versions by name. Upgrade sinkscope ({__version__} is here) if the file is newer."
        )
    known = {"format", "format_version", "versions", HELD[kind]}
    strange, missing = sorted(set(head) - known), sorted(known - set(head))
    if strange or missing:
        raise CheckpointError(
            f"Got {got} with unknown fields {strange} and without {missing}; expected {sorted(known)}."
        )
    return head[HELD[kind]]


def read_config(data: Any, source: Source) -> GateConfig:
    """The gate's choices; a CheckpointError if they are impossible or do not fit its own model."""
    try:
        config = GateConfig.from_dict(data)
        config = replace(config, model=canonical(config.model))
        check_fingerprint(config.model)
        check_layer(config.layer, config.model["language_layers"])
        width = config.model["language_width"]
        require(config.d_model == width, "d_model", config.d_model, f"the model's width, {width}")
    except (InterventionError, DetectorError, LayerError) as error:
        raise CheckpointError(f"{CONFIG} of {source} is impossible: {error}") from error
    return config


def check_tensors(config: GateConfig, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not the gate's: missing, left over, or of another shape."""
    width, hidden, many = config.d_model, config.hidden, len(config.groups)
    shapes = {"norm.weight": (width,), "norm.bias": (width,)} if config.affine else {}
    shapes |= {"inner.weight": (hidden, width), "inner.bias": (hidden,)}
    shapes |= {"outer.weight": (many, hidden), "outer.bias": (many,)}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    lines = [
        f"{name}: expected {shapes.get(name, 'none')}, found {found.get(name, 'none')}"
        for name in {**shapes, **found}
        if shapes.get(name) != found.get(name)
    ]
    if lines:
        listed = "\n  ".join(lines)
        raise CheckpointError(
            f"Got tensors in {str(path)!r} that do not fit {CONFIG}; expected {sorted(shapes)}.\n"
            f"  {listed}\nFor files of another tool write ss.lsg.import_gates(folder, lvlm)."
        )


def save_gate(folder: Any, gate: SavedGate) -> None:
    """Write a gate; see `LSG.save_pretrained`."""
    write_folder(Path(folder), files_of(gate), FORMAT)


def save_stack(folder: Any, gates: Sequence[SavedGate], record: Any) -> None:
    """Write several gates; see `LSG.save_stack`."""
    record = plain_record(record)
    names = [f"gate-{place:02d}-layer-{one.config.layer}" for place, one in enumerate(gates)]
    card = stack_card(dict(zip(names, gates, strict=True)), record)
    files = kept(STACK, names, card, record)
    for name, one in zip(names, gates, strict=True):
        files |= {f"{name}/{file}": content for file, content in files_of(one).items()}
    write_folder(Path(folder), files, STACK)


def push_gate(
    repo: str, gate: SavedGate, private: bool | None, revision: str | None, token: str | None
) -> str:
    """Put a gate into a repository; see `LSG.push_to_hub`."""
    files = files_of(gate)
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        there = set(api.list_repo_files(repo, revision=revision))
        refuse_foreign(f"the repository {repo!r}", there - OURS[FORMAT] - {".gitattributes"})
        changes = [CommitOperationAdd(name, content) for name, content in files.items()]
        gone = [CommitOperationDelete(name) for name in there & OURS[FORMAT] - set(files)]
        message = f"Gate at {gate.config.layer}, sinkscope {__version__}"
        done = api.create_commit(repo, [*changes, *gone], commit_message=message, revision=revision)
    except CheckpointError:
        raise
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"{repo!r} could not be written ({scrub(error, token)}); expected a network, a login with "
            "write access, and a name such as 'user/gate'. Write `hf auth login` in a shell."
        ) from None  # the chained error may show the request's headers
    return str(done.commit_url)


def files_of(gate: SavedGate) -> dict[str, bytes]:
    """What a gate's folder holds, by name."""
    record = plain_record(gate.record)
    tensors = {name: value.float().cpu().contiguous() for name, value in gate.tensors.items()}
    broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(
            f"Got a gate with NaN or infinite numbers in {broken}; expected finite ones. Lower the "
            "learning rate, or save an earlier state."
        )
    config = gate.config.to_dict()
    files = kept(FORMAT, config, gate_card(gate, record), record)
    return {TENSORS: save(tensors), **files}


def kept(kind: str, held: Any, card: bytes, record: Mapping[str, Any] | None) -> dict[str, bytes]:
    """The files beside the tensors: strict JSON, for people to read, and the card."""
    versions = {"sinkscope": __version__, "torch": str(torch.__version__)}
    versions["transformers"] = transformers.__version__
    head = {"format": kind, "format_version": VERSION, HELD[kind]: held, "versions": versions}
    out = {CARD: card}
    for name, data in ((CONFIG, head), (RECORD, record)):
        if data is not None:
            text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
            out[name] = f"{text}\n".encode()
    return out


def write_folder(target: Path, files: Mapping[str, bytes], kind: str) -> None:
    """Write a folder that is whole or holds no `CONFIG`; nobody else's file is touched.

    Raises:
        CheckpointError: If something else is there, or it cannot be written.
    """
    target = Path(os.path.realpath(target.expanduser()))
    before = [path.name for path in target.iterdir()] if target.is_dir() else []
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"Got {str(target)!r}, which is a file; expected a folder.")
    refuse_foreign(f"the folder {str(target)!r}", foreign(target, kind) if target.exists() else [])
    made = target.parent / f".{target.name}.{uuid4().hex[:8]}.tmp"
    try:
        try:
            for name, content in files.items():
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                write_whole(made / name, content)
            if target.exists():
                exchange(made, target, before)
            else:
                made.rename(target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{str(target)!r} could not be written ({scrub(error)}); expected a folder you may write "
            "to, with space left. What was there is still there."
        ) from error


def refuse_foreign(where: str, names: Iterable[str]) -> None:
    """Refuse to write where anything else lies."""
    if found := sorted(names):
        raise CheckpointError(
            f"Got {where}, which holds {found[:5]}; expected a new or empty one, or one of the same "
            "kind to replace. Choose another name."
        )


def exchange(made: Path, target: Path, before: Sequence[str]) -> None:
    """Replace the files of a folder; the folder itself stays, with who works in it.

    `CONFIG` leaves first and comes last, so that a folder which is not whole is not read as one. What
    was moved goes back if anything fails.
    """
    old = made.with_suffix(".old")
    old.mkdir()
    moves = [(target / name, old / name) for name in sorted(before, key=lambda n: n != CONFIG)]
    names = sorted((path.name for path in made.iterdir()), key=lambda n: n == CONFIG)
    with ExitStack() as undo:
        undo.callback(old.rmdir)
        for here, there in [*moves, *((made / name, target / name) for name in names)]:
            here.rename(there)
            undo.callback(there.rename, here)
        undo.pop_all()
    shutil.rmtree(old)


def foreign(folder: Path, kind: str) -> list[str]:
    """What lies in a folder that no older gate or stack wrote there, as paths within it.

    Only plain files under our names are ours, and folders that a stack lists under names as
    `save_stack` makes them, if each holds a gate and nothing else.
    """
    config = folder / CONFIG
    head = read_json(config, AGAIN) if config.is_file() else None
    head = head if isinstance(head, Mapping) and head.get("format") == kind else {}
    names = head.get("gates") if kind == STACK else None
    out = []
    for path in folder.iterdir():
        link, name = path.is_symlink(), path.name
        if head and name in OURS[kind] and path.is_file() and not link:
            continue
        listed = (
            isinstance(names, list)
            and name in names
            and re.fullmatch(r"gate-\d{2,}-layer-(\d+|embed)", name)
        )
        if listed and path.is_dir() and not link:
            out += [f"{name}/{one}" for one in foreign(path, FORMAT)]
        else:
            out.append(name)
    return out

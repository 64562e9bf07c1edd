"""Save and load gates: safetensors, a config with the fingerprint of their model, and a card."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import HfApi
from safetensors.torch import save

import sinkscope
from sinkscope.errors import CheckpointError
from sinkscope.folders import read_json
from sinkscope.lsg import card
from sinkscope.lsg.choosing import check_gates, device_for
from sinkscope.lsg.config import sketch
from sinkscope.lsg.loading import (
    CARD,
    FILES,
    FORMAT,
    RECORD,
    STACK,
    TENSORS,
    VERSION,
    read_gate,
    read_head,
)
from sinkscope.lsg.storage import (
    AGAIN,
    CONFIG,
    HUB_ERRORS,
    fill,
    scrub,
    source_of,
    write_folder,
)

if TYPE_CHECKING:
    from sinkscope.lsg.gate import LSG
    from sinkscope.models.lvlm import LVLM

STACK_FILES = FILES - {TENSORS}
GATE_FOLDER = re.compile(r"gate-\d{2,}-layer-(\d+|embed)")
"""How the sub-folders of a stack are called by `save_stack`."""
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
    if not plain or not names or len(set(names)) < len(names):
        raise CheckpointError(
            f"Got gates={names!r} in {CONFIG} of {source}; expected names of folders beside it, "
            "each once."
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


def foreign(folder: Path, kind: str = FORMAT) -> list[str]:
    """What lies in a folder that no older gate or stack wrote there, as paths within it.

    Only plain files under our names count as ours, and of folders those that `save_stack` listed under
    names of its own, if each holds a gate and nothing else.
    """
    config = folder / CONFIG
    head = read_json(config, AGAIN) if config.is_file() else None
    head = head if isinstance(head, Mapping) and head.get("format") == kind else {}
    listed = head.get("gates") if kind == STACK else None
    names = listed if isinstance(listed, list) else []
    files = FILES if kind == FORMAT else STACK_FILES
    out = []
    for path in folder.iterdir():
        if head and path.name in files and path.is_file() and not path.is_symlink():
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

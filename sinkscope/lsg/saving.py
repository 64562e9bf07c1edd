"""Folders of gates, written whole or not at all, and their model cards.

PyTorchModelHubMixin is not used: it compares no sizes first, and writes over files of others.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import transformers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.repocard import ModelCard, ModelCardData
from safetensors.torch import save

from sinkscope import __version__
from sinkscope.errors import CheckpointError, InputError
from sinkscope.files import read_json, seal, write_whole
from sinkscope.lsg import loading
from sinkscope.lsg.loading import CONFIG, FORMAT, RECORD, STACK, TENSORS, SavedGate, leaves, scrub
from sinkscope.results.saving import digest_beside
from sinkscope.viz.tables import as_cell

CARD = "README.md"
OURS = {FORMAT: {CONFIG, TENSORS, CARD, RECORD}, STACK: {CONFIG, CARD, RECORD}}
TEMPLATE = Path(__file__).with_name("card.md.jinja")


def save_stack(folder: Any, gates: Sequence[SavedGate], record: Any) -> None:
    """Write several gates; see `LSG.save_stack`."""
    record = plain_record(record)
    named = {f"gate-{i:02d}-layer-{one.config.layer}": one for i, one in enumerate(gates)}
    files = files_beside(STACK, list(named), stack_card(named, record), record)
    for name, one in named.items():
        files |= {f"{name}/{file}": content for file, content in files_of(one).items()}
    write_folder(folder, files, STACK)


def push_gate(
    repo: str, gate: SavedGate, private: bool | None, revision: str | None, token: str | None
) -> str:
    """Put a gate into a repository; see `LSG.push_to_hub`."""
    files, api = files_of(gate), HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        there = set(api.list_repo_files(repo, revision=revision))
        refuse_foreign(f"the repository {repo!r}", there - OURS[FORMAT] - {".gitattributes"})
        changes = [CommitOperationAdd(name, content) for name, content in files.items()]
        gone = [CommitOperationDelete(name) for name in there & OURS[FORMAT] - set(files)]
        message = f"Gate at {gate.config.layer}, sinkscope {__version__}"
        done = api.create_commit(repo, [*changes, *gone], commit_message=message, revision=revision)
    except CheckpointError:  # an OSError too
        raise
    except loading.HUB_ERRORS as error:
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
        what = f"Got a gate with NaN or infinite numbers in {broken}; expected finite ones."
        raise CheckpointError(f"{what} Lower the learning rate, or save an earlier state.")
    beside = files_beside(FORMAT, gate.config.to_dict(), gate_card(gate, record), record, tensors)
    return {TENSORS: save(tensors), **beside}


def files_beside(
    kind: str,
    held: Any,
    card: bytes,
    record: Mapping[str, Any] | None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, bytes]:
    """The files beside the tensors: strict JSON, for people to read, and the card.

    `CONFIG` has a digest of all that is loaded: itself, and of a gate its record and tensors.
    """
    versions = {"sinkscope": __version__, "torch": str(torch.__version__)}
    versions["transformers"] = transformers.__version__
    head = {"format": kind, "format_version": loading.VERSION}
    head |= {loading.HELD[kind]: held, "versions": versions}
    head = seal(head, digest_beside(record if kind == FORMAT else None, tensors or {}))
    datas = {CONFIG: head} if record is None else {CONFIG: head, RECORD: record}
    how: dict[str, Any] = {"indent": 2, "ensure_ascii": False, "allow_nan": False}
    return {CARD: card} | {k: f"{json.dumps(v, **how)}\n".encode() for k, v in datas.items()}


def write_folder(folder: Any, files: Mapping[str, bytes], kind: str) -> None:
    """Write a folder whole, or leave it as it was; while files move it holds no `CONFIG`."""
    target = Path(os.path.realpath(Path(folder).expanduser()))
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"Got {str(target)!r}, which is a file; expected a folder.")
    made = target.parent / f".{target.name}.{uuid4().hex[:8]}.tmp"
    try:
        there = foreign(target, kind) if target.exists() else []
        refuse_foreign(f"the folder {str(target)!r}", there)
        for name, content in files.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(made / name, content)
        if not target.exists():
            made.rename(target)
            return
        old = made.with_suffix(".old")  # the folder itself stays, with who works in it
        leaving = sorted(target.iterdir(), key=lambda path: path.name != CONFIG)  # first
        coming = sorted(made.iterdir(), key=lambda path: path.name == CONFIG)  # last
        moves = [(path, old / path.name) for path in leaving]
        old.mkdir()
        with ExitStack() as undo:
            undo.callback(old.rmdir)
            for here, there in [*moves, *((path, target / path.name) for path in coming)]:
                here.rename(there)
                undo.callback(there.rename, here)
            undo.pop_all()
        shutil.rmtree(old)
    except CheckpointError:  # an OSError too
        raise
    except OSError as error:
        raise CheckpointError(
            f"{str(target)!r} could not be written ({scrub(error)}); expected a folder you may write "
            "to, with space left. What was there is still there."
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def refuse_foreign(where: str, names: Iterable[str]) -> None:
    """Refuse to write where anything else lies."""
    if found := sorted(names):
        what = f"Got {where}, which holds {found[:5]}; expected a new or empty one"
        raise CheckpointError(f"{what}, or one of the same kind to replace.")


def foreign(folder: Path, kind: str) -> list[str]:
    """What lies in a folder that no older gate or stack wrote there, as paths within it."""
    config, out = folder / CONFIG, list[str]()
    head = read_json(config, loading.AGAIN) if config.is_file() else None
    head = head if isinstance(head, Mapping) and head.get("format") == kind else {}
    names = head.get("gates") if kind == STACK else None
    for path in folder.iterdir():
        plainly, name = not path.is_symlink(), path.name
        listed = isinstance(names, list) and name in names
        ours = listed and re.fullmatch(r"gate-\d{2,}-layer-(\d+|embed)", name)
        if plainly and ours and path.is_dir():
            out += [f"{name}/{one}" for one in foreign(path, FORMAT)]
        elif not (plainly and head and name in OURS[kind] and path.is_file()):
            out.append(name)
    return out


def gate_card(gate: SavedGate, record: Mapping[str, Any] | None) -> bytes:
    """The card of one gate; of a record made with others it has this gate's part."""
    config, layer, mine = gate.config.to_dict(), gate.config.layer, dict(record or {})
    model, _ = config.pop("model"), config.pop("weights")
    where = "the embeddings" if layer == "embed" else f"block {layer}"
    if isinstance(mine.get("results"), Mapping):
        mine["results"] = {k: v for k, v in mine["results"].items() if k == str(layer)}
    if isinstance(mine.get("gates"), Mapping):
        mine["trained_together"] = sorted(map(str, mine.pop("gates")))
    told = f"As recorded by who trained it; long lists are summed up here.\n\n{table(mine)}"
    training = unrecorded(gate) if record is None else told
    about = (
        f"It multiplies the attention keys of image tokens in block {gate.config.edited} by "
        f"coefficients for the groups {', '.join(gate.config.groups)}. The model itself is unchanged "
        f"and not included. {sum(x.numel() for x in gate.tensors.values()):,} parameters."
    )
    title = f"A sink gate that reads {where} of a {as_cell(model.get('model_type', ''))} model"
    sections = {"Training": training, "Choices": table(config), "Made for": table(model)}
    return card_of(record, title, about, ("gate = ss.LSG.from_pretrained", "[gate]"), sections)


def stack_card(gates: Mapping[str, SavedGate], record: Mapping[str, Any] | None) -> bytes:
    """The card of a stack: its gates by folder."""
    made = {k: "see its card" if one.record else unrecorded(one) for k, one in gates.items()}
    rows = [f"| [{name}]({name}/README.md) | {how} |" for name, how in made.items()]
    listed = "\n".join(["| folder | training |", "|---|---|", *rows])
    none = "No record of a common training was given. The gates' own cards say how each was made."
    title = f"A stack of {len(gates)} sink gates"
    about = "Each folder is a gate of its own; together they are a list of interventions."
    sections = {"Gates": listed, "Training": none if record is None else table(record)}
    return card_of(record, title, about, ("gates = ss.LSG.load_stack", "gates"), sections)


def unrecorded(gate: SavedGate) -> str:
    """What can be said without a record."""
    if not gate.tensors["outer.weight"].any() and not gate.tensors["outer.bias"].any():
        each = gate.config.scale / len(gate.config.groups)
        return f"**Untrained.** Its last layer is zero, so every coefficient is {each:g}."
    return "**Not recorded.** It is not a new gate; how its parameters came about is unknown."


def card_of(
    record: Any, title: str, about: str, code: tuple[str, str], sections: Mapping[str, str]
) -> bytes:
    """A card; ``code`` says how to load and to use, ``sections`` are texts by heading."""
    base = (record or {}).get("base_model")
    named = isinstance(base, str) and loading.REPOSITORY.match(base)
    tags = ["attention-sinks", "layer-wise-sink-gating"]
    front = {"library_name": "sinkscope", "tags": tags, "base_model": base if named else None}
    parts = {"title": title, "about": about, "load": code[0], "use": code[1], "sections": sections}
    card = ModelCard.from_template(ModelCardData(**front), template_path=str(TEMPLATE), **parts)
    return str(card).encode()


def table(data: Mapping[str, Any]) -> str:
    """Plain data as a table, nested names dotted."""
    lines = [f"| {as_cell(name)} | {as_cell(shown(value))} |" for name, value in leaves(data)]
    return "\n".join(["| what | value |", "|---|---|", *lines])


def shown(value: Any) -> str:
    """One value in words; a list of more than eight is summed up, and training.json has it whole."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(one)}" for name, one in value.items()) or "none"
    if not isinstance(value, list) or not value:
        return "none" if value in (None, []) else str(value)
    if len(value) <= 8 and not any(isinstance(one, (list, dict)) for one in value):
        return ", ".join(shown(one) for one in value)
    if all(isinstance(one, (int, float)) for one in value):
        first, last, least, most = map(shown, (value[0], value[-1], min(value), max(value)))
        return f"{len(value)} values: first {first}, last {last}, smallest {least}, largest {most}"
    return f"{len(value)} entries, the last: {shown(value[-1])}"


def plain(value: Any, name: str = "record") -> Any:
    """Numbers, text, lists and dictionaries; what is not finite becomes a word, the rest an error."""
    if isinstance(value, (np.generic, torch.Tensor, np.ndarray)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(one, f"{name}[{key!r}]") for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [plain(one, f"{name}[{place}]") for place, one in enumerate(value)]
    infinite = isinstance(value, float) and not math.isfinite(value)
    if infinite or isinstance(value, (Path, torch.dtype, torch.device, date)):
        return str(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    what = f"Got {name} of type {type(value).__name__}; expected numbers, text, lists or dicts."
    raise InputError(f"{what} Write what matters of it as text.")


def plain_record(record: Any) -> Any:
    """A training record as plain data, or None; an InputError if it is something else."""
    if record is None or isinstance(record, Mapping):
        return plain(record)
    what = f"Got a record of type {type(record).__name__}; expected a dictionary"
    raise InputError(f"{what}, such as result.record of train_lsg.")

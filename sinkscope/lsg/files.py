"""Folders and repositories: read what may be unsafe or damaged, write what is whole or not there.

Nothing is unpickled here but by ``torch.load(weights_only=True)``, which runs no code of the file.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

import sinkscope
from sinkscope.checks import is_whole
from sinkscope.errors import (
    CheckpointError,
    DetectorError,
    InputError,
    InterventionError,
    LayerError,
)
from sinkscope.files import read_json
from sinkscope.lsg.building import check_gates, check_layer, device_for
from sinkscope.lsg.config import GateConfig, canonical, check_fingerprint, require, sketch

if TYPE_CHECKING:
    from sinkscope.lsg.gate import LSG
    from sinkscope.models.lvlm import LVLM

# What the hub client raises: no network, no such repository, no permission, an impossible name.
HUB_ERRORS = (OSError, ValueError, HTTPError, RuntimeError)

DAMAGED = (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError)

REPOSITORY = re.compile(r"^[\w.-]+/[\w.-]+$")

SECRET = re.compile(r"hf_[A-Za-z0-9]{4,}")

CONFIG = "config.json"

"""Without it a folder is neither a gate nor a stack."""

AGAIN = "Download or copy it again."

ALLOWED = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Source:
    """Where files come from: a folder here, or a hub repository.

    Attributes:
        name: As the user wrote it.
        folder: The folder, or None for a repository.
        revision: Branch, tag or commit of a repository.
        subfolder: A folder within; ``""`` for none.
    """

    name: str
    folder: Path | None
    revision: str | None = None
    subfolder: str = ""

    def find(self, filename: str) -> Path | None:
        """The path of a file, downloaded if need be; None if there is no such file.

        Raises:
            CheckpointError: If the hub cannot be read.
        """
        if self.folder is not None:
            path = self.folder / self.subfolder / filename
            return path if path.is_file() else None
        try:
            return Path(
                hf_hub_download(
                    self.name,
                    filename,
                    subfolder=self.subfolder or None,
                    revision=self.revision,
                )
            )
        except LocalEntryNotFoundError as error:  # a child of the next one, but says "no network"
            raise self._unreachable(error) from error
        except EntryNotFoundError:
            return None
        except HUB_ERRORS as error:
            raise self._unreachable(error) from error

    def below(self, subfolder: str) -> Source:
        """A folder within it."""
        return replace(
            self, subfolder="/".join(part for part in (self.subfolder, subfolder) if part)
        )

    def pinned(self, path: Path) -> Source:
        """The same, held to the commit of a file that was downloaded: all files are of one commit."""
        parts = path.parts
        if self.folder is not None or "snapshots" not in parts:
            return self
        last = len(parts) - 1 - parts[::-1].index("snapshots")
        return replace(self, revision=parts[last + 1])

    def __str__(self) -> str:
        return repr(f"{self.name}/{self.subfolder}" if self.subfolder else self.name)

    def _unreachable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"Got {self}, which is no folder here, and the hub could not give it "
            f"({type(error).__name__}: {scrub(error)}); expected a folder that save_pretrained() "
            "wrote, or a repository you may read. Check the name, the network and `hf auth login`."
        )


def source_of(name: Any, revision: str | None = None, subfolder: str = "") -> Source:
    """Where that is.

    Raises:
        CheckpointError: If it is no path and no repository id, or there is no such folder.
    """
    if not isinstance(name, (str, Path)):
        raise CheckpointError(
            f"Got {type(name).__name__} for files of a gate; expected a folder or a repository id."
        )
    where = Path(name).expanduser()
    if where.is_dir():
        if subfolder and not (where / subfolder).is_dir():
            raise CheckpointError(
                f"Got subfolder={subfolder!r} of {str(name)!r}; expected one of "
                f"{sorted(p.name for p in where.iterdir() if p.is_dir())}."
            )
        return Source(str(name), where, None, subfolder)
    text = str(name)
    path = isinstance(name, Path) or where.is_absolute() or text.startswith((".", "~"))
    if path or where.exists() or not REPOSITORY.match(text):
        what = "a file" if where.exists() else "nothing that exists"
        raise CheckpointError(
            f"Got {text!r}, which is {what}; expected the folder that save_pretrained() wrote, or a "
            "repository id such as 'user/gate'."
        )
    return Source(text, None, revision, subfolder)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or a PyTorch file, on the CPU; no code of it is run.

    Nested dictionaries become dotted names. What is no tensor is left out.

    Raises:
        CheckpointError: If it is damaged, or holds more than plain tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device="cpu")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"Got {str(path)!r}, a pickle that holds more than tensors or is no PyTorch file; "
            "expected tensors alone. Nothing of it was run. If you trust its maker, convert it to "
            "safetensors in a place where it can do no harm."
        ) from error
    except DAMAGED as error:
        raise CheckpointError(
            f"Got {str(path)!r}, which is damaged or cut off ({type(error).__name__}: "
            f"{scrub(error)}); expected a whole file. {AGAIN}"
        ) from error
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"Got {str(path)!r}, which holds a {type(found).__name__}; expected tensors by name."
        )
    try:
        named = flattened(found)
    except RecursionError as error:
        raise CheckpointError(
            f"Got {str(path)!r}, whose dictionaries are nested too deeply; expected tensors by name."
        ) from error
    twice = sorted(n for n, many in Counter(name for name, _ in named).items() if many > 1)
    if twice:
        raise CheckpointError(
            f"Got {str(path)!r}, in which several tensors are called {twice[:5]} once nested names are "
            "joined by dots; expected a name for each. Save one of them."
        )
    strange = [name for name, tensor in named if not is_plain(tensor)]
    if strange:
        raise CheckpointError(
            f"Got {str(path)!r}, in which {strange[:5]} hold no numbers of their own, or not one for each "
            "place (meta, sparse, nested or expanded tensors); expected plain ones. Convert "
            "them with .to_dense() or .contiguous()."
        )
    return dict(named)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds a number for each of its places, so that its size is that of the file."""
    if tensor.is_nested or tensor.is_meta or tensor.layout != torch.strided:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def flattened(nested: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Tensor]]:
    """Tensors of nested dictionaries and their dotted names."""
    out: list[tuple[str, Tensor]] = []
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out += flattened(value, f"{name}.")
        elif isinstance(value, Tensor):
            out.append((name, value))
    return out


def as_fp32(name: str, tensor: Tensor, path: Path) -> Tensor:
    """A tensor in fp32, exactly.

    Raises:
        CheckpointError: If it is of a type that fp32 does not hold, or not finite.
    """
    if tensor.dtype not in ALLOWED:
        raise CheckpointError(
            f"Got {name!r} of {str(path)!r} in {tensor.dtype}; expected one of {list(ALLOWED)}, which "
            "become fp32 without rounding. Convert it and say so on its card."
        )
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(
            f"Got NaN or infinite numbers in {name!r} of {str(path)!r}; expected finite ones. Its "
            "training went wrong, or the file is damaged."
        )
    return tensor.detach().float().contiguous()


def write_folder(
    target: Path, files: Mapping[str, bytes], strange: Callable[[Path], Sequence[str]]
) -> None:
    """Write a folder that is whole or holds no `config.json`; nobody else's file is touched.

    Args:
        target: The folder.
        files: What goes into it, by path within it.
        strange: What lies in an existing folder that may not be replaced, as paths within it.

    Raises:
        CheckpointError: If something else is there, or cannot be written.
    """
    target = Path(os.path.realpath(Path(target).expanduser()))
    before = replaceable(target, strange)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            fill(made, files)
            if target.exists():
                exchange(made, target, before)
            else:
                made.rename(target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{str(target)!r} could not be written ({type(error).__name__}: {error}); expected a "
            "folder you may write to, with space left. What was there is still there."
        ) from error


def replaceable(target: Path, strange: Callable[[Path], Sequence[str]]) -> list[str]:
    """The names in a folder that is to be replaced; none if it is not there yet.

    Raises:
        CheckpointError: If it is a file, or holds anything else.
    """
    if not target.exists():
        return []
    if not target.is_dir():
        raise CheckpointError(f"Got {str(target)!r}, which is a file; expected a folder.")
    found = strange(target)
    if found:
        raise CheckpointError(
            f"Got the folder {str(target)!r}, which holds {sorted(found)[:5]}; expected a new or "
            "empty folder, or one of the same kind to replace. Choose another name."
        )
    return [path.name for path in target.iterdir()]


def fill(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files, down to the disk."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)  # a temporary folder is closed to others


def exchange(made: Path, target: Path, before: Sequence[str]) -> None:
    """Move what was made into a folder that is there; the folder itself stays, with who works in it.

    `CONFIG` leaves first and comes last, so that a folder which is not whole is not read as one. What
    was moved goes back if anything fails.

    Args:
        made: The folder beside it.
        target: The folder.
        before: The names in it that are replaced.
    """
    old = made.with_suffix(".old")
    old.mkdir()
    moves = [(target / name, old / name) for name in sorted(before, key=lambda n: n != CONFIG)]
    names = sorted((path.name for path in made.iterdir()), key=lambda n: n == CONFIG)
    moves += [(made / name, target / name) for name in names]
    done: list[tuple[Path, Path]] = []
    try:
        for here, there in moves:
            here.rename(there)
            done.append((here, there))
    except OSError:
        for here, there in reversed(done):
            there.rename(here)
        old.rmdir()
        raise
    shutil.rmtree(old)


def scrub(error: Exception | str, *secrets: str | None) -> str:
    """The first line of an error without tokens in it."""
    text = (str(error).strip().splitlines() or [""])[0]
    for secret in secrets:
        text = text.replace(secret, "***") if secret else text
    return SECRET.sub("***", text)[:300]


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
        return "expected files of sinkscope. Write ss.lsg.import_gates(folder, lvlm) for these."
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
            f"  {listed}\nFor files of another tool write ss.lsg.import_gates(folder, lvlm)."
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


SHOWN = 8

"""A list that is longer is summed up; training.json has it whole."""

GATE = """{front}# A sink gate after block {layer} of {kind}

Layer-wise Sink Gating ([2604.03316](https://arxiv.org/abs/2604.03316)) as made by sinkscope: it reads the output of
block {layer} and multiplies the attention keys of image tokens in block {edited} by coefficients for the groups {groups}.
The model itself is unchanged and not included. {parameters:,} parameters.

```python
import sinkscope as ss

gate = ss.LSG.from_pretrained("path/to/this/folder", lvlm=lvlm)  # refuses another model
lvlm.generate(sample, interventions=[gate])
```

## Training

{training}

## Choices

{choices}

## Made for

{made_for}
"""

STACK_card = """{front}# A stack of {many} sink gates

Layer-wise Sink Gating ([2604.03316](https://arxiv.org/abs/2604.03316)) as made by sinkscope. Each folder is a gate of
its own, with its own card; together they are a list of interventions.

```python
import sinkscope as ss

gates = ss.LSG.load_stack("path/to/this/folder", lvlm=lvlm)  # refuses another model
lvlm.generate(sample, interventions=gates)
```

## Gates

{gates}

## Training

{training}
"""


def of_gate(gate: LSG, record: Mapping[str, Any] | None) -> str:
    """The card of one gate."""
    config = gate.config.to_dict()
    made_for = config.pop("model")
    config.pop("weights")
    layer = gate.config.layer
    return GATE.format(
        front=front_matter(record),
        layer="(none: the embeddings)" if isinstance(layer, str) else layer,
        edited=gate.config.edited,
        kind=escaped(f"a {made_for.get('model_type', 'model')} model"),
        groups=", ".join(gate.groups),
        parameters=sum(p.numel() for p in gate.parameters()),
        training=training_of(gate, record),
        choices=table(config),
        made_for=table(made_for),
    )


def of_stack(gates: Sequence[LSG], names: Sequence[str], record: Mapping[str, Any] | None) -> str:
    """The card of a stack."""
    lines = ["| folder | training |", "|---|---|"]
    for gate, name in zip(gates, names, strict=True):
        state = "see its card" if gate.record else unrecorded(gate)
        lines.append(f"| [{name}]({name}/README.md) | {state} |")
    if record is None:
        training = (
            "No record of a common training was given. The gates' own cards say how each was made."
        )
    else:
        training = table(record)
    return STACK_card.format(
        front=front_matter(record), many=len(gates), gates="\n".join(lines), training=training
    )


def front_matter(record: Mapping[str, Any] | None) -> str:
    """What the hub reads. JSON strings are YAML."""
    lines = ["library_name: sinkscope", "tags: [attention-sinks, layer-wise-sink-gating]"]
    base = (record or {}).get("base_model")
    if isinstance(base, str) and REPOSITORY.match(base):
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join(["---", *lines, "---", ""])


def training_of(gate: LSG, record: Mapping[str, Any] | None) -> str:
    """The section on training: what the record says, or that there is none."""
    if record is not None:
        mine = table(own_part(record, gate.layer))
        return f"As recorded by who trained it; long lists are summed up here.\n\n{mine}"
    return unrecorded(gate)


def own_part(record: Mapping[str, Any], layer: int | str) -> dict[str, Any]:
    """The record without what it says of other gates, and without this gate's choices, shown below."""
    out = dict(record)
    if isinstance(record.get("results"), Mapping):
        out["results"] = {k: v for k, v in record["results"].items() if k == str(layer)}
    if isinstance(record.get("gates"), Mapping):
        out["trained_together"] = sorted(str(name) for name in record["gates"])
        del out["gates"]
    return out


def unrecorded(gate: LSG) -> str:
    """What can be said without a record."""
    if not bool(gate.outer.weight.any()) and not bool(gate.outer.bias.any()):
        each = gate.config.scale / len(gate.groups)
        return f"**Untrained.** Its last layer is zero, so every coefficient is {each:g}."
    return "**Not recorded.** Its parameters are not those of a new gate; how they came about is unknown."


def table(data: Mapping[str, Any]) -> str:
    """Plain data as a table, nested names dotted."""
    lines = ["| what | value |", "|---|---|"]
    lines += [f"| {escaped(name)} | {escaped(shown(value))} |" for name, value in leaves(data)]
    return "\n".join(lines)


def leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of nested data."""
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def shown(value: Any) -> str:
    """One value in words."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, list):
        return "none" if value is None else str(value)
    if len(value) <= SHOWN and not any(isinstance(one, (list, dict)) for one in value):
        return ", ".join(shown(one) for one in value) or "none"
    last = value[-1]
    if isinstance(last, dict):
        return f"{len(value)} entries, the last: " + ", ".join(
            f"{name} {shown(one)}" for name, one in last.items()
        )
    if all(isinstance(one, (int, float)) for one in value):
        return (
            f"{len(value)} values: first {shown(value[0])}, last {shown(last)}, smallest "
            f"{shown(min(value))}, largest {shown(max(value))}"
        )
    return f"{len(value)} entries, the last: {shown(last)}"


def escaped(text: str) -> str:
    """Text that cannot break out of a table cell."""
    return html.escape(str(text), quote=False).replace("|", "\\|").replace("\n", " ")


def plain_record(record: Any) -> dict[str, Any] | None:
    """A training record as plain data.

    Raises:
        InputError: If it is no dictionary, or holds what is no plain data.
    """
    if record is None:
        return None
    if not isinstance(record, Mapping):
        raise InputError(
            f"Got a record of type {type(record).__name__}; expected a dictionary, such as "
            "result.record of train_lsg."
        )
    return plain(record, "record")


def plain(value: Any, name: str) -> Any:
    """Numbers, text, lists and dictionaries; what is not finite becomes a word."""
    if isinstance(value, (np.generic, torch.Tensor, np.ndarray)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(one, f"{name}[{key!r}]") for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [plain(one, f"{name}[{place}]") for place, one in enumerate(value)]
    if isinstance(value, (Path, torch.dtype, torch.device, date)):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise InputError(
        f"Got {name} of type {type(value).__name__}; expected plain data: numbers, text, lists and "
        "dictionaries. Write what matters of it as text."
    )


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
    record = plain_record(record)
    files = {CONFIG: as_json(head), CARD: of_stack(listed, names, record).encode()}
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
    record = plain_record(gate.record if record is None else record)
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
        CARD: of_gate(gate, record).encode(),
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

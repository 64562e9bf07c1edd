"""Files of results: safetensors with the rest as JSON in the metadata. Nothing is unpickled."""

import hashlib
import importlib
import json
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sinkscope.checks import plain, typed
from sinkscope.errors import CheckpointError, InputError, SinkscopeError
from sinkscope.files import write_whole
from sinkscope.sites import Site

FORMAT = 1
KNOWN: dict[str, type] = {"Site": Site}


class Record:
    """A dataclass that a file may hold: `load` knows its class by name."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        KNOWN[name_of(cls)] = cls


def names_of(keys: Iterable[Any]) -> tuple[str, ...]:
    """A name for each object: its class, with ``_1``, ``_2``, ... behind it if it is not the first."""
    out: list[str] = []
    for key in keys:
        base = key if isinstance(key, str) else type(key).__name__
        more = (f"{base}_{i}" for i in range(1, len(out) + 1))
        out.append(base if base not in out else next(name for name in more if name not in out))
    return tuple(out)


def find(values: Mapping[Any, Any], key: Any) -> list[Any]:
    """Values by the object they were asked with, by its name in `names_of`, else by an equal object."""
    if isinstance(key, Hashable) and key in values:
        return [values[key]]
    if isinstance(key, str):
        named = dict(zip(names_of(values), values.values(), strict=True))
        return [named[key]] if key in named else []
    return [value for one, value in values.items() if same(one, key)]


def same(one: Any, other: Any) -> bool:
    """Whether two objects are of one class and have equal parameters, tensors and weights."""
    if type(one) is not type(other):
        return False
    if is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, nn.Module):
        own = [{n: v for n, v in vars(m).items() if not n.startswith("_")} for m in (one, other)]
        return same(*own) and same(one.state_dict(), other.state_dict())
    if isinstance(one, (Tensor, np.ndarray)):
        return torch.equal(*(torch.as_tensor(x).cpu() for x in (one, other)))
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def name_of(cls: type) -> str:
    """How a file calls a class: ours wherever they lie, others with their module."""
    ours = cls.__module__.partition(".")[0] == "sinkscope"
    return cls.__qualname__ if ours else f"{cls.__module__}.{cls.__qualname__}"


def pack(value: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON, tensors in ``tensors`` by where they lie; InputError if no file can hold it."""
    if isinstance(value, Tensor):
        tensors[at] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": at}
    value = plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        items = [pack(one, f"{at}/{i}", tensors) for i, one in enumerate(value)]
        return items if isinstance(value, tuple) else {"list": items}
    if isinstance(value, (range, slice)):
        return {type(value).__name__: [value.start, value.stop, value.step]}
    if isinstance(value, Mapping):
        entries = []
        for name, (key, one) in zip(names_of(value), value.items(), strict=True):
            own: dict[str, Tensor] = {}
            try:
                asked = pack(key, f"{at}/{name}.asked", own)
            except InputError:  # a key that no file can hold, such as a gate, is found by its name
                asked, own = name, {}
            tensors.update(own)
            entries.append([asked, pack(one, f"{at}/{name}", tensors)])
        return {"dict": entries}
    if isinstance(value, pd.DataFrame):
        columns = {name: [str(of.dtype), of.tolist()] for name, of in value.items()}
        return {"table": pack(columns, at, tensors)}
    if KNOWN.get(name_of(type(value))) is not type(value):
        raise InputError(
            f"Got {at or 'a result'} of type {type(value).__name__}, which no file can hold; expected "
            "tensors, numbers, texts, tables and results. Derive a result of your own from "
            "sinkscope.results.Result; of others write x.to_dataframe().to_csv(path)."
        )
    parts = {
        f.name: pack(getattr(value, f.name), f"{at}/{f.name}".lstrip("/"), tensors)
        for f in fields(value)
    }
    return {"record": [name_of(type(value)), parts]}


def unpack(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value of `pack`; a module that a file names is never imported."""
    if isinstance(data, list):
        return tuple(unpack(one, tensors) for one in data)
    if not isinstance(data, dict):
        return data
    ((kind, inner),) = data.items()
    if kind == "record":
        name, parts = inner
        if name not in KNOWN:
            rooms = ("detectors", "experiments", "interventions", "lsg", "probes", "published")
            for room in rooms:  # every result of this library
                importlib.import_module(f"sinkscope.{room}")
        if name not in KNOWN:
            raise CheckpointError(
                f"Got a file with a {name!r}, which is not known here; expected results of sinkscope. "
                "Import the module that defines it, or update sinkscope."
            )
        return KNOWN[name](**{field: unpack(part, tensors) for field, part in parts.items()})
    if kind == "dict":
        return {unpack(key, tensors): unpack(value, tensors) for key, value in inner}
    if kind == "list":
        return list(unpack(inner, tensors))
    if kind == "tensor":
        return tensors[inner]
    if kind == "table":
        columns = unpack(inner, tensors).items()
        return pd.DataFrame({name: pd.Series(of, dtype=dtype) for name, (dtype, of) in columns})
    return {"float": float, "range": lambda x: range(*x), "slice": lambda x: slice(*x)}[kind](inner)


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of all that is in a file."""
    out = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        out.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        out.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return out.hexdigest()


def digest_beside(data: Any, tensors: Mapping[str, Tensor]) -> bytes:
    """The digest of JSON-ready data and tensors, for `sinkscope.files.seal` of what is loaded with them."""
    return digest(json.dumps(data, sort_keys=True), tensors).encode()


def write(value: Any, path: Path) -> Path:
    """Write a record to a file that is there whole or not at all; see `Result.save`."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"format": FORMAT, "result": pack(value, "", tensors)}, allow_nan=False)
    metadata = {"sinkscope": text, "sha256": digest(text, tensors)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save(tensors, metadata))
    except (OSError, ValueError) as error:  # the last: a path without a name, such as '.'
        got = f"Got {str(path)!r}, which cannot be written ({error})"
        raise CheckpointError(f"{got}; expected the path of a file.") from error
    return path


@typed
def load(path: str | Path) -> Any:
    """Read what ``result.save(path)`` wrote, bit for bit; nothing is unpickled. CheckpointError if the file
    is missing, damaged, of something else or of a newer sinkscope, or holds a class not known here."""

    def refuse(why: str, expected: str = "") -> CheckpointError:
        expected = expected or "the file as result.save(path) wrote it. Copy or make it again"
        return CheckpointError(f"Got {str(path)!r}, {why}; expected {expected}.")

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise refuse(f"which cannot be read as safetensors ({error})") from error
    if "sinkscope" not in metadata:
        raise refuse("which holds tensors of something else")
    try:
        data = json.loads(metadata["sinkscope"])
        if data["format"] != FORMAT:
            raise refuse(f"of format {data['format']!r}", f"format {FORMAT}: update sinkscope")
        if metadata.get("sha256") != digest(metadata["sinkscope"], tensors):
            raise refuse("which was damaged or changed")
        return unpack(data["result"], tensors)
    except CheckpointError:
        raise
    except (SinkscopeError, ValueError, TypeError, KeyError, RecursionError) as error:
        why = f"which cannot be understood ({type(error).__name__}: {error})"
        raise refuse(why, "a file of this version: make it again, or update sinkscope") from error


@typed
def load_run(path: str | Path) -> Any:
    """Read a run or a generation that was saved; CheckpointError as `load`, and for another result. Its
    results are found by the probe's name, ``run["AttentionMass"]``, or by an equal probe."""
    found = load(path)
    if (kind := type(found).__name__) not in ("Run", "Generation"):
        got = f"Got {str(path)!r}, which holds a {kind}; expected a run"
        raise CheckpointError(f"{got}. Write sinkscope.results.load(path).")
    return found

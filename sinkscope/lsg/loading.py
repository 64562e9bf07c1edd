"""Gates read from folders and hub repositories; no code that lies there is run."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sinkscope import __version__
from sinkscope.checks import is_whole
from sinkscope.errors import CheckpointError, DetectorError, InterventionError, LayerError
from sinkscope.files import SEAL, read_json, unseal
from sinkscope.lsg.config import BASES, WHOLE, GateConfig, canonical, check_layer, require
from sinkscope.results.saving import digest_beside

FORMAT, STACK, VERSION = "sinkscope-lsg", "sinkscope-lsg-stack", 1
CONFIG, TENSORS, RECORD = "config.json", "model.safetensors", "training.json"
HELD = {FORMAT: "gate", STACK: "gates"}  # the field of CONFIG that says what a folder holds
WRITES = {FORMAT: "gate.save_pretrained(folder)", STACK: "ss.LSG.save_stack(gates, folder)"}
READS = {FORMAT: "ss.LSG.from_pretrained(...)", STACK: "ss.LSG.load_stack(...)"}
REPOSITORY = re.compile(r"^[\w.-]+/[\w.-]+$")
HUB_ERRORS = (OSError, ValueError, HTTPError, RuntimeError, EntryNotFoundError)
"""What the hub's client raises: no network, no such repository, no permission, an impossible name."""
AGAIN = "Download or copy it again."


class SavedGate(NamedTuple):
    """One gate as plain data: its choices, its tensors by name, and how it was trained."""

    config: GateConfig
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any] | None


@dataclass
class Source:
    """A folder here, or (``folder`` is None) a repository, held to the commit of its first file."""

    name: str
    folder: Path | None
    revision: str | None = None
    subfolder: str = ""

    def find(self, filename: str) -> Path | None:
        """The path of a file, downloaded if need be, or None; a CheckpointError without the hub."""
        if self.folder is not None:
            path = self.folder / self.subfolder / filename
            return path if path.is_file() else None
        within = self.subfolder or None
        try:
            path = hf_hub_download(self.name, filename, subfolder=within, revision=self.revision)
        except HUB_ERRORS as error:
            local = isinstance(error, LocalEntryNotFoundError)  # without network it is raised
            if isinstance(error, EntryNotFoundError) and not local:
                return None
            raise CheckpointError(
                f"Got {self}, which is no folder here, and the hub could not give it: {scrub(error)}; "
                "expected a folder, or a repository you may read. Check name, network and login."
            ) from error
        self.revision = Path(path).parents[len(Path(self.subfolder).parts)].name
        return Path(path)

    def __str__(self) -> str:
        return repr(f"{self.name}/{self.subfolder}" if self.subfolder else self.name)


def source_of(name: Any, revision: str | None = None, subfolder: str = "") -> Source:
    """A folder that is here, else a repository; a CheckpointError if the name is of neither."""
    what = f"of type {type(name).__name__}"
    if isinstance(name, (str, Path)):
        where, text = Path(name).expanduser(), str(name)
        if where.is_dir():
            return Source(text, where, None, subfolder)
        path = isinstance(name, Path) or where.is_absolute() or text.startswith((".", "~"))
        if not path and not where.exists() and REPOSITORY.match(text):
            return Source(text, None, revision, subfolder)
        what = "a file" if where.exists() else "nothing that exists"
    what = f"Got {str(name)!r}, which is {what}; expected the folder of save_pretrained()"
    raise CheckpointError(f"{what}, or a repository id such as 'user/gate'.")


def read_stack(source: Source) -> list[SavedGate]:
    """The gates of a stack, in its order."""
    head = read_head(source, STACK)
    names = head[HELD[STACK]]
    if not (
        isinstance(names, list)
        and all(isinstance(x, str) and re.fullmatch(r"[^./][^/]*", x, re.DOTALL) for x in names)
        and 0 < len(names) == len(set(names))
    ):
        what = f"Got gates={names!r} in {CONFIG} of {source}"
        raise CheckpointError(f"{what}; expected names of folders beside it.")
    check_seal(source, head, None, {})
    within = f"{source.subfolder}/" if source.subfolder else ""
    return [read_gate(replace(source, subfolder=within + name)) for name in names]


def read_gate(source: Source) -> SavedGate:
    """The gate that lies there; its choices are checked first, then its tensors against them."""
    head = read_head(source, FORMAT)
    config = read_config(head[HELD[FORMAT]], source)
    path = source.find(TENSORS) or source.find("pytorch_model.bin")
    if path is None:
        raise CheckpointError(f"Got {source} without {TENSORS}; expected it beside {CONFIG}.")
    tensors = read_tensors(path)
    width, hidden, many = config.d_model, config.hidden, len(config.groups)
    shapes = {"norm.weight": (width,), "norm.bias": (width,)} if config.affine else {}
    shapes |= {"inner.weight": (hidden, width), "inner.bias": (hidden,)}
    shapes |= {"outer.weight": (many, hidden), "outer.bias": (many,)}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != shapes:
        lines = [
            f"{name}: expected {shapes.get(name, 'none')}, found {found.get(name, 'none')}"
            for name in {**shapes, **found}
            if shapes.get(name) != found.get(name)
        ]
        what = f"Got tensors in {str(path)!r} that do not fit {CONFIG}; expected {sorted(shapes)}."
        write = "For files of another tool write ss.lsg.import_gates(folder, lvlm)."
        raise CheckpointError("\n  ".join([what, *lines]) + f"\n{write}")
    tensors = {name: as_fp32(name, value, path) for name, value in tensors.items()}
    told = source.find(RECORD)
    record = None if told is None else read_json(told, AGAIN)
    if told is not None and not isinstance(record, Mapping):
        what = f"Got {str(told)!r}, which holds a {type(record).__name__}"
        raise CheckpointError(f"{what}; expected a training record, values by name. {AGAIN}")
    check_seal(source, head, record, tensors)
    return SavedGate(config, tensors, record)


def check_seal(
    source: Source, head: Mapping[str, Any], record: Any, tensors: Mapping[str, Tensor]
) -> None:
    """Refuse what was damaged or changed; gates of before have no digest, and pass."""
    if SEAL in head:
        again = f"{AGAIN} If you changed it, delete {SEAL!r} in {CONFIG}: then nothing is compared."
        where = Path(source.name, source.subfolder)
        unseal(head, where, again, digest_beside(record, tensors))


def read_head(source: Source, kind: str) -> Mapping[str, Any]:
    """`CONFIG` of a gate or a stack; refused if it is missing, of another kind, or newer."""
    path = source.find(CONFIG)
    head = None if path is None else read_json(path, AGAIN)
    known = head if isinstance(head, Mapping) else {}
    if known.get("format") != kind:
        found = str(known.get("format")) if known is head else ""
        what = f"whose {CONFIG} holds a {type(head).__name__} of the format {found!r}"
        if path is None:
            what = f"which is without {CONFIG}"
        elif "model_type" in known or "architectures" in known:
            what = f"a checkpoint of a whole model ({known.get('model_type')!r})"
        other = READS.get(found, "ss.lsg.import_gates(folder, lvlm) for files of another tool")
        what = f"{source}, {what}; expected what {WRITES[kind]} wrote"
        raise CheckpointError(f"Got {what}. Write {other}.")
    got = f"{CONFIG} of {source}"
    version, versions = known.get("format_version"), known.get("versions", {})
    if not is_whole(version, 1, VERSION) or not isinstance(versions, Mapping):
        raise CheckpointError(
            f"Got format_version={version!r} and versions={versions!r} in {got}; expected 1 to {VERSION}, "
            f"and versions by name. Upgrade sinkscope ({__version__} is here) if the file is newer."
        )
    wanted = {"format", "format_version", "versions", HELD[kind]}
    if wanted != set(known) - {SEAL}:
        strange, missing = sorted(set(known) - wanted - {SEAL}), sorted(wanted - set(known))
        what = f"Got {got} with unknown fields {strange} and without {missing}"
        raise CheckpointError(f"{what}; expected {sorted(wanted)}. {AGAIN}")
    return known


def read_config(data: Any, source: Source) -> GateConfig:
    """The gate's choices; a CheckpointError if they are impossible or do not fit its own model."""
    try:
        config = GateConfig.from_dict(data)
        config = replace(config, model=canonical(config.model))
        model = config.model
        require(bool(model), "model", model, "the fingerprint of a model: its type and sizes")
        for name in next(iter(BASES.values())):
            size, good, wanted = model.get(name), is_whole(model.get(name), 1), WHOLE
            if name == "model_type":
                good, wanted = isinstance(size, str), "the name of a type"
            elif name == "feed_layers":
                good = isinstance(size, list) and size != [] and all(is_whole(x, 0) for x in size)
                wanted = "a list of block indices"
            require(good, f"model[{name!r}]", size, wanted)
        check_layer(config.layer, model["language_layers"])
        width = model["language_width"]
        require(config.d_model == width, "d_model", config.d_model, f"the model's width, {width}")
    except (InterventionError, DetectorError, LayerError) as error:
        raise CheckpointError(f"{CONFIG} of {source} is impossible: {error} {AGAIN}") from error
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or a PyTorch file of plain tensors, by dotted names, on the CPU."""

    def bad(what: str, wanted: str = "tensors by name.") -> CheckpointError:
        return CheckpointError(f"Got {str(path)!r}, {what}; expected {wanted}")

    try:
        if path.suffix == ".safetensors":
            return load_file(path, device="cpu")
        found = torch.load(path, map_location="cpu", weights_only=True)
        listed = list(leaves(found)) if isinstance(found, Mapping) else None
    except UnpicklingError as error:
        only = "tensors alone. Nothing of it was run. If you trust it, make safetensors of it."
        raise bad("a pickle that holds more than tensors or is no PyTorch file", only) from error
    except RecursionError as error:
        raise bad("whose dictionaries are nested too deeply") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        what = f"which is damaged or cut off: {scrub(error)}"
        raise bad(what, f"a whole file. {AGAIN}") from error
    if listed is None:
        raise bad(f"which holds a {type(found).__name__}")
    named = [(name, one) for name, one in listed if isinstance(one, Tensor)]
    twice = sorted(n for n, many in Counter(name for name, _ in named).items() if many > 1)
    if twice:
        what = f"in which several tensors are called {twice[:5]}, nested names joined by dots"
        raise bad(what, "a name for each. Save one of them.")
    strange = [name for name, tensor in named if not is_plain(tensor)]
    if strange:
        what = f"in which {strange[:5]} hold no numbers of their own, or not one for each place"
        raise bad(what, "no meta, sparse or expanded tensors. Save x.to_dense().contiguous().")
    return dict(named)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds a number for each of its places, so that its size is that of the file."""
    strided = not tensor.is_nested and not tensor.is_meta and tensor.layout == torch.strided
    return strided and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def as_fp32(name: str, tensor: Tensor, path: Path) -> Tensor:
    """A tensor in fp32, exactly; a CheckpointError if its type is another or a number not finite."""
    allowed = [torch.float32, torch.float16, torch.bfloat16]
    if tensor.dtype not in allowed or not bool(tensor.isfinite().all()):
        what = "with NaN or infinite numbers" if tensor.dtype in allowed else f"in {tensor.dtype}"
        what = f"Got {name!r} of {str(path)!r} {what}; expected finite numbers of one of {allowed}"
        raise CheckpointError(f"{what}. Convert it, or look for a file that is not damaged.")
    return tensor.detach().float().contiguous()


def leaves(data: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested dictionaries and their dotted names."""
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def scrub(error: Exception, secret: str | None = None) -> str:
    """The kind of an error and its first line, without tokens in it."""
    text = (str(error).strip().splitlines() or [""])[0]
    text = text.replace(secret, "***") if secret else text
    return f"{type(error).__name__}: {re.sub(r'hf_[A-Za-z0-9]{4,}', '***', text)[:300]}"

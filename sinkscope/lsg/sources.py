"""Where files of gates come from, and tensors read from them without running any code of theirs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sinkscope.errors import CheckpointError

REPOSITORY = re.compile(r"^[\w.-]+/[\w.-]+$")
HUB_ERRORS = (OSError, ValueError, HTTPError, RuntimeError, EntryNotFoundError)
"""What the hub's client raises: no network, no such repository, no permission, an impossible name."""
AGAIN = "Download or copy it again."


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
    """A folder that is here, else a repository; a CheckpointError if it is the name of neither."""
    what = f"of type {type(name).__name__}"
    if isinstance(name, (str, Path)):
        where, text = Path(name).expanduser(), str(name)
        if where.is_dir():
            return Source(text, where, None, subfolder)
        path = isinstance(name, Path) or where.is_absolute() or text.startswith((".", "~"))
        if not path and not where.exists() and REPOSITORY.match(text):
            return Source(text, None, revision, subfolder)
        what = "a file" if where.exists() else "nothing that exists"
    raise CheckpointError(
        f"Got {str(name)!r}, which is {what}; expected the folder that save_pretrained() wrote, or a "
        "repository id such as 'user/gate'."
    )


def scrub(error: Exception, secret: str | None = None) -> str:
    """The kind of an error and its first line, without tokens in it."""
    text = (str(error).strip().splitlines() or [""])[0]
    text = text.replace(secret, "***") if secret else text
    return f"{type(error).__name__}: {re.sub(r'hf_[A-Za-z0-9]{4,}', '***', text)[:300]}"


def leaves(data: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested dictionaries and their dotted names."""
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or a PyTorch file, on the CPU; nested names are dotted.

    What is no tensor is left out, and no code is run: of pickles ``weights_only=True`` reads tensors.

    Raises:
        CheckpointError: If it is damaged, or holds more than plain tensors.
    """

    def bad(what: str, wanted: str = "tensors by name.") -> CheckpointError:
        return CheckpointError(f"Got {str(path)!r}, {what}; expected {wanted}")

    try:
        if path.suffix == ".safetensors":
            return load_file(path, device="cpu")
        found = torch.load(path, map_location="cpu", weights_only=True)
        listed = list(leaves(found)) if isinstance(found, Mapping) else None
    except UnpicklingError as error:
        only = (
            "tensors alone. Nothing of it was run. If you trust its maker, make safetensors of it."
        )
        raise bad("a pickle that holds more than tensors or is no PyTorch file", only) from error
    except RecursionError as error:
        raise bad("whose dictionaries are nested too deeply") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise bad(
            f"which is damaged or cut off: {scrub(error)}", f"a whole file. {AGAIN}"
        ) from error
    if listed is None:
        raise bad(f"which holds a {type(found).__name__}")
    named = [(name, one) for name, one in listed if isinstance(one, Tensor)]
    twice = sorted(n for n, many in Counter(name for name, _ in named).items() if many > 1)
    if twice:
        what = (
            f"in which several tensors are called {twice[:5]} once nested names are joined by dots"
        )
        raise bad(what, "a name for each. Save one of them.")
    strange = [name for name, tensor in named if not is_plain(tensor)]
    if strange:
        what = f"in which {strange[:5]} hold no numbers of their own, or not one for each place"
        raise bad(
            what, "no meta, sparse, nested or expanded tensors. Save x.to_dense().contiguous()."
        )
    return dict(named)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds a number for each of its places, so that its size is that of the file."""
    if tensor.is_nested or tensor.is_meta or tensor.layout != torch.strided:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def as_fp32(name: str, tensor: Tensor, path: Path) -> Tensor:
    """A tensor in fp32, exactly; a CheckpointError if its type is another or a number not finite."""
    allowed = [torch.float32, torch.float16, torch.bfloat16]
    if tensor.dtype not in allowed or not bool(tensor.isfinite().all()):
        what = "with NaN or infinite numbers" if tensor.dtype in allowed else f"in {tensor.dtype}"
        raise CheckpointError(
            f"Got {name!r} of {str(path)!r} {what}; expected finite numbers of one of {allowed}, which "
            "become fp32 without rounding. Convert it, or look for a file that is not damaged."
        )
    return tensor.detach().float().contiguous()

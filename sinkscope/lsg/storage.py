"""Folders and repositories: read what may be unsafe or damaged, write what is whole or not there.

Nothing is unpickled here but by ``torch.load(weights_only=True)``, which runs no code of the file.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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

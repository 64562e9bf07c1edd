"""What MODEL means on the command line and in recipes: a word, a folder, or a repository."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkscope.errors import CheckpointError, InputError, nearest

if TYPE_CHECKING:
    from sinkscope.models import LVLM

WORDS = ("bundled", "example")
"""The models of the package."""
MODEL = "'example' (a small real model), 'bundled' (a toy inside the package), a folder, or a hub repository"
"""What the help of every command says of it."""
TRUST = "run the code that the model's repository brings; read it first"
"""What the help of every command says of trust."""
FLAGS = ("remote", "trust_remote_code")
"""Options that are False where nothing is said."""
OURS = ("dtype", "attn_implementation", "device_map")
"""What can be chosen for a model of the package."""


def load_model(name: str, *, weights: bool = True, **options: Any) -> LVLM:
    """The model of that name.

    Args:
        name: ``"example"``, ``"bundled"``, a folder or a hub repository. A folder that is called like a
            word is ``"./example"``.
        weights: False builds the architecture of a folder or repository alone.
        options: Arguments of ``LVLM.from_pretrained``; None stands for what is not given.

    Raises:
        SinkscopeError: If there is no such model, or it cannot be loaded so.
    """
    check_word(name)
    asked = {k: v for k, v in options.items() if v is not None}
    given: dict[str, Any] = {k: v for k, v in asked.items() if not (v is False and k in FLAGS)}
    if name in WORDS or not sys.stderr.isatty():
        without_bars()
    if name in WORDS:
        return _of_the_package(name, given)
    from sinkscope.models import LVLM

    if not weights:
        kept = ("revision", "attn_implementation", "trust_remote_code")
        given = {"remote": True, **{key: given[key] for key in kept if key in given}}
    return LVLM.from_pretrained(name, **given)


def check_word(name: Any) -> None:
    """Refuse what looks like a mistyped word, before anything asks the network.

    Raises:
        CheckpointError: If it is one, and neither a folder here nor ``owner/name``.
    """
    if not isinstance(name, str) or name in WORDS or set(name) & {"/", "\\"}:
        return
    close = get_close_matches(name.lower(), WORDS, n=1)
    if close and not Path(name).expanduser().exists():
        raise CheckpointError(
            f"Got the model {name!r}; expected 'bundled', 'example', a folder that is there, or a hub "
            f"repository such as 'llava-hf/llava-1.5-7b-hf'. {nearest(name.lower(), close)}"
        )


def without_bars() -> None:
    """No progress bars of transformers where nobody watches, or where loading takes no time."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _of_the_package(name: str, given: dict[str, Any]) -> LVLM:
    """A model of the package, on the device that was asked for.

    Raises:
        InputError: If something was asked for that it does not have.
    """
    for key in given.keys() - {*OURS}:
        raise InputError(
            f"Got {key}={given[key]!r} for {name!r}, a model of the package; expected it with a hub "
            f"repository only. Leave {key} out."
        )
    options = {key: given[key] for key in OURS[:2] if key in given}
    if options.get("dtype") == "auto":
        del options["dtype"]
    if name == "example":
        from sinkscope.example.load import load_example

        lvlm = load_example(**options)
    else:
        from sinkscope.bundled.load import load_bundled

        lvlm = load_bundled(**options)
    if "device_map" in given:
        _place(lvlm, given["device_map"])
    return lvlm


def _place(lvlm: LVLM, device: Any) -> None:
    """Move a small model as a whole; ``"auto"`` is the GPU where there is one.

    Raises:
        InputError: If there is no such device.
    """
    import torch

    module: Any = lvlm.module
    try:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        module.to(torch.device(device))
    except (RuntimeError, AssertionError, TypeError) as error:  # what torch raises without CUDA
        raise InputError(
            f"Got device_map={device!r} ({type(error).__name__}: {str(error).splitlines()[0]}); expected "
            "'auto', 'cpu' or a GPU that is here, such as 'cuda:0'."
        ) from error

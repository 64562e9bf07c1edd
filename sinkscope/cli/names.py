"""What MODEL means on the command line and in recipes: a word, a folder, or a repository."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkscope.errors import CheckpointError, DetectorError, InputError, nearest

if TYPE_CHECKING:
    from sinkscope.detectors import Detector
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


FORMS = {
    "norm": "norm:100, norm:valley, norm:3sigma",
    "valley": "valley",
    "3sigma": "3sigma",
    "dims": "dims:1415,2533:20 (divided by the RMS), dims:1415,2533:8:none (raw)",
    "massive": "massive, massive:100:1000 (absolute, times the median)",
    "received": "received:0.3, received:5x (times the null)",
    "cosine": "cosine:0.9 (to the first token)",
    "cls": "cls (the ViT's CLS token, where the projector keeps it)",
    "register": "register (the ViT's register tokens likewise)",
}

"""First word -> how such a detector is written."""

HELP = "A detector is one of: " + "; ".join(FORMS.values()) + "."


def parse_detector(spec: str) -> Detector:
    """A detector from a few words.

    Args:
        spec: See `FORMS`; parts are separated by colons.

    Returns:
        The detector. Whether it can work on a model shows when it is used.

    Raises:
        DetectorError: If it is none.
    """
    name, *rest = spec.split(":")
    if name not in FORMS:
        raise DetectorError(f"Got the detector {spec!r}. {nearest(name, FORMS)} {HELP}")
    try:
        return _MAKERS[name](*rest)
    except (TypeError, ValueError) as error:
        raise DetectorError(f"Got the detector {spec!r}; expected {FORMS[name]}.") from error


def _norm(tau: str) -> Detector:
    from sinkscope.detectors import Norm

    return Norm(tau if tau in ("valley", "3sigma") else float(tau))


def _dims(dims: str, tau: str, normalize: str = "rms") -> Detector:
    from sinkscope.detectors import SinkDimensions

    if normalize not in ("rms", "none"):
        raise ValueError(normalize)
    return SinkDimensions(tuple(int(d) for d in dims.split(",")), float(tau), normalize)


def _massive(absolute: str = "100", ratio: str = "1000") -> Detector:
    from sinkscope.detectors import Massive

    return Massive(float(absolute), float(ratio))


def _received(limit: str = "0.3") -> Detector:
    from sinkscope.detectors import Received

    if limit.endswith("x"):
        return Received(times_null=float(limit[:-1]))
    return Received(float(limit))


def _cosine(threshold: str = "0.9") -> Detector:
    from sinkscope.detectors import CosineToBOS

    return CosineToBOS(float(threshold))


def _kind(kind: str) -> Detector:
    from sinkscope.detectors import VisionTokens

    return VisionTokens(kind)


_MAKERS: dict[str, Callable[..., Detector]] = {
    "norm": _norm,
    "valley": lambda: _norm("valley"),
    "3sigma": lambda: _norm("3sigma"),
    "dims": _dims,
    "massive": _massive,
    "received": _received,
    "cosine": _cosine,
    "cls": lambda: _kind("cls"),
    "register": lambda: _kind("register"),
}


@contextmanager
def stages(total: int, first: str) -> Iterator[Callable[[str], None]]:
    """Say what is done, stage by stage.

    Args:
        total: How many stages there are.
        first: The first one, such as ``"loading the model"``.

    Yields:
        A function that ends a stage and names the next.
    """
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=first, disable=None, leave=False) as bar:

        def say(text: str) -> None:
            if bar.disable:
                sys.stderr.write(f"sinkscope: {text} ...\n")
                sys.stderr.flush()

        def step(text: str) -> None:
            say(text)
            bar.update()
            bar.set_description(text)

        say(first)
        yield step

"""What the words of a command mean: models, detectors, and the stages of its work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkscope.checks import check_choice
from sinkscope.errors import CheckpointError, DetectorError, InputError, nearest

if TYPE_CHECKING:
    from sinkscope.detectors import Detector
    from sinkscope.models import LVLM

WORDS = ("bundled", "example")  # the models of the package
FORMS = {  # first word -> how such a detector is written
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
HELP = "A detector is one of: " + "; ".join(FORMS.values()) + "."


def load_model(name: str, *, weights: bool = True, **options: Any) -> LVLM:
    """Load ``"example"``, ``"bundled"``, a folder (``"./example"`` too) or a hub repository.

    Without ``weights`` the architecture of a folder or repository alone is built. ``options`` are arguments
    of ``LVLM.from_pretrained``; None stands for what is not given.
    """
    check_word(name)
    off = {"remote": False, "trust_remote_code": False}
    given = {k: v for k, v in options.items() if v is not None and v is not off.get(k)}
    if name in WORDS or not sys.stderr.isatty():  # loading takes no time, or nobody watches
        from transformers.utils import logging

        logging.disable_progress_bar()
    if name in WORDS:
        return _of_the_package(name, given)
    from sinkscope.models import LVLM

    if not weights:
        kept = given.keys() & {"revision", "attn_implementation", "trust_remote_code"}
        given = {"remote": True, **{key: given[key] for key in kept}}
    load: Any = LVLM.from_pretrained
    return load(name, **given)


def check_word(name: Any) -> None:
    """Refuse a mistyped word, neither a folder nor ``owner/name``, before anything asks the network."""
    if not isinstance(name, str) or name in WORDS or set(name) & {"/", "\\"}:
        return
    close = get_close_matches(name.lower(), WORDS, n=1)
    if close and not Path(name).expanduser().exists():
        raise CheckpointError(
            f"Got the model {name!r}; expected 'bundled', 'example', a folder that is there, or a hub "
            f"repository such as 'llava-hf/llava-1.5-7b-hf'. {nearest(name.lower(), close)}"
        )


def _of_the_package(name: str, given: dict[str, Any]) -> LVLM:
    """A model of the package, moved as a whole; ``"auto"`` is the GPU where there is one."""
    import torch

    device = given.pop("device_map", None)
    for key in given.keys() - {"dtype", "attn_implementation"}:
        raise InputError(
            f"Got {key}={given[key]!r} for {name!r}, a model of the package, which takes none: leave it out."
        )
    if given.get("dtype") == "auto":
        del given["dtype"]
    if name == "example":
        from sinkscope.example.load import load_example as load
    else:
        from sinkscope.bundled import load_bundled as load
    lvlm = load(**given)
    if device is None:
        return lvlm
    module: Any = lvlm.module
    try:
        there = "cuda" if torch.cuda.is_available() else "cpu"
        module.to(torch.device(there if device == "auto" else device))
    except (RuntimeError, AssertionError, TypeError) as error:  # what torch raises without CUDA
        raise InputError(
            f"Got device_map={device!r} ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "expected 'auto', 'cpu' or a GPU that is here, such as 'cuda:0'."
        ) from error
    return lvlm


def parse_detector(spec: str) -> Detector:
    """Make a detector from a few words, such as ``norm:100``; see `FORMS`. Another word is a DetectorError."""
    name, *rest = spec.split(":")
    if name not in FORMS:
        raise DetectorError(f"Got the detector {spec!r}. {nearest(name, FORMS)} {HELP}")
    from sinkscope import detectors as rules

    def dims(channels: str, tau: str, normalize: str = "rms") -> Detector:
        check_choice(("rms", "none"), normalize=normalize)
        wanted = tuple(int(d) for d in channels.split(","))
        return rules.SinkDimensions(wanted, float(tau), normalize)

    def received(limit: str = "0.3") -> Detector:
        times = limit.endswith("x")
        return (
            rules.Received(times_null=float(limit[:-1])) if times else rules.Received(float(limit))
        )

    makers: dict[str, Callable[..., Detector]] = {
        "norm": lambda tau: rules.Norm(tau if tau in ("valley", "3sigma") else float(tau)),
        "valley": lambda: rules.Norm("valley"),
        "3sigma": lambda: rules.Norm("3sigma"),
        "dims": dims,
        "massive": lambda a="100", ratio="1000": rules.Massive(float(a), float(ratio)),
        "received": received,
        "cosine": lambda threshold="0.9": rules.CosineToBOS(float(threshold)),
        "cls": lambda: rules.VisionTokens("cls"),
        "register": lambda: rules.VisionTokens("register"),
    }
    try:
        return makers[name](*rest)
    except (TypeError, ValueError) as error:
        raise DetectorError(f"Got the detector {spec!r}; expected {FORMS[name]}.") from error


@contextmanager
def stages(total: int, first: str) -> Iterator[Callable[[str], None]]:
    """Show what is done, a bar or lines on standard error; yields what ends a stage and names the next."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=first, disable=None, leave=False) as bar:

        def step(text: str, ended: int = 1) -> None:
            if bar.disable:
                print(f"sinkscope: {text} ...", file=sys.stderr, flush=True)
            bar.update(ended)
            bar.set_description(text)

        step(first, 0)
        yield step

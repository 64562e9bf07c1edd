"""Detectors in a few words, such as ``norm:100``, for the command line.

Only what is asked for is imported, so that ``sinkscope --help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sinkscope.errors import DetectorError, nearest

if TYPE_CHECKING:
    from sinkscope.detectors import Detector

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

"""What a sweep is given, checked before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinkscope.detectors.calibrate import Calibration
from sinkscope.detectors.run import check_detector
from sinkscope.errors import InputError, SelectionError, nearest

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM

MERGES = ("max", "mean", "any")


def check_batch(batch: Any) -> None:
    """Refuse anything but ``"auto"`` and a positive number.

    Raises:
        InputError: If it is something else.
    """
    number = isinstance(batch, int) and not isinstance(batch, bool) and batch >= 1
    if not number and batch != "auto":
        raise InputError(f"Got batch={batch!r}; expected 'auto' or a number of pairs, 1 or more.")


def check_merge(merge: Any) -> None:
    """Refuse an unknown way to join ViT tokens.

    Raises:
        SelectionError: If it is unknown.
    """
    if merge not in MERGES:
        raise SelectionError(
            f"Got merge={merge!r}; expected {', '.join(map(repr, MERGES))}. "
            f"{nearest(str(merge), MERGES)}"
        )


def check_rule(detector: Any, calibration: Any) -> None:
    """Refuse what is no rule for V-sinks, and two of them.

    Raises:
        InputError: If both are given, or ``calibration`` is no calibration.
        DetectorError: If ``detector`` is none.
    """
    if detector is not None and calibration is not None:
        raise InputError("Got v_detector and calibration; expected one of them. Write only one.")
    if detector is not None:
        check_detector(detector)
    if calibration is not None and not isinstance(calibration, Calibration):
        raise InputError(
            f"Got calibration of type {type(calibration).__name__}; expected what "
            "ss.calibrate(lvlm, samples) gives."
        )


def check_usable(lvlm: LVLM, *, weights: bool) -> None:
    """Refuse a model that cannot read answers, or has no weights where they are needed.

    Args:
        lvlm: The model.
        weights: Whether they are needed.

    Raises:
        InputError: If it has no processor, or no weights.
    """
    if lvlm.tokenizer is None:
        raise InputError("Got an LVLM without a processor; expected one, to read answers.")
    if weights and lvlm.device.type == "meta":
        raise InputError(
            "Got an LVLM without weights; expected them here: a sweep resumes passes, which a remote "
            "run cannot. Write ss.LVLM.from_pretrained(name) without remote=True, or dry_run=True to "
            "see what it would cost."
        )

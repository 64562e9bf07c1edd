"""What a sweep is given, checked before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinkscope.detectors.calibrate import Calibration
from sinkscope.detectors.run import check_detector
from sinkscope.errors import InputError

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM


def check_batch(batch: Any) -> None:
    """Refuse anything but ``"auto"`` and a positive number.

    Raises:
        InputError: If it is something else.
    """
    number = isinstance(batch, int) and not isinstance(batch, bool) and batch >= 1
    if not number and batch != "auto":
        raise InputError(f"Got batch={batch!r}; expected 'auto' or a number of pairs, 1 or more.")


def check_rules(detector: Any, l_detector: Any, calibration: Any, *, with_l: bool) -> None:
    """Refuse what is no rule for sinks, two of a kind, and one for L-sinks that have no coefficient.

    Args:
        detector: For V-sinks.
        l_detector: For L-sinks.
        calibration: For both.
        with_l: Whether L-sinks have a coefficient of their own.

    Raises:
        InputError: If there are two, one is of no use, or ``calibration`` is no calibration.
        DetectorError: If a detector is none.
    """
    for name, one in (("v_detector", detector), ("l_detector", l_detector)):
        if one is not None and calibration is not None:
            raise InputError(
                f"Got {name} and calibration; expected one of them. Write only one, or "
                "v_detector=... and l_detector=calibration.l_detector."
            )
        if one is not None:
            check_detector(one)
    if l_detector is not None and not with_l:
        raise InputError(
            f"Got l_detector={l_detector!r} and a grid of pairs (s_V, s_rest), in which L-sinks are "
            "among the rest; expected none. Write grid=ss.lsg_grid(groups=3) for triples (s_V, s_L, "
            "s_rest)."
        )
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

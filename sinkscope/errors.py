"""Every error sinkscope raises: what came, what was expected, what to write instead.

All of them derive from `SinkscopeError`, so one ``except`` catches them all, and from the closest
builtin, so code that knows nothing of sinkscope still catches them sensibly.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SinkscopeError(Exception):
    """Base of every error of this library."""


class InputError(SinkscopeError, ValueError):
    """The images, text or processor output do not fit the model or one another."""


class SelectionError(SinkscopeError, ValueError):
    """A token selection is unknown, empty where it must not be, or of another batch."""


class LayerError(SinkscopeError, IndexError):
    """A layer index is negative or beyond the model's last block."""


class ModelError(SinkscopeError, TypeError):
    """The model has no vision tower, no decoder, or a layout that sinkscope cannot read."""


class CheckpointError(SinkscopeError, OSError):
    """A checkpoint folder or repository could not be read."""


class RemoteError(SinkscopeError, ConnectionError):
    """A server could not be asked, or the run failed there; ``job_id`` is the job to come back to, or None."""

    def __init__(self, message: str = "", job_id: str | None = None) -> None:
        super().__init__(message)
        self.job_id = job_id


class AttentionCallError(ModelError):
    """The attention call was not found in a module, or did not fire as its source says."""


class ProbeError(SinkscopeError, ValueError):
    """A probe was given impossible parameters or asked for a result it does not have."""


class DetectorError(SinkscopeError, ValueError):
    """A detector's parameters cannot work on this model, such as a tau above sqrt(D)."""


class CalibrationError(SinkscopeError, ValueError):
    """The samples do not show what calibration needs."""


class InterventionError(SinkscopeError, ValueError):
    """An intervention was given impossible parameters."""


class NoEffectError(InterventionError):
    """An intervention touched nothing: an empty selection, a neutral factor, a layer that never ran."""


class TooFewTokensError(InterventionError):
    """A control cannot be drawn, because a row has too few ordinary tokens."""


class NonFiniteError(SinkscopeError, ArithmeticError):
    """NaN or infinite activations at live positions."""


class WorkerError(SinkscopeError, RuntimeError):
    """There are no workers of Ray, or one part took down several of them."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``Did you mean 'image'?``, which names the closest of ``known``, or ``Known: 'a', 'b'.``"""
    names = sorted(known)
    if close := get_close_matches(str(name), names, n=1, cutoff=0.6):
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(repr(n) for n in names)}."

"""How long to wait for a server, what a run there has cost, and what its errors say."""

import traceback
from dataclasses import dataclass

from sinkscope.checks import check_number, check_whole
from sinkscope.errors import RemoteError


@dataclass(frozen=True)
class Wire:
    """How long an `LVLM` waits for a server: ``lvlm.wire = Wire(timeout=600)``.

    The server's address and your key stand in ``nnsight.CONFIG.API``.

    Attributes:
        timeout: Seconds to wait for one job, in the queue and running.
        patience: Seconds to wait for the answer to one call.
        retries: How often a call that changes nothing on the server is made again, after pauses of about
            0.5, 1, 2, ... seconds.
    """

    timeout: float = 3600.0
    patience: float = 60.0
    retries: int = 5

    def __post_init__(self) -> None:
        check_number(above=0, timeout=self.timeout, patience=self.patience)
        check_whole(0, retries=self.retries)


@dataclass(frozen=True)
class Traffic:
    """What one remote run has cost.

    Attributes:
        up: Bytes sent: the bodies of all calls that were answered, without headers.
        down: Bytes received: the bodies of the answers, as they came, compressed.
        queued: Seconds from the server's receipt until the job was seen to run.
        running: Seconds from then until it was seen to be done.
        job_id: The server's name for the job; None for ``"local"``, which has no times either.
    """

    up: int
    down: int
    queued: float = 0.0
    running: float = 0.0
    job_id: str | None = None


class ServerError(RemoteError):
    """A run raised an error on the server; the message ends with the ``text`` of its traceback."""

    def __init__(self, message: str, text: str = "") -> None:
        super().__init__(message)
        self.text = text


def read_traceback(text: str) -> tuple[str, str, list[traceback.FrameSummary]]:
    """Kind, message and frames of the last traceback in a text; NDIF says the message once more below it."""
    lines = text.rpartition("Traceback (most recent call last):\n")[2].splitlines()
    frames: list[traceback.FrameSummary] = []
    while lines and (lines[0].startswith(" ") or not lines[0]):
        head, *line = lines.pop(0).split('"')
        if head == "  File " and len(line) == 2:
            number, _, name = line[1].removeprefix(", line ").partition(", in ")
            source = lines[0].strip() if lines and lines[0].startswith("    ") else ""
            frames.append(traceback.FrameSummary(line[0], int(number), name, line=source))
    kind, _, said = "\n".join(lines).strip().partition(": ")
    once, _, again = said.rpartition("\n\n")
    return kind.rpartition(".")[2], once if once == again else said, frames

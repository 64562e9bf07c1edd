"""Work for workers, in a module that they can import; what it does stands in the part."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sinkscope.errors import InputError


def do(lvlm: Any, part: dict[str, Any]) -> Any:
    """Tell which process has which model; or fail, or be killed once, as the part says."""
    while "wait" in part and not Path(part["wait"]).exists():
        time.sleep(0.05)
    if "flag" in part and not (flag := Path(part["flag"])).exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if part.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if part.get("raise"):
        raise InputError("Got seven; expected eight. Write 8.")
    return part["n"] ** 2, os.getpid(), lvlm.name, lvlm.module.training


class Halved:
    """A condition that holds inside a ``with`` block: half of the model's last weights."""

    @contextmanager
    def apply(self, lvlm: Any) -> Iterator[None]:
        weight = lvlm.module.get_output_embeddings().weight
        before = weight.data
        weight.data = before * torch.linspace(0.5, 1.5, len(before))[:, None]
        try:
            yield
        finally:
            weight.data = before

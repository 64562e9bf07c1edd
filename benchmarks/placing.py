"""Where a benchmark runs: options for a device and a dtype, a clock that waits for it, and its name."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

DTYPES = ("float32", "bfloat16", "float16")


def add_place(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--dtype``, the CPU in fp32 if they are left out."""
    parser.add_argument("--device", default="cpu", help='"cpu", "cuda", "cuda:1" or "mps"')
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the model")


def device_of(options: argparse.Namespace) -> torch.device:
    """The device asked for; SystemExit if there is none here."""
    device = torch.device(options.device)
    there = {"cpu": True, "cuda": torch.cuda.is_available()}
    if not there.get(device.type, torch.backends.mps.is_available()):
        raise SystemExit(f"Got --device {options.device}, which is not here; expected one that is.")
    return device


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    return getattr(torch, options.dtype)


@contextmanager
def built_on(device: torch.device) -> Any:
    """Make weights on a GPU at once; on the CPU nothing is different."""
    if device.type == "cpu":
        yield
    else:
        with device:
            yield


def wait(device: torch.device) -> None:
    """Wait until a device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def clock_of(device: torch.device, cpu_seconds: bool) -> Callable[[], float]:
    """Seconds: those of this process where only the CPU works and they are asked for, else of the wall."""
    if device.type == "cpu":
        return time.process_time if cpu_seconds else time.perf_counter

    def clock() -> float:
        wait(device)
        return time.perf_counter()

    return clock


def machine_name(device: torch.device) -> str:
    """The processor, and in front of it the GPU where one is used."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = named[0] if named else platform.processor() or platform.machine()
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {cpu}"
    return f"{device.type}; {cpu}" if device.type != "cpu" else cpu

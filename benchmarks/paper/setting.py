"""What the analyses share: the model, the rule for V-sinks, the questions, and rows kept on the way."""

import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import sinkscope as ss
from sinkscope.bundled import TEST_SEEDS, TRAIN_SEEDS, VALIDATION_SEEDS, scene_questions

V_RULE = ss.detectors.Received(eps=0.035, heads="mean")
"""Nine times the uniform share of 257 ViT tokens, mean over heads, in the block that feeds the projector.

On 48 validation scenes with noise of 5, 25 and 40 grey levels CLS received 0.039 to 0.19 there and the
most attended patch of an image 0.011 to 0.030.
"""
L_RULE = ss.detectors.Massive()
CLS = "CLS"
SPLITS = {"train": TRAIN_SEEDS, "validation": VALIDATION_SEEDS, "test": TEST_SEEDS}
PACKAGES = ("sinkscope", "torch", "transformers", "nnsight", "numpy", "scikit-learn")


def load(name, device):
    """The model in fp32: ``example``, ``bundled``, or a folder; TF32 is off, so that a GPU computes in fp32 too."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    known = {"example": lambda: ss.load_example(), "bundled": ss.load_bundled}
    lvlm = known[name]() if name in known else ss.LVLM.from_pretrained(name, dtype="float32")
    lvlm.module.to(device)
    return lvlm


def gate_rule():
    """The V rule in a form that a gate can hold: attention is not known inside its pass, kinds are."""
    return ss.detectors.VisionTokens("cls")


def questions(split, images, per_image, noise, start=0):
    """Questions about scenes of a split."""
    return list(scene_questions(images, per_image, seeds=SPLITS[split], start=start, noise=noise))


def machine(lvlm):
    """Where it ran: the accelerator or the processor, the dtype, and versions."""
    if lvlm.device.type == "cuda":
        where = torch.cuda.get_device_name(lvlm.device)
    else:
        lines = (
            Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        )
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        where = f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} thread(s)"
    dtype = str(lvlm.module.dtype).removeprefix("torch.")
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return {"device": where, "dtype": dtype, "versions": versions}


def told(body):
    """The machine and the time of a result as a sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in body["versions"].items())
    shared = f" in each of {body['shares']} processes" if body.get("shares", 1) > 1 else ""
    return f"{body['device']}, {body['dtype']}: {body['seconds']:.0f} s{shared} ({versions})."


@dataclass(frozen=True)
class Clock:
    """When to stop.

    Attributes:
        seconds: From the start of the process' work on.
        start: When that was.
    """

    seconds: float
    start: float

    @classmethod
    def of(cls, seconds):
        return cls(seconds, time.monotonic())

    @property
    def spent(self):
        return time.monotonic() - self.start

    def allows(self, more):
        """Whether there is time for as many seconds more."""
        return self.spent + more <= self.seconds

    def say(self, *words):
        print(f"[{self.spent:6.0f} s]", *words, flush=True)


@dataclass(frozen=True)
class Kept:
    """A folder with the rows of one analysis, a file per group of images; it goes on where it stopped.

    Attributes:
        folder: The folder.
        lvlm: What is measured; None to read only.
        clock: When to stop.
        earlier: Seconds of stopped runs, less what this process spent on other things before.
    """

    folder: Path
    lvlm: Any = None
    clock: Any = None
    earlier: float = 0.0

    @classmethod
    def open(cls, folder, settings, lvlm, clock):
        """The folder of an analysis with these settings.

        Raises:
            SystemExit: If it holds one with other settings.
        """
        path = folder / "settings.json"
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings, default=str))
        if path.exists() and json.loads(path.read_text()) != settings:
            raise SystemExit(
                f"{folder} holds rows of other settings: {path.read_text()}\nexpected {settings}. "
                "Give --keep another folder, or delete this one."
            )
        path.write_text(json.dumps(settings))
        earlier = cls(folder).read("machine").get("seconds", 0.0) - clock.spent
        return cls(folder, lvlm, clock, earlier)

    def run(self, records, args, work):
        """Keep the tables of ``work(records)`` for groups of images, until time is up.

        Args:
            records: Questions, those about one image together.
            args: ``chunk``, images per group, and ``share``, which of how many processes this is.
            work: Gives the table of a group; items are numbered from 0 in each.
        """
        images = [list(group) for _, group in groupby(records, key=lambda q: q["image_id"])]
        longest, size, (mine, shares) = 0.0, args.chunk, args.share
        for place in range(0, len(images), size):
            path = self.folder / f"{place:04d}.csv"
            if path.exists() or place // size % shares != mine:
                continue
            if not self.clock.allows(longest):
                self.clock.say(f"time is up after {place} of {len(images)} images")
                break
            before = self.clock.spent
            some = [question for image in images[place : place + size] for question in image]
            table = work(some)
            table["item"] += sum(len(image) for image in images[:place])
            new = path.with_suffix(".new")
            table.to_csv(new, index=False)
            new.rename(path)
            self.beat(shares)
            longest = max(longest, self.clock.spent - before)
            self.clock.say(f"{min(place + size, len(images))} of {len(images)} images")

    def beat(self, shares=1):
        """Note where and how long it has run so far; what went on elsewhere says so."""
        seconds = round(self.earlier + self.clock.spent, 1)
        here, before = machine(self.lvlm), self.read("machine").get("device", "")
        if before and here["device"] not in before:
            here["device"] = f"{before}; then {here['device']}"
        elif before:
            here["device"] = before
        self.note("machine", {**here, "seconds": seconds, "shares": shares})

    def note(self, name, body):
        """Write a JSON beside the rows."""
        (self.folder / f"{name}.json").write_text(json.dumps(body, indent=1, default=str) + "\n")

    def read(self, name):
        """A JSON beside the rows, or nothing."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def rows(self):
        """All rows there are."""
        parts = [
            pd.read_csv(
                path,
                dtype={"given": str, "answer": str, "image_id": str},
                keep_default_na=False,
                na_values={"sinks": [""], "s_l": [""]},
            )
            for path in sorted(self.folder.glob("[0-9]*.csv"))
        ]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def check(self, name="settings"):
        """Refuse to render what was not measured.

        Raises:
            SystemExit: If so.
        """
        if not (self.folder / f"{name}.json").exists():
            raise SystemExit(f"{self.folder} holds no {name}.json: measure first, see --help.")
        return self


def write(out, name, body, text, figures):
    """Put a result beside the others: numbers, tables and figures."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(body, indent=1, default=str) + "\n")
    (out / f"{name}.md").write_text(text.rstrip() + "\n")
    for figure_name, figure in figures.items():
        figure.savefig(out / f"{figure_name}.png", dpi=110)


def records_of(table):
    """A table as plain rows with few digits."""
    return json.loads(table.to_json(orient="records", double_precision=5))


def columns_of(table):
    """A long table as lists by column, which take less room."""
    return {
        name: json.loads(table[name].to_json(orient="values", double_precision=5)) for name in table
    }

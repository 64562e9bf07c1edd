"""Flip single bits in what the package has written, read it as a user would, and sort what happens.

    python scripts/flip_bits.py                          200 bits with seed 0
    python scripts/flip_bits.py --flips 60 --seed 7 --only gate,run

An unfinished sweep, a training folder with a checkpoint, a gate, a run and a generation are made with tiny
models. Every flip is of one bit in a fresh copy, which is then read or continued:

refused   a SinkscopeError that says what to do
harmless  the result equals that of the whole files
healed    the same, and more was measured than without the flip
SILENT    another result
RAW       another exception, or an error without advice

The exit status is 1 if there is a silent or a raw one.
"""

import argparse
import collections
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import sinkscope as ss
from sinkscope.errors import SinkscopeError
from sinkscope.experiments import Sweep
from sinkscope.results import load_run
from sinkscope.results.saving import same
from sinkscope.testing import random_image, tiny_llava
from sinkscope.training.loop import Loop

ADVICE = re.compile(r"\b(delete|remove|write|again|convert|upgrade)\b", re.IGNORECASE)
OUTCOMES = ("refused", "harmless", "healed", "SILENT", "RAW")
EDGE = 400  # bytes at both ends of a file, where headers are, that get half of the flips
SWEEPING = sys.modules[ss.sweep.__module__]
RULE = ss.detectors.Norm("3sigma")


class Kind(NamedTuple):
    """One kind of files: what writes them, and what reads them and gives all that a user has then."""

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]


class Broken(BaseException):
    """Ends a run where a kill would."""


@contextmanager
def ends(owner: Any, name: str, calls: int) -> Iterator[None]:
    """Let a function of ``owner`` raise `Broken` after some calls, as if the process had been killed."""
    real, seen = getattr(owner, name), []

    def counted(*args: Any, **named: Any) -> Any:
        if len(seen) == calls:
            raise Broken
        seen.append(1)
        return real(*args, **named)

    setattr(owner, name, counted)
    try:
        yield
    except Broken:
        pass
    finally:
        setattr(owner, name, real)


def records(many: int) -> list[dict[str, Any]]:
    """Questions about drawn noise, two per image."""
    answers = ("circle", "two blue squares", "yes", "red")
    each = ({"image": random_image(32, 32, i // 2), "answer": answers[i % 4]} for i in range(many))
    return [{**one, "question": "what is it", "image_id": i // 2} for i, one in enumerate(each)]


@contextmanager
def counting() -> Iterator[list[int]]:
    """Count the images that sweeps measure."""
    real, measured = SWEEPING.sweep_image, [0]

    def counted(*args: Any, **named: Any) -> Any:
        measured[0] += 1
        return real(*args, **named)

    SWEEPING.sweep_image = counted  # type: ignore[attr-defined]
    try:
        yield measured
    finally:
        SWEEPING.sweep_image = real  # type: ignore[attr-defined]


def kinds(lvlm: ss.LVLM) -> Mapping[str, Kind]:
    """Every kind; sweep and training have one image and one step left."""
    sample = lvlm.prepare(images=random_image(32, 32, 0), text="what is it")

    def sweep(out: Path) -> Any:
        options: dict[str, Any] = {"v_detector": RULE, "score": "logprob", "progress": False}
        return ss.sweep(lvlm, records(6), [0], [(0.5, 0.5), (0.0, 1.0)], out=out, **options)

    def half_a_sweep(out: Path) -> None:
        with ends(SWEEPING, "sweep_image", 2):
            sweep(out)

    def read_sweep(out: Path) -> Any:
        made = [Sweep.load(out)] if (out / "manifest.json").exists() else []
        made.append(sweep(out))
        return [(one.table.to_dict("list"), one.settings, one.notes) for one in made]

    def train(out: Path) -> Any:
        options: dict[str, Any] = {"batch": 2, "validation": 0.25, "lr": 0.02, "progress": False}
        options |= {"epochs": 1, "evaluate_every": 1, "checkpoint_every": 1, "out": out}
        made: Any = ss.train_lsg(
            lvlm,
            records(8),
            [0],
            v_detector=ss.detectors.Norm(8.0),
            choices={"hidden": 2},
            **options,
        )
        return [made.gate.state_dict(), list(made.lines), made.record["results"]]

    def half_a_training(out: Path) -> None:
        with ends(Loop, "_one_step", 2):
            train(out)

    def save_gate(out: Path) -> None:
        gate = ss.LSG.for_model(lvlm, 0, v_detector=ss.detectors.Norm(8.0), hidden=2)
        with torch.no_grad():
            for weight in gate.parameters():
                weight.normal_(generator=torch.Generator().manual_seed(1))
        gate.save_pretrained(out, record={"lr": 0.02, "losses": [3.5, 2.25, 1.125]})

    def read_gate(out: Path) -> Any:
        gate = ss.LSG.from_pretrained(out, lvlm=lvlm)
        return [gate.state_dict(), gate.config, gate.record]

    def save_run(out: Path) -> None:
        lvlm.run(sample, probes=[ss.probes.TokenNorms()]).save(out / "run.safetensors")

    def save_generation(out: Path) -> None:
        made = lvlm.generate(sample, [ss.probes.TokenNorms()], max_new_tokens=3)
        made.save(out / "generation.safetensors")

    return {
        "sweep": Kind(half_a_sweep, read_sweep),
        "training": Kind(half_a_training, train),
        "gate": Kind(save_gate, read_gate),
        "run": Kind(save_run, lambda out: load_run(out / "run.safetensors")),
        "generation": Kind(save_generation, lambda out: load_run(out / "generation.safetensors")),
    }


def place_of(folder: Path, drawn: random.Random) -> tuple[Path, int]:
    """A file, the larger the likelier, and a bit of it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    (file,) = drawn.choices(files, [path.stat().st_size ** 0.5 for path in files])
    size = file.stat().st_size
    byte = drawn.randrange(size)
    if drawn.random() < 0.5:
        byte = drawn.randrange(min(EDGE, size))
        byte = drawn.choice([byte, size - 1 - byte])
    return file, 8 * byte + drawn.randrange(8)


def flipped(folder: Path, place: tuple[Path, int], into: Path) -> None:
    """Copy a folder with one bit flipped."""
    copy, (file, bit) = shutil.copytree(folder, into), place
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    (copy / file.relative_to(folder)).write_bytes(content)


def sort(read: Callable[[], Any], expected: Any) -> tuple[str, str]:
    """What happens when files are read, and in what words; ``expected`` has the images measured, too."""
    try:
        with warnings.catch_warnings(), counting() as measured:
            warnings.simplefilter("ignore")
            found = read()
    except SinkscopeError as error:
        return (
            "refused" if ADVICE.search(str(error)) else "RAW"
        ), f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001  sorting all of them is the point
        return "RAW", f"{type(error).__name__}: {error}"
    if not same(found, expected[0]):
        return "SILENT", "another result"
    return ("healed" if measured[0] > expected[1] else "harmless"), "the same result"


def whole(kind: Kind, folder: Path, copy: Path) -> tuple[Any, int]:
    """Write a folder; what is read in a copy of it, and how many images that measures."""
    folder.mkdir()
    kind.write(folder)
    with counting() as measured:
        found = kind.read(shutil.copytree(folder, copy))
    shutil.rmtree(copy)
    return found, measured[0]


def main(words: Sequence[str] | None = None) -> int:
    """Flip, read, sort, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds, with commas between")
    parser.add_argument("--verbose", action="store_true", help="print every flip")
    asked = parser.parse_args(words)
    drawn, started = random.Random(asked.seed), time.monotonic()
    every = kinds(ss.LVLM(*tiny_llava(), verify=False))
    chosen = [name for name in every if not asked.only or name in asked.only.split(",")]
    counts: dict[tuple[str, str], collections.Counter[str]] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as made:
        work, copy = Path(made), Path(made, "copy")
        expected = {name: whole(every[name], work / name, copy) for name in chosen}
        for turn in range(asked.flips):
            name = chosen[turn % len(chosen)]
            file, bit = place = place_of(work / name, drawn)
            flipped(work / name, place, copy)
            how, said = sort(lambda n=name: every[n].read(copy), expected[name])
            shutil.rmtree(copy, ignore_errors=True)
            line = f"{how:8} {file.relative_to(work)} byte {bit // 8} bit {bit % 8}: {said}"
            if asked.verbose:
                print(line.replace("\n", " ")[:400])
            wrong += [line] if how in ("SILENT", "RAW") else []
            label = re.sub(r"\d{6,}", "N", file.name)
            counts.setdefault((name, label), collections.Counter())[how] += 1
    print(f"seed {asked.seed}, {asked.flips} flips, {time.monotonic() - started:.0f} s")
    print(f"{'kind':12}{'file':24}" + "".join(f"{one:>10}" for one in OUTCOMES))
    total = sum(counts.values(), collections.Counter[str]())
    for (name, label), found in [*sorted(counts.items()), (("all", ""), total)]:
        print(f"{name:12}{label:24}" + "".join(f"{found[one]:>10}" for one in OUTCOMES))
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    raise SystemExit(main())

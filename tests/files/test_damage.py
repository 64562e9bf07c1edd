"""What was damaged, copied or planted in a folder is refused by name, and nothing that was there is lost."""

import builtins
import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

import sinkscope as ss
from scripts import flip_bits
from sinkscope import files
from sinkscope.errors import CheckpointError, InputError
from sinkscope.experiments import Sweep
from sinkscope.experiments import sweep_result as store
from sinkscope.results.saving import same
from sinkscope.testing import random_image, tiny_llava
from sinkscope.training.loop import Loop

SWEEPING = sys.modules[ss.sweep.__module__]


@pytest.fixture(scope="module")
def kinds():
    return flip_bits.kinds(ss.LVLM(*tiny_llava(), verify=False))


@pytest.fixture(scope="module")
def made(kinds, tmp_path_factory):
    """A folder to copy by kind, and by kind and "done" a finished one, with the last result."""
    out, at = {}, tmp_path_factory.mktemp("made")
    for name in ("sweep", "training"):
        kinds[name].write(at / name)
        done = shutil.copytree(at / name, at / f"{name} done")
        out[name], out[name, "done"] = at / name, (done, kinds[name].read(done)[-1])
    return out


@pytest.fixture(params=["sweep", "training"])
def begun(request, kinds, made, tmp_path):
    """An unfinished folder, as ``begun.write``: ``begun.read(folder)`` goes on to the end."""
    return kinds[request.param]._replace(
        write=shutil.copytree(made[request.param], tmp_path / "out")
    )


def content(folder):
    found = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
    return {name: f.read_bytes() for name, f in found.items() if name != files.LOCK}


def refused(match):
    return pytest.raises(CheckpointError, match=match)


def test_no_flipped_bit_is_silent(capsys):
    """Of 200 before, 23 with seed 0: weights of gates and of checkpoints, `step`, cells, choices."""
    assert flip_bits.main(["--flips", "60", "--seed", "2"]) == 0, capsys.readouterr().out


# Sweeps


def other_cells(folder, name):
    """The part of another sweep with as many cells."""
    shutil.copytree(folder, folder.parent / "other")
    file = folder.parent / "other" / store.MANIFEST
    manifest = files.unseal(json.loads(file.read_text()), file, "") | {"score": "exact"}
    file.unlink()
    for part in folder.parent.glob("other/part-*"):
        part.unlink()
    made = store.Folder(folder.parent / "other", manifest)
    made.write(1, pq.read_table(folder / name).to_pylist(), [])
    shutil.copy(folder.parent / "other" / name, folder / name)


def test_a_damaged_page_is_refused_before_it_is_decoded(made, tmp_path):
    folder = shutil.copytree(made["sweep", "done"][0], tmp_path / "out")
    file, said = folder / store.part_name(0), []
    whole = file.read_bytes()
    for at in range(len(whole) // 4, len(whole) // 2, 20):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            Sweep.load(folder)  # where the bit is of no use, as in the statistics of a page
        except CheckpointError as error:
            said.append(str(error))
    assert any("CRC checksum" in one for one in said)


def rewritten(change):
    def write(folder, name):
        table = pq.ParquetFile(folder / name).read()
        pq.write_table(change(table), folder / name)

    return write


def without(column):
    return lambda table: table.drop_columns([column])


PLANTED = {
    "copied over another": lambda at, name: shutil.copy(at / store.part_name(0), at / name),
    "of another sweep": other_cells,
    "of another schema": rewritten(without("s_v")),
    "with a column more": rewritten(lambda t: t.append_column("more", pa.array([1] * len(t)))),
    "without the last line": rewritten(lambda table: table.slice(0, len(table) - 1)),
    "an empty table": rewritten(lambda table: table.slice(0, 0)),
    "without a digest": rewritten(lambda t: t.replace_schema_metadata({"notes": "[]"})),
    "with other notes": rewritten(
        lambda t: t.replace_schema_metadata({**t.schema.metadata, b"notes": b'["x"]'})
    ),
    "cut off": lambda at, name: (at / name).write_bytes((at / name).read_bytes()[:-100]),
    "no file": lambda at, name: ((at / name).unlink(), (at / name).mkdir()),
    "a link to nowhere": lambda at, name: ((at / name).unlink(), (at / name).symlink_to("none")),
}
EXTRA = ["part-000003.parquet", "part-0000001.parquet", "part-000001 (copy).parquet"]


@pytest.mark.parametrize("how", [*PLANTED, *EXTRA])
def test_a_part_that_is_not_of_this_place_is_refused_by_name(kinds, made, tmp_path, how):
    """These were read: as rows of null, as rows of another image, twice, or as none."""
    folder, name = tmp_path / "out", how if how in EXTRA else store.part_name(1)
    shutil.copytree(made["sweep", "done"][0], folder)
    if how in EXTRA:
        shutil.copy(folder / store.part_name(1), folder / name)
    else:
        PLANTED[how](folder, name)
    before = content(folder)
    for read in (Sweep.load, kinds["sweep"].read):
        with refused(rf"{name.split('(')[0]}.* is no part of this sweep .*\. Delete this file and"):
            read(folder)
    assert content(folder) == before
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    assert same(kinds["sweep"].read(folder)[-1], made["sweep", "done"][1])


@pytest.mark.parametrize("text", ["{}", "[]", "3", '"x"', "{", "another score", None])
def test_a_damaged_manifest_is_refused_and_costs_no_part(kinds, made, tmp_path, monkeypatch, text):
    folder = tmp_path / "out"
    shutil.copytree(made["sweep", "done"][0], folder)
    noted = folder / store.MANIFEST
    whole = noted.read_text()
    noted.unlink()
    if text is None:
        noted.mkdir()
    else:
        noted.write_text(whole.replace("logprob", "logprot") if " " in text else text)
    for read in (Sweep.load, kinds["sweep"].read):
        with refused(
            r"manifest.json', which (cannot|does not) .*(Delete this file|Name the folder)"
        ):
            read(folder)
    noted.rmdir() if text is None else noted.unlink()
    monkeypatch.setattr(SWEEPING, "sweep_image", None)  # nothing is measured again
    assert same(kinds["sweep"].read(folder)[-1], made["sweep", "done"][1])


# Training and gates


def step_on(folder):
    state = folder / "checkpoint-000002" / "state.json"
    state.write_text(state.read_text().replace('"step": 2, "sec', '"step": 1, "sec'))


def weights_of(name):
    def change(folder):
        path = folder / "checkpoint-000002" / "state.safetensors"
        tensors = load_file(path)
        tensors[name] = tensors[name] * 1.01
        save_file(tensors, path)

    return change


def no_dictionary(folder):
    (folder / "checkpoint-000002" / "state.json").write_text("[]")


def another_run(folder):
    """A checkpoint of the same gate, of a run with another seed of the order."""
    lvlm = ss.LVLM(*tiny_llava(), verify=False)
    options = {"batch": 2, "validation": 0.25, "lr": 0.03, "progress": False, "epochs": 1}
    options |= {"v_detector": ss.detectors.Norm(8.0), "choices": {"hidden": 2}}
    with flip_bits.ends(Loop, "_one_step", 2):
        ss.train_lsg(
            *(lvlm, flip_bits.records(8), [0]),
            **options,
            checkpoint_every=1,
            out=folder.parent / "b",
        )
    shutil.rmtree(folder / "checkpoint-000002")
    shutil.copytree(folder.parent / "b" / "checkpoint-000002", folder / "checkpoint-000002")


CHANGED = {
    "step": step_on,
    "weight": weights_of("0/weight/inner.weight"),
    "best": weights_of("0/best/inner.weight"),
    "moment": weights_of("0/adam/0/exp_avg_sq"),
    "no dictionary": no_dictionary,
    "another run": another_run,
}


@pytest.mark.parametrize("how", CHANGED)
def test_a_changed_checkpoint_is_refused(kinds, made, tmp_path, how):
    """These trained on, to other gates."""
    folder = shutil.copytree(made["training"], tmp_path / "out")
    CHANGED[how](folder)
    before = content(folder)
    with refused(
        r"checkpoint-000002', which does not fit its digest .* Remove '.*checkpoint-000002' to"
    ):
        kinds["training"].read(folder)
    assert content(folder) == before
    shutil.rmtree(folder / "checkpoint-000002")
    kinds["training"].read(folder)


@pytest.mark.parametrize("text", ["{}", "[]", None])
def test_a_damaged_record_of_a_run_is_refused_and_costs_no_step(
    kinds, made, tmp_path, monkeypatch, text
):
    folder = tmp_path / "out"
    shutil.copytree(made["training", "done"][0], folder)
    noted = folder / "run.json"
    noted.unlink()
    noted.mkdir() if text is None else noted.write_text(text)
    with refused(r"run.json', which .* Delete this file and start the same again"):
        kinds["training"].read(folder)
    noted.rmdir() if text is None else noted.unlink()
    monkeypatch.setattr(Loop, "_one_step", None)
    assert same(kinds["training"].read(folder)[-1], made["training", "done"][1])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "training.json"])
def test_a_gate_with_another_number_is_refused(kinds, tmp_path, name):
    folder = tmp_path / "gate"
    kinds["gate"].write(folder)
    path = folder / name
    if name == "model.safetensors":
        tensors = load_file(path)
        tensors["outer.bias"][0] += 1e-6
        save_file(tensors, path)
    else:
        old, new = ('"scale": 1.0', '"scale": 1.5') if "config" in name else ("2.25", "2.75")
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    with refused(r"gate', which does not fit its digest .* delete 'sha256' in config\.json"):
        ss.LSG.from_pretrained(folder)
    head = json.loads((folder / "config.json").read_text())
    del head["sha256"]
    (folder / "config.json").write_text(json.dumps(head))
    ss.LSG.from_pretrained(folder)


def test_a_stack_with_other_names_is_refused(kinds, tmp_path):
    kinds["gate"].write(tmp_path / "gate")
    gate = ss.LSG.from_pretrained(tmp_path / "gate")
    ss.LSG.save_stack([gate, gate], tmp_path / "stack")
    assert len(ss.LSG.load_stack(tmp_path / "stack")) == 2
    head = json.loads((tmp_path / "stack" / "config.json").read_text())
    (tmp_path / "stack" / "config.json").write_text(json.dumps(head | {"gates": head["gates"][:1]}))
    with refused("stack', which does not fit its digest"):
        ss.LSG.load_stack(tmp_path / "stack")


# Disks


def full(handle):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_nothing_that_was_there(begun, monkeypatch):
    before = content(begun.write)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with refused(r"which cannot be written \(\[Errno 28\] No space left.* is still there"):
            go_on(begun)
    assert content(begun.write) == before
    begun.read(begun.write)


@pytest.mark.parametrize("kind", ["gate", "run", "generation"])
def test_a_full_disk_leaves_the_file_before(kinds, tmp_path, monkeypatch, kind):
    kinds[kind].write(tmp_path)
    before = content(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with refused("could not be written|cannot be written"):
        kinds[kind].write(tmp_path)
    assert content(tmp_path) == before


def go_on(begun):
    return begun.read(begun.write)


def deleting(folder, real):
    def delete(*args, **named):
        shutil.rmtree(folder, ignore_errors=True)
        return real(*args, **named)

    return delete


def test_a_folder_that_is_deleted_meanwhile(begun, monkeypatch):
    """A sweep says so; a training run writes its next checkpoint anew, and goes on."""
    for owner, name in ((SWEEPING, "sweep_image"), (Loop, "_one_step")):
        monkeypatch.setattr(owner, name, deleting(begun.write, getattr(owner, name)))
    if begun.read.__name__ == "read_sweep":
        with refused("which cannot be written .*No such file"):
            go_on(begun)
    else:
        expected = go_on(begun)
        monkeypatch.undo()
        assert same(go_on(begun), expected)


@pytest.fixture
def read_only(monkeypatch):
    """Refuse every call that writes, as a disk that is mounted read only."""

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(args[0]))

    real, low = io.open, os.open

    def opened(file, mode="r", *args, **kwargs):
        return (refuse if set(mode) & set("wxa+") else real)(file, mode, *args, **kwargs)

    def low_opened(path, flags, *args, **kwargs):
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return (refuse if writes else low)(path, flags, *args, **kwargs)

    def start():
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(os, "open", low_opened)
        for name in ("mkdir", "replace", "rename", "unlink", "remove", "rmdir", "truncate"):
            monkeypatch.setattr(os, name, refuse)

    return start


def test_a_finished_folder_is_read_on_a_disk_that_is_read_only(begun, read_only):
    expected = go_on(begun)
    (begun.write / files.LOCK).unlink()
    before = sorted((f, f.stat().st_mtime_ns) for f in begun.write.rglob("*"))
    read_only()
    found = go_on(begun)
    assert same(found[-1], expected[-1])
    assert sorted((f, f.stat().st_mtime_ns) for f in begun.write.rglob("*")) == before


def test_an_unfinished_one_is_refused_before_any_work(begun, read_only, monkeypatch):
    monkeypatch.setattr(SWEEPING, "sweep_image", None)
    monkeypatch.setattr(Loop, "_one_step", None)
    read_only()
    with refused(r"which cannot be written \(\[Errno 30\] Read-only file system"):
        go_on(begun)


# Links


@pytest.fixture
def victim(tmp_path):
    file = tmp_path / "victim"
    file.write_text("mine")
    yield file
    assert file.read_text() == "mine"


def test_a_lock_that_is_a_link_is_refused(begun, victim):
    (begun.write / files.LOCK).unlink()
    (begun.write / files.LOCK).symlink_to(victim)
    with refused(r"which cannot be written .*\.lock.* no links in it"):
        go_on(begun)


def test_nothing_is_written_through_a_link(tmp_path, victim):
    place = tmp_path / "out"
    place.mkdir()
    for name in ("result.csv", "dangling", f"new.{os.getpid()}{files.WRITING}"):
        target = victim if name != "dangling" else tmp_path / "not-there"
        (place / name).symlink_to(target)
    for name in ("result.csv", "dangling"):
        with pytest.raises(OSError, match=rf"A link, folder or device is there.*{name}"):
            files.write_whole(place / name, "other")
    with pytest.raises(OSError, match="A link, folder or device is there"):
        files.write_whole(Path(os.devnull), "other")
    files.write_whole(place / "new", "whole")
    assert (place / "new").read_text() == "whole"
    assert not (tmp_path / "not-there").exists()
    files.claim(place / "run", "run.json", {"a": 1}, "run")
    (place / "run" / "run.json").unlink()
    (place / "run" / "run.json").symlink_to(tmp_path / "not-there")
    with pytest.raises(InputError, match=r"run\.json"):
        files.claim(place / "run", "run.json", {"a": 1}, "run")
    with refused("A link, folder or device is there"):
        ss.LVLM(*tiny_llava(), verify=False).run(random_sample()).save(place / "result.csv")


def random_sample():
    return ss.LVLM(*tiny_llava(), verify=False).prepare(images=random_image(32, 32, 0), text="what")


def test_a_report_is_not_written_through_a_link(tmp_path, victim):
    lvlm = ss.load_bundled()
    trace = ss.trace_sinks(lvlm, lvlm.prepare(ss.bundled.draw_scene(0).image, "what is it"))
    folder = tmp_path / "report"
    ss.viz.write_report(folder, trace, progress=False)
    (tmp_path / "elsewhere").mkdir()
    for name in ("sinks.csv", "tokens.csv", "trace.json", "index.html", "figures"):
        kept = (folder / name).rename(tmp_path / "kept")
        (folder / name).symlink_to(tmp_path / "elsewhere" if name == "figures" else victim)
        with pytest.raises(InputError, match=name):
            ss.viz.write_report(folder, trace, progress=False)
        kept.replace(folder / name) if name != "figures" else None
    assert not list((tmp_path / "elsewhere").iterdir())


def test_tables_of_the_command_line_are_not_written_through_a_link(tmp_path, victim):
    from sinkscope.cli.experiments import write_report

    made = Sweep.load(Path(__file__).parents[1] / "experiments" / "saved_sweep")
    tables = {"map": made.table}
    write_report(tmp_path, tables, "map", made)
    for name in ("map.csv", "map.png"):
        (tmp_path / "report" / name).unlink()
        (tmp_path / "report" / name).symlink_to(victim)
        with refused(f"cannot be written .*{name}"):
            write_report(tmp_path, tables, "map", made)
        (tmp_path / "report" / name).unlink()
    shutil.rmtree(tmp_path / "report")
    (tmp_path / "report").symlink_to(tmp_path)
    with refused("is a link"):
        write_report(tmp_path, tables, "map", made)
    assert not (tmp_path / "map.csv").exists()

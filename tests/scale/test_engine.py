"""What is refused before any worker starts, and what a worker checks, without Ray."""

from __future__ import annotations

import importlib.util
import threading
from functools import partial

import pytest
import torch

import sinkscope as ss
from sinkscope.cli.experiments import with_engine
from sinkscope.errors import InputError, WorkerError
from sinkscope.scale.engine import Prepared, Ray, each_part
from sinkscope.testing import random_image
from tests.scale.ray_here import need_ray
from tests.scale.work import do

need_ray()

import pyarrow as pa  # noqa: E402
from ray.exceptions import ActorUnavailableError, RayTaskError  # noqa: E402

from sinkscope.scale import workers  # noqa: E402

RECORD = {"image": random_image(), "question": "what is it", "answer": "red"}


def test_the_local_engine_reads_one_part_at_a_time():
    read = []
    parts = ((i, {"n": read.append(i) or i}) for i in range(4))
    done = each_part(ss.load_bundled(), do, parts)
    assert [(next(done)[1][0], len(read)) for _ in range(3)] == [(0, 1), (1, 2), (4, 3)]


@pytest.mark.parametrize("engine", ["rey", None, 2])
def test_engines_are_named(engine):
    lvlm = ss.load_bundled()
    for run in (
        partial(ss.sweep, lvlm, [RECORD]),
        partial(ss.compare, lvlm, [RECORD], {"base": []}),
        partial(ss.linear_probes, lvlm, [RECORD]),
    ):
        with pytest.raises(InputError, match=r"expected 'local', 'ray', or ss\.scale\.Ray"):
            run(engine=engine)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"workers": 0}, "workers=0; expected an int of at least 1"),
        ({"cpus": 0.5}, "cpus=0.5; expected an int"),
        ({"gpus": -1}, "gpus=-1; expected a finite number of at least 0"),
        ({"address": 6379}, "address=6379; expected a text"),
        ({"load": "bundled"}, "load='bundled'; expected a function"),
    ],
)
def test_options_are_refused_by_name(options, match):
    with pytest.raises(InputError, match=match):
        Ray(**options)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'sinkscope\[ray\]'"):
        ss.compare(ss.load_bundled(), [RECORD], {"base": []}, engine="ray")


def test_what_cannot_travel_is_named_before_ray_starts():
    lock, lvlm = threading.Lock(), ss.load_bundled()
    with pytest.raises(InputError, match=r"Got 'locked', which cannot travel .*lock"):
        ss.compare(lvlm, [RECORD], {"base": [], "locked": lambda t: lock and []}, engine="ray")
    work = Prepared(partial(do, locked=lock), list)
    with pytest.raises(InputError, match="Got 'locked'"):
        next(each_part(lvlm, work, [], "ray"))
    lvlm.module.held = lock
    with pytest.raises(InputError, match=r"which cannot travel .*lock.*ss\.scale\.Ray\(load="):
        workers.packed_model(lvlm)


def test_a_model_travels_as_it_is():
    lvlm = ss.load_bundled()
    lvlm.module.get_output_embeddings().weight.data *= 2
    sample = lvlm.prepare(images=RECORD["image"], text="what is it")
    before = lvlm.run(sample).logits  # a pass, in which transformers sets hooks
    made = workers.unpacked_model(workers.packed_model(lvlm), lvlm._verify)
    assert workers.known_of(made) == workers.known_of(lvlm)
    for each in (made, lvlm):
        asked = each.module(**sample.inputs, output_hidden_states=True)
        assert torch.equal(asked.logits, before)
        assert len(asked.hidden_states) == 6


def test_a_model_is_made_again_as_it_was_made(tmp_path, monkeypatch):
    first = ss.load_bundled("bfloat16", "eager")
    folder = tmp_path / "saved"
    first.module.save_pretrained(folder)
    first.processor.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    again = ss.LVLM.from_pretrained("saved", dtype="bfloat16", attn_implementation="eager")
    monkeypatch.chdir("/")
    for lvlm in (first, again):
        made = workers.Model(lvlm, None, on_gpu=False).made()
        assert (made.name, made.module.dtype) == (lvlm.name, lvlm.module.dtype)
        assert workers.known_of(made) == workers.known_of(lvlm)


def test_a_model_that_was_changed_is_not_made_again_in_silence():
    changed, hooked = ss.load_bundled(), ss.load_bundled()
    changed.module.get_output_embeddings().weight.data *= 2
    hooked.module.register_forward_hook(lambda *given: None)
    for lvlm, part in ((changed, "weights"), (hooked, "hooks")):
        with pytest.raises(InputError, match=rf"differs from yours in \['{part}'\].*processor\)"):
            workers.Model(lvlm, None, on_gpu=False).made()
    with pytest.raises(InputError, match=r"load=\.\.\., which gave Llava\w+; expected an LVLM"):
        workers.Model(changed, lambda: ss.load_bundled().module, on_gpu=False).made()


@pytest.mark.parametrize(
    ("nodes", "given", "found"),
    [
        ([{"CPU": 16.0}], (None, None, None), (4, 4, 0)),
        ([{"CPU": 2.0}], (None, None, None), (1, 2, 0)),
        ([{"CPU": 2.0}], (2, None, None), (2, 1, 0)),
        ([{"CPU": 64.0, "GPU": 8.0}], (None, None, None), (8, 8, 1)),
        ([{"CPU": 64.0, "GPU": 8.0}], (None, 0.5, None), (16, 4, 0.5)),
        ([{"CPU": 8.0}, {"CPU": 32.0, "GPU": 4.0}], (None, None, 2), (4, 2, 1)),
        ([{"CPU": 8.0}, {"CPU": 32.0, "GPU": 4.0}], (None, 0, None), (10, 1, 0)),
    ],
)
def test_workers_are_as_many_as_fit(nodes, given, found, monkeypatch):
    listed = [{"Alive": True, "Resources": node} for node in nodes]
    monkeypatch.setattr(workers.ray, "nodes", lambda: [*listed, {"Alive": False, "Resources": {}}])
    many, size = workers.sizes_of(*given)
    assert (many, size["num_cpus"], size["num_gpus"]) == found
    with pytest.raises(WorkerError, match="expected a machine with 100 cores"):
        workers.sizes_of(None, 0, 100)


def test_errors_of_ray_are_told_as_what_they_are():
    def fails(error):
        yield pa.table({"number": [0], "made": [b"x"]})
        raise error

    fault = RayTaskError("do", "a long traceback", ZeroDivisionError("a fault of the work"))
    for error, kind, match in (
        (fault, ZeroDivisionError, "^a fault of the work$"),
        (
            ActorUnavailableError("gone", None),
            WorkerError,
            r"Ray stopped \(ActorUnavailableError: .*gone",
        ),
    ):
        rows = workers.rows_of(fails(error))
        assert next(rows) == (0, b"x")
        with pytest.raises(kind, match=match):
            next(rows)
    assert next(workers.rows_of(fails(fault))) == (0, b"x")


def test_a_cluster_that_is_not_there_is_named():
    with (
        pytest.raises(WorkerError, match=r"no Ray at 'nowhere.*ray start --head"),
        workers.running("nowhere"),
    ):
        pass


@pytest.mark.parametrize(
    ("given", "count", "found"),
    [
        ({}, None, "local"),
        ({"engine": "ray"}, None, "ray"),
        ({"engine": "ray"}, 2, Ray(workers=2)),
        ({"engine": {"gpus": 0.5}}, 2, Ray(workers=2, gpus=0.5)),
    ],
)
def test_an_engine_on_the_command_line(given, count, found):
    assert with_engine({"batch": 3, **given}, count) == {"batch": 3, "engine": found}


def test_workers_of_no_engine_are_refused():
    with pytest.raises(InputError, match=r"--workers 2.*Write --engine ray"):
        with_engine({}, 2)

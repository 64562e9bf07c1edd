"""What goes wrong between here and a server: the error, what is kept, and what is never sent twice."""

import gc
import pickle
import random
import threading
import time

import cloudpickle
import httpx
import huggingface_hub
import nnsight
import psutil
import pytest
import torch
from nnsight.modeling import huggingface

import sinkscope as ss
from sinkscope.errors import CheckpointError, InputError, ProbeError, RemoteError
from sinkscope.kernels.walk import Saying
from sinkscope.models import Traffic, Wire
from sinkscope.models import remote as wires
from sinkscope.models.requests import mark_of
from sinkscope.models.wire import ServerError, read_traceback
from sinkscope.probes import Read
from sinkscope.testing import random_image
from tests.remote.conftest import REPOSITORIES

FAMILY = "llava-clip-llama"
MASS = ss.AttentionMass({"image": "image"})
ALWAYS = 99


@pytest.fixture(autouse=True)
def quick(monkeypatch, loopback):
    """Short pauses, and a server that does all right until it is told."""
    monkeypatch.setattr(wires, "FIRST_PAUSE", 0.01)
    loopback.tell()
    yield
    loopback.tell()


@pytest.fixture
def there(remote):
    lvlm = remote(FAMILY)
    lvlm.wire = Wire(timeout=20, patience=5, retries=2)
    return lvlm


@pytest.fixture(scope="module")
def held(loopback):
    """The same model with its weights here."""
    return ss.LVLM.from_pretrained(REPOSITORIES[FAMILY])


def question(lvlm, words="what is it"):
    return lvlm.prepare(random_image(40, 40), words)


def calls(loopback):
    """How many jobs were accepted, and calls by place."""
    seen = loopback.seen
    return len(seen["requests"]), seen["asked"]


def test_the_stand_in_speaks_to_nnsight_itself(there, loopback):
    """nnsight's own client, over its websocket: the server is not made to fit ours."""
    sample, model, save = question(there), there._places.model(True, "").model, nnsight.save
    with model.trace(**sample.inputs, remote=True):
        logits = save(model.output.logits)
    assert torch.equal(logits[:, -1:], there.run(sample).logits)
    first, second = loopback.seen["requests"]
    assert first["session_id"]
    assert not second["session_id"]
    names = ("ndif-api-key", "nnsight-version", "python-version")
    assert [first["headers"][name] for name in names] == [second["headers"][name] for name in names]


SAFE = [
    {"at": "request", "status": 503, "detail": "full"},
    {"at": "request", "status": 429, "kept_open": True},
    {"at": "response", "status": 502},
    {"at": "response", "status": 404},
    {"at": "response", "garbage": True},
    {"at": "response", "drop": True},
    {"at": "response", "cut": True},
    {"at": "result", "status": 500},
    {"at": "result", "garbage": True},
    {"at": "result", "drop": True},
    {"at": "result", "cut": True},
]


@pytest.mark.parametrize("fault", SAFE, ids=str)
def test_what_is_safe_is_done_again(there, loopback, fault):
    sample = question(there)
    want = there.run(sample, [MASS])
    loopback.tell(fault | {"times": 2})
    got = there.run(sample, [MASS])
    assert torch.equal(want[MASS].mass, got[MASS].mass)
    accepted, asked = calls(loopback)
    assert accepted == loopback.seen["ran"] == 1
    assert asked[fault["at"]] >= 3


KEPT = [
    ({"at": "response", "silent": 1}, r"no whole answer \(ReadTimeout.*within 0\.2 s"),
    ({"at": "response", "garbage": True}, r"Got b.<html>no answer.*\(text/html\).*nnsight writes"),
    ({"at": "response", "drop": True}, "no whole answer .RemoteProtocolError"),
    ({"at": "response", "status": 500, "detail": "broken"}, "answers with 500: broken"),
    ({"at": "result", "silent": 1}, "no whole answer .ReadTimeout"),
    ({"at": "result", "garbage": True}, r"/result/job-.*; expected what nnsight writes"),
    ({"at": "result", "cut": True}, "no whole answer .RemoteProtocolError: peer closed"),
    ({"at": "result", "status": 403}, "/result/job-.* answers with 403"),
    (
        {"at": "job", "slow": 1},
        r"no result within timeout=0\.4 s \(last status: QUEUED Moved to pos",
    ),
]


@pytest.mark.parametrize(("fault", "says"), KEPT, ids=str)
def test_a_job_that_was_accepted_is_kept(there, loopback, fault, says):
    sample, edit = question(there), ss.MaskKeys("image", [1])
    want = there.run(sample, [MASS], [edit])
    there.wire = Wire(timeout=0.4 if "slow" in fault else 20, patience=0.2, retries=1)
    loopback.tell(fault | {"times": ALWAYS})
    with pytest.raises(RemoteError, match=says) as caught:
        there.run(sample, [MASS], [edit])
    job = loopback.seen["requests"][-1]["job"]
    assert caught.value.job_id == job
    assert f"the same call with job={job!r} fetches its result (of " in str(caught.value)
    loopback.mend()
    there.wire = Wire(timeout=20)
    got = there.run(sample, [MASS], [edit], job=job)
    assert torch.equal(want.logits, got.logits)
    assert torch.equal(want[MASS].mass, got[MASS].mass)
    assert got.effects[edit].to_dataframe().equals(want.effects[edit].to_dataframe())
    assert loopback.seen["ran"] == len(loopback.seen["requests"]) == 1


UNSURE = [
    ({"at": "request", "lost": True}, 1),
    ({"at": "request", "silent": 1}, 0),
    ({"at": "request", "drop": True}, 0),
    ({"at": "request", "cut": True}, 0),
    ({"at": "request", "garbage": True}, 0),
    ({"at": "request", "status": 502, "detail": "bad gateway"}, 0),
]


@pytest.mark.parametrize(("fault", "accepted"), UNSURE, ids=str)
def test_what_may_have_run_is_not_sent_again(there, loopback, fault, accepted):
    there.wire = Wire(patience=0.3, retries=5)
    loopback.tell(fault | {"times": ALWAYS})
    with pytest.raises(
        RemoteError, match=r"not sent again|nnsight writes|502: bad gateway"
    ) as caught:
        there.run(question(there))
    assert caught.value.job_id is None
    assert calls(loopback) == (accepted, {**calls(loopback)[1], "request": 1})


@pytest.mark.parametrize("key", [None, "another"])
def test_no_key(there, loopback, monkeypatch, key):
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", key)
    said = "an API key that" if key else "no API key, which"
    with pytest.raises(RemoteError, match=rf"Got {said} .* \(401: Missing.*Write nnsight\.CONFIG"):
        there.run(question(there))
    assert calls(loopback) == (0, {"request": 1})


def test_a_model_that_is_not_hosted(there, monkeypatch):
    monkeypatch.setitem(huggingface._ID_CACHE, REPOSITORIES[FAMILY], "someone/not-hosted")
    said = r"did not run .*someone/not-hosted.*Model is not dedicated.*print\(nnsight\.status\(\)\)"
    with pytest.raises(RemoteError, match=said) as caught:
        there.run(question(there))
    assert caught.value.job_id is None


@pytest.mark.parametrize("error", [httpx.ConnectError("no network"), OSError("no network")])
def test_the_hub_is_not_there(remote, monkeypatch, loopback, error):
    def model_info(*given, **more):
        raise error

    monkeypatch.delitem(huggingface._ID_CACHE, REPOSITORIES[FAMILY], raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(
        CheckpointError, match="The hub gave no canonical name of 'Someone/tiny-llava'"
    ):
        remote(FAMILY).run(question(remote(FAMILY)))
    assert calls(loopback)[0] == 0


def test_the_queue_is_full(there, loopback, monkeypatch):
    """After pauses twice as long each time, of which a random part is left out."""
    sample, slept, state = question(there), [], random.getstate()
    monkeypatch.setattr(wires.time, "sleep", slept.append)
    monkeypatch.setattr(wires, "FIRST_PAUSE", 0.5)
    there.wire = Wire(retries=3)
    loopback.tell({"at": "request", "status": 503, "detail": "Queue is full.", "times": ALWAYS})
    with pytest.raises(
        RemoteError, match=r"takes no call now \(503: Queue is full\.\); expected room"
    ):
        there.run(sample)
    assert calls(loopback) == (0, {"request": 4})
    assert all(0.25 * 2**i <= pause <= 0.5 * 2**i for i, pause in enumerate(slept))
    assert len(slept) == 3
    assert random.getstate() == state


def test_another_version(there, loopback):
    loopback.tell({"at": "request", "wants": "9.9"})
    said = (
        rf"Got nnsight {nnsight.__version__} and Python 3\..*version is 9\.9.*nnsight\.compare\(\)"
    )
    with pytest.raises(RemoteError, match=said):
        there.run(question(there))
    assert calls(loopback) == (0, {"request": 1})


def test_no_server(there):
    there.wire = Wire(retries=1)
    with pytest.raises(RemoteError, match=r"Got no connection to http://127\.0\.0\.1:9 .*HOST"):
        there.run(question(there), remote="http://127.0.0.1:9")


def wrong(states, state):
    raise ValueError("a kernel of the user's")


class Wrong:
    tower = "language"

    def reads(self, context):
        return [Read(ss.Site("language", "resid_pre", 0), wrong)]

    def finish(self, answers, context):
        return answers


def test_an_error_on_the_server(there, loopback):
    loopback.tell({"at": "job", "error": "out of luck"})
    with pytest.raises(RemoteError, match=r"The run failed on http.*: out of luck\n") as caught:
        there.run(question(there))
    assert "in work" in caught.value.text
    assert caught.value.job_id is None
    with pytest.raises(RemoteError, match="ValueError: a kernel of the user's"):
        there.run(question(there), [Wrong()])


def test_an_error_of_our_kernels_is_the_one_of_a_run_here(there, held):
    said = []
    for lvlm in (held, there):
        edit = ss.AblateValues("image", "zero", [1], heads=[0])
        with pytest.raises(ProbeError, match="an edit of values for some heads") as caught:
            lvlm.run(question(lvlm), [ss.ValueNorms()], [edit])
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_job_of_another_call(there, loopback):
    there.run(question(there), [MASS])
    job = there.traffic.job_id
    other = ss.AttentionMass({"image": "text"})
    asked = [(question(there), [other]), (question(there, "what was it"), [MASS])]
    for sample, probes in asked:
        with pytest.raises(InputError, match=r"Got job='job-.*', which answers another call"):
            there.run(sample, probes, job=job)
    with pytest.raises(InputError, match="which answers another call"):
        there.generate(question(there), [MASS], max_new_tokens=1, job=job)
    assert loopback.seen["ran"] == 1


def test_a_job_that_the_server_does_not_know(there, held):
    with pytest.raises(RemoteError, match="knows no job 'job-0'") as caught:
        there.run(question(there), job="job-0")
    assert caught.value.job_id is None
    assert "fetches" not in str(caught.value)
    with pytest.raises(InputError, match="remote=False; expected the server that has the job"):
        held.run(question(held), job="job-0")


def test_a_generation_is_kept_too(there, loopback):
    sample = question(there)
    want = there.generate(sample, [MASS], max_new_tokens=3)
    loopback.tell({"at": "result", "cut": True, "times": ALWAYS})
    with pytest.raises(RemoteError, match="peer closed") as caught:
        there.generate(sample, [MASS], max_new_tokens=3)
    loopback.tell()
    got = there.generate(sample, [MASS], max_new_tokens=3, job=caught.value.job_id)
    assert torch.equal(want.sequences, got.sequences)
    assert all(
        torch.equal(one[MASS].mass, other[MASS].mass)
        for one, other in zip(want.steps, got.steps, strict=True)
    )


def test_the_status_is_shown_when_it_changes(there, loopback, monkeypatch, capsys):
    """Beside what is printed: standard output is for the answer, such as JSON of the command line."""
    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", True)
    loopback.tell({"at": "job", "slow": 0.5})
    there.run(question(there))
    out, said = capsys.readouterr()
    assert out == ""
    assert [said.count(status) for status in ("RECEIVED", "QUEUED", "COMPLETED")] == [1, 1, 1]
    assert loopback.seen["asked"]["response"] > 4


def test_an_interrupt_tells_the_job(there, loopback, monkeypatch):
    sample = question(there)

    def interrupted(job, *given):
        raise KeyboardInterrupt

    loopback.tell({"at": "job", "slow": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(wires.Job, "_pause", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"the same call with job='job-.*'") as caught:
            there.run(sample)
    got = there.run(sample, job=caught.value.job_id)
    assert torch.equal(got.logits, there.run(sample).logits)


def test_what_a_call_has_cost(there, held, loopback):
    sample = question(there)
    loopback.tell({"at": "job", "slow": 0.3})
    begun = time.monotonic()
    there.run(sample, [MASS])
    wall, request, cost = time.monotonic() - begun, loopback.seen["requests"][0], there.traffic
    assert cost.job_id == request["job"]
    assert cost.up == request["sent"]
    size = loopback.seen["results"][cost.job_id]
    assert size < cost.down < size + 400 * loopback.seen["asked"]["response"]
    assert 0.2 < cost.queued + cost.running < wall
    assert isinstance(there.generate(sample, max_new_tokens=1).text, tuple)
    assert there.traffic.job_id != cost.job_id
    held.run(question(held), [MASS], remote="local", logits="last")
    dry = held.traffic
    assert abs(dry.up - request["blob"]) < 0.1 * request["blob"]
    assert abs(dry.down - size) < 0.1 * size
    assert dry.job_id is None


def residue(lvlm):
    """What nnsight leaves in modules, modules that travel, threads, and sockets."""
    gc.collect()
    own = [part for part in lvlm.module.modules() if {"forward", "__nnsight__"} & vars(part).keys()]
    open_now = [c for c in psutil.Process().net_connections("tcp") if c.status != "CLOSE_WAIT"]
    travelling = set(cloudpickle.list_registry_pickle_by_value())
    return own, travelling, threading.active_count(), len(open_now)


@pytest.mark.parametrize(
    "fault",
    [
        {"at": "request", "drop": True},
        {"at": "response", "garbage": True},
        {"at": "result", "cut": True},
        {"at": "job", "error": "no"},
    ],
    ids=str,
)
def test_nothing_is_left_behind(held, loopback, fault):
    sample = question(held)
    want = held.run(sample, logits="last", remote=True)
    before, held.wire = residue(held), Wire(retries=0)
    loopback.tell(fault | {"times": ALWAYS})
    with pytest.raises(RemoteError, match=r"Got|gave|failed"):
        held.run(sample, [MASS], [ss.MaskKeys("image", [1])], remote=True)
    assert residue(held) == before
    assert before[0] == []
    assert torch.equal(held.run(sample, logits="last").logits, want.logits)


def test_runs_here_do_not_wait_for_one_that_is_away(held, loopback):
    sample, away = question(held), []
    loopback.tell({"at": "job", "slow": 1})
    held.wire = Wire()
    thread = threading.Thread(target=lambda: away.append(held.run(sample, remote=True)))
    thread.start()
    while not loopback.seen["requests"]:
        time.sleep(0.02)
    held.run(sample)
    assert not away
    thread.join()
    assert away


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"patience": "5"}, {"retries": -1}])
def test_wrong_waits(wrong):
    with pytest.raises(InputError, match=f"Got {next(iter(wrong))}="):
        Wire(**wrong)


def test_what_stands_for_the_wire_is_checked(held):
    sample = question(held)
    held.wire = 5
    with pytest.raises(InputError, match=r"Got lvlm\.wire=5; expected a Wire"):
        held.run(sample, remote=True)
    held.wire = Wire()


def test_errors_and_costs_can_be_sent_to_another_process():
    error = pickle.loads(pickle.dumps(RemoteError("lost", "job-1")))
    assert (str(error), error.job_id) == ("lost", "job-1")
    again = pickle.loads(pickle.dumps(ServerError("no", "Traceback")))
    assert again.text == "Traceback"
    assert pickle.loads(pickle.dumps(Traffic(1, 2))) == Traffic(1, 2)


def test_blocks_of_one_file_are_not_taken_for_each_other(there, held):
    """nnsight keeps the source of a file for the life of a server: generate has blocks inside of its
    block, and so has a run with kl, elsewhere in the file."""
    sample, edit = question(there), ss.MaskKeys("image", [1])
    for _ in range(2):
        want = held.run(question(held), [], [edit], kl=True, logits="last")
        assert torch.equal(
            there.run(sample, [], [edit], kl=True).effects[edit].kl, want.effects[edit].kl
        )
        here = held.generate(question(held), max_new_tokens=2).sequences
        assert torch.equal(there.generate(sample, max_new_tokens=2).sequences, here)


@pytest.mark.parametrize("where", [True, "local"])
def test_kl_is_one_request(held, loopback, where):
    """The pass without edits is in it; its logits are those of a run of its own."""
    sample, edit = question(held), ss.MaskKeys("image", [1])
    want = held.run(sample, [MASS], [edit], kl=True, logits="last")
    got = held.run(sample, [MASS], [edit], kl=True, remote=where)
    assert torch.equal(want.logits, got.logits)
    assert torch.equal(want[MASS].mass, got[MASS].mass)
    assert torch.equal(want.effects[edit].kl, got.effects[edit].kl)
    assert want.effects[edit].kl.item() > 0
    assert calls(loopback)[0] == (where is True)
    if where is True:
        job = held.traffic.job_id
        again = held.run(sample, [MASS], [edit], kl=True, remote=where, job=job)
        assert torch.equal(want.effects[edit].kl, again.effects[edit].kl)
        with pytest.raises(InputError, match="answers another call"):
            held.run(sample, [MASS], [edit], remote=where, job=job)


def test_a_traceback_is_read_from_a_text():
    text = 'Traceback (most recent call last):\n  File "/a/first.py", line 1, in one\n    go()\n\n'
    text += "During handling of the above exception, another exception occurred:\n\n"
    text += "Traceback (most recent call last):\n"
    text += '  File "/x/sinkscope/kernels/walk.py", line 7, in walk\n    raise ValueError(\n'
    text += "    ^^^^^\npackage.ValueError: Got a: 1\nand more\n\nGot a: 1\nand more"
    kind, said, frames = read_traceback(text)
    assert (kind, said) == ("ValueError", "Got a: 1\nand more")
    (frame,) = frames
    assert (frame.filename, frame.lineno, frame.name) == ("/x/sinkscope/kernels/walk.py", 7, "walk")
    assert frame.line == "raise ValueError("
    assert read_traceback("no traceback")[2] == []


def test_two_answers_that_are_forced_have_marks_of_their_own():
    """What an option holds counts, not its class alone: `compare` forces one answer after the other."""
    first, second = (Saying(torch.tensor([[token, 2]]), 5) for token in (3, 4))
    assert mark_of({"logits_processor": [first]}) != mark_of({"logits_processor": [second]})
    assert mark_of({"logits_processor": [first]}) == mark_of(
        {"logits_processor": [Saying(torch.tensor([[3, 2]]), 5)]}
    )

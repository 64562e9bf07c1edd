"""Modules travel to servers by their source while a run lasts, and for no longer; a user's own stay."""

import threading
from collections import Counter

import cloudpickle
import nnsight
import pytest
import torch
from cloudpickle import list_registry_pickle_by_value as registered

import sinkscope as ss
from sinkscope.errors import ProbeError
from sinkscope.models import tracing as runs
from sinkscope.probes import Read
from sinkscope.testing import random_image

SEEN: list[set[str]] = []


def look(value, state):
    """A kernel of this module, which notes what is registered while the run lasts."""
    SEEN.append(registered())
    return torch.zeros(1)


class Looking:
    """A probe whose kernel lives here."""

    tower = "language"

    def __init__(self, kernel=look):
        self.kernel = kernel

    def reads(self, context):
        return [Read(ss.Site("language", "resid_post", 1), self.kernel, {})]

    def finish(self, answers, context):
        return answers


@pytest.fixture
def one(tiny, monkeypatch):
    """A model and a sample, with nothing registered yet."""
    monkeypatch.setattr(cloudpickle.cloudpickle, "_PICKLE_BY_VALUE_MODULES", set())
    monkeypatch.setattr(runs, "TRAVELLING", Counter(), raising=False)
    monkeypatch.setattr(nnsight.ndif, "pull_env", lambda: None)
    SEEN.clear()
    lvlm = tiny("llava-clip-llama")
    return lvlm, lvlm.prepare(random_image(40, 40), "what is it")


def asked(lvlm, sample, where, how="run", probe=None):
    more = {"max_new_tokens": 2} if how == "generate" else {}
    return getattr(lvlm, how)(sample, [probe or Looking()], remote=where, **more)


@pytest.mark.parametrize("how", ["run", "generate"])
@pytest.mark.parametrize("where", [False, "local"])
def test_nothing_stays_registered(one, where, how):
    asked(*one, where, how)
    assert registered() == set()
    if not where:  # a run here sends nothing
        assert SEEN[0] == set()


def test_a_run_that_fails_leaves_nothing(one):
    def wrong(value, state):
        raise ProbeError("in the middle")

    wrong.__module__ = __name__
    for where in (False, "local"):
        with pytest.raises(Exception, match="in the middle"):
            asked(*one, where, probe=Looking(wrong))
        assert registered() == set()


def test_while_it_lasts_both_modules_travel(one):
    with runs.travelling({"sinkscope", __name__}):
        assert registered() == {"sinkscope", __name__}
        by_value = cloudpickle.dumps(look)
    assert b"zeros" in by_value
    assert b"zeros" not in cloudpickle.dumps(look), "by name again"
    assert registered() == set()


def test_what_the_user_registered_stays(one):
    nnsight.register(__name__)
    asked(*one, "local")
    assert registered() == {__name__}
    with pytest.raises(RuntimeError), runs.travelling({"sinkscope", __name__}):
        raise RuntimeError
    assert registered() == {__name__}


def test_what_nnsight_registers_itself_stays(one, monkeypatch):
    """It does so once per process, before its first request, with what is not installed."""
    monkeypatch.setattr(nnsight.ndif, "pull_env", lambda: nnsight.register("sinkscope"))
    asked(*one, False)
    assert registered() == set()
    asked(*one, "local")
    assert registered() == {"sinkscope"}


def test_runs_that_overlap_share_a_module(one):
    with runs.travelling({"sinkscope"}):
        with runs.travelling({"sinkscope", __name__}):
            pass
        assert registered() == {"sinkscope"}
    assert registered() == set()
    wrong = []

    def many():
        for _ in range(200):
            with runs.travelling({"sinkscope", __name__}):
                if not registered() >= {"sinkscope", __name__}:
                    wrong.append(registered())

    threads = [threading.Thread(target=many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert registered() == set()

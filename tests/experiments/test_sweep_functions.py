"""Digests of score functions: equal for equal functions, also in another process, and only then."""

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sinkscope.errors import InputError
from sinkscope.experiments import Item
from sinkscope.experiments.sweeping import digest_function

ROOT = Path(__file__).parents[2]
LIMIT = 0.5
WORDS = frozenset({"red", "green", "blue", "yellow"})
NUMBER = re.compile(r"\d+")


def make(threshold, scale=1.0, table=None):
    def score(item: Item, answered):
        if item.answer in WORDS and NUMBER.match(item.question):
            return scale
        return float(answered.logprob > threshold) + len(table or ())

    return score


def limited(item, answered):
    return math.exp(answered.logprob) > LIMIT


def calls(item, answered):
    return limited(item, answered)


def calls_itself(item, answered):
    return 0.0 if item is None else calls_itself(None, answered)


class Scorer:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, item, answered):
        return self.times(answered.logprob)

    def times(self, value):
        return self.factor * value


DIFFERENT = {
    "closure": (make(0.1), make(0.2)),
    "constant": (lambda item, answered: 1.0, lambda item, answered: 2.0),
    "code": (lambda item, answered: answered.logprob, lambda item, answered: -answered.logprob),
    "name": (lambda item, answered: answered.logprob, lambda item, answered: answered.right),
    "default": (lambda item, answered, k=1: k, lambda item, answered, k=2: k),
    "tensor": (make(0, table=torch.zeros(2)), make(0, table=torch.ones(2))),
    "array": (make(0, table=np.zeros(2)), make(0, table=np.zeros(3))),
    "list": (make(0, table=[1, {"a": (2,)}]), make(0, table=[1, {"a": (3,)}])),
    "partial": (functools.partial(limited, k=1), functools.partial(limited, k=2)),
    "object": (Scorer(1.0), Scorer(2.0)),
    "method": (Scorer(1.0).__call__, Scorer(2.0).__call__),
    "lookup": (make({1: 2}.get), make({1: 3}.get)),
    "pattern": (make(re.compile("a")), make(re.compile("b"))),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_functions_have_other_digests(name):
    one, other = DIFFERENT[name]
    assert digest_function(one) == digest_function(one) != digest_function(other)


def test_equal_functions_have_equal_digests():
    assert digest_function(make(0.1, 2.0, [1])) == digest_function(make(0.1, 2.0, [1]))
    assert digest_function(Scorer(1.0)) == digest_function(Scorer(1.0))
    assert digest_function(calls_itself).startswith(sys.implementation.cache_tag)


def test_module_level_names_count(monkeypatch):
    before = [digest_function(limited), digest_function(calls)]
    monkeypatch.setitem(globals(), "LIMIT", 0.6)
    now = [digest_function(limited), digest_function(calls)]
    assert now[0] != before[0]
    assert now[1] != before[1]


def test_helpers_of_a_class_count(monkeypatch):
    before = digest_function(Scorer(1.0))
    monkeypatch.setattr(Scorer, "times", lambda self, value: value)
    assert digest_function(Scorer(1.0)) != before


def test_another_process_finds_the_same():
    """Sets and hashes of texts come in another order there."""
    code = (
        "from tests.experiments.test_sweep_functions import *\n"
        "print(digest_function(make(0.1)), digest_function(Scorer(1.0)), sep='\\n')"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12"}
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT, check=True
    )
    assert said.stdout.splitlines() == [digest_function(make(0.1)), digest_function(Scorer(1.0))]


def test_what_cannot_be_read_is_refused():
    with pytest.raises(InputError, match=r"threshold of the score function, of type generator"):
        digest_function(make(i for i in range(3)))

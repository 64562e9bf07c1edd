"""Calls of the public API with wrong arguments, generated: each is refused in words that help, or works."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_calls.py"


class Calls:
    """The script, and its targets; in a failure its name is shown and not every tensor."""

    def __init__(self, module: Any) -> None:
        self.module, self.targets = module, dict(module.targets(module.Bench()))

    def __repr__(self) -> str:
        return "Calls()"


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("fuzz_calls", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(tmp_path_factory.mktemp("calls"))
        yield Calls(module)


def test_what_the_wrong_calls_are_made_of_works(calls) -> None:
    told = {name: calls.module.call(*target) for name, target in calls.targets.items()}
    assert {name: why for name, why in told.items() if why[0] != "accepted"} == {}


values = st.one_of(
    st.integers(-3, 2**40),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(-2, 50), st.floats(), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(
    max_examples=1000,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_wrong_arguments_are_refused_in_words_that_help(calls, data) -> None:
    name = data.draw(st.sampled_from(sorted(calls.targets)), "target")
    function, arguments = calls.targets[name]
    key = data.draw(st.sampled_from(sorted(arguments)), "argument")
    junk = calls.module.junk()
    own = st.sampled_from(range(len(junk))).map(junk.__getitem__)
    value = data.draw(st.one_of(own, values), "value")
    state, why = calls.module.call(function, {**arguments, key: value})
    assert state in ("accepted", "helpful", "allowed"), f"{name}: {state}: {why}"

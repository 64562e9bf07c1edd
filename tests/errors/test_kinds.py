"""Arguments of another kind: which one, what came, and what to write; what works is left alone."""

from typing import Literal

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope import experiments
from sinkscope.checks import among, fits, is_number, typed
from sinkscope.detectors import Detector
from sinkscope.errors import InputError, SinkscopeError
from sinkscope.lsg.passes import Gate
from sinkscope.models import LVLM
from sinkscope.protocols import Model


@typed
def halve(lvlm: LVLM, items: list[int], *, how: Literal["up", "down"] = "up", loud: bool = False):
    if len(items) == 0:
        raise ValueError("its own error, of arguments that are right")
    return lvlm.anatomy.vision, [item // 2 for item in items], {"up": 1, "down": 2}[how], loud


@pytest.fixture(scope="module")
def lvlm() -> LVLM:
    return ss.LVLM(*ss.testing.tiny_llava())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lvlm": 0}, "Got lvlm=0; expected LVLM. Write lvlm = ss.LVLM(model, processor)."),
        ({"lvlm": torch.nn.Linear(2, 2)}, "Got lvlm of type Linear; expected LVLM."),
        ({"lvlm": LVLM}, "Got lvlm=LVLM, a class; expected LVLM."),
        ({"items": None}, "Got items=None; expected list."),
        ({"how": "left"}, "Got how='left'; expected 'up' or 'down'."),
        ({"loud": "False"}, "Got loud='False'; expected True or False."),
        ({"loud": None}, "Got loud=None; expected True or False."),
    ],
)
def test_the_argument_that_is_of_another_kind_is_named(lvlm, change, said) -> None:
    with pytest.raises(InputError) as raised:
        halve(**{"lvlm": lvlm, "items": [2, 4]} | change)
    assert str(raised.value).startswith(said)


def test_what_works_is_left_alone(lvlm) -> None:
    class Wrapper:
        anatomy = lvlm.anatomy

    assert halve(Wrapper(), np.array([2, 4]), loud=np.bool_(True))[1] == [1, 2]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="its own error"):
        halve(lvlm, [])
    with pytest.raises(TypeError, match="unexpected keyword"):
        halve(lvlm, [2], sideways=True)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda host, x: ss.trace_sinks(host, x), "Got lvlm of type LlavaFor"),
        (lambda host, x: ss.detect(host, x, ss.detectors.Norm(2.0)), "Got lvlm of type LlavaFor"),
        (lambda host, x: ss.calibrate(host, [x]), "Got lvlm of type LlavaFor"),
        (lambda host, x: ss.sweep(host, [], layers=[0]), "Got lvlm of type LlavaFor"),
        (lambda host, x: ss.train_lsg(host, []), "Got lvlm of type LlavaFor"),
        (lambda host, x: ss.LSG.for_model(host, 0), "Got lvlm of type LlavaFor"),
        (lambda host, x: ss.RandomControl(ss.MaskKeys("first")).run(host, x), "Got "),
        (lambda host, x: ss.published.outlier_tokens(host, x), "Got lvlm of type LlavaFor"),
        (lambda host, x: ss.linear_probes(host, None), "Got "),
        (lambda host, x: ss.compare(ss.LVLM(host), None, {"base": []}), "Got "),
    ],
)
def test_a_plain_model_or_no_data_is_no_raw_error(lvlm, call, said) -> None:
    sample = lvlm.prepare(images=ss.testing.random_image(), text="What is there?")
    with pytest.raises(SinkscopeError, match=said):
        call(lvlm.module, sample)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ss.detectors.Limits("ratio", iter([1.0])), "Got limits of type list_iterator"),
        (lambda: ss.detectors.Limits("ratio", torch.ones(1, 9)), "Got limits="),
        (lambda: ss.detectors.SinkDimensions(torch.tensor(True), 2.0), "Got dims=tensor"),
        (lambda: ss.detectors.Norm(1e39), "Got tau=1e\\+39; expected at most 3.4e\\+38"),
        (lambda: ss.detectors.Norm(2.0, strict="no"), "Got strict='no'; expected True or False"),
        (lambda: experiments.EditSinks("L-sinks", layers=["x"]), "Got layers=\\['x'\\]"),
        (lambda: experiments.EditSinks("L-sinks", layers=torch.tensor(True)), "Got layers=tensor"),
        (lambda: experiments.effect_conditions(edits=np.zeros((0, 0))), "Got edits="),
        (lambda: ss.lsg_grid(10**9), "Got steps=1000000000"),
        (lambda: ss.bundled.draw_scene(3, noise=torch.tensor(float("nan"))), "Got noise="),
        (lambda: experiments.Questions("scenes", suffix=None), "Got suffix=None; expected a text"),
        (lambda: ss.LVLM(ss.testing.tiny_llava()[0], -0.5), "Got a processor of type float"),
    ],
)
def test_values_that_would_fail_later_are_refused_where_they_are_given(call, said) -> None:
    with pytest.raises(SinkscopeError, match=said):
        call()


def test_numbers_of_numpy_are_numbers(lvlm) -> None:
    sample = lvlm.prepare(images=ss.testing.random_image(), text="What is there?")
    runs = [
        lvlm.run(sample, interventions=[ss.AblateActivations([1], "image", number, layers=[1])])
        for number in (0.5, np.float32(0.5), torch.tensor(0.5))
    ]
    assert torch.equal(runs[0].logits, runs[1].logits)
    assert torch.equal(runs[0].logits, runs[2].logits)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"level": -1}, "Got level=-1; expected a finite number above 0 and below 1"),
        ({"level": 1.0}, "Got level=1.0"),
        ({"draws": 0}, "Got draws=0; expected an int from 1 to 1000000"),
        ({"draws": 10.5}, "Got draws=10.5"),
        ({"seed": -1}, "Got seed=-1"),
        ({"clusters": [1, 2]}, "Got 3 values and 2 clusters"),
        ({"values": ["a", "b", "c"]}, "expected numbers, one per observation"),
        ({"values": 3.0}, "Got values of type float"),
    ],
)
def test_statistics_refuse_what_gives_no_interval(options, said) -> None:
    given = {"values": [1.0, 0.0, 1.0], "clusters": [1, 1, 2], **options}
    with pytest.raises(InputError, match=said):
        experiments.cluster_bootstrap(**given)


def test_kinds_and_numbers_by_hand() -> None:
    assert [fits(x, int) for x in (1, np.int64(2), True, 1.0, "1")] == [True, True, *[False] * 3]
    assert fits(3, Gate)  # a protocol that cannot be asked says nothing
    assert not fits(3, Detector)
    assert not fits(3, Model)
    assert [fits(x, list[int] | None) for x in ([], None, (), "x")] == [True, True, False, False]
    assert [is_number(x) for x in (3e38, float("inf"), float("nan"), True)] == [True, *[False] * 3]
    options = ("a", 1, None)
    assert [among(x, options) for x in ("a", np.int64(1), None)] == [True] * 3
    assert [among(x, options) for x in (np.array(["a"]), torch.ones(2), "b")] == [False] * 3

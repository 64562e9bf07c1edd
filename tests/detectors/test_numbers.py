"""Numbers and layers that a user can give: what is none, or impossible, is refused by name."""

import inspect
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope import detectors as d
from sinkscope.errors import CalibrationError, DetectorError, InputError, LayerError, SinkscopeError
from sinkscope.lsg.config import check_layer
from sinkscope.results import in_layers
from sinkscope.testing import random_image

NAN, INF = float("nan"), float("inf")
NONE: tuple[Any, ...] = (
    NAN,
    INF,
    -INF,
    -1,
    -0.5,
    True,
    "3",
    None,
    1j,
    [3],
    np.float32(NAN),
    np.True_,
)
NONE += (10**400, torch.tensor(NAN))
BARE = {  # a rule that is good, and the fields that take a number
    "Massive": (d.Massive(), ("absolute", "ratio")),
    "Norm": (d.Norm(3.0), ("tau", "gap")),
    "ZScore": (d.ZScore(), ("z",)),
    "Received": (d.Received(), ("eps",)),
    "CosineToBOS": (d.CosineToBOS(), ("threshold",)),
    "SinkDimensions": (d.SinkDimensions([1], 3.0), ("tau",)),
    "Gap": (d.Gap(), ("gap", "medians", "draws", "growth")),
    "RandomTokens": (d.RandomTokens(3), ("count",)),
}


def with_one(rule, name, value):
    return type(rule)(**{f.name: getattr(rule, f.name) for f in fields(rule)} | {name: value})


@pytest.mark.parametrize("name", BARE)
def test_no_detector_takes_what_is_no_number(name):
    """``Massive(ratio=nan)`` flagged nothing, without a word."""
    rule, numbers = BARE[name]
    for field in numbers:
        for value in NONE if name != "RandomTokens" else NONE[:-2]:  # any whole number is a count
            with pytest.raises(DetectorError, match=field):
                with_one(rule, field, value)
        good = getattr(rule, field)
        whole = name == "RandomTokens"
        for kind in (np.int64, torch.tensor) if whole else (np.float64, np.float32, torch.tensor):
            with_one(rule, field, kind(good))


def test_no_detector_takes_what_is_no_channel():
    for wrong in (-1, 1.5, True, "x", NAN, None, np.True_):
        for make in (
            lambda one=wrong: d.SinkDimensions([one], 3.0),
            lambda one=wrong: d.Limits("channels", (3.0,) * 3, (one,)),
        ):
            with pytest.raises(DetectorError, match="dims="):
                make()
    for wrong in (NAN, -1.0, 0.0, True, "x", -INF, None):
        with pytest.raises(DetectorError, match="limits"):
            d.Limits("ratio", (3.0, wrong))
    d.Limits("channels", (3.0, INF), (np.int64(1), 2))


@pytest.mark.parametrize("name", ["draws", "spike", "max_dims"])
def test_calibration_takes_no_impossible_number(tiny, name):
    """NaN gave a confident "no token both spikes and draws", and ``max_dims=-1`` dropped a channel."""
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(random_image(40, 40), "what")
    field = {"spike": "(spike|medians)"}.get(name, name)
    for value in (*NONE, 0) if name != "max_dims" else (*NONE[:-2], 0, 1.5, 2.0, torch.tensor(NAN)):
        with pytest.raises((DetectorError, CalibrationError, InputError), match=field):
            ss.calibrate(lvlm, [sample], **{name: value})


WRONG_LAYERS = (1.9, 1.0, True, np.True_, "1", None, NAN, -1, 99, [0], torch.tensor(1.0))


@pytest.fixture
def takes(tiny):
    """Everything that takes layers, as name -> function of one layer."""
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(random_image(40, 40), "what")
    rows = [{"image": random_image(40, 40, i), "question": "q", "answer": "red"} for i in (0, 1)]
    received = ss.ReceivedAttention()
    read = lvlm.run(sample, [received])[received]
    how = {"dry_run": True}
    return {
        "train_lsg": lambda one: ss.train_lsg(lvlm, rows, layers=[one], validation=0, **how),
        "sweep": lambda one: ss.sweep(lvlm, rows, layers=[one], **how),
        "a gate": lambda one: ss.LSG.for_model(lvlm, one, v_detector=d.Norm(3.0)),
        "a probe": lambda one: lvlm.run(sample, [ss.TokenNorms(layers=[one])]),
        "an edit": lambda one: lvlm.run(sample, [], [ss.MaskKeys("image", layers=[one])]),
        "a result": lambda one: inspect.unwrap(in_layers)(read, [one]),  # types unchecked
        "a detection": lambda one: ss.detect(lvlm, sample, d.Norm(3.0), layers=[one]),
    }


def test_only_whole_numbers_are_layers(takes):
    """``train_lsg(layers=[1.9])`` trained layer 1, and a result took True for layer 1."""
    for name, take in takes.items():
        for wrong in WRONG_LAYERS:
            with pytest.raises((LayerError, InputError), match="layer"):
                take(wrong)
        for right in (1, np.int64(1), torch.tensor(1)):
            assert take(right) is not None, name


def test_a_layer_as_an_array_of_one_number(tiny):
    assert check_layer(np.array(1), 3) == 1
    assert type(check_layer(np.int64(1), 3)) is int
    lvlm = tiny("llava-clip-llama")
    rows = [{"image": random_image(40, 40), "question": "q", "answer": "red"}]
    for one in (np.array(1), torch.tensor(1), [np.int64(1)], np.array([1])):
        assert "1 layers" in str(ss.sweep(lvlm, rows, layers=one, dry_run=True))
    for wrong in (b"\x01", np.array(1.5), np.array(True)):
        with pytest.raises(LayerError):
            ss.sweep(lvlm, rows, layers=wrong, dry_run=True)


@pytest.mark.parametrize("what", [3, "llava", {}, object(), type])
def test_a_processor_that_is_none_and_an_accelerator_that_is_none_are_named(tiny, what):
    module = tiny("llava-clip-llama").module
    with pytest.raises(SinkscopeError, match="processor"):
        ss.LVLM(module, what).prepare(random_image(40, 40), "what")
    rows = [{"image": random_image(40, 40), "question": "q", "answer": "red"}]
    with pytest.raises(InputError, match="accelerator"):
        ss.train_lsg(tiny("llava-clip-llama"), rows, layers=[0], validation=0, accelerator=what)

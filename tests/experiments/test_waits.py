"""What waits for a GPU: counted on a device that is pretended, so that no GPU is needed."""

import pandas as pd
import pytest

import sinkscope as ss
from sinkscope.testing import random_image, tiny_llava
from tests.pretended_device import pretended, put

ROOMS = ("experiments/", "lsg/passes.py", "lsg/attach.py", "training/", "data/")
MOVES = (*ROOMS, "models/replay.py", "models/prefix.py")


def data(n, **more):
    asked = ("what is it", "how many red shapes are there , and where ?")
    return [
        {"image": random_image(40, 40, i), "image_id": i, "question": q, "answer": "red", **more}
        for i in range(n)
        for q in asked
    ]


def counted(run, layers=3):
    """Reads in our rooms and blocking moves to the device, in a run whose numbers are the host's."""
    model, processor = tiny_llava(layers=layers)
    plain = run(ss.LVLM(model, processor))
    put(model)
    with pretended() as waits:
        lvlm = ss.LVLM(model, processor)
        assert lvlm.device.type == "cuda"
        waits.read.clear()
        waits.sent.clear()
        found = run(lvlm)
    pd.testing.assert_frame_equal(plain, found, check_exact=True)
    reads = {place: n for place, n in waits.read.items() if place.startswith(ROOMS)}
    sent = {place: n for place, n in waits.sent.items() if place.startswith(MOVES)}
    return sum(reads.values()), sent


def sweeping(pairs=3, batch="auto", groups=2, choices=()):
    def run(lvlm):
        low = {"l_detector": ss.detectors.Norm(1.0)} if groups == 3 else {}
        rule = ss.detectors.Norm("3sigma")
        grid = ss.lsg_grid(pairs, groups=groups)
        given = data(2, choices=list(choices))
        return ss.sweep(lvlm, given, [0, 1], grid, v_detector=rule, batch=batch, **low).table

    return run


@pytest.mark.parametrize("groups", [2, 3])
def test_a_sweep_reads_once_per_block_whatever_the_edits(groups):
    few, sent = counted(sweeping(groups=groups))
    assert few == 2 * 2 * (
        1 + 2
    )  # log-probabilities and tokens, of two images, the base and two blocks
    assert not sent
    assert counted(sweeping(pairs=5, groups=groups)) == (few, {})
    assert counted(sweeping(batch=1, groups=groups)) == (few, {})
    if groups == 2:
        assert counted(sweeping(), layers=6) == (few, {})  # deeper, the same layers swept
        options = ("red", "3 red shapes")
        assert counted(sweeping(choices=options)) == (few, {})  # more rows


def training(layers, clip=1.0):
    def run(lvlm):
        rule, how = ss.detectors.Norm(2.0), {"batch": 2, "epochs": 1, "validation": 0.25}
        return ss.train_lsg(lvlm, data(4), layers, v_detector=rule, **how).history.drop(
            columns="layer"
        )

    return run


def test_training_reads_as_often_for_many_gates_as_for_one():
    one, sent = counted(training([0]))
    assert not sent
    assert counted(training(["embed", 0, 1])) == (one, {})

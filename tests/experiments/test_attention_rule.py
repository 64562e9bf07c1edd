"""V-sinks by the attention rule, where the ViT's sink is a CLS that the projector keeps.

The sink is planted: the feeding block looks at CLS, and eager ``transformers`` says so.
"""

import pytest
import torch

import sinkscope as ss
from sinkscope import baselines, detectors
from sinkscope.experiments import EditSinks
from sinkscope.testing import random_image
from tests.experiments.test_sweep import GRID, check_equal, some
from tests.keeping_cls import cls_of, drawing_cls

RULE = detectors.Received(0.5)
NOTHING = detectors.NoSinks()
RULES = {"v_detector": RULE, "l_detector": NOTHING}


@pytest.fixture(scope="module")
def lvlm():
    made, share, others = drawing_cls()
    assert others < RULE.eps < share
    return made


def test_the_rule_finds_cls_and_nothing_else(lvlm, batch):
    sample = batch(lvlm)
    assert torch.equal(ss.trace_sinks(lvlm, sample, **RULES).v_sinks, cls_of(sample))


@pytest.mark.parametrize("rule", [RULE, detectors.VisionTokens("cls")])
def test_a_sweep_scales_cls(lvlm, rule):
    items = some()
    made = ss.sweep(lvlm, items, layers=["embed", 1], grid=GRID, v_detector=rule)
    assert set(made.table["n_v"]) == {1}
    assert set(made.table["n_rest"]) == {16}
    check_equal(lvlm, items, made.table, rule)


def test_a_comparison_masks_cls_and_as_many_others(lvlm):
    items = some(3)
    conditions = {
        "base": [],
        "mask": EditSinks("V-sinks"),
        "random": EditSinks("V-sinks", control=True),
        "by hand": lambda trace: [ss.MaskKeys(cls_of(trace.sample))],
        "front": baselines.sink_to_front(),
        "fixed": baselines.fixed_coefficients(1, 0.2, 0.8),
        "its control": baselines.random_tokens(baselines.fixed_coefficients(1, 0.2, 0.8)),
    }
    made = ss.compare(lvlm, items, conditions, **RULES).table
    assert (made.loc[made["condition"] == "mask", "sinks"] == 1).all()
    given = {name: made[made["condition"] == name]["given"].tolist() for name in conditions}
    assert given["mask"] == given["by hand"] != given["base"]
    edited = made[made["condition"].isin(["mask", "random", "by hand", "fixed", "its control"])]
    assert edited["touched"].all()
    assert not made["uncontrolled"].any()


def test_linear_probes_read_cls(lvlm):
    records = [
        {"image": random_image(64, 64, i), "attributes": {"odd": i % 2}, "image_id": i}
        for i in range(24)
    ]
    groups = {
        **ss.experiments.sink_groups(3, 2),
        "by hand": lambda trace: cls_of(trace.sample),
    }
    quick = {"permutations": 0, "draws": 20, "progress": False}
    made = ss.linear_probes(lvlm, records, groups=groups, **RULES, **quick)
    of = made.table.set_index("group")
    assert (of.loc["V-sinks", "tokens"] == 1).all()
    assert (of.loc["V-sinks", "missing"] == 0).all()
    columns = ["layer", "accuracy", "low", "high"]
    assert of.loc["V-sinks", columns].values.tolist() == of.loc["by hand", columns].values.tolist()
    ordinary = ss.trace_sinks(lvlm, lvlm.prepare(random_image(64, 64, 0), "what"), **RULES)
    assert not (ordinary.ordinary() & cls_of(ordinary.sample)).any()

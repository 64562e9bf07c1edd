"""The effect table: sinks, as many random tokens, and honest gaps where there is nothing to edit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sinkscope as ss
from sinkscope import detectors
from sinkscope.errors import InputError
from sinkscope.experiments import effect_conditions, effect_table
from sinkscope.experiments.sink_edits import EditSinks, content_seed, top_received
from sinkscope.testing import plant, random_image, sink_free


@pytest.fixture(scope="module")
def planted():
    made = plant("clip", v_sinks=(9, 46), l_sinks=(20,))
    lvlm = ss.LVLM(made.model, made.processor, verify=False)
    rules = {
        "v_detector": detectors.SinkDimensions(made.truth.v_dims, 5.0),
        "l_detector": detectors.SinkDimensions(made.truth.l_dims, 5.0),
    }
    return lvlm, rules


def dataset(n=2):
    return [
        {
            "image": random_image(64, 64, i),
            "question": question,
            "answer": "red",
            "task": task,
            "image_id": i,
        }
        for i in range(n)
        for question, task in (("how many red shapes", "count"), ("what colour is it", "colour"))
    ]


def test_conditions_come_in_pairs_after_the_base() -> None:
    names = list(effect_conditions(edits=("mask",), top=3))
    assert names == [
        "base",
        "mask V-sinks",
        "mask random, as many as V-sinks",
        "mask L-sinks",
        "mask random, as many as L-sinks",
        "mask text sinks",
        "mask random, as many as text sinks",
        "mask the top 3 attended",
        "mask random, as many as the top 3",
    ]
    alone = effect_conditions(top=0, controls=False)
    assert len(alone) == 1 + 3 * 2
    assert not [name for name in alone if "random" in name]


@pytest.mark.parametrize("wrong", [{"edits": ["cut"]}, {"edits": "mask"}, {"edits": []},
                                   {"top": -1}, {"top": 1.5}, {"top": True}])  # fmt: skip
def test_wrong_options_are_refused(wrong) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))}="):
        effect_conditions(**wrong)


@pytest.mark.parametrize("wrong", [{"kind": "V-sink"}, {"edit": "cut"}, {"control": "no"}, {"k": 0},
                                   {"seed": -1}])  # fmt: skip
def test_an_unknown_kind_or_edit_is_refused(wrong) -> None:
    with pytest.raises(InputError, match=f"Got {next(iter(wrong))}=.*; expected"):
        EditSinks(**{"kind": "V-sinks", **wrong})


def test_the_table_of_a_planted_model(planted) -> None:
    lvlm, rules = planted
    table = effect_table(lvlm, dataset(), **rules, layers=[2, 3], top=2, progress=False)
    assert table.base == "base"
    whole = table.estimates(draws=50)
    touched = whole[whole["task"] == "all"].set_index("condition")["touched"]
    assert touched["base"] == 0
    assert (touched.drop("base") == 1).all()
    assert set(whole["task"]) == {"count", "colour", "all"}


def test_replacements_of_values_side_by_side(planted) -> None:
    """One call: zero, mean and resample, each beside as many random tokens."""
    lvlm, rules = planted
    edits = ["zero value", "mean value", "resample value"]
    table = effect_table(lvlm, dataset(), **rules, edits=edits, top=0, progress=False)
    whole = table.estimates(draws=50)
    touched = whole[whole["task"] == "all"].set_index("condition")["touched"]
    wanted = [f"{edit} V-sinks" for edit in edits]
    wanted += [f"{edit} random, as many as V-sinks" for edit in edits]
    assert (touched[wanted] == 1).all()
    sample = lvlm.prepare(images=random_image(64, 64, 0), text="how many red shapes")
    trace = ss.trace_sinks(lvlm, sample, **rules)
    for edit in edits:
        (made,) = EditSinks("V-sinks", edit)(trace)
        assert isinstance(made, ss.AblateValues)
        assert f"{made.replacement} value" == edit
        assert made.tokens.equal(trace.v_sinks)


def test_a_model_without_sinks_has_nothing_to_mask_but_its_top_tokens() -> None:
    made = sink_free()
    lvlm = ss.LVLM(made.model, made.processor, verify=False)
    none = detectors.Norm(1e6)
    table = effect_table(lvlm, dataset(1), v_detector=none, l_detector=none, progress=False)
    touched = table.table.groupby("condition")["touched"].any()
    assert sorted(touched.index[touched]) == sorted(n for n in touched.index if " top 4" in n)
    base = table.table[table.table["condition"] == "base"]["given"].tolist()
    for name in touched.index[~touched]:
        assert table.table[table.table["condition"] == name]["given"].tolist() == base


def test_random_tokens_are_as_many_ordinary_ones_at_other_places_in_every_image(planted) -> None:
    lvlm, rules = planted
    condition, places = EditSinks("V-sinks", control=True), set()
    for seed in range(4):
        sample = lvlm.prepare(images=random_image(64, 64, seed), text="how many red shapes")
        trace = ss.trace_sinks(lvlm, sample, **rules)
        (edit,) = condition(trace)
        assert int(edit.tokens.sum()) == int(trace.v_sinks.sum()) == 2
        assert not (edit.tokens & ~trace.ordinary()).any()
        (again,) = condition(trace)
        assert edit.tokens.equal(again.tokens)
        places.add(tuple(edit.tokens.nonzero()[:, 1].tolist()))
    assert len(places) == 4


def test_rows_with_too_few_ordinary_tokens_are_left_unedited_and_counted(planted) -> None:
    lvlm, rules = planted
    sample = lvlm.prepare(images=random_image(64, 64, 0), text="what is it")
    trace = ss.trace_sinks(lvlm, sample, **rules)
    many = EditSinks("top attended", control=True, k=60)
    assert not many(trace)
    assert many.uncontrolled(trace).tolist() == [True]
    assert EditSinks("top attended", k=60)(trace)
    assert EditSinks("top attended", k=60).uncontrolled(trace).tolist() == [False]
    assert EditSinks("top attended", control=True).uncontrolled(trace).tolist() == [False]

    images = [random_image(64, 64, i) for i in (0, 1)]
    pair = lvlm.prepare(images=images, text=["what is it", "what is it"])
    trace = ss.trace_sinks(lvlm, pair, **rules)
    crowded = trace.v_sinks.clone()
    crowded[1] = pair.tokens.image[1] >= 0
    trace = replace(trace, v_sinks=crowded)
    few = EditSinks("V-sinks", control=True)
    assert few.uncontrolled(trace).tolist() == [False, True]
    (edit,) = few(trace)
    assert edit.tokens.sum(dim=1).tolist() == [2, 0]


def test_the_summary_tells_that_a_control_was_not_drawn(planted) -> None:
    lvlm, rules = planted
    conditions = {
        "base": [],
        "mask most": EditSinks("top attended", k=60),
        "mask random, 60": EditSinks("top attended", control=True, k=60),
        "mask random": EditSinks("V-sinks", control=True),
    }
    table = ss.compare(lvlm, dataset(1), conditions, progress=False, **rules)
    summary = table.estimates().set_index("condition")
    assert summary.loc[summary["task"] == "all", "uncontrolled"].to_dict() == {
        "base": 0.0,
        "mask most": 0.0,
        "mask random, 60": 1.0,
        "mask random": 0.0,
    }
    assert "too few to draw from" in table.to_markdown()
    assert "too few to draw from" in ss.viz.effects_text(table.estimates())
    texts = [text.get_text() for ax in table.plot().axes for text in ax.texts]
    assert any("too few to draw from" in text for text in texts)


def test_top_received_are_the_image_tokens_with_the_most_attention(planted) -> None:
    lvlm, rules = planted
    sample = lvlm.prepare(images=random_image(64, 64, 0), text="what is it")
    trace = ss.trace_sinks(lvlm, sample, **rules)
    top = top_received(trace, 2)
    assert top.equal(trace.v_sinks), "the planted V-sinks draw the most"
    assert not (top_received(trace, 500) & ~(sample.tokens.image >= 0)).any()


def test_seeds_follow_the_content(planted) -> None:
    lvlm, _ = planted
    one, same, other = (
        lvlm.prepare(images=random_image(64, 64, i), text="what is it") for i in (0, 0, 1)
    )
    assert content_seed(one, 0) == content_seed(same, 0) != content_seed(other, 0)
    assert content_seed(one, 0) != content_seed(one, 1)
    assert 0 <= content_seed(one, 0) < 2**63
    torch.Generator().manual_seed(content_seed(one, 0))

"""Wrong lists of interventions, and edits that find nothing to do."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import InterventionError, NoEffectError
from sinkscope.interventions import Edit

LLAVA = "llava-clip-llama"


@dataclass(frozen=True, eq=False)
class Unfinished:
    """Someone's intervention that forgot what the protocol asks for."""

    def edits(self, context):
        return []


@dataclass(frozen=True, eq=False)
class AtNoStage:
    """Someone's intervention at a stage of attention that does not exist."""

    steps: str = "all"
    allow_noop: bool = False

    def edits(self, context):
        return [Edit(ss.Site("language", "attention", 0), print, stage="softmax")]


@dataclass(frozen=True, eq=False)
class Relabelled:
    """Someone's intervention whose edits say that they change another stage than they do."""

    it: Any
    stage: str
    steps: str = "all"
    allow_noop: bool = False

    def edits(self, context):
        return [replace(edit, stage=self.stage) for edit in self.it.edits(context)]


LISTS = {
    "one without a list": (lambda c: ss.MaskKeys(c.some), r"Got one MaskKeys; expected a list.*Write interventions=\[intervention\]"),
    "a class without a list": (
        lambda c: ss.MaskKeys, r"Got the class MaskKeys; expected a list.*Write interventions=\[MaskKeys\(...\)\]"
    ),
    "a class in a list": (
        lambda c: [ss.MaskKeys], r"Got the class MaskKeys among the interventions.*Write MaskKeys\(...\)"
    ),
    "a mask": (lambda c: [c.some], "among the interventions; expected objects with edits"),
    "a number": (lambda c: 3, "Got interventions=3; expected a list"),
    "a name": (lambda c: "image", "Got interventions='image'; expected a list"),
    "a probe": (lambda c: [ss.ValueNorms()], "Got ValueNorms.*among the interventions"),
    "an edit at a stage that is none": (
        lambda c: [AtNoStage()], r"Got stage='softmax'; expected one of \('keys', 'logits', 'weights', 'values'\)",
    ),
    "half of the protocol": (
        lambda c: [Unfinished()], r"expected objects with edits\(\), steps and allow_noop"
    ),
    "the same twice": (
        lambda c: 2 * [ss.MaskKeys(c.some)],
        "Got the same intervention object twice; expected each once, because its effect is found by the object",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_what_is_no_list_of_interventions_is_refused(case, name):
    c, (make, message) = case(LLAVA), LISTS[name]
    for call in (c.lvlm.run, c.lvlm.generate):
        with pytest.raises(InterventionError, match=message):
            call(c.sample, interventions=make(c))


def test_a_decode_only_edit_of_an_answer_of_one_token(case):
    c = case(LLAVA)
    edit = ss.MaskKeys(c.some, steps="decode")
    with pytest.raises(NoEffectError, match="a decode-only edit needs max_new_tokens=2 or more"):
        c.lvlm.generate(c.sample, interventions=[edit], max_new_tokens=1)
    out = c.lvlm.generate(c.sample, interventions=[edit], max_new_tokens=2, min_new_tokens=2)
    assert edit in out.steps[1].effects


def test_tokens_that_left_the_sliding_window(case):
    c = case("gemma3")
    edit = ss.MaskKeys("first", layers=[0], queries="last")
    with pytest.raises(NoEffectError, match="lie outside the window"):
        c.lvlm.run(c.sample, interventions=[edit])


def test_an_effect_is_found_by_its_object(case):
    c = case(LLAVA)
    edit = ss.MaskKeys(c.some)
    run = c.lvlm.run(c.sample, interventions=[edit])
    assert run.effects[edit].touched.all()
    assert run.effects[ss.MaskKeys(c.some.clone())] is run.effects[edit]
    with pytest.raises(InterventionError, match="Got MaskKeys, which did nothing in this pass"):
        run.effects[ss.MaskKeys(c.other)]


def test_allowed_noops_are_silent_and_change_nothing(case):
    c = case(LLAVA)
    plain = c.lvlm.run(c.sample).logits
    for edit in (
        ss.MaskKeys(c.some & False, allow_noop=True),
        ss.MaskKeys("last", queries="first", allow_noop=True),
        ss.MaskKeys("first", queries="first", allow_noop=True),
        ss.AttentionKnockout(c.late & False, c.some, allow_noop=True),
        ss.ScaleKeys(c.some, 1.0, allow_noop=True),
        ss.Redistribute(c.some, c.other, 0.0, allow_noop=True),
        ss.AblateValues(c.some & False, "mean", allow_noop=True),
        ss.AblateActivations([1], c.some & False, allow_noop=True),
        ss.interventions.SinkToFront("image", allow_noop=True),
    ):
        run = c.lvlm.run(c.sample, interventions=[edit])
        assert torch.equal(run.logits, plain)
        assert run.effects[edit].rows.sum() == 0
        assert not run.effects[edit].layers


SAYS = {  # an edit's stage -> the same edit said otherwise
    "keys": lambda c: ss.ScaleKeys(c.some, 0.0),
    "logits": lambda c: ss.MaskKeys(c.some),
    "weights": lambda c: ss.ScaleAttention(c.some, 0.0, renormalize=False),
}


@pytest.mark.parametrize("said", SAYS)
@pytest.mark.parametrize("done", SAYS)
def test_the_stage_alone_says_what_a_factor_multiplies(case, done, said):
    """No kernel says it again, so a label cannot lie: the logit, the weight renormalised, the weight."""
    c = case(LLAVA)
    got = c.lvlm.run(c.sample, interventions=[Relabelled(SAYS[done](c), said)]).logits
    assert torch.equal(got, c.lvlm.run(c.sample, interventions=[SAYS[said](c)]).logits)


@pytest.mark.parametrize(
    ("make", "stages", "takes"),
    [
        (SAYS["keys"], ["values"], "2 arguments; expected change[(]value[)]"),
        (lambda c: ss.Redistribute(c.some, c.other, 0.5), ["keys", "logits", "values"], "3 arg"),
        (lambda c: ss.AblateValues(c.some), ["keys", "logits", "weights"], "1 arg"),
        (lambda c: ss.AblateValues(c.some, heads=[1]), ["keys", "logits", "weights"], "1 arg"),
    ],
)
def test_a_change_of_another_stage_than_is_said_is_refused(case, make, stages, takes):
    """Its place among the edits of a site would be a wrong one."""
    c = case(LLAVA)
    for stage in stages:
        message = f"stage='{stage}' whose kernel makes a change of {takes}.*Write the stage"
        with pytest.raises(ValueError, match=message):
            c.lvlm.run(c.sample, interventions=[Relabelled(make(c), stage)])

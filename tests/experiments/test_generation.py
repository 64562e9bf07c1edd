"""Sinks while the model speaks: every number equals an eager generation of `transformers`.

The reference calls ``generate(output_attentions=True)`` under the eager kernel, and one eager pass over
prompt and answer for the states; the rules, births and deaths are worked out from them by hand.
"""

from __future__ import annotations

import math

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import DetectorError, InputError
from sinkscope.testing import TINY, plant, random_image, sink_free, tiny_gemma3
from tests.reference import in_cache, set_kernel, visible

NEW = 6


def options(lvlm):
    """An answer of so many tokens, none of which stands for an image."""
    return {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "suppress_tokens": [lvlm.anatomy.image_token_id],
    }


@torch.no_grad()
def eager(lvlm, sample, **given):
    """Sequences, and of every step ``[batch layer head key]`` of its last query; NaN beyond the cache."""
    before = set_kernel(lvlm.module, "eager")
    out = lvlm.module.generate(
        **sample.inputs,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
        **given,
    )
    set_kernel(lvlm.module, before)
    steps, prompt = [], sample.tokens.ids.shape[1]
    for step, layers in enumerate(out.attentions):
        rows = [layer[:, :, -1].float() for layer in layers]
        pads = [prompt + step - row.shape[-1] for row in rows]
        rows = [
            torch.nn.functional.pad(row, (pad, 0), value=float("nan"))
            for row, pad in zip(rows, pads, strict=True)
        ]
        steps.append(torch.stack(rows, dim=1))
    return out.sequences, steps


def seen_by(lvlm, sample, step):
    """The keys that the query of a step sees, bool ``[batch layer key]``."""
    prompt = sample.tokens.ids.shape[1]
    seen = visible(lvlm, sample, step)[:, :, prompt - 1 + step, : prompt + step]
    if step:
        seen = seen & in_cache(lvlm, prompt + step)[:, :, 0]
    return seen


def check_attention(trace, lvlm, steps, ended=()):
    """Largest, mean and null of every step, NaN where the query does not see."""
    prompt = trace.sample.tokens.ids.shape[1]
    assert trace.n_steps == len(steps)
    assert trace.mass_max.shape[-1] == prompt + len(steps) - 1
    for step, want in enumerate(steps):
        seen = seen_by(lvlm, trace.sample, step)
        for row, stop in ended:
            seen[row] &= step < stop
        for got, joined in (
            (trace.mass_max, want.amax(dim=2)),
            (trace.mass_mean, want.mean(dim=2)),
        ):
            assert torch.equal(~got[:, step, :, : prompt + step].isnan(), seen)
            assert got[:, step, :, prompt + step :].isnan().all()
            off = (got[:, step, :, : prompt + step] - joined).masked_fill(~seen, 0.0)
            assert off.abs().max() <= 1e-5
        count = seen.sum(dim=2)
        assert torch.equal(trace.null[:, step].isnan(), count == 0)
        assert torch.allclose(trace.null[:, step][count > 0], 1 / count[count > 0], atol=1e-6)


@pytest.mark.parametrize("family", TINY)
def test_the_attention_of_every_step_equals_an_eager_generation(tiny, batch, family) -> None:
    """Rows of unequal length, padded on the left; Gemma 3 has a sliding cache of 12."""
    lvlm = tiny(family)
    sample = batch(lvlm)
    assert not sample.tokens.live.all()
    trace = ss.trace_generation(lvlm, sample, ss.detectors.NoSinks(), **options(lvlm))
    sequences, steps = eager(lvlm, sample, **options(lvlm))
    assert torch.equal(trace.sequences, sequences)
    check_attention(trace, lvlm, steps)


def test_a_model_whose_layers_all_slide() -> None:
    model, processor = tiny_gemma3(full_attention_layers=())
    lvlm = ss.LVLM(model, processor)
    sample = lvlm.prepare(images=random_image(48, 48, 0), text="what is it")
    trace = ss.trace_generation(lvlm, sample, ss.detectors.NoSinks(), **options(lvlm))
    check_attention(trace, lvlm, eager(lvlm, sample, **options(lvlm))[1])
    assert trace.mass_max[0, 1, :, 0].isnan().all()  # far behind the window


def test_rows_that_end_early_stop_there(tiny, batch) -> None:
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    prompt = sample.tokens.ids.shape[1]
    answers = eager(lvlm, sample, **options(lvlm))[0][:, prompt:].tolist()
    stop = max(answers[0].index(token) for token in set(answers[0][:-1]) - set(answers[1])) + 1
    assert stop > 1
    end = answers[0][stop - 1]
    given = {"max_new_tokens": NEW, "eos_token_id": end, "pad_token_id": 3}
    rule = ss.detectors.Norm(0.1)  # every token
    trace = ss.trace_generation(lvlm, sample, rule, **given)
    check_attention(trace, lvlm, eager(lvlm, sample, **given)[1], ended=[(0, stop)])
    last = {life.batch: life.pos for life in trace.lives if life.kind == "generated"}
    assert last == {0: prompt + stop - 2, 1: prompt + NEW - 2}
    assert not trace.flags[0, :, prompt + stop - 1 :].any()
    first = next(life for life in trace.lives if life.batch == 0)
    assert first.seen_until == stop - 1


@torch.no_grad()
def states(lvlm, sample, sequences):
    """What every layer reads in one eager pass over prompt and answer, ``[batch layer pos d_model]``."""
    grown = dict(sample.inputs)
    more = sequences.shape[1] - 1 - sample.tokens.ids.shape[1]
    grown["input_ids"] = sequences[:, :-1]
    grown["attention_mask"] = torch.nn.functional.pad(grown["attention_mask"], (0, more), value=1)
    out = lvlm.module(**grown, output_hidden_states=True)
    return torch.stack(out.hidden_states[: lvlm.anatomy.language.n_layers], dim=1)


def test_massive_tokens_of_the_answer_are_measured_by_the_prompts_median(tiny, batch) -> None:
    """A decode step has one token, whose own median says nothing about the layer."""
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    prompt, live = sample.tokens.ids.shape[1], sample.tokens.live
    sequences, _ = eager(lvlm, sample, **options(lvlm))
    size = states(lvlm, sample, sequences).abs()
    median = torch.stack([size[row][:, :prompt][:, live[row]].flatten(1).median(1).values for row in (0, 1)])  # fmt: skip
    peak = size.amax(dim=-1)
    ratio = peak / median[..., None]
    limit = float(ratio[:, :, prompt:].median())
    rule = ss.detectors.Massive(0.0, limit * 1.0001)
    trace = ss.trace_generation(lvlm, sample, rule, **options(lvlm))
    grown = torch.nn.functional.pad(live, (0, NEW - 1), value=True)
    want = (ratio >= limit * 1.0001) & grown[:, None]
    assert torch.equal(trace.flags, want)
    alone = peak / size.median(dim=-1).values >= limit * 1.0001
    assert not torch.equal(alone[:, :, prompt:], want[:, :, prompt:])


@pytest.mark.parametrize("draws", [0.02, 0.05, 0.2])
def test_lives_by_hand(tiny, batch, draws) -> None:
    """Steps are counted one by one, from the eager weights."""
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    prompt = sample.tokens.ids.shape[1]
    sequences, steps = eager(lvlm, sample, **options(lvlm))
    score = states(lvlm, sample, sequences).norm(dim=-1)
    limit = float(score[:, :, prompt:].quantile(0.8))
    rule = ss.detectors.Norm(limit)
    trace = ss.trace_generation(lvlm, sample, rule, draws=draws, **options(lvlm))
    lives = {(life.batch, life.pos): life for life in trace.lives}
    grown = torch.nn.functional.pad(sample.tokens.live, (0, NEW - 1), value=True)
    flagged = (score >= limit) & grown[:, None]
    assert set(lives) == {tuple(at) for at in flagged.any(dim=1).nonzero().tolist()}
    assert {life.kind for life in trace.lives} >= {"generated", "L"}
    for (row, pos), life in lives.items():
        drawn, seen, most = [], [], (-1.0, None)
        for step, weights in enumerate(steps):
            query = prompt - 1 + step
            if not pos < query:  # not there yet, or the query itself
                continue
            null = 1 / int(grown[row, : query + 1].sum())
            shares = weights[row, :, :, pos].amax(dim=1)  # [layer]
            seen.append(step)
            drawn += [step] if float(shares.max()) - null >= draws else []
            if float(shares.max()) > most[0]:
                most = (float(shares.max()), (step, int(shares.argmax())))
        assert life.layers == tuple(flagged[row, :, pos].nonzero().flatten().tolist())
        assert life.born_step == max(0, pos - prompt + 1)
        assert life.kind == (
            "generated" if pos >= prompt else "L" if sample.tokens.image[row, pos] >= 0 else "text"
        )
        assert (life.drawn_steps, life.seen_steps) == (len(drawn), len(seen))
        assert life.last_step == (drawn[-1] if drawn else None)
        assert life.seen_until == (seen[-1] if seen else None)
        if not seen:
            assert life.fate == "not read"
            assert math.isnan(life.max_mass)
            continue
        assert life.max_mass == pytest.approx(most[0], abs=1e-5)
        assert life.at == most[1]
        assert life.null == pytest.approx(1 / int(grown[row, : prompt + life.at[0]].sum()))
        want = "draws nothing" if not drawn else "alive" if drawn[-1] == seen[-1] else "dead"
        assert life.fate == want
        by_step = trace.by_step()[row, :, pos]
        assert float(by_step[life.at[0]]) == pytest.approx(life.max_mass)
        assert by_step.isnan().sum() == NEW - len(seen)


def test_all_fates_occur(tiny, batch) -> None:
    """Else the test above would not have looked at them."""
    lvlm = tiny("llava-clip-llama")
    fates = set()
    for draws in (0.02, 0.05, 0.2):
        trace = ss.trace_generation(
            lvlm, batch(lvlm), ss.detectors.Norm(0.1), draws=draws, **options(lvlm)
        )
        fates |= {life.fate for life in trace.lives}
        table = trace.to_dataframe()
        assert table["fate"].tolist() == [life.fate for life in trace.lives]
        assert table["born_step"].max() == NEW - 1
    assert fates == {"alive", "dead", "draws nothing", "not read"}


@pytest.fixture(scope="module")
def planted():
    made = plant("clip", v_sinks=(9, 46), l_sinks=(20, 46), l_layer=1)
    return made, ss.LVLM(made.model, made.processor)


def said(lvlm, sample, words):
    """Options that make the model say these tokens."""
    prompt = sample.tokens.ids.shape[1]
    return {
        "max_new_tokens": len(words),
        "prefix_allowed_tokens_fn": lambda row, ids: [words[len(ids) - prompt]],
    }


def test_a_planted_sink_is_born_in_the_answer(planted) -> None:
    """The BOS token spikes wherever it stands; in the answer it stands third."""
    made, lvlm = planted
    sample = lvlm.prepare(inputs=made.inputs())
    prompt, bos = sample.tokens.ids.shape[1], made.processor.tokenizer.bos_token_id
    words = [40, 41, bos, 42, 43, 44]
    rule = ss.detectors.SinkDimensions(made.truth.l_dims, 5.0)
    v_rule = ss.detectors.SinkDimensions(made.truth.v_dims, 5.0)
    found = ss.trace_sinks(lvlm, sample, v_rule, rule)
    trace = ss.trace_generation(lvlm, sample, rule, trace=found, **said(lvlm, sample, words))
    assert trace.sequences[0, prompt:].tolist() == words
    (born,) = [life for life in trace.lives if life.kind == "generated"]
    assert (born.pos, born.born_step, born.word) == (prompt + 2, 3, "<s>")
    assert born.layers == (2, 3, 4, 5)
    assert born.fate == "alive"
    assert (born.drawn_steps, born.seen_steps) == (2, 2)
    assert born.max_mass > 0.3
    patch = {r.pos: r.row * 8 + r.column for r in found.records if r.image == 0}
    kinds = {kind: [] for kind in ("V", "L", "text")}
    for life in trace.lives:
        if life.kind != "generated":
            kinds[life.kind].append(patch.get(life.pos, life.pos))
            assert life.born_step == 0
    assert kinds == {"V": [9, 46], "L": [20], "text": [0]}
    assert torch.equal(trace.flags[..., :prompt], found.l_detection.mask)
    without = ss.trace_generation(lvlm, sample, rule, **said(lvlm, sample, words))
    assert {patch.get(life.pos) for life in without.lives if life.kind == "L"} == {20, 46}
    assert repr(trace) == "GenerationTrace(6 steps; sinks: 5 alive; rule given)"


def test_the_default_rule_finds_in_the_prompt_what_trace_sinks_does(planted) -> None:
    made, lvlm = planted
    sample = lvlm.prepare(inputs=made.inputs())
    trace = ss.trace_generation(lvlm, sample, max_new_tokens=2)
    found = ss.trace_sinks(lvlm, sample)
    assert torch.equal(trace.flags[..., : sample.tokens.ids.shape[1]], found.l_detection.mask)
    assert trace.chosen == "calibrated on the prompt"


def test_a_model_without_sinks_has_none() -> None:
    free = sink_free()
    lvlm = ss.LVLM(free.model, free.processor)
    trace = ss.trace_generation(lvlm, lvlm.prepare(inputs=free.inputs()), max_new_tokens=3)
    assert trace.lives == ()
    assert len(trace.to_dataframe()) == 0
    assert "fate" in trace.to_dataframe().columns
    assert repr(trace).startswith("GenerationTrace(3 steps; sinks: none; ")


def test_one_token_is_one_pass(tiny) -> None:
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(32, 32, 0), text="what")
    trace = ss.trace_generation(lvlm, sample, ss.detectors.Norm(0.1), max_new_tokens=1)
    assert trace.n_steps == 1
    assert "generated" not in {life.kind for life in trace.lives}
    assert trace.lives[-1].fate == "not read"  # the last token of the prompt
    assert trace.words[0][:-1] == sample.tokens.words[0]


def test_remote_local_equals_local(tiny) -> None:
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(32, 32, 0), text="what")
    rule = ss.detectors.Massive(0.0, 5.0)
    here, there = (
        ss.trace_generation(lvlm, sample, rule, max_new_tokens=3, remote=where)
        for where in (False, "local")
    )
    assert here.lives == there.lives
    assert torch.equal(here.mass_max.nan_to_num(), there.mass_max.nan_to_num())


def test_wrong_use_is_explained(planted) -> None:
    made, lvlm = planted
    sample = lvlm.prepare(inputs=made.inputs())
    rule = ss.detectors.SinkDimensions(made.truth.l_dims, 5.0)
    for draws in (0.0, 1.0, -0.5):
        with pytest.raises(InputError, match=f"Got draws={draws}; expected .*It is a share"):
            ss.trace_generation(lvlm, sample, rule, draws=draws)
    for bad in (ss.detectors.Received(), ss.detectors.CosineToBOS()):
        with pytest.raises(DetectorError, match="does not judge a token by its own state"):
            ss.trace_generation(lvlm, sample, bad)
    with pytest.raises(DetectorError, match="as detector; expected an object such as"):
        ss.trace_generation(lvlm, sample, "massive")
    other = lvlm.prepare(inputs=made.inputs(["USER: <image>\nwhat ? ASSISTANT:"]))
    found = ss.trace_sinks(lvlm, other, rule, rule)
    with pytest.raises(InputError, match="Got a trace of another sample"):
        ss.trace_generation(lvlm, sample, rule, trace=found)

"""Sinks judged in the edited pass: VAR's released code in plain torch, and every edit that may judge live."""

import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import sinkscope as ss
from sinkscope import baselines, detectors
from sinkscope.errors import InterventionError, NoEffectError
from sinkscope.experiments import EditSinks, RandomControl, effect_conditions
from sinkscope.interventions import ImageCentric, LiveRule
from sinkscope.testing import check_intervention, random_image, tiny_llava
from tests.interventions.test_exact import off

DIMS, TAU, P, RHO, SUMM = (3, 17), 1.3, 0.6, 0.5, 0.2
RULE = detectors.SinkDimensions(DIMS, TAU)
LAYERS = 6


def build(dtype=torch.float32, kernel="sdpa"):
    return tiny_llava("clip", "llama", layers=LAYERS, attn_implementation=kernel, dtype=dtype)


@pytest.fixture(scope="module")
def lvlm():
    return ss.LVLM(*build())


@pytest.fixture(scope="module")
def sample(lvlm, batch):
    return batch(lvlm)


@pytest.fixture(scope="module")
def trace(lvlm, sample):
    out = ss.trace_sinks(lvlm, sample, detectors.Norm(100.0), RULE)
    assert (out.l_sinks() & (sample.tokens.image >= 0)[:, None]).any(2).all(), (
        "else nothing is edited"
    )
    return out


# ------------------------------------------------------------------- the released code of 2503.03321


class Released:
    """VAR's released procedure (seilk/VisAttnSink, 98e62d6) on a plain model, for one row without padding.

    A hook before every block from 2 on finds the sinks in what the block reads, on the prompt only. The
    attention function of the model's file moves weight in rows behind the image, or in the decode step's row.
    """

    def __init__(self, model, image, last=True, dims=DIMS, tau=TAU):
        self.decoder, self.image, self.sinks = model.get_decoder(), image, {}
        self.dims, self.tau = list(dims), tau
        self.stop = len(self.decoder.layers) - (not last)

    def find(self, layer, args, kwargs):
        states = (args[0] if args else kwargs["hidden_states"]).float()[0]
        if len(states) > 1:
            normed = states * (states.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
            peaks = normed[:, self.dims].abs().amax(-1)
            self.sinks[layer] = (peaks > self.tau).nonzero().flatten()

    def attend(self, module, query, key, value, attention_mask=None, scaling=None, **_):
        share, layer = query.shape[1] // key.shape[1], module.layer_idx
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        logits = query @ key.transpose(2, 3) * scaling
        if attention_mask is not None:
            logits = logits + attention_mask[..., : key.shape[2]]
        weights = logits.softmax(-1)
        if 2 <= layer < self.stop:
            weights = self.moved(weights, self.sinks[layer])
        return (weights @ value).transpose(1, 2).contiguous(), weights

    def moved(self, weights, sinks):
        out, one_query = weights.clone(), weights.shape[2] == 1
        of_image = [int(i) for i in sinks if i in self.image]
        rows = (
            range(weights.shape[2])
            if one_query
            else range(int(self.image[-1]) + 1, weights.shape[2])
        )
        aim = [int(i) for i in self.image if i not in sinks]
        for head in range(weights.shape[1]):
            for i in rows if of_image else ():
                row = weights[0, head, i]
                portion = row[of_image].sum() / (row[self.image] + 1e-6).sum()
                if portion <= RHO and row[self.image].sum() >= SUMM:
                    out[0, head, i, sinks] *= P
                    budget = (1 - P) * row[sinks].sum()
                    out[0, head, i, aim] += budget * row[aim] / row[aim].sum()
        return out

    @contextmanager
    def on(self):
        home, hooks = sys.modules[type(self.decoder.layers[0].self_attn).__module__], []
        before, home.eager_attention_forward = home.eager_attention_forward, self.attend
        for at, block in enumerate(self.decoder.layers):
            hooks.append(
                block.register_forward_pre_hook(
                    lambda m, args, kwargs, at=at: self.find(at, args, kwargs), with_kwargs=True
                )
            )
        try:
            yield
        finally:
            home.eager_attention_forward = before
            for hook in hooks:
                hook.remove()


def by_hand(lvlm, sample, steps=3, **how):
    """Logits ``[batch step vocab]`` of greedy answers of the released code, row by row."""
    twin, out = build(kernel="eager")[0].eval(), []
    for b, live in enumerate(sample.tokens.live):
        first = int((sample.tokens.vision.batch_row < b).sum())
        many = int((sample.tokens.vision.batch_row == b).sum())
        ids = sample.tokens.ids[b, live][None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["pixel_values"] = sample.inputs["pixel_values"][first : first + many]
        image = (sample.tokens.image[b, live] >= 0).nonzero().flatten()
        with Released(twin, image, **how).on():
            told = twin.generate(
                **inputs,
                max_new_tokens=steps,
                min_new_tokens=steps,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                suppress_tokens=None,
            )
        out.append(torch.stack(told.logits, dim=1)[0])
    return torch.stack(out)


def answered(lvlm, sample, edit, steps=3):
    out = lvlm.generate(sample, [], [edit], max_new_tokens=steps, min_new_tokens=steps)
    return torch.stack([step.logits[:, -1] for step in out.steps], dim=1), out


def test_var_live_is_the_released_code_in_a_padded_batch_and_while_decoding(lvlm, sample, trace):
    live = ss.Redistribute.var_code(trace, rule="live")
    assert live.layers == (2, 3, 4, 5), "the released code edits the last block too"
    got, out = answered(lvlm, sample, live)
    want = by_hand(lvlm, sample)
    assert off(got, want) < 1e-5
    effect = out.steps[0].effects[live]
    assert (effect.extra["entered"] + effect.extra["left"])[:, 1:].any(), "else both rules are one"
    assert not (effect.extra["entered"] + effect.extra["left"])[:, 0].any()
    frozen, _ = answered(lvlm, sample, ss.Redistribute.var_code(trace))
    short, _ = answered(lvlm, sample, replace(live, layers=(2, 3, 4)))
    assert (frozen - want).abs().max() > 1e-2
    assert (short - want).abs().max() > 1e-2
    assert off(short, by_hand(lvlm, sample, last=False)) < 1e-5
    again = baselines.var("code", rule="live")(trace)
    assert torch.equal(answered(lvlm, sample, *again)[0], got)


# ------------------------------------------------------------------------------ every edit, both rules

SCORES = ss.SinkDimensionScores(DIMS)
EDITS = {
    "mask": lambda tokens: ss.MaskKeys(tokens),
    "mask heads, decode only": lambda tokens: ss.MaskKeys(tokens, [1, 4], heads=[0, 3], steps="decode"),
    "keys": lambda tokens: ss.ScaleKeys(tokens, 0.3),
    "weights": lambda tokens: ss.ScaleAttention(tokens, 3.0),
    "weights, rest kept": lambda tokens: ss.ScaleAttention(tokens, 0.5, [2, 3, 4], renormalize=False),
    "knockout": lambda tokens: ss.AttentionKnockout("last", tokens),
    "zero": lambda tokens: ss.AblateValues(tokens),
    "mean": lambda tokens: ss.AblateValues(tokens, "mean"),
    "tensor": lambda tokens: ss.AblateValues(tokens, torch.ones(1)),
    "from text": lambda tokens: ss.Redistribute("text", tokens, 0.5),
}  # fmt: skip


def flagged(run, tokens, among):
    """What the rule flags in a run, ``[batch layer pos]``, from the scores of the same pass."""
    return (run[SCORES].scores.nan_to_num() > TAU) & among[:, None] & tokens.live[:, None]


@pytest.mark.parametrize("name", EDITS)
def test_a_live_rule_is_the_mask_of_its_own_pass(lvlm, sample, trace, name):
    """A state edit that is listed behind, at the same site, is judged too."""
    tokens = sample.tokens
    among = tokens.image >= 0
    first = among & (among.cumsum(1) == 1)
    more = ss.AblateActivations([3], first, 40.0, [2], site="resid_pre")
    live = EDITS[name](LiveRule(RULE, among, trace.l_detection.mask))
    run = lvlm.run(sample, [SCORES], [replace(live, allow_noop=True), more])
    mask = flagged(run, tokens, among)
    fixed = EDITS[name](mask)
    how = {"max_new_tokens": 3, "min_new_tokens": 3}
    got = lvlm.generate(sample, [], [live, more], **how)
    want = lvlm.generate(sample, [], [fixed, more], **how)
    for one, other in zip(got.steps, want.steps, strict=True):
        assert torch.equal(one.logits, other.logits)
        if fixed not in other.effects:
            continue
        effect, plain = one.effects[live], other.effects[fixed]
        assert torch.equal(effect.rows, plain.rows)
        layers = [site.layer for site in effect.sites]
        before = trace.l_detection.mask & among[:, None]
        counts = {"live": mask, "frozen": before, "entered": mask & ~before, "left": before & ~mask}
        for key, tokens_of in counts.items():
            assert torch.equal(effect.extra[key], tokens_of[:, layers].sum(2)), key
        assert effect.to_dataframe()["left"].sum() == effect.extra["left"].sum()
    assert mask[:, 2][first].all(), "what the later edit wrote at that site was not judged"


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava-siglip-qwen3", "gemma3", "qwen2.5-vl"])
def test_other_models_and_half_precision(tiny, batch, family, kernel):
    for dtype in (torch.float32, torch.bfloat16):
        lvlm = tiny(family, kernel, dtype)
        sample = batch(lvlm)
        among = sample.tokens.image >= 0
        rule = LiveRule(detectors.SinkDimensions(DIMS, TAU), among)
        lives = [
            ss.MaskKeys(rule, steps="prefill"),
            ss.Redistribute(rule, among, 0.5, select=ImageCentric(rule)),
        ]
        for live in lives:
            run = lvlm.run(sample, [SCORES], [live])
            mask = flagged(run, sample.tokens, among)
            tokens = {"tokens": mask} if live is lives[0] else {
                "source": mask, "target": among[:, None] & ~mask, "select": ImageCentric(mask)
            }  # fmt: skip
            fixed = lvlm.run(sample, interventions=[replace(live, **tokens)])
            assert torch.equal(run.logits, fixed.logits)
            there = lvlm.run(sample, interventions=[live], remote="local", logits="all")
            assert torch.equal(there.logits, run.logits)


@pytest.mark.parametrize("make", [ss.MaskKeys, ss.AblateValues])
def test_an_edit_with_a_live_rule_keeps_its_contract(lvlm, sample, make):
    check_intervention(lambda: make(LiveRule(RULE, "image"), layers=[1, 2, 4]), lvlm, sample)


def test_limits_judge_each_layer_by_its_own_number(lvlm, sample):
    limits = detectors.Limits("channels", [1e9, 1.5, float("inf"), 1.6, 1.7, 1.8], DIMS)
    edit = ss.MaskKeys(LiveRule(limits))
    run = lvlm.run(sample, [SCORES], [edit])
    limit = torch.tensor([1e9, 1.5, float("inf"), 1.6, 1.7, 1.8])[None, :, None]
    want = (run[SCORES].scores.nan_to_num() >= limit) & sample.tokens.live[:, None]
    assert torch.equal(run.effects[edit].extra["live"], want.sum(2))
    assert set(run.effects[edit].extra) == {"live"}


@pytest.mark.parametrize("preset", ["var_paper", "var_code"])
def test_a_live_preset_is_the_frozen_one_with_the_masks_of_its_pass(lvlm, sample, trace, preset):
    make, visual = getattr(ss.Redistribute, preset), (sample.tokens.image >= 0)[:, None]
    live, frozen = (make(trace, p=0.8, rho=0.4, rule=rule) for rule in ("live", "frozen"))
    run = lvlm.run(sample, [SCORES], [live])
    mask = flagged(run, sample.tokens, sample.tokens.live)
    select = replace(frozen.select, visual_sinks=mask & visual)
    fixed = replace(frozen, source=mask, target=visual & ~mask, select=select)
    assert torch.equal(run.logits, lvlm.run(sample, [], [fixed]).logits)
    assert not torch.equal(run.logits, lvlm.run(sample, [], [frozen]).logits)


# ------------------------------------------------------------------------------- kinds, refusals, reports


@pytest.mark.parametrize("kind", ["L-sinks", "text sinks"])
@pytest.mark.parametrize("edit", ["mask", "halve", "mean value"])
def test_edit_sinks_live(lvlm, sample, trace, kind, edit):
    (live,), (frozen,) = EditSinks(kind, edit, rule="live")(trace), EditSinks(kind, edit)(trace)
    run = lvlm.run(sample, [SCORES], [live])
    visual = sample.tokens.image >= 0
    among = visual & ~trace.v_sinks if kind == "L-sinks" else sample.tokens.live & ~visual
    same = lvlm.run(sample, [], [replace(frozen, tokens=flagged(run, sample.tokens, among))])
    assert torch.equal(run.logits, same.logits)
    assert not torch.equal(run.logits, lvlm.run(sample, [], [frozen]).logits)
    assert effect_conditions(rule="live")["mask L-sinks"] == EditSinks("L-sinks", rule="live")
    assert effect_conditions(rule="live")["mask V-sinks"] == EditSinks("V-sinks")


def test_a_rule_that_flags_nothing_in_the_pass_is_refused(lvlm, sample, trace):
    clear = ss.AblateActivations(DIMS, "all", "zero", site="resid_pre")
    live = ss.Redistribute.var_code(trace, rule="live")
    with pytest.raises(NoEffectError, match="flagged no token in the edited pass"):
        lvlm.run(sample, [], [clear, live])
    run = lvlm.run(sample, [], [clear, replace(live, allow_noop=True)])
    assert torch.equal(run.logits, lvlm.run(sample, [], [clear]).logits)
    (effect,) = (effect for it, effect in run.effects.items() if it is not clear)
    assert not effect.extra["live"].any()
    assert torch.equal(effect.extra["left"], effect.extra["frozen"])


def test_what_cannot_be_judged_live_says_so(lvlm, sample, trace):
    whole = ss.trace_sinks(lvlm, sample)  # the gap rule
    mask = LiveRule(RULE)
    cases = [
        (lambda: lvlm.run(sample, [], [ss.MaskKeys(LiveRule(whole.rules.l_rule))]), "The gap rule"),
        (
            lambda: lvlm.run(sample, [], [ss.MaskKeys(LiveRule(detectors.Received()))]),
            "state, because",
        ),
        (
            lambda: lvlm.run(sample, [], [ss.MaskKeys(LiveRule(detectors.SinkDimensions))]),
            "state, beca",
        ),
        (lambda: lvlm.run(sample, [], [ss.MaskKeys(LiveRule(3))]), "state, because"),
        (lambda: lvlm.run(sample, [], [ss.MaskKeys(mask, tower="vision")]), "in the decoder"),
        (lambda: lvlm.run(sample, [], [ss.AblateActivations([1], mask)]), "before the pass"),
        (
            lambda: lvlm.run(sample, [], [ss.interventions.ScaleTokens(mask, 2.0)]),
            "before the pass",
        ),
        (
            lambda: lvlm.run(sample, [], [ss.AblateValues(mask, "resample")]),
            "for a LiveRule; expected 'zero'",
        ),
        (lambda: RandomControl(ss.MaskKeys(mask)).draws(trace), "inside the pass"),
        (lambda: EditSinks("V-sinks", rule="live"), "kind='V-sinks'; expected rule='frozen'"),
        (lambda: EditSinks("L-sinks", control=True, rule="live"), "control=True"),
        (lambda: EditSinks("L-sinks", "resample value", rule="live"), "resample value"),
        (
            lambda: baselines.random_tokens(baselines.var(rule="live"))(trace),
            "random tokens in the place",
        ),
    ]
    for make, said in cases:
        with pytest.raises(InterventionError, match=said):
            make()
    narrow = detectors.Limits("channels", [1.5] * 5, DIMS)
    for rule in (narrow, detectors.VisionTokens("cls"), detectors.SinkDimensions((3, 64), 1.3)):
        with pytest.raises(ss.errors.SinkscopeError, match=r"5 limits|no such tokens|Got .*64"):
            lvlm.run(sample, [], [ss.MaskKeys(LiveRule(rule))])
    every = LiveRule(detectors.SinkDimensions(DIMS, 1e-9, strict=False))
    with pytest.raises(NoEffectError, match="touched no row"):  # no token is left for a mean
        lvlm.run(sample, [], [ss.AblateValues(every, "mean")])
    for make in (
        lambda: ss.Redistribute.var_code(trace, rule="lively"),
        lambda: baselines.var(rule="lively"),
        lambda: EditSinks("L-sinks", rule="lively"),
        lambda: effect_conditions(rule="lively"),
    ):
        with pytest.raises(ss.errors.SinkscopeError, match="'frozen', 'live'"):
            make()


def test_a_prompt_without_visual_sinks_has_no_effect_live_either(lvlm):
    sample = lvlm.prepare(images=random_image(48, 48, 0), text="what is it")
    none = detectors.SinkDimensions(DIMS, 7.9)
    found = ss.trace_sinks(lvlm, sample, detectors.Norm(100.0), none)
    assert not found.l_detection.mask.any()
    edit = ss.Redistribute.var_code(found, rule="live")
    assert torch.equal(lvlm.run(sample, [], [edit]).logits, lvlm.run(sample).logits)
    assert EditSinks("L-sinks", rule="live")(found) == []

"""check_model finds nothing wrong on models of three families, and every fault that is made on purpose."""

from dataclasses import replace

import pytest
import torch

import sinkscope as ss
from sinkscope.kernels.residual import lens
from sinkscope.models import LVLM
from sinkscope.testing import ModelCheck, check_model, checking, references, tiny_llava
from sinkscope.testing.claims import PLAN

FAMILIES = ("llava-clip-llama", "qwen2.5-vl", "gemma3")
BOTH = ("vision", "language")


def outcome(check, *statuses):
    """Names and towers of the checks with one of some statuses."""
    return {(one.name, one.tower) for one in check.checks if one.status in statuses}


def state_of(model):
    """What a check could leave behind in a model: modes, kernels, attributes of modules, hooks."""
    out = []
    for module in model.modules():
        own = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        config = vars(own.get("config", object)).get("_attn_implementation_internal")
        out.append((sorted(own), module.training, config, len(module._forward_hooks)))
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_wrong_on_a_padded_batch_and_the_model_is_left_alone(
    tiny, batch, family
) -> None:
    lvlm = tiny(family)
    sample, model = batch(lvlm), lvlm.module
    plain = lvlm.run(sample).logits  # and what transformers installs at the first pass
    model.model.language_model.train()
    before = state_of(model)
    check = check_model(lvlm, sample)
    assert state_of(model) == before
    model.eval()
    assert torch.equal(lvlm.run(sample).logits, plain)
    assert not outcome(check, "no", "wrong", "approximate"), str(check)
    assert len(check.checks) == sum(len(towers) for _, _, _, *towers in PLAN.values())
    assert check.wrong == ()
    assert check.status("mass", "vision") == check.status("map") == "exact"


def test_half_precision_is_approximate_and_never_wrong(tiny, batch) -> None:
    lvlm = tiny("qwen2.5-vl", dtype=torch.bfloat16)
    check = check_model(lvlm, batch(lvlm))
    assert not outcome(check, "no", "wrong"), str(check)
    rounded = {name for name, _ in outcome(check, "approximate")}
    assert rounded == {*PLAN} - {"logits", "tokens", "map", "states", "trace_sinks"}


def test_a_sample_is_made_with_the_processor_only(tiny) -> None:
    lvlm = tiny("llava-clip-llama")
    assert check_model(lvlm, seed=3).wrong == ()
    with pytest.raises(ss.errors.InputError, match="has no processor"):
        check_model(LVLM(lvlm.module, None))
    with pytest.raises(ss.errors.InputError, match="Got seed='a'"):
        check_model(lvlm, seed="a")
    with pytest.raises(ss.errors.InputError, match="expected LVLM"):
        check_model(lvlm.module)


def test_what_is_printed_has_versions_and_no_path(tmp_path) -> None:
    lvlm = LVLM(*tiny_llava())
    lvlm.name = str(tmp_path)
    check = check_model(lvlm)
    table, _, block = str(check).partition("```text\n")
    assert [line.split()[0] for line in table.splitlines() if "exact" in line][:2] == [
        "logits",
        "tokens",
    ]
    assert str(tmp_path.parent) not in str(check)
    assert tmp_path.name in block
    for part in ("LlavaForConditionalGeneration (llava)", "torch", "cpu, float32", "language sdpa"):
        assert part in block
    assert len(check.to_dataframe()) == len(check.checks)
    kept = ss.results.load(check.save(tmp_path / "check"))
    assert isinstance(kept, ModelCheck)
    assert str(kept) == str(check)
    with pytest.raises(ss.errors.ModelError, match="'masses'"):
        check.status("masses")


def scaled(kind, field, factor=1.05, when=lambda it: True):
    """A probe whose numbers are off by a factor."""
    plain = kind.finish

    def finish(self, answers, context):
        out = plain(self, answers, context)
        return replace(out, **{field: getattr(out, field) * factor}) if when(self) else out

    return kind, "finish", finish


def another_key(kind):
    """An edit of the tokens beside the chosen ones."""
    plain = kind.edits
    return kind, "edits", lambda self, c: plain(replace(self, tokens=self.tokens.roll(1, -1)), c)


def bare_lens(states, state, norm, **given):
    return lens(states, state, torch.nn.Identity(), **given)


def raw(self, context):
    raise AttributeError("no_such_thing")


def answers_else(self, *args, **kwargs):
    out = LVLM_GENERATE(self, *args, **kwargs)
    return replace(out, sequences=out.sequences.roll(1, -1))


LVLM_GENERATE = LVLM.generate
at = {site: lambda it, site=site: it.site == site for site in ("attn_out", "resid_post")}
SITES = ss.probes.ResidualStates
FAULTS = {
    "mass": (
        scaled(ss.AttentionMass, "mass"),
        {("mass", t) for t in BOTH} | {("generation", "language")},
    ),
    "received": (scaled(ss.ReceivedAttention, "received"), {("received", t) for t in BOTH}),
    "attn_out": (scaled(SITES, "states", 1.01, at["attn_out"]), {("additions", t) for t in BOTH}),
    "resid_post": (
        scaled(SITES, "states", 1.01, at["resid_post"]),
        {(name, t) for t in BOTH for name in ("states", "additions")},
    ),
    "contributions": (
        scaled(ss.ContributionNorms, "norms"),
        {("contributions", t) for t in BOTH},
    ),
    "lens": ((ss.LogitLens, "kernel", staticmethod(bare_lens)), {("lens", "language")}),
    "masked": (another_key(ss.MaskKeys), {("mask keys", t) for t in BOTH}),
    "scaled": (another_key(ss.ScaleKeys), {("scale keys", t) for t in BOTH}),
    "ablated": (another_key(ss.AblateValues), {("value edits", t) for t in BOTH}),
    "answer": ((LVLM, "generate", answers_else), {("generation", "language")}),
    "raw": ((ss.LogitLens, "_parameters", raw), {("lens", "language")}),
}


@pytest.mark.parametrize(("fault", "family"), list(zip(FAULTS, 4 * FAMILIES, strict=False)))
def test_a_fault_is_found_by_its_name(tiny, batch, monkeypatch, fault, family) -> None:
    lvlm = tiny(family)
    sample = batch(lvlm)
    where, expected = FAULTS[fault]
    monkeypatch.setattr(*where)
    check = check_model(lvlm, sample)
    assert outcome(check, "wrong") == expected, str(check)
    assert not outcome(check, "no")
    if fault == "raw":
        assert "AttributeError: no_such_thing" in check.wrong[0].why


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_map_is_found(tiny, batch, monkeypatch, family) -> None:
    lvlm = tiny(family)
    few = {name: PLAN[name] for name in ("tokens", "map", "trace_sinks")}
    monkeypatch.setattr(checking, "PLAN", few)
    sample = batch(lvlm)
    tokens = sample.tokens
    sources, image = tokens.sources.clone(), tokens.image.clone()
    row = tokens.image_index == 1
    sources[row] = tokens.sources[row].flip(0)
    check = check_model(lvlm, replace(sample, tokens=replace(tokens, sources=sources)))
    assert ("map", "language") in outcome(check, "wrong")
    assert outcome(check, "wrong") <= {("map", "language"), ("trace_sinks", "language")}
    image[tuple(row.nonzero()[0])] = -1
    check = check_model(lvlm, replace(sample, tokens=replace(tokens, image=image)))
    assert ("tokens", "language") in outcome(check, "wrong")
    gone = replace(sample, tokens=replace(tokens, sources=torch.full_like(sources, -1)))
    without = next(one for one in check_model(lvlm, gone).checks if one.name == "map")
    assert without.status == "no"
    assert "no map" in without.why


def test_a_layer_that_is_refused_is_named(tiny, batch, monkeypatch) -> None:
    lvlm = tiny("llava-clip-llama")
    monkeypatch.setattr(
        ss.ReceivedAttention, "_parameters", _refusing(ss.ReceivedAttention._parameters)
    )
    check = check_model(lvlm, batch(lvlm))
    found = {one.tower: one for one in check.checks if one.name == "received"}
    for tower in BOTH:
        assert found[tower].status == "exact"
        assert found[tower].why == "not in layers [1]: Got layer 1; expected another"
    assert check.wrong == ()


def _refusing(plain):
    def parameters(self, context):
        if self.layers is not None and 1 in self.layers:
            raise ss.errors.ProbeError("Got layer 1; expected another. Write layers=[0].")
        return plain(self, context)

    return parameters


def test_references_that_fail_are_no_fault_of_the_model(tiny, batch) -> None:
    lvlm = tiny("gemma3")
    sample, model = batch(lvlm), lvlm.module
    before = state_of(model)

    def note(path, weights, mask):
        raise RuntimeError("in the middle")

    path = lvlm.anatomy.language.attention[1]
    home = type(model.get_submodule(path)).forward.__globals__
    plain = home["eager_attention_forward"]
    with (
        pytest.raises(references.UncheckedError, match="RuntimeError: in the middle"),
        references.eager(model, [path], note),
    ):
        model(**sample.inputs)
    assert state_of(model) == before
    assert home["eager_attention_forward"] is plain

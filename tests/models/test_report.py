"""The report says what is there and what works, and why not; what it says is true."""

import dataclasses

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import ModelError, SinkscopeError
from sinkscope.models.replay import capture
from sinkscope.models.report import RULES
from sinkscope.testing import TINY, random_image, tiny_llava
from tests.models.test_anatomy import without_interface
from tests.probes.everything import every_probe, exported

FAMILIES = tuple(TINY)


def facts(lvlm):
    return dict(lvlm.report().facts)


def test_every_public_probe_and_edit_is_judged_by_what_it_needs(tiny):
    """And every need is somebody's: no room above names a probe or an edit."""
    edits = [getattr(ss.interventions, name) for name in ss.interventions.__all__]
    edits = [kind for kind in edits if hasattr(kind, "edits") and hasattr(kind, "needs")]
    assert len(edits) >= 12
    assert set(RULES) == {kind.needs for kind in (*exported(), *edits, ss.LSG)}
    report = tiny(FAMILIES[0]).report()
    assert {one.name for one in report.probes} == {kind.__name__ for kind in exported()}
    assert {one.name for one in report.edits} == {kind.__name__ for kind in (*edits, ss.LSG)}


@dataclasses.dataclass(frozen=True, eq=False)
class Mine(ss.TokenNorms):
    """A probe of the user's own, which needs more than states."""

    needs = "masses"


def test_a_new_probe_is_reported_without_a_change_of_the_report(monkeypatch, tiny):
    monkeypatch.setattr(ss.probes, "Mine", Mine, raising=False)
    monkeypatch.setattr(ss.probes, "__all__", [*ss.probes.__all__, "Mine"])
    report = changed(learned_sink=True)
    assert report.verdict("Mine") == dataclasses.replace(
        report.verdict("AttentionMass"), name="Mine"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_to_work_works_and_the_rest_does_not(tiny, family):
    lvlm = tiny(family)
    report = lvlm.report()
    sample = lvlm.prepare(images=random_image(), text="what")
    for probe in every_probe():
        said = report.verdict(type(probe).__name__, probe.tower)
        assert said.status in ("exact", "unavailable")
        lvlm.run(sample, [probe])
    with pytest.raises(SinkscopeError, match="vision tower has no LM head"):
        lvlm.run(sample, [ss.LogitLens(tower="vision")])
    assert report.verdict("LogitLens", "vision").why == "the vision tower has no LM head"


def test_anatomy_of_llava_in_words(tiny):
    clip = facts(tiny("llava-clip-llama"))
    assert clip["vision"] == "3 blocks of width 48, 4 heads of 12, patches of 8 pixels, CLS first"
    assert clip["projector"] == "model.multi_modal_projector, reads vision block 1, CLS dropped"
    assert clip["language"].startswith("3 blocks of width 64, 4 heads of 16 on 2 key-value heads")
    assert clip["language attention"] == "sdpa"
    assert clip["image token"] == "id 4"
    assert clip["head"] == "lm_head, after model.language_model.norm"
    assert clip["parameters"].endswith("k, float32 on cpu")
    siglip = facts(tiny("llava-siglip-qwen2"))
    assert siglip["vision"].endswith("no CLS")
    assert siglip["projector"] == "model.multi_modal_projector, reads vision block 2"


def test_anatomy_of_qwen_in_words(tiny):
    qwen = facts(tiny("qwen2.5-vl"))
    packed = "sdpa, all images packed into one sequence, one call per window"
    assert qwen["vision attention"] == packed
    assert qwen["merge"] == "2 x 2 patches to one language token"
    assert qwen["vision"] == "4 blocks of width 64, 4 heads of 16, patches of 14 pixels, no CLS"


def test_verification_is_reported(tiny):
    full = tiny("llava-clip-llama")
    assert full.report().verification.startswith("yes: attention sums to 1")
    unchecked = ss.LVLM(full.module, full.processor, verify=False).report()
    assert unchecked.verification == "no: loaded with verify=False"
    bare = ss.LVLM(full.module).report()
    assert bare.verification == full.report().verification
    assert bare.notes == (
        "No processor: write lvlm.prepare(inputs=...) with inputs you made yourself.",
    )


def test_a_missing_bos_is_reported(tiny):
    assert tiny("llava-clip-llama").report().notes == ()
    (note,) = tiny("qwen2.5-vl").report().notes
    assert note == "No BOS: the selection 'bos' is empty; 'first' is each row's first token."


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.bfloat16, "bfloat16, about 6e-3"), (torch.float16, "float16, about 1e-3")],
)
def test_half_precision_is_approximate(dtype, rounding):
    module, processor = tiny_llava(dtype=dtype)
    report = ss.LVLM(module, processor, verify=False).report()
    said = report.verdict("AttentionMass")
    assert said.status == "approximate"
    assert said.why == f"rounded to {rounding}; precision='float32' is exact"
    assert report.verdict("ContributionNorms").why == f"rounded to {rounding}"
    assert report.verdict("ReceivedAttention").status == "exact"
    assert report.verdict("TokenNorms").status == "exact"


def test_flash_kernels_are_reported(tiny):
    module, _ = tiny_llava()
    module.config.text_config._attn_implementation = "flash_attention_2"
    report = ss.LVLM(module).report()
    for name in ("ReceivedAttention", "AttentionPatterns"):
        assert report.verdict(name).status == "unavailable"
        assert "flash_attention_2 has no fp32 gradient" in report.verdict(name).why
        assert report.verdict(name, "vision").status == "exact"
    assert report.verdict("AttentionMass").status == "exact"


def test_unreadable_attention_is_reported():
    report = ss.LVLM(*without_interface()).report()
    for name in ("AttentionMass", "ValueNorms", "ReceivedAttention", "HeadWrites"):
        said = report.verdict(name, "vision")
        assert said.status == "unavailable"
        assert "layers.0.self_attn (ByHand) does not call attention through" in said.why
        assert report.verdict(name).status == "exact"
    assert report.verdict("TokenNorms", "vision").status == "exact"
    patches = report.verdict("PatchActivations", "vision")
    assert patches.status == "exact"
    assert patches.why.startswith("values unavailable: ")
    assert report.verdict("PatchActivations").why == ""
    assert "ByHand" in dict(report.facts)["vision attention"]


def changed(tower="language", **fields):
    """A report on a model whose tower has other properties."""
    lvlm = ss.LVLM(*tiny_llava())
    other = dataclasses.replace(lvlm.anatomy.tower(tower), **fields)
    lvlm._anatomy = dataclasses.replace(lvlm.anatomy, **{tower: other})
    return lvlm.report()


def test_learned_sinks_are_reported():
    report = changed(learned_sink=True)
    assert "masses sum to less than 1" in report.verdict("AttentionMass").why
    assert "rows sum to less than 1" in report.verdict("AttentionPatterns").why
    assert dict(report.facts)["language attention"] == "sdpa, with a learned sink"
    assert report.verdict("AttentionMass", "vision").why == ""


def test_learned_sinks_are_found(tiny):
    module, _ = tiny_llava()
    assert not ss.LVLM(module).anatomy.language.learned_sink
    for layer in module.model.language_model.layers:
        layer.self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    anatomy = ss.LVLM(module).anatomy
    assert anatomy.language.learned_sink
    assert not anatomy.vision.learned_sink


def test_too_many_shared_heads_are_reported():
    said = changed(heads=40, kv_heads=1, proofs=()).verdict("ReceivedAttention")
    assert (said.status, said.why) == (
        "unavailable",
        "40 heads share a key-value head of 16 dimensions",
    )


def test_some_blocks_without_attention_are_reported():
    lvlm = ss.LVLM(*tiny_llava())
    lost = ss.LVLM(*without_interface()).anatomy.vision.calls[0]
    vision = lvlm.anatomy.vision
    vision = dataclasses.replace(vision, calls=(lost, *vision.calls[1:]))
    lvlm._anatomy = dataclasses.replace(lvlm.anatomy, vision=vision)
    said = lvlm.report().verdict("AttentionMass", "vision")
    assert said.status == "exact"
    assert said.why.startswith("on blocks 1-2 of 3: ")
    sample = lvlm.prepare(images=random_image(), text="what")
    with pytest.raises(SinkscopeError, match=r"Write layers=\[1, 2\] for the rest"):
        lvlm.run(sample, [ss.ValueNorms(tower="vision", layers=[0, 1, 2])])
    lvlm.run(sample, [ss.ValueNorms(tower="vision", layers=[1, 2])])


def test_the_report_as_text_table_and_html(tiny):
    report = tiny("qwen2.5-vl").report()
    text = str(report)
    assert text.splitlines()[0] == report.name
    for verdict in (*report.probes, *report.edits):
        line = next(x for x in text.splitlines() if x.startswith(verdict.name))
        assert verdict.status in line
        assert verdict.why in line
    lens = next(x for x in text.splitlines() if x.startswith("LogitLens"))
    assert lens.split() == [
        "LogitLens",
        "unavailable",
        "exact",
        "vision:",
        "the",
        "vision",
        "tower",
        "has",
        "no",
        "LM",
        "head",
    ]
    assert text.endswith(report.notes[0])
    page = report._repr_html_()
    lines = (len(report.probes) + len(report.edits)) // 2
    assert page.count("<tr>") == len(report.facts) + lines + 4
    assert "<h3>" in page
    table = report.to_dataframe()
    assert list(table.columns) == ["name", "tower", "status", "why"]
    assert len(table) == len(report.probes) + len(report.edits)


def one_of_every_edit(lvlm, sample, tower):
    """An intervention of every judged class on a tower, small enough to run everywhere."""
    tokens = sample.tokens if tower == "language" else sample.tokens.vision
    places = (sample.tokens.image >= 0 if tower == "language" else tokens.live).nonzero()[1:6]
    some, other = torch.zeros_like(tokens.live), torch.zeros_like(tokens.live)
    some[tuple(places[:2].T)], other[tuple(places[2:].T)] = True, True
    at = {"layers": [0], "tower": tower}
    states = ss.probes.ResidualStates(**at)
    donor = 2 * lvlm.run(sample, [states])[states].states
    return [
        ss.MaskKeys(some, **at),
        ss.AttentionKnockout(some | other, some, **at),
        ss.ScaleKeys(some, 0.5, **at),
        ss.ScaleAttention(some, 0.5, **at),
        ss.interventions.AttentionTemperature(2.0, **at),
        ss.Redistribute(some, other, 0.5, **at),
        ss.interventions.EvictKeys(2, 3, **at),
        ss.AblateValues(some, **at),
        ss.AblateActivations([0], some, **at),
        ss.PatchActivations(donor, "resid_post", some, **at),
        ss.interventions.ScaleTokens(some, 0.5, tower=tower),
        ss.interventions.SinkToFront(some, tower=tower),
        ss.TestTimeRegister({0: [1]}, tower=tower),
    ]


def is_true(lvlm, sample, report, tower):
    """Every verdict on edits: what is exact runs and touches something, the rest is refused."""
    told = {}
    for edit in one_of_every_edit(lvlm, sample, tower):
        name = type(edit).__name__
        told[name] = report.verdict(name, tower).status
        if told[name] == "unavailable":
            with pytest.raises(SinkscopeError):
                lvlm.run(sample, interventions=[edit])
        else:
            assert lvlm.run(sample, interventions=[edit]).effects[edit].touched.all()
    assert set(told) | {"LSG"} <= {one.name for one in report.edits}
    assert report.verdict("LSG", "vision").status == "unavailable"
    return told


@pytest.mark.parametrize("tower", ["vision", "language"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_edit_that_is_said_to_work_works_and_the_rest_does_not(tiny, family, tower):
    lvlm = tiny(family)
    sample = lvlm.prepare(images=random_image(), text="what is it")
    told = is_true(lvlm, sample, lvlm.report(), tower)
    assert set(told.values()) == {"exact", "unavailable"}
    assert told["Redistribute"] == "exact"


def test_the_fine_print_of_edits_is_true(tiny):
    packed = tiny("qwen2.5-vl")
    sample = packed.prepare(images=random_image(), text="what")
    assert "without 'mean' and 'resample'" in packed.report().verdict("AblateValues", "vision").why
    with pytest.raises(SinkscopeError, match="packed vision tower"):
        packed.run(sample, interventions=[ss.AblateValues("patch", "mean", tower="vision")])
    clip = tiny("llava-clip-llama")
    sample = clip.prepare(images=random_image(), text="what")
    said = clip.report().verdict("Redistribute", "vision").why
    assert said == "select and 'after image' on the decoder only"
    some = sample.tokens.vision.live & (sample.tokens.vision.live.cumsum(1) == 3)
    edit = ss.Redistribute(some, ~some, 0.5, queries="after image", tower="vision")
    with pytest.raises(SinkscopeError, match="in the decoder only"):
        clip.run(sample, interventions=[edit])


def test_a_projector_that_reads_several_blocks_leaves_no_place_for_registers():
    module, processor = tiny_llava()
    module.config.vision_feature_layer = [-1, -3]
    projector, width = module.model.multi_modal_projector, module.config.vision_config.hidden_size
    projector.linear_1 = torch.nn.Linear(2 * width, projector.linear_1.out_features)
    lvlm = ss.LVLM(module, processor)
    sample = lvlm.prepare(images=random_image(), text="what is it")
    assert is_true(lvlm, sample, lvlm.report(), "vision")["TestTimeRegister"] == "unavailable"


@pytest.mark.parametrize("capped", [False, True])
def test_masks_that_a_flash_kernel_does_not_take_are_reported_and_refused(capped):
    module, processor = tiny_llava()
    lvlm = ss.LVLM(module, processor)
    sample = lvlm.prepare(images=random_image(), text="what is it")
    for layer in module.model.language_model.layers:
        layer.self_attn.attn_logit_softcapping = 20.0 if capped else None
    module.config.text_config._attn_implementation = "flash_attention_2"
    report = ss.LVLM(module).report()
    assert lvlm.anatomy.language.softcap == capped
    masks = {"MaskKeys", "AttentionKnockout", "ScaleAttention", "Redistribute"} if capped else set()
    edits = one_of_every_edit(tiny_twin(), sample, "language")
    for edit in edits:
        name = type(edit).__name__
        if name not in {*masks, "EvictKeys"}:
            continue
        assert report.verdict(name).status == "unavailable"
        assert "flash_attention_2 takes no" in report.verdict(name).why
        with pytest.raises(SinkscopeError, match="'flash_attention_2'; expected 'sdpa' or 'eager'"):
            lvlm.run(sample, interventions=[edit])
    for name in ("MaskKeys", "ScaleAttention", "Redistribute"):
        assert (report.verdict(name).status == "unavailable") == capped
        assert report.verdict(name, "vision").status == "exact"


def tiny_twin():
    """The same model under its own kernel."""
    return ss.LVLM(*tiny_llava())


def test_a_soft_cap_is_reported():
    assert (
        changed(softcap=True).verdict("MaskKeys").why
        == "by an explicit mask: a soft-cap would bend a bias"
    )
    assert changed(d_head=256).verdict("MaskKeys").why.endswith("256 leave no room for a bias")
    assert changed().verdict("MaskKeys").why == ""


def test_what_flex_attention_has_not_is_reported_and_refused():
    module, processor = tiny_llava(attn_implementation="flex_attention")
    assert ss.LVLM(module, processor, verify=True).verified
    lvlm = ss.LVLM(*tiny_llava())
    sample = lvlm.prepare(images=random_image(), text="what")
    lvlm.module.set_attn_implementation("flex_attention")
    report, write = lvlm.report(), r"Write lvlm.module.set_attn_implementation\('sdpa'\)"
    for probe in (ss.ReceivedAttention(), ss.AttentionPatterns(tower="vision")):
        said = report.verdict(type(probe).__name__, probe.tower)
        assert (said.status, said.why[:30]) == ("unavailable", "flex_attention has no gradient")
        with pytest.raises(
            SinkscopeError, match=f"'flex_attention', which has no gradient .*{write}"
        ):
            lvlm.run(sample, [probe])
    assert report.verdict("TestTimeRegister", "vision").status == "unavailable"
    with pytest.raises(SinkscopeError, match=f"TestTimeRegister under flex attention.*{write}"):
        lvlm.run(sample, interventions=[ss.TestTimeRegister({0: [1]})])
    with pytest.raises(ModelError, match=f"flex attention.*{write}"):
        capture(lvlm, sample.inputs)
    exact = {"AttentionMass", "EvictKeys", "MaskKeys", "AblateValues", "ContributionNorms"}
    assert {report.verdict(name).status for name in exact} == {"exact"}


def test_html_is_escaped(tiny):
    report = dataclasses.replace(tiny("qwen2.5-vl").report(), name="<script>")
    assert "<script>" not in report._repr_html_()


def test_an_unknown_probe_has_no_verdict(tiny):
    report = tiny("qwen2.5-vl").report()
    with pytest.raises(ModelError, match=r"Got 'AttentionMas' .* Did you mean 'AttentionMass'"):
        report.verdict("AttentionMas")
    with pytest.raises(ModelError, match="in the 'projector' tower"):
        report.verdict("AttentionMass", "projector")

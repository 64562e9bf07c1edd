"""Wrong uses, each refused with what came, what was expected and what to write instead."""

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import (
    InputError,
    InterventionError,
    LayerError,
    NoEffectError,
    ProbeError,
    SelectionError,
    SinkscopeError,
)
from sinkscope.testing import random_image

LLAVA, QWEN = "llava-clip-llama", "qwen2.5-vl"
NAN, INF = float("nan"), float("inf")


def states(c, layers=(0,), site="resid_post", tokens="all"):
    probe = ss.probes.ResidualStates(tokens=tokens, layers=list(layers), site=site)
    return c.lvlm.run(c.sample, probes=[probe])[probe]


def values(c, layers=(0,), **options):
    probe = ss.probes.AttentionValues(layers=list(layers), **options)
    return c.lvlm.run(c.sample, probes=[probe])[probe]


def run_with(c, *probes):
    return c.lvlm.run(c.sample, probes=probes)


def patch(c, from_run, site="resid_post", layers=(0,), **options):
    return ss.PatchActivations(from_run, site, c.some, list(layers), **options)


def one_row(c):
    """A run of one row whose prompt is as long as the batch's."""
    inputs = {name: x[1:] for name, x in c.sample.inputs.items() if x.shape[0] == 2}
    pixels = c.sample.inputs["pixel_values"][1:]
    other = c.lvlm.prepare(inputs={**inputs, "pixel_values": pixels})
    return c.lvlm.run(other, probes=[ss.probes.ResidualStates(layers=[0])])


def of_other_sample(c):
    other = c.lvlm.prepare(images=random_image(32, 32, 0), text="a")
    return other.tokens.select("image")


def per_layer_rows(c):
    return c.late[:, None].expand(-1, 3, -1)


def moves(c, **options):
    return ss.Redistribute(**{"source": c.some, "target": c.other, "recycle": 0.5, **options})


RUN = {
    # selections
    "a name nobody knows": (
        lambda c: ss.MaskKeys("imag"), SelectionError,
        r"Got the selection 'imag'; expected one of \('all', .*\) or a boolean mask. Did you mean 'image'\?",
    ),
    "a vision name nobody knows": (
        lambda c: ss.MaskKeys("patches", tower="vision"), SelectionError,
        r"Got the vision selection 'patches'.*Did you mean 'patch'\?",
    ),
    "an image that is not there": (
        lambda c: ss.MaskKeys("image:7"), SelectionError, r"'image:7'; expected one of .*'image:1'",
    ),
    "a mask of another sample": (
        lambda c: ss.MaskKeys(of_other_sample(c)), SelectionError,
        r"Got a mask of shape \(1, \d+\).*for this sample. A mask belongs to the sample it was made from",
    ),
    "a mask of the other tower": (
        lambda c: ss.MaskKeys(c.patches), SelectionError, r"Got a mask of shape \(3, 17\) in the language",
    ),
    "indices": (
        lambda c: ss.MaskKeys(c.some.nonzero()), SelectionError,
        r"dtype torch.int64.*expected torch.bool. Indices are ambiguous in a padded batch",
    ),
    "positions at padding": (
        lambda c: ss.MaskKeys([0, 9]), SelectionError, "position 0 in the language tower, which is padding in row 0",
    ),
    "a negative position": (lambda c: ss.MaskKeys(-1), SelectionError, "Got position -1 .*called 'last'"),
    "no selection": (lambda c: ss.MaskKeys(None), SelectionError, "Got a selection of type NoneType"),
    "an empty mask": (
        lambda c: ss.MaskKeys(c.some & False), NoEffectError,
        "MaskKeys was given a selection without any token; expected at least one.*allow_noop=True",
    ),
    "no BOS": (
        lambda c: ss.MaskKeys("bos"), NoEffectError,
        r"the selection 'bos' \(without a BOS token the first one is 'first'\) without any token", QWEN,
    ),
    "queries without a position": (
        lambda c: ss.MaskKeys(c.some, queries=c.some & False), NoEffectError,
        r"MaskKeys \(queries\) was given a selection without any token; expected at least one",
    ),
    "queries that differ by layer": (
        lambda c: ss.MaskKeys(c.some, queries=per_layer_rows(c)), SelectionError,
        r"Got queries of shape \(2, 3, \d+\); expected one mask for all layers, \[batch pos\]",
    ),
    "tokens no query sees": (
        lambda c: ss.MaskKeys("last", queries="first"), NoEffectError,
        r"MaskKeys touched no row in 1 forward passes.*No selected query sees the edited tokens: they come later",
    ),
    "rows that would see nothing": (
        lambda c: ss.MaskKeys("first", queries="first"), NoEffectError,
        r"the 6 that see the edited keys see nothing else, and such a row keeps its unedited output",
    ),
    # layers and heads
    "a layer beyond the last": (
        lambda c: ss.MaskKeys(c.some, layers=[3]), LayerError,
        "Got layer 3 in the language tower; expected 0 to 2",
    ),
    "a negative layer": (
        lambda c: ss.ScaleKeys(c.some, 0.5, layers=[-1]), LayerError, "never negative: write 2 for the last",
    ),
    "half a layer": (
        lambda c: ss.MaskKeys(c.some, layers=[0.5]), LayerError, "Got layer 0.5 of type float",
    ),
    "no layers": (lambda c: ss.MaskKeys(c.some, layers=[]), LayerError, "Got no layers"),
    "a head beyond the last": (
        lambda c: ss.MaskKeys(c.some, heads=[4]), InterventionError,
        "Got 4 as query head; expected 0 to 3. Write query heads, of which several",
    ),
    "a negative head": (lambda c: ss.MaskKeys(c.some, heads=[-1]), InterventionError, "Got -1 as query head;"),
    "no heads": (
        lambda c: ss.AblateValues(c.some, heads=[]), InterventionError,
        "Got no query head; expected at least one.*or None for all",
    ),
    "heads by name": (
        lambda c: ss.MaskKeys(c.some, heads="all"), InterventionError, "Got 'all' as query head; expected 0 to 3",
    ),
    "an unknown tower": (
        lambda c: ss.MaskKeys(c.some, tower="visual"), ProbeError,
        "Got tower='visual'; expected one of .'vision', 'language'.. Write tower='vision' for a ViT",
    ),
    # steps
    "unknown steps": (
        lambda c: ss.MaskKeys(c.some, steps="prefil"), InterventionError,
        r"Got steps='prefil'; expected one of \('all', 'prefill', 'decode'\). Did you mean 'prefill'\?",
    ),
    "a decode-only edit of a run": (
        lambda c: ss.MaskKeys(c.some, steps="decode"), NoEffectError,
        "MaskKeys never ran in 1 forward passes; expected at least one at steps='decode'",
    ),
    "queries at decode steps": (
        lambda c: ss.MaskKeys(c.some, queries=c.late, steps="decode"), InterventionError,
        "Got queries together with steps='decode'; expected either. Queries are prompt positions",
    ),
    "states at decode steps": (
        lambda c: ss.AblateActivations([1], c.some, steps="decode"), InterventionError,
        "Got steps='decode' for AblateActivations; expected 'prefill' or 'all'",
    ),
    # numbers
    "factor NaN": (
        lambda c: ss.ScaleKeys(c.some, NAN), InterventionError, "Got factor=nan; expected a finite number",
    ),
    "factor infinite": (
        lambda c: ss.ScaleAttention(c.some, INF), InterventionError, "Got factor=inf; expected a finite number",
    ),
    "a negative weight": (
        lambda c: ss.ScaleAttention(c.some, -0.5), InterventionError,
        "Got factor=-0.5; expected a finite number of at least 0",
    ),
    "a factor that is a word": (
        lambda c: ss.ScaleKeys(c.some, "half"), InterventionError, "Got factor='half'; expected a finite number",
    ),
    "a mask as values": (
        lambda c: ss.AblateValues(c.some, torch.tensor(True)), InterventionError, "Got a mask of True and False",
    ),
    "a factor that is a truth": (
        lambda c: ss.ScaleKeys(c.some, True), InterventionError, "Got factor=True; expected a finite number",
    ),
    "keys times one": (
        lambda c: ss.ScaleKeys(c.some, 1.0), NoEffectError,
        "ScaleKeys with 1 changes nothing; expected another value. Write allow_noop=True",
    ),
    "weights times one": (
        lambda c: ss.ScaleAttention(c.some, 1), NoEffectError, "ScaleAttention with 1 changes nothing",
    ),
    "tokens times one": (
        lambda c: ss.interventions.ScaleTokens(c.some, 1), NoEffectError, "ScaleTokens with 1 changes nothing",
    ),
    "a temperature of nothing": (
        lambda c: ss.interventions.AttentionTemperature(0.0), InterventionError,
        "Got temperature=0.0; expected a finite number above 0",
    ),
    "a temperature of one": (
        lambda c: ss.interventions.AttentionTemperature(1), NoEffectError,
        "AttentionTemperature with 1 changes nothing; expected another value",
    ),
    # redistribution
    "more than all": (
        lambda c: moves(c, recycle=1.2), InterventionError, r"Got recycle=1.2; expected a share from 0 to 1",
    ),
    "less than nothing": (
        lambda c: moves(c, recycle=-0.1), InterventionError, "Got recycle=-0.1; expected a finite number of at least 0",
    ),
    "nothing to move": (
        lambda c: moves(c, recycle=0), NoEffectError, "Redistribute with 0 changes nothing",
    ),
    "from and to the same": (
        lambda c: moves(c, target="image"), InterventionError,
        r"Got 5 tokens in both source and target; expected disjoint sets. Write target & ~source",
    ),
    "to nobody": (
        lambda c: moves(c, target=c.some & False), NoEffectError, "Redistribute was given a selection without any",
    ),
    "after the image in the ViT": (
        lambda c: ss.Redistribute(c.patches, c.few, 0.5, queries="after image", tower="vision"),
        InterventionError, "Got queries='after image' in the vision tower; expected it in the decoder only",
    ),
    "image-centric in the ViT": (
        lambda c: ss.Redistribute(
            c.patches, c.few, 0.5, select=ss.interventions.ImageCentric(c.patches), tower="vision"
        ), InterventionError, r"Got select=ImageCentric\(...\) in the vision tower",
    ),
    # values
    "an unknown replacement": (
        lambda c: ss.AblateValues(c.some, "median"), InterventionError,
        r"Got replacement='median'; expected one of \('zero', 'mean', 'resample'\) or a tensor",
    ),
    "values that do not broadcast": (
        lambda c: ss.AblateValues(c.some, torch.zeros(3, 5)), InterventionError,
        r"Got values of shape \(3, 5\); expected something that broadcasts to \[batch kv_head pos d_head\] = \(2, 2, \d+, 16\)",
    ),
    "values of another number of layers": (
        lambda c: ss.AblateValues(c.some, torch.zeros(2, 2, 1, 1, 16), [0]), InterventionError,
        r"or to \[batch layer kv_head pos d_head\] = \(2, 1, 2, \d+, 16\), one per layer given",
    ),
    "values that are NaN": (
        lambda c: ss.AblateValues(c.some, torch.full((16,), NAN)), InterventionError,
        r"Got NaN or infinite numbers at tokens to overwrite \(layer 0\); expected finite ones, because",
    ),
    "nobody left to resample": (
        lambda c: ss.AblateValues("image", "resample"), InterventionError,
        "Got a selection that holds every token of its kind in row 0; expected some left to resample from",
    ),
    "nobody left for the mean": (
        lambda c: ss.AblateValues("all", "mean"), InterventionError,
        r"every token of rows \[0, 1\] for the mean of AblateValues; expected some left to average over",
    ),
    "a mean in a packed tower": (
        lambda c: ss.AblateValues(c.patches, "mean", tower="vision"), InterventionError,
        "Got replacement='mean' in a packed vision tower; expected 'zero', a tensor or a run.*window by window", QWEN,
    ),
    # channels
    "a channel beyond the last": (
        lambda c: ss.AblateActivations([64], c.some), ProbeError,
        "Got dimension 64 in the language tower; expected 0 to 63",
    ),
    "one channel without a list": (
        lambda c: ss.AblateActivations(5, c.some), ProbeError, r"Got dimensions 5; expected a list.*Write \[5\]",
    ),
    "a clamp without a value": (
        lambda c: ss.AblateActivations([1], c.some, "clamp"), InterventionError,
        r"Got replacement='clamp' without a value; expected the largest magnitude to keep. Write value=10.0",
    ),
    "a clamp below nothing": (
        lambda c: ss.AblateActivations([1], c.some, "clamp", value=-1), InterventionError,
        "Got value=-1; expected a finite number of at least 0",
    ),
    "a value without a clamp": (
        lambda c: ss.AblateActivations([1], c.some, "zero", value=3.0), InterventionError,
        "Got value=3.0 with replacement='zero'; expected it with 'clamp' only. To set channels write replacement=3.0",
    ),
    "channels set to NaN": (
        lambda c: ss.AblateActivations([1], c.some, NAN), InterventionError, "Got replacement=nan; expected .* a finite number",
    ),
    "channels of the attention call": (
        lambda c: ss.AblateActivations([1], c.some, site="attention"), ProbeError,
        r"Got site='attention'; expected one of \('resid_pre', 'attn_out', 'mlp_out', 'resid_post'\)",
    ),
    # patches
    "states of another prompt": (
        lambda c: patch(c, torch.zeros(1, 1, 5, 64)), InterventionError,
        r"Got a donor of shape \(1, 1, 5, 64\); expected \[batch layer pos d_model\] = \(2, 1, \d+, 64\), or one row",
    ),
    "values of another prompt": (
        lambda c: patch(c, torch.zeros(2, 1, 2, 5, 16), "values"), InterventionError,
        r"expected \[batch layer kv_head pos d_head\] = \(2, 1, 2, \d+, 16\), or one row.*read ss.probes.AttentionValues",
    ),
    "no donor": (
        lambda c: patch(c, None), InterventionError,
        r"Got NoneType to patch from; expected a run.*Write from_run=lvlm.run\(other, probes=\[ss.probes.ResidualStates",
    ),
    "the result of another probe": (
        lambda c: patch(c, run_with(c, norms := ss.TokenNorms())[norms]), InterventionError,
        "Got NormResult to patch from; expected a run, its result of ss.probes.ResidualStates",
    ),
    "a whole generation": (
        lambda c: patch(c, c.lvlm.generate(c.sample, max_new_tokens=1)), InterventionError,
        r"Got Generation to patch from.*Write from_run=out.steps\[0\]",
    ),
    "a decode step": (
        lambda c: patch(c, c.lvlm.generate(c.sample, [ss.probes.ResidualStates()], max_new_tokens=2).steps[1]),
        InterventionError, r"Got the run of decode step 1 to patch from; expected that of the prompt",
    ),
    "a run without states": (
        lambda c: patch(c, run_with(c, ss.TokenNorms())), InterventionError,
        r"Got a run that holds no such result; expected \('language', 'resid_post'\) of layers \(0,\). Write lvlm.run\(other",
    ),
    "a run with states of another layer": (
        lambda c: patch(c, run_with(c, ss.probes.ResidualStates(layers=[1]))), InterventionError,
        r"Got a run that holds \('language', 'resid_post'\) of layers \(1,\); expected .* of layers \(0,\)",
    ),
    "a run with two such results": (
        lambda c: patch(c, run_with(c, ss.probes.ResidualStates("image"), ss.probes.ResidualStates())), InterventionError,
        r"Got a run with 2 results that fit ss.probes.ResidualStates\(layers=\[0\], site='resid_post'\).*from_run=run\[probe\]",
    ),
    "a run without values": (
        lambda c: patch(c, run_with(c, ss.probes.ResidualStates()), "values"), InterventionError,
        r"Got a run that holds no such result.*probes=\[ss.probes.AttentionValues\(layers=\[0\]\)\]",
    ),
    "states of other layers": (
        lambda c: patch(c, states(c), layers=[1]), InterventionError,
        r"Got a donor of layers \(0,\) to patch at layers \(1,\); expected the same, or more layers. Write layers=\(0,\), or read another",
    ),
    "states of another site": (
        lambda c: patch(c, states(c), "mlp_out"), InterventionError,
        "Got a donor of site 'resid_post' to patch at site 'mlp_out'; expected the same",
    ),
    "values as states": (
        lambda c: patch(c, values(c)), InterventionError,
        "Got a donor of site 'values' to patch at site 'resid_post'; expected the same, or .*Write site='values'",
    ),
    "states as values": (
        lambda c: ss.AblateValues(c.some, states(c), [0]), InterventionError,
        "Got replacement=StateResult; expected one of .* or a tensor, or a run that holds ss.probes.AttentionValues",
    ),
    "values of the other tower": (
        lambda c: patch(c, values(c, tower="vision"), "values"), InterventionError,
        "Got a donor of tower 'vision' to patch at tower 'language'; expected the same",
    ),
    "a site nobody knows": (
        lambda c: patch(c, states(c), "value"), InterventionError,
        r"Got site='value'; expected one of \('resid_pre', .*, 'values'\). Did you mean 'values'\?",
    ),
    "tokens before the site": (
        lambda c: ss.PatchActivations(states(c), c.some, [0]), InterventionError,
        r"Got a site of type Tensor; expected one of .*Write ss.PatchActivations\(from_run, site, tokens, layers\)",
    ),
    "states at decode steps of a patch": (
        lambda c: patch(c, states(c), steps="decode"), InterventionError,
        "Got steps='decode' for PatchActivations of states",
    ),
    "states that were not kept": (
        lambda c: patch(c, states(c, tokens="text")), InterventionError,
        r"Got NaN or infinite numbers at tokens to overwrite \(layer 0\).*tokens that its probe did not keep",
    ),
    "values that were not kept": (
        lambda c: patch(c, values(c, tokens="text"), "values"), InterventionError,
        r"Got NaN or infinite numbers at tokens to overwrite \(layer 0\)",
    ),
    "one row for rows that are padded": (
        lambda c: patch(c, one_row(c)), InterventionError,
        r"Got a donor of one row for the rows \[0\], which are padded; expected rows without padding",
    ),
    # towers and blocks
    "eviction in the ViT": (
        lambda c: ss.interventions.EvictKeys(2, 5, tower="vision"), InterventionError,
        "Got tower='vision' for EvictKeys; expected 'language', the only tower in which it is defined",
    ),
    "image tokens scaled in the ViT": (
        lambda c: ss.interventions.ScaleTokens("image", 0.5, tower="vision"), InterventionError,
        "Got tower='vision' for ScaleTokens; expected 'language'",
    ),
    "image tokens moved in the ViT": (
        lambda c: ss.interventions.SinkToFront(c.some, tower="vision"), InterventionError,
        "Got tower='vision' for SinkToFront; expected 'language'",
    ),
    "a register in the decoder": (
        lambda c: ss.TestTimeRegister({0: [1]}, tower="language"), InterventionError,
        "Got tower='language' for TestTimeRegister; expected 'vision'",
    ),
    "a register at decode steps": (
        lambda c: ss.TestTimeRegister({0: [1]}, steps="decode"), InterventionError,
        "Got steps='decode' for TestTimeRegister; expected 'prefill' or 'all'",
    ),
    "a register at unknown steps": (
        lambda c: ss.TestTimeRegister({0: [1]}, steps="foo"), InterventionError, "Got steps='foo'; expected one of",
    ),
    "a vision block that feeds nothing": (
        lambda c: ss.MaskKeys(c.patches, [2], tower="vision"), NoEffectError,
        r"Got MaskKeys in the vision blocks \[2\]; expected blocks up to 1: the projector reads \[1\]",
    ),
    "a vision block that feeds nothing among others": (
        lambda c: ss.AblateActivations([0], c.patches, "zero", [1, 2], tower="vision"), NoEffectError,
        r"Got AblateActivations in the vision blocks \[2\].*Write layers up to 1, or allow_noop=True",
    ),
    # neurons
    "a neuron beyond the last": (
        lambda c: ss.TestTimeRegister({0: [10**6]}), InterventionError,
        "Got 1000000 as neuron of vision block 0; expected 0 to 95",
    ),
    "a negative neuron": (
        lambda c: ss.TestTimeRegister({0: [-1]}), InterventionError, "Got -1 as neuron of vision block 0; expected 0 to",
    ),
    "a block without neurons": (
        lambda c: ss.TestTimeRegister({0: [], 1: [3]}), InterventionError, "Got no neuron of vision block 0",
    ),
    "a scale that is a word": (
        lambda c: ss.TestTimeRegister({0: [1]}, scale="a"), InterventionError, "Got scale='a'; expected a finite number",
    ),
    "a scale that is no number": (
        lambda c: ss.TestTimeRegister({0: [1]}, scale=NAN), InterventionError, "Got scale=nan; expected a finite number",
    ),
    # what is there already
    "channels far below the bound": (
        lambda c: ss.AblateActivations([0, 1], c.some, "clamp", value=1e9), NoEffectError,
        "AblateActivations left every token as it was; expected at least one to change",
    ),
    "a patch of what is there": (
        lambda c: patch(c, states(c)), NoEffectError, "PatchActivations left every token as it was",
    ),
    "values that are there": (
        lambda c: patch(c, values(c), "values"), NoEffectError,
        "PatchActivations touched no row.*masked already, or were given what they have",
    ),
    "a number beyond the dtype": (
        lambda c: ss.AblateActivations([0], c.some, 1e300), InterventionError,
        r"Got replacement=1e\+300 for a model in float32; expected at most 3.40282e\+38 in magnitude",
    ),
    "a bound beyond the dtype": (
        lambda c: ss.AblateActivations([0], c.some, "clamp", value=1e300), InterventionError, r"Got value=1e\+300",
    ),
    "tokens as a rule": (
        lambda c: moves(c, select="image"), InterventionError,
        r"Got select='image'; expected an ImageCentric rule.*Write select=ss.interventions.ImageCentric\(trace.l_sinks\(\)\)",
    ),
    # order
    "text to the front": (
        lambda c: ss.interventions.SinkToFront(c.some), InterventionError,
        r"Got text tokens to move to the front; expected image tokens only. Write tokens & \(sample.tokens.image >= 0\)",
    ),
    "all to the front": (
        lambda c: ss.interventions.SinkToFront("image"), NoEffectError,
        "SinkToFront left every token as it was; expected at least one to change",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_an_impossible_intervention_is_refused(case, name):
    make, error, message, *family = RUN[name]
    c = case(*(family or [LLAVA]))
    with pytest.raises(error, match=message) as caught:
        c.lvlm.run(c.sample, interventions=[make(c)])
    assert isinstance(caught.value, SinkscopeError)


GENERATE = {
    "kl": (
        {"kl": True},
        r"Got \['kl'\] as options of generate; .* kl, logits and grad are for lvlm.run\(...\)",
    ),
    "guidance": (
        {"guidance_scale": 2.0},
        "Got guidance_scale=2.0; expected 1. Every decode step is probed with one query per row",
    ),
}


@pytest.mark.parametrize("name", GENERATE)
def test_an_impossible_way_of_generating_is_refused(case, name):
    options, message = GENERATE[name]
    c = case(LLAVA)
    with pytest.raises(InputError, match=message):
        c.lvlm.generate(c.sample, interventions=[ss.MaskKeys(c.some)], max_new_tokens=2, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_numbers_are_compared_with_the_models_dtype(case, dtype):
    c = case(LLAVA, "sdpa", dtype)
    most = torch.finfo(dtype).max
    with pytest.raises(
        InterventionError, match=f"for a model in {str(dtype)[6:]}; expected at most"
    ):
        c.lvlm.run(c.sample, interventions=[ss.AblateActivations([0], c.some, most * 1.5)])


def test_blocks_that_feed_nothing_can_be_edited_for_probes_of_the_tower(case):
    c = case(LLAVA)
    probe = ss.AttentionMass({"some": c.patches}, [2], tower="vision")
    edit = ss.MaskKeys(c.patches, [2], tower="vision", allow_noop=True)
    plain, run = (c.lvlm.run(c.sample, [probe], edits) for edits in ([], [edit]))
    assert torch.equal(run.logits, plain.logits)
    assert (run[probe].mass.nan_to_num() == 0).all()
    assert (plain[probe].mass.nan_to_num() > 0).any()
    everywhere = ss.MaskKeys(c.patches, tower="vision")
    assert c.lvlm.run(c.sample, interventions=[everywhere]).effects[everywhere].layers == (0, 1, 2)


def test_there_are_many():
    assert len(RUN) >= 50


def test_the_effect_of_what_did_not_run_is_not_there(tiny):
    lvlm = tiny(LLAVA)
    sample = lvlm.prepare(images=random_image(32, 32, 0), text="a")
    mask, other = ss.MaskKeys("image"), ss.MaskKeys("bos")
    run = lvlm.run(sample, interventions=[mask])
    with pytest.raises(InterventionError, match=r"did nothing in this pass.*\['MaskKeys'\]"):
        run.effects[other]
    assert run.effects[mask].touched.all()
    assert other not in run.effects
    assert run.effects.get(other) is None

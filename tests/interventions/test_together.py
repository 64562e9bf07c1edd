"""Several edits of one layer, and probes of the same pass.

Inside an attention site edits apply in forward order: keys, logits, weights, values; list order
decides inside a stage. The reference does the same on explicit tensors.
"""

import pytest
import torch

import sinkscope as ss
from tests.interventions import reference as by_hand
from tests.interventions.cases import LANGUAGE, crossed, given_values, zeros
from tests.interventions.conftest import LEARNED
from tests.interventions.reference import reference_run
from tests.interventions.test_exact import agree, effect_agrees, off

H = by_hand
FAMILIES = [("llava-clip-llama", "sdpa"), ("gemma3", "sdpa"), (LEARNED, "eager")]


def second(c):
    """The token behind the first one."""
    return c.first.roll(1, 1)


TOGETHER = {
    "mask and scale keys": lambda c: [
        (ss.MaskKeys(c.some), H.masks(c.some)),
        (ss.ScaleKeys(c.first, 0.3), H.scales_keys(c.first, 0.3)),
    ],
    "a key scaled to nothing and masked": lambda c: [
        (ss.ScaleKeys(c.some, 0.0), H.scales_keys(c.some, 0.0)),
        (ss.MaskKeys(c.some), H.masks(c.some)),
    ],
    "logit times a number plus another": lambda c: [
        (ss.ScaleKeys(c.some, -0.3), H.scales_keys(c.some, -0.3)),
        (ss.ScaleAttention(c.some, 5.0), H.scales_weights(c.some, 5.0)),
    ],
    "two factors": lambda c: [
        (ss.ScaleAttention(c.some, 0.5), H.scales_weights(c.some, 0.5)),
        (ss.ScaleAttention(c.some | c.first, 0.5, heads=[1]),
         H.scales_weights(c.some | c.first, 0.5, heads=(1,))),
    ],
    "two coefficients": lambda c: [
        (ss.ScaleAttention(c.some, 0.5, renormalize=False), H.scales_raw_weights(c.some, 0.5)),
        (ss.ScaleAttention(c.some | c.first, 3.0, renormalize=False, queries=c.late),
         H.scales_raw_weights(c.some | c.first, 3.0, rows=c.late)),
    ],
    "scale and move": lambda c: [
        (ss.ScaleAttention(c.other, 0.5, renormalize=False), H.scales_raw_weights(c.other, 0.5)),
        (ss.Redistribute(c.first, c.some | c.other, 0.6),
         H.redistributes(c.first, c.some | c.other, 0.6)),
    ],
    "move there and back": lambda c: [
        (ss.Redistribute(c.some, c.other, 0.5), H.redistributes(c.some, c.other, 0.5)),
        (ss.Redistribute(c.other, c.some, 0.2), H.redistributes(c.other, c.some, 0.2)),
    ],
    "move beside a mask": lambda c: [
        (ss.Redistribute(c.first, c.some | c.other, 0.6),
         H.redistributes(c.first, c.some | c.other, 0.6)),
        (ss.MaskKeys(c.some), H.masks(c.some)),
    ],
    "values of rows and weights": lambda c: [
        (ss.AblateValues(c.some, queries=c.late), H.replaces_values(c.some, zeros, rows=c.late)),
        (ss.ScaleAttention(c.some, 3.0, renormalize=False), H.scales_raw_weights(c.some, 3.0)),
    ],
    "values of all rows and weights": lambda c: [
        (ss.AblateValues(c.some), H.replaces_values(c.some, zeros)),
        (ss.Redistribute(c.first, c.some | c.other, 0.6),
         H.redistributes(c.first, c.some | c.other, 0.6)),
    ],
    "values of rows and of heads": lambda c: [
        (ss.AblateValues(c.some, queries=c.late), H.replaces_values(c.some, zeros, rows=c.late)),
        (ss.AblateValues(c.some | c.first, given_values(c)[0], heads=[1]),
         H.replaces_values(c.some | c.first, given_values(c)[1], heads=(1,))),
    ],
    "values of rows and of all": lambda c: [
        (ss.AblateValues(c.some, queries=c.late), H.replaces_values(c.some, zeros, rows=c.late)),
        (ss.AblateValues(c.some | c.first, given_values(c)[0]),
         H.replaces_values(c.some | c.first, given_values(c)[1])),
    ],
    "everything": lambda c: [
        (ss.AblateValues(c.other, heads=[0]), H.replaces_values(c.other, zeros, heads=(0,))),
        (ss.Redistribute(c.first, c.other, 0.4), H.redistributes(c.first, c.other, 0.4)),
        (ss.MaskKeys(c.some, heads=[0, 1]), H.masks(c.some, heads=(0, 1))),
        (ss.ScaleKeys(c.other, 0.5, queries=c.late),
         H.scales_keys(c.other, 0.5, rows=c.late)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("turned", [False, True], ids=["as listed", "turned round"])
@pytest.mark.parametrize(
    ("family", "kernel", "name"),
    crossed(
        TOGETHER, FAMILIES, few=("everything", "move beside a mask", "values of rows and of all")
    ),
)
def test_edits_of_one_layer_compose(case, family, kernel, name, turned):
    c = case(family, kernel)
    pairs = TOGETHER[name](c)[:: -1 if turned else 1]
    answer = reference_run(c, [change for _, change in pairs])
    run = agree(c, [edit for edit, _ in pairs], answer, "language")
    for edit, change in pairs:
        if change.stage in ("keys", "logits", "weights"):
            effect_agrees(run.effects[edit], answer.notes[change], measured=True)


@pytest.mark.parametrize(("family", "kernel"), FAMILIES[:2])
def test_masks_that_leave_a_row_nothing_together_spare_it(case, family, kernel):
    """The second token sees the first and itself: the second mask must leave it what is left."""
    c = case(family, kernel)
    edits = [ss.MaskKeys("first"), ss.MaskKeys(second(c))]
    changes = [H.masks(c.first), H.masks(second(c))]
    answer = reference_run(c, changes)
    run = agree(c, edits, answer, "language")
    for edit, change in zip(edits, changes, strict=True):
        effect_agrees(run.effects[edit], answer.notes[change], measured=True)
    assert (run.effects[edits[0]].empty == 1).all()
    assert (run.effects[edits[1]].empty == 1).all()


def test_what_is_masked_already_cannot_be_scaled(case):
    c = case("llava-clip-llama")
    edits = [ss.MaskKeys(c.some), ss.ScaleAttention(c.some, 0.5)]
    with pytest.raises(
        ss.errors.NoEffectError, match=r"ScaleAttention touched no row.*masked already"
    ):
        c.lvlm.run(c.sample, interventions=edits)


def test_edits_of_different_layers_are_the_edit_of_both(case):
    c = case("llava-clip-llama")
    both = c.lvlm.run(c.sample, interventions=[ss.MaskKeys(c.some, layers=[0, 2])])
    each = c.lvlm.run(
        c.sample, interventions=[ss.MaskKeys(c.some, layers=[2]), ss.MaskKeys(c.some, layers=[0])]
    )
    assert torch.equal(both.logits, each.logits)


# --------------------------------------------------------------------------- probes of the same pass


@pytest.mark.parametrize(("family", "kernel", "name"), crossed(LANGUAGE, FAMILIES))
def test_attention_probes_see_the_edited_attention(case, family, kernel, name):
    c, pair = case(family, kernel), LANGUAGE[name]
    groups = {"some": c.some, "first": "first", "image": "image"}
    mass, received = ss.AttentionMass(groups), ss.ReceivedAttention()
    patterns = ss.AttentionPatterns(c.late)
    run = c.lvlm.run(c.sample, probes=[mass, received, patterns], interventions=[pair.edit(c)])
    answer = reference_run(c, [pair.change(c)])
    want = torch.stack([answer.weights["language", layer][0] for layer in range(3)], dim=1)
    tokens = c.sample.tokens
    columns = torch.stack([tokens.select(group) for group in groups.values()], dim=-1).double()
    by_group = torch.einsum("blhqk,bkg->blhqg", want, columns)
    live = c.live[:, None, None, :, None].expand_as(by_group)
    assert off(run[mass].mass[live], by_group[live]) <= 1e-5

    from tests.reference import visible

    seen = visible(c.lvlm, c.sample).float()
    count = torch.einsum("bq,blqk->blk", c.live.float(), seen)[:, :, None]
    column = torch.einsum("blhqk,bq->blhk", want, c.live.double()) / count
    alive = c.live[:, None, None].expand_as(column)
    assert off(run[received].received[alive], column[alive]) <= 1e-5

    for b in range(2):
        at = c.late[b].nonzero().flatten()
        got = run[patterns].patterns[b, :, :, : len(at)][..., c.live[b]]
        assert off(got, want[b][:, :, at][..., c.live[b]]) <= 1e-5


@pytest.mark.parametrize("name", ["MaskKeys", "ScaleAttention", "ScaleAttention as is"])
@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl"])
def test_probes_of_the_vision_tower_see_its_edits(case, family, name):
    c = case(family)
    edit = {
        "MaskKeys": ss.MaskKeys(c.patches, tower="vision"),
        "ScaleAttention": ss.ScaleAttention(c.patches, 4.0, tower="vision"),
        "ScaleAttention as is": ss.ScaleAttention(
            c.patches, 4.0, renormalize=False, tower="vision"
        ),
    }[name]
    probe = ss.AttentionMass({"patches": c.patches, "all": "all"}, layers=[0], tower="vision")
    plain = c.lvlm.run(c.sample, probes=[probe])[probe].mass
    edited = c.lvlm.run(c.sample, probes=[probe], interventions=[edit])[probe].mass
    before, total = plain[..., 0], plain[..., 1]
    want = {
        "MaskKeys": 0 * before,
        "ScaleAttention": 4 * before / (total + 3 * before),
        "ScaleAttention as is": 4 * before,
    }[name]
    assert (edited[..., 0] - want).nan_to_num().abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("kernel", "name"),
    crossed([n for n in LANGUAGE if "negative, of a head" not in n], [("sdpa",), ("eager",)]),
)
def test_contributions_of_all_tokens_are_what_edited_attention_writes(case, kernel, name):
    """LLaMA's output projection has no bias, so all groups together write the module's output."""
    c = case("llava-clip-llama", kernel)
    probe, written = ss.ContributionNorms({"all": "all"}), ss.TokenNorms(site="attn_out")
    run = c.lvlm.run(c.sample, probes=[probe, written], interventions=[LANGUAGE[name].edit(c)])
    got, want = run[probe].norms[..., 0], run[written].norms
    assert (got - want).nan_to_num().abs().max() <= 1e-4


def test_contributions_of_replaced_values_are_those_of_the_replacement(case):
    c = case("llava-clip-llama")
    groups = {"some": c.some, "rest": c.live & ~c.some}
    probe = ss.ContributionNorms(groups, layers=[0])
    plain = c.lvlm.run(c.sample, probes=[probe])[probe].norms[:, 0].nan_to_num()

    def edited(replacement):
        edit = ss.AblateValues(c.some, replacement, layers=[0], queries=c.late)
        run = c.lvlm.run(c.sample, probes=[probe], interventions=[edit])
        return run[probe].norms[:, 0].nan_to_num()

    zero, other = edited("zero"), edited(given_values(c)[0])
    assert (zero[c.late][:, 0] == 0).all()
    assert (other[c.late][:, 0] - plain[c.late][:, 0]).abs().max() > 0.1
    for norms in (zero, other):
        assert torch.equal(norms[~c.late], plain[~c.late])
        assert (norms[..., 1] - plain[..., 1]).abs().max() < 1e-5


def test_value_norms_are_those_of_replaced_values(case):
    c = case("llava-clip-llama")
    probe, edit = ss.ValueNorms(), ss.AblateValues(c.some)
    run = c.lvlm.run(c.sample, probes=[probe], interventions=[edit])
    assert (run[probe].norms.movedim(3, 1)[c.some] == 0).all()
    assert (run[probe].norms.movedim(3, 1)[c.live & ~c.some] > 0).all()


@pytest.mark.parametrize("name", ["Redistribute", "AblateValues mean", "MaskKeys per layer"])
def test_nulls_do_not_depend_on_edits(case, name):
    c = case("llava-clip-llama")
    mass, received = ss.AttentionMass({"image": "image"}), ss.ReceivedAttention()
    plain = c.lvlm.run(c.sample, probes=[mass, received])
    edited = c.lvlm.run(c.sample, probes=[mass, received], interventions=[LANGUAGE[name].edit(c)])
    for probe in (mass, received):
        assert torch.equal(plain[probe].null.nan_to_num(), edited[probe].null.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_keys_that_an_edit_made_light_are_still_seen_by_the_next(case, kernel, dtype):
    """A weight of 1e-9 is nothing in fp16; what is masked and what is light are told apart all the same."""
    c = case("llava-clip-llama", kernel, dtype)
    light, back = ss.ScaleAttention(c.some, 1e-9), ss.ScaleAttention(c.some, 1e9)
    run = c.lvlm.run(c.sample, interventions=[light, back])
    assert torch.equal(run.effects[back].rows, run.effects[light].rows)
    assert run.effects[back].rows.sum() > 0
    masked, after = ss.MaskKeys(c.some), ss.ScaleAttention(c.some, 1e9, allow_noop=True)
    rows = c.lvlm.run(c.sample, interventions=[masked, after]).effects[after].rows
    assert rows.sum() == 0


@pytest.mark.parametrize("how", ["mean", "resample"])
@pytest.mark.parametrize(("family", "kernel"), FAMILIES)
def test_donors_are_the_models_own_values(case, family, kernel, how):
    """In both orders, and whether the edit before names heads or queries; donors are edited tokens."""
    c = case(family, kernel)
    heads = list(range(c.lvlm.anatomy.language.heads))

    def logits(turned=False, **options):
        edits = [ss.AblateValues(c.some, **options), ss.AblateValues(c.other, how)]
        edits = edits[::-1] if turned else edits
        return c.lvlm.run(c.sample, interventions=edits).logits[c.live]

    want = logits()
    for got in (logits(turned=True), logits(heads=heads), logits(queries="all")):
        assert off(got, want) <= 1e-5
    assert off(logits(heads=heads, turned=True), want) <= 1e-5
    alone = c.lvlm.run(c.sample, interventions=[ss.AblateValues(c.some)]).logits[c.live]
    assert off(alone, want) > 1e-4

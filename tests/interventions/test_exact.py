"""Every intervention equals the formula it claims to compute, written out in `reference`.

Tolerances are shares of the largest number compared, in fp32.
"""

from types import SimpleNamespace

import pytest
import torch

import sinkscope as ss
from tests.interventions.cases import LANGUAGE, UNPACKED, VISION, crossed
from tests.interventions.conftest import LEARNED, MODELS
from tests.interventions.reference import Change, reference_run

TOWERS = [
    ("llava-clip-llama", "sdpa"),
    ("llava-clip-llama", "eager"),
    ("gemma3", "sdpa"),
    ("qwen2.5-vl", "sdpa"),
    ("qwen2.5-vl", "eager"),
]


def off(got, want):
    """The largest difference, as a share of the largest number (of 1e-6, if all are smaller)."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    size = want.double().abs().max().clamp(min=1e-6)
    return ((got.double() - want.double()).abs().max() / size).item()


def agree(case, edits, answer, tower, tolerance=1e-5):
    """Logits, and what attention writes in every layer of the tower, equal the reference's."""
    states = ss.probes.ResidualStates(tower=tower, site="attn_out")
    run = case.lvlm.run(case.sample, probes=[states], interventions=edits)
    assert off(run.logits[case.live], answer.logits[case.live]) <= tolerance
    vision = case.sample.tokens.vision
    live = case.live if tower == "language" else vision.live
    for layer in range(case.lvlm.anatomy.tower(tower).n_layers):
        want = answer.attn_out[tower, layer]
        if tower == "vision" and vision.layout is not None:
            want = want.reshape(-1, want.shape[-1])[vision.layout.clamp(min=0)]
        got = run[states].states[:, layer]
        assert off(got[live], want[live]) <= tolerance, layer
    return run


def effect_agrees(effect, notes, measured):
    """Rows, tokens, empty rows and masses of an effect equal what the reference saw."""
    for i, site in enumerate(effect.sites):
        mine = [note for note in notes if note.layer == site.layer]
        rows = sum(note.gate.any(1).sum(1) for note in mine)
        assert torch.equal(effect.rows[:, i], rows)
        assert torch.equal(effect.empty[:, i], sum(note.empty.any(1).sum(1) for note in mine))
        assert torch.equal(effect.tokens[:, i], sum(note.keys.sum(1) for note in mine))
        count = sum(note.gate.sum((1, 2)) for note in mine)
        for name in ("before", "after"):
            masses = [(getattr(note, name) * note.keys[:, None, None]).sum(-1) for note in mine]
            total = sum((m * note.gate).sum((1, 2)) for m, note in zip(masses, mine, strict=True))
            want = total / count if measured else torch.full_like(total, float("nan"))
            got = getattr(effect, f"mass_{name}")[:, i]
            assert torch.equal(got.isnan(), want.isnan())
            assert (got - want).nan_to_num().abs().max() <= 1e-5


@pytest.mark.parametrize(("family", "kernel", "name"), crossed(LANGUAGE, MODELS))
def test_edits_of_the_decoder_equal_their_formula_and_tell_what_they_did(
    case, family, kernel, name
):
    c, pair = case(family, kernel), LANGUAGE[name]
    edit, change = pair.edit(c), pair.change(c)
    answer = reference_run(c, [change])
    run = agree(c, [edit], answer, "language")
    layers = range(3) if change.layers is None else change.layers
    assert [site.layer for site in run.effects[edit].sites] == list(layers)
    effect_agrees(run.effects[edit], answer.notes[change], change.stage != "values")


@pytest.mark.parametrize(("family", "kernel", "name"), crossed(VISION, TOWERS))
def test_edits_of_the_vision_tower_equal_their_formula(case, family, kernel, name):
    c, pair = case(family, kernel), VISION[name]
    edit, change = pair.edit(c), pair.change(c)
    answer = reference_run(c, [change])
    run = agree(c, [edit], answer, "vision")
    effect_agrees(run.effects[edit], answer.notes[change], change.stage != "values")


@pytest.mark.parametrize("name", UNPACKED)
@pytest.mark.parametrize(("family", "kernel"), TOWERS[:3])
def test_edits_of_towers_with_a_row_per_image_equal_their_formula(case, family, kernel, name):
    c, pair = case(family, kernel), UNPACKED[name]
    agree(c, [pair.edit(c)], reference_run(c, [pair.change(c)]), "vision")


@pytest.mark.parametrize(("family", "kernel"), MODELS)
def test_the_reference_without_changes_is_the_model(case, family, kernel):
    c = case(family, kernel)
    with torch.no_grad():
        want = c.lvlm.module(**c.sample.inputs).logits
    assert off(reference_run(c).logits[c.live], want[c.live]) <= 1e-5


# ------------------------------------------------------------------------------- VAR's two readings


def sinks_by_layer(c):
    """A detection: the first token everywhere, image tokens by layer; none of row 0 in layer 1."""
    mask = torch.zeros(2, 3, c.live.shape[1], dtype=torch.bool)
    mask |= c.first[:, None]
    for layer in range(3):
        mask[:, layer] |= c.some.roll(-layer, 1) & (c.sample.tokens.image >= 0)
    mask[0, 1] &= c.sample.tokens.image[0] < 0
    return mask


def redistributed(w, c, sinks, keep, chosen):
    """One layer's weights after VAR, row by row: sections 3 and 4 of 2503.03321 in plain words."""
    out, grown = w.clone(), w.shape[-1] - c.live.shape[1]
    visual = torch.nn.functional.pad(c.sample.tokens.image >= 0, (0, grown))
    live = torch.nn.functional.pad(c.live, (0, grown), value=True)
    sinks = torch.nn.functional.pad(sinks, (0, grown))
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in w.shape[:3])).tolist():
        row, image = w[b, h, i], visual[b].nonzero().flatten()
        if not live[b, i] or i <= image[-1]:
            continue
        if not chosen(row, image, sinks[b]):
            continue
        giving = sinks[b].nonzero().flatten()
        aim = (visual[b] & ~sinks[b]).nonzero().flatten()
        budget = (1 - keep) * row[giving].sum()
        out[b, h, i, giving] = keep * row[giving]
        out[b, h, i, aim] = row[aim] + budget * row[aim] / row[aim].sum()
    return out


def var_by_hand(c, preset):
    """A preset, and the change that its source describes."""
    sinks = sinks_by_layer(c)
    trace = SimpleNamespace(sample=c.sample, n_layers=3, l_detection=SimpleNamespace(mask=sinks))
    paper = preset == "var_paper"
    rho = 0.6

    def chosen(row, image, sinks):
        on_sinks = row[image[sinks[image]]].sum()
        if paper:
            return row[image].sum() >= 0.2 and 1 - on_sinks / row[image].sum() >= rho
        some = bool(sinks[image].any())
        return some and row[image].sum() >= 0.2 and on_sinks / (row[image] + 1e-6).sum() <= rho

    def apply(w, at):
        return redistributed(w, c, sinks[:, at.layer], 0.4 if paper else 0.6, chosen)

    edit = getattr(ss.Redistribute, preset)(trace, [0, 1, 2], rho=rho)
    assert edit.recycle == pytest.approx(0.6 if paper else 0.4)
    return edit, Change("weights", sinks, apply)


@pytest.mark.parametrize("preset", ["var_paper", "var_code"])
@pytest.mark.parametrize("family", ["llava-clip-llama", LEARNED])
def test_var_presets_equal_their_formulas_on_every_row(case, family, preset):
    c = case(family, "eager")
    edit, change = var_by_hand(c, preset)
    answer = reference_run(c, [change])
    run = agree(c, [edit], answer, "language")
    effect = run.effects[edit]
    notes = next(iter(answer.notes.values()))
    touched = [(note.before != note.after).any(-1).any(1).sum(1) for note in notes]
    assert torch.equal(effect.rows, torch.stack(touched, dim=1))
    assert (effect.rows[0, 1] > 0) == (
        preset == "var_paper"
    )  # the code leaves a layer without visual sinks alone
    assert (effect.mass_after < effect.mass_before)[effect.rows > 0].all()


def test_var_starts_at_layer_two_with_the_published_numbers(case):
    c = case("llava-clip-llama")
    trace = SimpleNamespace(
        sample=c.sample, n_layers=3, l_detection=SimpleNamespace(mask=sinks_by_layer(c))
    )
    paper, code = ss.Redistribute.var_paper(trace), ss.Redistribute.var_code(trace)
    assert paper.layers == code.layers == (2,)
    assert paper.select.most_sink_share == pytest.approx(0.2)
    assert code.select.most_sink_share == 0.5
    assert paper.select.least_visual == code.select.least_visual == 0.2


# ------------------------------------------------------------------------------------------ effects


@pytest.mark.parametrize("family", ["llava-clip-llama", "gemma3", "qwen2.5-vl"])
def test_scaling_keys_down_can_raise_their_mass_and_the_effect_says_so(case, family):
    c = case(family)
    edits = [
        ss.ScaleKeys(
            "first" if family != "gemma3" else c.some, 0.5, [1], heads=[head], queries=query
        )
        for head in range(4)
        for query in ("last", c.late)
    ]
    effects = [c.lvlm.run(c.sample, interventions=[it]).effects[it] for it in edits]
    rise = torch.cat([effect.mass_after - effect.mass_before for effect in effects])
    assert (rise > 1e-4).any()
    assert (rise < -1e-4).any()


def test_rows_that_see_masked_keys_only_keep_their_output_and_are_counted(case):
    c = case("llava-clip-llama")
    edit, states = ss.MaskKeys("first"), ss.probes.ResidualStates()
    plain = c.lvlm.run(c.sample, probes=[states])
    run = c.lvlm.run(c.sample, probes=[states], interventions=[edit])
    assert torch.equal(run.effects[edit].empty, torch.ones(2, 3, dtype=torch.long))
    first = c.first
    assert torch.equal(
        run[states].states.movedim(1, 2)[first], plain[states].states.movedim(1, 2)[first]
    )
    assert torch.equal(run.logits[first], plain.logits[first])
    assert not torch.equal(run.logits[c.live & ~first], plain.logits[c.live & ~first])


def test_with_a_learned_sink_no_row_is_empty(case):
    """Where attention may go to a learned sink, a row without keys reads nothing: its output is 0."""
    c = case(LEARNED, "eager")
    edit = ss.MaskKeys("first", layers=[0])
    run = c.lvlm.run(c.sample, interventions=[edit])
    assert run.effects[edit].empty.sum() == 0
    assert torch.equal(run.effects[edit].rows[:, 0], (c.live).sum(1).clamp(max=12))


def test_kl_is_that_of_the_next_token(case):
    c = case("llava-clip-llama")
    pair = LANGUAGE["MaskKeys"]
    edit = pair.edit(c)
    run = c.lvlm.run(c.sample, interventions=[edit], kl=True)
    p, q = (
        reference_run(c, changes).logits[:, -1].log_softmax(-1)
        for changes in ([], [pair.change(c)])
    )
    assert torch.allclose(run.effects[edit].kl, (p.exp() * (p - q)).sum(-1), atol=1e-4)
    assert c.lvlm.run(c.sample, interventions=[edit]).effects[edit].kl is None
    last = c.lvlm.run(c.sample, interventions=[edit], kl=True, logits="last")
    assert torch.allclose(last.effects[edit].kl, run.effects[edit].kl)
    kept = c.lvlm.run(c.sample, interventions=[edit], kl=True, grad=True)
    assert kept.logits.requires_grad
    assert not kept.effects[edit].kl.requires_grad
    assert torch.equal(kept.effects[edit].kl, run.effects[edit].kl)


def test_the_effect_table(case):
    c = case("llava-clip-llama")
    edit = ss.MaskKeys(c.some, layers=[0, 2])
    effect = c.lvlm.run(c.sample, interventions=[edit]).effects[edit]
    table = effect.to_dataframe()
    assert list(table["layer"]) == [0, 2, 0, 2]
    assert list(table["tokens"]) == [2, 2, 4, 4]
    assert (table["mass_after"] == 0).all()
    assert effect.layers == (0, 2)
    assert effect.touched.tolist() == [True, True]

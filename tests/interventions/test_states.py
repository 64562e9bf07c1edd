"""Edits of states against hooks on the plain model: channels, patches, scales and moves."""

import pytest
import torch

import sinkscope as ss
from tests.interventions.cases import crossed
from tests.interventions.reference import grown_inputs, reference_run
from tests.interventions.test_exact import off
from tests.interventions.test_generation import generate

FAMILIES = ("llava-clip-llama", "llava-dinov2-olmo2", "gemma3", "qwen2.5-vl")
DIMS = [1, 40, 7]
REPLACEMENTS = ("zero", "mean", "clamp", "set")


def place(c, tower, site, layer):
    """The module path and side of a site."""
    a = c.lvlm.anatomy.tower(tower)
    return {
        "resid_pre": (a.blocks[layer], "input"),
        "resid_post": (a.blocks[layer], "output"),
        "attn_out": (a.branches[layer][0].path, "output"),
        "mlp_out": (a.branches[layer][1].path, "output"),
    }[site]


def on_prompt(c, tower, change):
    """``change([row pos d_model])`` on the prompt's tokens, or on the images of a packed tower."""

    def function(states):
        vision = c.sample.tokens.vision
        if tower == "vision" and vision.layout is not None:
            out = states.clone()
            flat = out.reshape(-1, out.shape[-1])
            for image, index in enumerate(vision.layout):
                at = index[index >= 0]
                part = change(flat[at][None], slice(image, image + 1), len(at))
                flat[at] = part[0]
            return out
        rows = vision.live.shape if tower == "vision" else c.live.shape
        edited = change(states[:, : rows[1]], slice(None), rows[1])
        return torch.cat([edited, states[:, rows[1] :]], dim=1)

    return function


def sets(c, tower, how, value=None):
    """The change of `ss.AblateActivations`, token by token."""
    tokens = c.some if tower == "language" else c.patches
    live = c.live if tower == "language" else c.sample.tokens.vision.live

    def change(states, rows, n):
        out = states.clone()
        for b, (mask, alive) in enumerate(zip(tokens[rows, :n], live[rows, :n], strict=True)):
            for dim in DIMS:
                old = states[b, :, dim].float()
                new = {
                    "zero": torch.zeros_like(old),
                    "mean": old[alive & ~mask].mean().expand_as(old),
                    "clamp": old.clamp(-0.3, 0.3),
                    "set": torch.full_like(old, 2.5),
                }[how]
                out[b, mask, dim] = new[mask].to(states.dtype)
        return out

    return on_prompt(c, tower, change)


def agree(c, edit, hooks, tower="language", site="resid_post"):
    """Logits equal the reference's; tokens that are not edited are bitwise the plain model's."""
    states = ss.probes.ResidualStates(tower=tower, site=site)
    run = c.lvlm.run(c.sample, probes=[states], interventions=[edit])
    answer = reference_run(c, hooks=hooks)
    assert off(run.logits[c.live], answer.logits[c.live]) <= 1e-5
    return run, run[states].states


SITES = ("resid_post", "resid_pre", "attn_out", "mlp_out")


@pytest.mark.parametrize(
    ("tower", "site", "family", "replacement"),
    [
        *crossed(REPLACEMENTS, [("language", s, FAMILIES[0]) for s in SITES], full=4),
        *crossed(REPLACEMENTS, [("vision", s, FAMILIES[0]) for s in SITES[:2]], full=2),
        *[
            (t, s, f, "mean")
            for t in ("language", "vision")
            for s in SITES[:2]
            for f in FAMILIES[1:]
        ],
        *[("language", s, f, "clamp") for s in SITES[2:] for f in FAMILIES[1:]],
    ],
)
def test_channels_of_tokens(case, tower, site, family, replacement):
    c = case(family)
    tokens, layer = (c.some, 1) if tower == "language" else (c.patches, 1)
    edit = ss.AblateActivations(
        DIMS,
        tokens,
        2.5 if replacement == "set" else replacement,
        layers=[layer],
        value=0.3 if replacement == "clamp" else None,
        site=site,
        tower=tower,
    )
    hook = (*place(c, tower, site, layer), sets(c, tower, replacement))
    run, states = agree(c, edit, [hook], tower, site)
    probe = ss.probes.ResidualStates(tower=tower, site=site)
    plain = c.lvlm.run(c.sample, probes=[probe])[probe].states[:, layer]
    edited, chosen = states[:, layer], torch.zeros(plain.shape[-1], dtype=torch.bool)
    chosen[DIMS] = True
    assert torch.equal(edited[~tokens].nan_to_num(), plain[~tokens].nan_to_num())
    assert torch.equal(edited[tokens][:, ~chosen], plain[tokens][:, ~chosen])
    effect = run.effects[edit]
    changed = (edited != plain).any(-1) & tokens  # a clamp may leave a token as it is
    assert torch.equal(effect.rows[:, 0], changed.sum(1))
    assert changed.any()
    assert effect.mass_before.isnan().all()


@pytest.mark.parametrize("tower", ["language", "vision"])
@pytest.mark.parametrize("family", FAMILIES)
def test_patching_states_of_another_image(case, family, tower):
    """Two layers at once, from the same prompt with its pixels turned upside down."""
    c = case(family)
    turned = c.sample.inputs["pixel_values"].flip(-1)
    other = c.lvlm.prepare(inputs={**c.sample.inputs, "pixel_values": turned})
    probe = ss.probes.ResidualStates(tower=tower, layers=[0, 1])
    donor = c.lvlm.run(other, probes=[probe])[probe]
    tokens = c.some if tower == "language" else c.patches
    edit = ss.PatchActivations(donor, "resid_post", tokens, [0, 1], tower=tower)

    def patch(layer):
        def change(states, rows, n):
            given = donor.states[rows, layer, :n]
            return torch.where(tokens[rows, :n, None], given, states)

        return (*place(c, tower, "resid_post", layer), on_prompt(c, tower, change))

    run, states = agree(c, edit, [patch(0), patch(1)], tower)
    for i in (0, 1):
        assert torch.equal(states[:, i][tokens], donor.states[:, i][tokens])
    assert run.effects[edit].layers == (0, 1)
    as_tensor = ss.PatchActivations(donor.states, "resid_post", tokens, [0, 1], tower=tower)
    again = c.lvlm.run(c.sample, interventions=[as_tensor])
    assert torch.equal(again.logits, run.logits)


def test_patching_all_tokens_from_another_image_gives_its_answer(case):
    """The causal test's upper end: all that the second half knows comes from the donor."""
    c = case("llava-clip-llama")
    turned = c.sample.inputs["pixel_values"].flip(-1)
    other = c.lvlm.prepare(inputs={**c.sample.inputs, "pixel_values": turned})
    probe = ss.probes.ResidualStates(layers=[1])
    there = c.lvlm.run(other, probes=[probe])
    edit = ss.PatchActivations(there, "resid_post", "all", [1])
    run = c.lvlm.run(c.sample, interventions=[edit])
    assert torch.equal(run.logits[c.live], there.logits[c.live])


@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_tokens_at_the_entrance(case, family):
    c = case(family)
    edit = ss.interventions.ScaleTokens(c.some, 0.25)

    def change(states, rows, n):
        return torch.where(c.some[..., None], 0.25 * states, states)

    hook = (*place(c, "language", "resid_pre", 0), on_prompt(c, "language", change))
    run, states = agree(c, edit, [hook], site="resid_pre")
    plain = ss.probes.ResidualStates(layers=[0], site="resid_pre")
    before = c.lvlm.run(c.sample, probes=[plain])[plain].states[:, 0]
    outside = c.live & ~c.some
    assert torch.equal(states[:, 0][outside], before[outside])
    neutral = ss.interventions.ScaleTokens(c.some, 1.0, allow_noop=True)
    run = c.lvlm.run(c.sample, interventions=[neutral])
    assert torch.equal(run.logits, c.lvlm.run(c.sample).logits)
    assert run.effects[neutral].rows.sum() == 0


def fronted(c, states, tokens):
    """Chosen image tokens first, the others behind them, image by image, written as a list."""
    out = states.clone()
    for b in range(len(states)):
        for image in range(int(c.sample.tokens.image[b].max()) + 1):
            block = (c.sample.tokens.image[b] == image).nonzero().flatten().tolist()
            order = [p for p in block if tokens[b, p]] + [p for p in block if not tokens[b, p]]
            for to, source in zip(block, order, strict=True):
                out[b, to] = states[b, source]
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_sinks_to_the_front(case, family):
    c = case(family)
    tokens = c.some & (c.sample.tokens.image >= 0)
    edit = ss.interventions.SinkToFront(tokens)

    def change(states, rows, n):
        return fronted(c, states, tokens)

    hook = (*place(c, "language", "resid_pre", 0), on_prompt(c, "language", change))
    run, states = agree(c, edit, [hook], site="resid_pre")
    text = c.live & (c.sample.tokens.image < 0)
    probe = ss.probes.ResidualStates(layers=[0], site="resid_pre")
    plain = c.lvlm.run(c.sample, probes=[probe])[probe].states[:, 0]
    assert torch.equal(states[:, 0][text], plain[text])
    front = torch.zeros_like(tokens)
    for b in range(2):
        front[b, (c.sample.tokens.image[b] == 0).nonzero().flatten()[0]] = True
    already = ss.interventions.SinkToFront(front, allow_noop=True)
    run = c.lvlm.run(c.sample, interventions=[already])
    assert torch.equal(run.logits, c.lvlm.run(c.sample).logits)


@pytest.mark.parametrize("family", ["llava-clip-llama", "gemma3"])
@pytest.mark.parametrize("steps", ["prefill", "all"])
def test_edited_states_live_on_in_the_cache(case, family, steps):
    c = case(family)
    edits = [
        ss.AblateActivations(DIMS, c.some, "mean", [1], steps=steps),
        ss.interventions.ScaleTokens(c.other, 0.5, steps=steps),
    ]

    def scale(states, rows, n):
        return torch.where(c.other[..., None], 0.5 * states, states)

    hooks = [
        (*place(c, "language", "resid_pre", 0), on_prompt(c, "language", scale)),
        (*place(c, "language", "resid_post", 1), sets(c, "language", "mean")),
    ]
    out = generate(c, edits, 6)
    inputs = grown_inputs(c.sample, out.sequences, 5)
    answer = reference_run(c, hooks=hooks, inputs=inputs)
    for step, run in enumerate(out.steps):
        want = answer.logits[:, c.live.shape[1] - 1 + step]
        assert off(run.logits[:, -1], want) <= 1e-5
        assert (edits[0] in run.effects) == (step == 0)


def test_the_mean_of_channels_survives_fp16(case):
    """A sum over tokens of 3e4 each is beyond fp16; their mean is not."""
    c = case("llava-clip-llama", "sdpa", torch.float16)
    set_ = ss.AblateActivations([5], "all", 3.0e4, [1], site="mlp_out")
    mean = ss.AblateActivations([5], c.some, "mean", [1], site="mlp_out", allow_noop=True)
    probe = ss.probes.ResidualStates(layers=[1], site="mlp_out")
    states = c.lvlm.run(c.sample, probes=[probe], interventions=[set_, mean])[probe].states
    assert (states[:, 0, :, 5][c.live] == 3.0e4).all()

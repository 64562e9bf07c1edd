"""What a pass does not show to be so is refused by name on its block or tower, and leaves the rest working."""

from functools import wraps

import pytest
import torch
from tiny_families import build, inputs_of, variant, variant_inputs

import sinkscope as ss
from sinkscope.errors import AttentionCallError, ModelError
from sinkscope.models import watching
from sinkscope.probes import (
    AttentionMass,
    AttentionValues,
    ContributionNorms,
    HeadWrites,
    LogitLens,
    ResidualStates,
    TokenNorms,
    ValueNorms,
)
from sinkscope.testing import random_image, tiny_llava

ALL = {"all": "all"}


def made(name):
    """A tiny model by its type, or a decoder inside LLaVA; its sample, and its own logits."""
    kind, _, decoder = name.partition("+")
    model = variant("decoder", decoder) if decoder else build(kind)
    inputs = variant_inputs(decoder, model) if decoder else inputs_of(kind, model)
    lvlm = ss.LVLM(model)
    with torch.no_grad():
        logits = model(**inputs).logits
    return lvlm, lvlm.prepare(inputs=inputs), logits


@torch.no_grad()
def hooked(lvlm, sample, paths, edit=None):
    """What modules at some paths put out in a plain pass, where one may be edited, and the logits."""
    seen, handles = {}, []
    for path in paths:

        def keep(module, args, out, path=path):
            first = out[0] if isinstance(out, tuple) else out
            if edit is not None and path == paths[0]:
                first = edit(first.clone())
            seen[path] = first
            return (first, *out[1:]) if isinstance(out, tuple) else first

        handles.append(lvlm.module.get_submodule(path).register_forward_hook(keep))
    logits = lvlm.module(**sample.inputs).logits
    for handle in handles:
        handle.remove()
    return seen, logits


@pytest.mark.parametrize(
    ("name", "scale", "cap"),
    [
        ("gemma4", 1.0, 5.0),
        ("mistral_large4", 1.0, 30.0),
        ("granite_docling", 0.25, 0.0),
        ("cohere2_vision", 1.0, 0.0),
    ],
)
def test_the_lens_of_the_last_block_is_the_logits(name, scale, cap):
    """With the soft-cap or the scale that the model applies, and the norm that reads the last block."""
    lvlm, sample, logits = made(name)
    lens = lvlm.anatomy.lens
    assert (lens.scale, lens.cap, lens.why) == (scale, cap, "")
    last = lvlm.anatomy.language.n_layers - 1
    got = lvlm.run(sample, [probe := LogitLens(layers=[last], k=3)])[probe]
    want = logits[:, -1].log_softmax(-1).topk(3)
    assert torch.equal(got.tokens[:, 0, 0], want.indices)
    assert (got.logprobs[:, 0, 0] - want.values).abs().max() < 1e-4
    head = dict(lvlm.report().facts)["head"]
    assert ("soft-capped at" in head, "times 0.25" in head) == (cap > 0, scale != 1)


def test_an_unknown_change_of_the_logits_makes_the_lens_unavailable():
    """A head whose logits the model squares; every other probe works."""
    module, processor = tiny_llava()
    real = type(module).forward

    class Squared(type(module)):
        @wraps(real)
        def forward(self, *args, **kwargs):
            out = real(self, *args, **kwargs)
            out.logits = out.logits * out.logits.abs()
            return out

    module.__class__ = Squared
    lvlm = ss.LVLM(module, processor)
    sample = lvlm.prepare(images=random_image(), text="what")
    with pytest.raises(ModelError, match=r"the head on .*norm of the last block's output does not"):
        lvlm.run(sample, [LogitLens()])
    said = lvlm.report().verdict("LogitLens")
    assert said.status == "unavailable"
    assert "does not give the model's logits" in said.why
    lvlm.run(sample, [TokenNorms(), HeadWrites()])


@pytest.mark.parametrize("name", ["qwen3_5", "llava+qwen3_next", "llava+bitnet", "step3p7"])
def test_contributions_past_a_gate_or_a_norm_are_refused(name):
    """Between attention and its projection: an output gate by channel or by head, a sub-norm."""
    lvlm, sample, _ = made(name)
    language = lvlm.anatomy.language
    for probe in (ContributionNorms(ALL, layers=list(language.attending)), HeadWrites(layers=[2])):
        with pytest.raises(
            ModelError, match=r"o_proj cannot be followed: between attention and it"
        ):
            lvlm.run(sample, [probe])
    assert lvlm.report().verdict("HeadWrites").status == "unavailable"
    mass = AttentionMass(ALL, layers=list(language.attending), null=False)
    assert (lvlm.run(sample, [mass])[mass].mass - 1).abs().max() < 1e-5
    vision = ContributionNorms(ALL, tower="vision")
    lvlm.run(sample, [vision])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("llava+gemma3n_text", r"\[2, 1, \d+, 64\]"),
        ("glm5_next", r"\[1, \d+, 2, 64\]"),
        ("qwen4_exp", r"\[1, \d+, 128\]"),
    ],
)
def test_several_residual_lanes_are_no_rows_of_a_batch(name, shape):
    lvlm, sample, logits = made(name)
    with pytest.raises(
        ModelError, match=rf"layers.0 has no site resid_post: its states are {shape}"
    ):
        lvlm.run(sample, [TokenNorms()])
    with pytest.raises(ModelError, match="the last block's output is no state"):
        lvlm.run(sample, [LogitLens()])
    report = lvlm.report()
    assert report.verdict("TokenNorms").status == "unavailable"
    assert report.verdict("TokenNorms", "vision").status == "exact"
    mass = AttentionMass(ALL, layers=list(lvlm.anatomy.language.attending), null=False)
    run = lvlm.run(sample, [mass, TokenNorms(tower="vision")])
    assert torch.equal(run.logits, logits)
    assert (run[mass].mass - 1).abs().max() < 1e-5


def test_keys_of_cross_attention_are_not_the_prompts_tokens():
    """Groups of the prompt's tokens were laid over the keys of another sequence."""
    lvlm, sample, _ = made("mllama")
    length = sample.tokens.ids.shape[1]
    said = rf"cross_attn are \d+ in 1 rows; expected the {length} tokens .*Write layers=\[0, 2\]"
    with pytest.raises(AttentionCallError, match=said):
        lvlm.run(sample, [AttentionMass(ALL, layers=[0, 1, 2])])
    mass = AttentionMass(ALL, layers=[0, 2], null=False)
    assert (lvlm.run(sample, [mass])[mass].mass - 1).abs().max() < 1e-5
    assert lvlm.report().verdict("AttentionMass").why.startswith("on blocks 0 and 2 of 3: ")


@pytest.mark.parametrize(
    ("name", "after"), [("qwen3_vl", "blocks 0-1"), ("granite_docling", "block 0")]
)
def test_states_that_enter_between_blocks_are_reported(name, after):
    """DeepStack: resid_post(l) is not resid_pre(l + 1), and the report says where and what enters."""
    lvlm, sample, _ = made(name)
    post, pre = ResidualStates(), ResidualStates(site="resid_pre")
    run = lvlm.run(sample, [post, pre])
    off = (run[post].states[:, :-1] - run[pre].states[:, 1:]).abs().amax((0, 2, 3)) > 1e-3
    proofs = lvlm.anatomy.language.proofs
    assert [not proof.follows for proof in proofs[:-1]] == off.tolist()
    report = lvlm.report()
    assert any(f"behind {after}." in note for note in report.notes)
    assert "before decoder block 1" in dict(report.facts)["also enters"]


def test_blocks_in_front_of_a_merger_have_other_tokens():
    lvlm, sample, _ = made("minicpmv4_6")
    said = r"layers.0 has no site resid_post: its states are \[1, 32, 64\]; expected one per token, \[1, 8"
    with pytest.raises(ModelError, match=said + r".* Write layers=\[2\] for the rest"):
        lvlm.run(sample, [TokenNorms(tower="vision")])
    with pytest.raises(AttentionCallError, match=r"are 32 in 1 rows; expected the 8 tokens"):
        lvlm.run(sample, [ValueNorms(layers=[0, 1, 2], tower="vision")])
    run = lvlm.run(
        sample,
        [
            last := TokenNorms(layers=[2], tower="vision"),
            AttentionMass(ALL, layers=[2], tower="vision"),
        ],
    )
    want = hooked(lvlm, sample, [lvlm.anatomy.vision.blocks[2]])[0].popitem()[1]
    assert sample.tokens.vision.layout is not None
    layout = sample.tokens.vision.layout[0]
    assert torch.equal(run[last].norms[0, 0], want.reshape(-1, 64)[layout].norm(dim=-1))


def test_spatial_states_are_read_and_edited_in_raster_order():
    """States ``[image row column d]`` of a SAM tower are one row of tokens, also under an edit."""
    lvlm, sample, logits = made("got_ocr2")
    blocks = lvlm.anatomy.vision.blocks
    probes = [ResidualStates(tower="vision", site=site) for site in ("resid_pre", "resid_post")]
    run = lvlm.run(sample, probes)
    seen, _ = hooked(lvlm, sample, list(blocks))
    want = torch.stack([seen[path].flatten(1, 2) for path in blocks], dim=1)
    assert torch.equal(run[probes[1]].states, want)
    assert torch.equal(run.logits, logits)
    assert torch.equal(run[probes[0]].states[:, 1:], want[:, :-1])
    width = seen[blocks[0]].shape[2]

    def edit(states):
        states[:, 5 // width, 5 % width, 3] = 2.5
        return states

    for site, layer in (("resid_post", 0), ("resid_pre", 1)):
        change = ss.AblateActivations([3], [5], 2.5, layers=[layer], site=site, tower="vision")
        got = lvlm.run(sample, [probes[1]], [change])
        seen, moved = hooked(lvlm, sample, list(blocks), edit)
        assert torch.equal(got.logits, moved)
        assert not torch.equal(moved, logits)
        assert torch.equal(got[probes[1]].states[:, 2], seen[blocks[2]].flatten(1, 2))


def test_sizes_of_heads_that_differ_by_block():
    """Global blocks of Gemma 4 have wider heads than local ones."""
    lvlm, sample, _ = made("gemma4")
    said = r"d_head differ: 16 in \[0, 1\], 32 in \[2\].* Write layers=\[0, 1\]"
    with pytest.raises(ModelError, match=said):
        lvlm.run(sample, [AttentionValues()])
    few = [AttentionValues(layers=[0, 1]), AttentionValues(layers=[2])]
    run = lvlm.run(sample, [*few, AttentionMass(ALL), ValueNorms()])
    assert [run[probe].values.shape[-1] for probe in few] == [16, 32]
    given = torch.zeros(32)
    edit = ss.AblateValues("image", given, layers=[2])
    zero = ss.AblateValues("image", "zero", layers=[2])
    pair = [lvlm.run(sample, interventions=[one]).logits for one in (edit, zero)]
    assert torch.equal(*pair)
    with pytest.raises(ModelError, match="d_head differ"):
        lvlm.run(sample, interventions=[ss.AblateValues("image", given, layers=[0, 2])])
    assert any("differ in d_head" in note for note in lvlm.report().notes)


def test_parts_of_another_shape_than_the_stream_are_refused():
    """Attention that puts out ``[token d]`` in a stream ``[image token d]`` of one sequence, and of rows."""
    x = torch.randn(1, 5, 8)
    parts = {"pre": x, "attn_out": x.flatten(0, 1), "mlp_out": x}
    assert watching._sums(parts, 3 * x, packed=True) == ""
    assert "rounding errors" in watching._sums(parts, 2 * x, packed=True)
    assert watching._sums(parts, 3 * x, packed=False).startswith(
        "their shapes are {'pre': [1, 5, 8]"
    )
    swapped = dict.fromkeys(("pre", "mlp_out", "attn_out"), x)
    assert watching._sums(swapped, 3 * x, packed=False) == "its MLP ran before its attention"


@pytest.mark.parametrize("decoder", ["jamba", "bamba"])
def test_the_mixer_of_a_block_without_attention_is_what_runs_first(decoder):
    lvlm, sample, _ = made(f"llava+{decoder}")
    sites = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    probes = [ResidualStates(site=site, layers=[0]) for site in sites]
    run = lvlm.run(sample, probes)
    pre, mixed, added, post = (run[probe].states for probe in probes)
    assert lvlm.anatomy.language.mlp[0].endswith("feed_forward")
    assert (pre + mixed + added - post).abs().max() <= 1e-5 * post.abs().max()


def test_a_block_that_does_not_run_and_one_that_runs_twice_are_refused():
    module, processor = tiny_llava()
    layers = module.model.language_model.layers
    module.config.text_config.num_hidden_layers = (
        module.model.language_model.config.num_hidden_layers
    ) = 2
    lvlm = ss.LVLM(module, processor)
    sample = lvlm.prepare(images=random_image(), text="what")
    for probe in (TokenNorms(layers=[2]), AttentionMass(ALL, layers=[2])):
        with pytest.raises(
            (ModelError, AttentionCallError), match=r"it ran 0 times.*layers=\[0, 1\]"
        ):
            lvlm.run(sample, [probe])
    lvlm.run(sample, [TokenNorms(layers=[0, 1]), AttentionMass(ALL, layers=[0, 1])])
    assert "blocks 0-1 of 3: " in lvlm.report().verdict("AttentionMass").why
    module.config.text_config.num_hidden_layers = (
        module.model.language_model.config.num_hidden_layers
    ) = 3
    layers[2] = layers[1]
    lvlm = ss.LVLM(module, processor)
    with pytest.raises(ModelError, match=r"it ran 2 times.*layers=\[0\]"):
        lvlm.run(sample, [TokenNorms()])
    lvlm.run(sample, [TokenNorms(layers=[0])])

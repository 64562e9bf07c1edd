"""Resumed passes equal whole passes with the same edit, made through nnsight or by plain hooks."""

import copy

import pytest
import torch

import sinkscope as ss
from sinkscope.data.batches import extend
from sinkscope.errors import InputError, LayerError, ModelError
from sinkscope.models.decoder import checked, decoder_inputs, scaled_keys
from sinkscope.models.replay import capture, check_replay, logits_at, resume
from sinkscope.testing import random_image, tiny_gemma3, tiny_llava
from tests.conftest import FAMILIES

FACTORS = (0.0, 0.3, 1.0, 1.7)
KINDS = [(family, "sdpa") for family in FAMILIES] + [("gemma3", "eager"), ("qwen2.5-vl", "eager")]


def whole(lvlm, sample):
    with torch.no_grad():
        return lvlm.module(**sample.inputs).logits


def gpt_oss():
    return ss.LVLM(*tiny_llava("siglip", "gpt_oss", attn_implementation="eager"))


def factors_of(sample, factor, text=1.0):
    return torch.where(sample.tokens.image >= 0, factor, text)


@pytest.mark.parametrize(("family", "kernel"), KINDS)
def test_capture_is_the_plain_pass(family, kernel, tiny, batch):
    lvlm = tiny(family, kernel)
    sample = batch(lvlm)
    seen = capture(lvlm, sample.inputs)
    assert torch.equal(logits_at(seen, seen.hidden), whole(lvlm, sample))
    with torch.no_grad():
        states = lvlm.module(**sample.inputs, output_hidden_states=True).hidden_states
    for block, state in seen.states.items():
        assert torch.equal(state, states[block])


@pytest.mark.parametrize(("family", "kernel"), KINDS)
def test_resume_equals_scale_keys(family, kernel, tiny, batch):
    """Every block, several factors as rows of one pass, on a padded batch of unequal questions."""
    lvlm = tiny(family, kernel)
    sample = batch(lvlm)
    live = sample.tokens.live
    seen = capture(lvlm, sample.inputs)
    for block in range(lvlm.anatomy.language.n_layers):
        scales = torch.cat([factors_of(sample, factor) for factor in FACTORS])
        with torch.no_grad():
            hidden = resume(seen, block, scales, rows=[0, 1] * len(FACTORS))
            logits = logits_at(seen, hidden).unflatten(0, (len(FACTORS), 2))
        for got, factor in zip(logits, FACTORS, strict=True):
            edit = ss.ScaleKeys("image", factor, [block], allow_noop=True)
            expected = lvlm.run(sample, interventions=[edit]).logits
            torch.testing.assert_close(got[live], expected[live], atol=1e-4, rtol=1e-5)


def test_resume_with_learned_sinks_and_windows(batch):
    lvlm = gpt_oss()
    sample = batch(lvlm)
    live = sample.tokens.live
    seen = capture(lvlm, sample.inputs)
    for block in range(3):
        with torch.no_grad():
            got = logits_at(seen, resume(seen, block, factors_of(sample, 0.4)))
        expected = lvlm.run(sample, interventions=[ss.ScaleKeys("image", 0.4, [block])]).logits
        torch.testing.assert_close(got[live], expected[live], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_whole_pass(family, tiny, batch):
    lvlm = tiny(family)
    sample = batch(lvlm)
    seen = capture(lvlm, sample.inputs, [1])
    position = sample.tokens.last[:, None]

    def loss(logits):
        return logits.float().log_softmax(-1)[..., 3].sum()

    ours = factors_of(sample, 0.6).requires_grad_()
    loss(logits_at(seen, resume(seen, 1, ours), position)).backward()
    theirs = factors_of(sample, 0.6).requires_grad_()
    edit = {1: lambda key: key * theirs[:, None, :, None]}
    with scaled_keys(lvlm.module, lvlm.anatomy, edit):
        logits = lvlm.module(**sample.inputs).logits
    loss(logits[torch.arange(2)[:, None], position]).backward()
    assert theirs.grad.abs().max() > 1e-4
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_blocks_before_the_edit_do_not_run(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    seen, ran = capture(lvlm, sample.inputs, [2]), []
    hooks = [
        lvlm.module.get_submodule(path).register_forward_hook(lambda m, a, o: ran.append(m))
        for path in (*lvlm.anatomy.language.mlp, *lvlm.anatomy.vision.mlp)
    ]
    resume(seen, 2, factors_of(sample, 0.5))
    for hook in hooks:
        hook.remove()
    assert ran == [lvlm.module.get_submodule(lvlm.anatomy.language.mlp[2])]


def test_positions_are_read_by_row(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    seen = capture(lvlm, sample.inputs, [0])
    positions = torch.tensor([[5, 3], [7, 7]])
    got = logits_at(seen, seen.hidden, positions)
    expected = whole(lvlm, sample)[torch.arange(2)[:, None], positions]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def fail(*args):
    raise ZeroDivisionError("in the norm")


@pytest.mark.parametrize("own", [False, True])
def test_the_model_is_left_as_it_was(own, tiny, batch):
    model, processor = tiny_llava()
    lvlm = ss.LVLM(model, processor)
    sample = batch(lvlm)
    blocks = [lvlm.module.get_submodule(path) for path in lvlm.anatomy.language.blocks]
    if own:  # as accelerate does
        for block in blocks:
            block.forward = block.forward
    before = [dict(vars(block)) for block in blocks]
    seen, logits = capture(lvlm, sample.inputs), whole(lvlm, sample)
    with pytest.raises(InputError, match="expected \\[row key\\]"):
        resume(seen, 2, torch.ones(2, 3))
    with pytest.raises(InputError, match="expected indices of captured rows, from 0 to 1"):
        resume(seen, 2, factors_of(sample, 0.5), rows=[0, 9])
    hook = lvlm.module.get_decoder().norm.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError, match="in the norm"):
        resume(seen, 2, factors_of(sample, 0.5))
    hook.remove()
    resume(seen, 2, factors_of(sample, 0.5))
    assert [vars(block).get("forward") for block in blocks] == [v.get("forward") for v in before]
    assert "get_image_features" not in vars(lvlm.module.model)
    assert torch.equal(whole(lvlm, sample), logits)


def test_a_wrong_resume_from_a_middle_block_is_refused(batch):
    """A hook on block 0 acts once more when it passes on a state. From block 0 on nothing is wrong."""
    lvlm = ss.LVLM(*tiny_llava())
    inputs = batch(lvlm).inputs
    check_replay(lvlm, inputs)
    block = lvlm.module.get_submodule(lvlm.anatomy.language.blocks[0])
    hook = block.register_forward_hook(lambda part, args, out: out + out.roll(1, -1))
    check_replay(lvlm, inputs, [0])
    with pytest.raises(
        ModelError, match=r"replayed logits from block 1 on differ .*hooks of yours"
    ):
        check_replay(lvlm, inputs)
    hook.remove()
    check_replay(lvlm, inputs, [1, 2])


def test_uncaptured_blocks_are_refused(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    seen = capture(lvlm, sample.inputs, [1])
    with pytest.raises(LayerError, match=r"expected one of \[1\]"):
        resume(seen, 2, factors_of(sample, 0.5))
    with pytest.raises(LayerError, match="expected 0 to 2"):
        capture(lvlm, sample.inputs, [3])


def test_known_features_spare_the_vision_tower(tiny):
    lvlm = tiny("qwen2.5-vl")
    image = random_image(84, 112, 0)
    first, second = (lvlm.prepare(images=image, text=text) for text in ("what", "how many red ?"))
    with torch.no_grad():
        _, features = decoder_inputs(lvlm, first.inputs)
        ran = []
        hook = lvlm.module.model.visual.register_forward_hook(lambda m, a, o: ran.append(m))
        seen = capture(lvlm, decoder_inputs(lvlm, second.inputs, features)[0])
        hook.remove()
    assert not ran
    assert torch.equal(logits_at(seen, seen.hidden), whole(lvlm, second))


@pytest.mark.parametrize("family", FAMILIES)
def test_extended_inputs_are_the_longer_prompt(family, tiny):
    """Teacher forcing: the same as what the model does token by token on its cache."""
    lvlm = tiny(family)
    sample = lvlm.prepare(images=random_image(), text="what is it")
    out = lvlm.generate(sample, max_new_tokens=3)
    answer = out.sequences[0, sample.tokens.ids.shape[1] :].tolist()
    seen = capture(lvlm, extend(sample.inputs, answer), [0])
    logits = logits_at(seen, seen.hidden)[0, -len(answer) - 1 : -1]
    assert logits.argmax(-1).tolist() == answer


def test_extend_refuses_what_it_does_not_know(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    with pytest.raises(InputError, match="Got 2 rows and 1 answers; expected one per row"):
        extend(batch(lvlm).inputs, [3])
    sample = lvlm.prepare(images=random_image(), text="what is it")
    strange = {**sample.inputs, "tile_ids": sample.inputs["input_ids"]}
    with pytest.raises(InputError, match="Got the input 'tile_ids'"):
        extend(strange, [3])


def test_unknown_decoder_arguments_are_refused():
    with pytest.raises(ModelError, match=r"cannot cut \['deepstack'\] into rows"):
        checked({"inputs_embeds": torch.zeros(1, 2, 3), "deepstack": torch.zeros(1)})


def test_soft_cap_only_where_the_model_applies_it(batch):
    """Gemma 3's vision-language class ignores the soft-cap of its config; another may not."""
    model, processor = tiny_gemma3()
    model.config.get_text_config().final_logit_softcapping = 0.5
    lvlm = ss.LVLM(model, processor, verify=False)
    sample = batch(lvlm)
    seen = capture(lvlm, sample.inputs, [0])
    torch.testing.assert_close(logits_at(seen, seen.hidden), whole(lvlm, sample))

    class Capped(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            cap = self.config.get_text_config().final_logit_softcapping
            out.logits = cap * torch.tanh(out.logits / cap)
            return out

    model.__class__ = Capped
    seen = capture(ss.LVLM(model, processor, verify=False), sample.inputs, [0])
    got = logits_at(seen, seen.hidden)
    assert got.abs().max() <= 0.5
    torch.testing.assert_close(got, whole(lvlm, sample))


def test_half_precision(batch):
    model, processor = tiny_llava()
    lvlm = ss.LVLM(copy.deepcopy(model).bfloat16(), processor)
    sample = batch(lvlm)
    seen = capture(lvlm, sample.inputs)
    with torch.no_grad():
        got = logits_at(seen, resume(seen, 1, factors_of(sample, 0.5)))
        factors = factors_of(sample, 0.5).bfloat16()[:, None, :, None]
        with scaled_keys(lvlm.module, lvlm.anatomy, {1: lambda key: key * factors}):
            expected = lvlm.module(**sample.inputs).logits
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_that_ends_early_can_be_resumed(family, tiny, batch):
    lvlm = tiny(family)
    sample = batch(lvlm)
    last = lvlm.module.get_submodule(lvlm.anatomy.language.blocks[1])
    ran = []
    hook = last.register_forward_hook(lambda *_: ran.append(1))
    seen = capture(lvlm, sample.inputs, [0, 1], whole=False)
    hook.remove()
    assert not ran
    full = capture(lvlm, sample.inputs)
    assert len(seen) == len(full)
    with torch.no_grad():
        for block in (0, 1):
            scaled = [resume(one, block, factors_of(sample, 0.5)) for one in (seen, full)]
            assert torch.equal(*scaled)
    with pytest.raises(ModelError, match=r"a pass that ended at a block.*whole=True"):
        _ = seen.hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_later_blocks_are_scaled_by_what_they_read(family, tiny, batch):
    """Against the same edits by hand, whose factors are taken from a pass with the first one."""
    lvlm = tiny(family)
    sample = batch(lvlm)
    seen, image = capture(lvlm, sample.inputs), sample.tokens.image >= 0
    first = factors_of(sample, 0.4)

    def decide(state):
        return torch.where(image, state.float().norm(dim=-1).sigmoid(), 1.0)

    with torch.no_grad():
        got = resume(seen, 0, first, later={1: decide})
        reads = []
        edits = {0: lambda key: key * first[:, None, :, None]}
        block = lvlm.module.get_submodule(lvlm.anatomy.language.blocks[1])
        hook = block.register_forward_pre_hook(
            lambda m, args, named: reads.append(args[0] if args else named["hidden_states"]),
            with_kwargs=True,
        )
        with scaled_keys(lvlm.module, lvlm.anatomy, edits):
            whole(lvlm, sample)
        hook.remove()
        edits[1] = lambda key: key * decide(reads[0])[:, None, :, None]
        with scaled_keys(lvlm.module, lvlm.anatomy, edits):
            expected = whole(lvlm, sample)
    torch.testing.assert_close(logits_at(seen, got), expected, atol=1e-5, rtol=1e-5)

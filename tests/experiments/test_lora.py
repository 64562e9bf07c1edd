"""LoRA: its size, its training, and a base that is bitwise what it was."""

import copy
import importlib.util

import pytest
import torch

import sinkscope as ss
from sinkscope import baselines, detectors
from sinkscope.bundled import TRAIN_SEEDS, scene_questions
from sinkscope.errors import InputError, LayerError, ModelError
from sinkscope.experiments.gating import choose_rank, target_paths

QUESTIONS = list(scene_questions(6, 4, seeds=TRAIN_SEEDS))


@pytest.fixture(scope="module")
def lvlm():
    return ss.load_bundled()


@pytest.fixture(scope="module")
def gate(lvlm):
    return ss.LSG.for_model(lvlm, 2, v_detector=detectors.NoSinks())


@pytest.fixture(scope="module")
def trained(lvlm, gate):
    before = copy.deepcopy(lvlm.module.state_dict())
    asked = {name: p.requires_grad for name, p in lvlm.module.named_parameters()}
    kinds = [type(m) for m in lvlm.module.modules()]
    adapter = baselines.lora(lvlm, QUESTIONS, 2, like=gate, epochs=4, lr=1e-2, validation=0)
    return adapter, before, asked, kinds


def test_the_base_is_bitwise_what_it_was(lvlm, trained):
    _, before, asked, kinds = trained
    after = lvlm.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: p.requires_grad for name, p in lvlm.module.named_parameters()} == asked
    assert [type(m) for m in lvlm.module.modules()] == kinds
    assert all(p.grad is None for p in lvlm.module.parameters())


def test_size_is_the_closest_to_the_gate(lvlm, gate, trained):
    adapter = trained[0]
    wanted = sum(p.numel() for p in gate.parameters())
    counted = sum(up.numel() + down.numel() for up, down in adapter.factors.values())
    assert adapter.parameters == counted
    assert adapter.wanted == wanted
    per_rank = counted // adapter.rank
    sizes = {rank: abs(per_rank * rank - wanted) for rank in range(1, 40)}
    assert adapter.rank == min(sizes, key=sizes.__getitem__)
    assert f"{adapter.parameters} parameters (a gate has {wanted})" in repr(adapter)


def test_the_papers_rank_has_the_size_of_the_papers_gate():
    """r = 8 on the four projections of a block of width 4096, beside a gate of 262,338 + LayerNorm."""

    class Gate:
        @staticmethod
        def parameters():
            return [torch.empty(262_338)]

    assert choose_rank(4 * (4096 + 4096), Gate(), None) == (8, 262_338)


def test_the_loss_falls(trained):
    lines = [line for line in trained[0].history if line["split"] == "train"]
    losses = torch.tensor([line["loss"] for line in lines])
    assert len(losses) == 4 * 3
    assert losses[-3:].mean() < losses[:3].mean()


def test_applied_is_what_peft_computes(lvlm, trained):
    """The merged weights against peft's own forward pass with the same factors."""
    from peft import LoraConfig, inject_adapter_in_model

    adapter = trained[0]
    sample = lvlm.prepare(images=QUESTIONS[0]["image"], text=QUESTIONS[0]["question"])
    plain = lvlm.run(sample, logits="last").logits
    with adapter.apply(lvlm) as edited:
        got = edited.run(sample, logits="last").logits
    again = lvlm.run(sample, logits="last").logits
    assert torch.equal(plain, again), "the block has ended"
    twin = copy.deepcopy(lvlm.module)
    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.factors)
    )
    inject_adapter_in_model(config, twin)
    for path, (up, down) in adapter.factors.items():
        layer = twin.get_submodule(path)
        layer.lora_B["default"].weight.data.copy_(up)
        layer.lora_A["default"].weight.data.copy_(down)
    with torch.no_grad():
        want = twin.eval()(**sample.inputs).logits[:, -1:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 1e-2


def test_an_error_inside_the_block_restores_the_base(lvlm, trained):
    adapter, before, _, _ = trained
    with pytest.raises(RuntimeError, match="mine"), adapter.apply(lvlm):
        raise RuntimeError("mine")
    after = lvlm.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_seed_repeats_the_result(lvlm, trained):
    given = {"rank": 2, "epochs": 1, "lr": 1e-2, "seed": 3}
    one, two = (baselines.lora(lvlm, QUESTIONS, 2, **given) for _ in range(2))
    assert one.history == two.history
    for path, pair in one.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, two.factors[path], strict=True))
    other = baselines.lora(lvlm, QUESTIONS, 2, **{**given, "seed": 4})
    assert other.history != one.history


def test_compared_like_any_other_condition(lvlm, trained):
    conditions = {"base": [], "LoRA": trained[0], "front": baselines.sink_to_front()}
    rules = {"v_detector": detectors.NoSinks(), "l_detector": detectors.NoSinks()}
    table = ss.compare(lvlm, QUESTIONS[:8], conditions, **rules).table
    touched = table.groupby("condition")["touched"].mean().to_dict()
    assert touched == {"base": 0.0, "LoRA": 1.0, "front": 0.0}
    plain = table[table["condition"] != "LoRA"].pivot(
        index="item", columns="condition", values="given"
    )
    assert (plain["base"] == plain["front"]).all(), "the adapter is gone"
    sample = lvlm.prepare(images=QUESTIONS[0]["image"], text=QUESTIONS[0]["question"])
    with trained[0].apply(lvlm):
        alone = lvlm.generate(sample, max_new_tokens=1).text[0]
    assert table[table["condition"] == "LoRA"]["given"].iloc[0] == alone


def test_targets(lvlm):
    block = lvlm.anatomy.language.blocks[1]
    attention = [f"{block}.self_attn.{name}_proj" for name in "qkvo"]
    assert target_paths(lvlm, 1, None) == attention
    assert target_paths(lvlm, 1, ["q_proj", "v_proj"]) == [attention[0], attention[2]]
    assert target_paths(lvlm, 1, ["down_proj"]) == [f"{block}.mlp.down_proj"]


def test_wrong_use_is_refused(lvlm, gate, monkeypatch):
    with pytest.raises(InputError, match="expected one of them"):
        baselines.lora(lvlm, QUESTIONS, 2)
    with pytest.raises(InputError, match="expected one of them"):
        baselines.lora(lvlm, QUESTIONS, 2, like=gate, rank=2)
    with pytest.raises(InputError, match="an int of at least 1"):
        baselines.lora(lvlm, QUESTIONS, 2, rank=0)
    with pytest.raises(LayerError, match="from 0 to 4"):
        baselines.lora(lvlm, QUESTIONS, 5, rank=1)
    with pytest.raises(InputError, match="Did you mean 'q_proj'"):
        baselines.lora(lvlm, QUESTIONS, 2, rank=1, targets=["q_porj"])
    with pytest.raises(InputError, match="empty dataset"):
        baselines.lora(lvlm, [], 2, rank=1)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else real(name)
    )
    with pytest.raises(ModelError, match=r"pip install \"sinkscope\[lora\]\""):
        baselines.lora(lvlm, QUESTIONS, 2, rank=1)


def test_another_model_is_refused(trained):
    from sinkscope.testing import tiny_llava

    other = ss.LVLM(*tiny_llava("clip", "llama"), verify=False)
    with torch.device("meta"):
        empty = ss.LVLM(type(other.module)(other.module.config), verify=False)
    with pytest.raises(ModelError, match="whose weights are here"):
        baselines.lora(empty, QUESTIONS, 1, rank=1)
    with pytest.raises(ModelError, match="expected"), trained[0].apply(other):
        pass

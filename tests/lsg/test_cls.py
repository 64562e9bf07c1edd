"""A gate whose V-sinks are CLS: traced, attached, trained and kept, against plain PyTorch."""

import json

import pytest
import torch

import sinkscope as ss
from sinkscope.data.batches import make_batch, read_dataset
from sinkscope.errors import CheckpointError, DetectorError, InterventionError
from sinkscope.lsg.passes import answer_losses, frozen, share
from tests.keeping_cls import cls_of, keeping_cls, plain_keeping_cls
from tests.lsg.reference import Gated, sequential
from tests.lsg.test_data import records
from tests.lsg.test_training_loss import NAMES, reference_loss

CLS = ss.detectors.VisionTokens("cls")


@pytest.fixture(scope="module")
def lvlm():
    return keeping_cls()


@pytest.fixture(scope="module")
def twin():
    return plain_keeping_cls("eager")[0].eval().requires_grad_(requires_grad=False)


def gate_for(lvlm, layer=0, **choices):
    """A gate whose coefficients differ from row to row."""
    gate = ss.LSG.for_model(lvlm, layer, v_detector=CLS, **choices)
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (gate.outer.weight, gate.outer.bias, gate.inner.bias):
            tensor.add_(torch.randn(tensor.shape, generator=made))
    return gate


def off(got, want, live):
    return float((got - want)[live].abs().max() / want.abs().max())


@pytest.mark.parametrize("layer", ["embed", 0, 1])
def test_traced_and_attached_equal_plain_pytorch(lvlm, twin, batch, layer):
    sample, gate = batch(lvlm), gate_for(lvlm, layer)
    v, image, live = cls_of(sample), sample.tokens.image >= 0, sample.tokens.live
    assert v.sum(dim=1).tolist() == [1, 2]
    ref = Gated(twin, sequential(gate), layer, [v, image & ~v], sample.tokens.last)
    with torch.no_grad(), ref.on():
        want = twin(**sample.inputs).logits
    run = lvlm.run(sample, interventions=[gate])
    assert off(run.logits, want, live) <= 1e-5
    assert torch.allclose(run.effects[gate].extra["coefficients"][:, 0], ref.coefficients)
    with torch.no_grad(), gate.attach(lvlm.module):
        got = lvlm.module(**sample.inputs).logits
    assert off(got, want, live) <= 1e-5
    there = lvlm.run(sample, interventions=[gate], remote="local", logits="all")
    assert torch.equal(there.logits, run.logits)


def test_generated_tokens_are_those_of_the_attached_gate(lvlm, batch):
    sample, gate = batch(lvlm), gate_for(lvlm, decode="refresh")
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    options["suppress_tokens"] = [lvlm.anatomy.image_token_id]
    traced = lvlm.generate(sample, interventions=[gate], **options)
    with gate.attach(lvlm.module):
        plain = lvlm.module.generate(**sample.inputs, **options, do_sample=False)
    assert torch.equal(plain, traced.sequences)


def test_training_sees_the_same_tokens(lvlm, twin):
    batch = make_batch(lvlm, read_dataset(records()), range(5))
    gate = gate_for(lvlm)
    v, image = cls_of(batch), batch.tokens.image >= 0
    modules = sequential(gate)
    expected, _ = reference_loss(twin, gate, modules, batch, [v, image & ~v])
    expected.backward()
    with frozen(lvlm.module):
        got = answer_losses([gate], share(lvlm, batch, [gate.config.edited]))
        (got.total / got.tokens).backward()
    torch.testing.assert_close(got.total / got.tokens, expected, atol=1e-5, rtol=1e-5)
    theirs = dict(modules.named_parameters())
    for old, new in NAMES.items():
        mine = gate.get_parameter(new + "weight").grad
        torch.testing.assert_close(mine, theirs[old + "weight"].grad, atol=1e-5, rtol=1e-5)


def test_it_is_trained_and_kept(lvlm, tmp_path):
    made = ss.train_lsg(lvlm, records(), [0], v_detector=CLS, epochs=1, validation=0.0)
    assert made.gate.config.v_detector == {"name": "VisionTokens", "kind": "cls"}
    made.gate.save_pretrained(tmp_path / "gate")
    loaded = ss.LSG.from_pretrained(tmp_path / "gate", lvlm=lvlm)
    assert loaded.config == made.gate.config
    assert ss.lsg.detector_of(loaded.config.v_detector) == CLS


def test_a_file_with_another_kind_is_refused(lvlm, tmp_path):
    gate_for(lvlm).save_pretrained(tmp_path / "gate")
    path = tmp_path / "gate" / "config.json"
    data = json.loads(path.read_text())
    data["gate"]["v_detector"]["kind"] = "patch"
    path.write_text(json.dumps(data))
    with pytest.raises(
        CheckpointError, match=r"is impossible: Got v_detector=.*: Got kind='patch'"
    ):
        ss.LSG.from_pretrained(tmp_path / "gate")


def test_a_model_that_drops_cls_is_refused_when_the_gate_is_made_and_when_it_is_used(
    lvlm, tiny, batch
):
    dropping = tiny("llava-clip-llama")
    with pytest.raises(DetectorError, match="whose projector drops it"):
        gate_for(dropping)
    gate, sample = gate_for(lvlm).adopt(dropping), batch(dropping)  # the sizes are the same
    with pytest.raises(DetectorError, match="whose projector drops it"):
        dropping.run(sample, interventions=[gate])
    with (
        gate.attach(dropping.module),
        torch.no_grad(),
        pytest.raises(DetectorError, match="drops it"),
    ):
        dropping.module(**sample.inputs)


def test_it_is_no_rule_for_l_sinks(lvlm):
    with pytest.raises(InterventionError, match=r"l_detector=VisionTokens.*a rule for states"):
        gate_for(lvlm, groups=("V", "L", "rest"), l_detector=CLS)


def test_the_attention_rule_is_refused_and_this_one_is_named(lvlm):
    with pytest.raises(DetectorError, match=r"Got Received\(.*VisionTokens\('cls'\)"):
        ss.LSG.for_model(lvlm, 0, v_detector=ss.detectors.Received())

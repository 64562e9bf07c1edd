"""greedy_stack: order, gains and the chosen prefix."""

import pytest
import torch

import sinkscope as ss
from sinkscope.data.batches import make_batch, read_dataset
from sinkscope.errors import InputError, InterventionError
from sinkscope.lsg.result import GateStack
from sinkscope.testing import tiny_llava
from tests.lsg.test_train import RULE, records


@pytest.fixture
def lvlm():
    return ss.LVLM(*tiny_llava(), verify=False)


def gate_of(lvlm, layer, seed):
    gate = ss.LSG.for_model(lvlm, layer, v_detector=RULE)
    with torch.no_grad():
        gate.outer.bias.normal_(std=3.0, generator=torch.Generator().manual_seed(seed))
    return gate


def attached_loss(lvlm, gates, data):
    """transformers' loss per answer token with the gates attached, a record at a time."""
    read = read_dataset(data)
    total = tokens = 0.0
    for gate in gates:
        gate.attach(lvlm.module)
    for row in range(len(data)):
        batch = make_batch(lvlm, read, [row])
        with torch.no_grad():
            loss = lvlm.module(**batch.inputs, labels=batch.labels).loss
        total, tokens = total + float(loss) * batch.answer_tokens, tokens + batch.answer_tokens
    for gate in gates:
        gate.detach()
    return total / tokens


def test_the_order_is_that_of_single_gains_and_scores_are_those_of_attached_gates(lvlm):
    data = records(6)
    gates = [gate_of(lvlm, layer, seed) for seed, layer in enumerate((1, "embed", 0))]
    stack = ss.lsg.greedy_stack(lvlm, gates, data, batch=4)
    base = attached_loss(lvlm, [], data)
    alone = {gate.layer: attached_loss(lvlm, [gate], data) for gate in gates}
    assert stack.base == pytest.approx(base, rel=1e-5)
    assert stack.order == sorted(alone, key=lambda layer: alone[layer])
    assert list(stack.single) == pytest.approx([alone[layer] for layer in stack.order], rel=1e-5)
    for n in range(1, 4):
        expected = attached_loss(lvlm, stack.ordered[:n], data)
        assert stack.stacked[n - 1] == pytest.approx(expected, rel=1e-5)
        assert stack.gains[n - 1] == pytest.approx(base - expected, abs=1e-4)
    assert not any(p.grad is not None for gate in gates for p in gate.parameters())
    table = stack.to_dataframe()
    assert table["layer"].tolist() == stack.order
    assert table["chosen"].sum() == len(stack.gates)
    assert f"loss without a gate: {stack.base:.4f}" in str(stack)
    assert "<table" in stack._repr_html_()


def stacked(lvlm, base, values, score):
    gates = tuple(gate_of(lvlm, layer, 0) for layer in ("embed", 0, 1)[: len(values)])
    return GateStack(gates, base, tuple(values), tuple(values), score)


@pytest.mark.parametrize(
    ("score", "values", "chosen"),
    [
        ("loss", (0.9, 1.1, 0.8), 3),  # loses by the second and wins by the third, as in the paper
        ("loss", (0.9, 0.95, 0.92), 1),
        ("loss", (0.9, 0.9, 0.9), 1),
        ("loss", (1.0, 1.1, 1.2), 0),
        ("accuracy", (1.1, 1.3, 1.2), 2),
        ("accuracy", (0.9, 0.8), 0),
    ],
)
def test_the_best_prefix_is_chosen(lvlm, score, values, chosen):
    stack = stacked(lvlm, 1.0, values, score)
    assert stack.gates == list(stack.ordered[:chosen])


def test_accuracy_is_that_of_generated_answers():
    lvlm = ss.load_bundled()
    data = list(ss.bundled.scene_questions(6, 4, start=20))
    rule = ss.calibrate(
        lvlm, [lvlm.prepare(r["image"], r["question"]) for r in data[:4]]
    ).v_detector
    gates = [ss.LSG.for_model(lvlm, layer, v_detector=rule) for layer in ("embed", 1)]
    stack = ss.lsg.greedy_stack(lvlm, gates, data, score="accuracy", batch=24)
    sample = lvlm.prepare([r["image"] for r in data], [r["question"] for r in data])

    def accuracy(edits):
        texts = lvlm.generate(sample, interventions=edits, max_new_tokens=3).text
        return sum(t.strip() == r["answer"] for t, r in zip(texts, data, strict=True)) / len(data)

    assert stack.base == accuracy([])
    assert stack.single == tuple(accuracy([gate]) for gate in stack.ordered)
    assert stack.stacked[1] == accuracy(list(stack.ordered))
    assert stack.single[0] >= stack.single[1]
    assert min(stack.single) < stack.base


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"score": "f1"}, InputError, "Got score='f1'; expected one of"),
        ({"batch": 0}, InputError, "Got batch=0"),
        ({"dataset": []}, InputError, "Got an empty dataset"),
        ({"gates": []}, InterventionError, r"Got \[\]; expected one LSG or a list"),
    ],
)
def test_mistakes_are_named(lvlm, options, error, message):
    given = {"gates": [gate_of(lvlm, 0, 0)], "dataset": records(2)} | options
    with pytest.raises(error, match=message):
        ss.lsg.greedy_stack(lvlm, **given)


def test_gates_of_one_layer_or_of_another_model_are_refused(lvlm):
    gate = gate_of(lvlm, 0, 0)
    with pytest.raises(
        InputError, match=r"gates of the layers \[0, 0\]; expected every layer once"
    ):
        ss.lsg.greedy_stack(lvlm, [gate, gate_of(lvlm, 0, 1)], records(2))
    other = ss.LVLM(*tiny_llava(heads=2), verify=False)
    with pytest.raises(InterventionError, match="made for another model"):
        ss.lsg.greedy_stack(other, [gate], records(2))

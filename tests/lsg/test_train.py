"""train_lsg: what is learned, what is left alone, and what must give the same weights."""

import dataclasses
import hashlib
import json

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

import sinkscope as ss
from sinkscope.bundled.scenes import TRAIN_SEEDS
from sinkscope.data.batches import make_batch, read_dataset
from sinkscope.errors import InputError, InterventionError, LayerError, ModelError, NonFiniteError
from sinkscope.lsg.train import cost_of
from sinkscope.models.patch_map import MEASURING
from sinkscope.testing import TINY, random_image, tiny_llava
from sinkscope.training import TrainingSettings
from sinkscope.training import loop as looping

RULE = ss.detectors.Norm(8.0)


def records(n=12):
    words = ("circle", "two blue squares", "yes", "red")
    return [
        {"image": random_image(32, 32, i // 2), "question": "what is it", "answer": words[i % 4]}
        for i in range(n)
    ]


@pytest.fixture
def lvlm():
    return ss.LVLM(*tiny_llava(), verify=False)


def weights(result):
    return {
        (layer, name): value.clone()
        for layer, gate in result.gates.items()
        for name, value in gate.state_dict().items()
    }


def same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    return all(torch.allclose(one[k], other[k], rtol=0, atol=tolerance) for k in one)


def train(lvlm, data=None, layers=(0,), **options):
    given = {"batch": 4, "validation": 0.2, "lr": 0.02, "progress": False}
    chosen = {} if "gates" in options else {"layers": layers, "v_detector": RULE}
    return ss.train_lsg(lvlm, data or records(), **(chosen | given | options))


def digest(module):
    out = hashlib.sha256()
    for name, value in module.state_dict().items():
        out.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


def test_a_gate_learns_to_repair_what_its_start_breaks():
    """The bundled model under an untrained gate at "embed" answers worse; training gets it back."""
    lvlm = ss.load_bundled()
    data = list(ss.bundled.scene_questions(16, 4, seeds=TRAIN_SEEDS))
    result = ss.train_lsg(lvlm, data, ["embed"], lr=0.02, batch=8, epochs=1, validation=0.25)
    held = result.history[result.history["split"] == "validation"]["loss"].tolist()
    assert held[0] > 0.5
    assert min(held) < 0.3 * held[0]
    assert result.history.iloc[-1]["rho_rest"] > 0.7
    assert result.gate is result.gates["embed"]


def test_several_layers_at_once_equal_separate_runs(lvlm):
    layers = ["embed", 0, 1]
    options = {"accumulate": 2, "evaluate_every": 1, "patience": 2, "lr": 0.05}
    together = train(lvlm, layers=layers, **options)
    results, ended = together.record["results"], set()
    for layer in layers:
        alone = train(lvlm, layers=[layer], **options)
        mine = {k: v for k, v in weights(together).items() if k[0] == layer}
        assert same(weights(alone), mine, 1e-6)
        found = alone.record["results"][str(layer)]
        assert found["best_step"] == results[str(layer)]["best_step"]
        ended.add(found["ended_early"])
    assert ended == {True, False}, "an early end of one leaves the others alone"


def test_settings_and_arguments_are_one_thing(lvlm):
    data, options = records(6), {"layers": [0], "v_detector": RULE, "validation": 0.0}
    numbers = {"batch": 4, "lr": np.float32(0.02), "epochs": 1, "seed": 3}
    one = ss.train_lsg(lvlm, data, **options, **numbers)
    other = ss.train_lsg(lvlm, data, **options, settings=TrainingSettings(**numbers))
    assert same(weights(one), weights(other))
    assert one.record["settings"] == {**TrainingSettings(**numbers).to_dict(), "append_end": True}
    json.dumps(one.record)
    with pytest.raises(InputError, match=r"and \{'lr': 0\.1\}; expected TrainingSettings alone"):
        ss.train_lsg(lvlm, data, **options, settings=TrainingSettings(), lr=0.1)
    with pytest.raises(InputError, match="Got settings=3"):
        ss.train_lsg(lvlm, data, **options, settings=3)


def test_the_best_weights_are_kept(lvlm):
    result = train(lvlm, evaluate_every=1, epochs=8, lr=0.5, schedule="constant", patience=3)
    held = result.history[result.history["split"] == "validation"]
    best = held.loc[held["loss"].idxmin()]
    found = result.record["results"]["0"]
    assert (found["best_step"], found["best_loss"]) == (best["step"], best["loss"])
    assert found["ended_early"]
    assert held["step"].max() == best["step"] + 3
    again = train(lvlm, gates=[result.gate], lr=1e-9)
    first = again.history[again.history["split"] == "validation"]["loss"].iloc[0]
    assert first == pytest.approx(best["loss"], abs=1e-6)


def test_a_seed_repeats_a_run_and_another_does_not(lvlm):
    one, other = train(lvlm, seed=3, epochs=1), train(lvlm, seed=3, epochs=1)
    assert same(weights(one), weights(other))
    assert one.history.equals(other.history)
    assert not same(weights(one), weights(train(lvlm, seed=4, epochs=1)), 1e-4)


def test_accumulated_batches_are_one_larger_batch(lvlm):
    """Rows have answers of different lengths, so a mean of means would differ."""
    options = {"validation": 0.0, "lr": 0.01}
    whole = train(lvlm, batch=6, **options)
    parts = train(lvlm, batch=2, accumulate=3, **options)
    assert whole.history["loss"].tolist() == pytest.approx(parts.history["loss"].tolist(), abs=1e-4)
    assert same(weights(whole), weights(parts), 1e-3)
    assert not same(weights(whole), weights(train(lvlm, batch=2, **options)), 1e-2)


def hooks_of(lvlm):
    """How many hooks every module has, after a first pass: transformers adds some of its own then."""
    sample = lvlm.prepare(random_image(32, 32, 1), "what is it")
    with torch.no_grad():
        lvlm.module(**sample.inputs)
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in lvlm.module.modules()]


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_trains_and_is_left_as_it_was(family):
    lvlm = ss.LVLM(*TINY[family](dtype=torch.bfloat16), verify=False)
    before = digest(lvlm.module)
    next(iter(lvlm.module.parameters())).requires_grad_(False)
    hooks = hooks_of(lvlm)
    flags = [p.requires_grad for p in lvlm.module.parameters()]
    modes = [m.training for m in lvlm.module.modules()]
    result = train(lvlm, layers=["embed", 0], lr=0.01, validation=0.0, epochs=1)
    assert digest(lvlm.module) == before
    assert [p.requires_grad for p in lvlm.module.parameters()] == flags
    assert [m.training for m in lvlm.module.modules()] == modes
    assert all(p.grad is None for p in lvlm.module.parameters())
    assert hooks_of(lvlm) == hooks
    untrained = ss.LSG.for_model(lvlm, 0, v_detector=RULE)
    assert not same({"": result.gates[0].outer.weight}, {"": untrained.outer.weight}, 1e-4)
    sample = lvlm.prepare(random_image(32, 32, 1), "what is it")
    lvlm.run(sample, interventions=[result.gates[0]])


class Bad(list):
    """Records, until one is read that ends the run."""

    def __init__(self, given, error):
        super().__init__(given)
        self.error, self.reads = error, 0

    def __getitem__(self, index):
        self.reads += 1
        if self.reads > 40:
            raise self.error
        return super().__getitem__(index)


def test_the_model_is_left_as_it_was_when_training_breaks_off(lvlm):
    before = digest(lvlm.module)
    flags = [p.requires_grad for p in lvlm.module.parameters()]
    hooks = hooks_of(lvlm)
    bad = Bad(records(), KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(lvlm, bad, epochs=50)
    assert bad.reads > 40
    assert digest(lvlm.module) == before
    assert [p.requires_grad for p in lvlm.module.parameters()] == flags
    assert all(p.grad is None for p in lvlm.module.parameters())
    assert hooks_of(lvlm) == hooks
    blocks = [lvlm.module.get_submodule(path) for path in lvlm.anatomy.language.blocks]
    assert not any("forward" in vars(block) for block in blocks)


def test_no_gradient_is_kept_below_the_gate(lvlm):
    """Blocks before the edited one run without a graph, and once per batch for all gates."""
    seen = {i: [] for i in range(3)}
    hooks = []
    for i, path in enumerate(lvlm.anatomy.language.blocks):
        part = lvlm.module.get_submodule(path)
        hooks.append(
            part.self_attn.register_forward_hook(
                lambda m, args, out, i=i: seen[i].append(out[0].requires_grad)
            )
        )
    train(lvlm, layers=[0, 1], validation=0.0, batch=12, epochs=1)
    for hook in hooks:
        hook.remove()
    proof = [
        False
    ] * 3  # the model's own pass, a captured and an edited one; block 2 is resumed too
    assert seen == {0: [*proof, False], 1: [*proof, False, True], 2: [*proof, False, True, True]}


def test_the_history_is_tidy(lvlm):
    result = train(lvlm, layers=[0, 1], choices={"groups": ("V", "L", "rest")}, l_detector=RULE)
    table = result.history
    groups = ["rho_V", "rho_L", "rho_rest"]
    expected = ["layer", "step", "epoch", "split", "loss", "accuracy", "lr", *groups]
    assert list(table.columns) == expected
    steps = result.record["steps"]
    assert table.groupby(["layer", "split"]).size().to_dict() == {
        (0, "train"): steps,
        (1, "train"): steps,
        (0, "validation"): 3,
        (1, "validation"): 3,
    }
    assert table[groups].sum(axis=1).tolist() == pytest.approx([1.0] * len(table), abs=1e-5)
    assert table["epoch"].max() == 2.0


def test_the_record_is_plain_and_whole(lvlm):
    result = train(lvlm)
    record = json.loads(json.dumps(result.record))
    assert record["data"]["train"]["records"] + record["data"]["validation"]["records"] == 12
    assert record["data"]["validation"]["images"] == 1
    assert record["settings"]["epochs"] == 2
    assert record["settings"]["seed"] == 0
    assert record["gates"]["0"]["v_detector"] == ss.lsg.describe(RULE)
    assert record["seconds"] > 0
    assert record["versions"]["torch"] == torch.__version__
    assert record["base"]["loss"] > 0
    assert "0" in record["results"]
    own = result.gate.record
    assert own["result"] == result.record["results"]["0"]
    assert own["trained_with"] == []
    assert own["settings"] == result.record["settings"]
    assert "gates" not in own
    text, html = repr(result), result._repr_html_()
    assert text.startswith("1 gate of")
    assert text == result.summary()
    assert "<table" in html
    assert "best_loss" in html
    assert result.estimates()["base_loss"].tolist() == [record["base"]["loss"]]


def test_the_base_loss_is_transformers_own(lvlm):
    data = records(4)
    result = train(lvlm, data, validation_data=data[:3], batch=2)
    read = read_dataset(data[:3])
    total = tokens = 0.0
    for row in range(3):
        batch = make_batch(lvlm, read, [row])
        with torch.no_grad():
            loss = lvlm.module(**batch.inputs, labels=batch.labels).loss
        total += float(loss) * batch.answer_tokens
        tokens += batch.answer_tokens
    assert result.record["base"]["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert result.record["data"]["validation"] == {"records": 3, "images": 2}
    assert result.record["data"]["train"]["records"] == 4


def test_a_dry_run_says_what_it_would_cost_and_runs_nothing(lvlm):
    def fail(*args):
        if id(lvlm.module) not in MEASURING:  # where ViT tokens go is, once for every shape
            raise AssertionError("the model ran")

    hook = lvlm.module.model.register_forward_pre_hook(fail)
    cost = train(lvlm, layers=["embed", 0, 1], v_detector=None, dry_run=True, accumulate=2)
    hook.remove()
    assert (cost.steps, cost.batches, cost.looks, cost.held_batches) == (4, 6, 3, 1)
    assert (cost.plain_blocks, cost.gate_blocks) == (2, (3, 2, 1))
    assert (cost.together, cost.apart) == (14, 15)
    assert "4 steps, 6 training batches; 3 looks at 1 validation batches" in str(cost)
    assert "2 decoder blocks without gradient, then 6 decoder blocks forward and" in str(cost)
    assert "add 27 decoder block passes and 12 of the vision tower" in str(cost)
    seen = {"language": 0, "vision": 0}
    hooks = [
        lvlm.module.get_submodule(path).register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: seen[name] + 1})
        )
        for name in seen
        for path in lvlm.anatomy.tower(name).attention
    ]
    real = train(lvlm, layers=["embed", 0, 1], accumulate=2)
    for hook in hooks:
        hook.remove()
    assert real.record["steps"] == 4
    proof = 3 * 3 + 2  # the model's own pass, a captured and an edited one, and two blocks resumed
    training = cost.batches * (cost.plain_blocks + sum(cost.gate_blocks))
    assert seen["language"] == training + 27 + proof
    assert seen["vision"] == cost.batches * cost.vision_blocks + 12 + cost.vision_blocks * 2


def test_the_bound_of_sharing_tends_to_one_and_a_half():
    bounds = [cost_of(TrainingSettings(), range(1, n), 8, 0, 1, n).bound for n in (8, 32, 400)]
    assert bounds == sorted(bounds)
    assert bounds[1] == pytest.approx(1.45, abs=0.01)
    assert bounds[2] == pytest.approx(1.5, abs=0.01)


def test_schedules():
    cosine = TrainingSettings(warmup=0.1, lr=2.0)
    rates = [cosine.lr_at(step, 20) for step in range(20)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[11] == pytest.approx(1.0)
    assert rates[19] < 0.05
    assert rates[1:] == sorted(rates[1:], reverse=True)
    constant = TrainingSettings(schedule="constant", warmup=0.0, lr=2.0)
    assert {constant.lr_at(step, 20) for step in range(20)} == {2.0}


def test_clipping_bounds_the_step(lvlm, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def spied(self, *args):
        grads = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack(grads).norm()))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    train(lvlm, clip=0.0)
    free = max(norms)
    norms.clear()
    train(lvlm, clip=free / 10)
    assert max(norms) <= free / 10 * 1.001


def test_gates_to_start_from_are_copied(lvlm):
    start = ss.LSG.for_model(lvlm, 1, v_detector=RULE, groups=("V", "rest"), seed=9)
    before = {k: v.clone() for k, v in start.state_dict().items()}
    result = train(lvlm, gates=[start], validation=0.0, epochs=1)
    assert list(result.gates) == [1]
    assert result.gate is not start
    assert all(torch.equal(before[k], v) for k, v in start.state_dict().items())
    assert not torch.equal(result.gate.outer.weight, start.outer.weight)


def broken(lvlm, layer):
    """A gate whose coefficients are NaN."""
    gate = ss.LSG.for_model(lvlm, layer, v_detector=RULE)
    with torch.no_grad():
        gate.outer.bias[0] = float("nan")
    return gate


def test_a_loss_that_is_no_number_stops_at_once(lvlm):
    with pytest.raises(NonFiniteError, match=r"Got a weight for '0' in step 1, at lr=0\.02"):
        train(lvlm, gates=[broken(lvlm, 0)], validation=0.0, warmup=0.0)
    with pytest.raises(NonFiniteError, match=r"Got a loss of nan for '0' in step 1"):
        train(lvlm, gates=[broken(lvlm, 0)], warmup=0.0)


def test_a_gate_that_fails_leaves_the_others_alone(lvlm, tmp_path):
    good = ss.LSG.for_model(lvlm, 1, v_detector=RULE)
    alone = train(lvlm, gates=[good])
    with pytest.warns(UserWarning, match=r"loss of nan for '0' in step 1.*weights of step 0"):
        both = train(lvlm, gates=[broken(lvlm, 0), good], out=tmp_path)
    assert same({"": both.gates[1].outer.weight}, {"": alone.gate.outer.weight}, 1e-7)
    results = both.record["results"]
    assert "loss of nan" in results["0"]["failed"]
    assert results["0"]["best_loss"] is None
    assert "failed" not in results["1"]
    assert set(both.history["layer"]) == {1}
    with pytest.warns(UserWarning, match="loss of nan"):
        again = train(lvlm, gates=[broken(lvlm, 0), good], out=tmp_path)
    assert again.record["results"] == results
    with pytest.raises(InputError, match=r"gates at the layers \[0, 1\]; expected one"):
        _ = both.gate


def test_a_gradient_that_is_no_number_changes_no_weight(lvlm, monkeypatch):
    """The loss before the last step is fine, its gradient is not: without validation nobody would look."""
    gate = ss.LSG.for_model(lvlm, 0, v_detector=RULE)
    backward, calls = torch.Tensor.backward, []

    def explode(self, *args, **kwargs):
        backward(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 6:  # the last of two epochs of three batches
            for group in seen[-1].param_groups:
                group["params"][0].grad.fill_(float("inf"))

    made, seen = torch.optim.AdamW.__init__, []

    def spied(self, *args, **kwargs):
        seen.append(self)
        made(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", explode)
    monkeypatch.setattr(torch.optim.AdamW, "__init__", spied)
    with pytest.raises(NonFiniteError, match=r"Got a gradient of (inf|nan) for '0' in step 6"):
        train(lvlm, gates=[gate], validation=0.0)
    assert len(calls) == 6


def test_every_epoch_has_an_order_of_its_own(lvlm):
    settings = TrainingSettings(batch=4, epochs=3)
    run = looping.Loop([], None, list(range(12)), [], settings)
    orders = [sum((run.plan(3 * epoch + i)[0] for i in range(3)), ()) for epoch in range(3)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(orders)) == 3


def test_weight_decay_and_the_last_token_matter(lvlm):
    options = {"validation": 0.0, "epochs": 1}
    plain = weights(train(lvlm, **options))
    assert not same(plain, weights(train(lvlm, **options, weight_decay=5.0)), 1e-4)
    assert not same(plain, weights(train(lvlm, **options, append_end=False)), 1e-4)


def test_the_model_is_evaluated_while_it_stays_in_training_mode(lvlm):
    """Dropout would act in training mode: the weights must not depend on the mode it is in."""
    expected = weights(train(lvlm, validation=0.0, epochs=1))
    attention = lvlm.module.get_submodule(lvlm.anatomy.language.attention[1])
    attention.attention_dropout = 0.9
    lvlm.module.train()
    assert same(expected, weights(train(lvlm, validation=0.0, epochs=1)))
    assert lvlm.module.training


def test_all_layers_and_odd_lists(lvlm):
    options = {"epochs": 1, "dry_run": True}
    assert train(lvlm, layers=None, **options).alone_blocks == (0, 1, 2)
    assert train(lvlm, layers=np.arange(2), **options).alone_blocks == (1, 2)
    assert train(lvlm, layers=(i for i in (1,)), **options).alone_blocks == (2,)


def test_grad_modes_of_the_caller(lvlm):
    expected = weights(train(lvlm, epochs=1))
    with torch.no_grad():
        assert same(expected, weights(train(lvlm, epochs=1)))
    with torch.inference_mode(), pytest.raises(ModelError, match="expected to be outside of it"):
        train(lvlm)


def test_a_gate_that_is_attached_is_not_overlooked(lvlm):
    gate = ss.LSG.for_model(lvlm, 1, v_detector=RULE)
    with gate.attach(lvlm.module), pytest.raises(InputError, match=r"or gate\.detach\(\)"):
        train(lvlm)
    hook = lvlm.module.get_submodule(lvlm.anatomy.head).register_forward_hook(
        lambda module, args, out: 2 * out
    )
    train(lvlm, epochs=1)  # the head's hook acts on captured passes, too
    hook.remove()
    handle = lvlm.module.register_forward_hook(lambda module, args, out: doubled(out))
    with pytest.raises(ModelError, match="or hooks of yours change it, take them off first"):
        train(lvlm)
    handle.remove()


def doubled(out):
    out.logits = 2 * out.logits
    return out


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": []}, InputError, r"Got layers=\[\] and 0 gates; expected either"),
        ({"layers": 1}, InputError, r"Got layers=1; expected a list\. Write layers=\[1\]"),
        ({"layers": [2]}, LayerError, r"Got layer=2 for a gate in a decoder of 3 blocks"),
        ({"layers": [0, 0]}, InputError, r"Got the layers \[0, 0\]; expected every layer once"),
        ({"batch": 0}, InputError, "Got batch=0; expected an int of at least 1"),
        ({"lr": float("nan")}, InputError, "Got lr=nan; expected a finite number above 0"),
        ({"schedule": "cosin"}, InputError, "Got schedule='cosin'.*Did you mean 'cosine'"),
        ({"warmup": 3.0}, InputError, r"Got warmup=3\.0; expected a share"),
        ({"validation": 1.0}, InputError, r"Got validation=1\.0; expected a share"),
        ({"validation": 0.0, "patience": 2}, InputError, "Got patience=2 and validation=0"),
        ({"checkpoint_every": 0}, InputError, "Got checkpoint_every=0; expected an int"),
        ({"data": []}, InputError, "Got an empty dataset"),
        ({"data": records(2)}, InputError, r"2 records about one image and validation=0\.2"),
        (
            {"data": pd.DataFrame({"a": [1]})},
            InputError,
            r"Got a DataFrame.*to_dict\(orient='records'\)",
        ),
        ({"choices": {"grups": 1}}, InterventionError, r"Got \['grups'\] for a gate"),
        ({"max_answer_tokens": 1}, InputError, r"Record 0 has an answer of \d tokens; expected at"),
    ],
)
def test_mistakes_are_named_before_any_work(lvlm, options, error, message, monkeypatch):
    monkeypatch.setattr(looping.Loop, "run", None)
    data = options.pop("data", records())
    given = {"layers": [0], "v_detector": RULE, "validation": 0.2} | options
    with pytest.raises(error, match=message):
        ss.train_lsg(lvlm, data, **given)


def test_a_gate_of_another_model_is_refused(lvlm):
    other = ss.LVLM(*tiny_llava(heads=2), verify=False)
    gate = ss.LSG.for_model(other, 0, v_detector=RULE)
    with pytest.raises(InterventionError, match="made for another model"):
        ss.train_lsg(lvlm, records(), gates=[gate])
    with pytest.raises(InterventionError, match="expected one LSG or a list"):
        ss.train_lsg(lvlm, records(), gates=["gate"])
    own = ss.LSG.for_model(lvlm, 0, v_detector=RULE)
    with pytest.raises(InputError, match=r"Write gates=\[gate\]"):
        ss.train_lsg(lvlm, records(), gates=own)
    with pytest.raises(
        InputError, match=r"gates together with \['choices', 'v_detector'\]; expected"
    ):
        ss.train_lsg(lvlm, records(), gates=[own], choices={"scale": 2.0}, v_detector=RULE)


def test_a_prompt_without_image_tokens_is_refused(lvlm, monkeypatch):
    make = lvlm.prepare

    def blind(**given):
        sample = make(**given)
        none = torch.full_like(sample.tokens.image, -1)
        return dataclasses.replace(sample, tokens=dataclasses.replace(sample.tokens, image=none))

    monkeypatch.setattr(lvlm, "prepare", blind)
    with pytest.raises(InputError, match=r"Records \[\d+\] have no image token in their prompt"):
        train(lvlm)


def test_weights_elsewhere_cannot_be_trained_with():
    model, processor = tiny_llava()
    with torch.device("meta"):
        empty = transformers.LlavaForConditionalGeneration(model.config)
    far = ss.LVLM(empty, processor, verify=False)
    with pytest.raises(ss.errors.ModelError, match="Got a model without weights here"):
        train(far)


def test_the_curve_is_drawn_with_the_base(lvlm):
    figure = train(lvlm, layers=["embed", 0, 1]).plot()
    left, right = figure.axes
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["layer embed", "layer 0", "layer 1", "training step", "without a gate"]
    assert [t.get_text() for t in right.get_legend().get_texts()] == ["V", "rest"]
    with pytest.raises(InputError, match="expected at least"):
        ss.viz.plot_training(pd.DataFrame({"a": [1]}))

"""A sweep against the same edits made one by one through `ScaleKeys`, on every family."""

import re
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope.data.answers import ask
from sinkscope.errors import (
    CheckpointError,
    DetectorError,
    InputError,
    LayerError,
    ModelError,
    SelectionError,
)
from sinkscope.experiments import Answered, Item, SweepCost
from sinkscope.experiments import sweep as sweep_function
from sinkscope.experiments import sweep_images as images
from sinkscope.experiments import sweeping as sweep_file
from sinkscope.experiments.sweep_images import Batch, edits_of
from sinkscope.models import loading, replay
from sinkscope.testing import plant, random_image, tiny_llava, write_checkpoint
from tests.conftest import FAMILIES

GRID = [(0.3, 0.7), (1.5, 1.0), (0.0, 1.0)]
NORM = ss.detectors.Norm("3sigma")


def some(n_images=2, choices=False):
    """Questions of unequal length, answers of unequal length; the second image has one only."""
    asked = [
        ("what is it", "red", "what"),
        ("how many red shapes are in the picture , and where ?", "3 red shapes", "count"),
        ("why", "yes", "what"),
    ]
    out = []
    for i in range(n_images):
        for question, answer, task in asked if i % 2 == 0 else asked[:1]:
            item = {"question": question, "answer": answer, "task": task, "image_id": f"im{i}"}
            item["image"] = random_image(90, 112, i)
            if choices:
                item["choices"] = ["red", "yes", "3 red shapes", "3 blue squares"]
            out.append(item)
    return out


class Every(ss.detectors.Norm):
    """Flags the ViT tokens above the median norm: V-sinks enough to see both coefficients act."""

    def thresholds(self, result, scores):
        return scores.nan_to_num().median(dim=-1).values


EVERY = Every("3sigma")


def ids_of(lvlm, sample, answer):
    """The answer's tokens behind the prompt, with a space after a word."""
    (prompt,) = sample.texts
    parts = prompt, prompt + ("" if prompt.endswith("\n") else " ") + answer
    before, both = (lvlm.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
    assert both[: len(before)] == before
    return both[len(before) :]


def teacher_forced(lvlm, item, detector):
    """The sample of a prompt and its answer, its V-sinks as `trace_sinks` finds them, the answer."""
    prompt = lvlm.prepare(images=item["image"], text=item["question"])
    ids = ids_of(lvlm, prompt, item["answer"])
    inputs = dict(prompt.inputs)
    for name, value in prompt.inputs.items():
        if torch.is_tensor(value) and value.shape == prompt.inputs["input_ids"].shape:
            fill = {"input_ids": ids[:-1], "attention_mask": [1] * (len(ids) - 1)}
            new = fill.get(name, [0] * (len(ids) - 1))
            inputs[name] = torch.cat([value, torch.tensor([new], dtype=value.dtype)], dim=1)
    sample = lvlm.prepare(inputs=inputs)
    v = ss.trace_sinks(lvlm, sample, detector, ss.detectors.Norm("3sigma")).v_sinks
    return sample, v, ids


def expected(lvlm, ready, block, pair):
    """Log-probability and greedy tokens of one answer, edited through nnsight."""
    sample, v, ids = ready
    rest = (sample.tokens.image >= 0) & ~v
    edits = [
        ss.ScaleKeys(v, pair[0], [block], allow_noop=True),
        ss.ScaleKeys(rest, pair[1], [block], allow_noop=True),
    ]
    logits = lvlm.run(sample, interventions=edits).logits[0, -len(ids) :].float()
    logs = logits.log_softmax(-1)[torch.arange(len(ids)), ids]
    return float(logs.sum()), logits.argmax(-1).tolist() == ids, int(v.sum())


def check_equal(lvlm, items, table, detector):
    ready = [teacher_forced(lvlm, item, detector) for item in items]
    for line in table.to_dict("records"):
        item = ready[line["item"]]
        pair = (line["s_v"], line["s_rest"])
        logprob, right, n_v = expected(lvlm, item, line["edited"], pair)
        assert line["logprob"] == pytest.approx(logprob, abs=1e-4)
        assert line["score"] == float(right)
        assert line["n_v"] == n_v
        assert line["edited"] == line["layer"] + 1
        if line["layer"] == -1 and line["pair"] == 0:
            base, right, _ = expected(lvlm, item, 0, (1.0, 1.0))
            assert line["base_logprob"] == pytest.approx(base, abs=1e-4)
            assert line["base_score"] == float(right)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_scale_keys(family, tiny):
    lvlm, items = tiny(family), some()
    made = ss.sweep(lvlm, items, grid=GRID, v_detector=EVERY)
    assert len(made.table) == len(items) * 3 * len(GRID)
    assert made.table["n_v"].min() > 0
    assert not made.notes
    check_equal(lvlm, items, made.table, EVERY)


def test_equals_scale_keys_on_planted_sinks():
    planted = plant()
    lvlm, items = ss.LVLM(planted.model, planted.processor), some()
    detector = ss.detectors.SinkDimensions(planted.truth.v_dims, 5.0)
    made = ss.sweep(lvlm, items, layers=["embed", 3], grid=GRID, v_detector=detector)
    assert set(made.table["n_v"]) == {len(planted.truth.v_sinks)}
    check_equal(lvlm, items, made.table, detector)
    moved = (made.table["logprob"] - made.table["base_logprob"]).abs()
    assert moved[made.table["pair"] == 0].max() > 1e-3


def test_equals_scale_keys_and_compare_on_the_bundled_model():
    lvlm = ss.load_bundled()
    items = list(ss.bundled.scene_questions(2, 4))
    nothing = ss.detectors.NoSinks("none")
    made = ss.sweep(lvlm, items, layers=[1], grid=GRID, v_detector=nothing)
    check_equal(lvlm, items, made.table, nothing)
    compared = ss.compare(lvlm, items, {"base": []}, batch=1).table
    once = made.table.drop_duplicates("item")
    assert once["base_score"].tolist() == compared["correct"].astype(float).tolist()


def test_all_pairs_of_an_image_without_v_sinks_that_do_the_same_are_one_edit():
    visual = torch.tensor([False, True, True, False])
    pairs = [(0.0, 1.0), (0.5, 0.5), (0.1, 0.5), (2.0, 1.0)]
    edits, of_pair = edits_of(torch.zeros(4, dtype=torch.bool), visual, pairs)
    assert of_pair == [-1, 0, 0, -1]
    assert edits.tolist() == [[1.0, 0.5, 0.5, 1.0]]
    sinks = torch.tensor([False, True, False, False])
    assert edits_of(sinks, visual, pairs)[1] == [0, 1, 2, 3]


def test_choices_equal_every_option_scored_alone(tiny):
    """Options share rows where one begins another; scored alone they must be the same."""
    lvlm, items = tiny("llava-siglip-qwen2"), some(choices=True)
    seen = {}

    def keep(item, answered: Answered):
        seen[item.question, item.image_id] = answered
        return float(answered.right)

    made = ss.sweep(lvlm, items, layers=[0], grid=[(1.0, 0.4)], v_detector=EVERY, score=keep)
    assert len(seen) == 4
    for item in items:
        answered = seen[item["question"], item["image_id"]]
        assert item["choices"][answered.right] == item["answer"]
        for place, text in enumerate(item["choices"]):
            # `keep` saw the base last.
            ready = teacher_forced(lvlm, item | {"answer": text}, EVERY)
            alone, _, _ = expected(lvlm, ready, 0, (1.0, 1.0))
            n = len(ready[2])
            assert answered.choices[place] == pytest.approx(alone / n, abs=1e-4)
    assert "keep" in made.settings["score"]
    chosen = ss.sweep(lvlm, items, layers=[0], grid=[(1.0, 0.4)], v_detector=EVERY)
    assert chosen.score == "choice"
    best = [int(np.argmax(seen[i["question"], i["image_id"]].choices)) for i in items]
    right = [float(i["choices"][b] == i["answer"]) for i, b in zip(items, best, strict=True)]
    assert chosen.table.sort_values("item")["base_score"].tolist() == right


OVERFLOW = [(1e38, 1e38), (0.5, 0.5)]


@pytest.mark.parametrize("options", [{}, {"score": "logprob"}, {"score": "exact"}])
def test_log_probabilities_that_are_no_numbers_are_refused_and_not_stored(options, tiny, tmp_path):
    """NaN was the largest of all choices, and so the right answer and the best cell."""
    items = some(2, choices=not options)
    match = r"log-probability of nan at layer embed, pair \(1e\+38, 1e\+38\), .*'what is it'.*grid"
    with pytest.raises(InputError, match=match):
        ss.sweep(
            tiny("llava-clip-llama"),
            items,
            None,
            OVERFLOW,
            v_detector=NORM,
            out=tmp_path,
            **options,
        )
    assert not list(tmp_path.glob("part-*"))


def test_a_model_that_overflows_by_itself_is_told_so(tiny, monkeypatch):
    module = sys.modules["sinkscope.experiments.sweep_images"]
    real = module.logits_at
    monkeypatch.setattr(module, "logits_at", lambda *given: real(*given) * float("nan"))
    with pytest.raises(InputError, match=r"at the base, without an edit.*model itself overflows"):
        ss.sweep(tiny("llava-clip-llama"), some(1), layers=[0], grid=GRID, v_detector=NORM)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "good", None])
def test_scores_that_are_no_numbers_are_refused(value, tiny):
    def own(item, answered):
        return value if item.image_id == "im1" else answered.logprob

    with pytest.raises(InputError, match=r"score .* at layer 0, pair \(0.3, 0.7\).*image 'im1'"):
        ss.sweep(
            tiny("llava-clip-llama"), some(), layers=[0], grid=GRID, v_detector=NORM, score=own
        )


def test_options_that_begin_alike_share_a_row():
    def tokenizer(text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}

    asked = ask(tokenizer, "?\n", Item(None, "?", "ab", choices=("ab", "abc", "x", "abd")))
    assert asked.feeds == ((97, 98),)
    assert ask(tokenizer, "?\n", Item(None, "?", "a", choices=("a", "b"))).feeds == ((),)


TEXT_FIRST = (
    "{% for part in messages[0]['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} "
    "{% endif %}{% endfor %}<image> answer :"
)


def test_questions_share_what_they_can(tiny):
    """Counted: the tower once for features and once for detection, early blocks once per question."""
    lvlm, items = tiny("llava-clip-llama"), some(1)
    ran = []
    anatomy = lvlm.anatomy
    paths = [anatomy.vision.mlp[0], *anatomy.language.mlp]

    def note(place):
        return lambda module, args, out: ran.append((place, tuple(args[0].shape[:2])))

    ss.sweep(lvlm, items, v_detector=EVERY)  # whatever is done once is done
    hooks = [
        lvlm.module.get_submodule(path).register_forward_hook(note(i - 1))
        for i, path in enumerate(paths)
    ]
    try:
        ss.sweep(lvlm, items, layers=[1], grid=GRID, v_detector=EVERY)
    finally:
        for hook in hooks:
            hook.remove()
    tower = [shape for place, shape in ran if place == -1]
    assert len(tower) == 4  # the check of itself runs it twice
    replayed = [(place, rows) for place, (rows, _) in ran if place >= 0][-8:]
    # base: beginning, endings; edited block 2: beginning by pair, endings by pair and question
    assert replayed == [(0, 1), (1, 1), (2, 1), (0, 3), (1, 3), (2, 3), (2, 3), (2, 9)]


def test_batches_do_not_matter_and_back_off(tiny, monkeypatch):
    lvlm, items = tiny("llava-clip-llama"), some()
    whole = ss.sweep(lvlm, items, v_detector=EVERY).table
    small = ss.sweep(lvlm, items, v_detector=EVERY, batch=2).table
    columns = ["logprob", "base_logprob", "score"]
    np.testing.assert_allclose(whole[columns], small[columns], atol=1e-5)
    real, most = images.resume_stem, []

    def short(seen, block, factors):
        if len(factors) > 3:
            raise torch.OutOfMemoryError("no memory")
        most.append(len(factors))
        return real(seen, block, factors)

    monkeypatch.setattr(images, "resume_stem", short)
    again = ss.sweep(lvlm, items, v_detector=EVERY).table
    np.testing.assert_allclose(whole[columns], again[columns], atol=1e-5)
    assert max(most) == 2  # 11, 5, 2
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        ss.sweep(lvlm, items, v_detector=EVERY, batch=4)


def test_batch_gives_up_at_one():
    def work(a, b):
        raise torch.OutOfMemoryError("none at all")

    with pytest.raises(torch.OutOfMemoryError, match="none at all"):
        Batch("auto", 8).chunks(3, work)


def test_model_is_left_as_it_was(tiny):
    lvlm = tiny("gemma3")
    sample = lvlm.prepare(images=random_image(), text="what")
    with torch.no_grad():
        before = lvlm.module(**sample.inputs).logits
        ss.sweep(lvlm, some(1), layers=[0], grid=GRID, v_detector=EVERY)
        assert torch.equal(lvlm.module(**sample.inputs).logits, before)


def test_dry_run_counts_and_runs_nothing(tiny, monkeypatch):
    lvlm = tiny("llava-clip-llama")
    monkeypatch.setattr(lvlm.module, "forward", None)
    cost = ss.sweep(lvlm, some(), dry_run=True)
    assert isinstance(cost, SweepCost)
    cells = 4 * 3 * 11
    assert (cost.questions, cost.images, cost.layers, cost.pairs) == (4, 2, 3, 11)
    assert cost.forwards == cells + 4
    assert cost.blocks_plain == 3 * (cells + 4)
    # image 0: a beginning and three questions; image 1: one question; blocks 0, 1, 2 edited
    assert cost.blocks == (4 + 1) * (3 + 11 * (3 + 2 + 1))
    assert 1 < cost.bound < 20
    assert "cells" in str(cost)


@pytest.mark.parametrize("choices", [False, True])
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_away_gives_the_same_cells(family, groups, choices, tiny, monkeypatch):
    """Whole passes with a row per edit, as a server runs them, in the place of resumed ones."""
    lvlm, asked = tiny(family), some(choices=choices)
    grid = GRID if groups == 2 else [(0.3, 0.5, 0.7), (1.0, 0.0, 1.0)]
    options = {"grid": grid, "v_detector": EVERY, "layers": ["embed", 1], "score": "logprob"}
    options |= {"l_detector": EVERY, "batch": 2} if groups == 3 else {}
    here = ss.sweep(lvlm, asked, **options).table
    for module in (sweep_file, loading):
        monkeypatch.setattr(module, "is_away", lambda _: True)
    monkeypatch.setattr(replay, "capture", None)
    away = ss.sweep(lvlm, asked, **options).table
    pd.testing.assert_frame_equal(here, away, atol=1e-5, rtol=1e-5)


def test_dry_run_needs_no_weights(tmp_path):
    """What a sweep would cost is asked before the weights are fetched."""
    write_checkpoint(*tiny_llava(), tmp_path / "model")
    remote = ss.LVLM.from_pretrained(tmp_path / "model", remote=True)
    assert remote.device.type == "meta"
    here = ss.LVLM.from_pretrained(tmp_path / "model")
    assert ss.sweep(remote, some(), dry_run=True) == ss.sweep(here, some(), dry_run=True)
    lens = replace(remote.anatomy.lens, why="it is odd")
    remote._anatomy = replace(remote.anatomy, lens=lens)
    with pytest.raises(InputError, match=r"logits no probe reads \(it is odd\).*or dry_run=True"):
        ss.sweep(remote, some())


@pytest.mark.parametrize("dry_run", [True, False])
def test_options_are_refused_before_anything_runs(dry_run, tiny, tmp_path, monkeypatch):
    lvlm = tiny("llava-clip-llama")
    monkeypatch.setattr(lvlm.module, "forward", None)

    def refused(error, match, **options):
        with pytest.raises(error, match=match):
            ss.sweep(lvlm, some(), dry_run=dry_run, **{"v_detector": NORM, **options})

    refused(DetectorError, "Got 'Norm' as detector", v_detector="Norm")
    refused(SelectionError, "merge='median'; expected one of", merge="median")
    refused(InputError, "Write only one", calibration=3)
    (tmp_path / "file").write_text("x")
    refused(InputError, "which is a file", out=tmp_path / "file")
    refused(InputError, "a folder with other files", out=tmp_path)
    refused(CheckpointError, "cannot be written", out=tmp_path / "file" / "inside")
    with pytest.raises(InputError, match="Record 1 has task=3; expected a str"):
        ss.sweep(lvlm, [some()[0], {**some()[0], "task": 3}], dry_run=dry_run)


def test_dry_run_leaves_nothing_behind(tiny, tmp_path):
    lvlm = tiny("llava-clip-llama")
    ss.sweep(lvlm, some(), dry_run=True, out=tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    ss.sweep(lvlm, some(), dry_run=True, out=tmp_path / "a")
    assert [place.name for place in tmp_path.rglob("*")] == ["a"]


@pytest.mark.parametrize("name", ["what", "why"])
def test_the_progress_bar_counts_cells_and_shows_the_time_left(name, tiny, capfd):
    """tqdm writes elapsed<left; the last state has every cell."""
    items = [item for item in some() if item["question"].startswith(name)]
    ss.sweep(tiny("llava-clip-llama"), items, [0], GRID, v_detector=NORM, progress=True)
    said = capfd.readouterr().err.split("\r")
    cells = 3 * len(items)
    assert any(re.search(r"sweeping: .*<(\d\d:\d\d|\?)", line) for line in said)
    assert re.search(rf"sweeping: 100%.* {cells}/{cells} \[\d\d:\d\d<00:00", said[-1])
    ss.sweep(tiny("llava-clip-llama"), items, [0], GRID, v_detector=NORM)
    assert "sweeping" not in capfd.readouterr().err


def test_default_rule_is_calibrated_and_says_so(tiny):
    made = ss.sweep(tiny("llava-clip-llama"), some(), layers=[0], grid=GRID)
    assert "calibrated on the first 2 images of the dataset, which are scored too" in made.notes[0]
    assert made.settings["v_rule"] == (
        "calibrated on the first 2 images of the dataset, which show none"
    )
    assert made.table["n_v"].max() == 0


def test_calibration_and_detector_are_taken(tiny):
    lvlm = tiny("llava-clip-llama")
    found = ss.calibrate(lvlm, [lvlm.prepare(images=random_image(seed=5), text="what")])
    made = ss.sweep(lvlm, some(), layers=[0], grid=GRID, calibration=found)
    assert not made.notes
    assert made.settings["v_rule"] == repr(found.v_detector)


def test_a_replay_that_differs_is_refused(tiny, monkeypatch):
    lvlm = tiny("llava-clip-llama")
    real = replay.logits_at
    monkeypatch.setattr(replay, "logits_at", lambda *given: 2 * real(*given))
    with pytest.raises(ModelError, match="differ from the model's own"):
        ss.sweep(lvlm, some(), layers=[0], grid=GRID, v_detector=NORM)


WRONG = {
    "grid": [
        (5, "expected a list of pairs"),
        ("0.5", "expected a list of pairs"),
        ([(1, 2, 3, 4)], "expected two finite numbers, or three"),
        ([0.5], "expected two finite numbers"),
        ([(float("nan"), 1)], "expected two finite numbers"),
        ([(1, 1)], "without a pair other than the base"),
        ([], "without a pair other than the base"),
    ],
    "score": [
        ("accuracy", "Did you mean|Known"),
        ("choice", "2 items without choices|without choices"),
    ],
    "by": [("tasks", "Did you mean 'task'")],
    "batch": [
        (0, "expected an int of at least 1. Or write batch='auto'"),
        (True, "Or write batch='auto'"),
        ("all", "Or write batch='auto'"),
    ],
    "calibration": [("six", "expected what ss.calibrate")],
}


@pytest.mark.parametrize(
    ("name", "value", "match"), [(n, v, m) for n, cases in WRONG.items() for v, m in cases]
)
def test_wrong_options_are_refused(name, value, match, tiny):
    with pytest.raises(InputError, match=match):
        ss.sweep(tiny("llava-clip-llama"), some(), **{name: value})


def test_layers_may_be_numpy_integers(tiny):
    made = ss.sweep(tiny("llava-clip-llama"), some(1), np.array([1]), GRID, v_detector=NORM)
    assert set(made.table["edited"]) == {2}


@pytest.mark.parametrize("layers", [2, -1, 1.0, "embedding", [], [True]])
def test_wrong_layers_are_refused(layers, tiny):
    with pytest.raises(LayerError, match=r"Got (layer|no layers)"):
        ss.sweep(tiny("llava-clip-llama"), some(), layers=layers)


def test_other_wrong_uses_are_refused(tiny):
    lvlm = tiny("llava-clip-llama")
    found = ss.calibrate(lvlm, [lvlm.prepare(images=random_image(), text="what")])
    with pytest.raises(InputError, match="Write only one"):
        ss.sweep(lvlm, some(), v_detector=NORM, calibration=found)
    with pytest.raises(InputError, match="without a processor"):
        ss.sweep(ss.LVLM(tiny_llava()[0]), some())
    mixed = some() + some(1, choices=True)
    with pytest.raises(InputError, match="Got 4 items without choices; expected options on all"):
        ss.sweep(lvlm, mixed)
    with pytest.raises(InputError, match="no task 'all' beside others"):
        ss.sweep(lvlm, [*some(), {**some()[0], "task": "all"}])
    with pytest.raises(InputError, match="which has no token"):
        ss.sweep(lvlm, [{**some()[0], "answer": ""}], v_detector=NORM)
    with pytest.raises(InputError, match="expected the answer to be one of the choices"):
        ss.sweep(lvlm, [{**some()[0], "choices": ["a", "b"]}])
    with pytest.raises(InputError, match="expected a list of str"):
        ss.sweep(lvlm, [{**some()[0], "choices": "red"}])
    with pytest.raises(InputError, match="steps=1"):
        ss.lsg_grid(1)


def test_lsg_grid_is_the_papers():
    grid = ss.lsg_grid()
    assert len(grid) == 11
    assert grid[0] == (0.0, 1.0)
    assert grid[-1] == (1.0, 0.0)
    assert all(v + rest == pytest.approx(1.0) for v, rest in grid)
    assert sweep_function is ss.sweep

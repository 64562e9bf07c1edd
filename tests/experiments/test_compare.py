"""Comparisons: paired, per task, with intervals that resample images."""

import numpy as np
import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope import baselines, detectors
from sinkscope.data.answers import answer_batch, score_options
from sinkscope.data.items import as_items
from sinkscope.experiments import Comparison, EditSinks, Item, per_seed
from sinkscope.testing import plant, random_image, tiny_llava


def test_summary_of_several_seeds_by_hand():
    lines = []
    for item in range(4):
        for condition, seed, right in (
            ("base", 0, item < 2),
            ("gate", 0, item < 3),
            ("gate", 1, item < 2),
            ("gate", 2, item < 4),
        ):
            lines.append(
                {
                    "item": item,
                    "image_id": str(item // 2),
                    "task": "count",
                    "condition": condition,
                    "seed": seed,
                    "correct": right,
                    "touched": condition != "base" and item > 0,
                }
            )
    comparison = Comparison(pd.DataFrame(lines), "base")
    line = comparison.estimates().set_index("condition").loc["gate"]
    assert (line["n"], line["images"], line["seeds"]) == (4, 2, 3)
    assert line["accuracy"] == 0.75
    assert line["delta"] == 0.25
    assert line["seed_sd"] == pytest.approx(np.std([0.75, 0.5, 1.0], ddof=1))
    only = comparison.estimates(touched_only=True).set_index("condition").loc["gate"]
    assert only["n"] == 3
    assert only["accuracy"] == pytest.approx((2 + 1 + 3) / 9)
    assert only["delta"] == pytest.approx((1 + 0 + 2) / 9)
    assert comparison.comparisons == comparison.estimates().attrs["comparisons"] == 1
    assert "gate" in comparison.summary(draws=20)
    assert comparison.conditions == ("gate",)


@pytest.fixture(scope="module")
def planted():
    made = plant("clip", v_sinks=(9,), l_sinks=(20,))
    lvlm = ss.LVLM(made.model, made.processor, verify=False)
    rules = {
        "v_detector": detectors.Norm("valley"),
        "l_detector": detectors.SinkDimensions((41, 101), 3.0),
    }
    return lvlm, rules


def dataset(n):
    return [
        {
            "image": random_image(64, 64, i // 2),
            "question": "how many red shapes",
            "answer": a,
            "task": t,
            "image_id": i // 2,
        }
        for i, (a, t) in enumerate([("red", "count"), ("blue", "colour")] * n)
    ]


def test_conditions_are_answered_on_the_same_questions(planted):
    lvlm, rules = planted
    conditions = {
        "base": [],
        "mask V": lambda trace: [ss.MaskKeys(trace.v_sinks)],
        "mask nothing": [ss.ScaleKeys("image", 1.0)],
    }
    got = ss.compare(lvlm, dataset(3), conditions, **rules)
    table = got.table
    assert len(table) == 6 * 3
    assert table.groupby("condition")["touched"].mean().to_dict() == {
        "base": 0.0,
        "mask V": 1.0,
        "mask nothing": 0.0,
    }
    by = table.pivot(index="item", columns="condition", values="given")
    assert (by["base"] == by["mask nothing"]).all()
    one = dataset(3)[0]
    sample = lvlm.prepare(images=one["image"], text=one["question"])
    length = size_of(lvlm, "red")
    alone = lvlm.generate(sample, max_new_tokens=length).text[0]
    assert by.loc[0, "base"] == alone
    summary = got.estimates(draws=50)
    assert set(summary["task"]) == {"count", "colour", "all"}


def test_gates_are_conditions(planted):
    """A gate answers in a comparison as it does alone, and is not changed by it."""
    lvlm, rules = planted
    one, two = (ss.LSG.for_model(lvlm, layer, v_detector=detectors.Norm(8.0)) for layer in (1, 3))
    data = dataset(2)
    conditions = {"base": [], "lsg": [one], "stack": [one, two], "seeds": per_seed([one], [two])}
    got = ss.compare(lvlm, data, conditions, **rules)
    assert got.table["sinks"].isna().all(), "no condition needs a trace"
    assert not one.allow_noop
    lines = got.table.set_index(["item", "condition", "seed"])["given"]
    assert len(lines) == 4 * 5
    for item in range(4):
        assert lines[item, "seeds", 0] == lines[item, "lsg", 0]
        pair = [r for r in data if r["image_id"] == data[item]["image_id"]]
        sample = lvlm.prepare(images=[r["image"] for r in pair], text=[r["question"] for r in pair])
        own = size_of(lvlm, data[item]["answer"])
        alone = lvlm.generate(sample, [], [one, two], max_new_tokens=own).text
        assert lines[item, "stack", 0] == alone[item % 2]


def greedy(lvlm, image, question, size):
    """The first tokens of the answer, one forward pass of plain transformers each, as text."""
    sample = lvlm.prepare(images=image, text=question)
    whole, prompt = dict(sample.inputs), sample.inputs["input_ids"].shape[1]
    for _ in range(size):
        with torch.no_grad():
            best = lvlm.module(**whole).logits[:, -1].argmax(-1, keepdim=True)
        whole["input_ids"] = torch.cat([whole["input_ids"], best], dim=1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    return lvlm.tokenizer.decode(whole["input_ids"][0, prompt:])


@pytest.fixture(scope="module")
def wordy():
    """A model whose random answers are text: its tokens can be made of what it says."""
    return ss.LVLM(*tiny_llava())


def size_of(lvlm, text):
    """Tokens of an answer behind ``ASSISTANT:``."""
    text = text if text.startswith(" ") else f" {text}"
    return len(lvlm.tokenizer(text, add_special_tokens=False)["input_ids"])


def unequal(lvlm):
    """Questions about one image whose right answers have 1 to 5 tokens; every other is given."""
    image = random_image(64, 64, 0)
    out = []
    for size, question in enumerate(("is it", "how many", "what is it", "where", "why"), start=1):
        answer = greedy(lvlm, image, question, size)
        if not answer.startswith(" "):  # a right answer has a space before it, which is a token
            answer = greedy(lvlm, image, question, size - 1)
        answer = "~" * (size - 1) if size % 2 == 0 else answer
        assert size_of(lvlm, answer) == size
        out.append({"image": image, "question": question, "answer": answer, "image_id": 0})
    return out


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_an_answer_does_not_depend_on_its_batch(wordy, batch):
    """Each is as long as its own right answer, and what would follow does not make it wrong."""
    lvlm = wordy
    data = unequal(lvlm)
    late = ss.ScaleAttention("image", 0.5, steps="decode", allow_noop=True)
    got = ss.compare(lvlm, data, {"base": [], "late": [late]}, batch=batch).table
    base = got[got["condition"] == "base"].set_index("item")
    assert base["correct"].tolist() == [True, False, True, False, True]
    for item, record in enumerate(data):
        own = greedy(lvlm, record["image"], record["question"], size_of(lvlm, record["answer"]))
        assert base["given"][item] == (record["answer"] if base["correct"][item] else own)
    swept = ss.sweep(lvlm, data, [1], [(0.5, 0.5)], v_detector=detectors.NoSinks(), score="exact")
    # Said without the space of the right answer: the same text, other tokens.
    assert swept.table["base_score"].tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]
    touched = got[got["condition"] == "late"]["touched"].tolist()
    assert touched == [False, True, True, True, True], "an answer of one token has no decode step"


def test_no_setting_of_a_generation_config_changes_an_answer():
    """Free answers are the likeliest tokens, and options are scored by the model's own probabilities."""
    lvlm = ss.LVLM(*tiny_llava())
    free, options = unequal(lvlm), ("red", "3 red shapes", "how many")
    asked = [{**record, "answer": "red", "choices": options} for record in free]
    likeliest = sorted({id for r in free for id in lvlm.tokenizer(r["answer"])["input_ids"]})
    want = [ss.compare(lvlm, data, {"base": []}).table for data in (free, asked)]
    lvlm.module.generation_config.update(
        do_sample=True, temperature=9.0, num_beams=2, num_return_sequences=2, use_cache=False,
        repetition_penalty=5.0, encoder_repetition_penalty=0.1, no_repeat_ngram_size=1,
        encoder_no_repeat_ngram_size=1, min_new_tokens=2, suppress_tokens=likeliest,
        begin_suppress_tokens=likeliest, bad_words_ids=[[id] for id in likeliest],
        sequence_bias=[[[id], -50.0] for id in likeliest], forced_eos_token_id=2,
        exponential_decay_length_penalty=(1, 90.0), stop_strings=["e"],
        max_time=0.0, watermarking_config={"bias": 50.0}, prompt_lookup_num_tokens=2,
    )  # fmt: skip
    for data, table in zip((free, asked), want, strict=True):
        assert ss.compare(lvlm, data, {"base": []}).table.equals(table)


def test_longer_options_elsewhere_in_the_batch_touch_nothing(planted):
    lvlm, _ = planted
    data = [
        {**dataset(1)[0], "answer": options[0], "choices": options}
        for options in (("a", "b"), ("aa", "bb"))
    ]
    late = ss.ScaleAttention("image", 0.5, steps="decode", allow_noop=True)
    for batch in (1, 2):
        got = ss.compare(lvlm, data, {"base": [], "late": [late]}, batch=batch).table
        assert got[got["condition"] == "late"]["touched"].tolist() == [False, True]


def test_an_answer_counts_after_stripping_and_lower_case(wordy):
    lvlm = wordy
    said = {(0, "is it"): " are", (1, "what colour is it"): "Q"}
    cases = {" are": (" are", "are"), "Q": ("Q", "q"), "wrong": ("i", "The")}
    for (seed, question), text in said.items():
        image = random_image(64, 64, seed)
        assert greedy(lvlm, image, question, 1) == text
        for kind, answers in cases.items():
            data = [{"image": image, "question": question, "answer": answer} for answer in answers]
            got = ss.compare(lvlm, data, {"base": []}).table
            assert got["correct"].tolist() == [kind == text] * 2


def test_equal_tokens_are_right_whatever_they_look_like():
    """The end of an answer is a token with no text: who asks for it gets what `exact` says."""
    lvlm = ss.load_bundled()
    data = [{**q, "answer": q["answer"] + "</s>"} for q in ss.bundled.scene_questions(1, 4)]
    assert size_of(lvlm, data[0]["answer"]) == 2
    got = ss.compare(lvlm, data, {"base": []}).table["correct"].tolist()
    swept = ss.sweep(lvlm, data, [0], [(0.5, 0.5)], v_detector=detectors.NoSinks(), score="exact")
    assert got == swept.table["base_score"].astype(bool).tolist()
    assert any(got)


def test_options_are_told_apart_by_case(planted):
    """The answer is one of the options, so nothing is folded."""
    lvlm, _ = planted
    record = dataset(1)[0]
    options = ("us", "US")
    right = [
        ss.compare(lvlm, [{**record, "answer": a, "choices": options}], {"base": []}).table
        for a in options
    ]
    assert sum(bool(table["correct"][0]) for table in right) == 1


def test_questions_without_a_task_are_one_group(planted):
    """And a table that counted some of them twice is refused, as in `sweep`."""
    lvlm, _ = planted
    data = [{k: v for k, v in record.items() if k != "task"} for record in dataset(2)]
    got = ss.compare(lvlm, data, {"base": [], "again": []})
    summary = got.estimates(draws=20)
    assert summary["task"].tolist() == ["all", "all"]
    assert summary["n"].tolist() == [4, 4]
    with pytest.raises(ss.SinkscopeError, match="no task 'all' beside others"):
        ss.compare(lvlm, [*data, *dataset(2)], {"base": []})


class Counting:
    """An LVLM that counts what it is asked."""

    def __init__(self, lvlm):
        self.lvlm, self.calls = lvlm, {"run": 0, "generate": 0}

    def __getattr__(self, name):
        return getattr(self.lvlm, name)

    def run(self, *args, **kwargs):
        self.calls["run"] += 1
        return self.lvlm.run(*args, **kwargs)

    def generate(self, *args, **kwargs):
        self.calls["generate"] += 1
        return self.lvlm.generate(*args, **kwargs)


def test_nothing_is_computed_twice(planted):
    lvlm, rules = planted
    counting = Counting(lvlm)
    plain = {"base": [], "again": [], "scaled": [ss.ScaleKeys("image", 0.5)]}
    ss.compare(counting, dataset(2), plain, **rules)
    assert counting.calls == {"run": 0, "generate": 2 * 2}, "two images; base once, scaled once"
    counting = Counting(lvlm)
    masks = {"base": [], "V": EditSinks("V-sinks"), "L": EditSinks("L-sinks")}
    ss.compare(counting, dataset(2), masks, **rules)
    assert counting.calls == {"run": 2, "generate": 2 * 3}, "one trace per image"


OPTIONS = (("red", "dark blue"), ("a", "b", "cc"), ("yes", "no"))


def log_probabilities(lvlm, image, question, choices):
    """Of options after the prompt: plain transformers, one option at a time, no batch, no cache."""
    sample = lvlm.prepare(images=image, text=question)
    prompt = sample.inputs["input_ids"]
    out = []
    for choice in choices:
        ids = lvlm.tokenizer(f" {choice}", add_special_tokens=False, return_tensors="pt")
        ids = ids["input_ids"]
        whole = {**sample.inputs, "input_ids": torch.cat([prompt, ids], dim=1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        with torch.no_grad():
            logits = lvlm.module(**whole).logits[0, prompt.shape[1] - 1 : -1]
        logp = logits.float().log_softmax(-1).gather(1, ids[0][:, None])[:, 0]
        out.append((float(logp.sum()), len(logp)))
    return out


@pytest.mark.parametrize("normalized", [False, True])
def test_options_are_scored_as_plain_transformers_does(planted, normalized):
    lvlm, _ = planted
    items = as_items(
        {"image": random_image(64, 64, 0), "question": q, "answer": options[0], "choices": options}
        for q, options in zip(("how many", "what colour is it", "is it"), OPTIONS, strict=True)
    )
    sample = lvlm.prepare(images=[i.image for i in items], text=[i.question for i in items])
    scores, *_ = score_options(lvlm, sample, items, [], normalized)
    answers = answer_batch(lvlm, sample, items, [], length_normalized=normalized)
    for b, item in enumerate(items):
        want = log_probabilities(lvlm, item.image, item.question, item.choices)
        hand = [total / (n if normalized else 1) for total, n in want]
        assert scores[b, : len(hand)].tolist() == pytest.approx(hand, abs=1e-4)
        assert bool((scores[b, len(hand) :] == float("-inf")).all())
        assert answers.given[b] == item.choices[int(np.argmax(hand))]


def test_options_of_one_token_take_one_pass():
    """On the bundled model every word is a token; an edit reaches the scores."""
    lvlm = ss.load_bundled()
    data = list(ss.bundled.scene_questions(2, 6))
    options = {
        "colour": tuple(ss.bundled.scenes.COLOURS),
        "shape": ss.bundled.scenes.SHAPES,
        "background": tuple(ss.bundled.scenes.BACKGROUNDS),
    }
    digits = tuple(str(n) for n in range(7))
    data = [{**q, "choices": options.get(q["task"], digits)} for q in data]
    counting = Counting(lvlm)
    masked = ss.MaskKeys("image", allow_noop=True)
    got = ss.compare(counting, data, {"base": [], "blind": [masked]})
    assert counting.calls == {"run": 2 * 2, "generate": 0}
    free = ss.compare(lvlm, [{**q, "choices": ()} for q in data], {"base": [], "blind": [masked]})
    own = got.table.set_index(["item", "condition"])
    other = free.table.set_index(["item", "condition"])
    legal = other["given"] != ""
    assert (own["given"] == other["given"])[legal & (own.index.get_level_values(1) == "base")].all()
    assert own["touched"].groupby("condition").mean().to_dict() == {"base": 0.0, "blind": 1.0}
    sample = lvlm.prepare(images=data[0]["image"], text=data[0]["question"])
    with torch.no_grad():
        logp = lvlm.module(**sample.inputs).logits[0, -1].log_softmax(-1)
    ids = [lvlm.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in data[0]["choices"]]
    assert own["given"][0, "base"] == data[0]["choices"][int(logp[ids].argmax())]


def test_free_and_multiple_choice_questions_may_be_mixed(planted):
    lvlm, rules = planted
    data = dataset(1)
    data.insert(1, {**data[0], "choices": ["red", "green"]})
    table = ss.compare(lvlm, data, {"base": []}, **rules).table
    assert table["item"].tolist() == [0, 1, 2]
    assert table["given"][1] in ("red", "green")


def test_tables_for_a_page(planted):
    lvlm, rules = planted
    front = baselines.sink_to_front()
    conditions = {"base_model": [], "100 % of it": front, "L": EditSinks("L-sinks", "halve")}
    got = ss.compare(lvlm, dataset(2), conditions, **rules)
    text = got.to_markdown(draws=50)
    assert text.splitlines()[0] == "| condition | all (n = 4) | count (n = 2) | colour (n = 2) |"
    assert text.splitlines()[2].startswith("| base_model | 0.0 [0.0, 0.0] |")
    assert "6 changes are shown, none corrected" in text
    latex = got.to_latex(draws=50)
    assert r"base\_model & 0.0" in latex
    assert r"100 \% of it" in latex
    assert latex.count(r"\\") == 4
    assert latex.startswith(r"\begin{tabular}{lrrr}")
    assert got.to_dataframe().equals(got.table)
    assert got.to_dataframe() is not got.table


@pytest.mark.parametrize(
    ("data", "conditions", "message"),
    [
        ([], {"base": []}, "empty dataset"),
        (
            [{"image": 1}],
            {"base": []},
            "has no question and no answer; expected image, question and answer",
        ),
        ([3], {"base": []}, r"Record 0 \(int\) has no image"),
        ([Item("x.png", "q", "a")], {}, "expected a dict such as"),
        ([Item("x.png", "q", "a")], [[]], "expected a dict such as"),
        ([Item("x.png", "q", "a")], {"base": []}, "neither an existing file nor"),
        ([Item("x.png", "q", "a", choices=("b", "c"))], {"base": []}, "one of the choices"),
        ([Item("x.png", "q", "a", choices="abc")], {"base": []}, "a list of str"),
        ([Item("x.png", "q", "a")], {"base": ss.MaskKeys("image")}, "a list of interventions"),
        ([Item("x.png", "q", "a")], {"base": "mask"}, "a function of a SinkTrace"),
        ([Item("x.png", "q", "a")], {"base": EditSinks}, "Got the class EditSinks"),
        ([Item("x.png", "q", "a")], {"base": [ss.MaskKeys]}, "Got the class MaskKeys"),
        ([Item("x.png", "q", "a")], {"base": per_seed([], [])}, "several seeds for the base"),
    ],
)
def test_malformed_comparisons_are_refused(planted, data, conditions, message):
    lvlm, rules = planted
    with pytest.raises(ss.SinkscopeError, match=message):
        ss.compare(lvlm, data, conditions, **rules)


@pytest.mark.parametrize("batch", [0, "auto", True])
def test_a_batch_that_is_no_number_of_questions_is_refused(planted, batch):
    with pytest.raises(ss.SinkscopeError, match=f"Got batch={batch!r}; expected"):
        ss.compare(planted[0], dataset(1), {"base": []}, batch=batch)


def test_a_condition_without_a_return_is_no_unedited_one(planted):
    lvlm, rules = planted

    def forgotten(trace):
        [ss.MaskKeys(trace.v_sinks)]

    with pytest.raises(ss.SinkscopeError, match="condition 'masked' gave None"):
        ss.compare(lvlm, dataset(1), {"base": [], "masked": forgotten}, **rules)
    with pytest.raises(ss.SinkscopeError, match="one per seed"):
        per_seed()


@pytest.mark.parametrize(
    ("field", "value"),
    [("question", 3), ("answer", None), ("task", ["red"]), ("task", float("nan"))],
)
def test_texts_that_are_none_are_named_before_any_work(wordy, field, value):
    data = [*dataset(1), {**dataset(1)[0], field: value}]
    for ask in (lambda: ss.compare(wordy, data, {"base": []}), lambda: ss.sweep(wordy, data)):
        with pytest.raises(ss.SinkscopeError, match=rf"Record 2 .*has (no )?{field}[;=].*expected"):
            ask()


@pytest.mark.parametrize("options", [{"level": 95}, {"level": 0}, {"draws": 0}, {"draws": 2.5}])
def test_impossible_intervals_are_refused(options):
    rows = [(i, i, "t", c, True, True) for i in range(3) for c in ("base", "edit")]
    names = ["item", "image_id", "task", "condition", "correct", "touched"]
    comparison = Comparison(pd.DataFrame(rows, columns=names), "base")
    with pytest.raises(ss.SinkscopeError, match="expected"):
        comparison.estimates(**options)
    assert len(comparison.estimates(level=0.5, draws=1)) == 2


def test_one_picture_without_an_id_is_one_image(wordy, tmp_path):
    """Questions about it are resampled together, in `compare` as in `sweep`; given ids are text."""
    path = tmp_path / "two.png"
    random_image(64, 64, 2).save(path)
    pictures = [
        random_image(64, 64, 0),
        np.asarray(random_image(64, 64, 0)),
        random_image(64, 64, 1),
        path,
        str(path),
        [random_image(64, 64, 0), path],
    ]
    data = [{"image": p, "question": "what is it", "answer": "red"} for p in pictures]
    ids = [item.image_id for item in as_items(data)]
    assert [ids.index(name) for name in ids] == [0, 0, 2, 3, 3, 5]
    alone = ss.compare(wordy, data[:3], {"base": []})
    assert alone.estimates(draws=10)["images"].tolist() == [2]
    assert "base" in alone.summary(draws=10)
    swept = ss.sweep(wordy, data[:3], [0], [(0.5, 0.5)], v_detector=detectors.NoSinks())
    assert swept.base()["images"].tolist() == [2]
    named = [{**record, "image_id": i} for i, record in enumerate(data)]
    assert [item.image_id for item in as_items(named)] == list("012345")


def test_a_table_made_by_hand_counts_questions_without_a_task_once():
    """`compare` refuses such data; a table of one's own may hold it."""
    tasks, right = ["all", "all", "count", "shape"], [True, True, False, False]
    lines = [
        {"item": i, "image_id": str(i), "task": task, "condition": name, "correct": ok and name == "x",
         "touched": True}
        for i, (task, ok) in enumerate(zip(tasks, right, strict=True))
        for name in ("base", "x")
    ]  # fmt: skip
    summary = Comparison(pd.DataFrame(lines), "base").estimates(draws=20)
    line = summary[(summary["task"] == "all") & (summary["condition"] == "x")].iloc[0]
    assert (line["n"], line["images"], line["accuracy"], line["delta"]) == (4, 4, 0.5, 0.5)

"""Linear probes: against scikit-learn on transformers' own states, and on models that cannot know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit

import sinkscope as ss
from sinkscope import detectors
from sinkscope.bundled import VALIDATION_SEEDS, scene_attributes
from sinkscope.errors import InputError, LayerError, ProbeError
from sinkscope.experiments import top_received
from sinkscope.testing import plant, random_image

QUICK = {"permutations": 0, "draws": 20, "progress": False}


@pytest.fixture(scope="module")
def bundled():
    return ss.load_bundled()


@pytest.fixture(scope="module")
def scenes():
    return list(scene_attributes(60, seeds=VALIDATION_SEEDS))


@pytest.fixture(scope="module")
def planted():
    made = plant("clip", v_sinks=(9, 46), l_sinks=(20,), l_layer=1)
    lvlm = ss.LVLM(made.model, made.processor, verify=False)
    rules = {
        "v_detector": detectors.SinkDimensions(made.truth.v_dims, 5.0),
        "l_detector": detectors.SinkDimensions(made.truth.l_dims, 5.0),
    }
    return lvlm, rules


def word_dataset(n=40):
    """The label is a word of the question, which comes after the image; pictures are noise."""
    rng = np.random.default_rng(0)
    words = rng.permutation(["red", "blue"] * (n // 2))
    return [
        {
            "image": random_image(64, 64, i),
            "question": f"how many {word} shapes are there",
            "attributes": {"word": str(word)},
        }
        for i, word in enumerate(words)
    ]


def cell(result, **where):
    """The one line of the table with these values."""
    table = result.table
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


@torch.no_grad()
def states_by_hand(lvlm, records):
    """Mean states of the image tokens, ``[record layer d_model]``, one record at a time."""
    out = []
    for record in records:
        prompt = f"USER: <image>\n{record['question']} ASSISTANT:"
        inputs = lvlm.processor(images=record["image"], text=prompt, return_tensors="pt")
        hidden = lvlm.module(**inputs, output_hidden_states=True).hidden_states
        image = inputs["input_ids"][0] == lvlm.module.config.image_token_id
        out.append(torch.stack([h[0, image].mean(dim=0) for h in hidden[:-1]]))
    return torch.stack(out).double().numpy()


def fit_by_hand(train, labels, test, c=1.0):
    mean, spread = train.mean(axis=0), train.std(axis=0)
    fitted = LogisticRegression(C=c, max_iter=1000).fit((train - mean) / spread, labels)
    return fitted.predict((test - mean) / spread)


@pytest.mark.parametrize("c", [1.0, 0.01])
def test_accuracies_are_those_of_scikit_learn_on_hidden_states(bundled, scenes, c) -> None:
    """States are taken without batches and padding, labels are numbered and split apart here."""
    result = ss.linear_probes(bundled, scenes, groups={"image": "image"}, c=c, seed=3, **QUICK)
    states = states_by_hand(bundled, scenes)
    ids = [record["image_id"] for record in scenes]
    splitter = GroupShuffleSplit(n_splits=1, test_size=0.3, random_state=3)
    train, test = next(splitter.split(ids, groups=np.array([str(i) for i in ids])))
    assert result.images == tuple(tuple(str(ids[i]) for i in part) for part in (train, test))
    of = {name: [r["attributes"][name] for r in scenes] for name in scenes[0]["attributes"]}
    for layer in range(5):
        x = states[:, layer]
        for name in ("count", "largest size"):
            y = np.array(of[name])
            want = (fit_by_hand(x[train], y[train], x[test], c) == y[test]).mean()
            assert cell(result, layer=layer, target=name)["accuracy"] == pytest.approx(want)
        for name in ("colours", "shapes"):
            classes = sorted(set().union(*of[name]))
            y = np.array([[cl in v for cl in classes] for v in of[name]])
            got = [fit_by_hand(x[train], column[train], x[test], c) for column in y.T]
            right = y[test] == np.array(got).T
            for metric, want in (
                ("label accuracy", right.mean()),
                ("exact set", right.all(axis=1).mean()),
            ):
                line = cell(result, layer=layer, target=name, metric=metric)
                assert line["accuracy"] == pytest.approx(want)
    assert result.classes["count"] == (1, 2, 3, 4, 5, 6)
    assert result.table["converged"].all()
    assert result.detectors == ""  # no group asked for sinks


def test_image_tokens_cannot_know_a_later_word(planted) -> None:
    """Causality decides: the text says the word, whatever stands before it knows nothing."""
    lvlm, rules = planted
    groups = {**ss.experiments.sink_groups(3, 2), "image": "image", "bos": "bos", "text": "text"}
    given = {**rules, "groups": groups, "batch": 7, "layers": [0, 2, 5]}
    result = ss.linear_probes(lvlm, word_dataset(80), **given, permutations=20, progress=False)
    table = result.table[result.table["note"] == ""]
    text = table[table["group"] == "text"]
    assert (text["accuracy"] == 1).all()
    assert (text["accuracy"] > text["null_high"]).all()
    others = table[table["group"] != "text"]
    assert set(others["group"]) == {"V-sinks", "L-sinks", "ordinary", "image", "bos"}
    # by chance 1 cell in 21, and the layers of a group are not independent
    assert (others["accuracy"] > others["null_high"]).mean() < 0.1
    assert abs(others["null"].mean() - 0.5) < 0.1
    worse = result.difference("text")
    assert (worse["high"] < 0).all()
    assert set(worse["group"]) == set(others["group"])


def test_l_sinks_are_decided_on_what_each_layer_reads(planted) -> None:
    lvlm, rules = planted
    result = ss.linear_probes(lvlm, word_dataset(24), **rules, **QUICK)
    of = result.table.set_index(["layer", "group"])
    for layer in range(6):
        assert of.loc[(layer, "V-sinks"), "tokens"] == 2
        assert of.loc[(layer, "ordinary"), "tokens"] == 5
        line = of.loc[(layer, "L-sinks")]
        if layer < 2:  # block 1 writes the spike, so block 2 is the first to read it
            assert (line["note"], line["missing"], line["n_train"]) == ("none found", 24, 0)
            assert np.isnan(line["accuracy"])
        else:
            assert (line["note"], line["missing"], line["tokens"]) == ("", 0, 1)
    assert "ordinary" in result.summary(draws=20)
    summary = result.estimates(draws=20).set_index("group")
    assert summary.loc["L-sinks", "layers"] == 4
    assert summary.loc["L-sinks", "missing"] == pytest.approx(2 / 6)
    assert result.detectors == "given"


def test_an_image_says_nothing_about_the_next_one(tiny) -> None:
    """Two pictures in a prompt; how bright the second is, the first cannot know."""
    lvlm, rng = tiny("llava-clip-llama"), np.random.default_rng(1)
    bright = rng.permutation([0, 1] * 16)
    data = []
    for b in bright:
        level = rng.integers(0, 80, size=(2, 48, 48, 3), dtype=np.uint8)
        level[1] += np.uint8(150 * b)
        data.append({"image": list(level), "attributes": {"bright": int(b)}, "question": "compare"})
    groups = {"first": "image:0", "second": "image:1"}
    result = ss.linear_probes(lvlm, data, groups=groups, permutations=10, progress=False)
    by = result.table.groupby("group")["accuracy"]
    assert by.min()["second"] == 1
    assert by.max()["first"] < 0.85


def test_batches_and_padding_change_no_answer(planted) -> None:
    lvlm, rules = planted
    data = word_dataset(24)
    for i, record in enumerate(data):
        record["question"] += " in the picture ?" * (i % 3)
    tables = []
    for batch in (1, 5):
        given = {**rules, **QUICK, "layers": [1, 3], "batch": batch}
        groups = {**ss.experiments.sink_groups(), "text": "text"}
        tables.append(ss.linear_probes(lvlm, data, groups=groups, **given).table)
    for other in tables[1:]:
        assert other.drop(columns="converged").equals(tables[0].drop(columns="converged"))


def test_images_without_the_group_are_left_out_and_counted(planted) -> None:
    lvlm, rules = planted
    data = word_dataset(60)
    for i, record in enumerate(data):
        record["attributes"] = {"mod": i % 2}

    def of_red(trace):
        red = torch.tensor(["red" in text for text in trace.sample.texts])
        return trace.sample.tokens.select("image") & red[:, None]

    def rare(trace):
        return of_red(trace) & (torch.arange(len(trace.sample)) == 0)[:, None]

    groups = {"red only": of_red, "image": "image", "rare": rare}
    result = ss.linear_probes(lvlm, data, groups=groups, layers=[2], **rules, **QUICK)
    line, rows = cell(result, group="red only"), result.rows
    assert (line["missing"], line["n_train"] + line["n_test"], line["note"]) == (30, 30, "")
    tested = rows[rows["group"] == "red only"]["record"].tolist()
    assert tested
    assert all("red" in data[i]["question"] for i in tested)
    assert set(tested) <= set(rows[rows["group"] == "image"]["record"])
    few = cell(result, group="rare")
    assert few["note"] == "too few images"
    assert np.isnan(few["accuracy"])
    assert "LinearProbes(1 targets, 1 layers, 3 groups; 42 images" in repr(result)


def test_the_bundled_model_has_no_sinks_to_probe_and_says_so(bundled, scenes) -> None:
    groups = {**ss.experiments.sink_groups(), "top 5": lambda trace: top_received(trace, 5)}
    result = ss.linear_probes(bundled, scenes, groups=groups, layers=4, targets=["count"], **QUICK)
    notes = result.table.set_index("group")["note"].to_dict()
    assert notes == {"V-sinks": "none found", "L-sinks": "none found", "ordinary": "", "top 5": ""}
    assert "none found: V-sinks, L-sinks" in repr(result)
    assert result.detectors.startswith("calibrated on the first 8 records")
    assert (cell(result, group="top 5")["tokens"], result.site) == (5, "resid_pre")
    summary = result.estimates(draws=20).set_index("group")
    assert summary.loc["V-sinks", "note"] == "none found"
    assert summary["above_null"].isna().all()  # no null was asked for
    only = {name: groups[name] for name in ("V-sinks", "L-sinks")}
    with pytest.raises(InputError, match=r"No token of \['V-sinks', 'L-sinks'\]"):
        ss.linear_probes(bundled, scenes[:20], groups=only, **QUICK)


def test_random_tokens_are_drawn_anew_and_their_spread_is_told(bundled, scenes) -> None:
    groups = {
        "five": ss.experiments.RandomGroup(5, 3, "image"),
        "too many": ss.experiments.RandomGroup(65, 2, "image"),
    }
    given = {"groups": groups, "layers": [2], "targets": ["colours"], **QUICK}
    result = ss.linear_probes(bundled, scenes, **given)
    line = cell(result, group="five", metric="exact set")
    rows = result.rows[(result.rows["group"] == "five") & (result.rows["metric"] == "exact set")]
    thirds = rows["correct"].to_numpy() * 3
    assert thirds == pytest.approx(thirds.round())
    assert line["accuracy"] == pytest.approx(rows["correct"].mean())
    assert line["std"] > 0
    assert (result.table[result.table["group"] == "too many"]["note"] == "none found").all()
    again = ss.linear_probes(bundled, scenes, **given)
    assert again.table.equals(result.table)
    other = ss.linear_probes(bundled, scenes, **{**given, "seed": 1})
    assert other.images != result.images


def test_random_tokens_are_n_different_candidates(planted) -> None:
    candidates = torch.zeros(3, 12, dtype=torch.bool)
    candidates[0, 2:11], candidates[1, 3:12], candidates[2, :2] = True, True, True
    draws = ss.experiments.RandomGroup(4, 5).draw(candidates, [(0, 7), (0, 7), (0, 8)])
    for mask in draws:
        assert mask.sum(dim=1).tolist() == [4, 4, 0]  # the last row has too few
        assert not (mask & ~candidates).any()
        assert mask[0].nonzero().flatten().tolist() == [
            place - 1 for place in mask[1].nonzero().flatten().tolist()
        ]
    assert len({tuple(mask[0].tolist()) for mask in draws}) > 1


def test_records_of_one_image_are_never_split(bundled, scenes) -> None:
    data = [record for record in scenes[:24] for _ in range(2)]
    result = ss.linear_probes(
        bundled, data, groups={"last": "last"}, layers=[4], targets=["count"], **QUICK
    )
    assert not set(result.images[0]) & set(result.images[1])
    assert len(result.images[0]) + len(result.images[1]) == 24
    assert (result.rows.groupby("image_id")["record"].nunique() == 2).all()


def test_one_picture_without_an_id_is_one_image(planted) -> None:
    """Its records would else stand in both parts, and what it shows would be known by heart."""
    lvlm, _ = planted
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, size=24).tolist()
    records = [
        {"image": random_image(64, 64, i % 24), "attributes": {"luck": labels[i % 24]}}
        for i in range(96)
    ]
    result = ss.linear_probes(lvlm, records, groups={"image": "image"}, layers=[0], **QUICK)
    trained, tested = map(set, result.images)
    assert (len(trained), len(tested)) == (16, 8)
    assert not trained & tested
    assert cell(result)["accuracy"] < 0.9


def test_a_target_named_twice_is_refused(bundled, scenes) -> None:
    with pytest.raises(InputError, match=r"not \['count'\] again"):
        ss.linear_probes(bundled, scenes, targets=["count", "colours", "count"], **QUICK)


def test_a_remote_run_gives_the_same(bundled, scenes) -> None:
    given = {"groups": {"image": "image"}, "layers": [1], "targets": ["count"], **QUICK}
    here, there = (
        ss.linear_probes(bundled, scenes[:24], remote=where, **given).table
        for where in (None, "local")
    )
    assert here.equals(there)


def test_processes_give_the_same(bundled, scenes) -> None:
    given = {"groups": {"image": "image"}, "layers": [1, 2], "targets": ["count"], **QUICK}
    one, two = (ss.linear_probes(bundled, scenes, n_jobs=n, **given).table for n in (1, 2))
    assert one.equals(two)


PICTURE = random_image(8, 8)


def records(n=24, **change):
    """Records with a class that changes every two, and one attribute that `change` replaces."""
    return [
        {
            "image": PICTURE,
            "image_id": i,
            "attributes": {"a": i // 2 % 2, **{k: f(i) for k, f in change.items()}},
        }
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("data", "options", "error", "match"),
    [
        (records(6), {}, InputError, "Got 6 images to split; expected at least 20"),
        ([3], {}, InputError, r"Record 0 \(int\) has no image"),
        ([{"image": 1}], {}, InputError, r"has no attributes"),
        ([{"image": 1, "attributes": 3}], {}, InputError, "attributes=3; expected a dict"),
        (records(a=lambda i: "red"), {}, InputError, "'a' is 'red' in every record"),
        (records(a=lambda i: {"red"}), {}, InputError, "in every record"),
        (records(a=lambda i: {1} if i else 1), {}, InputError, r"1 in one record and \{1\} in"),
        (
            records(a=lambda i: i if i else "x"),
            {},
            InputError,
            "holds 'x', 23; expected classes of",
        ),
        (records(a=lambda i: i / 2), {}, InputError, "0.0 of type float.*into bins"),
        (records(a=lambda i: bool(i) if i else 0), {}, InputError, "classes of one kind"),
        (records(), {"targets": ["b"]}, InputError, "lacks the attribute 'b'"),
        (records(), {"targets": "a"}, InputError, "targets='a'; expected some of"),
        (records(a=lambda i: int(i == 1)), {}, InputError, "one value only in the 16"),
        (records(), {"groups": {}}, InputError, "Got groups={}"),
        (records(), {"groups": {"x": torch.ones(1)}}, InputError, "A mask belongs to one sample"),
        (records(), {"layers": [5]}, LayerError, "5"),
        (records(), {"site": "resid"}, ProbeError, "resid_pre"),
        (records(), {"test_size": 1.0}, InputError, "test_size=1.0"),
        (records(), {"test_size": 0.99}, InputError, "so 24 test and 0 train"),
        (records(), {"test_size": 0.01}, InputError, "so 1 test and 23 train"),
        ([{**r, "image": "no.png"} for r in records()], {}, InputError, "Record 0: .*no.png"),
        (records(), {"c": 0}, InputError, "c=0; expected a finite number above 0"),
        (records(), {"permutations": -1}, InputError, "permutations=-1"),
        (records(), {"level": 95}, InputError, "level=95"),
        (records(), {"draws": 0}, InputError, "draws=0"),
        (records(), {"seed": 0.5}, InputError, "seed=0.5"),
        (records(), {"batch": 0}, InputError, "batch=0"),
        (records(), {"n_jobs": 0}, InputError, "n_jobs=0"),
    ],
)
def test_wrong_use_is_named_before_the_model_runs(bundled, data, options, error, match) -> None:
    with pytest.raises(error, match=match):
        ss.linear_probes(bundled, data, **options)


def test_a_record_that_lacks_an_attribute_is_named(bundled) -> None:
    data = records(count=lambda i: i % 3)
    data[5]["attributes"] = {"a": 1, "counts": 1}
    with pytest.raises(InputError, match=r"Record 5 lacks the attribute 'count'.*'counts'"):
        ss.linear_probes(bundled, data)


@pytest.mark.parametrize(
    ("group", "match"),
    [
        (lambda trace: {1, 2}, "group 'mine': Got a selection of type set"),
        (lambda trace: torch.ones(2, 2, dtype=torch.bool), "group 'mine': Got a mask of shape"),
        ("imagge", "group 'mine'.*Did you mean 'image'"),
        (
            ss.experiments.RandomGroup(2, 2, lambda trace: trace.l_sinks()),
            "draws among a mask of shape",
        ),
    ],
)
def test_a_group_that_is_no_mask_is_named(bundled, scenes, group, match) -> None:
    with pytest.raises(InputError, match=match):
        ss.linear_probes(bundled, scenes, groups={"mine": group}, **QUICK)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"repeats": 0}, {"n": 1.5}, {"n": True}])
def test_random_tokens_of_no_number_are_refused(wrong) -> None:
    with pytest.raises(InputError, match=f"Got {next(iter(wrong))}="):
        ss.experiments.RandomGroup(**wrong)


def test_a_model_without_a_processor_is_refused(bundled, scenes) -> None:
    bare = ss.LVLM(bundled.module)
    with pytest.raises(InputError, match="without a processor"):
        ss.linear_probes(bare, scenes)


def test_an_unknown_base_is_refused(bundled, scenes) -> None:
    groups = {"image": "image", "last": "last"}
    result = ss.linear_probes(bundled, scenes, groups=groups, layers=0, targets=["count"], **QUICK)
    with pytest.raises(InputError, match="Got base='ordinary'; expected a group that has probes"):
        result.difference()
    assert set(result.difference("image")["group"]) == {"last"}
    assert result.to_dataframe() is result.table

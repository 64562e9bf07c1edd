"""Where questions come from: drawn scenes, files, the datasets library."""

import json

import pandas as pd
import pytest
from PIL import Image

import sinkscope as ss
from sinkscope.data.questions import Questions
from sinkscope.errors import InputError
from sinkscope.testing import random_image

ROWS = [
    {"image": "a.png", "question": "what colour?", "answer": "red", "kind": "colour"},
    {"image": "b.png", "question": "what shape?", "answer": "circle", "kind": "shape"},
    {"image": "a.png", "question": "what shape?", "answer": "square", "kind": "shape"},
]


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("a.png", "b.png")):
        random_image(20, 20, i).save(tmp_path / name)
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    (tmp_path / "q.json").write_text(json.dumps(ROWS))
    pd.DataFrame(ROWS).to_csv(tmp_path / "q.csv", index=False)
    pd.DataFrame(ROWS).to_parquet(tmp_path / "q.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.csv", "q.parquet"])
def test_files_give_records_whose_images_lie_beside_them(folder, name):
    made = Questions(str(folder / name), columns={"task": "kind"}, suffix=" One word.")
    for _ in range(2):  # it can be read again
        records = list(made)
        assert [r["task"] for r in records] == ["colour", "shape", "shape"]
        assert records[0]["question"] == "what colour? One word."
        assert records[0]["image"] == records[2]["image"] != records[1]["image"]
        assert Image.open(records[1]["image"]).size == (20, 20)


def test_addresses_of_images_stay_as_they_are(folder):
    where = "https://example.org/a.png"
    (folder / "q.json").write_text(json.dumps([{**ROWS[0], "image": where}]))
    record = next(iter(Questions(str(folder / "q.json"), columns={"task": "kind"})))
    assert record["image"] == where


def test_start_and_limit(folder):
    made = Questions(str(folder / "q.jsonl"), start=1, limit=1)
    assert [r["answer"] for r in made] == ["circle"]


@pytest.mark.parametrize(("start", "limit"), [(0, 8), (3, 7), (8, 5)])
def test_scenes_are_those_of_the_split(start, limit):
    whole = list(ss.bundled.scene_questions(4, 8))
    records = list(Questions("scenes", start=start, limit=limit))
    want = whole[start : start + limit]
    assert [r["question"] for r in records] == [r["question"] for r in want]
    assert [r["image_id"] for r in records] == [r["image_id"] for r in want]


def test_a_data_set_of_the_datasets_library(folder):
    datasets = pytest.importorskip("datasets")
    rows = {
        "picture": [random_image(8, 8, i) for i in range(3)],
        "prompt": ["a?", "b?", "c?"],
        "answer": ["(A)", "(B)", "(A)"],
        "choices": [["red", "blue"], ["one", "two", "three"], ["x", "y"]],
    }
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "prompt": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")),
        }
    )
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(str(folder / "set" / "test.parquet"))
    columns = {"image": "picture", "question": "prompt"}
    records = list(Questions(str(folder / "set"), split="test", columns=columns, letters="(A)"))
    assert [r["choices"] for r in records] == [
        ["(A)", "(B)"],
        ["(A)", "(B)", "(C)"],
        ["(A)", "(B)"],
    ]
    assert records[1]["image"].size == (8, 8)
    assert records[1]["question"] == "b?"
    options = {"split": "test", "columns": columns, "letters": "(A)"}
    lazy = Questions(str(folder / "set"), start=1, limit=5, **options).indexed()
    assert not isinstance(lazy, list)  # images are decoded one by one
    assert [r["question"] for r in lazy] == [r["question"] for r in lazy[:]] == ["b?", "c?"]
    assert (len(lazy), lazy[-1]["answer"]) == (2, "(A)")
    with pytest.raises(IndexError):
        lazy[2]


def test_files_and_scenes_are_lists(folder):
    made = Questions(str(folder / "q.jsonl"), limit=2)
    assert made.indexed() == list(made)
    assert [r["question"] for r in Questions("scenes", limit=3).indexed()] == [
        r["question"] for r in ss.bundled.scene_questions(1, 8)
    ][:3]


def test_the_same_options_for_all(folder):
    made = Questions(str(folder / "q.jsonl"), choices=["red", "circle", "square"])
    assert all(r["choices"] == ["red", "circle", "square"] for r in made)


BAD = {
    "no such file": (lambda f: Questions(str(f / "no.jsonl")), "does not exist"),
    "no such set": (lambda f: Questions(str(f / "none")), "could not be loaded"),
    "missing column": (
        lambda f: Questions(str(f / "q.jsonl"), columns={"answer": "solution"}),
        "Record 0 of .* has no answer; .*Its columns are .*'kind'",
    ),
    "unknown field": (lambda f: Questions("x", columns={"tsk": "kind"}), "Did you mean 'task'"),
    "answer is no option": (
        lambda f: Questions(str(f / "q.jsonl"), choices=["A", "B"]),
        r"the answer 'red' and the options\s+\['A', 'B'\]",
    ),
    "letters": (lambda f: Questions("x", letters="(1)"), "how an A looks"),
    "limit": (lambda f: Questions("x", limit=0), "limit=0"),
    "start": (lambda f: Questions("x", start=-1), "start=-1"),
    "split": (lambda f: Questions("scenes", split="valid"), "Did you mean 'validation'"),
    "no JSON": (lambda f: broken(f), "is no jsonl of records"),
}


def broken(folder):
    (folder / "broken.jsonl").write_text('{"image": \n')
    return Questions(str(folder / "broken.jsonl"))


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(folder, name):
    make, message = BAD[name]
    with pytest.raises(InputError, match=r"(?s)" + message):
        list(make(folder))

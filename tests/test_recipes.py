"""Recipes: what wins over what, what is refused, and the three commands end to end."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import yaml

import sinkscope as ss
from sinkscope.cli import main
from sinkscope.errors import InputError
from sinkscope.recipes import read_recipe
from tests.project.repository import ROOT

PAPER = ROOT / "examples" / "recipes" / "llava-1.5-7b.yaml"
SMALL = ["bundled", "--data", "scenes", "--v-detector", "norm:30"]


@pytest.fixture
def write(tmp_path):
    def make(**content):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / "recipe.yaml")

    return make


def test_a_section_wins_over_the_top_and_flags_over_both(write) -> None:
    path = write(
        model={"name": "top", "dtype": "float16"},
        v_detector="norm:1",
        sweep={"model": {"dtype": "float32"}, "data": "scenes", "layers": [1], "batch": 4},
    )
    recipe = read_recipe("sweep", path, {"layers": [2], "data": {"limit": 8}}, ss.sweep)
    assert recipe.model == {"name": "top", "dtype": "float32"}
    assert (recipe.data.source, recipe.data.limit) == ("scenes", 8)
    assert recipe.options == {"layers": [2], "batch": 4}
    assert recipe.v_detector == "norm:1"


@pytest.mark.parametrize(
    ("section", "function"),
    [("sweep", ss.sweep), ("train", ss.train_lsg), ("compare", ss.compare)],
)
def test_the_recipe_of_the_paper_is_read_whole(section, function) -> None:
    recipe = read_recipe(section, str(PAPER), {}, function)
    assert recipe.model["name"] == "llava-hf/llava-1.5-7b-hf"
    assert recipe.out.startswith("runs/")
    if section == "train":
        assert recipe.options["layers"] == [3, 6, 7, 10, 19]
        assert recipe.options["epochs"] == 2
    else:
        assert recipe.data.choices == ["A", "B", "C", "D"]
    if section == "compare":
        assert next(iter(recipe.conditions)) == "base"


BAD = {
    "no file": ("sweep", None, "no.yaml", "cannot be read"),
    "no YAML": ("sweep", "a: [", None, "is no YAML"),
    "a list": ("sweep", "[1, 2]", None, "with list; expected keys"),
    "unknown at the top": ("sweep", "modle: bundled", None, "Did you mean 'model'"),
    "unknown argument": ("sweep", "sweep: {layer: [1]}", None, "Did you mean 'layers'"),
    "argument of another": ("sweep", "sweep: {epochs: 2}", None, "'epochs' for sinkscope sweep"),
    "a section that is a word": ("train", "train: bundled", None, "expected keys and values"),
    "unknown model key": (
        "sweep",
        "model: {name: bundled, dytpe: float32}\ndata: scenes",
        None,
        "Did you mean 'dtype'",
    ),
    "unknown data key": (
        "sweep",
        "model: bundled\ndata: {source: scenes, lmit: 3}",
        None,
        "Did you mean 'limit'",
    ),
    "no model": ("sweep", "data: scenes", None, "Got no model"),
    "no data": ("sweep", "model: bundled", None, "give --data"),
    "model a number": ("sweep", "model: 7\ndata: scenes", None, "expected a word or keys"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(tmp_path, name) -> None:
    section, text, path, message = BAD[name]
    if text is not None:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
    function = {"sweep": ss.sweep, "train": ss.train_lsg}[section]
    with pytest.raises(InputError, match=message):
        read_recipe(section, str(path), {}, function)


def test_sweep(tmp_path, capsys) -> None:
    words = ["sweep", *SMALL, "--limit", "16", "--layers", "embed", "1", "--grid", "3"]
    out = tmp_path / "map"
    assert main([*words, "--out", str(out), "--dry-run"]) == 0
    assert "16 questions about 2 images, 2 layers x 3 pairs" in capsys.readouterr().out
    assert not out.exists()
    assert main([*words, "--out", str(out), "--set", "batch=2"]) == 0
    said = capsys.readouterr().out
    assert "1. Does it depend on the task?" in said
    assert "Best cell per task" in said
    table = ss.experiments.Sweep.load(out).table
    assert len(table) == 16 * 2 * 3
    found = {path.name for path in (out / "report").iterdir()}
    assert found == {"map.csv", "best.csv", "map.png", "observations.txt"}
    assert len(pd.read_csv(out / "report" / "map.csv")) > 0


def test_train_and_compare(tmp_path, capsys, write) -> None:
    out = tmp_path / "gates"
    words = ["train-lsg", *SMALL, "--split", "train", "--limit", "32", "--layers", "0", "embed"]
    words += ["--epochs", "1", "--batch", "8", "--seed", "3", "--set", "validation=0.25"]
    assert main([*words, "--dry-run"]) == 0
    assert "Together" in capsys.readouterr().out
    assert main([*words, "--out", str(out)]) == 0
    assert f"Gate of layer embed: {out / 'gate-embed'}" in capsys.readouterr().out
    gate = ss.LSG.from_pretrained(out / "gate-0")
    assert (gate.layer, gate.config.seed) == (0, 3)
    assert json.loads((out / "gate-0" / "training.json").read_text())["settings"]["epochs"] == 1
    assert {p.name for p in (out / "report").iterdir()} == {"history.csv", "training.png"}

    recipe = write(
        compare={
            "data": {"source": "scenes", "limit": 16},
            "conditions": {
                "base": [],
                "gate": {"gate": str(out / "gate-0")},
                "half": {"fixed_coefficients": {"layer": 1, "s_v": 0.5, "s_rest": 0.5}},
                "masked": {"edit": {"kind": "top attended", "edit": "mask", "k": 4}},
            },
        }
    )
    words = ["compare", "bundled", "--recipe", recipe, "--v-detector", "norm:30"]
    words += ["--l-detector", "dims:3:10", "--out", str(tmp_path / "compared")]
    assert main([*words, "--dry-run"]) == 0
    assert "16 questions x 4 conditions and a trace of each: 80 prompts" in capsys.readouterr().out
    assert main(words) == 0
    report = tmp_path / "compared" / "report"
    assert {p.name for p in report.iterdir()} == {"answers.csv", "summary.csv", "comparison.png"}
    summary = pd.read_csv(report / "summary.csv")
    assert set(summary["condition"]) == {"base", "gate", "half", "masked"}


WRONG = {
    "set": (["sweep", *SMALL, "--set", "batch"], "expected NAME=VALUE"),
    "no layers": (["train-lsg", *SMALL], "Write --layers 10"),
    "nothing to compare": (["compare", *SMALL], "Write --gate DIR"),
    "no gate there": (["compare", *SMALL, "--gate", "nowhere-at-all"], "nowhere-at-all"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_words(name, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words, message = WRONG[name]
    assert main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("what", [{"gaet": "x"}, {"gate": "a", "edit": {}}, 3, {"lora": {}}])
def test_a_condition_that_is_none(what, write, capsys) -> None:
    path = write(model="bundled", data="scenes", compare={"conditions": {"base": [], "x": what}})
    assert main(["compare", "--recipe", path]) == 2
    assert "Got the condition x" in capsys.readouterr().err

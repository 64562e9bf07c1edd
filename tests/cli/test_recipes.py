"""Recipes: what wins over what, what is refused, and the three commands end to end."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections import Counter

import pandas as pd
import pytest
import yaml

import sinkscope as ss
from sinkscope.cli import app, main
from sinkscope.cli.experiments import named_gates
from sinkscope.cli.recipes import parse_yaml, read_recipe
from sinkscope.data.questions import Questions
from sinkscope.errors import InputError
from sinkscope.testing import write_checkpoint
from tests.models.test_bad_input import own_code
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


def test_what_belongs_to_one_data_set_or_model_does_not_reach_another(write) -> None:
    path = write(
        model={"name": "one", "revision": "abc", "dtype": "float16"},
        data={"source": "a.csv", "columns": {"task": "kind"}, "choices": ["A"], "suffix": "!"},
        sweep={"data": {"limit": 3}},
        train={"data": {"source": "b.csv"}},
    )
    kept = read_recipe("sweep", path, {}, ss.sweep)
    assert (kept.data.limit, kept.data.suffix, kept.data.choices) == (3, "!", ["A"])
    same = read_recipe("sweep", path, {"data": {"source": "a.csv", "split": "x"}}, ss.sweep)
    assert (same.data.suffix, same.data.split) == ("!", "x")
    below = read_recipe("train", path, {}, ss.train_lsg)
    assert (below.data.source, below.data.suffix, below.data.choices) == ("b.csv", "", None)
    over = read_recipe("sweep", path, {"data": "c.csv", "model": {"name": "two"}}, ss.sweep)
    assert (over.data.source, over.data.columns, over.data.limit) == ("c.csv", {}, None)
    assert over.model == {"name": "two"}


def test_training_reads_the_training_split_and_calibration_neither(write) -> None:
    path = write(model="bundled", data="scenes", calibrate={"source": "scenes", "limit": 8})
    splits = {
        section: (recipe.data.split, recipe.calibrate.split)
        for section, function in (
            ("sweep", ss.sweep),
            ("train", ss.train_lsg),
            ("compare", ss.compare),
        )
        for recipe in [read_recipe(section, path, {}, function)]
    }
    assert splits == {
        "sweep": ("test", "validation"),
        "train": ("train", "validation"),
        "compare": ("test", "validation"),
    }
    ids = {
        section: {r["image_id"] for r in read_recipe(section, path, {}, function).data}
        for section, function in (("train", ss.train_lsg), ("compare", ss.compare))
    }
    assert not ids["train"] & ids["compare"]


def test_numbers_with_exponents_and_null(write) -> None:
    path = write(model="bundled", data="scenes", v_detector="norm:1", train={"layers": [0]})
    with open(path, "a") as file:
        file.write("l_detector: null\n")
    taken_back = read_recipe("train", path, {"v_detector": None, "layers": None}, ss.train_lsg)
    assert taken_back.v_detector is None
    assert taken_back.options == {}
    assert parse_yaml("{a: 1e-3, b: 2E+4, c: e-3, d: 1.5e2, e: '1e-3'}", "it") == {
        "a": 1e-3, "b": 2e4, "c": "e-3", "d": 150.0, "e": "1e-3"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("section", "function"), [("sweep", ss.sweep), ("train", ss.train_lsg), ("compare", ss.compare)]
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


def commands_in(path) -> list[list[str]]:
    """The sinkscope commands in the comments of a recipe."""
    lines = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in whole.splitlines() if line.startswith("sinkscope ")]


def test_the_commands_in_the_recipe_ask_what_they_say(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    found = commands_in(PAPER)
    assert [words[0] for words in found] == [
        "sweep",
        "sweep",
        "train-lsg",
        "compare",
        "sweep",
        "compare",
    ]
    for words in found:
        _, bound, _ = app.parse_args(words, exit_on_error=False)
        settings = bound.arguments["settings"]
        section = {"train-lsg": "train"}.get(words[0], words[0])
        function = {"sweep": ss.sweep, "train": ss.train_lsg, "compare": ss.compare}[section]
        data = settings.read(section, function, None).data
        if "nyu-visionx/CV-Bench" in words:
            assert data == Questions(
                "nyu-visionx/CV-Bench",
                columns={"task": "task", "question": "prompt"},
                letters="(A)",
            )
        elif section != "train":
            assert (data.source, data.split) == ("Lin-Chen/MMStar", "val")


def test_the_papers_training_set_is_drawn_in_equal_parts(tmp_path) -> None:
    script = str(PAPER.parent / "sample_cambrian.py")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    folders = {
        "ocr_vqa": 9,
        "gqa": 30,
        "clevr": 5,
        "websight": 5,
        "geo170k": 5,
        "ai2d": 5,
        "odd": 3,
    }
    lines = [
        {"image": f"{folder}/{i}.png", "conversations": turns}
        for folder, many in folders.items()
        for i in range(many)
    ]
    lines += [{"conversations": turns}, {"image": "gqa/x.png", "conversations": turns[:1]}]
    source, out = tmp_path / "all.jsonl", tmp_path / "some.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines))

    def run(*words):
        command = [sys.executable, script, str(source), str(out), *words]
        return subprocess.run(command, capture_output=True, text=True)

    short = run("--total", "60")
    assert short.returncode == 1
    assert "fewer than 10 questions of ['OCR', 'counting'" in short.stderr
    assert not out.exists()
    made = run("--total", "30")
    assert made.returncode == 0, made.stderr
    assert "passed over: 3 with folder odd" in made.stdout
    assert "passed over: 2 with no image" in made.stdout
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert Counter(r["task"] for r in records) == dict.fromkeys(
        ("OCR", "general VQA", "counting", "code", "maths", "science"), 5
    )
    assert len({r["image"] for r in records}) == 30
    assert {(r["question"], r["answer"]) for r in records} == {("what?", "that")}
    again = out.read_text()
    run("--total", "30")
    assert out.read_text() == again
    run("--total", "30", "--seed", "1")
    assert out.read_text() != again


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
    "detector a number": (
        "sweep",
        "model: bundled\ndata: scenes\nv_detector: 100",
        None,
        "Got v_detector: 100; expected a word, such as norm:100",
    ),
    "limit a word": (
        "sweep",
        "model: bundled\ndata: {source: scenes, limit: ten}",
        None,
        "Got limit='ten'; expected an int of at least 1",
    ),
    "columns a list": (
        "sweep",
        "model: bundled\ndata: {source: scenes, columns: [task]}",
        None,
        "expected fields and the names",
    ),
    "a bar": (
        "sweep",
        "model: bundled\ndata: scenes\nsweep: {progress: true}",
        None,
        "'progress' for",
    ),
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


def test_sweep_of_three_groups(tmp_path, capsys) -> None:
    words = [
        "sweep",
        *SMALL,
        "--limit",
        "8",
        "--layers",
        "1",
        "--set",
        "grid={steps: 3, groups: 3}",
    ]
    words += ["--l-detector", "dims:3:4", "--out", str(tmp_path / "map")]
    assert main([*words, "--dry-run"]) == 0
    assert "8 questions about 1 images, 1 layers x 6 triples" in capsys.readouterr().out
    assert main(words) == 0
    assert "Does splitting the rest into L-sinks and ordinary tokens" in capsys.readouterr().out
    made = ss.experiments.Sweep.load(tmp_path / "map")
    assert made.pairs == ss.lsg_grid(3, groups=3)
    assert made.settings["l_rule"] == repr(ss.detectors.SinkDimensions((3,), 4.0))


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
                "stack": {"stack": [str(out / "gate-embed"), str(out / "gate-0")]},
                "control": {
                    "random_tokens": {"condition": {"gate": str(out / "gate-0")}, "count": 4}
                },
            },
        }
    )
    words = ["compare", "bundled", "--recipe", recipe, "--v-detector", "norm:30"]
    words += ["--l-detector", "dims:3:10", "--out", str(tmp_path / "compared")]
    assert main([*words, "--dry-run"]) == 0
    assert "16 questions x 6 conditions and a trace of each: 112 prompts" in capsys.readouterr().out
    assert main(words) == 0
    report = tmp_path / "compared" / "report"
    assert {p.name for p in report.iterdir()} == {"answers.csv", "summary.csv", "comparison.png"}
    summary = pd.read_csv(report / "summary.csv")
    assert set(summary["condition"]) == {"base", "gate", "half", "masked", "stack", "control"}


def test_flags_and_rules_reach_the_training(tmp_path, capsys) -> None:
    out = tmp_path / "gates"
    words = ["train-lsg", *SMALL, "--limit", "16", "--layers", "1", "--epochs", "1", "--batch", "4"]
    assert main([*words, "--lr", "0.004", "--out", str(out)]) == 0
    gate = ss.LSG.from_pretrained(out / "gate-1")
    assert gate.config.v_detector == ss.lsg.describe(ss.detectors.Norm(30.0))
    settings = gate.record["settings"]
    assert (settings["lr"], settings["batch"]) == (0.004, 4)
    assert gate.record["layer"] == 1
    assert "results" not in gate.record
    useless = [*words, "--lr", "1e-30", "--out", str(tmp_path / "useless"), "--set", "warmup=0"]
    capsys.readouterr()
    assert main(useless) == 0
    assert (
        ss.LSG.from_pretrained(tmp_path / "useless" / "gate-1").record["result"]["best_step"] == 0
    )
    assert "so this is the untrained gate" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["sweep", "train-lsg", "compare"])
def test_a_dry_run_needs_no_weights(command, tmp_path, capsys, write) -> None:
    """A checkpoint without its weights: config and processor are enough to count."""
    model, processor = ss.testing.tiny_llava()
    model.config.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for i in range(4):
        ss.testing.random_image(32, 32, i).save(tmp_path / f"{i}.png")
    lines = [{"image": f"{i}.png", "question": "what is it", "answer": "circle"} for i in range(4)]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    words = [command, str(tmp_path / "model"), "--data", str(tmp_path / "q.jsonl")]
    words += {
        "sweep": [],
        "train-lsg": ["--layers", "0", "--calibrate", "scenes"],
        "compare": ["--recipe", write(compare={"conditions": {"base": [], "VAR": {"var": {}}}})],
    }[command]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert {
        "sweep": "4 questions about 4 images, 3 layers x 11 pairs",
        "train-lsg": "steps",
        "compare": "4 questions x 2 conditions",
    }[command] in said


WRONG = {
    "set": (["sweep", *SMALL, "--set", "batch"], "expected NAME=VALUE"),
    "no layers": (["train-lsg", *SMALL], "Write --layers 10"),
    "nothing to compare": (["compare", *SMALL], "Write --gate DIR"),
    "set no YAML": (["sweep", *SMALL, "--set", "batch={a"], "Got --set batch={a, which is no YAML"),
    "a grid": (
        ["sweep", *SMALL, "--set", "grid=0.5"],
        "expected how many pairs, or a list of pairs",
    ),
    "a grid of other groups": (
        ["sweep", *SMALL, "--set", "grid={groups: 4}"],
        "Got groups=4; expected 2",
    ),
    "a grid of other words": (
        ["sweep", *SMALL, "--set", "grid={step: 4}"],
        "Got the key 'step' under grid. Did you mean 'steps'?",
    ),
    "a gate twice": (
        ["compare", *SMALL, "--gate", "a/gate-1", "--gate", "a/../a/gate-1"],
        "a/gate-1 more than once",
    ),
    "no gate there": (["compare", *SMALL, "--gate", "nowhere-at-all"], "nowhere-at-all"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_words(name, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words, message = WRONG[name]
    assert main(words) == 2
    assert message in capsys.readouterr().err


OF_ANOTHER_TYPE = {
    "a switch of train": ("train-lsg", "append_end=n", "append_end='n'; expected True or False"),
    "a length of train": (
        "train-lsg",
        "max_answer_tokens='9'",
        "max_answer_tokens='9'; expected an",
    ),
    "a switch of compare": (
        "compare",
        "length_normalized='false'",
        "length_normalized='false'; expected True or False",
    ),
    "a switch of an edit": (
        "compare",
        "conditions={base: [], x: {edit: {kind: V-sinks, control: 'no'}}}",
        "control='no'; expected True or False",
    ),
    "a number of an edit": (
        "compare",
        "conditions={base: [], x: {edit: {kind: top attended, k: '2'}}}",
        "k='2'; expected an int of at least 1",
    ),
    "a seed of a control": (
        "compare",
        "conditions={base: [], x: {random_tokens: {condition: {var: {}}, seed: '1'}}}",
        "seed='1'; expected an int of at least 0",
    ),
    "a revision": ("sweep", "model={revision: 1234567}", "revision=1234567; expected text"),
    "a kernel": ("sweep", "model={attn_implementation: no}", "attn_implementation=False; expected"),
}


@pytest.mark.parametrize("name", OF_ANOTHER_TYPE)
def test_no_text_counts_as_a_number_or_a_switch(name, capsys, tmp_path) -> None:
    command, given, message = OF_ANOTHER_TYPE[name]
    model = "bundled"
    if command == "sweep":
        model = str(write_checkpoint(*ss.testing.tiny_llava(), tmp_path / "model"))
    words = [command, model, *SMALL[1:], "--limit", "8", "--set", given]
    words += {"train-lsg": ["--layers", "1"], "compare": [], "sweep": []}[command]
    if command == "compare" and "conditions" not in given:
        words += ["--set", "conditions={base: [], x: {var: {}}}"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


TRUSTING = {
    "trace": ["--image", "x.png", "--prompt", "what"],
    "doctor": [],
    "sweep": [],
    "train-lsg": ["--layers", "1"],
    "compare": ["--set", "conditions={base: [], x: {var: {}}}"],
}


@pytest.mark.parametrize("command", TRUSTING)
def test_code_runs_if_the_command_line_says_so(
    command, tmp_path, capsys, write, monkeypatch
) -> None:
    """A recipe alone does not say it, and what a recipe says must be true or false."""
    monkeypatch.chdir(tmp_path)
    ss.testing.random_image(32, 32).save("x.png")
    folder = write_checkpoint(*ss.testing.tiny_llava(), tmp_path / "model")
    own_code(folder)
    words = [command, str(folder), *TRUSTING[command]]
    if command not in ("trace", "doctor"):
        for trust, says in {
            True: "Got trust_remote_code: true for",
            "False": "trust_remote_code='False'; expected True or False",
            0: "trust_remote_code=0; expected True or False",
        }.items():
            path = write(data="scenes", model={"name": str(folder), "trust_remote_code": trust})
            assert main([command, "--recipe", path, *TRUSTING[command]]) == 2
            assert says in capsys.readouterr().err
        words = [command, "--recipe", write(data="scenes", model=str(folder)), *TRUSTING[command]]
    assert main(words) == 2
    assert "it holds its own code" in capsys.readouterr().err
    assert not (folder / "ran").exists()
    assert main([*words, "--trust-remote-code"]) == 2  # the code here is no model
    assert (folder / "ran").exists()


@pytest.mark.parametrize("what", [{"gaet": "x"}, {"gate": "a", "edit": {}}, 3, {"lora": {}}])
def test_a_condition_that_is_none(what, write, capsys) -> None:
    path = write(model="bundled", data="scenes", compare={"conditions": {"base": [], "x": what}})
    assert main(["compare", "--recipe", path]) == 2
    assert "Got the condition x" in capsys.readouterr().err


ODD = {
    "unknown argument": ({"var": {"presett": "code"}}, "Did you mean 'preset'"),
    "unknown field of an edit": ({"edit": {"kindd": "V-sinks"}}, "Did you mean 'kind'"),
    "missing argument": ({"fixed_coefficients": {"layer": 1}}, r"expected ['s_v', 's_rest'] too"),
    "a word": ({"var": "code"}, "expected keys and values"),
    "gates in a list": ({"gate": ["a", "b"]}, "expected a folder."),
    "a stack of nothing": ({"stack": []}, "expected a folder or a list of folders"),
    "no condition to control": ({"random_tokens": {"count": 4}}, "expected ['condition'] too"),
}


@pytest.mark.parametrize("name", ODD)
def test_wrong_arguments_of_a_condition(name, write, capsys) -> None:
    what, message = ODD[name]
    path = write(model="bundled", data="scenes", compare={"conditions": {"base": [], "x": what}})
    assert main(["compare", "--recipe", path]) == 2
    assert message in capsys.readouterr().err
    path = write(model="bundled", data="scenes", compare={"conditions": ["base", "var"]})
    assert main(["compare", "--recipe", path]) == 2
    assert "expected names with what to do" in capsys.readouterr().err


def test_gates_are_named_by_what_tells_them_apart(tmp_path) -> None:
    made = named_gates(["s0/gate-1", "s1/gate-1", str(tmp_path / "gate-2")])
    assert list(made) == ["s0/gate-1", "s1/gate-1", "gate-2"]
    assert made["s1/gate-1"] == {"gate": "s1/gate-1"}

"""The command line: what it prints, what it writes, and how it says that something is wrong."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace

import pytest

import sinkscope as ss
from sinkscope import detectors
from sinkscope.bundled import draw_scene
from sinkscope.cli import app, main
from sinkscope.cli.recipes import FORMS, parse_detector
from sinkscope.detectors import KNOWN
from sinkscope.errors import DetectorError, InputError
from sinkscope.testing import plant, write_checkpoint
from tests.project.repository import ROOT

QUESTION = "how many shapes are there?"
FILES = {"index.html", "sinks.csv", "tokens.csv", "trace.json", "figures"}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A checkpoint folder with known sinks, the words for its detectors, and two pictures."""
    made = plant(v_sinks=(9, 46), l_sinks=(20,))
    folder = tmp_path_factory.mktemp("planted")
    write_checkpoint(made.model, made.processor, folder / "model")
    for seed in (1, 2):
        draw_scene(seed).image.save(folder / f"{seed}.png")
    (folder / "words.txt").write_text("no image")
    return folder


@pytest.fixture
def trace_words(planted):
    """A whole `sinkscope trace` with detectors that find what was planted."""
    words = [
        "trace",
        str(planted / "model"),
        "--image",
        str(planted / "1.png"),
        "--prompt",
        QUESTION,
    ]
    return [*words, "--v-detector", "dims:90,17:5", "--l-detector", "dims:41,101:5"]


def test_trace_prints_a_table_and_writes_a_folder(trace_words, tmp_path, capsys) -> None:
    assert main([*trace_words, "--out", str(tmp_path / "report")]) == 0
    out = capsys.readouterr().out
    assert "Sinks: 2 V-sinks, 1 L-sink, 1 text sink" in out
    assert re.search(r"^V +\d+ image 0 +1,1 ", out, re.MULTILINE)
    assert re.search(r"^L +\d+ image 0 +2,4 ", out, re.MULTILINE)
    assert out.splitlines()[-1] == f"Report: {tmp_path / 'report' / 'index.html'}"
    assert {path.name for path in (tmp_path / "report").iterdir()} == FILES
    assert (tmp_path / "report" / "figures" / "mass_by_layer.png").exists()


def test_the_default_folder_lies_where_one_stands(trace_words, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(trace_words) == 0
    assert {path.name for path in (tmp_path / "sinkscope-trace").iterdir()} == FILES


def test_json_is_all_that_is_printed(trace_words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*trace_words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [sink["kind"] for sink in found["sinks"]].count("V") == 2
    assert found["detectors"]["chosen"] == "given"
    assert list(tmp_path.iterdir()) == []
    assert main([*trace_words, "--json", "--out", "kept"]) == 0
    json.loads(capsys.readouterr().out)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == FILES


def test_detectors_are_found_on_other_images(trace_words, planted, tmp_path, capsys) -> None:
    words = [*trace_words[:6], "--calibrate", str(planted / "2.png"), str(planted / "1.png")]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    chosen = found["detectors"]["chosen"]
    assert chosen == "calibrated on 2 samples"
    kinds = sorted(sink["kind"] for sink in found["sinks"])
    assert kinds == ["L", "V", "V", "text"]
    assert main([*words, "--v-detector", "norm:valley", "--json"]) == 0
    detectors_found = json.loads(capsys.readouterr().out)["detectors"]
    assert detectors_found["chosen"] == "V: given; L: calibrated on 2 samples"
    assert detectors_found["V"].startswith("Norm(tau='valley'")


def test_two_images_in_one_prompt(trace_words, planted, capsys) -> None:
    words = [*trace_words[:4], str(planted / "2.png"), *trace_words[4:]]
    assert main([*words, "--json"]) == 0
    sinks = json.loads(capsys.readouterr().out)["sinks"]
    assert {sink["image"] for sink in sinks} == {-1, 0, 1}


def test_the_demo_says_what_it_does_and_where_it_left_it(tmp_path, capsys) -> None:
    assert main(["demo", "--toy", "--out", str(tmp_path / "demo"), "--questions", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sinkscope demo: the same on the toy model inside the package")
    assert lines[-1] == f"Report: {tmp_path / 'demo' / 'index.html'}"
    assert {path.name for path in (tmp_path / "demo").iterdir()} == FILES
    start = next(i for i, line in enumerate(lines) if line.startswith("question"))
    asked = [re.split(r"\s{2,}", line) for line in lines[start + 2 : start + 6]]
    assert [row[1] for row in asked] == ["global", "local"] * 2
    for _, _, answer, truth, right in asked:
        assert right == ("yes" if answer == truth else "no")
    table = json.loads((tmp_path / "demo" / "trace.json").read_text())
    for kind, noun in (("V", "V-sinks"), ("L", "L-sinks"), ("text", "text sinks")):
        found = any(sink["kind"] == kind for sink in table["sinks"])
        assert (f"{noun}: none found" in lines) is not found
    assert any("demo --planted" in line for line in lines) is (not table["sinks"])


def test_the_demo_on_planted_sinks_finds_them(tmp_path, capsys) -> None:
    assert main(["demo", "--planted", "--seed", "3", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "compare with the truth" in out.splitlines()[0]
    rows = [re.split(r"\s{2,}", ln) for ln in out.splitlines() if ln[:7] in ("V-sinks", "L-sinks")]
    assert [row[0] for row in rows] == ["V-sinks", "L-sinks"]
    for _, planted_there, found, missed, wrong in rows:
        assert found == planted_there != "none"
        assert missed == wrong == "none"
    named = set(re.findall(r"\d+ \((\d+,\d+)\)", " ".join(row[2] for row in rows)))
    cells = set(re.findall(r"^[VL] +\d+ image 0 +(\d+,\d+) ", out, re.MULTILINE))
    assert named == cells != set()


def test_effects_in_the_demo_are_the_same_on_the_page(tmp_path, capsys) -> None:
    assert main(["demo", "--toy", "--effects", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for text in (out, page):
        assert "none found, so nothing was edited: mask V-sinks, halve V-sinks" in text
        assert "12 changes are shown" in text
        assert "seed_sd" not in text


def test_doctor_prints_the_report(planted, capsys) -> None:
    assert main(["doctor", str(planted / "model")]) == 0
    assert "vision" in capsys.readouterr().out.lower()


def test_doctor_checks_the_numbers_and_says_if_one_is_wrong(planted, capsys, monkeypatch) -> None:
    assert main(["doctor", str(planted / "model"), "--check"]) == 0
    out = capsys.readouterr().out
    assert "```text" in out
    assert str(planted) not in out.partition("```text")[2]
    finish = ss.LogitLens.finish
    wrong = lambda *given: replace(it := finish(*given), logprobs=2 * it.logprobs)  # noqa: E731
    monkeypatch.setattr(ss.LogitLens, "finish", wrong)
    assert main(["doctor", str(planted / "model"), "--check"]) == 1
    assert "lens           language  wrong" in capsys.readouterr().out


def test_models_says_what_is_taken_and_lists_hints_and_constants(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sinkscope.anatomy.families.HINTS", {})
    ss.register_family("my_lvlm", vision_tower="model.eye", image_token_id=0)
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "any type of transformers with a decoder" in out
    assert "hint for my_lvlm: vision_tower='model.eye', image_token_id=0\n" in out
    for named in ("docs/support.md", *(row.name for row in KNOWN)):
        assert named in out
    assert out.count("used by default") == sum(row.default for row in KNOWN)


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sinkscope {ss.__version__}\n"


def test_a_page_of_somebody_else_is_kept(trace_words, tmp_path, monkeypatch, capsys) -> None:
    page = tmp_path / "site" / "index.html"
    page.parent.mkdir()
    page.write_text("<h1>my own page</h1>")
    monkeypatch.setattr("sinkscope.cli.load_model", None)  # refused before a model is loaded
    for words in ([*trace_words], ["demo", "--planted"]):
        assert main([*words, "--out", str(page.parent)]) == 2
        assert (
            "index.html would be replaced, which sinkscope did not write" in capsys.readouterr().err
        )
    assert page.read_text() == "<h1>my own page</h1>"


def test_what_is_being_done_is_said_where_there_is_no_terminal(trace_words, capsys) -> None:
    assert main([*trace_words, "--json"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" ...")]
    words = ["loading the model", "preparing", "tracing", "answering"]
    assert said == [f"sinkscope: {text} ..." for text in words]


WRONG = {
    "no such image": (
        ["--image", "nowhere.png"],
        "'nowhere.png', which is neither an existing file nor a URL",
    ),
    "no image": (["--image", "{planted}/words.txt"], "which is no readable image"),
    "no such detector": (["--v-detector", "nrm:100"], "Did you mean 'norm'"),
    "half a detector": (
        ["--l-detector", "dims:1"],
        "Got the detector 'dims:1'; expected dims:1415",
    ),
    "tau above its bound": (["--l-detector", "dims:1:20"], "less than sqrt(128) = 11.3"),
    "channel out of range": (["--l-detector", "dims:4000:5"], "expected 0 to 127"),
    "folder is a file": (["--out", "{planted}/words.txt"], "which is a file"),
    "calibrate on nothing": (["--calibrate", "nowhere.png"], "which is neither an existing file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_message(
    case, trace_words, planted, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    extra, message = WRONG[case]
    option, value = (word.format(planted=planted) for word in extra)
    words = list(trace_words)
    if option in words:  # given once only
        del words[words.index(option) : words.index(option) + 2]
    assert main([*words, option, value]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("sinkscope: ")
    assert message in err
    assert "Traceback" not in err
    assert "Report:" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["doctor", "{here}/empty"], "holds no config.json"),
        (["trace", "{here}/empty", "--image", "{here}/x", "--prompt", "y"], "is no readable image"),
        (["trace", "example", "--image", "{here}", "--prompt", "y"], "which is a folder"),
        (["demo", "--questions", "0"], "Got --questions 0; expected 1 to"),
        (["demo", "--questions", "999"], "Got --questions 999; expected 1 to"),
        (["demo", "--seed", "-1"], "Got seed=-1; expected an int of at least 0"),
    ],
)
def test_other_commands_explain_too(words, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x").write_text("looked at before the model's folder")
    assert main([word.format(here=tmp_path) for word in words]) == 2
    assert message in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--questions 0"):
        main(["demo", "--questions", "0", "--debug"])


def test_an_interrupt_is_no_error(monkeypatch) -> None:
    def interrupted(*words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sinkscope.cli.app", interrupted)
    assert main(["models"]) == 130


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trce"], 'Did you mean "trace"?'),
        (["trace", "bundled"], "--image"),
        (["trace", "bundled", "--imgae", "x"], "--image"),
        (["demo", "--seed", "x"], 'unable to convert "x" into int'),
        (["doctor", "bundled", "--dtype", "float31"], "float32"),
        (["doctor", "bundled", "toy"], "toy"),
        (["doctor"], "usage: sinkscope doctor --help"),
    ],
)
def test_bad_usage_says_what_is_wrong_and_where_to_look(words, message, capsys) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "usage: sinkscope" in said


def test_without_a_command_there_is_help(capsys) -> None:
    assert main([]) == 2
    assert "train-lsg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "detector"),
    [
        ("norm:100", detectors.Norm(100.0)),
        ("norm:valley", detectors.Norm("valley")),
        ("valley", detectors.Norm("valley")),
        ("3sigma", detectors.Norm("3sigma")),
        ("dims:1415,2533:20", detectors.SinkDimensions((1415, 2533), 20.0)),
        ("dims:7:8:none", detectors.SinkDimensions((7,), 8.0, "none")),
        ("massive", detectors.Massive()),
        ("massive:50:500", detectors.Massive(50.0, 500.0)),
        ("received", detectors.Received()),
        ("received:0.2", detectors.Received(0.2)),
        ("received:5x", detectors.Received(times_null=5.0)),
        ("cosine:0.8", detectors.CosineToBOS(0.8)),
        ("cls", detectors.VisionTokens("cls")),
        ("register", detectors.VisionTokens("register")),
    ],
)
def test_detectors_in_a_few_words(spec, detector) -> None:
    assert parse_detector(spec) == detector


@pytest.mark.parametrize(
    "spec",
    [
        "norm",
        "norm:many",
        "dims:a:3",
        "dims:1:2:rmss",
        "valley:3",
        "received:x",
        "cosine:",
        "cls:1",
    ],
)
def test_wrong_words_name_the_right_ones(spec) -> None:
    name = spec.split(":")[0]
    with pytest.raises(DetectorError, match=f"Got the detector '{spec}'; expected ") as caught:
        parse_detector(spec)
    assert FORMS[name] in str(caught.value)


def options():
    """Every option of every command, with its help."""
    for name in ("demo", "trace", "sweep", "train-lsg", "compare", "doctor", "models"):
        for argument in app[name].assemble_argument_collection(parse_docstring=True):
            if argument.parameter.parse is not False and argument.names and not argument.children:
                yield name, argument.names[0], argument.parameter.help


def test_every_option_is_explained_and_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, option, text in options():
        assert text, f"{name} {option} has no help"
        known = f"`{option}" in page or not option.startswith("--")
        assert known, f"docs/cli.md does not explain {option}"
    for name in FORMS:
        assert f"`{name}" in page, f"docs/cli.md does not explain the detector {name}"


def test_help_imports_nothing_that_takes_seconds() -> None:
    code = (
        "import sys\n"
        "from sinkscope.cli import main\n"
        "try:\n    main(['trace', '--help'])\n"
        "finally:\n    print([m for m in ('torch', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--l-detector" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_m_is_the_same_program(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["sinkscope", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("sinkscope", run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"sinkscope {ss.__version__}\n"


def test_trace_dataset_writes_tables_and_goes_on(planted, tmp_path, capsys):
    words = [
        str(planted / "model"),
        str(planted),
        "--out",
        str(tmp_path / "out"),
        "--prompt",
        QUESTION,
    ]
    assert main(["trace-dataset", *words]) == 0
    said = capsys.readouterr().out
    assert "2 records" in said
    assert "V-sinks: 2.00 per record; in 1.000 of the records" in said
    report = {file.name for file in (tmp_path / "out" / "report").iterdir()}
    assert report == {"kinds.csv", "by_layer.csv", "agreement.csv", "layers.png"}
    assert main(["trace-dataset", *words]) == 0
    assert main(["trace-dataset", *words, "--v-detector", "massive"]) == 2
    assert "rules.v: there" in capsys.readouterr().err

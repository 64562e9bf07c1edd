"""The demo and `trace` on the example model, as a newcomer sees them."""

import json

from sinkscope.bundled import draw_scene
from sinkscope.cli import main
from tests.real_model import example_folder


def test_the_demo_shows_answers_sinks_and_effects(tmp_path, capsys):
    example_folder()
    assert main(["demo", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "On a black background: a small red triangle" in out
    assert "The words about the photograph are wrong" in out
    assert "danielbuechele" in out
    assert (
        "0 <|im_start|>: written by block 1 (mlp), a sink in layers 2-9; written by block 11 (mlp), a sink "
        "in layers 12-29" in out
    )
    start = out.index("With and without some tokens")
    rows = {ln.split("  ")[0]: ln.split()[-2:] for ln in out[start:].splitlines()[3:9]}
    assert rows["nothing"] == rows["position 0"] == rows["1 random patch"] == ["black", "black"]
    said, truth = rows["CLS"]
    assert said != truth == "black"
    assert "over many scenes:" in out
    for page in ("index.html", "photo/index.html"):
        assert (tmp_path / page).is_file()


def test_trace_prints_the_answer_and_the_sinks(tmp_path, capsys):
    example_folder()
    picture = tmp_path / "scene.png"
    draw_scene(11_000_000).image.save(picture)
    words = ["trace", "example", "--image", str(picture), "--prompt", "how many shapes are there?"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == "4"
    assert [s["pos"] for s in found["sinks"] if s["kind"] == "text"] == [0, 1]
    assert found["outcomes"]["vision"].startswith("no patch spikes")
    assert main([*words, "--out", str(tmp_path / "report")]) == 0
    said = capsys.readouterr().out
    assert "Answer: 4\n" in said
    assert "no V-sinks, no L-sinks, 2 text sinks, 1 attended token" in said

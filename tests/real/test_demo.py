"""The demo and `trace` on the example model, as a newcomer sees them."""

import json

import sinkscope as ss
from sinkscope.bundled import draw_scene
from sinkscope.cli import main
from tests.real_model import example, example_folder


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
    rows = {ln.split("  ")[0]: ln.split()[-2:] for ln in out[start:].splitlines()[3:10]}
    assert rows.pop("position 0, only where it is a sink") == ["background?", "black"]  # no answer
    assert rows["nothing"] == rows["position 0"] == rows["1 random patch"] == ["black", "black"]
    said, truth = rows["CLS"]
    assert said != truth == "black"
    assert "over many scenes:" in out
    for page in ("index.html", "photo/index.html"):
        assert (tmp_path / page).is_file()


def test_a_sink_masked_everywhere_is_followed_by_the_next_token():
    """Position 1 becomes the sink when nothing before it can be seen; without any, the answer is lost."""
    lvlm = example()
    scene = draw_scene(11_000_000)
    sample = lvlm.prepare(images=scene.image, text="what colour is the background?")
    trace, first = ss.trace_sinks(lvlm, sample), sample.tokens.select("first")
    spikes = ss.MassiveActivations(layers=[12])
    made, said = {}, {}
    for name, tokens in {
        "none": None,
        "all layers": first,
        "where it is a sink": trace.text_sinks() & first[:, None],
    }.items():
        edits = [] if tokens is None else [ss.MaskKeys(tokens)]
        run = lvlm.run(sample, [spikes], interventions=edits, logits="last")
        made[name] = float(run[spikes].values[0, 0, 1, 0].abs())
        (said[name],) = lvlm.generate(sample, interventions=edits, max_new_tokens=2).text
    assert made["all layers"] > 20_000
    assert max(made["none"], made["where it is a sink"]) < 250
    assert said["none"] == said["all layers"] == scene.background != said["where it is a sink"]


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

"""What MODEL may be, everywhere: two words, a folder, a repository; and what is nearly a word is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import sinkscope as ss
from sinkscope.bundled import load_bundled
from sinkscope.cli import main
from sinkscope.cli import recipes as named
from sinkscope.cli.recipes import read_recipe
from sinkscope.errors import CheckpointError, InputError
from sinkscope.example import load as of_the_example
from sinkscope.testing import tiny_llava, write_checkpoint

COMMANDS = {
    "trace": ["--image", "x.png", "--prompt", "what"],
    "doctor": [],
    "sweep": ["--data", "scenes"],
    "train-lsg": ["--data", "scenes", "--layers", "1"],
    "compare": ["--data", "scenes", "--gate", "nowhere"],
}


@pytest.fixture
def asked(monkeypatch):
    """What is asked of `load_example`; the bundled model is what it returns here."""
    seen = []

    def load_example(*args, **options):
        seen.append((args, options))
        return load_bundled()

    monkeypatch.setattr(of_the_example, "load_example", load_example)
    return seen


@pytest.fixture
def no_network(monkeypatch):
    def never(*args, **options):
        raise AssertionError("a repository was asked for")

    monkeypatch.setattr(ss.LVLM, "from_pretrained", never)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("typed", "meant"), [("bundeld", "bundled"), ("exmaple", "example"), ("EXAMPLE", "example")]
)
def test_every_command_knows_a_mistyped_word(no_network, capsys, command, typed, meant):
    assert main([command, typed, *COMMANDS[command]]) == 2
    said = capsys.readouterr().err
    assert f"Got the model {typed!r}; expected 'bundled', 'example', a folder" in said
    assert said.endswith(f"Did you mean {meant!r}?\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_both_words(capsys, command):
    assert main([command, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "'example' (a small real model), 'bundled' (a toy inside the package), a folder" in said


def test_a_recipe_may_be_mistyped_too(no_network, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: exampl\ndata: scenes\n")
    recipe = read_recipe("sweep", str(path), {}, ss.sweep)
    with pytest.raises(CheckpointError, match="Did you mean 'example'"):
        recipe.load()


def test_the_example_is_traced_by_its_name(asked, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "example"]) == 0
    assert "vision" in capsys.readouterr().out
    assert main(["doctor", "example", "--dtype", "bfloat16"]) == 0
    assert asked == [((), {}), ((), {"dtype": "bfloat16"})]


def test_recipes_take_the_example(asked):
    flags = {"model": {"name": "example", "attn_implementation": "eager"}, "data": "scenes"}
    recipe = read_recipe("sweep", None, flags, ss.sweep)
    assert recipe.load().name == "bundled"
    assert recipe.load(weights=False).name == "bundled"
    assert asked == [((), {"attn_implementation": "eager"})] * 2


@pytest.mark.parametrize("place", ["exmaple", "./example", "bundle"])
def test_a_folder_is_a_folder_whatever_its_name(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(*tiny_llava(), tmp_path / place)
    assert named.load_model(place).name == place


def test_a_word_goes_before_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(*tiny_llava(), tmp_path / "bundled")
    assert named.load_model("bundled").anatomy == load_bundled().anatomy


@pytest.mark.parametrize(
    "name", ["llava-hf/llava-1.5-7b-hf", "someone/exmaple", "llava", "a\\exmaple"]
)
def test_what_is_no_near_miss_is_left_to_the_hub(name):
    named.check_word(name)


@pytest.mark.parametrize("option", [{"revision": "main"}, {"remote": True}])
@pytest.mark.parametrize("name", named.WORDS)
def test_what_belongs_to_a_repository_is_refused(asked, name, option):
    ((key, value),) = option.items()
    with pytest.raises(
        InputError, match=f"Got {key}={value!r} for {name!r}, a model of the package"
    ):
        named.load_model(name, **option)
    assert asked == []


def test_options_reach_a_model_of_the_package():
    lvlm = named.load_model("bundled", dtype="bfloat16", attn_implementation="eager")
    assert lvlm.module.dtype == torch.bfloat16
    assert lvlm.anatomy.language.kernel == "eager"
    assert named.load_model("bundled", dtype="auto", device_map="cpu").device.type == "cpu"


def test_a_gpu_by_its_number_is_not_lost(monkeypatch):
    """0 is a device, and equal to False."""
    asked = {}
    monkeypatch.setattr(ss.LVLM, "from_pretrained", lambda name, **given: asked.update(given))
    named.load_model("./folder", device_map=0, remote=False, revision=None)
    assert asked == {"device_map": 0}


@pytest.mark.parametrize("device", ["cuad", "cuda:99"])
def test_a_device_that_is_not_here_is_named(device):
    with pytest.raises(InputError, match=rf"Got device_map='{device}' \(.*expected 'auto', 'cpu'"):
        named.load_model("bundled", device_map=device)


def test_looking_at_the_name_imports_nothing_that_takes_seconds():
    code = (
        "import sys\nfrom sinkscope.cli.recipes import check_word\n"
        "try:\n    check_word('exmaple')\nexcept OSError as error:\n    print(error)\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].endswith("Did you mean 'example'?")
    assert done.stdout.splitlines()[1] == "[]"

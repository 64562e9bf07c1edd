"""The card and the adapters that ship with the package agree, and the package stays small."""

from __future__ import annotations

import json

from safetensors.torch import load_file

from sinkscope.example import sources as layout
from sinkscope.example.sources import BYTES, DINOV2, SMOLLM2

CARD = (layout.ADAPTERS.parent / "README.md").read_text(encoding="utf-8")


def test_the_card_prints_the_numbers_of_the_training():
    training = json.loads((layout.ADAPTERS / "training.json").read_text())
    for task, right in training["held_out"].items():
        assert f"| {task} | {right:.3f} |" in CARD
    text = CARD.replace("\n", " ")
    assert f"{training['steps']} steps of 16 scenes" in text
    assert f"{training['scenes']:,} scenes and {training['questions']:,} answers" in text
    assert f"in {training['seconds']:.0f} seconds on one {training['device']}" in text
    assert f"from {training['loss'][0]:.1f} to {training['loss'][-1]:.2f}" in text


def test_the_card_names_sources_and_licences():
    for words in (SMOLLM2.requirement, DINOV2.requirement, f"{BYTES / 1e6:.0f} MB", "MIT"):
        assert words in CARD
    assert CARD.count("Apache-2.0") >= 2


def test_the_adapters_fit_the_models_and_are_small():
    lora, settings = load_file(layout.LORA), json.loads(layout.LORA_CONFIG.read_text())
    assert (settings["r"], settings["lora_alpha"]) == (8, 16)
    assert len(lora) == 30 * len(settings["target_modules"]) * 2
    assert all(8 in tensor.shape for tensor in lora.values())
    shapes = {name: tuple(t.shape) for name, t in load_file(layout.PROJECTOR).items()}
    assert shapes["linear_1.weight"] == (576, 384)
    assert shapes["linear_2.weight"] == (576, 576)
    assert sum(path.stat().st_size for path in layout.ADAPTERS.iterdir()) < 8_000_000
    assert {path.suffix for path in layout.ADAPTERS.iterdir()} == {".safetensors", ".json"}

"""The stored model is small, safe, loads without sinkscope, and answers."""

import json
import subprocess
import sys

import pytest
import torch
from bundled_model.scoring import answer, one_question_per_task, right_by_task

from sinkscope.bundled import TASKS, TEST_SEEDS, bundled_path, draw_scene, load_bundled_hf

FLOOR = (
    0.9  # measured on the 60 scenes below: 0.95 to 1; the card has the intervals of a larger sample
)

LOAD = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], local_files_only=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], local_files_only=True)
content = [{"type": "image"}, {"type": "text", "text": "What colour is the background?"}]
text = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
)
image = Image.new("RGB", (64, 64), (16, 16, 16))
inputs = processor(images=image, text=text, return_tensors="pt")
assert inputs["input_ids"][0, :2].tolist() == processor.tokenizer.convert_tokens_to_ids(
    ["<s>", "USER:"]
), inputs["input_ids"]
output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
assert "sinkscope" not in sys.modules
"""


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in bundled_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}


def test_plain_transformers_loads_it_and_it_answers(tmp_path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(bundled_path())],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "black"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementation_is_kept(attention: str) -> None:
    model, _ = load_bundled_hf(attn_implementation=attention)
    assert model.config.text_config._attn_implementation == attention
    assert model.dtype == torch.float32
    assert not model.training


def test_it_answers_questions_about_scenes_it_never_saw() -> None:
    model, processor = load_bundled_hf()
    scenes = [draw_scene(seed) for seed in TEST_SEEDS[-60:]]
    pairs = [pair for scene in scenes for pair in one_question_per_task(scene)]
    right = right_by_task(pairs, answer(model, processor, pairs))
    assert set(right) == set(TASKS)
    shares = {task: sum(values) / len(values) for task, values in right.items()}
    assert min(shares.values()) >= FLOOR, shares


def test_the_card_prints_the_stored_numbers() -> None:
    measured = json.loads((bundled_path() / "measurements.json").read_text())
    card = (bundled_path() / "README.md").read_text()
    for task, row in measured["accuracy"].items():
        assert f"| {task} | {TASKS[task]} | {row['right']} of {row['asked']} |" in card
    for tower in ("vision", "language"):
        for row in measured[tower]:
            assert f"| {row['received']:.3f} ({row['null']:.3f}) |" in card


def test_a_page_does_not_read_words_of_the_card_as_html() -> None:
    card = (bundled_path() / "README.md").read_text()
    assert "`<s>` (0)" in card
    assert "<" not in "".join(card.split("`")[::2])  # outside code

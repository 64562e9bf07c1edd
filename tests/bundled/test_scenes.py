"""Scenes follow from their seed, and answers are right by construction."""

from itertools import pairwise

import numpy as np
import pytest
from bundled_model.packing import pack, patch_truth, turn_ids
from bundled_model.recipe import IMAGE_TOKENS, build_processor, vocabulary
from bundled_model.scoring import prompt
from PIL import Image

from sinkscope.bundled import (
    TASKS,
    TEST_SEEDS,
    TRAIN_SEEDS,
    VALIDATION_SEEDS,
    Scene,
    SceneObject,
    all_questions,
    ask,
    draw_scene,
    scene_attributes,
    scene_questions,
)
from sinkscope.bundled.scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, SIZES
from sinkscope.errors import InputError


@pytest.fixture
def by_hand() -> Scene:
    """A red circle at the top left and a red square at the middle right, on grey."""
    circle = SceneObject("circle", "red", "small", 0, 0, (5, 5, 16, 16))
    square = SceneObject("square", "red", "large", 1, 2, (45, 24, 62, 41))
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS["grey"])
    return Scene(image, (circle, square), "grey", seed=0)


def test_answers_of_a_scene_made_by_hand(by_hand: Scene) -> None:
    answers = {question.text: question.answer for question in all_questions(by_hand)}
    assert answers == {
        "how many shapes are there?": "2",
        "what colour is the background?": "grey",
        "how many red shapes are there?": "2",
        "how many green shapes are there?": "0",
        "how many blue shapes are there?": "0",
        "how many yellow shapes are there?": "0",
        "how many purple shapes are there?": "0",
        "what colour is the shape at the top left?": "red",
        "what shape is at the top left?": "circle",
        "what colour is the shape at the middle right?": "red",
        "what shape is at the middle right?": "square",
    }


def test_attributes_of_a_scene_made_by_hand(by_hand: Scene) -> None:
    assert by_hand.count == 2
    assert by_hand.largest_size == "large"
    assert by_hand.colours_present == {"red"}
    assert by_hand.shapes_present == {"circle", "square"}


def test_patch_truth_of_a_scene_made_by_hand(by_hand: Scene) -> None:
    """Patch centres are 4, 12, 20, ...: the circle covers one of them, the square four.

    The places are 64 / 3 pixels wide, so the top left one holds three by three patch centres and the
    middle right one two by three.
    """
    truth = {name: values.reshape(8, 8) for name, values in patch_truth(by_hand).items()}
    expected = np.zeros((8, 8), dtype=np.int64)
    expected[1, 1] = 1
    expected[3:5, 6:8] = 1
    np.testing.assert_array_equal(truth["covered"], expected)
    expected = np.zeros((8, 8), dtype=np.int64)
    expected[:3, :3] = 1 + SHAPES.index("circle")
    expected[3:5, 5:] = 1 + SHAPES.index("square")
    np.testing.assert_array_equal(truth["shape"], expected)
    np.testing.assert_array_equal(truth["colour"] > 0, expected > 0)
    assert set(truth["colour"].flat) == {0, 1 + list(COLOURS).index("red")}
    assert truth["row"][:, 0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert truth["column"][0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_the_same_seed_gives_the_same_scene_and_questions() -> None:
    assert draw_scene(5) == draw_scene(5)
    assert draw_scene(5) != draw_scene(6)
    assert ask(draw_scene(5), seed=1, n=4) == ask(draw_scene(5), seed=1, n=4)


def test_harder_scenes_are_the_same_scenes() -> None:
    """Noise is that of the seed, scaled; contrast pulls every grey level towards the middle."""
    for seed in TEST_SEEDS[:5]:
        easy, clean = draw_scene(seed), draw_scene(seed, noise=0.0)
        loud = draw_scene(seed, noise=40.0)
        assert easy.objects == clean.objects == loud.objects
        assert all_questions(easy) == all_questions(loud)
        a, b, c = (np.asarray(s.image, dtype=float) for s in (clean, easy, loud))
        inside = (b > 60) & (b < 195) & (c > 0) & (c < 255)  # where nothing was cut off
        assert abs(np.polyfit((b - a)[inside], (c - a)[inside], 1)[0] - 8) < 0.3
        flat = np.asarray(draw_scene(seed, noise=0.0, contrast=0.25).image, dtype=float)
        assert np.abs(flat - (127.5 + 0.25 * (a - 127.5))).max() <= 1.25


@pytest.mark.parametrize("wrong", [{"noise": -1.0}, {"contrast": 1.5}, {"contrast": -0.1}])
def test_impossible_difficulties_are_refused(wrong) -> None:
    with pytest.raises(InputError, match="a contrast from 0 to 1"):
        draw_scene(1, **wrong)


def test_pixels_agree_with_the_truth() -> None:
    """The middle of every box has the object's colour, and a corner no box reaches the ground's."""
    for seed in TEST_SEEDS[:50]:
        scene = draw_scene(seed)
        pixels = np.asarray(scene.image).astype(float)
        for obj in scene.objects:
            left, top, right, bottom = obj.box
            middle = pixels[(top + bottom) // 2, (left + right) // 2]
            assert _nearest(middle, COLOURS) == obj.colour
        assert _nearest(pixels[0, 0], BACKGROUNDS) == scene.background


def test_boxes_lie_inside_the_image_and_apart() -> None:
    for seed in TEST_SEEDS[:200]:
        covered = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=int)
        for obj in draw_scene(seed).objects:
            left, top, right, bottom = obj.box
            assert 0 <= left < right <= IMAGE_SIZE
            assert 0 <= top < bottom <= IMAGE_SIZE
            assert abs(right - left - SIZES[obj.size]) <= 1
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1


def test_splits_are_disjoint() -> None:
    ends = sorted(
        (split.start, split.stop) for split in (TRAIN_SEEDS, VALIDATION_SEEDS, TEST_SEEDS)
    )
    assert all(first[1] <= second[0] for first, second in pairwise(ends))


def test_questions_are_different_and_of_every_task() -> None:
    scene = draw_scene(TEST_SEEDS[0])
    everything = all_questions(scene)
    asked = ask(scene, seed=0, n=len(everything))
    assert sorted(q.text for q in asked) == sorted(q.text for q in everything)
    assert {question.task for question in asked} == set(TASKS)
    assert all(question.scope == TASKS[question.task] for question in asked)


def test_every_word_is_known() -> None:
    known = vocabulary()
    for seed in TEST_SEEDS[:100]:
        for question in all_questions(draw_scene(seed)):
            assert set(question.text.replace("?", " ?").split()) <= set(known)
            assert question.answer in known


def test_asking_too_much_is_refused() -> None:
    scene = draw_scene(0)
    available = len(all_questions(scene))
    with pytest.raises(
        InputError, match=f"Got n=99 questions of scene 0; expected 1 to {available}"
    ):
        ask(scene, seed=0, n=99)
    with pytest.raises(InputError, match="Got n=0"):
        ask(scene, seed=0, n=0)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InputError, match="Got seed=-1; expected an int of at least 0"):
        draw_scene(-1)


def test_a_packed_turn_is_the_single_turn_prompt() -> None:
    """The processor and the packing make the same tokens and pixels, and turns do not mix."""
    processor, scene = build_processor(), draw_scene(3)
    batch = pack([scene], seed=0, turns=3, isolated=True)
    start = IMAGE_TOKENS + 2
    for question in ask(scene, seed=0, n=3):
        inputs = processor(
            images=scene.image, text=prompt(processor, question.text), return_tensors="pt"
        )
        ids, asked = turn_ids(question.text, question.answer)
        seen = batch.visible[0, 0, start + asked - 1]
        assert batch.input_ids[0, seen].tolist() == inputs["input_ids"][0].tolist()
        assert batch.positions[0, seen].tolist() == list(range(int(seen.sum())))
        assert (batch.pixels - inputs["pixel_values"]).abs().max() < 1e-5
        start += len(ids)


def _nearest(pixel: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.abs(pixel - np.array(names[name])).sum()))


def test_attributes_are_those_of_the_scenes_of_a_split() -> None:
    records = list(scene_attributes(12, start=3))
    assert [record["image_id"] for record in records] == list(TEST_SEEDS[3:15])
    for record in records:
        scene = draw_scene(record["image_id"])
        assert record["image"].tobytes() == scene.image.tobytes()
        assert record["attributes"] == {
            "count": len(scene.objects),
            "largest size": "large" if any(o.size == "large" for o in scene.objects) else "small",
            "colours": {o.colour for o in scene.objects},
            "shapes": {o.shape for o in scene.objects},
        }
        assert record["question"] == "how many shapes are there?"
    assert {r["attributes"]["largest size"] for r in records} == {"small", "large"}
    other = {record["image_id"] for record in scene_attributes(12, seeds=VALIDATION_SEEDS)}
    assert not [seed for seed in other if seed in TEST_SEEDS or seed in TRAIN_SEEDS]


@pytest.mark.parametrize("wrong", [(0, 0), (5, -1), (len(TEST_SEEDS), 1)])
@pytest.mark.parametrize("made", [scene_attributes, scene_questions])
def test_more_scenes_than_there_are_are_refused(made, wrong) -> None:
    n, start = wrong
    with pytest.raises(InputError, match=f"Got n_images={n} from scene {start}"):
        next(iter(made(n, start=start)))

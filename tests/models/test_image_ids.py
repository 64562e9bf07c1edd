"""One rule says which questions are about one image, for everything that counts or resamples images."""

import shutil

import numpy as np
import pandas as pd
import pytest

import sinkscope as ss
from sinkscope.data.batches import read_dataset
from sinkscope.data.items import as_items, as_labelled, as_targets
from sinkscope.data.questions import Questions
from sinkscope.errors import InputError
from sinkscope.experiments.probing import split_images
from sinkscope.experiments.statistics import cluster_bootstrap, cluster_intervals
from sinkscope.experiments.sweep_grid import by_image
from sinkscope.testing import random_image

PICTURES = [random_image(8, 8, i) for i in range(24)]
COLUMNS = {"question": "what is it", "answer": "red"}


def records(ids, images=None):
    """Two questions about each picture."""
    shown = [PICTURES[i // 2] for i in range(48)] if images is None else images
    return [
        {"image": image, "image_id": name, "attributes": {"a": i % 2}, **COLUMNS}
        for i, (image, name) in enumerate(zip(shown, ids, strict=True))
    ]


def probed(given):
    items = as_labelled(given)
    return split_images(items, as_targets(items, None), 0.5, 0)[1].tolist()


def swept(given):
    groups = by_image(as_items(given))
    place = {number: i for i, group in enumerate(groups) for number, _ in group}
    return [place[i] for i in range(len(given))]


WAYS = {
    "answers": lambda given: [item.image_id for item in as_items(given)],
    "sweep": swept,
    "linear probes": probed,
    "training": lambda given: list(read_dataset(given).groups),
}


def told_by(way):
    """What a way takes for one image: for every record the first one with the same."""

    def get(given):
        names = WAYS[way](given)
        return [names.index(name) for name in names]

    return get


@pytest.fixture(params=WAYS)
def told(request):
    return told_by(request.param)


PAIRS = [i - i % 2 for i in range(48)]
MISSING = [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, "", "  ", "nan", "None", "<NA>"]


@pytest.mark.parametrize("nothing", MISSING, ids=repr)
def test_no_id_is_no_image_called_nan(nothing):
    assert told_by("answers")(records([nothing] * 48)) == PAIRS


def test_no_id_is_none_in_every_way(told):
    assert told(records([float("nan")] * 48)) == PAIRS


@pytest.mark.parametrize(
    ("some", "others"),
    [(1, "1"), (1.0, 1), (np.int64(1), "1"), (np.float64(1), np.str_("1"))],
    ids=repr,
)
def test_a_number_is_its_text(told, some, others):
    """One picture under both is one image; another picture under one of them is refused."""
    ids = [f"i{i // 2}" for i in range(48)]
    ids[:2] = [some, others]
    ids[2:6] = [2**60, 2**60, 2**60 + 1, 2**60 + 1]
    assert told(records(ids)) == PAIRS
    ids[:4] = [some, some, others, others]
    with pytest.raises(
        InputError, match=r"Records 0 and 2 have the image_id '1' and different pic"
    ):
        told(records(ids))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b"] * 24, "Records 0 and 2 have the image_id 'a' and different pictures"),
        (["a", "a", None, *"b" * 45], "Record 2 has no image_id, unlike record 0"),
        ([float("nan"), "a", *"b" * 46], "Record 1 has an image_id, unlike record 0"),
        ([0.5] * 48, r"Record 0: Got image_id=0.5; expected text or a whole number"),
        ([True] * 48, r"Record 0: Got image_id=True; expected text"),
        ([object()] * 48, r"Record 0: Got image_id=<object .*expected text"),
    ],
)
def test_ids_that_do_not_tell_images_apart_are_refused(told, ids, message):
    with pytest.raises(InputError, match=message):
        told(records(ids))


def test_a_picture_is_itself_wherever_it_lies(told, tmp_path):
    """As a path, in another folder, opened, as an array: without an id its pixels tell."""
    for i, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{i}.png")
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "0.png", tmp_path / "copy" / "other.png")
    images = [tmp_path / f"{i // 2}.png" for i in range(48)]
    images[1] = str(tmp_path / "copy" / "other.png")
    images[3], images[5] = PICTURES[1], np.asarray(PICTURES[2])
    assert told(records([None] * 48, images)) == PAIRS


def test_records_that_share_one_of_several_images_are_one_cluster():
    """By hand: images a b | b c | c and d make two clusters, whatever the ids' order."""
    a, b, c, d = PICTURES[:4]
    given = records([None] * 5, [[a, b], [b, c], c, d, d])
    ids = [item.image_id for item in as_items(given)]
    assert len(set(ids)) == 4
    values = [0.0, 1.0, 2.0, 5.0, 6.0]
    want = cluster_bootstrap(values, ["x", "x", "x", "y", "y"])
    assert cluster_bootstrap(values, ids) == want
    assert cluster_intervals(np.array(values)[:, None], ids)[:, 0].tolist() == pytest.approx(want)
    assert len(set(read_dataset(given).groups)) == 2


@pytest.mark.parametrize("nothing", [None, float("nan"), pd.NA, "nan"], ids=repr)
def test_intervals_refuse_missing_ids(nothing):
    with pytest.raises(InputError, match="at place 1; expected an id for every question"):
        cluster_bootstrap([1.0, 2.0, 3.0], ["a", nothing, nothing])


def test_intervals_of_a_table_with_missing_ids_are_those_of_its_images(tiny):
    """pandas gives NaN where a column is empty: the interval was that of one image, or of none."""
    lvlm = tiny("llava-clip-llama")
    frame = pd.DataFrame({"image_id": [float("nan")] * 12})
    answers = ["red", "blue", "a"] * 4
    given = [
        {"image": PICTURES[i // 2], "question": "what is it", "answer": answer, "image_id": name}
        for i, (answer, name) in enumerate(zip(answers, frame["image_id"], strict=True))
    ]
    conditions = {"base": [], "mask": [ss.MaskKeys("image")]}
    named = [{**record, "image_id": i // 2} for i, record in enumerate(given)]
    got, want = (ss.compare(lvlm, data, conditions).estimates(draws=50) for data in (given, named))
    assert got["images"].tolist() == [6, 6]
    pd.testing.assert_frame_equal(got, want)


def test_what_is_missing_in_a_file_is_no_text(tmp_path):
    """Parquet and pandas write NaN: an answer was 'nan', and so was an image."""
    for i in range(2):
        PICTURES[i].save(tmp_path / f"{i}.png")
    lines = [
        {"image": f"{i}.png", "question": "what?", "answer": "red", "image_id": None, "task": None}
        for i in range(2)
    ]
    pd.DataFrame(lines).astype({"image_id": "float"}).to_parquet(tmp_path / "q.parquet")
    pd.DataFrame(lines).to_csv(tmp_path / "q.csv", index=False)
    for name in ("q.parquet", "q.csv"):
        items = as_items({**r, "task": "all"} for r in Questions(str(tmp_path / name)))
        assert len({item.image_id for item in items}) == 2
    lines[1]["answer"] = float("nan")
    pd.DataFrame(lines).to_parquet(tmp_path / "q.parquet")
    with pytest.raises(InputError, match=r"Record 1 of .*has no answer; expected"):
        list(Questions(str(tmp_path / "q.parquet")))

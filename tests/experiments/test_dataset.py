"""The sinks of a data set: the numbers of trace_sinks, in a folder that survives."""

import gc
import json
import multiprocessing
import os
import pickle
import signal
import sys
import time
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import sinkscope as ss
from sinkscope.errors import CheckpointError, InputError, InterventionError, NoEffectError
from sinkscope.experiments import DatasetTrace, EditSinks, statistics
from sinkscope.experiments.sink_edits import content_seed
from sinkscope.experiments.statistics import cluster_intervals
from sinkscope.files import held
from sinkscope.models.loading import identity_of, weights_digest
from sinkscope.scale import engine
from sinkscope.testing import random_image
from tests.experiments.dataset_job import L, V, records, run

ROOT = Path(__file__).parents[2]
RULES = {"v_detector": V, "l_detector": L}


@pytest.fixture
def lvlm(tiny):
    return tiny("llava-clip-llama")


@pytest.fixture
def traced(lvlm, tmp_path):
    """``traced(records, ...)``: traced into a folder of its own."""

    def make(data, folder="out", **options):
        return ss.trace_dataset(lvlm, data, tmp_path / folder, **{**RULES, "part": 2, **options})

    return make


def same(one, other, *leave):
    pd.testing.assert_frame_equal(
        one.sinks.drop(columns=[*leave]), other.sinks.drop(columns=[*leave])
    )
    drop = ["seconds", *leave]
    pd.testing.assert_frame_equal(one.images.drop(columns=drop), other.images.drop(columns=drop))


def plain(value):
    """What Arrow gives back, as the record had it."""
    if isinstance(value, np.ndarray):
        return tuple(plain(one) for one in value)
    if isinstance(value, dict):
        return tuple(plain(one) for one in value.values())
    if isinstance(value, (float, np.floating)) and value != value:
        return None
    return value.item() if isinstance(value, np.generic) else value


def without_nan(value):
    if isinstance(value, (tuple, list)):
        return tuple(without_nan(one) for one in value)
    return None if isinstance(value, float) and value != value else value


def test_lines_are_those_of_trace_sinks(lvlm, traced):
    given = [
        *records(3),
        {"image": [random_image(60, 90, 7), random_image(90, 60, 8)], "image_id": 9},
    ]
    given[3]["text"] = "how many red shapes are in the two pictures ?"
    found = traced(given)
    sinks, images = found.sinks, found.images
    assert found.finished
    assert len(images) == 4
    assert set(sinks["kind"]) == {"V", "L"}
    for number, record in enumerate(given):
        text = record.get("question", record.get("text"))
        several = isinstance(record["image"], list)
        shown = [record["image"]] if several else record["image"]
        sample = lvlm.prepare(images=shown, text=[text] if several else text)
        trace = ss.trace_sinks(lvlm, sample, V, L)
        lines = sinks[sinks["record"] == number].to_dict("records")
        assert len(lines) == len(trace.records) > 0
        for line, want in zip(lines, trace.records, strict=True):
            for name, value in asdict(want).items():
                if name == "batch":
                    continue
                came = plain(line[name])
                if name == "head":
                    came = None if came is None else (int(line["head_layer"]), int(came))
                assert came == without_nan(value), (name, number)
            x0, _, _, y1 = want.box or (0, 0, 0, 0)
            width, height = sample.images[0][max(0, want.image)].size
            if want.box:
                assert (line["x0"], line["y1"]) == pytest.approx((x0 / width, y1 / height))
        line, groups = images.iloc[number], trace.groups
        assert line["tokens"] == int(sample.tokens.live.sum())
        assert line["image_tokens"] == int((sample.tokens.image >= 0).sum())
        assert line["l_by_layer"].tolist() == trace.overlap_table()["L"].tolist()
        assert line["text_by_layer"].tolist() == trace.overlap_table()["text"].tolist()
        assert line["n_v"] == int(trace.v_sinks.sum())
        assert list(line["warnings"]) == list(trace.warnings)
        probe = ss.AttentionMass(groups)
        mass = lvlm.run(sample, [probe])[probe]
        for at, name in enumerate(("v", "l", "ordinary", "text_sinks", "text")):
            want, null = mass.by_layer()[:, at], mass.null_by_layer()[:, at]
            assert line[f"mass_{name}"] == pytest.approx(want.numpy(), abs=1e-6)
            assert line[f"null_{name}"] == pytest.approx(null.numpy(), abs=1e-6)
    assert images["widths"][3].tolist() == [90, 60] or images["widths"][3].tolist() == [60, 90]


def test_several_records_in_a_pass_give_the_same(traced):
    one, many = traced(records(5)), traced(records(5), "many", batch=3, part=4)
    for name in ("record", "kind", "pos", "llm_layers", "llm_birth", "vit_token", "word"):
        assert list(map(plain, one.sinks[name])) == list(map(plain, many.sinks[name])), name
    excess = one.sinks["excess"].to_numpy(), many.sinks["excess"].to_numpy()
    np.testing.assert_allclose(*excess, atol=1e-5)
    for name in ("l_by_layer", "v_by_block", "tokens", "warnings", "outcome_vision"):
        assert list(map(plain, one.images[name])) == list(map(plain, many.images[name])), name
    for name in ("agree_vision", "agree_language"):
        assert list(map(plain, one.images[name])) == list(map(plain, many.images[name])), name
    np.testing.assert_allclose(*(np.stack(x.images["mass_text"]) for x in (one, many)), atol=1e-5)


def test_outcomes_of_a_row_are_those_of_its_own_trace(lvlm):
    """A batch said nothing of a row without sinks where another row had one."""
    rule = ss.detectors.Norm("3sigma")
    asked = [(one["image"], one["question"]) for one in records(4)]
    alone = [ss.trace_sinks(lvlm, lvlm.prepare(images=a, text=b), rule) for a, b in asked]
    images, texts = map(list, zip(*asked, strict=True))
    trace = ss.trace_sinks(lvlm, lvlm.prepare(images=images, text=texts), rule)
    want = [one.outcomes for one in alone]
    assert trace.outcomes == {} or any(want)
    assert [trace.outcomes_of(row) for row in range(4)] == want
    assert any(want)


def test_killed_and_started_again_ends_as_if_undisturbed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    whole = run(tmp_path / "whole")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.experiments.dataset_job"])
    folder = tmp_path / "out"
    process = context.Process(target=run, args=(folder,))
    process.start()
    while process.is_alive() and len(list(folder.glob("part-*.json"))) < 3:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = DatasetTrace.load(folder)
    assert not left.finished
    assert 3 <= len(left.parts) < 12
    assert "not finished" in repr(left)
    stamps = {name: (folder / f"part-{name}.json").stat().st_mtime_ns for name in left.parts}
    again = run(folder)
    assert all((folder / f"part-{name}.json").stat().st_mtime_ns == t for name, t in stamps.items())
    assert again.finished
    same(again, whole)
    assert again.images["record"].tolist() == list(range(24))
    assert not list(folder.glob("*.writing"))


def test_what_is_there_is_not_traced_again_and_no_other_run_is(traced, monkeypatch, tmp_path):
    traced(records(4))
    module = sys.modules["sinkscope.experiments.dataset_part"]
    monkeypatch.setattr(module, "trace_sinks", lambda *_, **__: pytest.fail("traced again"))
    assert traced(records(4)).finished
    with pytest.raises(
        InputError, match=r'another trace of a data set(.|\n)*rules\.v: there "ZScore'
    ):
        traced(records(4), v_detector=ss.detectors.Norm(5.0))
    with pytest.raises(InputError, match="records 2 to 3 were others"):
        traced([*records(2), {**[*records(3)][2], "question": "red"}, *[*records(4)][3:]])
    with pytest.raises(InputError, match="data set of 1 parts and out="):
        traced(records(2))
    with pytest.raises(InputError, match="empty dataset"):
        traced([], "empty")


@pytest.mark.parametrize("name", ["sinks", "images", "part"])
def test_a_damaged_part_is_refused_and_made_again(traced, tmp_path, name):
    first = traced(records(4))
    file = sorted((tmp_path / "out").glob(f"{name}-*"))[1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"part-000001.*Delete part-000001"):
        DatasetTrace.load(tmp_path / "out")
    with pytest.raises(CheckpointError, match="Delete part-000001"):
        traced(records(4))
    (tmp_path / "out" / f"part-{first.parts[1]}.json").unlink()
    same(traced(records(4)), first)


def test_a_second_process_is_kept_out(traced, tmp_path):
    traced(records(2))
    with held(tmp_path / "out", "trace"), pytest.raises(InputError, match="runs now"):
        traced(records(2))


def pictures(folder, many=4):
    for i, one in enumerate(records(many)):
        place = folder / f"{i // 2}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        one["image"].save(place)
        yield {"image": str(place.relative_to(folder)), "question": "what is it", "n": i}


def test_folder_file_stream_and_generator_are_one(traced, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "data"
    lines = list(pictures(folder))
    (folder / ".hidden.png").write_bytes(b"none")
    (folder / "notes.txt").write_text("none")
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first = traced(folder, "folder", question="what is it")
    assert first.images["image_id"].tolist() == ["0/0.png", "0/1.png", "1/2.png", "1/3.png"]
    file = traced(folder / "all.jsonl", "file")
    assert file.images["n"].tolist() == [0, 1, 2, 3]
    same_sinks = [first, file]
    table = datasets.Dataset.from_list(
        [{**one, "image": str(folder / one["image"])} for one in lines]
    )
    table = table.cast_column("image", datasets.Image())
    same_sinks.append(traced(table, "table"))
    same_sinks.append(traced(table.to_iterable_dataset(), "stream"))
    opened = (Image.open(folder / one["image"]) for one in lines)
    same_sinks.append(traced(opened, "opened", question="what is it"))
    table.to_parquet(folder / "all.parquet")
    same_sinks.append(traced(folder / "all.parquet", "parquet"))
    for other in same_sinks[1:]:
        drop = ["image_id"]
        pd.testing.assert_frame_equal(
            first.sinks.drop(columns=drop), other.sinks.drop(columns=drop)
        )
    assert same_sinks[2].images["n"].tolist() == [0, 1, 2, 3]
    assert file.images["image_id"].tolist() == same_sinks[2].images["image_id"].tolist()


def test_a_photo_is_upright(traced, tmp_path):
    (tmp_path / "data").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    random_image(40, 80, 0).save(tmp_path / "data" / "a.JPG", exif=exif)
    sizes = random_image(40, 80, 0).size
    line = traced(tmp_path / "data", question="what is it").images.iloc[0]
    assert (line["heights"][0], line["widths"][0]) == sizes


@pytest.mark.parametrize("batch", [1, 2])
def test_a_broken_picture_stops_or_is_skipped_with_its_reason(traced, tmp_path, batch):
    folder = tmp_path / "data"
    list(pictures(folder, 5))
    (folder / "1" / "3.png").write_bytes(b"no picture")
    asked = {"question": "what is it", "batch": batch}
    with pytest.raises(InputError, match=r"Record 3 \(1/3.png\).*no readable image.*errors='skip'"):
        traced(folder, **asked)
    assert len(DatasetTrace.load(tmp_path / "out").parts) == 1
    found = traced(folder, errors="skip", **asked)
    assert found.finished
    problems = found.images["problem"]
    assert problems.notna().tolist() == [False, False, False, True, False]
    assert "no readable image" in problems[3]
    assert set(found.sinks["record"]) == {0, 1, 2, 4}
    assert "1 of 5 records could not be read" in found.summary()
    assert found.kinds()["mean"][0] == found.images["n_v"].dropna().mean()


def test_malformed_records_are_refused_by_number(lvlm, traced, tmp_path):
    good = next(records(1))
    for bad, said in (
        ({"picture": 1}, "Record 1 .*has no image"),
        ({**good, "question": 3}, "Record 1 has question=3"),
        ({**good, "question": " "}, "Record 1 has question=' '"),
        ({**good, "image": []}, "Record 1 has an empty list"),
        ({**good, "more": good["image"]}, "Record 1 has the column 'more'.*remove_columns"),
        ({**good, "tokens": 3}, "Record 1 has the column 'tokens'.*rename_column"),
        ({"image": good["image"]}, "Record 1 has no image_id"),
    ):
        with pytest.raises(InputError, match=said):
            traced([good, bad])
    found = traced([good, {"picture": 1}], "skipped", errors="skip")
    assert "has no image" in found.images["problem"][1]
    for data, said in (
        (3, "type int"),
        ("nowhere", "dataset='nowhere'"),
        (tmp_path / "skipped", "picture"),
    ):
        with pytest.raises(InputError, match=said):
            traced(data, "other")
    for options in ({"errors": "x"}, {"batch": 0}, {"part": 0}, {"question": 1}, {"control": 3}):
        with pytest.raises(InputError, match=f"Got (a )?{next(iter(options))}"):
            traced(records(2), "other", **options)
    bare = ss.LVLM(lvlm.module)
    with pytest.raises(InputError, match="without a processor"):
        ss.trace_dataset(bare, records(2), tmp_path / "other", errors="skip")
    assert not (tmp_path / "other").exists()


def test_nothing_found_is_told(traced):
    none = ss.detectors.NoSinks("planted: none")
    found = traced(records(3), v_detector=none, l_detector=none)
    assert found.sinks.empty
    assert set(found.images["outcome_language"]) == {"planted: none"}
    assert found.kinds()["share"].tolist() == [0, 0, 0, 0]
    for figure in (found.plot(), found.plot_places(), found.plot_agreement(), found.plot_lives()):
        assert figure.axes
        figure.draw_without_rendering()
    assert "0.00 per record" in found.summary()


class Counted:
    """How many pictures are alive at once."""

    def __init__(self):
        self.alive, self.most = [], 0

    def give(self, many):
        for one in records(many):
            self.alive.append(weakref.ref(one["image"]))
            gc.collect()
            self.most = max(self.most, sum(one() is not None for one in self.alive))
            yield one


def test_pictures_do_not_stay(traced):
    counted = Counted()
    traced(counted.give(16), part=2, masses=False)
    assert counted.most <= 5  # two parts of two, and the one that is given


def test_rules_agree_where_they_are_one(traced):
    massive = ss.detectors.ZScore(1.5)
    found = traced(records(4), v_detector=ss.detectors.Norm("valley"), l_detector=massive)
    table = found.agreement().set_index(["tower", "rule", "other"])
    assert (
        table.loc[("vision", "used", "norm"), "flagged"]
        == found.images["agree_vision"].str[0].sum()
    )
    shares = table["share"].to_numpy()
    assert ((shares >= 0) & (shares <= 1) | np.isnan(shares)).all()
    both = np.stack(found.images["agree_language"]).reshape(4, 4, 4)
    assert (both == both.transpose(0, 2, 1)).all()
    assert (both <= np.diagonal(both, axis1=1, axis2=2)[:, None]).all()


def test_agreement_is_what_detect_flags(lvlm, traced):
    one = next(records(1))
    rules = {"used": L, "norm": ss.detectors.Norm("valley"), "massive": ss.detectors.Massive()}
    rules["attention"] = ss.detectors.Received(times_null=5.0)
    sample = lvlm.prepare(images=one["image"], text=one["question"])
    for tower, used in (("language", L), ("vision", V)):
        layers = None if tower == "language" else list(lvlm.anatomy.reaching)
        found = ss.detectors.detect_all(
            lvlm, sample, {**rules, "used": used}, tower=tower, layers=layers
        )
        masks = [(one.mask & one.visual[:, None]).flatten() for one in found.values()]
        want = [[int((a & b).sum()) for b in masks] for a in masks]
        got = traced([one]).images[f"agree_{tower}"][0].reshape(4, 4).tolist()
        assert got == want
        assert want[0][0] > 0 or tower == "vision"


def test_places_are_areas(traced):
    found = traced(records(4))
    placed = found.sinks[found.sinks["x0"].notna()]
    places = found.places(5)
    for kind in ("V", "L"):
        own = placed[placed["kind"] == kind]
        assert places[kind].sum() == pytest.approx(len(own))
        want = np.zeros((5, 5))
        for _, s in own.iterrows():
            for row, column in np.ndindex(5, 5):
                w = min(s.x1, (column + 1) / 5) - max(s.x0, column / 5)
                h = min(s.y1, (row + 1) / 5) - max(s.y0, row / 5)
                want[row, column] += max(w, 0) * max(h, 0) / (s.x1 - s.x0) / (s.y1 - s.y0)
        np.testing.assert_allclose(places[kind], want, atol=1e-9)


def test_tables_are_means_and_lives_are_those_of_the_sinks(traced):
    found = traced(records(5))
    images, table = found.images, found.by_layer(draws=50)
    low = table[table["group"] == "L-sinks"]
    assert low["tokens"].to_numpy() == pytest.approx(np.stack(images["l_by_layer"]).mean(axis=0))
    text = table[table["group"] == "text"]
    assert text["mass"].to_numpy() == pytest.approx(np.stack(images["mass_text"]).mean(axis=0))
    assert ((table["low"] <= table["mass"] + 1e-6) & (table["mass"] <= table["high"] + 1e-6)).all()
    lives = found.lives()
    assert lives[~lives["again"]]["sinks"].sum() == len(found.sinks)
    stretches = found.sinks["llm_lives"].map(len).sum()
    assert lives.dropna(subset=["born"])["sinks"].sum() == stretches > 0
    for figure in (found.plot(), found.plot_places(), found.plot_agreement(), found.plot_lives()):
        figure.draw_without_rendering()


def test_a_pooled_control_is_the_control_of_every_image(lvlm, traced):
    edit = EditSinks("V-sinks")
    control = ss.RandomControl(edit, n=6, seed=3)
    found = traced(records(6), control=control)
    lines = found.dataset("control").to_table().to_pandas()
    reals, draws = [], []
    for line, one in zip(lines.to_dict("records"), records(6), strict=True):
        sample = lvlm.prepare(images=one["image"], text=one["question"])
        trace = ss.trace_sinks(lvlm, sample, V, L)
        assert line["state"] == ("edited" if trace.v_sinks.any() else "without")
        if line["state"] == "without":
            assert line["real"] == 0
            continue
        seed = content_seed(sample, 3)
        want = replace(control, intervention=edit(trace)[0], seed=seed).run(lvlm, trace)
        assert line["real"] == pytest.approx(float(want.real[0]), rel=1e-5)
        assert line["controls"] == pytest.approx(want.controls[:, 0].numpy(), rel=1e-5)
        reals.append(float(want.real[0]))
        draws.append(want.controls[:, 0].double().numpy())
    table, pooled = found.control(), np.mean(draws, axis=0)
    assert table["records"].tolist() == [len(reals), 6]
    assert table["without"].tolist() == [6 - len(reals)] * 2
    first = table.iloc[0]
    assert first["difference"] == pytest.approx(np.mean(reals) - pooled.mean(), rel=1e-5)
    far = np.abs(pooled - pooled.mean()) >= abs(np.mean(reals) - pooled.mean())
    assert first["p"] == (1 + far.sum()) / 7
    assert table["difference"][1] == pytest.approx(first["difference"] * len(reals) / 6)
    assert first["low"] <= first["difference"] <= first["high"]


def test_a_control_without_a_sink_in_the_whole_data_is_told(traced):
    control = ss.RandomControl(EditSinks("V-sinks"), n=2)
    none = ss.detectors.NoSinks("none")
    table = traced(records(2), control=control, v_detector=none).control()
    assert table["records"].tolist() == [0, 2]
    assert table["without"].tolist() == [2, 2]
    fixed = ss.RandomControl(ss.MaskKeys([5]))
    for wrong in ({"control": fixed}, {"control": control, "batch": 2}):
        with pytest.raises(InputError, match=r"Got (a )?control"):
            traced(records(2), "other", **wrong)


def test_a_control_of_a_function_of_a_trace(lvlm):
    one = next(records(1))
    trace = ss.trace_sinks(lvlm, lvlm.prepare(images=one["image"], text=one["question"]), V, L)
    edit = EditSinks("V-sinks")
    assert trace.v_sinks.any()
    plain = ss.RandomControl(edit(trace)[0], n=3).run(lvlm, trace)
    made = ss.RandomControl(edit, n=3).run(lvlm, trace)
    assert torch.equal(plain.controls, made.controls)
    assert torch.equal(plain.real, made.real)
    with pytest.raises(NoEffectError, match="nothing to edit"):
        ss.RandomControl(lambda trace: [], n=3).run(lvlm, trace)
    with pytest.raises(InterventionError, match="2 interventions for one trace"):
        ss.RandomControl(lambda trace: [*edit(trace)] * 2).draws(trace)


def test_every_part_goes_through_the_engine(traced, monkeypatch):
    """Parts come in any order, and work and parts can travel."""

    def backwards(lvlm, work, parts, engine):
        made = [(key, pickle.loads(pickle.dumps(part))) for key, part in parts]
        work = pickle.loads(pickle.dumps(work))
        yield from ((key, work(lvlm, part)) for key, part in reversed(made))

    first = traced(records(5))
    module = sys.modules["sinkscope.experiments.dataset"]
    assert module.each_part is engine.each_part
    monkeypatch.setattr(module, "each_part", backwards)
    same(traced(records(5), "other"), first)


def test_a_model_that_is_elsewhere_is_known_by_its_name():
    """Its weights are not here: their digest raised NotImplementedError."""
    lvlm = ss.LVLM.from_pretrained(str(ss.bundled.bundled_path()), remote=True)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        weights_digest(lvlm.module)
    assert identity_of(lvlm)["weights"] == f"{ss.bundled.bundled_path()}@unknown commit"


def test_the_nnsight_path_gives_the_same(traced):
    first, other = traced(records(2)), traced(records(2), "other", remote="local")
    for name in ("kind", "pos"):
        assert first.sinks[name].tolist() == other.sinks[name].tolist()
    np.testing.assert_allclose(first.sinks["excess"], other.sinks["excess"], atol=1e-6)


def test_ratios_of_sums_and_draws_in_blocks(monkeypatch):
    rng = np.random.default_rng(1)
    values, over = rng.random((40, 3)), rng.random((40, 3))
    over[:, 2] = 0
    clusters = [str(i // 2) for i in range(40)]
    whole = (
        cluster_intervals(values, clusters, draws=200),
        cluster_intervals(values, clusters, over=over),
    )
    monkeypatch.setattr(statistics, "BLOCK", 64)
    np.testing.assert_allclose(whole[0], cluster_intervals(values, clusters, draws=200))
    np.testing.assert_allclose(whole[1], cluster_intervals(values, clusters, over=over))
    assert whole[1][0, :2] == pytest.approx(values[:, :2].sum(0) / over[:, :2].sum(0))
    assert np.isnan(whole[1][:, 2]).all()
    picks = np.random.default_rng(0).integers(0, 20, size=(2000, 20))
    v, o = (x[:, 0].reshape(20, 2).sum(1)[picks].sum(1) for x in (values, over))
    assert whole[1][1:, 0] == pytest.approx(np.quantile(v / o, [0.025, 0.975]), abs=0.02)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "gemma3", "llava-dinov2-olmo2"])
def test_other_layouts(family, tiny, tmp_path):
    given = [
        *records(2),
        {"image": [random_image(70, 64, 1), random_image(120, 60, 2)], "image_id": 3},
    ]
    options = {"l_detector": L, "part": 2, "progress": False}
    one = ss.trace_dataset(tiny(family), given, tmp_path / "one", **options)
    two = ss.trace_dataset(tiny(family), given, tmp_path / "two", batch=2, **options)
    assert one.sinks["pos"].tolist() == two.sinks["pos"].tolist()
    masses = [np.stack(one.images[name]) for name in one.images if name.startswith("mass_")]
    np.testing.assert_allclose(sum(masses), 1.0, atol=1e-5)  # the groups are all tokens
    placed = one.sinks[one.sinks["x0"].notna()]
    assert placed[["x0", "y0", "x1", "y1"]].stack().between(0, 1 + 1e-6).all()
    assert (placed["x0"] < placed["x1"]).all()

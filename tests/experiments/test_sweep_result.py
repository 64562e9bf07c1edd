"""Maps, held-out best cells, nulls and words, on tables whose truth is known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import sinkscope as ss
from sinkscope.errors import InputError
from sinkscope.experiments import cluster_bootstrap, cluster_intervals, sign_flip_maximum
from sinkscope.viz import plot_sweep

GRID = ss.lsg_grid(5)
LAYERS = (-1, 0, 1)


def line_of(item, image, task, layer, pair, coefficients, counts, base, change):
    """One line of a table; coefficients and counts by group, L between V and the rest with triples."""
    names = ("v", "rest") if len(coefficients) == 2 else ("v", "l", "rest")
    return {
        "item": item,
        "image_id": image,
        "task": task,
        "layer": layer,
        "edited": layer + 1,
        "pair": pair,
        **{f"s_{name}": x for name, x in zip(names, coefficients, strict=True)},
        **{f"n_{name}": x for name, x in zip(names, counts, strict=True)},
        **dict.fromkeys(("score", "logprob"), base + change),
        **dict.fromkeys(("base_score", "base_logprob"), base),
    }


def sweep_of(lines, grid, score="logprob", notes=()):
    settings = {"score": score, "grid": [list(pair) for pair in grid], "notes": []}
    return ss.experiments.Sweep(pd.DataFrame(lines), settings, notes)


def made(effect=None, images=40, seed=0, n_v=3, score="logprob", tasks=("count", "shape")):
    """A sweep of noise; ``effect[task, layer, pair]`` is added to the changes of that cell."""
    rng, lines = np.random.default_rng(seed), []
    for item in range(2 * images):
        task, base = tasks[item % len(tasks)], rng.normal()
        for layer in LAYERS:
            for pair, cell in enumerate(GRID):
                change = rng.normal() + (effect or {}).get((task, layer, pair), 0.0)
                at = item, f"im{item // 2}", task, layer, pair, cell
                lines.append(line_of(*at, (n_v, 60), base, change))
    return sweep_of(lines, GRID, score, ("a note",))


def test_map_by_hand():
    sweep = made(images=6)
    line = sweep.map("all").iloc[7]  # layer 0, pair 2
    table = sweep.table[(sweep.table["layer"] == 0) & (sweep.table["pair"] == 2)]
    change = (table["score"] - table["base_score"]).tolist()
    mean, low, high = cluster_bootstrap(change, table["image_id"].tolist())
    assert (line["layer"], line["edited"], line["pair"]) == (0, 1, 2)
    assert (line["delta"], line["low"], line["high"]) == pytest.approx((mean, low, high))
    assert line["value"] == pytest.approx(table["score"].mean())
    assert line["base"] == pytest.approx(table["base_score"].mean())
    assert (line["n"], line["images"]) == (12, 6)
    assert line["clear"] == (low > 0 or high < 0)


def test_map_by_task_has_every_task_and_all():
    found = made().map()
    assert found["task"].unique().tolist() == ["count", "shape", "all"]
    assert len(found) == 3 * 3 * 5


def test_intervals_of_columns_equal_single_ones():
    rng = np.random.default_rng(3)
    values, names = rng.normal(size=(30, 4)), [f"c{i % 7}" for i in range(30)]
    joint = cluster_intervals(values, names, seed=5)
    for column in range(4):
        one = cluster_bootstrap(values[:, column].tolist(), names, seed=5)
        np.testing.assert_allclose(joint[:, column], one)
    assert np.isnan(cluster_intervals(values, ["a"] * 30)[1:]).all()


def test_sign_flips_equal_all_signs_written_out():
    """Six clusters have 64 signs: the null's distribution is known exactly."""
    rng = np.random.default_rng(0)
    values, names = rng.normal(size=(12, 3)), [i // 2 for i in range(12)]
    largest, null = sign_flip_maximum(values, names, draws=20000)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    sums = values.reshape(6, 2, 3).sum(axis=1)
    flipped = signs[:, :, None] * sums
    exact = (flipped.sum(axis=1) / np.sqrt((flipped**2).sum(axis=1))).max(axis=1)
    assert np.isclose(exact[:, None], null).any(axis=0).all()
    assert stats.ks_2samp(null, exact).statistic < 0.02
    assert largest == pytest.approx(exact[(signs == 1).all(axis=1)][0])
    assert np.abs(null).max() <= np.sqrt(6)


def test_the_studentised_maximum_orders_signs_as_students_t_does():
    """p by scipy's own t, recomputed for each of the 64 signs, is p by the fixed root."""
    rng = np.random.default_rng(4)
    values = rng.normal(size=(6, 3)) * [0.01, 1.0, 50.0] + [0.02, 0.0, -20.0]
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    students = stats.ttest_1samp(signs[:, :, None] * values, 0.0, axis=1).statistic.max(axis=1)
    ours = stats.ttest_1samp(values, 0.0).statistic.max()
    exact = (students >= ours - 1e-9).mean()
    largest, null = sign_flip_maximum(values, range(6), draws=20000)
    assert (null >= largest - 1e-9).mean() == pytest.approx(exact, abs=0.01)
    assert largest * np.sqrt(5 / (6 - largest**2)) == pytest.approx(ours)


def test_columns_without_a_change_count_as_zero():
    values = np.stack([np.zeros(8), -np.ones(8)], axis=1)
    largest, null = sign_flip_maximum(values, range(8), draws=50)
    assert largest == 0.0
    assert (null >= 0).all()


def one_task(changes, score="logprob", base=-2.0, grid=((0.0, 1.0), (1.0, 0.0)), n_v=3):
    """A sweep of one layer, one question per image; ``changes[image][pair]``."""
    lines = [
        line_of(item, str(item), "one", 0, pair, grid[pair], (n_v, 60), base, change)
        for item, row in enumerate(changes)
        for pair, change in enumerate(row)
    ]
    return sweep_of(lines, grid, score)


def test_a_harmful_cell_does_not_hide_a_certain_gain():
    """Flipped signs made of its large losses large gains: p was 0.33 beside it, and 0.0005 alone."""
    rng = np.random.default_rng(0)
    gain, harm = rng.normal(0.3, 0.05, 60), rng.normal(-5.0, 0.5, 60)
    both = one_task(np.stack([gain, harm], axis=1)).best()
    alone = one_task(gain[:, None]).best()
    assert both["p"][0] == alone["p"][0] == 1 / 2001
    assert both["pair"][0] == 0
    assert both["maximum"][0] == pytest.approx(gain.mean())
    points = [[float(i % 10 == 7), -float(i % 10 < 7)] for i in range(100)]
    assert one_task(points, "exact", 0.0).best()["p"][0] < 0.01


def test_p_counts_the_draws_that_reach_t_and_the_real_one():
    """Chance cannot make p 0, and where nothing changes every draw reaches the real maximum."""
    sure = one_task([[1.0, 0.5]] * 30).best(draws=9)
    assert sure["p"][0] == pytest.approx(1 / 10)
    nothing = one_task([[0.0, 0.0]] * 30, grid=((0.5, 0.5), (0.2, 0.8))).best(draws=9)
    assert nothing["p"][0] == 1.0
    assert nothing["t"][0] == 0.0


def test_p_values_are_uniform_where_nothing_has_an_effect():
    """Over repeated noise p <= 0.1 must come about one time in ten, maxima over 15 cells included."""
    ps = [
        made(seed=s, images=20, tasks=("one",)).best("all", draws=200)["p"][0] for s in range(120)
    ]
    assert 0.03 < np.mean(np.array(ps) <= 0.1) < 0.19
    assert stats.kstest(ps, "uniform").pvalue > 0.01


def sweep_map(sweep, task):
    found = sweep.map()
    return found[found["task"] == task]


def test_best_finds_a_planted_cell_on_other_images():
    best = made({("count", 1, 3): 1.5}).best().set_index("task")
    hit, miss = best.loc["count"], best.loc["shape"]
    assert (hit["layer"], hit["edited"], hit["pair"]) == (1, 2, 3)
    assert (hit["s_v"], hit["s_rest"]) == GRID[3]
    assert hit["low"] > 0
    assert hit["p"] < 0.01
    assert hit["t"] > hit["t_95"]
    assert miss["t"] < miss["t_95"]
    cells = sweep_map(made({("count", 1, 3): 1.5}), "count")
    assert hit["maximum"] == pytest.approx(cells["delta"].max())
    assert miss["p"] > 0.05
    assert hit["images"] == 20


def test_choosing_and_scoring_use_other_images():
    """On noise the chosen cell looks good where it was chosen, and like nothing elsewhere."""
    found = [made(seed=s, images=16, tasks=("one",)).best("all", draws=50) for s in range(40)]
    chosen, held = (np.mean([f[c][0] for f in found]) for c in ("chosen_on", "delta"))
    assert chosen > 0.3
    assert abs(held) < 0.1


def test_a_task_with_one_image_has_no_best_cell_and_spoils_no_other():
    sweep = made({("count", 1, 3): 3.0}, images=20)
    rare = sweep.table["item"] == 1
    sweep.table.loc[rare, "task"] = "rare"
    best = sweep.best().set_index("task")
    assert best.loc["count", "p"] < 0.01
    line = best.loc["rare"]
    assert line[["layer", "pair", "delta", "p", "t"]].isna().all()
    assert (line["n"], line["images"]) == (0, 0)
    assert "images of one half only" in line["note"]
    assert best.loc["count", "note"] == ""
    assert "rare: cells from" in sweep.observations()
    assert "no best cell: images of one half only" in sweep.observations()
    alone = made(images=1).best()
    assert alone["p"].isna().all()


@pytest.mark.parametrize("images", [2, 3, 4, 5])
def test_small_tasks_are_halved_by_their_own_images(images):
    """Halves of all images could fall so that a task had none in one of them."""
    for seed in range(5):
        sweep = made(images=24)
        few = sweep.table["image_id"].isin([f"im{i}" for i in range(images)])
        sweep.table.loc[few, "task"] = "few"
        assert sweep.best(seed=seed, draws=5).set_index("task").loc["few", "images"] == images // 2


def test_cells_that_scale_no_key_are_never_the_best():
    """(0, 1) without V-sinks is the model itself: beside losses its change of 0 was the largest."""
    rng = np.random.default_rng(0)
    losses = np.stack([np.zeros(20), rng.normal(-1.0, 0.1, 20)], axis=1)
    best = one_task(losses, grid=((0.0, 1.0), (0.5, 0.5)), n_v=0).best().iloc[0]
    assert best["pair"] == 1
    assert best["maximum"] < 0
    assert best["p"] == 1.0
    assert best["note"] == "no cell gains where it was chosen"
    said = one_task(losses, grid=((0.0, 1.0), (0.5, 0.5)), n_v=0).observations()
    assert "Mind that no cell gains where it was chosen." in said
    with_sinks = one_task(losses, grid=((0.0, 1.0), (0.5, 0.5)), n_v=3).best()
    assert with_sinks["pair"][0] == 0
    nothing = one_task([[0.0]] * 20, grid=((0.0, 1.0),), n_v=0).best()
    assert "no cell scales a key" in nothing["note"][0]
    assert nothing["p"].isna().all()


def test_observations_tell_what_was_planted():
    effect = {("count", 1, pair): 2.0 for pair in (3, 4)}
    effect |= {("count", 1, pair): -2.0 for pair in (0, 1)}
    said = made(effect).observations()
    assert "1 of 2 tasks gain on held-out images, in 1 different cell." in said
    assert "clearly gains in layer 1," in said
    assert "clearly above 0 in 1 and clearly below 0 in 0 of 3 layers" in said
    assert "which of them it was cannot be told apart" in said
    assert "Note: a note." in said


def test_one_image_in_a_half_has_no_interval_and_one_layer_is_singular():
    few = made(images=2, tasks=("one",))
    said = ss.experiments.Sweep(few.table[few.table["layer"] == 1], few.settings).observations()
    assert "(too few images for an interval); maximum over" in said
    assert "nan" not in said
    assert ", 2 images, 1 layer x " in said


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ("logprob", "change of logprob against the base in nats."),
        ("my.module.surprise", "change of surprise against the base."),
    ],
)
def test_observations_name_the_score_and_its_unit(score, words):
    sweep = made({("count", 1, 3): 3.0}, score=score)
    said = sweep.observations()
    assert words in said
    assert "maximum over all cells p < 0.001" in said
    assert "p = 0.000" not in said
    assert ("surprise" in sweep.score_text("score")) == (score != "logprob")
    assert "my.module" not in sweep.score_text("score")


def test_observations_state_null_results():
    said = made(n_v=0, score="exact").observations()
    assert "No task gains on images that were not used to choose" in said
    assert "no image has a V-sink, so s_V never applied" in said
    assert "in points" in said
    one = made(tasks=("one",))
    assert "One task only: this sweep cannot tell" in one.observations()
    level = made()
    level.table["s_v"] = level.table["s_rest"]
    assert "no pairs on both sides of s_V = s_rest" in level.observations()


def test_names_are_checked():
    sweep = made(images=4)
    with pytest.raises(InputError, match="by='image'"):
        sweep.map("image")
    with pytest.raises(InputError, match="column='accuracy'"):
        sweep.map(column="accuracy")
    with pytest.raises(InputError, match=r"expected one of \('score', 'logprob'\)"):
        sweep.best(column="n_v")


def test_a_table_with_numbers_that_are_none_is_refused():
    sweep = made(images=4)
    sweep.table.loc[7, "score"] = float("nan")
    with pytest.raises(
        InputError, match=r"1 changes of score .* item 0 at layer 0, pair \(0.5, 0.5"
    ):
        sweep.best()


def test_base_is_counted_once_per_question():
    base = made(images=5).base().set_index("task")
    assert base.loc["all", "n"] == 10
    assert base.loc["count", "n"] == 5
    assert base.loc["all", "with_v"] == 1.0


def test_observation_3_looks_at_questions_with_v_sinks_only():
    """Questions without one say nothing of s_V, and would water the contrast down."""
    sweep = made(images=12, tasks=("one",))
    table, with_v = sweep.table, sweep.table["item"] < 12
    above = np.sign(table["s_v"] - table["s_rest"])
    table["score"] = table["base_score"] + np.where(with_v, 1.0, -3.0) * above
    table.loc[~with_v, "n_v"] = 0
    said = sweep.observations()
    assert "50% of the questions are about images with V-sinks" in said
    assert "minus those with s_V < s_rest: +2.00 [+2.00, +2.00] over all layers" in said


def test_figure_shows_every_task_and_marks_clear_cells():
    sweep = made({("count", 1, 3): 3.0})
    figure = sweep.plot()
    panels = [ax for ax in figure.axes if ax.images]
    found = sweep.map()
    assert [ax.get_title(loc="left").split(":")[0] for ax in panels] == ["count", "shape", "all"]
    for ax, task in zip(panels, ("count", "shape", "all"), strict=True):
        part = found[found["task"] == task]
        shown = ax.images[0].get_array()
        np.testing.assert_allclose(shown, part["delta"].to_numpy().reshape(3, 5))
        x, y = ax.lines[0].get_data()
        marked = {(LAYERS[int(j)], int(i)) for i, j in zip(x, y, strict=True)}
        clear = part[part["clear"]]
        assert marked == set(zip(clear["layer"], clear["pair"], strict=True))
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["embed", "0", "1"]
    assert "nats" in figure.get_suptitle()
    points = made(score="exact").plot()
    shown = points.axes[0].images[0].get_array()
    first = made(score="exact").map().iloc[0]["delta"]
    assert shown[0, 0] == pytest.approx(100 * first)
    with pytest.raises(InputError, match=r"expected that of sweep.map\(\)"):
        plot_sweep(found.drop(columns="clear"))


def test_titles_of_long_tasks_stay_in_their_panels():
    names = ("fine-grained perception", "instance reasoning", "science & technology", "logic")
    sweep = made(images=8, tasks=names, score="exact")
    found = sweep.map()
    for pairs in (found, found[found["pair"] < 3]):
        figure = plot_sweep(pairs)
        figure.draw_without_rendering()
        panels = [ax for ax in figure.axes if ax.images]
        boxes = [ax.get_window_extent() for ax in panels]
        titles = [ax._left_title.get_window_extent() for ax in panels]
        words = [ax.get_title(loc="left").replace("\n", " ") for ax in panels]
        assert words[0].startswith("fine-grained perception: base\N{NO-BREAK SPACE}")
        for title, box in zip(titles, boxes, strict=True):
            assert title.x1 <= box.x1 + 20
            assert not any(title.overlaps(other) for other in boxes)
            assert sum(title.overlaps(other) for other in titles) == 1
        assert figure.bbox.y1 > max(title.y1 for title in titles)


def test_repr_counts():
    assert repr(made(images=5)).startswith("Sweep(10 questions, 5 images, 3 layers x 5 pairs")

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


def made(effect=None, images=40, seed=0, n_v=3, score="logprob", tasks=("count", "shape")):
    """A sweep of noise; ``effect[task, layer, pair]`` is added to the changes of that cell."""
    rng, lines = np.random.default_rng(seed), []
    for item in range(2 * images):
        task, bases = tasks[item % len(tasks)], rng.normal()
        for layer in LAYERS:
            for pair, (v, rest) in enumerate(GRID):
                change = rng.normal() + (effect or {}).get((task, layer, pair), 0.0)
                lines.append(
                    {
                        "item": item,
                        "image_id": f"im{item // 2}",
                        "task": task,
                        "layer": layer,
                        "edited": layer + 1,
                        "pair": pair,
                        "s_v": v,
                        "s_rest": rest,
                        "score": bases + change,
                        "base_score": bases,
                        "logprob": bases + change,
                        "base_logprob": bases,
                        "n_v": n_v,
                        "n_rest": 60,
                    }
                )
    settings = {"score": score, "grid": [list(p) for p in GRID], "notes": []}
    return ss.Sweep(pd.DataFrame(lines), settings, ("a note",))


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
    maximum, null = sign_flip_maximum(values, names, draws=20000)
    assert maximum == pytest.approx(values.mean(axis=0).max())
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    exact = (np.repeat(signs, 2, axis=1) @ values / 12).max(axis=1)
    assert stats.ks_2samp(null, exact).statistic < 0.02


def test_p_values_are_uniform_where_nothing_has_an_effect():
    """Over repeated noise p <= 0.1 must come about one time in ten, maxima over 15 cells included."""
    ps = [
        made(seed=s, images=20, tasks=("one",)).best("all", draws=200)["p"][0] for s in range(120)
    ]
    assert 0.03 < np.mean(np.array(ps) <= 0.1) < 0.19
    assert stats.kstest(ps, "uniform").pvalue > 0.01


def test_best_finds_a_planted_cell_on_other_images():
    best = made({("count", 1, 3): 1.5}).best().set_index("task")
    hit, miss = best.loc["count"], best.loc["shape"]
    assert (hit["layer"], hit["edited"], hit["pair"]) == (1, 2, 3)
    assert (hit["s_v"], hit["s_rest"]) == GRID[3]
    assert hit["low"] > 0
    assert hit["p"] < 0.01
    assert hit["maximum"] > hit["null_95"]
    assert miss["p"] > 0.05
    assert hit["images"] == 20


def test_choosing_and_scoring_use_other_images():
    """On noise the chosen cell looks good where it was chosen, and like nothing elsewhere."""
    found = [made(seed=s, images=16, tasks=("one",)).best("all", draws=50) for s in range(40)]
    chosen, held = (np.mean([f[c][0] for f in found]) for c in ("chosen_on", "delta"))
    assert chosen > 0.3
    assert abs(held) < 0.1


def test_one_image_has_no_two_halves():
    with pytest.raises(InputError, match="all in one half"):
        made(images=1).best()


def test_observations_tell_what_was_planted():
    effect = {("count", 1, pair): 2.0 for pair in (3, 4)}
    effect |= {("count", 1, pair): -2.0 for pair in (0, 1)}
    said = made(effect).observations()
    assert "1 of 2 tasks gain on held-out images, in 1 different cell." in said
    assert "clearly gains in layer 1," in said
    assert "clearly above 0 in 1 and clearly below 0 in 0 of 3 layers" in said
    assert "which of the two it was cannot be told apart" in said
    assert "Note: a note." in said


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
    with pytest.raises(InputError, match="expected 'score' or 'logprob'"):
        sweep.best(column="n_v")


def test_a_table_with_numbers_that_are_none_is_refused():
    sweep = made(images=4)
    sweep.table.loc[7, "score"] = float("nan")
    with pytest.raises(InputError, match=r"1 changes of score .* item 0 at layer 0, pair \(0.5, 0.5"):
        sweep.best()


def test_base_is_counted_once_per_question():
    base = made(images=5).base().set_index("task")
    assert base.loc["all", "n"] == 10
    assert base.loc["count", "n"] == 5
    assert base.loc["all", "with_v"] == 1.0


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


def test_repr_counts():
    assert repr(made(images=5)).startswith("Sweep(10 questions, 5 images, 3 layers x 5 pairs")

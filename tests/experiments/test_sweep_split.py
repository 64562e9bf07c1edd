"""What a sweep with three groups says: maps, best cells, words and triangles, where the truth is known."""

import numpy as np
import pandas as pd
import pytest

import sinkscope as ss
from sinkscope.experiments import cluster_bootstrap
from sinkscope.viz import plot_sweep
from tests.experiments.test_sweep_result import line_of, sweep_of

GRID = ss.lsg_grid(5, groups=3)
LAYERS = (-1, 0, 1)


def made(effect=lambda line: 0.0, images=40, seed=0, n_v=3, n_l=(0, 2, 2), grid=GRID, spread=1.0):
    """A sweep of noise; ``effect(line)`` is added to the change of a line."""
    rng, lines = np.random.default_rng(seed), []
    for item in range(2 * images):
        base = rng.normal()
        for at, layer in enumerate(LAYERS):
            for pair, triple in enumerate(grid):
                place = item, f"im{item // 2}", ("count", "shape")[item % 2], layer, pair, triple
                counts, noise = (n_v, n_l[at], 60 - n_v - n_l[at]), spread * rng.normal()
                more = effect(line_of(*place, counts, base, 0.0))
                lines.append(line_of(*place, counts, base, noise + more))
    return sweep_of(lines, grid)


def test_map_and_best_say_which_triple():
    sweep = made(lambda line: 1.5 * ((line["layer"], line["pair"]) == (1, 7)))
    found = sweep.map("all")
    assert list(found)[:7] == ["task", "layer", "edited", "pair", "s_v", "s_l", "s_rest"]
    line = found[(found["layer"] == 1) & (found["pair"] == 7)].iloc[0]
    table = sweep.table[(sweep.table["layer"] == 1) & (sweep.table["pair"] == 7)]
    change = (table["score"] - table["base_score"]).tolist()
    mean, low, high = cluster_bootstrap(change, table["image_id"].tolist())
    assert (line["delta"], line["low"], line["high"]) == pytest.approx((mean, low, high))
    assert tuple(line[["s_v", "s_l", "s_rest"]]) == GRID[7]
    best = sweep.best("all").iloc[0]
    assert (best["layer"], best["pair"]) == (1, 7)
    assert tuple(best[["s_v", "s_l", "s_rest"]]) == GRID[7]
    assert best["p"] < 0.01
    assert sweep.base().set_index("task").loc["all", ["with_v", "with_l"]].tolist() == [1.0, 1.0]
    assert repr(sweep).startswith("Sweep(80 questions, 40 images, 3 layers x 15 triples")


def test_a_triple_acts_where_one_of_its_groups_has_tokens():
    """(1, 0.5, 1) scales L-sinks only, so it is the model itself where there is none."""
    gain = lambda line: 1.0 if line["layer"] == 1 else 3.0  # noqa: E731
    grid = [(1.0, 0.5, 1.0)]
    best = made(gain, grid=grid, n_l=(0, 0, 2)).best("all").iloc[0]
    assert best["layer"] == 1
    nothing = made(gain, grid=grid, n_l=(0, 0, 0)).best("all").iloc[0]
    assert "no cell scales a key" in nothing["note"]
    assert nothing[["s_v", "s_l", "s_rest"]].isna().all()


def test_splitting_the_rest_by_hand():
    """Where s_L counts and s_rest does not, a coefficient for L-sinks is worth its difference."""

    def effect(line):
        return 4.0 * line["s_l"] * (line["n_l"] > 0)

    said = made(effect, spread=0.0).observations()
    best = "best on one half layer 0, (0, 1, 0), on the other +4.00"
    whole = "best with s_L = s_rest layer 0, (0, 0.5, 0.5), +2.00"
    for task in ("count", "shape", "all"):
        assert f"   {task}: {best}; {whole}; difference +2.00 [+2.00, +2.00]." in said
    # triples with s_L > s_rest against their mirror images, by hand
    above = np.mean([4 * low for _, low, rest in GRID if low > rest])
    below = np.mean([4 * low for _, low, rest in GRID if low < rest])
    assert (
        "100% of the questions have L-sinks at some layer. Mean of triples with s_L > s_rest minus those "
        f"with s_L < s_rest: {above - below:+.2f}"
    ) in said
    assert "over those layers; clearly above 0 in 2 and clearly below 0 in 0 of 2 layers" in said
    assert "In every triple the coefficients add to 1: what raises one lowers the others" in said
    assert "is not on this grid" not in said


def test_noise_gains_nothing_from_splitting():
    """On noise the best of 45 beats the best of 9 where they are chosen, and not on other images."""
    from sinkscope.experiments.findings import split_of

    found = [split_of(made(seed=s, images=12).table, seed=0) for s in range(40)]
    assert abs(np.mean([one["difference"][0] for one in found])) < 0.15
    covered = [one["difference"][1] <= 0 <= one["difference"][2] for one in found]
    assert np.mean(covered) > 0.8


def test_what_cannot_be_told_is_said():
    said = made(n_v=0).observations()
    assert "no image has a V-sink, so s_V never applied and the other coefficients" in said
    assert "have L-sinks at some layer" in said
    said = made(n_l=(0, 0, 0)).observations()
    assert "no image token is an L-sink at these layers, so s_L never applied" in said
    assert "all: cannot tell; no image token is an L-sink at these layers." in said
    grid = [(0.2, 0.1, 0.7), (0.2, 0.7, 0.1), (0.7, 0.1, 0.2), (0.1, 0.7, 0.2)]
    assert (
        "all: cannot tell; the grid has no triple with s_L = s_rest."
        in made(grid=grid).observations()
    )
    free = made(grid=[(1.0, 0.5, 1.0), (1.0, 2.0, 1.0), (1.0, 1.0, 1.0001)]).observations()
    assert "it has no triples on both sides of s_V = s_rest" in free
    assert "add to 1" not in free
    assert "cannot tell; images of one half only" in made(images=1).observations()


def test_l_contrasts_count_questions_with_l_sinks_only():
    """A question without one says nothing of s_L."""
    sweep = made(spread=0.0)
    table = sweep.table
    without = table["item"] < 40
    sign = np.sign(table["s_l"] - table["s_rest"])
    table["score"] = table["base_score"] + np.where(without, -9.0, 1.0) * sign
    table.loc[without, "n_l"] = 0
    said = sweep.observations()
    assert "50% of the questions have L-sinks at some layer" in said
    assert "with s_L < s_rest: +2.00 [+2.00, +2.00] over those layers" in said


def panels(figure):
    return [ax for ax in figure.axes if ax.collections and ax.texts]


def test_triangles_have_every_triple_in_its_place():
    sweep = made(lambda line: 3.0 * (line["s_v"] == 1) * (line["layer"] == 0))
    found, figure = sweep.map(), sweep.plot()
    axes = panels(figure)
    assert len(axes) == 3 * 3
    names = [ax.texts[0].get_text() for ax in axes]
    assert names == ["embed", "0", "1"] * 3
    heads = [ax.get_title(loc="left").split(":")[0] for ax in axes[::3]]
    assert heads == ["count", "shape", "all"]
    for number, ax in enumerate(axes):
        task, layer = heads[number // 3], LAYERS[number % 3]
        own = found[(found["task"] == task) & (found["layer"] == layer)].sort_values("pair")
        (cells,) = ax.collections
        np.testing.assert_allclose(cells.get_array(), own["delta"])
        centres = np.array([path.vertices[:6].mean(axis=0) for path in cells.get_paths()])
        by_hand = [(v / 2 + rest, v * 3**0.5 / 2) for v, _, rest in GRID]
        np.testing.assert_allclose(centres, by_hand, atol=1e-12)
        x, y = ax.lines[0].get_data()
        marked = np.stack([x, y], axis=1)
        np.testing.assert_allclose(marked, np.array(by_hand)[own["clear"]], atol=1e-12)
    corners = {text.get_text(): text.xy for text in axes[0].texts[1:]}
    assert corners["V"][1] > corners["L"][1] == corners["rest"][1]
    assert corners["L"][0] < corners["V"][0] < corners["rest"][0]
    assert "nats" in figure.get_suptitle()


def test_triangles_stay_apart_and_inside_the_figure():
    """Ten layers and three rows of them: no panel lies in another."""
    rows = [made(images=2).table.assign(layer=layer) for layer in range(10)]
    table = pd.concat([part[part["edited"] == 1].assign(edited=i) for i, part in enumerate(rows)])
    settings = {"score": "exact", "grid": [list(t) for t in GRID], "notes": []}
    figure = ss.experiments.Sweep(table, settings).plot()
    figure.draw_without_rendering()
    boxes = [ax.get_window_extent() for ax in panels(figure)]
    assert len(boxes) == 30
    assert sum(a.overlaps(b) for a in boxes for b in boxes) == 30
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_other_triples_stand_side_by_side():
    grid = [(1.0, 0.5, 1.0), (0.5, 1.0, 1.0), (1.0, 1.0, 0.5)]
    sweep = made(grid=grid, images=6)
    figure = plot_sweep(sweep.map(), score="nats")
    axes = [ax for ax in figure.axes if ax.images]
    labels = [text.get_text() for text in axes[0].get_xticklabels()]
    assert labels == ["1/0.5/1", "0.5/1/1", "1/1/0.5"]
    assert axes[0].get_xlabel() == "s_V / s_L / s_rest"
    shown = axes[-1].images[0].get_array()
    np.testing.assert_allclose(shown, sweep.map("all")["delta"].to_numpy().reshape(3, 3))

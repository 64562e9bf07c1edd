"""Figures and tables of what edits did: they show the numbers of the summary, and what is missing."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import sinkscope as ss
from sinkscope.errors import InputError, SelectionError
from sinkscope.experiments import Comparison, ControlResult
from sinkscope.viz import effects_text, plot_control, plot_effects
from tests.viz.conftest import one_line, texts

RIGHT = {"mask V-sinks": 0.4, "mask random, as many": 0.8, "mask L-sinks": 0.9, "base": 0.9}


def comparison(images=30, tasks=("count", "colour")):
    """Answers that a mask of V-sinks makes wrong; there are no L-sinks."""
    rng = np.random.default_rng(0)
    lines = []
    for item in range(images * len(tasks)):
        task, luck = tasks[item % len(tasks)], rng.random()
        one = {"item": item, "image_id": str(item // len(tasks)), "task": task}
        for condition in ("base", "mask V-sinks", "mask random, as many", "mask L-sinks"):
            right, touched = luck < RIGHT[condition], condition not in ("base", "mask L-sinks")
            lines.append({**one, "condition": condition, "correct": right, "touched": touched})
    return Comparison(pd.DataFrame(lines), "base")


@pytest.fixture(scope="module")
def summary():
    return comparison().estimates()


def points(ax):
    """Height of a condition -> its point, where it lies, and the ends of its interval."""
    dots = {li.get_ydata()[0]: li for li in ax.lines if li.get_marker() in ("o", "s", "|")}
    bars = [li for li in ax.lines if len(li.get_xdata()) == 2 and len(set(li.get_ydata())) == 1]
    ends = {li.get_ydata()[0]: tuple(li.get_xdata()) for li in bars}
    return {y: (dot, dot.get_xdata()[0], ends[y]) for y, dot in dots.items()}


def test_points_and_intervals_are_those_of_the_summary(summary) -> None:
    figure = plot_effects(summary)
    names = texts(figure.axes[0].get_yticklabels())
    assert names == ["mask V-sinks", "mask random, as many", "mask L-sinks"]
    for ax, task in zip(figure.axes, ("all", "count", "colour"), strict=True):
        lines = summary[summary["task"] == task].set_index("condition")
        shown = points(ax)
        assert set(shown) == {0, 1}, "nothing was touched in the third"
        for place, name in enumerate(names[:2]):
            (dot, x, ends), line = shown[place], lines.loc[name]
            assert x == pytest.approx(100 * line["delta"])
            assert ends == pytest.approx((100 * line["delta_low"], 100 * line["delta_high"]))
            clear = line["delta_low"] > 0 or line["delta_high"] < 0
            assert (dot.get_markerfacecolor() != "white") == clear
        real, control = shown[0][0], shown[1][0]
        assert real.get_color() != control.get_color()
        assert real.get_marker() != control.get_marker()
        assert [t.strip() for t in texts(ax.texts)] == ["none found"]
        head = f"{task}\n{lines.loc['base', 'accuracy']:.0%}, n = "
        assert ax.get_title(loc="left").startswith(head)
        assert "points" in ax.get_xlabel()
    assert "percentage points" in figure.get_suptitle()
    low, high = figure.axes[0].get_xlim()
    assert low == -high
    assert high >= 100 * summary[["delta_low", "delta_high"]].abs().max().max()


def test_controls_of_what_was_not_found_are_left_out() -> None:
    made = comparison()
    made.table.loc[made.table["condition"].str.contains("random"), "touched"] = False
    summary = Comparison(made.table, "base").estimates(draws=50)
    names = texts(plot_effects(summary).axes[0].get_yticklabels())
    assert names == ["mask V-sinks", "mask L-sinks"]
    assert "random" not in effects_text(summary)


def test_tasks_and_base_can_be_chosen(summary) -> None:
    figure = plot_effects(summary, tasks=["colour"], base="base")
    assert len([ax for ax in figure.axes if ax.get_visible()]) == 1
    many = comparison(tasks=tuple("abcdefgh")).estimates(draws=50)
    assert len([ax for ax in plot_effects(many).axes if ax.get_visible()]) == 9
    for given in ({"tasks": ["shape"]}, {"base": "nothing"}, {"tasks": []}):
        for show in (plot_effects, effects_text):
            with pytest.raises(SelectionError, match="expected some of"):
                show(summary, **given)


@pytest.mark.parametrize("show", [plot_effects, effects_text])
def test_other_tables_are_refused(show, summary) -> None:
    with pytest.raises(InputError, match="lacks"):
        show(summary.drop(columns="delta"))
    with pytest.raises(InputError, match="lacks"):
        show(summary.iloc[:0])
    with pytest.raises(InputError, match="second condition"):
        show(summary[summary["condition"] == "base"])


def test_one_image_has_no_interval() -> None:
    one = comparison(images=1).estimates()
    assert np.isnan(one["delta_low"]).all()
    plot_effects(one).canvas.draw()
    text = effects_text(one)
    assert "nan" not in text
    assert "*" not in text.split("\n\n")[0]


def test_text_has_every_number(summary) -> None:
    text = effects_text(summary)
    lines = summary.set_index(["task", "condition"])
    masked = next(line for line in text.splitlines() if line.startswith("mask V-sinks"))
    for task in ("all", "count", "colour"):
        line = lines.loc[(task, "mask V-sinks")]
        assert f"{100 * line['delta']:+.0f} [" in masked
        assert f"{task} (n = {line['n']:.0f})" in text
    assert masked.count("*") == 3
    assert "none found, so nothing was edited: mask L-sinks" in text
    assert max(len(line) for line in text.splitlines()) <= 110


@pytest.mark.parametrize(("many", "width"), [(9, 110), (3, 70)])
def test_text_of_many_tasks_is_cut_into_blocks(many, width) -> None:
    tasks = tuple(f"a name of task {i}" for i in range(many))
    text = effects_text(comparison(tasks=tasks).estimates(draws=50), width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert text.count("\nbase") > 1
    assert all(task in text for task in tasks)


def test_a_task_without_such_tokens_says_so() -> None:
    made = comparison()
    table = made.table
    table.loc[table["task"] == "count", "touched"] = False
    masked = next(
        line
        for line in effects_text(Comparison(table, "base").estimates()).splitlines()
        if line.startswith("mask V-sinks")
    )
    assert masked.count("none found") == 1


@pytest.fixture
def control():
    scores = torch.linspace(0.0, 0.2, 20)[:, None].repeat(1, 2)
    return ControlResult(torch.tensor([0.5, 0.1]), scores, torch.zeros(2), "count", "KL (nats)")


def test_control_figure_shows_the_edit_over_its_controls(control) -> None:
    ax = plot_control(control).axes[0]
    assert sum(patch.get_height() for patch in ax.patches if patch.get_height() >= 1) == 20
    lines = {li.get_label(): li.get_xdata()[0] for li in ax.lines}
    assert lines["the edit, p = 0.048"] == pytest.approx(0.5)
    assert lines["without an edit"] == 0
    assert ax.get_xlabel() == "KL (nats)"
    assert "number" in ax.get_ylabel()
    legend = texts(ax.get_legend().get_texts())
    assert "20 random controls (same count)" in legend
    own = control.plot(1).axes[0]
    assert float(own.lines[0].get_xdata()[0]) == pytest.approx(0.1)
    assert plot_control(control, label="mine").axes[0].get_xlabel() == "mine"


def test_control_figure_of_equal_scores(control) -> None:
    same = ControlResult(torch.zeros(1), torch.zeros(1, 1), torch.zeros(1), "position")
    plot_control(same).canvas.draw()
    with pytest.raises(SelectionError, match="row"):
        plot_control(control, 2)


def test_control_result_knows_its_score(traces) -> None:
    trace = traces["one"]
    control = ss.RandomControl(ss.MaskKeys(trace.v_sinks), n=3)
    assert "nats" in control.run(traces.lvlm, trace).score

    def margin(run):
        return run.logits[:, -1].max(-1).values

    assert control.run(traces.lvlm, trace, margin).plot().axes[0].get_xlabel() == "margin"


def test_seeds_and_the_number_of_changes_are_stated() -> None:
    made = comparison()
    summary = made.estimates(draws=50)
    assert "over images. " in plot_effects(summary).get_suptitle()
    assert "None of the 6 changes" in one_line(plot_effects(summary).get_suptitle())
    several = pd.concat([made.table.assign(seed=seed) for seed in range(3)])
    several = several[(several["condition"] != "base") | (several["seed"] == 0)]
    summary = Comparison(several, "base").estimates(draws=50)
    assert "images and seeds" in one_line(plot_effects(summary).get_suptitle())
    assert "resample images and seeds" in one_line(effects_text(summary))
    assert set(summary["seeds"]) == {1, 3}


def with_twins():
    """Three tasks; a kind that was found, one found in one task only, one never, and its control."""
    made = comparison(tasks=("count", "colour", "shape"))
    table = made.table
    table.loc[table["condition"].str.contains("random"), "touched"] = False
    somewhere = table[table["condition"] == "mask V-sinks"].assign(condition="halve V-sinks")
    somewhere["touched"] = somewhere["task"] == "count"
    return Comparison(pd.concat([table, somewhere]), "base")


def test_every_place_counts_the_changes_that_are_there() -> None:
    """4 of "mask V-sinks", 2 of "halve V-sinks"; nothing of what was not found, nor of its twin."""
    made = with_twins()
    summary = made.estimates(draws=50)
    title = one_line(plot_effects(summary).get_suptitle())
    places = {
        "terminal": one_line(effects_text(summary)),
        "Markdown": made.to_markdown(draws=50),
        "LaTeX": made.to_latex(draws=50),
    }
    for place, text in places.items():
        assert "6 changes are shown" in text, place
    assert "None of the 6 changes" in title
    assert made.comparisons == summary.attrs["comparisons"] == 6
    assert places["Markdown"].count("[") == 6 + 4, "intervals in the table: changes, and the base"
    few = one_line(effects_text(summary, tasks=["colour"]))
    assert "1 change is shown, none corrected for their number: about 0.05 such" in few
    title = one_line(plot_effects(summary, tasks=["colour"]).get_suptitle())
    assert "None of the 1 changes" in title


def test_counting_survives_a_file(tmp_path) -> None:
    """A summary that was written and read again has no attrs."""
    with_twins().estimates(draws=50).to_csv(tmp_path / "s.csv", index=False)
    assert "6 changes" in effects_text(pd.read_csv(tmp_path / "s.csv")).replace("\n", " ")


def test_answers_that_did_not_change_have_no_interval_of_no_width() -> None:
    made = comparison()
    table = made.table
    right = table[table["condition"] == "base"].set_index("item")["correct"]
    random = table["condition"] == "mask random, as many"
    table.loc[random, "correct"] = table.loc[random, "item"].map(right)
    summary = made.estimates(draws=50)
    text, page = one_line(effects_text(summary)), made.to_markdown(draws=50)
    for shown in (text, page):
        assert "[+0" not in shown
        assert shown.count("0 (none changed)") == 3 + 1, "three cells and the note"
        assert "no answer turned right or wrong" in shown
    assert "Bold: the interval excludes zero." in page
    assert "A star: the interval excludes zero." in text
    figure = plot_effects(summary)
    strokes = [li for li in figure.axes[0].lines if li.get_marker() == "|"]
    assert [li.get_ydata()[0] for li in strokes] == [1]
    assert "no answer changed" in texts(figure.legends[0].get_texts())
    assert '"none found": there was no such token, so nothing was edited.' in page
    with pytest.raises(InputError, match=r"lacks \['changed'\]"):
        effects_text(summary.drop(columns="changed"))


def test_answers_that_cancel_are_not_called_unchanged() -> None:
    """One answer per image turns right and another wrong: no change of accuracy, yet answers changed."""
    made = comparison()
    table = made.table[made.table["condition"].isin(["base", "mask V-sinks"])].copy()
    first = table["item"] % 2 == 0
    table["correct"] = (table["condition"] == "base") == first
    text = effects_text(Comparison(table, "base").estimates(draws=50), tasks=["all"])
    assert "none changed" not in text
    assert "+0 [+0, +0]" in text


def test_small_changes_of_many_questions_are_not_rounded_away() -> None:
    made = comparison(images=100)
    table = made.table[made.table["condition"].isin(["base", "mask V-sinks"])].copy()
    table["correct"] = (table["condition"] == "base") | (table["item"] > 0)
    text = effects_text(Comparison(table, "base").estimates(), tasks=["all"])
    assert "-0.5 [-1.5, +0.0]" in text


def test_labels_of_many_conditions_do_not_touch() -> None:
    """Eleven conditions with long names and five tasks: every label has its own place."""
    names = [f"a method with quite a long name, number {i}, at layer {i}" for i in range(11)]
    made = comparison(tasks=tuple("abcde"))
    one = made.table[made.table["condition"] == "mask V-sinks"]
    tables = [one.assign(condition=name) for name in names]
    table = pd.concat([made.table[made.table["condition"] == "base"], *tables])
    figure = plot_effects(Comparison(table, "base").estimates(draws=20))
    FigureCanvasAgg(figure).draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == 11
    assert all(boxes[i].y0 >= boxes[i + 1].y1 for i in range(10))
    assert all(box.x0 >= 0 and box.x1 <= figure.axes[0].get_window_extent().x0 for box in boxes)
    heads = [ax.title if ax.get_title() else ax._left_title for ax in figure.axes]
    spans = [head.get_window_extent() for head in heads]
    assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(spans))
    ticks = []
    for ax in figure.axes:
        low, high = ax.get_xlim()
        shown = [t for t in ax.get_xticklabels() if low <= t.get_position()[0] <= high]
        ticks += [label.get_window_extent() for label in shown]
    assert len(ticks) >= 3 * 6
    assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(ticks))

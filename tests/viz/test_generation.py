"""The figure and the words of sinks while the model speaks say what the trace holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from matplotlib.colors import to_hex

import sinkscope as ss
from sinkscope.errors import SelectionError
from sinkscope.testing import plant
from sinkscope.viz import generation_text, plot_generation
from sinkscope.viz.tokens import COLOUR, OTHERS, SINKS
from tests.experiments.test_generation import said

LONG = 70


@pytest.fixture(scope="module")
def spoken():
    """Two rows, V- and L-sinks, and a sink that is born at step 3 of both answers."""
    made = plant("clip", v_sinks=(9,), l_sinks=(20,), l_layer=1)
    lvlm = ss.LVLM(made.model, made.processor)
    texts = ["USER: <image>\nwhat ? ASSISTANT:", "USER: <image>\nHow many red shapes ? ASSISTANT:"]
    sample = lvlm.prepare(inputs=made.inputs(texts))
    bos = made.processor.tokenizer.bos_token_id
    rule = ss.detectors.SinkDimensions(made.truth.l_dims, 5.0)
    found = ss.trace_sinks(lvlm, sample, ss.detectors.SinkDimensions(made.truth.v_dims, 5.0), rule)
    words = [40, 41, bos, 42, 43, 44]
    return ss.trace_generation(lvlm, sample, rule, trace=found, **said(lvlm, sample, words))


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def marks(figure, marker):
    """(step, line) of every mark of one kind."""
    return [
        (int(line.get_xdata()[0]), int(line.get_ydata()[0]))
        for line in figure.axes[0].lines
        if line.get_marker() == marker
    ]


def key(figure):
    (legend,) = figure.legends
    return [legend.get_title().get_text(), *(text.get_text() for text in legend.get_texts())]


def test_every_cell_is_what_the_step_gave(spoken) -> None:
    figure = spoken.plot(1)
    ax = figure.axes[0]
    places = [int(name.split("  ")[1]) for name in labels(ax.yaxis)]
    shown = torch.tensor(ax.images[0].get_array().filled(float("nan")))
    for line, pos in enumerate(places):
        want = spoken.by_step()[1, :, pos]
        assert torch.equal(shown[line].isnan(), want.isnan())
        assert torch.allclose(shown[line].nan_to_num().float(), want.nan_to_num())
    own = [life.pos for life in spoken.lives if life.batch == 1]
    assert places[: len(own)] == own == sorted(own)
    rest = spoken.by_step()[1].nan_to_num().sum(dim=0)
    rest[own] = -1.0
    assert set(places[len(own) :]) == set(rest.topk(OTHERS).indices.tolist())
    divider = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "-"]
    assert divider == [len(own) - 0.5]


def test_tokens_and_steps_are_named(spoken) -> None:
    figure = plot_generation(spoken, 0)
    ax = figure.axes[0]
    start = int(spoken.sample.tokens.first[0])
    assert labels(ax.yaxis)[0] == f"<s>  {start}"
    assert "image 0 1,1  " in " ".join(labels(ax.yaxis))  # patch 9 of the 8 x 8 grid
    prompt = spoken.sample.tokens.ids.shape[1]
    assert labels(ax.yaxis)[3] == f"<s>  {prompt + 2}"
    assert labels(ax.xaxis)[2] == "<s>"
    assert len(labels(ax.xaxis)) == 6
    kinds = [to_hex(label.get_color()) for label in ax.get_yticklabels()[:4]]
    assert kinds == [COLOUR[kind].lower() for kind in ("text", "V", "L", "generated")]
    assert ax.get_title(loc="left") == "Sinks while the model speaks, row 0"
    groups = ["V-sinks", "L-sinks", "text sinks", "sinks born in the answer"]
    assert key(figure)[1:] == [*groups, "born"]
    live = int(spoken.sample.tokens.live[0].sum())
    low, high = 1 / (live + 5), 1 / live
    assert f"uniform attention (null) would give {low:.3f} to {high:.3f}" in key(figure)[0].replace(
        "\n", " "
    )


def test_births_and_deaths_are_marked(spoken) -> None:
    figure = plot_generation(spoken, 0)
    assert marks(figure, ">") == [(3, 3)]
    assert marks(figure, "x") == []
    dead = dataclasses.replace(spoken.lives[1], last_step=2, drawn_steps=2)
    assert dead.fate == "dead"
    changed = dataclasses.replace(spoken, lives=(spoken.lives[0], dead, *spoken.lives[2:]))
    figure = plot_generation(changed, 0)
    assert marks(figure, "x") == [(2, 1)]
    assert "draws for the last time" in key(figure)


def test_many_sinks_and_steps_are_cut_and_say_so(spoken) -> None:
    lives = tuple(
        dataclasses.replace(spoken.lives[0], pos=spoken.lives[0].pos + i, drawn_steps=100 - i)
        for i in range(SINKS + 3)
    )
    figure = plot_generation(dataclasses.replace(spoken, lives=lives), 0)
    assert len(labels(figure.axes[0].yaxis)) == SINKS + OTHERS
    assert "3 sinks that draw less not shown" in key(figure)[0].replace("\n", " ")
    wide = {
        name: getattr(spoken, name)[:, :1].repeat_interleave(LONG, dim=1)
        for name in ("mass_max", "mass_mean", "null")
    }
    words = tuple((*row, *(["x"] * LONG)) for row in spoken.words)
    figure = plot_generation(dataclasses.replace(spoken, words=words, **wide), 0)
    assert len(labels(figure.axes[0].xaxis)) < 40
    assert figure.get_figwidth() <= 16


@pytest.mark.parametrize("steps", [1, 6])
def test_nothing_is_cut_off(spoken, steps) -> None:
    first = {name: getattr(spoken, name)[:, :steps] for name in ("mass_max", "mass_mean", "null")}
    figure = plot_generation(dataclasses.replace(spoken, **first), 0)
    figure.draw_without_rendering()
    wide = figure.get_figwidth() * figure.dpi
    (legend,) = figure.legends
    for text in (legend.get_title(), *legend.get_texts(), *figure.axes[0].get_yticklabels()):
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= wide, text.get_text()


def test_no_sinks_are_said(spoken) -> None:
    none = dataclasses.replace(spoken, lives=())
    assert key(plot_generation(none, 0))[0].startswith("sinks: none found")
    text = none.summary()
    assert text.startswith("6 steps. No sinks: no token of prompt or answer meets the L rule.")


def test_a_row_that_has_ended_has_fewer_columns(spoken) -> None:
    null = spoken.null.clone()
    null[0, 4:] = float("nan")
    figure = plot_generation(dataclasses.replace(spoken, null=null), 0)
    assert len(labels(figure.axes[0].xaxis)) == 4
    assert figure.axes[0].images[0].get_array().shape[1] == 4


def test_the_text_says_what_the_records_say(spoken) -> None:
    text = spoken.summary()
    assert text.startswith("6 steps. 6 sinks in the prompt, of which 6 live to the end; 2 sinks born in the answer.")  # fmt: skip
    assert text.count("Answer: ") == 2
    rows = [line for line in text.splitlines() if line.startswith(("0 ", "1 "))]
    assert len(rows) == len(spoken.lives)
    for line, life in zip(rows, spoken.lives, strict=True):
        assert f" {life.pos} " in line
        assert f"{life.drawn_steps} of {life.seen_steps} steps" in line
        assert f"step {life.last_step} " in line
        assert f"(step {life.at[0]}, layer {life.at[1]})" in line
        assert ("step 3  " in line) is (life.kind == "generated")
        assert " lives " in line
    assert " 14 image 0 1,1 " in text
    assert "Draws: some head of the new query, in some layer, gives it 0.2 more" in text
    assert "L rule (given): SinkDimensions(dims=(41, 101), tau=5.0" in text
    assert max(len(line) for line in text.splitlines()) <= 140
    short = generation_text(spoken, limit=3)
    assert "5 more sinks not listed" in short
    assert len([line for line in short.splitlines() if line.startswith(("0 ", "1 "))]) == 3


def test_fates_in_words(spoken) -> None:
    life = spoken.lives[0]
    unread = {"last_step": None, "seen_until": None, "at": None, "drawn_steps": 0, "seen_steps": 0}
    fates = (
        life,
        dataclasses.replace(life, last_step=1),
        dataclasses.replace(life, last_step=None, drawn_steps=0),
        dataclasses.replace(life, **unread),
    )
    text = dataclasses.replace(spoken, lives=fates).summary()
    rows = [line for line in text.splitlines() if line.startswith("0 ")]
    for row, fate in zip(rows, ("lives", "dies", "draws nothing", "not read"), strict=True):
        assert f" {fate} " in row
    assert "0 of 0 steps" in rows[3]


def test_an_unknown_row_is_refused(spoken) -> None:
    with pytest.raises(SelectionError, match="Got row 2; expected 0 to 1"):
        spoken.plot(2)

"""Coefficients of gates by task and layer, against plain PyTorch on transformers' own hidden states."""

import numpy as np
import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope import detectors
from sinkscope.errors import DetectorError, InputError, InterventionError
from sinkscope.experiments import GateCoefficients, cluster_bootstrap
from sinkscope.testing import tiny_llava, write_checkpoint
from sinkscope.viz import plot_coefficients
from tests.experiments.test_sweep import some
from tests.experiments.test_sweep_groups import channel_rule, rows_run
from tests.keeping_cls import cls_of, keeping_cls
from tests.lsg.reference import sequential, twin_of

FAMILIES = ("llava-clip-llama", "llava-siglip-qwen3", "qwen2.5-vl", "gemma3")
LAYERS = ("embed", 0, 1)


def gate_for(lvlm, layer=0, v_detector=None, spread=1.0, **choices):
    """A gate that answers differently to different questions."""
    rule = v_detector or detectors.RandomTokens(3)
    gate = ss.LSG.for_model(lvlm, layer, v_detector=rule, **choices)
    made = torch.Generator().manual_seed(gate.config.edited)
    with torch.no_grad():
        for weight in (gate.outer.weight, gate.outer.bias):
            weight.copy_(spread * torch.randn(weight.shape, generator=made))
    return gate


@torch.no_grad()
def by_hand(model, lvlm, items, gate):
    """Coefficients ``[question group]`` from the plain model's hidden states, one question at a time."""
    out, modules = [], sequential(gate)
    for item in items:
        sample = lvlm.prepare(images=item["image"], text=item["question"])
        states = model(**sample.inputs, output_hidden_states=True).hidden_states
        read = states[gate.config.edited][0]
        visual = sample.inputs["input_ids"][0] == lvlm.anatomy.image_token_id
        where = {"last": [-1], "mean": slice(None), "visual": visual}[gate.config.signal]
        out.append(gate.config.scale * modules(read[where].mean(dim=0)))
    return torch.stack(out)


def wide(made, layer, groups):
    """Coefficients ``[question group]`` of one gate."""
    own = made.table[made.table["layer"] == (-1 if layer == "embed" else layer)]
    table = own.pivot(index="item", columns="group", values="coefficient")
    return torch.tensor(table[list(groups)].to_numpy(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "batch"), [("llava-clip-llama", 1), *((family, 3) for family in FAMILIES)]
)
def test_every_gate_reads_the_plain_pass(family, batch, tiny):
    lvlm, items, twin = tiny(family), some(), twin_of(family)
    gates = [gate_for(lvlm, layer) for layer in LAYERS]
    made = ss.gate_coefficients(lvlm, gates, items, batch=batch)
    assert len(made.table) == len(items) * len(gates) * 2
    for layer, gate in zip(LAYERS, gates, strict=True):
        got = wide(made, layer, gate.groups)
        torch.testing.assert_close(got, by_hand(twin, lvlm, items, gate), atol=1e-5, rtol=1e-4)
        told_apart = got.std(dim=0).min() > 1e-4
        assert told_apart == (layer != "embed")  # the template's last word is the same for all
        for row, item in enumerate(items):
            sample = lvlm.prepare(images=item["image"], text=item["question"])
            effect = lvlm.run(sample, interventions=[gate]).effects[gate]
            alone = effect.extra["coefficients"][0, 0]
            torch.testing.assert_close(got[row], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("signal", ["mean", "visual"])
def test_other_signals_and_three_groups(signal, tiny):
    lvlm, items = tiny("llava-clip-llama"), some()
    low = channel_rule(lvlm, items)
    choices = {"groups": ("V", "L", "rest"), "l_detector": low, "scale": 2.0, "signal": signal}
    gate = gate_for(lvlm, 1, **choices)
    made = ss.gate_coefficients(lvlm, gate, items)
    got = wide(made, 1, gate.groups)
    want = by_hand(twin_of("llava-clip-llama"), lvlm, items, gate)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.sum(dim=1), torch.full((4,), 2.0))
    assert set(made.table["untrained"]) == {2.0 / 3}
    counts = made.table.pivot(index="item", columns="group", values="tokens")
    rule = detectors.RandomTokens(3)
    for row, item in enumerate(items):
        sample = lvlm.prepare(images=item["image"], text=item["question"])
        trace = ss.trace_sinks(lvlm, sample, rule, low)
        v, n_l = int(trace.v_sinks.sum()), int(trace.l_sinks(2).sum())
        assert counts.loc[row, ["V", "L", "rest"]].tolist() == [v, n_l, 16 - v - n_l]
    assert counts["L"].max() > 0


def test_a_stack_is_another_question(tiny):
    """Gates below change what those above read, and are left out here."""
    lvlm, items = tiny("llava-clip-llama"), some(1)
    gates = [gate_for(lvlm, layer) for layer in LAYERS]
    made = ss.gate_coefficients(lvlm, gates, items)
    sample = lvlm.prepare(images=items[0]["image"], text=items[0]["question"])
    effects = lvlm.run(sample, interventions=gates).effects
    stacked = [effects[gate].extra["coefficients"][0, 0] for gate in gates]
    alone = [wide(made, layer, ("V", "rest"))[0] for layer in LAYERS]
    torch.testing.assert_close(stacked[0], alone[0], atol=1e-5, rtol=1e-4)
    assert (stacked[1] - alone[1]).abs().max() > 1e-3


def test_one_pass_serves_all_gates_and_ends_at_the_highest(tiny):
    lvlm, items = tiny("llava-clip-llama"), some()
    gates = [gate_for(lvlm, layer) for layer in ("embed", 0)]
    _, rows, tower = rows_run(lvlm, lambda: ss.gate_coefficients(lvlm, gates, items, batch=3))
    assert tower == 2  # four questions, three a batch
    assert rows == [(0, 3), (0, 1)]  # block 1 is edited: what it reads is there before it runs


def test_cls_counts_as_one_token(batch):
    lvlm, items = keeping_cls(), some()
    gate = gate_for(lvlm, 0, detectors.VisionTokens("cls"))
    made = ss.gate_coefficients(lvlm, gate, items).table
    assert set(made.loc[made["group"] == "V", "tokens"]) == {1}
    assert int(cls_of(lvlm.prepare(items[0]["image"], items[0]["question"])).sum()) == 1


def test_an_untrained_gate_gives_the_same_to_all(tiny):
    lvlm = tiny("llava-clip-llama")
    gate = ss.LSG.for_model(lvlm, 0, v_detector=detectors.NoSinks())
    table = ss.gate_coefficients(lvlm, [gate], some()).to_dataframe()
    assert (table[["coefficient", "low", "high", "untrained"]].dropna() == 0.5).all(axis=None)
    assert set(table.loc[table["group"] == "V", "tokens"]) == {0}


# Means, intervals and the figure, on a table whose truth is known


def known(images=6, layers=(-1, 2), tasks=("count", "shape"), groups=("V", "L", "rest"), seed=0):
    rng, lines = np.random.default_rng(seed), []
    for item in range(2 * images):
        for layer in layers:
            values = rng.dirichlet(np.ones(len(groups)))
            for group, value in zip(groups, values, strict=True):
                lines.append(
                    {
                        "item": item,
                        "image_id": f"im{item // 2}",
                        "task": tasks[item % len(tasks)],
                        "layer": layer,
                        "edited": layer + 1,
                        "group": group,
                        "coefficient": value,
                        "untrained": 1 / len(groups),
                        "tokens": 0 if group == "L" and layer == -1 else item,
                    }
                )
    return GateCoefficients(pd.DataFrame(lines))


def test_means_and_intervals_by_hand():
    made = known()
    table = made.to_dataframe(seed=3)
    assert table["task"].unique().tolist() == ["count", "shape", "all"]
    assert list(table) == [
        "task", "layer", "edited", "group", "n", "images", "coefficient", "low", "high", "untrained",
        "tokens",
    ]  # fmt: skip
    assert len(table) == 3 * 2 * 3
    for task in ("count", "all"):
        own = made.table if task == "all" else made.table[made.table["task"] == task]
        own = own[(own["layer"] == 2) & (own["group"] == "L")]
        mean = cluster_bootstrap(own["coefficient"].tolist(), own["image_id"].tolist(), seed=3)
        line = table[(table["task"] == task) & (table["layer"] == 2) & (table["group"] == "L")]
        assert line[["coefficient", "low", "high"]].iloc[0].tolist() == pytest.approx(list(mean))
        assert line["tokens"].item() == own["tokens"].mean()
        assert (line["n"].item(), line["images"].item()) == (len(own), 6)
        assert line["edited"].item() == 3
    assert made.to_dataframe("all")["task"].unique().tolist() == ["all"]
    assert repr(made) == "GateCoefficients(12 questions, 6 images, 2 gates)"
    one = known(images=1, tasks=("only",)).to_dataframe()
    assert one["task"].unique().tolist() == ["all"]
    assert one["low"].isna().all()


def test_figure_shows_every_task_layer_and_group():
    made = known()
    table, figure = made.to_dataframe(), made.plot()
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "V-sinks",
        "L-sinks",
        "other image tokens",
    ]
    for ax, group in zip(figure.axes, ("V", "L", "rest"), strict=True):
        assert [text.get_text() for text in ax.get_xticklabels()] == ["embed", "2"]
        lines = [line for line in ax.lines if line.get_alpha() == 0.6]
        for line, task in zip(lines, ("count", "shape", "all"), strict=True):
            own = table[(table["task"] == task) & (table["group"] == group)].sort_values("layer")
            np.testing.assert_allclose(line.get_ydata(), own["coefficient"])
            assert [round(x) for x in line.get_xdata()] == [0, 1]
        spans = [span for one in ax.collections for span in one.get_segments()]
        wanted = table[table["group"] == group].sort_values(["layer"], kind="stable")
        ends = sorted((low, high) for low, high in wanted[["low", "high"]].to_numpy())
        np.testing.assert_allclose(sorted((s[0][1], s[1][1]) for s in spans), ends)
        dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
        assert all(set(line.get_ydata()) == {1 / 3} for line in dashed)
        assert len(dashed) == 2
        hollow = [
            x
            for line in ax.lines
            if line.get_markerfacecolor() == "white"
            for x in line.get_xdata()
        ]
        assert len(hollow) == (3 if group == "L" else 0)
        assert all(round(x) == 0 for x in hollow)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [
        "count (n = 6)",
        "shape (n = 6)",
        "all (n = 12)",
        "untrained gate",
        "no such token",
    ]
    with pytest.raises(InputError, match=r"lacks \['low'\]; expected that of gate_coefficients"):
        plot_coefficients(table.drop(columns="low"))


def test_of_many_layers_intervals_are_bands():
    layers = tuple(range(9))
    made = known(layers=layers, tasks=("one",), groups=("V", "rest"))
    table, ax = made.to_dataframe(), made.plot().axes[0]
    own = table[table["group"] == "V"].sort_values("layer")
    (band,) = ax.collections
    corners = {(round(x), y) for x, y in band.get_paths()[0].vertices}
    for line in own.to_dict("records"):
        assert {(line["layer"], line["low"]), (line["layer"], line["high"])} <= corners
    np.testing.assert_array_equal(ax.lines[-1].get_xdata(), [])  # no hollow mark
    np.testing.assert_array_equal(ax.lines[-2].get_xdata(), layers)


def test_wrong_uses_are_refused(tiny, tmp_path):
    lvlm, items = tiny("llava-clip-llama"), some()
    gate = gate_for(lvlm)
    with pytest.raises(
        InputError, match=r"Got gates of the layers \[0, 0\]; expected every layer once"
    ):
        ss.gate_coefficients(lvlm, [gate, gate_for(lvlm)], items)
    with pytest.raises(InterventionError, match="expected one LSG or a list"):
        ss.gate_coefficients(lvlm, [], items)
    with pytest.raises(InputError, match="batch=0; expected an int of at least 1"):
        ss.gate_coefficients(lvlm, gate, items, batch=0)
    with pytest.raises(InputError, match="by='tasks'"):
        ss.gate_coefficients(lvlm, gate, items, "tasks")
    with pytest.raises(InputError, match="Got an empty dataset"):
        ss.gate_coefficients(lvlm, gate, [])
    with pytest.raises(InterventionError, match="made for another model"):
        ss.gate_coefficients(tiny("llava-siglip-qwen3"), gate, items)
    dropped = gate_for(keeping_cls(), 0, detectors.VisionTokens("cls")).adopt(lvlm)
    with pytest.raises(DetectorError, match="whose projector drops it"):
        ss.gate_coefficients(lvlm, dropped, items)
    write_checkpoint(*tiny_llava(), tmp_path / "model")
    remote = ss.LVLM.from_pretrained(tmp_path / "model", remote=True)
    for one in (remote, ss.LVLM(tiny_llava()[0])):
        with pytest.raises(InputError, match="without a processor or without weights"):
            ss.gate_coefficients(one, gate, items)


def test_the_model_and_the_gates_are_left_alone(tiny):
    lvlm, items = tiny("llava-clip-llama"), some(1)
    gate = gate_for(lvlm)
    sample = lvlm.prepare(images=items[0]["image"], text=items[0]["question"])
    with torch.no_grad():
        before = lvlm.module(**sample.inputs).logits
        ss.gate_coefficients(lvlm, gate, items)
        assert torch.equal(lvlm.module(**sample.inputs).logits, before)
    assert all(parameter.grad is None for parameter in gate.parameters())

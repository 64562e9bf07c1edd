"""Layer x head maps: every cell is the measurement, the frame is at the largest, the null is said."""

from __future__ import annotations

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import ProbeError, SelectionError
from sinkscope.probes import MassResult
from sinkscope.viz import plot_heads, plot_received_heads
from tests.viz.conftest import texts


def cells(figure):
    """What the map shows, ``[layer head]``; NaN where it is grey."""
    return torch.tensor(figure.axes[0].images[0].get_array().filled(float("nan"))).T.float()


def note(figure):
    return figure.axes[0].texts[-1].get_text()


def frames(figure):
    """(layer index, head) of every frame."""
    return [(p.get_x() + 0.5, p.get_y() + 0.5) for p in figure.axes[0].patches]


@pytest.fixture
def by_hand():
    """Two rows (the second has one query of padding), two layers, two heads, two queries, one group."""
    nan = float("nan")
    mass = [
        [[[0.5, 0.1], [0.0, 0.2]], [[0.3, 0.9], [0.1, 0.1]]],
        [[[nan, 0.7], [nan, 0.4]], [[nan, 0.1], [nan, 0.0]]],
    ]
    null = torch.tensor([[[1.0, 0.5], [0.2, 0.2]], [[nan, 1.0], [nan, 0.2]]])[..., None]
    queries = torch.tensor([[0, 1], [-1, 1]])
    return MassResult(torch.tensor(mass)[..., None], null, ("a",), (3, 7), queries)


@pytest.mark.parametrize(
    ("row", "query", "want", "said"),
    [
        (0, None, [[0.3, 0.1], [0.6, 0.1]], "mean over queries"),
        (None, None, [[1.3 / 3, 0.2], [1.3 / 3, 0.2 / 3]], "mean over queries and rows"),
        (1, 1, [[0.7, 0.4], [0.1, 0.0]], "query at position 1"),
    ],
)
def test_the_mean_over_queries_leaves_padding_out(by_hand, row, query, want, said) -> None:
    figure = plot_heads(by_hand, "a", row, query=query)
    assert torch.allclose(cells(figure), torch.tensor(want))
    assert note(figure).startswith(said + "\n")


def test_the_largest_is_framed_and_named_beside_its_null(by_hand) -> None:
    figure = plot_heads(by_hand, "a", 0)
    assert frames(figure) == [(1, 0)]
    assert "layer 7, head 0 gives the most, 0.600" in note(figure)
    assert "uniform attention (null) in that layer, 0.200" in note(figure)
    assert [list(line.get_ydata()) for line in figure.axes[1].lines] == [[pytest.approx(0.2)] * 2]
    assert texts(figure.axes[0].get_xticklabels()) == ["3", "7"]
    assert figure.axes[1].get_ylabel() == "share of attention, 0 to 1"
    assert figure.axes[0].get_title(loc="left") == "Attention mass on a, row 0"


@pytest.mark.parametrize("row", [None, 1])
def test_masses_of_planted_sinks(traces, row) -> None:
    result = traces.masses["two rows"]
    figure = result.plot_heads("text sinks", row)
    chosen = slice(None) if row is None else slice(row, row + 1)
    want = result.group("text sinks")[chosen].nanmean(dim=(0, 3))
    null = result.null[chosen][..., result.groups.index("text sinks")].nanmean(dim=(0, 2))
    got = cells(figure)
    assert torch.equal(got.isnan().any(dim=1), null == 0)
    assert (null == 0).tolist() == [True, True, False, False, False, False]  # born in block 1
    assert torch.allclose(got[2:], want[2:], atol=1e-6)
    layer, head = (int(place) for place in frames(figure)[0])
    assert want[layer, head] == want.max()
    assert "grey: the group has no token in that layer" in note(figure)


def test_a_group_without_a_token_and_a_result_without_a_null(traces) -> None:
    nobody = torch.zeros_like(traces["one"].sample.tokens.live)
    for null in (True, False):
        probe = ss.AttentionMass({"none": nobody, "first": "first"}, null=null, layers=[2, 4])
        result = traces.lvlm.run(traces["one"].sample, [probe])[probe]
        figure = result.plot_heads("none")
        assert cells(figure).isnan().all()
        assert frames(figure) == []
        assert "none found" in texts(figure.axes[0].texts)
        assert "the group has no token in any layer" in note(figure)
        assert ("null" in note(result.plot_heads("first"))) is null


def test_attention_on_one_token(traces) -> None:
    trace = traces["two rows"]
    record = next(r for r in trace.records if r.kind == "text" and r.batch == 1)
    figure = plot_received_heads(trace.language.received, record.pos, 1)
    top = trace.received[1, :, :, record.pos]
    assert torch.allclose(cells(figure), top, atol=1e-6)
    layer, head = divmod(int(top.argmax()), top.shape[1])
    assert frames(figure) == [(layer, head)]
    assert f"layer {layer}, head {head} gives the most, {float(top.max()):.3f}" in note(figure)
    assert figure.axes[0].get_title(loc="left") == f"Attention on the token at {record.pos}, row 1"


def test_wrong_use_is_explained(traces, by_hand) -> None:
    with pytest.raises(ProbeError, match=r"Got group='b'; expected one of \('a',\)"):
        by_hand.plot_heads("b")
    with pytest.raises(SelectionError, match="Got row 2; expected 0 to 1, or None"):
        by_hand.plot_heads("a", 2)
    with pytest.raises(SelectionError, match=r"query=0 of row 1; expected .* \(1 to 1\)"):
        by_hand.plot_heads("a", 1, query=0)
    gone = MassResult(by_hand.mass.fill_(float("nan")), None, ("a",), (3, 7), by_hand.queries)
    with pytest.raises(SelectionError, match="none, because its answer has ended"):
        gone.plot_heads("a", 0)
    trace = traces["two rows"]
    with pytest.raises(SelectionError, match="Got row 5; expected 0 to 1"):
        plot_received_heads(trace.language.received, 0, 5)
    padded = int((~trace.sample.tokens.live[1]).sum())
    assert padded
    with pytest.raises(SelectionError, match=rf"Got position 0 of row 1; expected {padded} to "):
        plot_received_heads(trace.language.received, 0, 1)

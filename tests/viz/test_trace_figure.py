"""The whole trace in one figure."""

from __future__ import annotations

import io

import matplotlib
import matplotlib.pyplot as plt
import pytest

from sinkscope.errors import SelectionError
from sinkscope.viz import plot_trace

SINKS = "Sinks, image {} (any layer)"
MAP = "Attention received, largest over layers"
PER_TOKEN = "Attention per token, mean of heads"
MASS = "Attention mass, mean of heads and queries"
BELOW = ["Spike size", "What the rules flag"]


def titles(figure):
    found = [ax.get_title(loc="left") for ax in figure.axes]
    return [title for title in found if title]


@pytest.mark.parametrize(
    ("name", "panels"),
    [
        ("one", [SINKS.format(0), MAP, PER_TOKEN, *BELOW]),
        ("none", [SINKS.format(0), MAP, PER_TOKEN, *BELOW]),
        ("two images", [SINKS.format(0), SINKS.format(1), PER_TOKEN, *BELOW]),
    ],
)
def test_panels(traces, name, panels) -> None:
    figure = plot_trace(traces[name])
    assert titles(figure) == panels
    picture = io.BytesIO()
    figure.savefig(picture, dpi=40)
    assert picture.getvalue().startswith(b"\x89PNG")


def test_a_notebook_can_show_it(traces) -> None:
    """Also where pyplot was never used, which is what tells notebooks about figures."""
    assert plot_trace(traces["one"])._repr_png_().startswith(b"\x89PNG")


def test_the_headline_counts(traces) -> None:
    assert plot_trace(traces["one"]).get_suptitle().strip() == (
        "Sink trace: 2 V-sinks, 2 L-sinks, 1 text sink"
    )
    assert plot_trace(traces["none"]).get_suptitle().strip() == (
        "Sink trace: no V-sinks, no L-sinks, no text sinks"
    )
    assert plot_trace(traces["two rows"], 1).get_suptitle().startswith("Sink trace of row 1: 2 V")


def test_masses_are_drawn_if_given(traces) -> None:
    figure = plot_trace(traces["two rows"], 1, mass=traces.masses["two rows"])
    assert titles(figure) == [SINKS.format(0), MAP, PER_TOKEN, MASS, *BELOW]


def test_nothing_is_cut_off(traces) -> None:
    """Every legend lies inside the figure."""
    for name in ("one", "none", "saturated", "two images"):
        figure = plot_trace(traces[name])
        figure.draw_without_rendering()
        for ax in figure.axes:
            if ax.get_legend() is not None:
                box = ax.get_legend().get_window_extent()
                assert box.x0 >= 0, (name, ax.get_title(loc="left"))
                assert box.y0 >= 0, (name, ax.get_title(loc="left"))
                assert box.x1 <= figure.bbox.x1, (name, ax.get_title(loc="left"))


def test_warnings_are_visible(traces) -> None:
    trace = traces["saturated"]
    assert len(trace.warnings) == 2
    text = plot_trace(trace).get_supxlabel()
    assert text.startswith("Warning: Norm(tau=1.0")
    assert text.endswith("(+1 more)")
    assert plot_trace(traces["one"]).get_supxlabel() == ""


def test_nothing_global_is_touched(traces, monkeypatch) -> None:
    monkeypatch.setattr(plt, "show", lambda *a, **k: pytest.fail("plt.show was called"))
    before = dict(matplotlib.rcParams)
    plot_trace(traces["one"])
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == [], "a figure was left with pyplot, which nobody will close"


def test_the_trace_draws_itself(traces) -> None:
    assert titles(traces["one"].plot()) == titles(plot_trace(traces["one"]))
    with pytest.raises(SelectionError, match="Got row 1"):
        traces["one"].plot(row=1)

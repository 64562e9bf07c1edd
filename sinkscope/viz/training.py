"""How gates learned: the loss of answers and the coefficients over the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib import colormaps
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sinkscope.errors import InputError
from sinkscope.viz.style import QUIET, dress, legend_below, new_figure, plain_log

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

NEEDED = frozenset({"layer", "step", "split", "loss"})
COLOURS = ("#0072B2", "#D55E00", "#00795A", "#B45C91", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
DASHES: dict[str, Any] = {"rho_V": "-", "rho_L": ":", "rho_rest": "--"}
NAMED = 6
"""With more layers than this, colours run along the layers and a legend shows some of them."""


def plot_training(history: pd.DataFrame, base: float | None = None) -> Figure:
    """Loss per answer token, and the mean coefficients of every group, over the steps.

    Args:
        history: Of `TrainResult.history`.
        base: The validation loss without a gate, or None.

    Returns:
        The figure. Thin lines are training steps, marked lines the validation part.

    Raises:
        InputError: If the table is no such history.
    """
    if not set(history.columns) >= NEEDED or not len(history):
        raise InputError(
            f"Got a table with the columns {list(history.columns)}; expected at least {sorted(NEEDED)} "
            "and a line. Write plot_training(result.history)."
        )
    groups = [name for name in history.columns if name in DASHES]
    figure = new_figure((9.5 if groups else 5.5, 3.9))
    axes = figure.subplots(1, 2 if groups else 1, squeeze=False)[0]
    layers = list(dict.fromkeys(history["layer"]))
    for place, (_, lines) in enumerate(history.groupby("layer", sort=False)):
        look = _look(place, len(layers))
        _draw_loss(axes[0], lines, look)
        for group in groups:
            _draw_group(axes[1], lines, group, look)
    if base is not None:
        axes[0].axhline(base, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    dress(axes[0], "Loss of the answers", "step", "nats per token")
    _focus(axes[0], history)
    axes[0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend_below(axes[0], _entries(layers, base, history))
    if groups:
        dress(axes[1], "Mean coefficients", "step", "factor of the keys")
        axes[1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes[1].set_ylim(bottom=0)
        names = {
            f"{group.removeprefix('rho_')}": Line2D([], [], color=QUIET, linestyle=DASHES[group])
            for group in groups
        }
        legend_below(axes[1], names)
    return figure


def _look(place: int, many: int) -> dict[str, Any]:
    """Colour and marker of a layer."""
    if many <= NAMED:
        return {"color": COLOURS[place], "marker": MARKERS[place]}
    return {"color": colormaps["viridis"](0.92 * place / (many - 1)), "marker": "o"}


def _draw_loss(ax: Any, lines: pd.DataFrame, look: dict[str, Any]) -> None:
    """Training as a thin line, validation as a marked one."""
    for split, style in (
        ("train", {"linewidth": 0.7, "alpha": 0.4, "marker": None}),
        ("validation", {"linewidth": 1.6, "markersize": 4}),
    ):
        part = lines[lines["split"] == split]
        ax.plot(part["step"], part["loss"], **{**look, **style})


def _focus(ax: Any, history: pd.DataFrame) -> None:
    """Show the range of the validation part, where there is one: single steps are noisier."""
    held = history["loss"][history["split"] == "validation"]
    if not len(held):
        return
    low, high = float(held.min()), float(held.max())
    if low > 0 and high > 4 * low:
        ax.set_yscale("log")
        plain_log(ax.yaxis)
        ax.set_ylim(low / 1.3, high * 1.3)
    else:
        ax.set_ylim(low - 0.5 * (high - low), high + 0.5 * (high - low))


def _draw_group(ax: Any, lines: pd.DataFrame, group: str, look: dict[str, Any]) -> None:
    """One coefficient, on the validation part where there is one."""
    held = lines[lines["split"] == "validation"]
    part, marked = (held, 3) if len(held) else (lines, 0)
    ax.plot(
        part["step"], part[group], **look, linestyle=DASHES[group], linewidth=1.3, markersize=marked
    )


def _entries(layers: list[Any], base: float | None, history: pd.DataFrame) -> dict[str, Any]:
    """The legend: layers, and what lines mean."""
    shown = range(len(layers))
    if len(layers) > NAMED:
        last = len(layers) - 1
        shown = sorted({round(i * last / (NAMED - 1)) for i in range(NAMED)})
    out: dict[str, Any] = {
        f"layer {layers[i]}": Line2D([], [], **_look(i, len(layers)), markersize=4) for i in shown
    }
    if "train" in set(history["split"]):
        out["training step"] = Line2D([], [], color=QUIET, linewidth=0.7, alpha=0.6)
    if base is not None:
        out["without a gate"] = Line2D([], [], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    return out

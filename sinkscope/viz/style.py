"""How figures look: one colour and one marker per kind of token, and axes that carry both towers.

The colours are those of Okabe and Ito, which stay apart for colour-blind readers; markers differ
too, so that nothing rests on colour alone. No global setting of matplotlib is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, cast

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from sinkscope.errors import LayerError, SelectionError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from sinkscope.experiments.trace import SinkTrace

TITLE, LABEL, SMALL = 11, 10, 9
"""Font sizes in points."""
QUIET = "#6b6b6b"


@dataclass(frozen=True)
class Style:
    """The colour and the marker of one group of tokens."""

    colour: str
    marker: str


STYLES = {
    "V-sinks": Style("#D55E00", "o"),
    "L-sinks": Style("#0072B2", "s"),
    "text sinks": Style("#00795A", "^"),
    "attended": Style("#7B3FA0", "h"),
    "ordinary": Style("#5F5F5F", "D"),
    "text": Style("#B45C91", "v"),
}
"""Group of `SinkTrace.groups` -> style."""
OTHERS = (
    Style("#56B4E9", "P"),
    Style("#E69F00", "X"),
    Style("#000000", "*"),
    Style("#8C510A", "p"),
)
"""For groups of the user's own."""
GROUP_OF = {"V": "V-sinks", "L": "L-sinks", "text": "text sinks", "attention": "attended"}
"""`SinkRecord.kind` -> group."""


def style_of(group: str, place: int = 0) -> Style:
    """The style of a group; groups that are not in `STYLES` take turns by their ``place``."""
    return STYLES.get(group, OTHERS[place % len(OTHERS)])


def new_axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The given axes, or the axes of a new figure of ``size`` inches."""
    if ax is not None:
        return ax
    return new_figure(size).subplots()


class NotebookFigure(Figure):
    """A figure that belongs to nobody else: pyplot does not know it, so nobody has to close it.

    Notebooks show it as a picture whether or not pyplot was ever used in them.
    """

    def _repr_png_(self) -> bytes:
        picture = BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of ``size`` inches."""
    return NotebookFigure(figsize=size, layout="constrained")


def figure_of(ax: Axes) -> Figure:
    """The figure of some axes."""
    return cast("Figure", ax.get_figure())


def dress(ax: Axes, title: str, x: str, y: str) -> None:
    """Title, labels with units, readable ticks, a light grid."""
    ax.set_title(title, fontsize=TITLE, loc="left", pad=17)
    ax.set_xlabel(x, fontsize=LABEL)
    ax.set_ylabel(y, fontsize=LABEL)
    ax.tick_params(labelsize=SMALL)
    ax.grid(visible=True, axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def plain_log(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10, ..., written without powers."""
    axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def legend_below(
    ax: Axes, entries: Mapping[str, Artist] | None = None, *, points: float = 36.0
) -> None:
    """A legend under the axes, where it covers nothing.

    Args:
        ax: The axes.
        entries: Label -> what it stands for; None for all labelled artists.
        points: How far under the axes: what lies between (tick labels, a label) is as tall.
    """
    figure = figure_of(ax)
    down = ScaledTranslation(0.0, -points / 72, figure.dpi_scale_trans)
    named = {} if entries is None else {"handles": entries.values(), "labels": entries.keys()}
    ax.legend(
        **named,
        loc="upper left",
        bbox_to_anchor=(0.0, 0.0),
        bbox_transform=ax.transAxes + down,
        ncols=2,
        fontsize=SMALL,
        frameon=False,
        borderaxespad=0.0,
        handlelength=1.8,
        columnspacing=1.2,
    )


def ticks_for(n: int, most: int = 7) -> list[int]:
    """Block indices to label: all of a few, else every second, fourth, ..."""
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100, n) if n <= s * most)
    return list(range(0, n, step))


@dataclass(frozen=True)
class TowerAxis:
    """One x axis for both towers: vision blocks, the projector, language layers.

    ::

        ViT 0 1 2 3 4 | LLM 0 1 2 3 4 5
    """

    n_vision: int
    n_language: int

    @property
    def vision(self) -> list[int]:
        """Where the vision blocks lie."""
        return list(range(self.n_vision))

    @property
    def language(self) -> list[int]:
        """Where the language layers lie: one place is left for the projector."""
        return [self.n_vision + 1 + layer for layer in range(self.n_language)]

    def draw(self, ax: Axes) -> None:
        """Label blocks and layers, and mark the projector between them."""
        ticks = ticks_for(self.n_vision, 6), ticks_for(self.n_language, 6)
        places = [self.vision[t] for t in ticks[0]] + [self.language[t] for t in ticks[1]]
        ax.set_xticks(places, [str(t) for part in ticks for t in part])
        ax.set_xlim(-0.6, self.language[-1] + 0.6)
        ax.axvline(self.n_vision, color=QUIET, linewidth=1, linestyle=":")
        across = ax.get_xaxis_transform()
        for x, name in ((-0.4, "ViT"), (self.n_vision + 0.6, "LLM")):
            ax.text(
                x, 1.01, name, transform=across, fontsize=SMALL, color=QUIET, ha="left", va="bottom"
            )
        ax.set_xlabel("vision blocks, then LLM layers (dotted: projector)", fontsize=LABEL)


def check_row(trace: SinkTrace, row: int) -> int:
    """The row itself.

    Raises:
        SelectionError: If the sample has no such row.
    """
    if not 0 <= row < len(trace.sample):
        raise SelectionError(
            f"Got row {row}; expected 0 to {len(trace.sample) - 1}: a row of the batch that was "
            "prepared. Write row=0 for the first."
        )
    return row


def images_of(trace: SinkTrace, row: int) -> list[int]:
    """The images of a row, counted over the whole batch."""
    owners = trace.sample.tokens.vision.batch_row.tolist()
    return [i for i, owner in enumerate(owners) if owner == check_row(trace, row)]


def check_image(trace: SinkTrace, row: int, image: int) -> int:
    """The index of an image of a row in the whole batch.

    Raises:
        SelectionError: If the row has no such image.
    """
    own = images_of(trace, row)
    if not 0 <= image < len(own):
        raise SelectionError(
            f"Got image {image} of row {row}; expected 0 to {len(own) - 1}: images are counted "
            "within their row. Write image=0 for the first."
        )
    return own[image]


def check_layer(trace: SinkTrace, layer: int) -> int:
    """The layer itself.

    Raises:
        LayerError: If the LLM has no such layer.
    """
    if not 0 <= layer < trace.n_layers:
        raise LayerError(
            f"Got layer {layer}; expected 0 to {trace.n_layers - 1}: layers of the LLM. Write "
            "layer=None for all of them."
        )
    return layer


def check_choice(name: str, value: str, known: Sequence[str]) -> str:
    """The value itself.

    Raises:
        SelectionError: If it is not among the known ones.
    """
    if value not in known:
        raise SelectionError(f"Got {name}={value!r}; expected one of {tuple(known)}.")
    return value

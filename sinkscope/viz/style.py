"""Which characters a figure can draw, and how wide they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, cast
from unicodedata import combining, east_asian_width

import torch
from matplotlib import colormaps, font_manager
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation
from torch import Tensor

from sinkscope.errors import LayerError, SelectionError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from sinkscope.experiments.tracing import SinkTrace

BASE = "DejaVu Sans Mono"

"""Comes with matplotlib; every letter is as wide as every other."""

ASIAN = (
    "Noto Sans Mono CJK SC",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Arial Unicode MS",
)

"""Fonts with Chinese, Japanese and Korean characters, of common systems."""

MISSING = "▯"

ADVANCE = 0.65

"""Width of a letter of `BASE` as a share of the font size, with room for its rounding to whole pixels."""


@cache
def families() -> tuple[str, ...]:
    """The base font, and those of `ASIAN` that are installed."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    return (BASE, *(name for name in ASIAN if name in known))


def drawable(text: str) -> str:
    """The text with `MISSING` for every character that no font here has."""
    return "".join(c if ord(c) in _covered() else MISSING for c in text)


def columns_of(text: str) -> int:
    """How many letters wide a text is: Chinese characters are as wide as two, accents of their own as none."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, columns: int) -> str:
    """The text, shortened to so many columns."""
    if columns_of(text) <= columns:
        return text
    while columns_of(text) > columns - 1:
        text = text[:-1]
    return text + "…"


@cache
def _covered() -> frozenset[int]:
    paths = [font_manager.findfont(name, fallback_to_default=False) for name in families()]
    return frozenset(code for path in paths for code in font_manager.get_font(path).get_charmap())


COLOURS = "Purples"

"""Light to dark, and no colour of a kind of sink."""

TICKS = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)

DARK = 0.55

"""Places on the scale from which on letters are white."""


def share_scale() -> PowerNorm:
    """A square-root scale: 0.01 lies at a tenth of it, 0.25 at a half."""
    return PowerNorm(0.5, 0.0, 1.0)


def colour_of(share: float) -> str:
    """The colour of a share as ``#rrggbb``."""
    return to_hex(colormaps[COLOURS](_place(share)))


def ink_on(share: float) -> str:
    """The colour of letters that can be read on it."""
    return "#ffffff" if _place(share) > DARK else "#1c2127"


def _place(share: float) -> float:
    return float(share_scale()(min(max(share, 0.0), 1.0)))


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


def draw_picture(ax: Axes, trace: SinkTrace, row: int, image: int, *, grey: bool = False) -> float:
    """The image, if there is one, under the grid of the vision tower's patches.

    Returns:
        About how many points wide a token is drawn, to choose a marker that fits.
    """
    index = check_image(trace, row, image)
    vision = trace.sample.tokens.vision
    boxes = vision.box[index][~vision.box[index].isnan().any(dim=-1)]
    low, high = boxes[:, :2].amin(dim=0), boxes[:, 2:].amax(dim=0)
    images = trace.sample.images
    if images is None:
        ax.set_xlim(float(low[0]), float(high[0]))
        ax.set_ylim(float(high[1]), float(low[1]))
        ax.set_facecolor("#f2f2f2")
        ax.set_aspect("equal")
    else:
        picture = images[row][image]
        extent = (0, picture.width, picture.height, 0)
        ax.imshow(picture.convert("L" if grey else "RGB"), extent=extent, cmap="gray", zorder=0)
    _draw_grid(ax, boxes, low.tolist(), high.tolist())
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_anchor("NW")
    if images is None:
        ax.set_ylabel("no picture: input pixels", fontsize=SMALL, color=QUIET)
    columns = int(trace.sample.tokens.column[row].amax()) + 1
    return min(26.0, max(6.0, 230.0 / columns))


def token_grid(
    trace: SinkTrace, row: int, image: int, values: Tensor
) -> tuple[Tensor, tuple[float, float, float, float]]:
    """Values ``[pos]`` of a row's image tokens as ``[row column]``, and where they lie in pixels.

    CLS and registers, which some projectors keep, have no place in the picture and are left out.
    """
    tokens = trace.sample.tokens
    own = (tokens.image[row] == image) & (tokens.row[row] >= 0)
    rows, columns = tokens.row[row, own], tokens.column[row, own]
    grid = torch.full((int(rows.max()) + 1, int(columns.max()) + 1), float("nan"))
    grid[rows, columns] = values[own].float()
    box = tokens.box[row, own]
    x0, y0 = box[:, :2].amin(dim=0).tolist()
    x1, y1 = box[:, 2:].amax(dim=0).tolist()
    return grid, (x0, x1, y1, y0)


def _draw_grid(ax: Axes, boxes: Tensor, low: list[float], high: list[float]) -> None:
    """The edges of all patches."""
    xs = torch.cat([boxes[:, 0], boxes[:, 2]]).unique().tolist()
    ys = torch.cat([boxes[:, 1], boxes[:, 3]]).unique().tolist()
    lines = [[(x, low[1]), (x, high[1])] for x in xs] + [[(low[0], y), (high[0], y)] for y in ys]
    width = 0.9 if len(xs) < 20 else 0.4
    for colour, thick in (("black", width), ("white", width / 2)):
        ax.add_collection(
            LineCollection(lines, colors=colour, linewidths=thick, alpha=0.55, zorder=1),
            autolim=False,
        )

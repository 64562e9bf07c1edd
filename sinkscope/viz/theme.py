"""The theme of all figures: fonts, colours, axes, panels and legends; and what viz reads of a trace."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any, TypeAlias, cast
from unicodedata import combining, east_asian_width

import pandas as pd
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import PowerNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from sinkscope.checks import is_whole
from sinkscope.errors import InputError, LayerError, SelectionError, SinkscopeError

Trace: TypeAlias = Any  # a `sinkscope.experiments.SinkTrace`, which stands above this room


def check_place(
    count: int, hint: str = "", *, error: type[SinkscopeError] = SelectionError, **given: Any
) -> None:
    """Refuse an index that is not one of 0 to ``count - 1``."""
    for name, value in given.items():
        if not is_whole(value, 0, count - 1):
            raise error(f"Got {name} {value!r}; expected 0 to {count - 1}{hint}.")


def check_has(what: Any, name: str, field: str, write: str) -> None:
    """Refuse a trace or result of another kind, which has no such field."""
    if isinstance(what, type) or not hasattr(what, field):
        raise InputError(f"Got {name} of type {type(what).__name__}; expected what {write} gives.")


def layers_of(trace: Trace, layer: int | None) -> list[int]:
    """The given LLM layer, or all; refuses one that is not there, and what is no trace."""
    check_has(trace, "trace", "l_detection", "ss.trace_sinks(lvlm, sample)")
    count = len(trace.l_detection.layers)
    if layer is None:
        return list(range(count))
    check_place(count, " or None for all layers of the LLM", error=LayerError, layer=layer)
    return [layer]


def images_of(trace: Trace, row: int) -> list[int]:
    """The images of a row, counted over the whole batch; refuses another row, and what is no trace."""
    check_has(trace, "trace", "l_detection", "ss.trace_sinks(lvlm, sample)")
    check_place(len(trace.sample), ", a row of the prepared batch", row=row)
    return (trace.sample.tokens.vision.batch_row == row).nonzero().flatten().tolist()


def check_table(table: pd.DataFrame, needed: str, wanted: str) -> None:
    """Refuse a table without some columns (names with blanks between), or without a line."""
    missing = sorted(set(needed.split()) - set(getattr(table, "columns", ())))
    if missing or not len(table):
        raise InputError(f"Got a table that lacks {missing or 'lines'}; expected {wanted}.")


BASE = "DejaVu Sans Mono"  # comes with matplotlib; every letter is as wide as every other
ASIAN = (  # fonts of common systems with Chinese, Japanese and Korean characters
    *("Noto Sans Mono CJK SC", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC"),
    *("Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS"),
)
MISSING = "▯"
ADVANCE = 0.65  # width of a letter of BASE over the font size, with room for rounding to pixels


@cache
def families() -> tuple[str, ...]:
    """The base font, and those of `ASIAN` that are installed."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    return (BASE, *(name for name in ASIAN if name in known))


@cache
def _covered() -> frozenset[int]:
    paths = [font_manager.findfont(name, fallback_to_default=False) for name in families()]
    return frozenset(code for path in paths for code in font_manager.get_font(path).get_charmap())


def drawable(text: str) -> str:
    """The text with `MISSING` for every character that no font here has."""
    return "".join(c if ord(c) in _covered() else MISSING for c in text)


def columns_of(text: str) -> int:
    """How many letters wide a text is: a Chinese character counts two, a combining accent none."""
    return sum(not combining(c) and 1 + (east_asian_width(c) in "WF") for c in text)


def cut(text: str, columns: int) -> str:
    """The text, shortened to so many columns."""
    if columns_of(text) <= columns:
        return text
    while columns_of(text) > columns - 1:
        text = text[:-1]
    return text + "…"


TITLE, LABEL, SMALL = 11, 10, 9  # font sizes in points
QUIET, INK, EDGE = "#6b6b6b", "#1c2127", "#b9bec4"
SHARES = "Purples"  # the colour map of shares of attention: no colour of a kind of sink
TICKS = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)
NULL: dict[str, Any] = {"linestyle": "--", "linewidth": 1.1}  # lines of uniform attention


@dataclass(frozen=True)
class Style:
    """The colour and the marker of one group of tokens."""

    colour: str
    marker: str

    @property
    def look(self) -> dict[str, Any]:
        """As keywords of matplotlib."""
        return {"color": self.colour, "marker": self.marker}


STYLES = {
    "V-sinks": Style("#D55E00", "o"),
    "L-sinks": Style("#0072B2", "s"),
    "text sinks": Style("#00795A", "^"),
    "attended": Style("#7B3FA0", "h"),
    "ordinary": Style("#5F5F5F", "D"),
    "text": Style("#B45C91", "v"),
}
# For groups of the user's own, and for layers and tasks.
OTHERS = list(map(Style, ("#56B4E9", "#E69F00", "#000000", "#8C510A"), "PX*p"))
PAINTS = ("#0072B2", "#D55E00", "#00795A", "#B45C91", "#E69F00", "#56B4E9")
SERIES = list(map(Style, PAINTS, "osD^vP"))
GROUP_OF = {"V": "V-sinks", "L": "L-sinks", "text": "text sinks", "attention": "attended"}


def style_of(group: str, place: int = 0) -> Style:
    """The style of a group; groups that are not in `STYLES` take turns by their ``place``."""
    return STYLES.get(group, OTHERS[place % len(OTHERS)])


def share_scale() -> PowerNorm:
    """A square-root scale: 0.01 lies at a tenth of it, 0.25 at a half."""
    return PowerNorm(0.5, 0.0, 1.0)


def colour_of(share: float) -> str:
    """The colour of a share as ``#rrggbb``."""
    return to_hex(colormaps[SHARES](float(share_scale()(min(max(share, 0.0), 1.0)))))


def ink_on(share: float) -> str:
    """The colour of letters that can be read on it."""
    return "#ffffff" if float(share_scale()(min(max(share, 0.0), 1.0))) > 0.55 else INK


class NotebookFigure(Figure):
    """A figure that pyplot does not know, so nobody has to close it; notebooks show it all the same."""

    def _repr_png_(self) -> bytes:
        picture = BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of ``size`` inches."""
    return NotebookFigure(figsize=size, layout="constrained")


def new_axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The given axes, or the axes of a new figure of ``size`` inches."""
    return new_figure(size).subplots() if ax is None else ax


def figure_of(ax: Axes) -> Figure:
    """The figure of some axes."""
    return cast("Figure", ax.get_figure())


def panels(figure: Figure, count: int, across: int, **shared: Any) -> list[Any]:
    """So many axes of a grid, the rest of its last line hidden."""
    axes = figure.subplots(-(-count // across), across, squeeze=False, **shared).flatten().tolist()
    for ax in axes[count:]:
        ax.set_visible(False)
    for ax in axes[max(0, count - across) : count]:
        ax.tick_params(labelbottom=True)
    return axes[:count]


def plain(ax: Axes, axis: Any = "y", hidden: Sequence[str] = ("top", "right")) -> None:
    """Small tick labels, a light grid, no frame."""
    ax.tick_params(labelsize=SMALL)
    ax.grid(visible=True, axis=axis, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[list(hidden)].set_visible(False)


def headline(figure: Figure, text: str) -> None:
    """The title of a figure of panels, in as many lines as it needs."""
    text = textwrap.fill(text, int(11.5 * figure.get_figwidth()))
    figure.suptitle(text, fontsize=TITLE, x=0.01, ha="left")


def label(ax: Axes, x: str = "", y: str = "") -> None:
    """Names of both axes."""
    ax.set_xlabel(x, fontsize=LABEL)
    ax.set_ylabel(y, fontsize=LABEL)


def say(ax: Axes, text: str, height: float = 0.5, **look: Any) -> None:
    """A quiet word in the middle of axes that show nothing."""
    ax.text(0.5, height, text, transform=ax.transAxes, ha="center", color=QUIET, **look)


def colour_bar(figure: Figure, picture: Any, axes: Any, label: str, **look: Any) -> Any:
    """A colour bar with small letters."""
    bar = figure.colorbar(picture, ax=axes, **look)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return bar


def plain_log(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10, ..., written without powers."""
    axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def entry(**look: Any) -> Line2D:
    """What a legend shows of a line or a marker."""
    return Line2D([], [], **look)


def legend_below(ax: Axes, entries: Mapping[str, Any] | None = None, points: float = 36.0) -> None:
    """A legend so many points under the axes, of the given entries or of all labelled artists."""
    down = ScaledTranslation(0.0, -points / 72, figure_of(ax).dpi_scale_trans)
    look: Any = {"fontsize": SMALL, "frameon": False, "borderaxespad": 0.0, "handlelength": 1.8}
    look |= {"loc": "upper left", "bbox_to_anchor": (0.0, 0.0), "ncols": 2, "columnspacing": 1.2}
    look |= {} if entries is None else {"handles": entries.values(), "labels": entries.keys()}
    ax.legend(**look, bbox_transform=ax.transAxes + down)


def finish(
    ax: Axes, title: str, x: str, y: str, entries: Any = None, points: float = 36.0
) -> Figure:
    """Add title, labels with units, readable ticks, a light grid and a legend; returns the figure."""
    ax.set_title(title, fontsize=TITLE, loc="left", pad=17)
    label(ax, x, y)
    plain(ax)
    legend_below(ax, entries, points)
    return figure_of(ax)


def legend_of(figure: Figure, entries: Mapping[str, Any], columns: int, **look: Any) -> Figure:
    """A legend under all panels of a figure; returns the figure."""
    look = {"loc": "outside lower left", "fontsize": SMALL, "frameon": False, **look}
    figure.legend(list(entries.values()), list(entries), ncols=columns, **look)
    return figure


def ticks_for(n: int, most: int = 7) -> list[int]:
    """Block indices to label: all of a few, else every second, fourth, ..."""
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100, n) if n <= s * most)
    return list(range(0, n, step))


def layer_ticks(axis: Axis, layers: Sequence[int], most: int = 7) -> None:
    """Label some of the places 0, 1, ... with the layers that stand there; -1 are the embeddings."""
    shown = ticks_for(len(layers), most)
    names = ["embed" if layers[i] == -1 else str(layers[i]) for i in shown]
    axis.set_ticks(shown, names, fontsize=SMALL)

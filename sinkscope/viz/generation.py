"""Sinks while the model speaks: one figure, and the same in words."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D
from torch import Tensor

from sinkscope.errors import SelectionError
from sinkscope.tokens import VISION_KINDS
from sinkscope.viz.layers import share
from sinkscope.viz.style import (
    COLOURS,
    LABEL,
    QUIET,
    SMALL,
    STYLES,
    TICKS,
    TITLE,
    cut,
    drawable,
    families,
    figure_of,
    new_axes,
    share_scale,
    ticks_for,
)
from sinkscope.viz.tables import aligned, neat, plural, ranges, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sinkscope.experiments.generation import GenerationTrace, SinkLife

SINKS, OTHERS = 12, 6
"""The most lines of each in a figure."""
STEPS_NAMED = 64
"""With more steps than this, only some of the words are written under the axis."""
GROUPS = {
    "V": "V-sinks",
    "L": "L-sinks",
    "text": "text sinks",
    "generated": "sinks born in the answer",
}
COLOUR = {kind: STYLES[group].colour for kind, group in GROUPS.items() if group in STYLES} | {
    "generated": "#E69F00"
}
WIDTH = 110
KEY = (
    "lives: it draws at the last step at which it is seen. dies: with the last step at which it draws. born: "
    "its state, computed at that step, meets the L rule in some layer."
)


@dataclass(frozen=True)
class Line:
    """One token in the figure.

    Attributes:
        pos: Its position.
        life: Its record, or None for a token that is no sink.
    """

    pos: int
    life: SinkLife | None = None


def plot_generation(trace: GenerationTrace, row: int = 0, *, ax: Axes | None = None) -> Figure:
    """What every sink draws at every step of an answer, and what the most attended other tokens do.

    A line is a token, a column a step, named by the word that it writes. The colour is the largest share that
    a head of the new query gives to the token, in any layer, on a square-root scale from 0 to 1; white where
    the token does not exist yet or is not seen, and where it is the query itself. A triangle marks the step
    at which a generated sink is born, a cross the last step at which a sink draws, if it dies before the end.

    Args:
        trace: Of ``trace_generation``.
        row: The row of the batch.
        ax: Where to draw, or None for a new figure.

    Returns:
        The figure.

    Raises:
        SelectionError: If there is no such row.
    """
    lines, left_out = _lines(trace, row)
    steps = _steps(trace, row)
    n_sinks = sum(line.life is not None for line in lines)
    size = (min(16.0, max(5.6, 3.6 + 0.19 * steps)), 2.3 + 0.26 * len(lines))
    ax = new_axes(ax, size)
    shown = trace.by_step()[row, :steps, [line.pos for line in lines]].T
    look: Any = {"aspect": "auto", "interpolation": "none", "norm": share_scale()}
    picture = ax.imshow(shown.numpy(), cmap=COLOURS, **look)
    bar = figure_of(ax).colorbar(picture, ax=ax, pad=0.01, ticks=TICKS, aspect=14)
    bar.ax.set_yticklabels([f"{tick:g}" for tick in TICKS])
    bar.set_label("share of the new query's\nattention, top head", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL - 1)
    if 0 < n_sinks < len(lines):
        ax.axhline(n_sinks - 0.5, color="#1c2127", linewidth=1)
    _name_axes(ax, trace, row, lines, steps)
    _draw_lives(ax, lines)
    name = f", row {row}" if len(trace.sequences) > 1 else ""
    ax.set_title(f"Sinks while the model speaks{name}", fontsize=TITLE, loc="left")
    _draw_key(ax, trace, row, n_sinks, left_out)
    return figure_of(ax)


def generation_text(trace: GenerationTrace, *, limit: int = 20) -> str:
    """The sinks of every row with their births, deaths and what they draw, for a terminal.

    Args:
        trace: Of ``trace_generation``.
        limit: The most sinks to list.

    Returns:
        Several lines without a line break at the end.
    """
    lives = trace.lives
    blocks = [f"{plural(trace.n_steps, 'step')}. {_counts(lives)}"]
    if trace.text is not None:
        blocks.append(
            "\n".join(textwrap.fill(f"Answer: {text.strip()}", WIDTH) for text in trace.text)
        )
    if lives:
        heads = [
            "kind",
            "token",
            "born",
            "last drawn",
            "fate",
            "draws at",
            "most",
            "null",
            "L rule in layers",
        ]
        many = len(trace.sequences) > 1
        table = [["row", *heads] if many else heads]
        for life in lives[:limit]:
            cells = _cells(life, _token(trace, life.batch, life.pos))
            table.append([str(life.batch), *cells] if many else cells)
        more = len(lives) - limit
        blocks.append(
            aligned(table) + (f"\n{plural(more, 'more sink')} not listed" if more > 0 else "")
        )
        blocks.append(textwrap.fill(KEY, WIDTH))
    says = (
        f"Draws: some head of the new query, in some layer, gives it {trace.draws:g} more than uniform "
        "attention.",
        f"L rule ({trace.chosen}): {neat(trace.detector)}",
    )
    blocks.append("\n".join(textwrap.fill(line, WIDTH) for line in says))
    return "\n\n".join(blocks)


def _counts(lives: Sequence[SinkLife]) -> str:
    """How many sinks there are in prompt and answer, and how many of the prompt's live."""
    if not lives:
        return "No sinks: no token of prompt or answer meets the L rule."
    old = [life for life in lives if life.kind != "generated"]
    alive = sum(life.fate == "alive" for life in old)
    born = sum(life.kind == "generated" and life.drawn_steps > 0 for life in lives)
    live = (
        f", of which {alive or 'none'} {'lives' if alive == 1 else 'live'} to the end"
        if old
        else ""
    )
    return f"{plural(len(old), 'sink')} in the prompt{live}; {plural(born, 'sink')} born in the answer."


def _cells(life: SinkLife, name: str) -> list[str]:
    fate = {"alive": "lives", "dead": "dies"}.get(life.fate, life.fate)
    most = (
        "-"
        if life.at is None
        else f"{share(life.max_mass)} (step {life.at[0]}, layer {life.at[1]})"
    )
    return [
        life.kind,
        f"{life.pos} {name}",
        f"step {life.born_step}" if life.kind == "generated" else "prompt",
        "-" if life.last_step is None else f"step {life.last_step}",
        fate,
        f"{life.drawn_steps} of {life.seen_steps} steps",
        most,
        "-" if life.at is None else share(life.null),
        ranges(life.layers),
    ]


def _steps(trace: GenerationTrace, row: int) -> int:
    """How many steps the row has before its answer has ended."""
    return int((~trace.null[row].isnan().all(dim=1)).sum())


def _lines(trace: GenerationTrace, row: int) -> tuple[list[Line], int]:
    """The sinks of a row by position, then the most attended others; and how many sinks are left out.

    Raises:
        SelectionError: If there is no such row.
    """
    rows = len(trace.sequences)
    if not 0 <= row < rows:
        raise SelectionError(f"Got row {row}; expected 0 to {rows - 1}. Write row=0 for the first.")
    own = [life for life in trace.lives if life.batch == row]
    kept = sorted(own, key=lambda life: (-life.drawn_steps, -life.max_mass))[:SINKS]
    sinks = [Line(life.pos, life) for life in sorted(kept, key=lambda life: life.pos)]
    total: Tensor = trace.by_step()[row].nan_to_num().sum(dim=0)
    total[[life.pos for life in own]] = -1.0
    order = total.argsort(descending=True, stable=True)[:OTHERS].tolist()
    others = [Line(pos) for pos in sorted(order) if total[pos] > 0]
    return sinks + others, len(own) - len(sinks)


def _token(trace: GenerationTrace, row: int, pos: int) -> str:
    """What a token is called beside its line."""
    tokens = trace.sample.tokens
    if pos < tokens.ids.shape[1] and int(tokens.image[row, pos]) >= 0:
        image, index = int(tokens.image[row, pos]), int(tokens.image_index[row, pos])
        kind = VISION_KINDS[int(tokens.vision.kind[index, int(tokens.sources[row, pos, 0])])]
        place = f"{int(tokens.row[row, pos])},{int(tokens.column[row, pos])}"
        return f"image {image} {'CLS' if kind == 'cls' else kind if kind == 'register' else place}"
    return cut(drawable(readable(trace.words[row][pos] if trace.words else None)), 16)


def _name_axes(
    ax: Axes, trace: GenerationTrace, row: int, lines: Sequence[Line], steps: int
) -> None:
    """Tokens at the left in the colour of their kind, and the words that the steps write below."""
    names = [f"{_token(trace, row, line.pos)}  {line.pos}" for line in lines]
    ax.set_yticks(range(len(lines)), names, fontsize=SMALL, parse_math=False)
    for label, line in zip(ax.get_yticklabels(), lines, strict=True):
        label.set_color(COLOUR[line.life.kind] if line.life else QUIET)
        label.set_fontweight("bold" if line.life else "normal")
    prompt = trace.sample.tokens.ids.shape[1]
    named = range(steps) if steps <= STEPS_NAMED else ticks_for(steps, STEPS_NAMED // 2)
    words = [_token(trace, row, prompt + step) for step in named]
    ax.set_xticks(list(named), words, rotation=90, fontsize=SMALL, parse_math=False)
    for label in (*ax.get_yticklabels(), *ax.get_xticklabels()):
        label.set_fontfamily(["DejaVu Sans", *families()])
    ax.set_xlabel("step, named by the token that it writes", fontsize=LABEL)
    ax.tick_params(length=2)


def _draw_lives(ax: Axes, lines: Sequence[Line]) -> None:
    """Births and deaths."""
    for place, line in enumerate(lines):
        life = line.life
        if life is None:
            continue
        look: Any = {"color": COLOUR[life.kind], "linestyle": "", "markeredgewidth": 2.0}
        if life.kind == "generated":
            ax.plot([life.born_step], [place], marker=">", markersize=7, **look)
        if life.last_step is not None and life.fate == "dead":
            ax.plot([life.last_step], [place], marker="x", markersize=6, **look)


def _draw_key(ax: Axes, trace: GenerationTrace, row: int, n_sinks: int, left_out: int) -> None:
    """What colours and marks mean, the null, and what was left out."""
    figure = figure_of(ax)
    own = [life for life in trace.lives if life.batch == row]
    kinds = [kind for kind in GROUPS if any(life.kind == kind for life in own)]
    look: Any = {"color": QUIET, "linestyle": "", "markeredgewidth": 2, "markersize": 6}
    key = {GROUPS[kind]: Line2D([], [], color=COLOUR[kind], linewidth=5) for kind in kinds}
    if "generated" in kinds:
        key["born"] = Line2D([], [], marker=">", **look)
    if any(life.fate == "dead" for life in own):
        key["draws for the last time"] = Line2D([], [], marker="x", **look)
    flat = trace.null[row][~trace.null[row].isnan()]
    says = (
        "sinks above the line, the most attended others below" if n_sinks else "sinks: none found"
    )
    says += f"; uniform attention (null) would give {share(float(flat.min()))}"
    says += f" to {share(float(flat.max()))}"
    if left_out:
        says += f"; {plural(left_out, 'sink')} that draw less not shown"
    wide = figure.get_figwidth()
    figure.legend(
        key.values(), key.keys(), loc="outside lower left", ncols=3 if wide < 9 else 6, fontsize=SMALL,
        frameon=False, title=textwrap.fill(says, int(13 * wide)), title_fontsize=SMALL, alignment="left",
        columnspacing=1.2, handlelength=1.2,
    )  # fmt: skip

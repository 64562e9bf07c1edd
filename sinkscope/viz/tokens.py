"""Tokens one by one: a prompt as chips, one per text token or image; sinks while the model speaks."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sinkscope.viz import theme
from sinkscope.viz.image import shown_records
from sinkscope.viz.tables import MARKS, aligned, plural, ranges, render, share, short, token_name
from sinkscope.viz.theme import GROUP_OF, LABEL, QUIET, SMALL, STYLES, TICKS, TITLE, Trace

SEEN = 8  # queries that must see a token before its mean says more than what it gives to itself
# Points of a letter; letters of a line, of the positions beside it, and of a chip.
LETTER, COLUMNS, MARGIN, LONGEST = 8.6, 96, 6, 48
INCHES = LETTER * theme.ADVANCE / 72  # width of a letter
# Inches: a line of chips, the title, the bar and the kinds of sinks, a line of notes.
LINE, TOP, BELOW, NOTE = 0.29, 0.5, 0.95, 0.17

SINKS, OTHERS = 12, 6  # the most lines of each in the figure of an answer
GROUPS = {"V": "V-sinks", "L": "L-sinks", "text": "text sinks"}
COLOUR = {kind: STYLES[group].colour for kind, group in GROUPS.items()} | {"generated": "#E69F00"}
GROUPS["generated"] = "sinks born in the answer"
HEADS = ("row", "kind", "token", "born", "last drawn", "fate", "draws at", "most", "null")


@dataclass(frozen=True)
class Chip:
    """One token, or the patches of one image, from a first to a last position."""

    text: str
    first: int
    last: int
    share: float | None  # the largest of one of its tokens; None where too few queries see it
    null: float  # what uniform attention gives there
    at: tuple[int, int, int]  # its position, LLM layer and head
    sinks: dict[str, int]  # how many of each kind

    @property
    def kind(self) -> str | None:
        """The kind of its first sink."""
        return next(iter(self.sinks), None)

    @property
    def marked(self) -> str:
        """The text behind the marks of its sinks: ``▲``, or ``● 2`` where it holds several tokens."""
        many = self.last > self.first
        marks = [f"{MARKS[kind]}{f' {n}' if many else ''}" for kind, n in self.sinks.items()]
        return " ".join([*marks, self.text])


def chips_of(trace: Trace, row: int = 0, layer: int | None = None) -> list[Chip]:
    """The prompt of a row without padding; the largest share over all layers, or of one layer."""
    layers = theme.layers_of(trace, layer)
    kinds = {record.pos: record.kind for record in shown_records(trace, row, layer)}
    tokens, got = trace.sample.tokens, trace.language.by_key
    most, heads, null = (x[row, layers] for x in (got.most, got.most_head, got.null))
    seen = tokens.live[row].flip(0).cumsum(0).flip(0)  # a token is seen by itself and what follows
    out = []

    def chip_of(pos: int) -> tuple[str, int]:  # one of all patches of an image
        name, patch = token_name(tokens, row, pos, tokens.words)
        return (name.rpartition(" ")[0], -1) if patch else (name, pos)

    for name, group in groupby(tokens.live[row].nonzero().flatten().tolist(), chip_of):
        places = list(group)
        part = most[:, places].nan_to_num()
        index, key = (int(i) for i in torch.unravel_index(part.argmax(), part.shape))
        held = [kinds[pos] for pos in places if pos in kinds]
        share, (word, own) = float(part[index, key]), name
        out.append(
            Chip(
                word if own >= 0 else f"{word}: {len(places)} tokens, max {short(share, 2)}",
                first=places[0],
                last=places[-1],
                share=share if int(seen[places[0]]) >= SEEN else None,
                null=float(null[index, places[key]]),
                at=(places[key], layers[index], int(heads[index, places[key]])),
                sinks={kind: held.count(kind) for kind in MARKS if kind in held},
            )
        )
    return out


def strip_of(trace: Trace, row: int, layer: int | None = None) -> tuple[Any, ...]:
    """The chips of a row, the title, what a reader must know, and how many sinks of each kind."""
    chips = chips_of(trace, row, layer)
    where = "heads and layers" if layer is None else f"the heads of layer {layer}"
    title = f"Attention that every token of the prompt receives, largest over {where}"
    nulls = [chip.null for chip in chips if chip.share is not None]
    notes = []
    if nulls:
        between = f"{short(min(nulls), 2)} to {short(max(nulls), 2)}"
        notes.append(f"under uniform attention (null) these tokens would receive {between}")
    if len(nulls) < len(chips):
        notes.append(f"dashed: fewer than {SEEN} queries see the token, so it has no colour")
    held = {kind: sum(chip.sinks.get(kind, 0) for chip in chips) for kind in MARKS}
    found = {kind: f" ({count})" if count else ": none found" for kind, count in held.items()}
    kinds = [(kind, f"{MARKS[kind]} {GROUP_OF[kind]}{text}") for kind, text in found.items()]
    return chips, title, notes, kinds


def tokens_html(trace: Trace, row: int = 0, *, layer: int | None = None) -> str:
    """Write `plot_tokens` as a ``<div>`` of HTML, whose chips tell position, layer, head and null."""
    return render("tokens.html", strip=strip_of(trace, row, layer))


def plot_tokens(trace: Trace, row: int = 0, *, layer: int | None = None) -> Figure:
    """Draw every token of the prompt, coloured by the largest share of attention it receives.

    The share is the mean over the queries that see the token, in the head that gives it the most, on a
    square-root scale from 0 to 1; none if fewer than 8 queries see it. Sinks have an outline and a mark of
    their kind. All patches of an image share one chip; CLS and registers have their own. Numbers at the
    left are positions. With ``layer`` it is one LLM layer, with the sinks of that layer.
    """
    chips, title, notes, kinds = strip_of(trace, row, layer)
    lines = _lines(chips)
    if any(theme.MISSING in text for line in lines for _, text, _ in line):
        notes.append(f"{theme.MISSING}: no font on this machine has the character")
    inner, below = (MARGIN + COLUMNS + 1) * INCHES, BELOW + NOTE * len(notes)
    wide, tall = inner + 0.3, TOP + LINE * len(lines) + below
    figure = theme.new_figure((wide, tall))
    figure.set_layout_engine("none")
    ax = figure.add_axes((0.15 / wide, below / tall, inner / wide, LINE * len(lines) / tall))
    ax.set(xlim=(-MARGIN, COLUMNS + 1), ylim=(len(lines) - 0.5, -0.5))
    ax.axis("off")
    for place, line in enumerate(lines):
        _draw_line(ax, place, line)
    title += f" (row {row})" if len(trace.sample) > 1 else ""
    figure.text(0.15 / wide, 1 - 0.1 / tall, title, fontsize=TITLE, va="top")
    left, base = 0.15 + MARGIN * INCHES, NOTE * len(notes)
    bar = figure.add_axes((left / wide, (base + 0.48) / tall, 2.6 / wide, 0.13 / tall))
    scale = ScalarMappable(theme.share_scale(), theme.SHARES)
    figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=TICKS)
    bar.set_xticklabels([f"{tick:g}" for tick in TICKS])
    bar.tick_params(labelsize=SMALL - 1)
    bar.set_title("share of a query's attention", fontsize=SMALL, loc="left", pad=4)
    for i, (kind, text) in enumerate(kinds):
        y, colour = (base + 0.68 - 0.18 * i) / tall, STYLES[GROUP_OF[kind]].colour
        figure.text((left + 3.2) / wide, y, text, fontsize=SMALL, color=colour)
    for i, note in enumerate(reversed(notes)):
        figure.text(left / wide, (0.08 + NOTE * i) / tall, note, fontsize=SMALL, color=QUIET)
    return figure


def _lines(chips: Sequence[Chip]) -> list[list[tuple[int, str, Chip]]]:
    """The chips of every line, with the column where each begins and what is written on it."""
    lines: list[list[tuple[int, str, Chip]]] = [[]]
    at = 0
    for chip in chips:
        text = theme.drawable(theme.cut(chip.marked, LONGEST))
        wide = theme.columns_of(text) + 2
        if lines[-1] and at + wide - 1 > COLUMNS:
            at = 0
            lines.append([])
        lines[-1].append((at, text, chip))
        at += wide
    return lines


def _draw_line(ax: Axes, place: int, line: Sequence[tuple[int, str, Chip]]) -> None:
    """One line, and the position of its first token."""
    look: Any = {"family": list(theme.families()), "va": "center_baseline", "parse_math": False}
    first = line[0][2].first
    ax.text(-0.8, place, str(first), ha="right", color=QUIET, fontsize=SMALL - 2, va="center")
    for at, text, chip in line:
        edge = STYLES[GROUP_OF[chip.kind]].colour if chip.kind else theme.EDGE
        box = Rectangle((at, place - 0.4), theme.columns_of(text) + 1.2, 0.8, edgecolor=edge)
        box.set_facecolor("white" if chip.share is None else theme.colour_of(chip.share))
        box.set_linewidth(2.2 if chip.kind else 0.6)
        box.set_linestyle((0, (3, 2)) if chip.share is None and not chip.kind else "-")
        ax.add_patch(box)
        ink = theme.INK if chip.share is None else theme.ink_on(chip.share)
        ax.text(at + 0.6, place, text, fontsize=LETTER, color=ink, **look)


def plot_generation(trace: Any, row: int = 0, *, ax: Axes | None = None) -> Figure:
    """Draw what every sink draws at every step of an answer, and the most attended other tokens.

    A line is a token, a column a step. The colour is the largest share that a head of the new query gives
    to the token, in any layer, on a square-root scale from 0 to 1; white where the token is not there yet,
    is not seen, or is the query. A triangle marks the step at which a generated sink is born, a cross the
    last step at which a sink draws, if it dies before the end.
    """
    theme.check_place(len(trace.sequences), row=row)
    own = [life for life in trace.lives if life.batch == row]
    lives = sorted(own, key=lambda life: (-life.drawn_steps, -life.max_mass))[:SINKS]
    lives = sorted(lives, key=lambda life: life.pos)
    total = trace.by_step()[row].nan_to_num().sum(dim=0)
    total[[life.pos for life in own]] = -1.0
    order = total.argsort(descending=True, stable=True)[:OTHERS].tolist()
    others = sorted(pos for pos in order if total[pos] > 0)
    places = [*(life.pos for life in lives), *others]
    steps = int((~trace.null[row].isnan().all(dim=1)).sum())  # until the answer has ended
    wide = min(16.0, max(5.6, 3.6 + 0.19 * steps))
    ax = theme.new_axes(ax, (wide, 2.3 + 0.26 * len(places)))
    shown = trace.by_step()[row, :steps, places].T
    look: Any = {"aspect": "auto", "interpolation": "none", "norm": theme.share_scale()}
    picture = ax.imshow(shown.numpy(), cmap=theme.SHARES, **look)
    label = "share of the new query's\nattention, top head"
    look = {"pad": 0.01, "ticks": TICKS, "aspect": 14}
    bar = theme.colour_bar(theme.figure_of(ax), picture, ax, label, **look)
    bar.ax.set_yticklabels([f"{tick:g}" for tick in TICKS], fontsize=SMALL - 1)
    if lives and others:
        ax.axhline(len(lives) - 0.5, color=theme.INK, linewidth=1)
    kinds = [life.kind for life in lives] + [""] * len(others)
    _name_axes(ax, trace, row, dict(zip(places, kinds, strict=True)), steps)
    for place, life in enumerate(lives):
        look = {"color": COLOUR[life.kind], "linestyle": "", "markeredgewidth": 2.0}
        if life.kind == "generated":
            ax.plot([life.born_step], [place], marker=">", markersize=7, **look)
        if life.last_step is not None and life.fate == "dead":
            ax.plot([life.last_step], [place], marker="x", markersize=6, **look)
    name = f", row {row}" if len(trace.sequences) > 1 else ""
    ax.set_title(f"Sinks while the model speaks{name}", fontsize=TITLE, loc="left")
    flat = trace.null[row][~trace.null[row].isnan()]
    low, high = share(float(flat.min())), share(float(flat.max()))
    null = f"uniform attention (null) would give {low} to {high}"
    return _draw_key(theme.figure_of(ax), own, null)


def _token(trace: Any, row: int, pos: int) -> str:
    name, patch = token_name(trace.sample.tokens, row, pos, trace.words)
    return name if patch else theme.cut(theme.drawable(name), 16)


def _name_axes(ax: Axes, trace: Any, row: int, kinds: dict[int, str], steps: int) -> None:
    names = [f"{_token(trace, row, pos)}  {pos}" for pos in kinds]
    ax.set_yticks(range(len(names)), names, fontsize=SMALL, parse_math=False)
    for label, kind in zip(ax.get_yticklabels(), kinds.values(), strict=True):
        label.set_color(COLOUR.get(kind, QUIET))
        label.set_fontweight("bold" if kind else "normal")
    prompt = trace.sample.tokens.ids.shape[1]
    named = list(range(steps)) if steps <= 64 else theme.ticks_for(steps, 32)
    words = [_token(trace, row, prompt + step) for step in named]
    ax.set_xticks(named, words, rotation=90, fontsize=SMALL, parse_math=False)
    for label in (*ax.get_yticklabels(), *ax.get_xticklabels()):
        label.set_fontfamily(["DejaVu Sans", *theme.families()])
    ax.set_xlabel("step, named by the token that it writes", fontsize=LABEL)
    ax.tick_params(length=2)


def _draw_key(figure: Figure, own: Sequence[Any], null: str) -> Figure:
    kinds = [kind for kind in GROUPS if any(life.kind == kind for life in own)]
    look: Any = {"color": QUIET, "linestyle": "", "markeredgewidth": 2, "markersize": 6}
    key = {GROUPS[kind]: theme.entry(color=COLOUR[kind], linewidth=5) for kind in kinds}
    if "generated" in kinds:
        key["born"] = theme.entry(marker=">", **look)
    if any(life.fate == "dead" for life in own):
        key["draws for the last time"] = theme.entry(marker="x", **look)
    above = "sinks above the line, the most attended others below" if own else "sinks: none found"
    more = len(own) - SINKS
    null += f"; {plural(more, 'sink')} that draw less not shown" if more > 0 else ""
    wide = figure.get_figwidth()
    look = {"title_fontsize": SMALL, "alignment": "left", "columnspacing": 1.2, "handlelength": 1.2}
    title = textwrap.fill(f"{above}; {null}", int(13 * wide))
    return theme.legend_of(figure, key, 3 if wide < 9 else 6, title=title, **look)


def generation_text(trace: Any, *, limit: int = 20) -> str:
    """Write, for a terminal, at most ``limit`` sinks with births, deaths and what they draw."""
    table = [[*HEADS, "L rule in layers"]]
    table += [_cells(life, _token(trace, life.batch, life.pos)) for life in trace.lives[:limit]]
    cells = aligned([line[len(trace.sequences) == 1 :] for line in table])
    return render("generation.txt", trace=trace, limit=limit, table=cells)


def _cells(life: Any, name: str) -> list[str]:
    most = life.at and f"{share(life.max_mass)} (step {life.at[0]}, layer {life.at[1]})"
    return [
        str(life.batch),
        life.kind,
        f"{life.pos} {name}",
        f"step {life.born_step}" if life.kind == "generated" else "prompt",
        "-" if life.last_step is None else f"step {life.last_step}",
        {"alive": "lives", "dead": "dies"}.get(life.fate) or life.fate,
        f"{life.drawn_steps} of {life.seen_steps} steps",
        most or "-",
        share(life.null) if life.at else "-",
        ranges(life.layers),
    ]

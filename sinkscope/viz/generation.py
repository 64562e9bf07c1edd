"""Sinks while the model speaks: one figure, and the same in words."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sinkscope.viz import theme
from sinkscope.viz.tables import aligned, neat, plural, ranges, share, token_name, wrapped
from sinkscope.viz.theme import LABEL, QUIET, SMALL, STYLES, TICKS, TITLE

SINKS, OTHERS = 12, 6  # the most lines of each in a figure

GROUPS = {"V": "V-sinks", "L": "L-sinks", "text": "text sinks"}
COLOUR = {kind: STYLES[group].colour for kind, group in GROUPS.items()} | {"generated": "#E69F00"}
GROUPS["generated"] = "sinks born in the answer"
HEADS = ("row", "kind", "token", "born", "last drawn", "fate", "draws at", "most", "null")
KEY = (
    "lives: it draws at the last step at which it is seen. dies: with the last step at which it draws. "
    "born: its state, computed at that step, meets the L rule in some layer."
)


def plot_generation(trace: Any, row: int = 0, *, ax: Axes | None = None) -> Figure:
    """Draw what every sink draws at every step of an answer, and the most attended other tokens.

    A line is a token, a column a step. The colour is the largest share that a head of the new query gives
    to the token, in any layer, on a square-root scale from 0 to 1; white where the token is not there yet,
    is not seen, or is the query. A triangle marks the step at which a generated sink is born, a cross the
    last step at which a sink draws, if it dies before the end.
    """
    theme.check_place(len(trace.sequences), row=row)
    own = [life for life in trace.lives if life.batch == row]
    lives, others = _lines(trace, row, own)
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
    return _draw_key(theme.figure_of(ax), own, len(own) - len(lives), null)


def _lines(trace: Any, row: int, own: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The sinks that draw most, and the other tokens that receive most, both by position."""
    kept = sorted(own, key=lambda life: (-life.drawn_steps, -life.max_mass))[:SINKS]
    total = trace.by_step()[row].nan_to_num().sum(dim=0)
    total[[life.pos for life in own]] = -1.0
    order = total.argsort(descending=True, stable=True)[:OTHERS].tolist()
    return sorted(kept, key=lambda life: life.pos), sorted(pos for pos in order if total[pos] > 0)


def _token(trace: Any, row: int, pos: int) -> str:
    """What a token is called beside its line."""
    name, patch = token_name(trace.sample.tokens, row, pos, trace.words)
    return name if patch else theme.cut(theme.drawable(name), 16)


def _name_axes(ax: Axes, trace: Any, row: int, kinds: dict[int, str], steps: int) -> None:
    """Tokens at the left in the colour of their kind, and the words that the steps write below."""
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


def _draw_key(figure: Figure, own: Sequence[Any], left_out: int, null: str) -> Figure:
    """What colours and marks mean, the null, and what was left out."""
    kinds = [kind for kind in GROUPS if any(life.kind == kind for life in own)]
    look: Any = {"color": QUIET, "linestyle": "", "markeredgewidth": 2, "markersize": 6}
    key = {GROUPS[kind]: theme.entry(color=COLOUR[kind], linewidth=5) for kind in kinds}
    if "generated" in kinds:
        key["born"] = theme.entry(marker=">", **look)
    if any(life.fate == "dead" for life in own):
        key["draws for the last time"] = theme.entry(marker="x", **look)
    above = "sinks above the line, the most attended others below" if own else "sinks: none found"
    more = f"; {plural(left_out, 'sink')} that draw less not shown" if left_out else ""
    wide = figure.get_figwidth()
    look = {"title_fontsize": SMALL, "alignment": "left", "columnspacing": 1.2, "handlelength": 1.2}
    title = textwrap.fill(f"{above}; {null}{more}", int(13 * wide))
    return theme.legend_of(figure, key, 3 if wide < 9 else 6, title=title, **look)


def generation_text(trace: Any, *, limit: int = 20) -> str:
    """Write, for a terminal, at most ``limit`` sinks with births, deaths and what they draw."""
    lives = trace.lives
    blocks = [f"{plural(trace.n_steps, 'step')}. {_counts(lives)}"]
    if trace.text is not None:
        blocks.append("\n".join(wrapped(f"Answer: {text.strip()}") for text in trace.text))
    if lives:
        table = [[*HEADS, "L rule in layers"]]
        table += [_cells(life, _token(trace, life.batch, life.pos)) for life in lives[:limit]]
        cells = aligned([line[len(trace.sequences) == 1 :] for line in table])
        more = len(lives) - limit
        blocks.append(cells + (f"\n{plural(more, 'more sink')} not listed" if more > 0 else ""))
        blocks.append(wrapped(KEY))
    draws = "Draws: some head of the new query, in some layer, gives it"
    says = wrapped(f"{draws} {trace.draws:g} more than uniform attention.")
    blocks.append(f"{says}\n{wrapped(f'L rule ({trace.chosen}): {neat(trace.detector)}')}")
    return "\n\n".join(blocks)


def _counts(lives: Sequence[Any]) -> str:
    """How many sinks there are in prompt and answer, and how many of the prompt's live."""
    if not lives:
        return "No sinks: no token of prompt or answer meets the L rule."
    old = [life for life in lives if life.kind != "generated"]
    alive = sum(life.fate == "alive" for life in old)
    born = sum(life.kind == "generated" and life.drawn_steps > 0 for life in lives)
    live = f", of which {alive or 'none'} {'lives' if alive == 1 else 'live'} to the end"
    prompt = f"{plural(len(old), 'sink')} in the prompt{live if old else ''}"
    return f"{prompt}; {plural(born, 'sink')} born in the answer."


def _cells(life: Any, name: str) -> list[str]:
    most, null = "-", "-"
    if life.at is not None:
        most = f"{share(life.max_mass)} (step {life.at[0]}, layer {life.at[1]})"
        null = share(life.null)
    return [
        str(life.batch),
        life.kind,
        f"{life.pos} {name}",
        f"step {life.born_step}" if life.kind == "generated" else "prompt",
        "-" if life.last_step is None else f"step {life.last_step}",
        {"alive": "lives", "dead": "dies"}.get(life.fate) or life.fate,
        f"{life.drawn_steps} of {life.seen_steps} steps",
        most,
        null,
        ranges(life.layers),
    ]

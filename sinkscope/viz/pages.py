"""The figures of a report: their names, captions and what they say to somebody who cannot see them."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from sinkscope.errors import InputError
from sinkscope.probes import ReceivedResult
from sinkscope.viz.image import plot_received_map, plot_sinks_on_image
from sinkscope.viz.layers import (
    heads_of,
    plot_detections,
    plot_heads,
    plot_mass_by_layer,
    plot_received_by_layer,
    plot_received_heads,
    plot_spikes,
    share,
    top_of,
)
from sinkscope.viz.prompt import CSS as STRIP
from sinkscope.viz.prompt import chips_of, strip
from sinkscope.viz.style import GROUP_OF, STYLES, images_of
from sinkscope.viz.tables import (
    KINDS,
    SINKS,
    columns_for,
    counts,
    flagged_share,
    frame_table,
    neat,
    nothing_html,
    of_kind,
    short,
    sink_table,
    warnings_html,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from sinkscope.experiments.tracing import SinkTrace
    from sinkscope.probes import MassResult


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        name: Of its file, without the ending.
        caption: What it shows and how to read it.
        alt: What it says, in words and numbers.
        draw: Draws it.
    """

    name: str
    caption: str
    alt: str
    draw: Callable[[], Figure]


def pictures_of(
    trace: SinkTrace,
    mass: MassResult | None = None,
    decoys: Mapping[str, Tensor] | None = None,
) -> Iterator[Picture]:
    """The figures of every row: its images, then its layers."""
    for row in range(len(trace.sample)):
        name = f"row{row}_" if len(trace.sample) > 1 else ""
        for image in range(len(images_of(trace, row))):
            yield from _image_pictures(trace, row, image, name, decoys)
        yield _received(trace, row, name)
        yield _heads(trace, mass, row, name)
        if mass is not None:
            yield _mass(trace, mass, row, name)
        yield _spikes(trace, row, name)
        yield _detections(trace, row, name)


def _image_pictures(
    trace: SinkTrace, row: int, image: int, name: str, decoys: Mapping[str, Tensor] | None
) -> Iterator[Picture]:
    yield Picture(
        f"{name}sinks_image{image}",
        "The picture under the patch grid of the vision tower. Circles are V-sinks, squares L-sinks, "
        "hexagons patches that draw attention without a spike; text sinks are listed under the picture.",
        _sinks_in_words(trace, row, image),
        partial(plot_sinks_on_image, trace, row, image, decoys=decoys),
    )
    own = trace.sample.tokens.image[row] == image
    times = trace.language.received.times_null()[row].nan_to_num()
    over = times.mean(dim=1)[:, own].amax(dim=0)
    yield Picture(
        f"{name}received_image{image}",
        "Attention that other tokens give every image token in the LLM, as a multiple of uniform "
        "attention: mean over heads, largest over layers.",
        f"Heat map over image {image}: image tokens receive between {short(float(over.min()))} and "
        f"{short(float(over.max()))} times their null.",
        partial(plot_received_map, trace, row, image),
    )


def _sinks_in_words(trace: SinkTrace, row: int, image: int) -> str:
    parts = []
    for kind, noun in list(SINKS.items())[:2]:
        found = [r for r in of_kind(trace, kind, row) if r.image == image]
        cells = "; ".join(f"{r.row},{r.column}" for r in found[:12])
        more = f" and {len(found) - 12} more" if len(found) > 12 else ""
        parts.append(f"{noun}s at row,column {cells}{more}" if found else f"{noun}s: none found")
    return f"Image {image} with its patch grid. {'. '.join(parts)}."


def _received(trace: SinkTrace, row: int, name: str) -> Picture:
    return Picture(
        f"{name}received_by_layer",
        "Attention that one token of each kind receives, by LLM layer, on a logarithmic scale. "
        "Dashed: the same tokens under uniform attention.",
        f"Line plot of attention received by layer for {counts(trace, row)}, ordinary image tokens "
        "and text, each with its null.",
        partial(plot_received_by_layer, trace, row),
    )


def _heads(trace: SinkTrace, mass: MassResult | None, row: int, name: str) -> Picture:
    """Layer x head: the mass on all text sinks or, without it, what the most attended token receives."""
    if mass is not None and "text sinks" in mass.groups and bool(trace.text_sinks()[row].any()):
        values, null = heads_of(mass, "text sinks", row)
        what, draw = "the text sinks", partial(plot_heads, mass, "text sinks", row)
    else:
        pos = most_attended(trace, row)
        result = ReceivedResult(trace.received, trace.null, trace.l_detection.layers)
        values, null = trace.received[row, :, :, pos], trace.null[row, :, pos]
        what, draw = f"the token at {pos}", partial(plot_received_heads, result, pos, row)
    layer, head, top = top_of(values)
    flat = "" if null is None else f"; uniform attention would give {share(float(null[layer]))}"
    return Picture(
        f"{name}heads",
        f"How much attention every head of the LLM gives to {what}, mean over queries. The frame marks "
        "the head that gives the most.",
        f"Heat map of layers and heads. Layer {trace.l_detection.layers[layer]}, head {head} gives {what} "
        f"the most, {share(top)} of its attention{flat}.",
        draw,
    )


def most_attended(trace: SinkTrace, row: int) -> int:
    """The text sink that receives the most in some head; without any, the token that does."""
    chips = chips_of(trace, row)
    sinks = [chip for chip in chips if "text" in chip.sinks]
    return max(sinks or chips, key=lambda chip: (chip.share or 0.0) - chip.null).at[0]


def _mass(trace: SinkTrace, mass: MassResult, row: int, name: str) -> Picture:
    means = mass.mass[row].nanmean(dim=(1, 2)).mean(dim=0).tolist()
    words = ", ".join(
        f"{group} {short(value)}" for group, value in zip(mass.groups, means, strict=True)
    )
    return Picture(
        f"{name}mass_by_layer",
        "How the attention of the LLM divides between the kinds of tokens, by layer. Dashed: uniform "
        "attention under the same mask.",
        f"Line plot of attention mass by layer. Means over layers: {words}.",
        partial(plot_mass_by_layer, mass, row),
    )


def _spikes(trace: SinkTrace, row: int, name: str) -> Picture:
    vision = float(trace.vit_spikes[images_of(trace, row)].max())
    language = float(trace.llm_spikes[row].max())
    return Picture(
        f"{name}spikes",
        "The largest activation of every block over the median magnitude of that block, in both "
        "towers. About 1000 is called massive (Sun et al., 2402.17762).",
        f"Line plot. The largest activation is {short(vision)} medians in the vision tower and "
        f"{short(language)} in the LLM.",
        partial(plot_spikes, trace, row),
    )


def _detections(trace: SinkTrace, row: int, name: str) -> Picture:
    vision = float(trace.v_detection.fraction[images_of(trace, row)].max())
    language = float(trace.l_detection.fraction[row].max())
    return Picture(
        f"{name}flagged",
        "Share of the image tokens that each rule flags, by block. Above 20 % a rule is saturated: it "
        "finds the scale of the model and no sinks. In the vision tower only the blocks that feed "
        "the projector decide.",
        f"Line plot. The V rule flags at most {vision:.1%} of a block's patches, the L rule at most "
        f"{language:.1%} of a layer's image tokens.",
        partial(plot_detections, trace, row),
    )


CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  color: #1c2127; background: #f5f6f7; }
main, header > div { max-width: 1240px; margin: 0 auto; padding: 0 24px; }
header { background: #12343b; color: #fff; padding: 28px 0 24px; }
header h1 { margin: 0 0 4px; font-size: 1.7rem; }
header p { margin: 0; color: #d5e4e6; }
section { background: #fff; border: 1px solid #dfe3e6; border-radius: 8px; padding: 18px 22px; margin: 20px 0; }
h2 { font-size: 1.15rem; margin: 0 0 12px; }
h3 { font-size: 1rem; margin: 14px 0 4px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 16px; margin: 20px 0; }
.card { background: #fff; border: 1px solid #dfe3e6; border-left: 6px solid; border-radius: 8px; padding: 12px 18px; }
.card b { display: block; font-size: 1.5rem; line-height: 1.3; }
.card span { color: #4a5560; font-size: .9rem; }
table { border-collapse: collapse; width: 100%; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; white-space: nowrap; padding: 6px 8px; border-bottom: 1px solid #e6e9ec; vertical-align: top; }
th { background: #f0f3f4; font-weight: 600; white-space: normal; vertical-align: bottom; }
tbody tr:hover { background: #f8fafb; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 22px; }
figure { margin: 0; }
figure img { width: 100%; height: auto; border: 1px solid #e6e9ec; border-radius: 4px; }
figcaption { font-size: .85rem; color: #4a5560; margin-top: 6px; }
dt { font-weight: 600; margin-top: 8px; }
dd { margin: 0 0 0 1.2em; color: #38424c; }
dl.glossary { columns: 2 400px; column-gap: 32px; font-size: .88rem; margin: 0; }
dl.glossary > div { break-inside: avoid; }
.warnings { background: #fff4e5; border: 1px solid #e8b36a; border-radius: 8px; padding: 12px 18px; margin: 20px 0; }
.warnings ul { margin: 6px 0 0; padding-left: 1.2em; }
code { background: #eef1f3; border-radius: 4px; padding: 1px 5px; font-size: .88em; overflow-wrap: anywhere; }
footer { color: #4a5560; font-size: .85rem; padding: 0 0 28px; }
@media (max-width: 700px) { .cards { grid-template-columns: 1fr; }
  .figures { grid-template-columns: 1fr; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Shown:
    """A figure and its PNG file's bytes."""

    picture: Picture
    png: bytes


def make_page(
    trace: SinkTrace, shown: Sequence[Shown], title: str, tables: Mapping[str, pd.DataFrame]
) -> str:
    """The whole page.

    Args:
        trace: The trace.
        shown: Its figures, in order.
        title: The heading.
        tables: Heading -> table, shown after the sinks.
    """
    sections = [_section("The sinks", sink_table(trace))]
    if trace.outcomes:
        sections.append(_section("Where nothing is flagged", nothing_html(trace)))
    sections += [_section(head, frame_table(table)) for head, table in tables.items()]
    sections.append(_section("The prompt, token by token", _strips(trace)))
    sections.append(_section("Figures", _figures(shown)))
    sections.append(_section("How they were found", _detectors(trace)))
    sections.append(_section("Sinks by LLM layer", frame_table(trace.overlap_table()), OVERLAP))
    sections.append(_section("What the columns mean", _glossary(trace)))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}{STRIP}</style>\n</head>\n<body>\n"
        f"<header><div><h1>{escape(title)}</h1>{_prompts(trace)}</div></header>\n<main>\n"
        f"{_cards(trace)}\n{warnings_html(trace)}\n" + "\n".join(sections) + f"\n{FOOTER}\n"
        "</main>\n</body>\n</html>\n"
    )


OVERLAP = (
    "<p>Counts over all rows of the batch. A V-sink that meets the L rule in a layer is counted as V, "
    "and once more in the column that says so.</p>"
)

WRITTEN = "Written by sinkscope."

"""How a page of ours is known."""

FOOTER = (
    '<footer><p>Beside this page: <a href="sinks.csv">sinks.csv</a>, <a href="tokens.csv">tokens.csv</a>, '
    '<a href="trace.json">trace.json</a> and the folder <a href="figures/">figures</a>. Layers, heads, rows '
    f"and columns count from 0. {WRITTEN}</p></footer>"
)

ABOUT = {
    "V": "born in the vision tower",
    "L": "visual tokens that became sinks in the LLM",
    "text": "outside the image, such as BOS",
    "attention": "the vision tower attends to it throughout, without a spike that the V rule flags",
}


def _section(head: str, body: str, intro: str = "") -> str:
    return f"<section><h2>{escape(head)}</h2>{intro}{body}</section>"


def _prompts(trace: SinkTrace) -> str:
    """The prompts, if they are known; a long run of image tokens is left as it was written."""
    texts = trace.sample.texts or ()
    return "".join(f"<p>Prompt: {escape(' '.join(text.split()))}</p>" for text in texts)


def _cards(trace: SinkTrace) -> str:
    cards = []
    for kind, noun in KINDS.items():
        count = len(of_kind(trace, kind))
        if not count and kind not in SINKS:
            continue
        colour = STYLES[GROUP_OF[kind]].colour
        number = str(count) if count else "none found"
        name = noun if count == 1 else f"{noun}s"
        cards.append(
            f'<div class="card" style="border-left-color:{colour}"><b>{number}</b>'
            f"<span>{name}: {ABOUT[kind]}</span></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _strips(trace: SinkTrace) -> str:
    """The prompt of every row, coloured by what its tokens receive."""
    rows = range(len(trace.sample))
    heads = [f"<h3>Row {row}</h3>" if len(rows) > 1 else "" for row in rows]
    return "".join(head + strip(trace, row) for row, head in zip(rows, heads, strict=True))


def _figures(shown: Sequence[Shown]) -> str:
    parts = []
    for one in shown:
        data = b64encode(one.png).decode()
        parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(one.picture.alt)}">'
            f"<figcaption>{escape(one.picture.caption)}</figcaption></figure>"
        )
    return f'<div class="figures">{"".join(parts)}</div>'


def _detectors(trace: SinkTrace) -> str:
    share = flagged_share(trace)
    lines = [
        ("Chosen", escape(trace.chosen)),
        (
            "V rule, on the vision states that feed the projector",
            f"<code>{escape(neat(trace.v_detection.detector))}</code> flags {share[0]:.1%} of the image tokens",
        ),
        (
            "L rule, on what each LLM layer reads",
            f"<code>{escape(neat(trace.l_detection.detector))}</code> flags at most {share[1]:.1%} of the "
            "image tokens in a layer",
        ),
    ]
    body = "".join(f"<dt>{head}</dt><dd>{text}</dd>" for head, text in lines)
    out = f"<dl>{body}</dl>"
    if trace.calibration is not None:
        table = trace.calibration.to_dataframe().drop(columns=["reason"])
        out += frame_table(
            table.assign(dims=table["dims"].map(lambda d: ", ".join(map(str, d)) or "-"))
        )
    return out


def _glossary(trace: SinkTrace) -> str:
    entries = "".join(
        f"<div><dt>{escape(column.head.replace('-|', '').replace('|', ' '))}</dt>"
        f"<dd>{escape(column.meaning)}</dd></div>"
        for column in columns_for(trace)
    )
    return f'<dl class="glossary">{entries}</dl>'


DPI = 130

FILES = ("index.html", "sinks.csv", "tokens.csv", "trace.json")


def check_folder(folder: str | Path) -> Path:
    """Refuse a place where a report would replace files that no report wrote.

    Args:
        folder: Where a report is to be; it need not exist.

    Returns:
        The folder.

    Raises:
        InputError: If it is a file, or holds files of the same names that are somebody else's.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"Got {str(folder)!r}, which is a file; expected a folder for the report.")
    page = folder / "index.html"
    there = [name for name in FILES if (folder / name).exists()]
    if page.is_file():
        ours = WRITTEN in page.read_text(encoding="utf-8", errors="replace")
    else:
        ours = (folder / "figures").is_dir()
    if there and not ours:
        raise InputError(
            f"Got the report folder {str(folder)!r}, where {', '.join(there)} would be replaced, which "
            "sinkscope did not write; expected a new folder, or one of an earlier report."
        )
    return folder


def write_report(
    folder: str | Path,
    trace: SinkTrace,
    *,
    mass: MassResult | None = None,
    title: str = "Sink trace",
    tables: Mapping[str, pd.DataFrame] | None = None,
    decoys: Mapping[str, Tensor] | None = None,
    progress: bool | None = None,
) -> Path:
    """Write figures, tables and a page about a trace.

    ::

        folder/index.html    everything on one page, pictures inside
        folder/sinks.csv     one line per sink: every field of its record
        folder/tokens.csv    one line per position of the prompt
        folder/trace.json    detectors, warnings, overlap and records
        folder/figures/      PNG files

    Files of an earlier report are replaced, others are left alone.

    Args:
        folder: Where to write; made if it is not there.
        trace: The trace.
        mass: The result of ``AttentionMass(trace.groups)``, for one more figure per row.
        title: Of the page.
        tables: Heading -> table, shown on the page before the figures.
        decoys: See `plot_sinks_on_image`.
        progress: Whether to show a progress bar; None shows it in a terminal.

    Returns:
        The path of ``index.html``.

    Raises:
        InputError: If the folder cannot be written, or holds a page of somebody else.
    """
    folder = check_folder(folder)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        sinks_table(trace).to_csv(folder / "sinks.csv", index=False)
        tokens_table(trace).to_csv(folder / "tokens.csv", index=False)
        trace.to_json(folder / "trace.json")
        shown = []
        hidden = None if progress is None else not progress
        for picture in tqdm(
            list(pictures_of(trace, mass, decoys)), "drawing", disable=hidden, leave=False
        ):
            path = folder / "figures" / f"{picture.name}.png"
            picture.draw().savefig(path, dpi=DPI, facecolor="white")
            shown.append(Shown(picture, path.read_bytes()))
        page = folder / "index.html"
        page.write_text(make_page(trace, shown, title, tables or {}), encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"Got the report folder {str(folder)!r}, which cannot be written ({error}); expected a "
            "folder of yours or a name that is still free."
        ) from error
    return page


def sinks_table(trace: SinkTrace) -> pd.DataFrame:
    """The records as a table for CSV: lists are written as JSON."""
    table = trace.to_dataframe()
    for name in table.columns:
        nested = table[name].map(lambda value: isinstance(value, tuple))
        if nested.any():
            table[name] = table[name].map(lambda value: json.dumps(value) if value else "")
    return table


def tokens_table(trace: SinkTrace) -> pd.DataFrame:
    """The token map with what is known of each position.

    ``sink`` is the kind of its record, or empty; ``excess`` is the most that some head gives it beyond
    uniform attention, from other tokens (empty where fewer than 8 of them see it).
    """
    table = trace.sample.tokens.to_dataframe()
    kinds = {(r.batch, r.pos): r.kind for r in trace.records}
    excess = trace.language.drawn().nan_to_num(-2.0).amax(dim=1)
    excess = excess.masked_fill(excess < -1, float("nan"))
    places = list(zip(table["batch"], table["pos"], strict=True))
    return table.assign(
        vit_tokens=table["vit_tokens"].map(json.dumps),
        sink=[kinds.get(place, "") for place in places],
        excess=[float(excess[place]) for place in places],
    )

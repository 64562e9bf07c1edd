"""The page of a report: one file, nothing loaded from elsewhere."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from sinkscope.viz.gallery import Picture
from sinkscope.viz.html import frame_table, nothing_html, sink_table, warnings_html
from sinkscope.viz.prompt_html import CSS as STRIP
from sinkscope.viz.prompt_html import strip
from sinkscope.viz.style import GROUP_OF, STYLES
from sinkscope.viz.table import KINDS, SINKS, columns_for, flagged_share, of_kind
from sinkscope.viz.words import neat

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.experiments.trace import SinkTrace

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

"""Words and tables of a trace, the same in terminal, notebook, page and figures."""

import csv
import html
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from sinkscope.checks import check_whole
from sinkscope.files import write_whole
from sinkscope.tokens import VISION_KINDS, TokenMap
from sinkscope.viz import theme
from sinkscope.viz.theme import GROUP_OF, STYLES, TICKS, Trace, colour_of, ink_on

WIDTH = 110  # letters of a line in a terminal
MARKS = {"V": "●", "L": "■", "text": "▲", "attention": "⬢"}
SINKS = {"V": "V-sink", "L": "L-sink", "text": "text sink"}
KINDS = SINKS | {"attention": "attended token"}
TOWERS = {"vision": "ViT", "language": "LLM"}
MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")  # within words _ is a letter
FORMULA = re.compile(r"(?![+-][\d.]+(e[+-]?\d+)?$)[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def readable(word: str | None) -> str:
    """A token as something one can see: control characters and blanks are written out."""
    if word is None:
        return "token"
    if not word.strip(" "):
        return repr(word)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in word.strip(" "))


def token_name(tokens: TokenMap, row: int, pos: int, words: Any) -> tuple[str, bool]:
    """What a token is called: its word, or which token of an image; and whether it is a patch."""
    if pos >= tokens.ids.shape[1] or int(tokens.image[row, pos]) < 0:
        return readable(words[row][pos] if words else None), False
    image, index = int(tokens.image[row, pos]), int(tokens.image_index[row, pos])
    first = int(tokens.sources[row, pos, 0])  # -1 for a newline, and where no source is known
    kind = VISION_KINDS[int(tokens.vision.kind[index, first])] if first >= 0 else "newline"
    if first < 0 and (tokens.part is None or tokens.unmapped or int(tokens.row[row, pos]) >= 0):
        kind = "token"
    if kind in ("cls", "register", "newline", "token"):
        return f"image {image} {'CLS' if kind == 'cls' else kind}", False
    return f"image {image} {int(tokens.row[row, pos])},{int(tokens.column[row, pos])}", True


def ranges(layers: Iterable[int]) -> str:
    """Ascending layers in few characters: ``1-3, 5``; ``-`` for none."""
    runs = [[x for _, x in g] for _, g in groupby(enumerate(layers), lambda at: at[1] - at[0])]
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(parts) or "-"


def short(value: float | None, digits: int = 3) -> str:
    """A number with few significant digits and no exponent where one can do without."""
    if value is None or value != value:
        return "-" if value is None else "nan"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}" if abs(value) < 1e6 else f"{value:.1e}"
    text = f"{value:.{digits}g}"
    return f"{value:.{digits}f}" if "e" in text else text


def share(value: float) -> str:
    """A share of attention with three decimals, more where it is small."""
    return f"{value:.3f}" if value >= 0.01 else short(value, 2)


def neat(text: str) -> str:
    """A description with its long decimal numbers cut to four digits."""
    return re.sub(r"\d+\.\d{4,}", lambda found: f"{float(found[0]):.4g}", text)


def plural(count: int, noun: str) -> str:
    """``1 V-sink``, ``2 V-sinks``, ``no V-sinks``."""
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def aligned(lines: Sequence[Sequence[str]], heads: int = 1) -> str:
    """Rows of cells as a table for a terminal, with a rule under the ``heads`` first rows."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = ["  ".join(c.ljust(w) for c, w in zip(li, widths, strict=True)) for li in lines]
    padded.insert(heads, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in padded)


def wrapped(text: str, start: str = "", indent: str = "") -> str:
    """A text in lines for a terminal."""
    look: Any = {"initial_indent": start, "subsequent_indent": indent, "break_on_hyphens": False}
    return textwrap.fill(text, WIDTH, **look)


class Column(NamedTuple):
    """A column of the table of sinks: its head, which may break at ``|``, its cells, what it means."""

    head: str
    cell: Callable[[Any], str]
    meaning: str


def _token(record: Any) -> str:
    if record.image < 0:
        return f"{record.pos} {readable(record.word)}"
    what = "" if record.vit_kind in (None, "patch") else f" {str(record.vit_kind).upper()}"
    return f"{record.pos} image {record.image}{what}"


def _born(record: Any) -> str:
    if record.kind not in ("V", "attention"):
        births = [_block(block, half) for block, _, half in record.llm_lives]
        return "LLM " + ", ".join(births[:2]) if births else "-"
    at = record.vit_birth
    return "-" if at is None else "ViT " + _block(at, record.vit_writer)


def _block(block: int, half: str | None) -> str:
    return "input" if block < 0 else f"{block} {half or ''}".strip()


def _layers(record: Any) -> str:
    layers, text = record.llm_layers, ranges(record.llm_layers)
    return text if text.count(",") < 3 else f"{layers[0]}-{layers[-1]} ({len(layers)})"


CELLS: dict[str, Callable[[Any], str]] = {
    "row": lambda r: str(r.batch),
    "kind": lambda r: r.kind,
    "token": _token,
    "cell": lambda r: "-" if r.row < 0 else f"{r.row},{r.column}",
    "pixels": lambda r: "{:.0f},{:.0f}-{:.0f},{:.0f}".format(*r.box) if r.box else "-",
    "born in": _born,
    "norm|ViT": lambda r: short(r.vit_norm),
    "norm|LLM": lambda r: short(r.llm_norm),
    "L rule|in layers": _layers,
    "draws|from": lambda r: "-" if r.first_drawn is None else str(r.first_drawn),
    "top|head": lambda r: "{}.{}".format(*r.head) if r.head else "-",
    "re-|ceived": lambda r: short(r.head_received, 2) if r.head else "-",
    "null": lambda r: short(r.head_null, 2) if r.head else "-",
    "ViT|top": lambda r: f"{max(r.vit_drawn):.2f}" if r.vit_drawn else "-",
    "writes": lambda r: short(r.value_ratio, 2),
    "verdict": lambda r: r.verdict,
    "V+L": lambda r: "yes" if r.overlap else "-",
}

GLOSSARY = (Path(__file__).parent / "templates" / "glossary.txt").read_text("utf-8")
PARTS = (part.partition(": ") for part in re.split(r"\n(?! )", GLOSSARY.strip()))
ROW, *COLUMNS = (Column(head, CELLS[head], " ".join(text.split())) for head, _, text in PARTS)


def columns_for(trace: Trace) -> list[Column]:
    """The columns; with the batch row where there are several."""
    return COLUMNS if len(trace.sample) == 1 else [ROW, *COLUMNS]


def of_kind(trace: Trace, kind: str, row: int | None = None) -> list[Any]:
    """The records of one kind, those that draw most beyond uniform attention first."""
    own = [r for r in trace.records if r.kind == kind and row in (None, r.batch)]
    return sorted(own, key=lambda r: -r.excess if r.head is not None else 2.0)


def listed(trace: Trace, limit: int | None) -> list[tuple[list[Any], str]]:
    """Of every kind the records that draw most, row by row, and what else there is to say."""
    out = []
    for kind, noun in KINDS.items():
        found, remark = of_kind(trace, kind), ""
        if not found and kind in SINKS:
            remark = f"{noun}s: {'unknown' if kind == 'V' and not placing(trace) else 'none found'}"
        elif limit is not None and len(found) > limit:
            remark = f"{noun}s: {len(found) - limit} more, that draw less, are not listed"
        out.append((sorted(found[:limit], key=lambda r: r.batch), remark))
    return out


def counts(trace: Trace, row: int | None = None) -> str:
    """``2 V-sinks, no L-sinks, 1 text sink``."""
    found = {kind: len(of_kind(trace, kind, row)) for kind in KINDS}
    said = {kind: plural(n, KINDS[kind]) for kind, n in found.items() if kind in SINKS or n}
    return ", ".join((said if placing(trace) else said | {"V": "V-sinks unknown"}).values())


def placing(trace: Trace) -> bool:
    """Whether it is known where ViT tokens go in the LLM."""
    return bool(trace.feeds) and not trace.sample.tokens.unmapped


def rules(trace: Trace) -> list[tuple[str, str, str]]:
    """What decides, its rule, and what the rule flags."""
    visual = (trace.sample.tokens.image >= 0).sum(dim=1).clamp(min=1)
    v = float((trace.groups["V-sinks"][:, 0].sum(dim=1) / visual).max())
    low = float(trace.l_detection.fraction.max())
    overlap = sum(record.overlap for record in trace.records)
    met = f"{plural(overlap, 'V-sink')} {'meets' if overlap == 1 else 'meet'} the L rule too"
    return [
        ("Detectors", "", trace.rules.chosen),
        ("V", neat(trace.v_detection.detector), f"flags {v:.1%} of the image tokens"),
        ("L", neat(trace.l_detection.detector), f"flags at most {low:.1%} of them in a layer"),
        ("Overlap", "", met),
        *(("Note", "", note) for note in trace.notes),
    ]


def candidates(trace: Trace) -> pd.DataFrame:
    """The candidates of the towers in which nothing is flagged."""
    heads = ["tower", "token", "medians", "quartiles", "layer", "drawn", "head", "refused because"]
    lines = [
        [TOWERS[c.tower], c.token, f"{c.medians:.0f}", f"{c.prominence:.1f}", str(c.spike_layer)]
        + ([f"{c.drawn:.2f}", "{}.{}".format(*c.drawn_at)] if c.drawn_at else ["-", "-"])
        + [c.reason]
        for c in trace.candidates
        if c.tower in trace.outcomes
    ]
    return pd.DataFrame(lines, columns=heads)


def sinks_text(trace: Trace, records: Sequence[Any]) -> str:
    """The table of sinks for a terminal, with heads of two lines."""
    columns = columns_for(trace)
    heads = [column.head.split("|") for column in columns]
    lines = [[head[i - 2] if len(head) > 1 - i else "" for head in heads] for i in (0, 1)]
    return aligned([*lines, *([column.cell(r) for column in columns] for r in records)], 2)


def frame_text(table: pd.DataFrame) -> str:
    """A data frame as a table for a terminal."""
    return aligned([list(table.columns), *table.astype(str).to_numpy().tolist()])


def trace_summary(trace: Trace, *, limit: int = 10) -> str:
    """Write the sinks as a table for a terminal, how they were found, and what to beware of.

    Kinds of which there are none say "none found"; of each at most ``limit`` are listed, those that draw
    most first.
    """
    theme.check_has(trace, "trace", "records", "ss.trace_sinks(lvlm, sample)")
    check_whole(1, limit=limit)
    return render("summary.txt", trace=trace, limit=limit)


def trace_html(trace: Trace, *, limit: int = 10) -> str:
    """Write `trace_summary` as a ``<div>`` for a notebook."""
    theme.check_has(trace, "trace", "records", "ss.trace_sinks(lvlm, sample)")
    check_whole(1, limit=limit)
    return render("notebook.html", trace=trace, limit=limit)


def as_cell(value: object) -> str:
    """A value as a cell of a Markdown table, or a part of a line: as it reads, without markup, HTML or links."""
    line = html.escape(" ".join(str(value).split()), quote=False)
    return MARKUP.sub(r"\\\g<0>", line)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV. Texts that a spreadsheet would run as a formula get an apostrophe in front.

    OWASP advises it for ``=``, ``+``, ``-``, ``@``, tabs and line breaks; ``"-0.5"`` stays a number.
    """

    def safe(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value

    out = table.copy()
    texts = list(out.select_dtypes(exclude=["number", "bool"]))
    for name in texts:
        out[name] = out[name].map(safe)
    bare = "\r" in out[texts].to_csv(index=False)  # unquoted, it would begin a line
    how = csv.QUOTE_NONNUMERIC if bare else csv.QUOTE_MINIMAL
    write_whole(path, out.rename(columns=safe).to_csv(index=False, quoting=how))


def render(template: str, **given: Any) -> str:
    """A template of this room, filled in; in HTML every text is escaped."""
    return templates().get_template(template).render(**given).rstrip("\n")


@cache
def templates() -> Environment:
    """The templates of this room, with the functions that they use."""
    look: Any = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    look["autoescape"] = select_autoescape(["html"])
    made = Environment(loader=PackageLoader("sinkscope.viz"), **look)
    known = (columns_for, listed, counts, rules, candidates, of_kind, colour_of, ink_on)
    known += (plural, neat, sinks_text, frame_text)
    made.globals.update({function.__name__: function for function in known})
    made.globals.update(KINDS=KINDS, SINKS=SINKS, MARKS=MARKS, TOWERS=TOWERS, TICKS=TICKS)
    made.globals["colours"] = {kind: STYLES[group].colour for kind, group in GROUP_OF.items()}
    made.filters.update(neat=neat, short=short, wrapped=wrapped, cell=_cell)
    return made


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

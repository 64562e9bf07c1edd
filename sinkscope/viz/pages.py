"""The report of a trace: a folder of figures and tables, and a page that needs no network."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.errors import InputError
from sinkscope.viz import maps
from sinkscope.viz.image import plot_received_map, plot_sinks_on_image
from sinkscope.viz.layers import (
    plot_detections,
    plot_mass_by_layer,
    plot_received_by_layer,
    plot_spikes,
)
from sinkscope.viz.prompt import chips_of, strip_of
from sinkscope.viz.tables import SINKS, counts, of_kind, render, share, short
from sinkscope.viz.theme import Trace, images_of

WRITTEN = "Written by sinkscope."  # how a page of ours is known
FILES = ("index.html", "sinks.csv", "tokens.csv", "trace.json")


class Picture(NamedTuple):
    """One figure: the name of its file, what it says in words and numbers, and what draws it."""

    name: str
    alt: str
    draw: Callable[[], Figure]


def pictures_of(
    trace: Trace, mass: Any = None, decoys: Mapping[str, Tensor] | None = None
) -> Iterator[Picture]:
    """The figures of every row: its images, then its layers."""
    for row in range(len(trace.sample)):
        name, images = f"row{row}_" if len(trace.sample) > 1 else "", images_of(trace, row)
        for image in range(len(images)):
            yield from _of_image(trace, row, image, name, decoys)
        alt = (
            f"Line plot of attention received by layer for {counts(trace, row)}, ordinary image tokens "
            "and text, each with its null."
        )
        yield Picture(f"{name}received_by_layer", alt, partial(plot_received_by_layer, trace, row))
        yield _heads(trace, mass, row, name)
        if mass is not None:
            means = mass.mass[row].nanmean(dim=(1, 2)).mean(dim=0).tolist()
            words = [f"{group} {short(x)}" for group, x in zip(mass.groups, means, strict=True)]
            alt = f"Line plot of attention mass by layer. Means over layers: {', '.join(words)}."
            yield Picture(f"{name}mass_by_layer", alt, partial(plot_mass_by_layer, mass, row))
        v, low = (short(float(x.max())) for x in (trace.vit_spikes[images], trace.llm_spikes[row]))
        most = f"{v} medians in the vision tower and {low} in the LLM"
        alt = f"Line plot. The largest activation is {most}."
        yield Picture(f"{name}spikes", alt, partial(plot_spikes, trace, row))
        vision = float(trace.v_detection.fraction[images].max())
        language = float(trace.l_detection.fraction[row].max())
        alt = (
            f"Line plot. The V rule flags at most {vision:.1%} of a block's patches, the L rule at most "
            f"{language:.1%} of a layer's image tokens."
        )
        yield Picture(f"{name}flagged", alt, partial(plot_detections, trace, row))


def _of_image(
    trace: Trace, row: int, image: int, name: str, decoys: Mapping[str, Tensor] | None
) -> Iterator[Picture]:
    """The sinks of an image, and what its tokens receive."""
    parts = []
    for kind in ("V", "L"):
        found = [r for r in of_kind(trace, kind, row) if r.image == image]
        cells = "; ".join(f"{r.row},{r.column}" for r in found[:12])
        more = f" and {len(found) - 12} more" if len(found) > 12 else ""
        said = f" at row,column {cells}{more}" if found else ": none found"
        parts.append(f"{SINKS[kind]}s{said}")
    alt = f"Image {image} with its patch grid. {'. '.join(parts)}."
    draw = partial(plot_sinks_on_image, trace, row, image, decoys=decoys)
    yield Picture(f"{name}sinks_image{image}", alt, draw)
    own = trace.sample.tokens.image[row] == image
    times = trace.language.received.times_null()[row].nan_to_num()
    over = times.mean(dim=1)[:, own].amax(dim=0)
    between = f"between {short(float(over.min()))} and {short(float(over.max()))} times their null"
    alt = f"Heat map over image {image}: image tokens receive {between}."
    yield Picture(
        f"{name}received_image{image}", alt, partial(plot_received_map, trace, row, image)
    )


def _heads(trace: Trace, mass: Any, row: int, name: str) -> Picture:
    """Layer x head: the mass on all text sinks, or else what the most attended token receives."""
    group, got = "text sinks", trace.language.received
    if mass is not None and group in mass.groups and bool(trace.groups[group][row].any()):
        values, null = maps.heads_of(mass, group, row)
        what, draw = "the text sinks", partial(maps.plot_heads, mass, group, row)
    else:
        pos = most_attended(trace, row)
        values, null = got.received[row, :, :, pos], got.null[row, :, pos]
        what, draw = f"the token at {pos}", partial(maps.plot_received_heads, got, pos, row)
    layer, head, top = maps.top_of(values)
    flat = "" if null is None else f"; uniform attention would give {share(float(null[layer]))}"
    alt = (
        f"Heat map of layers and heads. Layer {got.layers[layer]}, head {head} gives {what} the most, "
        f"{share(top)} of its attention{flat}."
    )
    return Picture(f"{name}heads", alt, draw)


def most_attended(trace: Trace, row: int) -> int:
    """The text sink that receives the most in some head; without any, the token that does."""
    chips = chips_of(trace, row)
    sinks = [chip for chip in chips if "text" in chip.sinks]
    return max(sinks or chips, key=lambda chip: (chip.share or 0.0) - chip.null).at[0]


def check_folder(folder: str | Path) -> Path:
    """Refuse a file, and a folder where a report would replace files that no report wrote."""
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"Got {str(folder)!r}, which is a file; expected a folder for the report.")
    page = folder / "index.html"
    there = [name for name in FILES if (folder / name).exists()]
    ours = (folder / "figures").is_dir()
    if page.is_file():
        ours = WRITTEN in page.read_text(encoding="utf-8", errors="replace")
    if there and not ours:
        raise InputError(
            f"Got the report folder {str(folder)!r}, where {', '.join(there)} would be replaced, which "
            "sinkscope did not write; expected a new folder, or one of an earlier report."
        )
    return folder


def write_report(
    folder: str | Path,
    trace: Trace,
    *,
    mass: Any = None,
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

    The folder is made if it is not there; files of an earlier report are replaced, others are left alone.
    The result of ``AttentionMass(trace.groups)`` as ``mass`` gives one more figure per row. ``tables``,
    heading -> table, stand before the figures. For ``decoys`` see `plot_sinks_on_image`. ``progress`` None
    shows a bar in a terminal.

    Returns:
        The path of ``index.html``.
    """
    folder = check_folder(folder)
    shown, hidden = [], None if progress is None else not progress
    pictures = list(pictures_of(trace, mass, decoys))
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        _sinks_table(trace).to_csv(folder / "sinks.csv", index=False)
        _tokens_table(trace).to_csv(folder / "tokens.csv", index=False)
        trace.to_json(folder / "trace.json")
        for picture in tqdm(pictures, "drawing", disable=hidden, leave=False):
            path = folder / "figures" / f"{picture.name}.png"
            picture.draw().savefig(path, dpi=130, facecolor="white")
            shown.append((picture, b64encode(path.read_bytes()).decode()))
        strips = [strip_of(trace, row) for row in range(len(trace.sample))]
        given = {"shown": shown, "strips": strips, "tables": tables or {}, "written": WRITTEN}
        page = folder / "index.html"
        text = render("page.html", trace=trace, title=title, **given)
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"Got the report folder {str(folder)!r}, which cannot be written ({error}); expected a "
            "folder of yours or a name that is still free."
        ) from error
    return page


def _sinks_table(trace: Trace) -> pd.DataFrame:
    """The records as a table for CSV: lists are written as JSON."""
    table = trace.to_dataframe()
    for name in table.columns:
        if table[name].map(lambda value: isinstance(value, tuple)).any():
            table[name] = table[name].map(lambda value: json.dumps(value) if value else "")
    return table


def _tokens_table(trace: Trace) -> pd.DataFrame:
    """The token map with the kind of sink and the most that some head gives beyond uniform attention.

    ``excess`` counts other tokens' queries, and is empty where fewer than 8 of them see the token.
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

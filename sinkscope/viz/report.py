"""A trace as a folder that can be kept, mailed and opened without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from sinkscope.errors import InputError
from sinkscope.viz.gallery import pictures_of
from sinkscope.viz.page import WRITTEN, Shown, make_page

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from sinkscope.experiments.trace import SinkTrace
    from sinkscope.probes import MassResult

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

"""The report of a trace: a folder of figures and tables, and a page that needs no network."""

import json
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.checks import check_path, typed
from sinkscope.errors import InputError
from sinkscope.files import write_whole
from sinkscope.viz import layers, maps
from sinkscope.viz.image import plot_received_map, plot_sinks_on_image
from sinkscope.viz.tables import counts, of_kind, render, share, short, templates, write_csv
from sinkscope.viz.theme import Trace, check_has, images_of
from sinkscope.viz.tokens import chips_of, strip_of

WRITTEN = "Written by sinkscope."  # how a page of ours is known
FILES = ("index.html", "sinks.csv", "tokens.csv", "trace.json")


class Picture(NamedTuple):
    """One figure: the name of its file, its kind, what its words need, and what draws it."""

    name: str
    kind: str  # of figure, by the name of the macro that words it
    said: dict[str, Any]
    draw: Callable[[], Figure]

    @property
    def alt(self) -> str:
        """What the figure shows, in words and numbers."""
        return getattr(templates().get_template("alts.html").module, self.kind)(**self.said)


def pictures_of(
    trace: Trace, mass: Any = None, decoys: Mapping[str, Tensor] | None = None
) -> Iterator[Picture]:
    """The figures of every row: its images, then its layers."""
    for row in range(len(trace.sample)):
        start = f"row{row}_" if len(trace.sample) > 1 else ""
        for kind, said, draw in _row(trace, mass, decoys, row):
            yield Picture(f"{start}{kind}{said.get('image', '')}", kind, said, draw)


def _row(trace: Trace, mass: Any, decoys: Mapping[str, Tensor] | None, row: int) -> Iterator[Any]:
    """Kind, numbers and drawing of the figures of one row."""
    images, got = images_of(trace, row), trace.language.by_key
    for image in range(len(images)):
        found = {k: [r for r in of_kind(trace, k, row) if r.image == image] for k in ("V", "L")}
        draw = partial(plot_sinks_on_image, trace, row, image, decoys=decoys)
        yield "sinks_image", {"image": image, "found": found}, draw
        own = got.times[row, trace.sample.tokens.image[row] == image]
        said = {"image": image, "low": float(own.min()), "high": float(own.max())}
        yield "received_image", said, partial(plot_received_map, trace, row, image)
    draw = partial(layers.plot_received_by_layer, trace, row)
    yield "received_by_layer", {"counts": counts(trace, row)}, draw
    if mass is not None and "text sinks" in mass.groups and trace.groups["text sinks"][row].any():
        values, null = maps.heads_of(mass, "text sinks", row)
        what, draw = "the text sinks", partial(maps.plot_heads, mass, "text sinks", row)
    else:
        pos, whole = most_attended(trace, row), trace.language.received
        if pos not in (kept := [pos] if got.kept is None else got.kept[row].tolist()):
            pos = kept[0]  # of the others not every head is known
        values, null = whole.of_key(row, pos), got.null[row, :, pos]
        what, draw = f"the token at {pos}", partial(maps.plot_received_heads, whole, pos, row)
    layer, head, top = maps.top_of(values)
    flat = None if null is None else share(float(null[layer]))
    said = {"layer": got.layers[layer], "head": head, "what": what}
    yield "heads", {**said, "most": share(top), "null": flat}, draw
    if mass is not None:
        means = mass.mass[row].nanmean(dim=(1, 2)).mean(dim=0).tolist()
        words = [f"{group} {short(x)}" for group, x in zip(mass.groups, means, strict=True)]
        yield "mass_by_layer", {"means": words}, partial(layers.plot_mass_by_layer, mass, row)
    for kind, vision, language, plot in (
        ("spikes", trace.vit_spikes, trace.llm_spikes, layers.plot_spikes),
        ("flagged", trace.v_detection.fraction, trace.l_detection.fraction, layers.plot_detections),
    ):
        said = {"vision": float(vision[images].max()), "language": float(language[row].max())}
        yield kind, said, partial(plot, trace, row)


def most_attended(trace: Trace, row: int) -> int:
    """The text sink that receives the most in some head; without any, the token that does."""
    chips = chips_of(trace, row)
    sinks = [chip for chip in chips if "text" in chip.sinks]
    return max(sinks or chips, key=lambda chip: (chip.share or 0.0) - chip.null).at[0]


def check_folder(folder: str | Path) -> Path:
    """Refuse a file, and a folder where a report would replace files that no report wrote."""
    check_path(folder=folder)
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


@typed
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
    """Write figures, tables and a page about a trace; returns the path of the page.

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
    """
    check_has(trace, "trace", "records", "ss.trace_sinks(lvlm, sample)")
    if mass is not None:
        check_has(mass, "mass", "groups", "lvlm.run(sample, [probe])[probe] of an AttentionMass")
    named = tables is None or isinstance(tables, Mapping)
    if not (named and all(isinstance(x, pd.DataFrame) for x in dict(tables or {}).values())):
        raise InputError(
            f"Got tables={repr(tables)[:60]}; expected a dict of heading -> DataFrame."
        )
    folder, shown = check_folder(folder), []
    pictures = list(pictures_of(trace, mass, decoys))
    hidden = None if progress is None else not progress
    try:
        if (folder / "figures").is_symlink():
            raise OSError(f"{str(folder / 'figures')!r} is a link; remove it first")
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        sinks = trace.to_dataframe()
        for name in sinks.columns:  # lists are written as JSON
            if sinks[name].map(lambda value: isinstance(value, tuple)).any():
                sinks[name] = sinks[name].map(lambda value: json.dumps(value) if value else "")
        write_csv(sinks, folder / "sinks.csv")
        write_csv(_tokens_table(trace), folder / "tokens.csv")
        trace.to_json(folder / "trace.json")
        for picture in tqdm(pictures, "drawing", disable=hidden, leave=False):
            picture.draw().savefig(drawn := BytesIO(), format="png", dpi=130, facecolor="white")
            write_whole(folder / "figures" / f"{picture.name}.png", drawn.getvalue())
            shown.append((picture, b64encode(drawn.getvalue()).decode()))
        strips = [strip_of(trace, row) for row in range(len(trace.sample))]
        given = {"shown": shown, "strips": strips, "tables": tables or {}, "written": WRITTEN}
        text = render("page.html", trace=trace, title=title, **given)
        write_whole(folder / "index.html", text)
    except OSError as error:
        raise InputError(
            f"Got the report folder {str(folder)!r}, which cannot be written ({error}); expected a "
            "folder of yours or a name that is still free."
        ) from error
    return folder / "index.html"


def _tokens_table(trace: Trace) -> pd.DataFrame:
    """The token map, kinds of sinks, and the excess: empty where fewer than 8 other tokens see the token."""
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

"""The folder of a report: everything parses, and everything agrees with the trace."""

from __future__ import annotations

import csv
import json
from base64 import b64decode
from io import BytesIO

import pandas as pd
import pytest
from PIL import Image

import sinkscope as ss
from sinkscope.errors import InputError
from sinkscope.viz import effects_text, write_report
from sinkscope.viz.effects import effects_frame
from sinkscope.viz.pages import pictures_of
from sinkscope.viz.tables import COLUMNS, render
from tests.viz.conftest import Page
from tests.viz.test_effects import comparison

NAMES = ("two rows", "saturated", "none")


@pytest.fixture(scope="module")
def folders(traces, tmp_path_factory):
    root = tmp_path_factory.mktemp("reports")
    answers = pd.DataFrame([{"question": "a < b?", "right": True, "share": 0.12345}])
    for name in NAMES:
        mass, tables = traces.masses.get(name), {"Answers": answers}
        write_report(root / name, traces[name], mass=mass, title=f"T&{name}", tables=tables)
    return root


def page_of(folder):
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def images_of(page):
    return [given for tag, given in page.attributes if tag == "img"]


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", NAMES)
def test_the_files_agree_with_the_trace(traces, folders, name) -> None:
    trace, folder = traces[name], folders / name
    sinks, tokens = (lines_of(folder / f"{file}.csv") for file in ("sinks", "tokens"))
    assert len(tokens) == int(trace.sample.tokens.live.sum())
    places = {(int(token["batch"]), int(token["pos"])): token for token in tokens}
    kinds = {place: token["sink"] for place, token in places.items() if token["sink"]}
    assert kinds == {(r.batch, r.pos): r.kind for r in trace.records}
    for line, record in zip(sinks, trace.records, strict=True):
        place = (int(line["batch"]), int(line["pos"]))
        assert (line["kind"], *place) == (record.kind, record.batch, record.pos)
        assert json.loads(line["received"]) == pytest.approx(record.received)
        assert (line["box"] == "") == (record.box is None)
        assert json.loads(line["head"] or "null") == (record.head and list(record.head))
        if record.head is None:
            assert places[place]["excess"] == ""
            continue
        assert float(places[place]["excess"]) == pytest.approx(record.excess, rel=1e-5)
        excess = record.head_received - record.head_null
        assert float(line["excess"]) == pytest.approx(excess, abs=1e-6)
    stored = json.loads((folder / "trace.json").read_text())
    assert len(stored["sinks"]) == len(trace.records)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_whole_and_needs_no_network(traces, folders, name) -> None:
    trace, folder = traces[name], folders / name
    page, figures = page_of(folder), folder / "figures"
    used = [given.get(key, "") for _, given in page.attributes for key in ("src", "href")]
    assert not [link for link in used if link.startswith(("http", "//"))]
    assert all((folder / given["href"]).exists() for tag, given in page.attributes if tag == "a")
    assert "url(" not in "".join(page.text)
    shown = []
    captions = [tag for tag, _ in page.attributes if tag in ("img", "figcaption")]
    assert captions == ["img", "figcaption"] * (len(captions) // 2), "one caption for each"
    for image in images_of(page):
        assert len(image["alt"]) > 20
        head, data = image["src"].split(",")
        assert head == "data:image/png;base64"
        shown.append(b64decode(data))
        assert min(Image.open(BytesIO(shown[-1])).size) >= 500, image["alt"]
    stored = [path.read_bytes() for path in figures.iterdir()]
    assert sorted(map(hash, shown)) == sorted(map(hash, stored)), "a figure is not on the page"
    per_row = 5 if name in traces.masses else 4
    count = 2 * trace.sample.tokens.vision.grid.shape[0] + per_row * len(trace.sample)
    assert len(shown) == count


@pytest.mark.parametrize("name", NAMES)
def test_the_page_says_what_the_trace_says(traces, folders, name) -> None:
    trace, page = traces[name], page_of(folders / name)
    text = " ".join(page.text)
    sinks = [row for row in page.rows if any(cell[:1] in ("●", "■", "▲") for cell in row[:2])]
    assert len(sinks) == len(trace.records)
    kinds = {record.kind for record in trace.records}
    for kind, noun in (("V", "V-sinks"), ("L", "L-sinks"), ("text", "text sinks")):
        assert (f"{noun}: none found" in text) is (kind not in kinds)
    assert ("Warnings" in text) is bool(trace.warnings)
    said = [*(column.meaning for column in COLUMNS), *(w[-60:] for w in trace.warnings)]
    for part in (*said, trace.chosen, f"T&{name}", "a < b?", "0.123"):
        assert part in text
    assert ("Row 1" in text) is (len(trace.sample) > 1)
    assert text.count(".sinkscope-tokens .chip") == 1
    strips = [given for _, given in page.attributes if given.get("class") == "sinkscope-tokens"]
    assert len(strips) == len(trace.sample)
    views = [given for tag, given in page.attributes if given.get("name") == "viewport"]
    assert views[0]["content"].startswith("width=device-width"), "phones need it"


def test_effects_on_the_page_are_those_of_the_terminal() -> None:
    """Tasks as columns, what found nothing in one sentence, points with intervals, no raw numbers."""
    summary = comparison().estimates(draws=50)
    html = render("frame.html", frame=effects_frame(summary))
    head, *rows = Page(html).rows
    assert head[1:] == ["all (n = 60)", "count (n = 30)", "colour (n = 30)"]
    assert [row[0] for row in rows] == ["base", "mask V-sinks", "mask random, as many"]
    text = effects_text(summary)
    assert all(cell in text for row in rows for cell in row)
    assert "<p>none found, so nothing was edited: mask L-sinks</p>" in html
    assert "6 changes are shown" in html
    assert "nan" not in html


def test_alt_texts_name_the_places(traces, folders) -> None:
    both = [picture for picture in pictures_of(traces["two images"]) if "sinks" in picture.name]
    assert [picture.name for picture in both] == ["sinks_image0", "sinks_image1"]
    alt = both[1].alt
    assert alt.startswith("Image 1 with its patch grid. V-sinks at row,column ")
    assert {"1,1", "5,6"} <= set(alt.replace(".", ";").replace("column ", "; ").split("; "))
    assert "V-sinks: none found" in images_of(page_of(folders / "none"))[0]["alt"]


def test_a_calibration_is_shown(traces, folders, tmp_path) -> None:
    assert "highest_other" not in " ".join(page_of(folders / "none").text)
    found = ss.calibrate(traces.lvlm, [traces["one"].sample])
    trace = ss.trace_sinks(traces.lvlm, traces["one"].sample, calibration=found)
    write_report(tmp_path, trace)
    words = " ".join(page_of(tmp_path).text)
    assert "calibrated on 1 samples" in words
    assert "highest_other" in words


def test_only_an_earlier_report_is_written_over(traces, tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / "index.html").write_text("<p>Somebody else's.</p>")
    with pytest.raises(InputError, match=r"where index.html would be replaced"):
        write_report(tmp_path, traces["none"])
    (tmp_path / "index.html").write_text("<p>Written by sinkscope.</p>")
    page = write_report(tmp_path, traces["none"])
    assert page == tmp_path / "index.html"
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "mine.txt").read_text() == "keep"
    with pytest.raises(InputError, match=r"mine.txt', which is a file; expected a folder"):
        write_report(tmp_path / "mine.txt", traces["none"])

"""The folder of a report: everything parses, and everything agrees with the trace."""

from __future__ import annotations

import csv
import json
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import pandas as pd
import pytest
from PIL import Image

import sinkscope as ss
from sinkscope.errors import InputError
from sinkscope.viz import effects_text, write_report
from sinkscope.viz.effects import effects_frame
from sinkscope.viz.tables import COLUMNS, frame_table
from tests.viz.test_effects import comparison
from tests.viz.test_text import table_of

EMPTY = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Checks that tags close in order, and keeps pictures, links and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "a":
            self.links.append(dict(attrs)["href"])
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def folders(traces, tmp_path_factory):
    root = tmp_path_factory.mktemp("reports")
    answers = pd.DataFrame([{"question": "a < b?", "right": True, "share": 0.12345}])
    for name, trace in traces.traces.items():
        mass, tables = traces.masses.get(name), {"Answers": answers}
        write_report(root / name, trace, mass=mass, title=f"T&{name}", tables=tables)
    return root


def page_of(folder):
    page = Page()
    page.feed((folder / "index.html").read_text(encoding="utf-8"))
    assert page.open == []
    return page


NAMES = ("one", "two images", "two rows", "no picture", "saturated", "none")


@pytest.mark.parametrize("name", NAMES)
def test_the_files_agree_with_the_trace(traces, folders, name) -> None:
    trace, folder = traces[name], folders / name
    with open(folder / "sinks.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(ln["kind"], int(ln["batch"]), int(ln["pos"])) for ln in lines] == [
        (r.kind, r.batch, r.pos) for r in trace.records
    ]
    for line, record in zip(lines, trace.records, strict=True):
        assert json.loads(line["received"]) == pytest.approx(record.received)
        assert (line["box"] == "") == (record.box is None)
        assert json.loads(line["head"] or "null") == (record.head and list(record.head))
        if record.head is None:
            continue
        assert float(line["excess"]) == pytest.approx(
            record.head_received - record.head_null, abs=1e-6
        )
        assert (line["box"] == "") == (record.box is None)
    with open(folder / "tokens.csv", newline="") as file:
        tokens = list(csv.DictReader(file))
    assert len(tokens) == int(trace.sample.tokens.live.sum())
    sinks = {(int(t["batch"]), int(t["pos"])): t["sink"] for t in tokens if t["sink"]}
    assert sinks == {(r.batch, r.pos): r.kind for r in trace.records}
    for record in trace.records:
        (token,) = [
            t for t in tokens if (int(t["batch"]), int(t["pos"])) == (record.batch, record.pos)
        ]
        if record.head is None:
            assert token["excess"] == ""
        else:
            assert float(token["excess"]) == pytest.approx(record.excess, rel=1e-5)
    stored = json.loads((folder / "trace.json").read_text())
    assert len(stored["sinks"]) == len(trace.records)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_whole_and_needs_no_network(traces, folders, name) -> None:
    trace, folder = traces[name], folders / name
    page = page_of(folder)
    assert not [v for k, v in page.attributes if k in ("src", "href") and v.startswith("http")]
    for link in page.links:
        assert (folder / link).exists(), link
    figures = sorted(path.name for path in (folder / "figures").iterdir())
    assert len(page.images) == len(figures)
    stored = {(folder / "figures" / figure).read_bytes() for figure in figures}
    for image in page.images:
        assert len(image["alt"]) > 20
        head, data = image["src"].split(",")
        assert head == "data:image/png;base64"
        assert b64decode(data) in stored
    images = trace.sample.tokens.vision.grid.shape[0]
    per_row = 5 if name in traces.masses else 4
    assert len(figures) == 2 * images + per_row * len(trace.sample)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_says_what_the_trace_says(traces, folders, name) -> None:
    trace, folder = traces[name], folders / name
    text = " ".join(page_of(folder).text)
    html = (folder / "index.html").read_text(encoding="utf-8")
    rows = [row for row in table_of(html) if row and row[0][:1] in "●■▲01"]
    sinks = [row for row in rows if any(cell[:1] in ("●", "■", "▲") for cell in row[:2])]
    assert len(sinks) == len(trace.records)
    for column in COLUMNS:
        assert column.meaning in text
    for kind, noun in (("V", "V-sinks"), ("L", "L-sinks"), ("text", "text sinks")):
        missing = kind not in {r.kind for r in trace.records}
        assert (f"{noun}: none found" in text) is missing
    for warning in trace.warnings:
        assert warning[-60:] in text
    assert ("Warnings" in text) is bool(trace.warnings)
    assert trace.chosen in text
    assert f"T&{name}" in text
    assert "a < b?" in text
    assert "0.123" in text


def test_effects_on_the_page_are_those_of_the_terminal() -> None:
    """Tasks as columns, what found nothing in one sentence, points with intervals, no raw numbers."""
    summary = comparison().summary(draws=50)
    html = frame_table(effects_frame(summary))
    head, *rows = table_of(html)
    assert head[1:] == ["all (n = 60)", "count (n = 30)", "colour (n = 30)"]
    assert [row[0] for row in rows] == ["base", "mask V-sinks", "mask random, as many"]
    text = effects_text(summary)
    for row in rows:
        assert all(cell in text for cell in row)
    assert "<p>none found, so nothing was edited: mask L-sinks</p>" in html
    assert "6 changes are shown" in html
    assert "nan" not in html


def test_alt_texts_name_the_places(folders) -> None:
    alts = [image["alt"] for image in page_of(folders / "one").images]
    assert alts[0].startswith("Image 0 with its patch grid. V-sinks at row,column ")
    assert {"1,1", "5,6"} <= set(alts[0].replace(".", ";").replace("column ", "; ").split("; "))
    assert "V-sinks: none found" in page_of(folders / "none").images[0]["alt"]


def test_pictures_are_large_enough(folders) -> None:
    for path in (folders / "one" / "figures").iterdir():
        picture = Image.open(BytesIO(path.read_bytes()))
        assert min(picture.size) >= 500, path.name


def test_a_calibration_is_shown(traces, folders, tmp_path) -> None:
    assert "highest_other" not in " ".join(page_of(folders / "none").text)
    found = ss.calibrate(traces.lvlm, [traces["one"].sample])
    trace = ss.trace_sinks(traces.lvlm, traces["one"].sample, calibration=found)
    write_report(tmp_path, trace)
    words = " ".join(page_of(tmp_path).text)
    assert "calibrated on 1 samples" in words
    assert "highest_other" in words


def test_a_report_is_written_over_and_leaves_other_files(traces, tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / "index.html").write_text("<p>Written by sinkscope.</p>")
    page = write_report(tmp_path, traces["none"])
    assert page == tmp_path / "index.html"
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_folder_that_cannot_be_written(traces, tmp_path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match=r"taken', which is a file; expected a folder"):
        write_report(tmp_path / "taken", traces["none"])

"""Traces to draw: several sinks and an overlap, two images, two rows, no picture, saturated, none."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import matplotlib
import pytest

import sinkscope as ss
from sinkscope.bundled import draw_scene
from sinkscope.testing import plant, sink_free

matplotlib.use("Agg")
QUESTION = "How many red shapes are there?"
V_SINKS, L_SINKS, OVERLAP = (9, 46), (20, 33), 46
PLANTED = {"V": {9, 46}, "L": {20, 33}}


def cells(patches):
    """Patches as (row, column) of the 8 x 8 grid."""
    return {divmod(patch, 8) for patch in patches}


def texts(artists):
    return [artist.get_text() for artist in artists]


def one_line(text):
    return text.replace("\n", " ")


class Page(HTMLParser):
    """Checks that tags close in order; keeps pictures, chips, text and the cells of tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.chips: list[list[str]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.attributes.append((tag, given))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif "chip" in given.get("class", "").split() and "title" in given:
            self.chips.append([given["class"], given["style"], given["title"], ""])
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if self.chips and self.open and self.open[-1] == "span" and not self.chips[-1][3]:
            self.chips[-1][3] = data


@dataclasses.dataclass(frozen=True)
class Traces:
    """Traces by name, and the masses of the groups of those that have some."""

    lvlm: ss.LVLM
    traces: dict
    masses: dict

    def __getitem__(self, name):
        return self.traces[name]


@pytest.fixture(scope="session")
def traces():
    planted = plant(v_sinks=V_SINKS, l_sinks=(*L_SINKS, OVERLAP), l_layer=1)
    lvlm = ss.LVLM(planted.model, planted.processor)
    rules = [
        ss.detectors.SinkDimensions(dims, 5.0)
        for dims in (planted.truth.v_dims, planted.truth.l_dims)
    ]
    scenes = [draw_scene(seed).image for seed in (1, 2)]
    one = lvlm.prepare(images=scenes[0], text=QUESTION)
    two = lvlm.prepare(images=[[scenes[0], scenes[1].resize((96, 64))]], text=["Compare them."])
    rows = lvlm.prepare(images=scenes, text=[QUESTION, "What is it?"])
    samples = {
        "one": one,
        "two images": two,
        "two rows": rows,
        "no picture": lvlm.prepare(inputs=one.inputs),
    }
    made = {name: ss.trace_sinks(lvlm, sample, *rules) for name, sample in samples.items()}
    loose = ss.detectors.Norm(1.0), ss.detectors.SinkDimensions((1, 2, 3), 1.0)
    made["saturated"] = ss.trace_sinks(lvlm, one, *loose)
    free = sink_free()
    empty = ss.LVLM(free.model, free.processor)
    made["none"] = ss.trace_sinks(empty, empty.prepare(images=scenes[0], text=QUESTION))
    mass = ss.AttentionMass(made["two rows"].groups)
    return Traces(lvlm, made, {"two rows": lvlm.run(rows, [mass])[mass]})

"""The page of the support table: what its cells, counts and reasons are made of."""

from __future__ import annotations

import json

from support_table import PAGE, RESULTS, WEIGHTS, read, write
from tiny_families import DECODERS, TOWERS, TYPES
from tiny_families.page import KINDS, LANGUAGE, page, worst

FACTS = {"Date": "2026-11-27"}


def check(name, status="exact", why="", tower="language", error=None):
    return {"name": name, "tower": tower, "status": status, "why": why, "error": error}


def record(name, *checks, kind="type", not_run=None):
    return {"kind": kind, "name": name, "checks": list(checks), "not_run": not_run, "seconds": 1.0}


def rows_of(text):
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
    titles = next(line for line in lines if "map" in line)
    return {
        cells[0].strip("| `"): dict(zip(titles, cells, strict=True))
        for cells in lines
        if len(cells) == len(titles)
    }


def undated(text):
    return [line for line in text.splitlines() if not line.startswith("Date: ")]


def test_a_cell_shows_the_worst_of_its_checks() -> None:
    shown = page(
        [
            record("one", check("mass"), check("received", "approximate")),
            record("two", check("mass"), check("received", "wrong", error=0.5)),
            record(
                "three",
                check("mass", why="2 layers; not in layers [0]: no softmax"),
                check("received"),
            ),
            record("four", check("mass", "no", "not checked: no reference"), check("received")),
            record("five", not_run="a robot"),
        ],
        {"type": {"two": "somebody, 2026"}},
        FACTS,
    )
    rows = rows_of(shown)
    cells = [rows[name]["attention"] for name in ("one", "two", "three", "four")]
    assert cells == ["approx.", "WRONG", "exact †", "exact"]
    assert rows["one"]["map"] == "–"
    assert rows["five"]["loads"] == "not run"
    assert [rows[name]["on real weights |"].strip("| ") for name in ("one", "two")] == [
        "never",
        "somebody, 2026",
    ]


def test_reasons_that_are_equal_stand_once() -> None:
    lens = check("lens", "no", "it has no final norm")
    shown = page(
        [record("one", lens), record("two", lens, check("map", "wrong", "x", error=2.0))], {}, FACTS
    )
    assert shown.count("It has no final norm") == 1
    assert "<br>lens: one, two" in shown
    assert "off by 2; x" in shown
    assert "WRONG map: two" in shown


def test_counts_against_the_aims() -> None:
    right = [check(name) for name in LANGUAGE]
    shown = page(
        [
            record("one", *right, check("map")),
            record("two", *right[1:], check("map", "no", "why")),
            record("three", not_run="a robot"),
            record("four", *right, kind="decoder"),
        ],
        {},
        FACTS,
    )
    assert "Of 3 model types, 2 are run here." in shown
    assert "edits, answers) | 1 | 75 |" in shown
    assert "| map right | 1 | 50 |" in shown
    assert "right | 0 | 65 |" in shown


def test_what_could_not_be_compared_counts_least() -> None:
    unsure, good, bad = (
        check("map", "no", "not checked: no map"),
        check("map"),
        check("map", "no", "refused"),
    )
    assert worst([unsure, good]) == good
    assert worst([good, bad, unsure]) == bad


def test_measurements_are_read_as_they_were_written(tmp_path) -> None:
    rows = [
        record("one", check("map", why="9 image tokens"), check("lens", "wrong", error=0.5)),
        record("two", not_run="x"),
    ]
    write(tmp_path / "rows.jsonl", rows)
    assert read(tmp_path / "rows.jsonl") == rows
    assert read(tmp_path / "none.jsonl") == []


def test_the_page_is_what_the_measurements_say() -> None:
    records = read(RESULTS)
    weights = json.loads(WEIGHTS.read_text(encoding="utf-8"))
    known = {"type": TYPES, "decoder": DECODERS, "tower": TOWERS}
    for kind in KINDS:
        assert [row["name"] for row in records if row["kind"] == kind] == sorted(known[kind])
        assert {*weights[kind]} <= {*known[kind]}
    told, made = PAGE.read_text(encoding="utf-8"), page(records, weights, FACTS)
    assert undated(told) == undated(made)

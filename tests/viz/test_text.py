"""The table in a terminal and in a notebook says what the records say."""

from __future__ import annotations

import dataclasses
import re

import pytest

from sinkscope.viz import trace_html, trace_summary
from sinkscope.viz.tables import aligned, neat, plural, ranges, readable, short
from tests.viz.conftest import Page


def body(summary):
    """The lines of the table, split at two or more blanks."""
    block = next(part for part in summary.split("\n\n") if "\n---" in part)
    after = block[block.index("\n---") + 1 :].splitlines()[1:]
    return [re.split(r"\s{2,}", line) for line in after]


def test_every_sink_has_its_line(traces) -> None:
    trace = traces["one"]
    rows = body(trace_summary(trace))
    assert [row[0] for row in rows] == ["V", "V", "L", "L", "text"]
    for row in rows:
        pos = int(row[1].split()[0])
        (record,) = [r for r in trace.records if r.pos == pos]
        assert row[2] == ("-" if record.kind == "text" else f"{record.row},{record.column}")
        if record.box:
            assert row[3] == "{:.0f},{:.0f}-{:.0f},{:.0f}".format(*record.box)
        born = ("LLM", record.llm_birth, record.llm_writer)
        if record.kind == "V":
            born = ("ViT", record.vit_birth, record.vit_writer)
        assert row[4] == "{} {} {}".format(*born)
        assert row[5] == ("-" if record.vit_norm is None else short(record.vit_norm))
        assert float(row[6]) == pytest.approx(record.llm_norm, rel=0.01)
        assert row[7] == ranges(record.llm_layers)
        assert int(row[8]) == record.first_drawn
        assert row[9] == f"{record.head[0]}.{record.head[1]}"
        assert float(row[10]) == pytest.approx(record.head_received, rel=0.05)
        assert float(row[11]) == pytest.approx(record.head_null, rel=0.05)
        assert row[12] == (f"{max(record.vit_drawn):.2f}" if record.vit_drawn else "-")
        assert float(row[13]) == pytest.approx(record.value_ratio, rel=0.05, abs=0.0006)
        assert row[14] == record.verdict
        assert row[15] == ("yes" if record.overlap else "-")
    assert sum(row[15] == "yes" for row in rows) == 1


def test_a_summary_fits_a_terminal_and_says_what_was_not_found(traces) -> None:
    for trace in traces.traces.values():
        assert max(len(line) for line in trace_summary(trace).splitlines()) <= 140
    text = trace_summary(traces["none"])
    assert text.startswith("Sinks: no V-sinks, no L-sinks, no text sinks")
    for kind in ("V-sinks", "L-sinks", "text sinks"):
        assert f"\n{kind}: none found" in text
    assert "born in" not in text
    for tower in ("ViT", "LLM"):
        assert f"{tower}, nothing flagged: " in text
    refused = [c.reason for c in traces["none"].candidates]
    assert refused
    html = trace_html(traces["none"])
    assert all(reason in text and reason in html for reason in refused)


def test_detectors_overlap_and_warnings(traces) -> None:
    text = trace_summary(traces["one"])
    for part in (
        *("Detectors: given", "V: SinkDimensions(dims=(90, 17), tau=5.0"),
        *("flags 3.1% of the image tokens", "Overlap: 1 V-sink meets the L rule too"),
    ):
        assert part in text
        assert part in trace_html(traces["one"])
    assert "Warning" not in text
    assert trace_summary(traces["saturated"]).count("Warning: ") == 2


def test_long_lists_are_cut_and_say_so(traces) -> None:
    trace = traces["saturated"]
    text = trace_summary(trace, limit=3)
    rows = body(text)
    assert [row[0] for row in rows].count("V") == 3
    assert "V-sinks: 61 more, that draw less, are not listed" in text
    strongest = max((r for r in trace.records if r.kind == "V"), key=lambda r: r.excess)
    assert float(rows[0][10]) == pytest.approx(strongest.head_received, rel=0.05)


def test_rows_of_a_batch_are_named(traces) -> None:
    rows = body(trace_summary(traces["two rows"]))
    found = [(kind, batch) for kind in ("V", "V", "L", "L", "text") for batch in ("0", "1")]
    order = {kind: i for i, kind in enumerate(("V", "L", "text"))}
    want = sorted(found, key=lambda pair: (order[pair[0]], pair[1]))
    assert [(row[1], row[0]) for row in rows] == want


def test_the_notebook_shows_the_same_table(traces) -> None:
    trace = traces["one"]
    head, *rows = Page(trace_html(trace)).rows
    assert head[:2] == ["kind", "token"]
    assert head[5:7] == ["norm ViT", "norm LLM"]
    assert head[10:12] == ["received", "null"]
    assert [[cell.strip("●■▲ ") for cell in row] for row in rows] == body(trace_summary(trace))
    rows = Page(trace_html(traces["none"])).rows
    kinds = ("V-sinks", "L-sinks", "text sinks")
    assert [row[0] for row in rows[1:4]] == [f"{kind}: none found" for kind in kinds]


def test_words_of_a_prompt_are_escaped(traces) -> None:
    trace = traces["one"]
    records = [
        dataclasses.replace(r, word="<b>$x</b>") if r.kind == "text" else r for r in trace.records
    ]
    changed = dataclasses.replace(trace, records=tuple(records), warnings=("a < b & c",))
    assert "&lt;b&gt;$x&lt;/b&gt;" in trace_html(changed)
    assert "<li>a &lt; b &amp; c</li>" in trace_html(changed)


def test_words_and_numbers_in_few_letters() -> None:
    words = {"<s>": "<s>", " red": "red", "\n": "\\n", " ": "' '", "a\tb": "a\\tb", None: "token"}
    for word, shown in {**words, "": "''", "中 1/2": "中 1/2"}.items():
        assert readable(word) == shown
    for layers, shown in {(): "-", (4,): "4", (0, 1, 2): "0-2", (1, 3, 4, 7): "1, 3-4, 7"}.items():
        assert ranges(layers) == shown
    numbers = {None: "-", float("nan"): "nan", 0.0: "0", 0.12345: "0.123", 12.345: "12.3"}
    numbers |= {499.27: "499", 1234.5: "1234", 2.5e7: "2.5e+07", 0.000012: "0.000", -4.5: "-4.5"}
    for value, shown in numbers.items():
        assert short(value) == shown
    assert [plural(n, "sink") for n in (0, 1, 2)] == ["no sinks", "1 sink", "2 sinks"]
    assert neat("tau=3.4427759783294705, 0.5") == "tau=3.443, 0.5"
    assert aligned([["a", "bb"], ["ccc", ""]]) == "a    bb\n---  --\nccc"

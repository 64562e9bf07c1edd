"""The table in a terminal and in a notebook says what the records say."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from sinkscope.viz import trace_html, trace_summary
from sinkscope.viz.tables import aligned, neat, plural, ranges, readable, short


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
        tower, block, half = (
            ("ViT", record.vit_birth, record.vit_writer)
            if record.kind == "V"
            else ("LLM", record.llm_birth, record.llm_writer)
        )
        assert row[4] == f"{tower} {block} {half}"
        assert float(row[6]) == pytest.approx(record.llm_norm, rel=0.01)
        if record.vit_norm is None:
            assert row[5] == "-"
        else:
            assert float(row[5]) == pytest.approx(record.vit_norm, rel=0.01)
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


def test_a_summary_fits_a_terminal(traces) -> None:
    for trace in traces.traces.values():
        assert max(len(line) for line in trace_summary(trace).splitlines()) <= 140


def test_none_found_is_said_for_every_kind(traces) -> None:
    text = trace_summary(traces["none"])
    assert text.startswith("Sinks: no V-sinks, no L-sinks, no text sinks")
    for kind in ("V-sinks", "L-sinks", "text sinks"):
        assert f"\n{kind}: none found" in text
    assert "born in" not in text


def test_detectors_overlap_and_warnings(traces) -> None:
    text = trace_summary(traces["one"])
    assert "Detectors: given" in text
    assert "V: SinkDimensions(dims=(90, 17), tau=5.0" in text
    assert "flags 3.1% of the image tokens" in text
    assert "Overlap: 1 V-sink meets the L rule too" in text
    assert "Warning" not in text
    assert trace_summary(traces["saturated"]).count("Warning: ") == 2


def test_long_lists_are_cut_and_say_so(traces) -> None:
    text = trace_summary(traces["saturated"], limit=3)
    rows = body(text)
    assert [row[0] for row in rows].count("V") == 3
    assert "V-sinks: 61 more, that draw less, are not listed" in text
    strongest = max(
        (r for r in traces["saturated"].records if r.kind == "V"), key=lambda r: r.excess
    )
    assert float(rows[0][10]) == pytest.approx(strongest.head_received, rel=0.05)


def test_rows_of_a_batch_are_named(traces) -> None:
    rows = body(trace_summary(traces["two rows"]))
    assert [row[:2] for row in rows] == [
        [str(batch), kind]
        for kind, n in (("V", 2), ("L", 2), ("text", 1))
        for batch in (0, 1)
        for _ in range(n)
    ]


class Cells(HTMLParser):
    """Rows of table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def table_of(html):
    parser = Cells()
    parser.feed(html)
    return parser.rows


def test_the_notebook_shows_the_same_table(traces) -> None:
    trace = traces["one"]
    rows = table_of(trace_html(trace))
    assert rows[0][:2] == ["kind", "token"]
    assert rows[0][5:7] == ["norm ViT", "norm LLM"]
    assert rows[0][10:12] == ["received", "null"]
    shown = [[cell.strip("●■▲ ") for cell in row] for row in rows[1:]]
    assert shown == body(trace_summary(trace))
    assert "Overlap: 1 V-sink" in trace_html(trace)


def test_the_notebook_says_none_found(traces) -> None:
    rows = table_of(trace_html(traces["none"]))
    assert [row[0] for row in rows[1:4]] == [
        "V-sinks: none found",
        "L-sinks: none found",
        "text sinks: none found",
    ]


def test_words_of_a_prompt_are_escaped(traces) -> None:
    trace = traces["one"]
    records = tuple(
        dataclasses.replace(r, word="<b>$x</b>") if r.kind == "text" else r for r in trace.records
    )
    html = trace_html(dataclasses.replace(trace, records=records, warnings=("a < b & c",)))
    assert "&lt;b&gt;$x&lt;/b&gt;" in html
    assert "<li>a &lt; b &amp; c</li>" in html


@pytest.mark.parametrize(
    ("word", "shown"),
    [("<s>", "<s>"), (" red", "red"), ("\n", "\\n"), (" ", "' '"), ("a\tb", "a\\tb"), (None, "token"),
     ("", "''"), ("中 1/2", "中 1/2")],
)  # fmt: skip
def test_words_one_can_see(word, shown) -> None:
    assert readable(word) == shown


@pytest.mark.parametrize(
    ("layers", "shown"), [((), "-"), ((4,), "4"), ((0, 1, 2), "0-2"), ((1, 3, 4, 7), "1, 3-4, 7")]
)
def test_ranges(layers, shown) -> None:
    assert ranges(layers) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (float("nan"), "nan"), (0.0, "0"), (0.12345, "0.123"), (12.345, "12.3"),
     (499.27, "499"), (1234.5, "1234"), (2.5e7, "2.5e+07"), (0.000012, "0.000"), (-4.56789, "-4.57")],
)  # fmt: skip
def test_short_numbers(value, shown) -> None:
    assert short(value) == shown


def test_small_helpers() -> None:
    assert [plural(n, "sink") for n in (0, 1, 2)] == ["no sinks", "1 sink", "2 sinks"]
    assert neat("tau=3.4427759783294705, 0.5") == "tau=3.443, 0.5"
    assert aligned([["a", "bb"], ["ccc", ""]]) == "a    bb\n---  --\nccc"

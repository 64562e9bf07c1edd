"""Names and words of others stand in tables, pages and cards as they read: nothing in them runs."""

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from sinkscope.cli.experiments import write_report as write_tables
from sinkscope.experiments import Comparison
from sinkscope.viz import tables as writers
from sinkscope.viz import write_report
from tests.viz.conftest import Page
from tests.viz.test_effects import comparison

NASTY = (
    "<script>alert(1)</script>",
    "two\nlines\r\nand a\u2028third",
    "a | b",
    "[click](javascript:alert(1))",
    "![x](http://127.0.0.1/x.png)",
    "<javascript:alert(1)>",
    "[click]: javascript:alert(1)",
    "&lt;b&gt; &#106;avascript:",
    "back\\slash \\| `code` ``",
    "**bold** _it_ __init__ snake_case ~~no~~ $x$",
    "# head",
    "- item",
    "mask V-sinks (0.5), [0, 1]",
)


def rendered(text):
    """A page of Markdown as HTML, with its tags checked, by a reader that lets HTML and every link through."""
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    reader.validateLink = lambda url: True
    return Page(reader.render(text))


@pytest.mark.parametrize("text", NASTY)
def test_a_cell_of_markdown_reads_as_the_text(text):
    page = rendered(f"| a | b |\n|---|---|\n| {writers.as_cell(text)} | end |\n")
    assert page.rows == [["a", "b"], [" ".join(text.split()), "end"]]
    assert {tag for tag, _ in page.attributes} == {"table", "thead", "tbody", "tr", "th", "td"}


def test_the_table_of_a_comparison_shows_names_as_they_are():
    names = ("<script>alert(1)</script>", "[a](javascript:b)\n| c", "**d**")
    made = comparison(images=4)
    other = dict(zip(made.conditions, names, strict=True)) | {"count": "<img src=x onerror=e()>"}
    made = Comparison(made.table.replace(other), "base")
    page = rendered(made.to_markdown(draws=20))
    flat = [" ".join(name.split()) for name in names]
    assert [row[0] for row in page.rows] == ["condition", "base", *flat]
    tasks = [task.rpartition(" (n")[0] for task in page.rows[0][1:]]
    assert tasks == ["all", "<img src=x onerror=e()>", "colour"]
    assert {len(row) for row in page.rows} == {4}
    assert not {"script", "img", "a"} & {tag for tag, _ in page.attributes}
    assert any(tag == "strong" for tag, _ in page.attributes), "our own marks stay"


def test_no_name_breaks_the_latex_of_a_comparison():
    made = comparison(images=4)
    table = made.table.replace({"mask V-sinks": "a << b >> c", "mask L-sinks": "50 % \\input{x}"})
    text = Comparison(table, "base").to_latex(draws=20)
    assert "a << b >> c &" in text
    assert r"50 \% \textbackslash input\{x\} &" in text
    assert text.count("{") - text.count("\\{") == text.count("}") - text.count("\\}")


FORMULAS = (
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "\uff1d1",
    "=",
    "-",
)
KEPT = ("-0.5", "+3", "-1e-05", "1=1", "a-b", "", "'quoted'", "red")


def read_back(path):
    return list(csv.reader(io.StringIO(path.read_bytes().decode(), newline="")))


def test_no_cell_of_a_table_is_a_formula(tmp_path):
    words = [*FORMULAS, *KEPT]
    table = pd.DataFrame(
        {"=head": words, "kind": pd.Categorical(words), "value": np.linspace(-1, 1, len(words))}
    )
    table.loc[2, "=head"] = "a\r=1"  # as a line of its own it would be one
    table["list"] = [[-1, 2]] * len(words)
    table["missing"] = pd.array([None, *[-1] * (len(words) - 1)], dtype="Int64")
    before = table.copy()
    writers.write_csv(table, tmp_path / "t.csv")
    head, *lines = read_back(tmp_path / "t.csv")
    assert head == ["'=head", "kind", "value", "list", "missing"]
    wanted = [f"'{word}" for word in FORMULAS] + list(KEPT)
    assert [line[1] for line in lines] == wanted
    assert [line[0] for line in lines] == [*wanted[:2], "a\r=1", *wanted[3:]]
    assert [float(line[2]) for line in lines] == pytest.approx(table["value"].tolist())
    assert [line[4] for line in lines] == ["", *["-1"] * (len(words) - 1)]
    pd.testing.assert_frame_equal(table, before)


def test_numbers_of_a_table_are_written_as_before(tmp_path):
    """Byte by byte what pandas writes, for a table with nothing to guard."""
    table = comparison(images=4).estimates(draws=20)
    writers.write_csv(table, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == table.to_csv(index=False)


def test_nothing_in_a_report_runs(traces, tmp_path):
    """Tokens are words of the prompt, a title and tables the user's: in the page as text, in CSV guarded."""
    trace = traces["two rows"]
    sample, bad = trace.sample, "<script>x</script>"
    words = tuple(("=1+1", bad, *line[2:]) for line in sample.tokens.words)
    sample = replace(sample, tokens=replace(sample.tokens, words=words))
    records = tuple(
        replace(record, word=bad if i % 2 else "@A1") for i, record in enumerate(trace.records)
    )
    trace = replace(trace, sample=sample, records=records)
    frame = pd.DataFrame({"<b>": ["<i>"]})
    frame.attrs["notes"] = ["<script>n</script>"]
    path = write_report(
        tmp_path / "r", trace, title="<script>t</script>", tables={"<u>h</u>": frame}
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert not {"script", "i", "u"} & {tag for tag, _ in page.attributes}
    assert ["<b>"] in page.rows
    assert ["<i>"] in page.rows
    tokens, sinks = (read_back(tmp_path / "r" / f"{name}.csv") for name in ("tokens", "sinks"))
    at = tokens[0].index("word")
    assert [line[at] for line in tokens[1:3]] == ["'=1+1", bad]
    assert {line[sinks[0].index("word")] for line in sinks[1:]} == {"'@A1", bad}


def test_the_tables_of_the_command_line_are_guarded(tmp_path):
    table = comparison(images=4).table.replace({"condition": {"base": "=HYPERLINK(1)"}})
    made = Comparison(table, "=HYPERLINK(1)")
    tables = {"answers": made.to_dataframe(), "summary": made.estimates(draws=20)}
    folder = write_tables(tmp_path, tables, "comparison", made)
    for name in tables:
        text = (folder / f"{name}.csv").read_text()
        assert "'=HYPERLINK(1)" in text
        assert not re.search(r"(^|,)=", text, re.MULTILINE)

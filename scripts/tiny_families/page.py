"""The support table as a page of the documentation, from the records of `scripts/support_table.py`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

EDITS = ("mask keys", "scale keys", "value edits")
# a column: its title, the tower, and the checks of which the worst is shown
COLUMNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("loads", "language", ("load",)),
    ("image tokens", "language", ("tokens",)),
    ("map", "language", ("map",)),
    ("attention", "language", ("mass", "received")),
    ("logits, states", "language", ("logits", "states")),
    ("additions", "language", ("additions",)),
    ("writes", "language", ("contributions",)),
    ("lens", "language", ("lens",)),
    ("edits", "language", EDITS),
    ("answers", "language", ("generation",)),
    ("vision attention", "vision", ("mass", "received")),
    ("vision states", "vision", ("states",)),
    ("vision additions", "vision", ("additions",)),
    ("vision writes", "vision", ("contributions",)),
    ("vision edits", "vision", EDITS),
    ("trace_sinks", "language", ("trace_sinks",)),
)
LEGEND = {
    "loads": "`LVLM` takes the model and `prepare` its inputs",
    "image tokens": "the positions that images fill",
    "map": "each image token and the ViT tokens that it depends on, against the gradient",
    "attention": "`AttentionMass` and `ReceivedAttention`, against eager attention",
    "logits, states": "a run with probes gives the model's own logits; `ResidualStates` what blocks take and give",
    "additions": "`attn_out` and `mlp_out` are what is added to the residual stream",
    "writes": "`ContributionNorms` is what attention writes",
    "lens": "`LogitLens` on the last layer gives the model's own log-probabilities",
    "edits": "`MaskKeys`, `ScaleKeys` and edits of values, against the same edit in eager attention",
    "answers": "`generate` gives the model's own answer, with right masses while it decodes",
    "trace_sinks": "V-sinks and L-sinks, and which follow from which",
}
SHORT = {"exact": "exact", "approximate": "approx.", "no": "no", "wrong": "WRONG"}
_MODULE = re.compile(r"\bmodel(\.\w+)+( \(\w+\))?|\b(\w+\.)+\w+ \(\w+\)")
RANK = {"exact": 0, "approximate": 1, "no": 2, "wrong": 3}
LANGUAGE = ("logits", "mass", "received", "states", *EDITS, "generation")
AIMS = {
    "language tower right (logits, attention, states, edits, answers)": (LANGUAGE, 75),
    "map right": (("map",), 50),
    "`trace_sinks` right": (("trace_sinks",), 65),
}
KINDS = {
    "type": "Model types",
    "decoder": "Text decoders inside LLaVA",
    "tower": "Vision towers inside LLaVA",
}


def rank(check: Record) -> int:
    """How bad the outcome of a check is; one that could not be compared says least."""
    return -1 if check["why"].startswith("not checked") else RANK[check["status"]]


def worst(checks: Iterable[Record]) -> Record | None:
    """The worst of some checks."""
    return max(checks, key=rank, default=None)


def page(
    records: Sequence[Record], weights: Mapping[str, Mapping[str, str]], facts: Mapping[str, str]
) -> str:
    """Write the page.

    Args:
        records: One for each model: `kind`, `name`, `checks`, `seconds`, and `not_run` with the reason or None.
        weights: By kind and name: on which real weights it ran, for whom and when.
        facts: Date, versions and run time.
    """
    lines = [
        "# Support table",
        "",
        "What works on which model type, measured on tiny random models of the real `transformers` classes. Each number is compared",
        "with plain passes and eager attention of `transformers` (`sinkscope.testing.check_model`), on one image, on an image of another",
        "shape or of several tiles, and on two images. A cell shows the worst of the three.",
        "",
        ", ".join(f"{name}: {value}" for name, value in facts.items())
        + ". This page is written by",
        "",
        "```bash",
        "python scripts/support_table.py --decoders --towers",
        "```",
        "",
        *counts([record for record in records if record["kind"] == "type"]),
        "",
        "## Cells",
        "",
        "`exact`: equal up to rounding in fp32. `approx.`: as exact as half precision allows. `no`: refused with a reason, or not",
        "comparable; the reasons stand below the table. `WRONG`: a wrong number, or an error that explains nothing. †: not in all",
        "layers.",
        "",
        *(f"- **{title}**: {text}." for title, text in LEGEND.items()),
    ]
    for kind, title in KINDS.items():
        some = [record for record in records if record["kind"] == kind]
        if some:
            lines += [
                "",
                f"## {title}",
                "",
                outcome(some),
                "",
                *table(some, weights.get(kind, {})),
                "",
                *reasons(some, title),
            ]
    return "\n".join(lines).rstrip() + "\n"


def counts(records: Sequence[Record]) -> list[str]:
    """How many types are right, against the aims."""
    ran = [record for record in records if not record["not_run"]]
    lines = [
        f"Of {len(records)} model types, {len(ran)} are run here.",
        "",
        "| types | right | aim |",
        "|---|---|---|",
    ]
    for title, (names, aim) in AIMS.items():
        right = sum(all_right(record, names) for record in ran)
        lines.append(f"| {title} | {right} | {aim} |")
    return lines


def outcome(records: Sequence[Record]) -> str:
    """How many models are right in everything, refuse something, or are wrong somewhere."""
    ran = [record for record in records if not record["not_run"]]
    bad = [max(map(rank, record["checks"]), default=-1) for record in ran]
    return (
        f"{len(ran)} of {len(records)} are run: {sum(one < 2 for one in bad)} are right in everything, "
        f"{bad.count(2)} refuse something with a reason, {bad.count(3)} are wrong somewhere."
    )


def all_right(record: Record, names: tuple[str, ...]) -> bool:
    """Whether all of some checks of the language tower are exact or approximate."""
    known = {
        check["name"]: check["status"] for check in record["checks"] if check["tower"] != "vision"
    }
    return all(known.get(name) in ("exact", "approximate") for name in names)


def table(records: Sequence[Record], weights: Mapping[str, str]) -> list[str]:
    """The table of one kind of models."""
    columns = [*COLUMNS, *_unknown(records)]
    titles = ["", *(title for title, *_ in columns), "on real weights"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for record in records:
        if record["not_run"]:
            cells = ["not run", *[""] * (len(columns) - 1)]
        else:
            cells = [_cell(record, tower, names) for _, tower, names in columns]
        name = f"`{record['name']}`"
        lines.append(f"| {' | '.join([name, *cells, weights.get(record['name'], 'never')])} |")
    return lines


def _unknown(records: Sequence[Record]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Columns for checks that no column names."""
    known = {(name, tower) for _, tower, names in COLUMNS for name in names}
    found = {
        (check["name"], check["tower"]): None for record in records for check in record["checks"]
    }
    return [
        (f"{tower} {name}", tower, (name,)) for name, tower in found if (name, tower) not in known
    ]


def _cell(record: Record, tower: str, names: tuple[str, ...]) -> str:
    found = [
        check for check in record["checks"] if check["tower"] == tower and check["name"] in names
    ]
    shown = worst(found)
    if shown is None:
        return "–"
    if shown["name"] == "load" and shown["status"] == "exact":
        return "yes"
    partly = RANK[shown["status"]] < 2 and any("not in layers" in check["why"] for check in found)
    return SHORT[shown["status"]] + " †" * partly


def reasons(records: Sequence[Record], title: str) -> list[str]:
    """The reasons of what does not work, one paragraph for each, with the capabilities and the models."""
    grouped: dict[str, dict[str, list[str]]] = {}
    for record in records:
        if record["not_run"]:
            why = record["not_run"][:1].upper() + record["not_run"][1:]
            grouped.setdefault(why, {}).setdefault("not run", []).append(record["name"])
        for check in record["checks"]:
            why = _reason(check, record["name"])
            if why is not None:
                what = f"{check['name']}{' (vision)' * (check['tower'] == 'vision')}"
                what = "WRONG " * (check["status"] == "wrong") + what
                grouped.setdefault(why, {}).setdefault(what, []).append(record["name"])
    lines = [f"### Why not: {title[0].lower()}{title[1:]}", ""] if grouped else []
    for why, whats in sorted(grouped.items(), key=lambda item: -sum(map(len, item[1].values()))):
        lines.append(f"- *{_plain(why)}*<br>{_told(whats)}")
    return lines


def _reason(check: Record, model: str) -> str | None:
    """Why a check is not right in all layers, without what differs from model to model; None if it is."""
    why = check["why"]
    if RANK[check["status"]] < 2:
        if "not in layers" not in why:
            return None
        why = why[why.index("not in layers") :]
        why = f"not in all layers: {why.partition(': ')[2] or 'the others have no attention'}"
    elif check["error"] is not None:
        return f"off by {check['error']:.2g}{'; ' * bool(why)}{why}"
    why = _MODULE.sub("a module of it", why.replace(f"'{model}'", "'…'"))
    return why[:1].upper() + why[1:] or "No reason given"


def _told(whats: dict[str, list[str]]) -> str:
    """Which models a reason stops from what; those that fail in the same, together."""
    joined: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
    for what, models in whats.items():
        joined.setdefault((what.startswith("WRONG "), tuple(models)), []).append(
            what.removeprefix("WRONG ")
        )
    return "; ".join(
        f"{'WRONG ' * wrong}{', '.join(names)}: {', '.join(models)}"
        for (wrong, models), names in joined.items()
    )


def _plain(text: str) -> str:
    """Text of an error without what Markdown would take for markup."""
    for mark in "\\`*_<>[]|":
        text = text.replace(mark, f"\\{mark}")
    return text

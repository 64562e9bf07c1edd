"""What a model is made of and what can be measured on it: exact, approximate or unavailable, and why."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sinkscope import interventions, probes
from sinkscope.anatomy.discovery import dtype_of
from sinkscope.anatomy.towers import TowerAnatomy
from sinkscope.errors import ModelError, nearest
from sinkscope.models.capabilities import Asked, Status, judge, missing_call
from sinkscope.results import Result

if TYPE_CHECKING:
    import pandas as pd

GATE = ("LSG", "gates")
"""An edit of a room above this one, and what it needs."""


@dataclass(frozen=True)
class Verdict:
    """Whether a probe or an intervention works on a tower of a model.

    Attributes:
        name: The probe or intervention.
        tower: ``"vision"`` or ``"language"``.
        status: ``"exact"``, ``"approximate"`` or ``"unavailable"``.
        why: The reason, or what to know; may be empty.
    """

    name: str
    tower: str
    status: Status
    why: str = ""


@dataclass(frozen=True)
class Report(Result):
    """A model's anatomy and what can be measured on it; print it, or show it in a notebook.

    Attributes:
        name: The model.
        facts: What it is made of: ``(what, value)``.
        verification: Whether a forward pass has proven the anatomy.
        notes: What to know before the first measurement.
        probes: One `Verdict` per probe and tower.
        edits: One `Verdict` per intervention and tower.
    """

    name: str
    facts: tuple[tuple[str, str], ...]
    verification: str
    notes: tuple[str, ...]
    probes: tuple[Verdict, ...]
    edits: tuple[Verdict, ...] = ()

    def verdict(self, name: str, tower: str = "language") -> Verdict:
        """The verdict on one probe or intervention, by the name of its class.

        Raises:
            ModelError: If there is none of that name.
        """
        known = {(v.name, v.tower): v for v in (*self.probes, *self.edits)}
        if (name, tower) not in known:
            raise ModelError(
                f"Got {name!r} in the {tower!r} tower; expected the name of a probe or an intervention, "
                "and 'vision' or 'language'. " + nearest(str(name), {one for one, _ in known})
            )
        return known[name, tower]

    def to_dataframe(self) -> pd.DataFrame:
        """Columns name, tower, status, why."""
        import pandas as pd

        return pd.DataFrame([vars(verdict) for verdict in (*self.probes, *self.edits)])

    def _tables(self) -> list[list[tuple[str, ...]]]:
        """The tables as lines, the first of which is the heading."""
        tables: list[list[tuple[str, ...]]] = [
            [("part", ""), *self.facts, ("verified", self.verification)]
        ]
        for kind, verdicts in (("probe", self.probes), ("edit", self.edits)):
            names = dict.fromkeys(verdict.name for verdict in verdicts)
            lines = [self._line(name) for name in names]
            tables.append([(kind, "vision", "language", ""), *lines])
        return tables

    def _line(self, name: str) -> tuple[str, ...]:
        """One probe on both towers: the remark once if it holds for both."""
        both = self.verdict(name, "vision"), self.verdict(name)
        why = both[0].why
        if why != both[1].why:
            why = "; ".join(f"{v.tower}: {v.why}" for v in both if v.why)
        return name, both[0].status, both[1].status, why

    def __str__(self) -> str:
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join([self.name, *map(_in_columns, self._tables()), *[notes] * bool(notes)])

    def _repr_html_(self) -> str:
        tables = "".join(map(_as_html, self._tables()))
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"<h3>{html.escape(self.name)}</h3>{tables}<ul>{notes}</ul>"


def make_report(lvlm: Any) -> Report:
    """Make the report of an `LVLM`; nothing runs."""
    towers = [
        Asked(tower, dtype_of(lvlm.module.get_submodule(tower.blocks[0])), lvlm.anatomy.feed_layers)
        for tower in (lvlm.anatomy.vision, lvlm.anatomy.language)
    ]

    def verdicts(needs: Iterable[tuple[str, str]]) -> tuple[Verdict, ...]:
        return tuple(
            Verdict(name, asked.tower.tower, *judge(need, asked))
            for name, need in needs
            for asked in towers
        )

    return Report(
        name=lvlm.name,
        facts=tuple(facts_of(lvlm)),
        verification=verification_of(lvlm),
        notes=tuple(notes_of(lvlm)),
        probes=verdicts(needs_of(probes)),
        edits=verdicts([*needs_of(interventions), GATE]),
    )


def needs_of(room: ModuleType) -> list[tuple[str, str]]:
    """The public classes of a room that need something of a tower, and what."""
    kinds = [(name, getattr(room, name)) for name in room.__all__]
    return [(name, kind.needs) for name, kind in kinds if getattr(kind, "needs", "")]


def facts_of(lvlm: Any) -> list[tuple[str, str]]:
    """What the model is made of."""
    a = lvlm.anatomy
    module: Any = lvlm.module
    count = sum(p.numel() for p in module.parameters())
    sizes = (("B", 10**9), ("M", 10**6), ("k", 10**3))
    unit, size = next(((unit, size) for unit, size in sizes if count >= size), ("", 1))
    dtype = str(module.dtype).removeprefix("torch.")
    feeds = ", ".join(str(layer) for layer in a.feeds)
    merged = f"{a.merge} x {a.merge} patches" if a.merge > 1 else "one patch"
    patch = getattr(getattr(module.config, "vision_config", None), "patch_size", "?")
    prefix = " and ".join(kind.upper() for kind in a.family.prefix(module.config))
    first = f"{prefix} first" if prefix else "no CLS"
    return [
        ("model", f"{type(module).__name__}, family {a.family.name}, model_type {a.model_type}"),
        ("parameters", f"{f'{count / size:.3g} {unit}'.rstrip()}, {dtype} on {lvlm.device}"),
        ("vision", f"{_size_of(a.vision)}, patches of {patch} pixels, {first}"),
        ("vision attention", _attention_of(a.vision)),
        (
            "projector",
            f"{a.projector}, reads vision block {feeds}{', CLS dropped' * bool(a.drops)}",
        ),
        ("merge", f"{merged} to one language token"),
        ("language", f"{_size_of(a.language)}, {a.vocab} token ids"),
        ("language attention", _attention_of(a.language)),
        ("image token", f"id {a.image_token_id}"),
        ("head", f"{a.head}, after {a.final_norm}"),
    ]


def _size_of(tower: TowerAnatomy) -> str:
    """Blocks, width and heads."""
    shared = "" if tower.heads == tower.kv_heads else f" on {tower.kv_heads} key-value heads"
    return (
        f"{tower.n_layers} blocks of width {tower.d_model}, {tower.heads} heads of {tower.d_head}"
        f"{shared}"
    )


def _attention_of(tower: TowerAnatomy) -> str:
    """Kernel, packing and windows."""
    if not tower.attending:
        return f"{tower.kernel}; {missing_call(tower)}"
    windows = any(getattr(call, "fires", "") == "per window" for call in tower.calls)
    words = {
        "all images packed into one sequence": tower.packed,
        "one call per window": windows,
        "with a learned sink": tower.learned_sink,
    }
    return ", ".join([tower.kernel, *(word for word, holds in words.items() if holds)])


def verification_of(lvlm: Any) -> str:
    """Whether a forward pass has proven the anatomy, and if not, why."""
    if lvlm.verified:
        towers = (lvlm.anatomy.vision, lvlm.anatomy.language)
        adds = all(len(tower.adding) == tower.n_layers for tower in towers)
        blocks = " blocks add attn_out and mlp_out," if adds else ""
        return f"yes: attention sums to 1,{blocks} the projector reads and writes what it should"
    if lvlm.device.type == "meta":
        return "no: the weights are elsewhere"
    if lvlm.processor is None:
        return "no: there is no processor to make a test image with"
    return "no: loaded with verify=False"


def notes_of(lvlm: Any) -> list[str]:
    """What to know before the first measurement."""
    notes = []
    if lvlm.processor is None:
        notes.append("No processor: write lvlm.prepare(inputs=...) with inputs you made yourself.")
    elif getattr(lvlm.tokenizer, "bos_token_id", None) is None:
        notes.append("No BOS: the selection 'bos' is empty; 'first' is each row's first token.")
    if lvlm.device.type == "meta":
        notes.append("No weights here: runs go to the server, which keeps its own dtype.")
    return notes


def _in_columns(lines: Sequence[tuple[str, ...]]) -> str:
    """A table as text, its last column free."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    rule = "  ".join("-" * max(width, 1) for width in widths)
    return "\n".join([shown[0], rule, *shown[1:]])


def _as_html(lines: Sequence[tuple[str, ...]]) -> str:
    """The same table as HTML."""

    def row(cells: tuple[str, ...], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(row(line, "td") for line in lines[1:])
    return f"<table><thead>{row(lines[0], 'th')}</thead><tbody>{body}</tbody></table>"

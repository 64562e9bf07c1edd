"""What a model is made of and what can be measured on it: exact, approximate or unavailable, and why."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sinkscope.errors import ModelError, nearest
from sinkscope.models.anatomy import TowerAnatomy
from sinkscope.models.holding import dtype_of
from sinkscope.models.judging import EDIT_JUDGES, JUDGES, Verdict, judge_edit, reason_of
from sinkscope.probes.results import Unsaved

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.models.lvlm import LVLM


@dataclass(frozen=True)
class Report(Unsaved):
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

    def _tables(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        """The tables as headings and lines."""
        tables: list[tuple[tuple[str, ...], list[tuple[str, ...]]]] = [
            (("part", ""), [*self.facts, ("verified", self.verification)])
        ]
        for kind, verdicts in (("probe", self.probes), ("edit", self.edits)):
            names = dict.fromkeys(verdict.name for verdict in verdicts)
            tables.append(((kind, "vision", "language", ""), [self._line(name) for name in names]))
        return tables

    def _line(self, name: str) -> tuple[str, ...]:
        """One probe on both towers: the remark once if it holds for both."""
        vision, language = self.verdict(name, "vision"), self.verdict(name)
        why = vision.why
        if vision.why != language.why:
            parts = [f"{v.tower}: {v.why}" for v in (vision, language) if v.why]
            why = "; ".join(parts)
        return name, vision.status, language.status, why

    def __str__(self) -> str:
        parts = [self.name, *(in_columns(head, lines) for head, lines in self._tables())]
        if self.notes:
            parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        tables = "".join(as_html(head, lines) for head, lines in self._tables())
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"<h3>{html.escape(self.name)}</h3>{tables}<ul>{notes}</ul>"


def make_report(lvlm: LVLM) -> Report:
    """The report of a model; runs nothing.

    Args:
        lvlm: The model.
    """
    both, feeds = (lvlm.anatomy.vision, lvlm.anatomy.language), lvlm.anatomy.feed_layers
    towers = [(tower, dtype_of(lvlm.module.get_submodule(tower.blocks[0]))) for tower in both]
    return Report(
        name=lvlm.name,
        facts=tuple(facts_of(lvlm)),
        verification=verification_of(lvlm),
        notes=tuple(notes_of(lvlm)),
        probes=tuple(
            Verdict(name, tower.tower, *judge(tower, dtype))
            for name, judge in JUDGES.items()
            for tower, dtype in towers
        ),
        edits=tuple(
            Verdict(name, tower.tower, *judge_edit(name, tower, dtype, feeds))
            for name in EDIT_JUDGES
            for tower, dtype in towers
        ),
    )


def facts_of(lvlm: LVLM) -> list[tuple[str, str]]:
    """What the model is made of."""
    a = lvlm.anatomy
    module: Any = lvlm.module
    count = sum(p.numel() for p in module.parameters())
    feeds = ", ".join(str(layer) for layer in a.feeds)
    dropped = ", CLS dropped" if a.drops else ""
    merged = f"{a.merge} x {a.merge} patches" if a.merge > 1 else "one patch"
    patch = getattr(getattr(module.config, "vision_config", None), "patch_size", "?")
    prefix = a.family.prefix(module.config)
    return [
        ("model", f"{type(module).__name__}, family {a.family.name}, model_type {a.model_type}"),
        (
            "parameters",
            f"{in_words(count)}, {str(module.dtype).removeprefix('torch.')} on {lvlm.device}",
        ),
        ("vision", f"{size_of(a.vision)}, patches of {patch} pixels, {prefix_words(prefix)}"),
        ("vision attention", attention_of(a.vision)),
        ("projector", f"{a.projector}, reads vision block {feeds}{dropped}"),
        ("merge", f"{merged} to one language token"),
        ("language", f"{size_of(a.language)}, {a.vocab} token ids"),
        ("language attention", attention_of(a.language)),
        ("image token", f"id {a.image_token_id}"),
        ("head", f"{a.head}, after {a.final_norm}"),
    ]


def size_of(tower: TowerAnatomy) -> str:
    """Blocks, width and heads."""
    shared = "" if tower.heads == tower.kv_heads else f" on {tower.kv_heads} key-value heads"
    return (
        f"{tower.n_layers} blocks of width {tower.d_model}, {tower.heads} heads of {tower.d_head}"
        f"{shared}"
    )


def attention_of(tower: TowerAnatomy) -> str:
    """Kernel, packing and windows."""
    if not tower.attending:
        return f"{tower.kernel}; {reason_of(tower)}"
    words = [tower.kernel]
    if tower.packed:
        words.append("all images packed into one sequence")
    if any(getattr(call, "fires", "") == "per window" for call in tower.calls):
        words.append("one call per window")
    if tower.learned_sink:
        words.append("with a learned sink")
    return ", ".join(words)


def prefix_words(prefix: Sequence[str]) -> str:
    """What stands before the patches."""
    return " and ".join(kind.upper() for kind in prefix) + " first" if prefix else "no CLS"


def in_words(count: int) -> str:
    """A number of parameters as people say it."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def verification_of(lvlm: LVLM) -> str:
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


def notes_of(lvlm: LVLM) -> list[str]:
    """What to know before the first measurement."""
    notes = []
    tokenizer: Any = lvlm.tokenizer
    if lvlm.processor is None:
        notes.append("No processor: write lvlm.prepare(inputs=...) with inputs you made yourself.")
    elif getattr(tokenizer, "bos_token_id", None) is None:
        notes.append("No BOS: the selection 'bos' is empty; 'first' is each row's first token.")
    if lvlm.device.type == "meta":
        notes.append("No weights here: runs go to the server, which keeps its own dtype.")
    return notes


def in_columns(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table as text, its last column free."""
    rows = [head, *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    shown = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row[:-1], widths, strict=True)), row[-1]])
        for row in rows
    ]
    rule = "  ".join("-" * max(w, 1) for w in [*widths, max(len(row[-1]) for row in rows)])
    return "\n".join(line.rstrip() for line in [shown[0], rule, *shown[1:]])


def as_html(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same table as HTML."""

    def row(cells: Sequence[str], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(row(line, "td") for line in lines)
    return f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>"

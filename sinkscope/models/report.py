"""What a model is made of and what can be measured on it: exact, approximate or unavailable, and why."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any, Literal

import pandas as pd
import torch

from sinkscope import interventions, probes
from sinkscope.anatomy.discovery import dtype_of
from sinkscope.anatomy.towers import TowerAnatomy
from sinkscope.errors import ModelError, nearest
from sinkscope.interventions.base import needs_a_mask
from sinkscope.models.identity import facts_of, missing
from sinkscope.results import Result

Status = Literal["exact", "approximate", "unavailable"]
MASS_TOLERANCE = MappingProxyType({torch.bfloat16: "6e-3", torch.float16: "1e-3"})
"""How far group masses in half precision lie from those in fp32."""
GATE = ("LSG", "gates")  # an edit of a room above this one, and what it needs


@dataclass(frozen=True)
class Verdict:
    """Whether the probe or intervention of a name works on a tower, and the reason or a remark."""

    name: str
    tower: str
    status: Status
    why: str = ""


@dataclass(frozen=True)
class Report(Result):
    """A model's anatomy and what can be measured on it; print it, or show it in a notebook.

    ``facts`` are pairs ``(what, value)``, ``verification`` tells whether a forward pass has proven the
    anatomy; ``probes`` and ``edits`` have one `Verdict` per class and tower.
    """

    name: str
    facts: tuple[tuple[str, str], ...]
    verification: str
    notes: tuple[str, ...]
    probes: tuple[Verdict, ...]
    edits: tuple[Verdict, ...] = ()

    def verdict(self, name: str, tower: str = "language") -> Verdict:
        """The verdict on a probe or an intervention, by its class's name; ModelError if unknown."""
        known = {(v.name, v.tower): v for v in (*self.probes, *self.edits)}
        if (name, tower) not in known:
            raise ModelError(
                f"Got {name!r} in the {tower!r} tower; expected the name of a probe or an intervention, "
                "and 'vision' or 'language'. " + nearest(str(name), {one for one, _ in known})
            )
        return known[name, tower]

    def to_dataframe(self) -> pd.DataFrame:
        """Columns name, tower, status, why."""
        return pd.DataFrame([vars(verdict) for verdict in (*self.probes, *self.edits)])

    def _tables(self) -> list[list[tuple[str, ...]]]:
        """The tables as lines, the first of which is the heading."""
        tables: list = [[("part", ""), *self.facts, ("verified", self.verification)]]
        for kind, verdicts in (("probe", self.probes), ("edit", self.edits)):
            names = dict.fromkeys(verdict.name for verdict in verdicts)
            tables.append([(kind, "vision", "language", ""), *map(self._line, names)])
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


def _in_columns(lines: Sequence[tuple[str, ...]]) -> str:
    """A table as text, its last column free."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *body = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return "\n".join([head, "  ".join("-" * max(width, 1) for width in widths), *body])


def _as_html(lines: Sequence[tuple[str, ...]]) -> str:
    """The same table as HTML."""

    def row(cells: tuple[str, ...], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(row(line, "td") for line in lines[1:])
    return f"<table><thead>{row(lines[0], 'th')}</thead><tbody>{body}</tbody></table>"


def make_report(lvlm: Any) -> Report:
    """Make the report of an `LVLM`; nothing runs."""
    a, part = lvlm.anatomy, lvlm.module.get_submodule
    pair = (a.vision, a.language)
    towers = [Asked(tower, dtype_of(part(tower.blocks[0])), a.feed_layers) for tower in pair]

    def verdicts(room: ModuleType, *more: tuple[str, str]) -> tuple[Verdict, ...]:
        kinds = [(name, getattr(room, name)) for name in room.__all__]
        needs = [(name, kind.needs) for name, kind in kinds if getattr(kind, "needs", "")]
        return tuple(
            Verdict(name, asked.tower.tower, *judge(need, asked))
            for name, need in (*needs, *more)
            for asked in towers
        )

    facts, checks = tuple(facts_of(lvlm)), (verification_of(lvlm), tuple(notes_of(lvlm)))
    return Report(lvlm.name, facts, *checks, verdicts(probes), verdicts(interventions, GATE))


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


@dataclass(frozen=True)
class Asked:
    """A tower, the dtype in which it computes, and the vision blocks that feed the projector."""

    tower: TowerAnatomy
    dtype: torch.dtype
    feeds: tuple[int, ...]

    @property
    def half(self) -> str:
        """The name of a dtype of half precision, else ""."""
        return str(self.dtype).removeprefix("torch.") if self.dtype in MASS_TOLERANCE else ""

    @property
    def flash(self) -> str:
        """The name of a flash kernel, else ""."""
        return self.tower.kernel if "flash" in self.tower.kernel else ""


Said = tuple[Status, str] | None
Condition = Callable[[Asked], Said]


def judge(need: str, asked: Asked) -> tuple[Status, str]:
    """Whether what needs this works, and why: the first refusal, or all remarks."""
    found = [said for condition in RULES[need] if (said := condition(asked))]
    for status, why in found:
        if status == "unavailable":
            return status, why
    approximate = any(status == "approximate" for status, _ in found)
    return "approximate" if approximate else "exact", "; ".join(why for _, why in found)


def never_in(tower: str, why: str) -> Condition:
    """Refuse one tower."""
    return lambda asked: ("unavailable", why) if asked.tower.tower == tower else None


def no_flash(why: str) -> Condition:
    """Refuse flash kernels."""
    return lambda asked: ("unavailable", f"{asked.flash} {why}") if asked.flash else None


def note(why: str, holds: Callable[[Asked], object] = lambda asked: True) -> Condition:
    """A remark where something holds."""
    return lambda asked: ("exact", why) if holds(asked) else None


def rounds(text: str) -> Condition:
    """A remark on half precision, with the places ``{half}`` and ``{mass}``."""

    def condition(asked: Asked) -> Said:
        mass = MASS_TOLERANCE.get(asked.dtype)
        return ("approximate", text.format(half=asked.half, mass=mass)) if mass else None

    return condition


def learned(what: str) -> Condition:
    """A remark on learned sinks."""
    text = f"a learned sink takes a share: {what} sum to less than 1"
    return note(text, lambda asked: asked.tower.learned_sink)


def sites(asked: Asked) -> Said:
    """Sites within a block, where these exist; the others always do."""
    tower, why = asked.tower, missing(asked.tower.branches)
    lacking = tower.n_layers - len(tower.adding)
    where = f" in {lacking} of {tower.n_layers} blocks" if tower.adding else ""
    return ("exact", f"without attn_out and mlp_out{where}: {why}") if why else None


def call(asked: Asked) -> Said:
    """The attention call, in some block at least."""
    tower, why = asked.tower, missing(asked.tower.calls)
    if why and not tower.attending:
        return "unavailable", why
    where = f"on {len(tower.attending)} of {tower.n_layers} blocks"
    return ("exact", f"{where}: {why}") if why else None


def values(asked: Asked) -> Said:
    """As `call`, where states can be edited instead."""
    status, why = call(asked) or ("exact", "")
    unavailable = "unavailable: " if status == "unavailable" else ""
    return ("exact", f"values {unavailable}{why}") if why else None


def writes(asked: Asked) -> Said:
    """What lies between a head and the stream."""
    tower, why = asked.tower, missing(asked.tower.branches) or "no output projection was found"
    lacking = len(tower.attending) - len(tower.writing)
    if lacking and not tower.writing:
        return "unavailable", why
    return ("exact", f"not in {lacking} of {tower.n_layers} blocks: {why}") if lacking else None


def shared_heads(asked: Asked) -> Said:
    """A gradient per head: as many value dimensions as heads that share them."""
    shared, d_head = asked.tower.heads // asked.tower.kv_heads, asked.tower.d_head
    why = f"{shared} heads share a key-value head of {d_head} dimensions"
    return ("unavailable", why) if shared > d_head else None


def mask(asked: Asked) -> Said:
    """A bias of logits, or an explicit mask in its place."""
    why = needs_a_mask(asked.tower)
    if why and asked.flash:
        return "unavailable", f"{asked.flash} takes no explicit mask, and {why}"
    return ("exact", f"by an explicit mask: {why}") if why else None


def registers(asked: Asked) -> Said:
    """Room for one more token, and neurons to move."""
    reasons = {
        "images share one sequence: registers have no place in it": asked.tower.packed,
        "its MLPs have no last linear map, so no neurons": not all(asked.tower.neurons),
        f"the projector reads several blocks, {asked.feeds}": len(asked.feeds) > 1,
    }
    return next((("unavailable", why) for why, bad in reasons.items() if bad), None)


AGAIN = (call, learned("masses"), rounds("rounded to {half}, about {mass}"))
WEIGHTS = (call, rounds("what is edited is rounded to {half}"))
DECODER = (never_in("vision", "defined on the decoder only"), *WEIGHTS)
FP32 = note("precision='float32' is exact", lambda asked: asked.half and not asked.flash)
NORMS = note(
    "norms are without what the norm after attention divides a query by",
    lambda asked: any(pair[0].norm for pair in asked.tower.branches if isinstance(pair, tuple)),
)
IN_VISION = note(
    "select and 'after image' on the decoder only", lambda asked: asked.tower.tower == "vision"
)
PACKED = note("in a packed tower without 'mean' and 'resample'", lambda asked: asked.tower.packed)

RULES: Mapping[str, tuple[Condition, ...]] = MappingProxyType(
    {
        "states": (sites,),
        "head": (never_in("vision", "the vision tower has no LM head"),),
        "attention": (call,),
        "masses": (*AGAIN, FP32),
        "contributions": (*AGAIN, writes),
        "head_writes": (*AGAIN, writes, NORMS),
        "gradients": (
            call,
            no_flash("has no fp32 gradient: load with 'sdpa' or 'eager'"),
            shared_heads,
            learned("rows"),
        ),
        "weights": WEIGHTS,
        "bias": (*WEIGHTS, mask),
        "redistribution": (*WEIGHTS, mask, IN_VISION),
        "gates": (*DECODER, note("its rules judge every token by itself")),
        "eviction": (
            *DECODER,
            no_flash("takes no mask that differs by query"),
            note("by an explicit mask; positions keep their angle"),
        ),
        "embeddings": (never_in("vision", "image tokens are edited where they enter the decoder"),),
        "packed_values": (*WEIGHTS, PACKED),
        "patches": (values, sites),
        "registers": (never_in("language", "a register is a token of the vision tower"), registers),
    }
)
"""What must hold for every value of the class attribute ``needs`` of probes and edits."""

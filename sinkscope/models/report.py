"""What a model is made of and what can be measured on it: exact, approximate or unavailable, and why."""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType, ModuleType
from typing import Any, Literal

import pandas as pd
import torch

from sinkscope import interventions, probes
from sinkscope.anatomy.attention_call import NoAttentionCall
from sinkscope.anatomy.block_sum import NoBranch
from sinkscope.anatomy.towers import TowerAnatomy
from sinkscope.anatomy.weights import dtype_of, rounds
from sinkscope.errors import ModelError, nearest
from sinkscope.interventions.base import needs_a_mask
from sinkscope.models.proofs import blocks_of, differences, told
from sinkscope.results import Result

Status = Literal["exact", "approximate", "unavailable"]
HALF = MappingProxyType({torch.bfloat16: "6e-3", torch.float16: "1e-3"})
"""How far group masses in half precision lie from those in fp32."""


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
            got = f"Got {name!r} in the {tower!r} tower; expected the name of a probe or an intervention"
            hint = nearest(str(name), {one for one, _ in known})
            raise ModelError(f"{got}, and 'vision' or 'language'. {hint}")
        return known[name, tower]

    def to_dataframe(self) -> pd.DataFrame:
        """Columns name, tower, status, why."""
        return pd.DataFrame([vars(verdict) for verdict in (*self.probes, *self.edits)])

    def _tables(self) -> list[list[tuple[str, ...]]]:
        """The tables as lines, the first of which is the heading; a remark on both towers once."""
        tables: list = [[("part", ""), *self.facts, ("verified", self.verification)]]
        for kind, verdicts in (("probe", self.probes), ("edit", self.edits)):
            lines = [(kind, "vision", "language", "")]
            for name in dict.fromkeys(verdict.name for verdict in verdicts):
                both = self.verdict(name, "vision"), self.verdict(name)
                why = both[0].why
                if why != both[1].why:
                    why = "; ".join(f"{v.tower}: {v.why}" for v in both if v.why)
                lines.append((name, both[0].status, both[1].status, why))
            tables.append(lines)
        return tables

    def __str__(self) -> str:
        parts = [self.name]
        for table in self._tables():
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
            lines.insert(1, "  ".join("-" * max(width, 1) for width in widths))
            parts.append("\n".join(lines))
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join([*parts, *[notes] * bool(notes)])

    def _repr_html_(self) -> str:
        def row(cells: Iterable[str], tag: str) -> str:
            inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            return f"<tr>{inside}</tr>"

        page = f"<h3>{html.escape(self.name)}</h3>"
        for head, *lines in self._tables():
            body = "".join(row(line, "td") for line in lines)
            page += f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>"
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"{page}<ul>{notes}</ul>"


def make_report(lvlm: Any) -> Report:
    """Make the report of an `LVLM`; nothing runs."""
    a, towers, here = lvlm.anatomy, [], lvlm.device.type != "meta"
    for tower in (a.vision, a.language):
        first = lvlm.module.get_submodule(tower.blocks[0]) if tower.blocks else None
        dtype = dtype_of(first) if first else None
        half = str(dtype).removeprefix("torch.") if dtype in HALF else ""
        how = half, HALF.get(dtype, "") if dtype else "", bool(first and rounds(first))
        flash, flex = (tower.kernel * (kind in tower.kernel) for kind in ("flash", "flex"))
        towers.append(Asked(tower, *how, flash, flex, a.feed_layers, a.lens.why))

    def verdicts(room: ModuleType, **more: str) -> tuple[Verdict, ...]:
        names = [name for name in room.__all__ if name != "LayerProbe"]  # which is a base
        needs = {name: getattr(getattr(room, name), "needs", "") for name in names} | more
        pairs = [(name, asked) for name in needs if needs[name] for asked in towers]
        return tuple(Verdict(n, one.tower.tower, *judge(needs[n], one)) for n, one in pairs)

    notes = [note for tower in (a.vision, a.language) for note in differences(tower)]
    if lvlm.processor is None:
        notes.append("No processor: write lvlm.prepare(inputs=...) with inputs you made yourself.")
    elif getattr(lvlm.tokenizer, "bos_token_id", None) is None:
        notes.append("No BOS: the selection 'bos' is empty; 'first' is each row's first token.")
    if not here:
        notes.append("No weights here: runs go to the server, which keeps its own dtype.")
    judged = verdicts(probes), verdicts(interventions, LSG="gates")  # LSG is of a room above
    return Report(lvlm.name, facts_of(lvlm), told(lvlm), tuple(notes), *judged)


def facts_of(lvlm: Any) -> tuple[tuple[str, str], ...]:
    """What the model is made of."""
    a, module = lvlm.anatomy, lvlm.module
    count = sum(p.numel() for p in module.parameters())
    sizes = ((" B", 10**9), (" M", 10**6), (" k", 10**3), ("", 1))
    unit, size = next((pair for pair in sizes if count >= pair[1]), ("", 1))
    dtype = str(module.dtype).removeprefix("torch.")
    feeds = ", ".join(map(str, a.feeds)) + ", CLS dropped" * bool(a.drops)
    merged = f"{a.merge} x {a.merge} patches" if a.merge > 1 else "one patch"
    patch = getattr(getattr(module.config, "vision_config", None), "patch_size", "?")
    prefix = " and ".join(kind.upper() for kind in a.prefix)
    first = f"{prefix} first" if prefix else "no CLS"
    blocks, kernels = zip(*map(_tower_facts, (a.vision, a.language)), strict=True)
    each = (f"{feed} before decoder block {layer}" for layer, feed in a.enters)
    enters = (("also enters", f"vision block {', '.join(each)}"),) if a.enters else ()
    scale = f", times {a.lens.scale:.6g}" if a.lens.scale != 1 else ""
    cap = f", soft-capped at {a.lens.cap:.6g}" if a.lens.cap else ""
    seen = (
        ("vision", f"{blocks[0]}, patches of {patch} pixels, {first}"),
        ("vision attention", kernels[0]),
        ("projector", f"{a.projector or 'none was found'}, reads vision block {feeds or 'none'}"),
        *enters,
        ("merge", f"{merged} to one language token"),
    )
    return (
        ("model", f"{type(module).__name__}, model_type {a.model_type}"),
        ("parameters", f"{count / size:.3g}{unit}, {dtype} on {lvlm.device}"),
        *(seen if a.vision.blocks else (("vision", a.vision.missing),)),
        ("language", f"{blocks[1]}, {a.vocab} token ids"),
        ("language attention", kernels[1]),
        ("image token", f"id {a.image_token_id}" if a.image_token_id >= 0 else "none"),
        ("head", f"{a.head}, after {a.final_norm or 'no norm'}{scale}{cap}"),
    )


def _tower_facts(tower: TowerAnatomy) -> tuple[str, str]:
    """Blocks, width and heads; and kernel, packing and windows."""
    shared = "" if tower.heads == tower.kv_heads else f" on {tower.kv_heads} key-value heads"
    sizes = f"{tower.n_layers} blocks of width {tower.d_model}, {tower.heads} heads of"
    sizes = f"{sizes} {tower.d_head}{shared}"
    if not tower.attending:
        return sizes, f"{tower.kernel}; {missing(tower.calls)}"
    words = {
        "all images packed into one sequence": tower.packed,
        "one call per window": any(getattr(c, "fires", "") == "per window" for c in tower.calls),
        "with a learned sink": tower.learned_sink,
    }
    return sizes, ", ".join([tower.kernel, *(word for word in words if words[word])])


def missing(things: Iterable[Any]) -> str:
    """Why a block's attention call or branches were not found, in a few words; "" if all were."""
    reasons = (it.reason for it in things if isinstance(it, (NoAttentionCall, NoBranch)))
    return next(reasons, "").partition(";")[0]


@dataclass(frozen=True)
class Asked:
    """A tower, whether it is quantised, and as text, "" if none: its half precision, its flash or flex kernel."""

    tower: TowerAnatomy
    half: str
    mass: str
    rough: bool
    flash: str
    flex: str
    feeds: tuple[int, ...]
    lens: str


Said = tuple[Status, str] | None
Condition = Callable[[Asked], Said]


def judge(need: str, asked: Asked) -> tuple[Status, str]:
    """Whether what needs this works, and why: the first refusal, or all remarks."""
    if not asked.tower.blocks:
        return "unavailable", asked.tower.missing
    found = [said for condition in RULES[need] if (said := condition(asked))]
    if refused := [said for said in found if said[0] == "unavailable"]:
        return refused[0]
    rough = any(status == "approximate" for status, _ in found)
    return "approximate" if rough else "exact", "; ".join(why for _, why in found)


def when(status: Status, why: str, holds: Callable[[Asked], object] = bool) -> Condition:
    """A verdict where something holds, else always; fields of `Asked` stand in it as ``{half}``."""
    return lambda asked: (status, why.format(**vars(asked))) if holds(asked) else None


def never_in(tower: str, why: str, status: Status = "unavailable") -> Condition:
    """Refuse one tower, or give another verdict there."""
    return when(status, why, lambda asked: asked.tower.tower == tower)


def _sites(asked: Asked) -> Said:
    tower, why = asked.tower, missing(asked.tower.branches)
    if (states := _partly(tower, tower.stating, [p.states for p in tower.proofs])) or not why:
        return states
    lacking = [i for i in range(tower.n_layers) if i not in tower.adding]
    where = f" in {blocks_of(lacking)}" if tower.adding else ""
    return ("exact", f"without attn_out and mlp_out{where}: {why}")


def _call(asked: Asked) -> Said:
    return _partly(asked.tower, asked.tower.attending, [missing(asked.tower.calls)])


def _values(asked: Asked) -> Said:
    """As `_call`, where states can be edited instead."""
    status, why = _call(asked) or ("exact", "")
    unavailable = "unavailable: " if status == "unavailable" else ""
    return ("exact", f"values {unavailable}{why}") if why else None


def _writes(asked: Asked) -> Said:
    """What lies between a head and the stream."""
    tower, found = asked.tower, [p.writes for p in asked.tower.proofs]
    reasons = [missing(tower.branches), *found, "no output projection was found"]
    lacking = [i for i in tower.attending if i not in tower.writing]
    why = next(filter(None, reasons)).partition(";")[0]
    some: Said = ("exact", f"not in {blocks_of(lacking)}: {why}") if lacking else None
    return some if tower.writing or not lacking else ("unavailable", why)


def _partly(tower: TowerAnatomy, works: Sequence[int], reasons: Iterable[str]) -> Said:
    """In which blocks something works, and the first reason why not in others."""
    if len(works) == tower.n_layers:
        return None
    why = next(filter(None, reasons), "").partition(";")[0]
    where = f"on {blocks_of(works)} of {tower.n_layers}: " if works else ""
    return ("exact" if works else "unavailable", where + why)


def _shared_heads(asked: Asked) -> Said:
    """A gradient per head: as many value dimensions as heads that share them."""
    tower = asked.tower
    own = tower.heads, tower.kv_heads, tower.d_head
    each = [tower.proof(i).sizes or own for i in tower.attending]
    over = [i for i, (h, kv, d) in zip(tower.attending, each, strict=True) if h // kv > d]
    heads, kv_heads, d_head = each[tower.attending.index(over[0])] if over else own
    why = f"{heads // kv_heads} heads share a key-value head of {d_head} dimensions"
    where = f"not in {blocks_of(over)}: " if len(over) < len(each) else ""
    return ("exact" if where else "unavailable", where + why) if over else None


def _mask(asked: Asked) -> Said:
    """A bias of logits, or an explicit mask in its place."""
    why = needs_a_mask(asked.tower)
    if why and asked.flash:
        return "unavailable", f"{asked.flash} takes no explicit mask, and {why}"
    return ("exact", f"by an explicit mask: {why}") if why else None


def _room(asked: Asked) -> Said:
    """Room for a register, and neurons to move."""
    reasons = {
        "images share one sequence: registers have no place in it": asked.tower.packed,
        f"{asked.flex} makes its masks for the image's own tokens": asked.flex,
        "its MLPs have no last linear map, so no neurons": not all(asked.tower.neurons),
        f"the projector reads several blocks, {asked.feeds}": len(asked.feeds) > 1,
    }
    return next((("unavailable", why) for why in reasons if reasons[why]), None)


HALVED, FLASH, FLEX = map(attrgetter, ("half", "flash", "flex"))
ROUGH = when("approximate", "quantised maps may round what they read", attrgetter("rough"))
LEARNED = attrgetter("tower.learned_sink")
LESS = "a learned sink takes a share: {} sum to less than 1"
AGAIN = (
    _call,
    when("exact", LESS.format("masses"), LEARNED),
    when("approximate", "rounded to {half}, about {mass}", HALVED),
)
WEIGHTS = (_call, when("approximate", "what is edited is rounded to {half}", HALVED))
DECODER = (never_in("vision", "defined on the decoder only"), *WEIGHTS)
FP32 = when("exact", "precision='float32' is exact", lambda asked: asked.half and not asked.flash)
NORMS = when(
    "exact",
    "norms are without what the norm after attention divides a query by",
    lambda asked: any(pair[0].norm for pair in asked.tower.branches if isinstance(pair, tuple)),
)
IN_VISION = never_in("vision", "select and 'after image' on the decoder only", "exact")
PACKED = when("exact", "packed: without 'mean' and 'resample'", attrgetter("tower.packed"))

RULES: Mapping[str, tuple[Condition, ...]] = MappingProxyType(
    {
        "states": (_sites,),
        "head": (
            never_in("vision", "the vision tower has no LM head"),
            _sites,
            when("unavailable", "{lens}", attrgetter("lens")),
        ),
        "attention": (_call,),
        "masses": (*AGAIN, FP32),
        "contributions": (*AGAIN, ROUGH, _writes),
        "head_writes": (*AGAIN, ROUGH, _writes, NORMS),
        "gradients": (
            _call,
            when("unavailable", "{flash} has no fp32 gradient: load with 'sdpa' or 'eager'", FLASH),
            when("unavailable", "{flex} has no gradient: load with 'sdpa' or 'eager'", FLEX),
            _shared_heads,
            when("exact", LESS.format("rows"), LEARNED),
        ),
        "weights": WEIGHTS,
        "bias": (*WEIGHTS, _mask),
        "redistribution": (*WEIGHTS, _mask, IN_VISION),
        "gates": (*DECODER, when("exact", "its rules judge every token by itself")),
        "eviction": (
            *DECODER,
            when("unavailable", "{flash} takes no mask that differs by query", FLASH),
            when("exact", "by an explicit mask; positions keep their angle"),
        ),
        "embeddings": (never_in("vision", "image tokens are edited where they enter the decoder"),),
        "packed_values": (*WEIGHTS, PACKED),
        "patches": (_values, _sites),
        "registers": (never_in("language", "a register is a token of the vision tower"), _room),
    }
)
"""What must hold for every value of the class attribute ``needs`` of probes and edits."""

"""What a model is made of and what can be measured on it: exact, approximate or unavailable, and why."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch

from sinkscope.anatomy.attention_call import NoAttentionCall
from sinkscope.anatomy.block_sum import Branch, NoBranch
from sinkscope.anatomy.holding import dtype_of
from sinkscope.anatomy.towers import TowerAnatomy
from sinkscope.errors import ModelError, nearest
from sinkscope.interventions.base import needs_a_mask
from sinkscope.results import Result

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.models.lvlm import LVLM


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


Status = Literal["exact", "approximate", "unavailable"]

Judged = tuple[Status, str]

MASS_TOLERANCE = MappingProxyType({torch.bfloat16: "6e-3", torch.float16: "1e-3"})

"""How far group masses in half precision lie from those in fp32."""


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


def of_states(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Probes and edits of the residual stream, in fp32: at sites within a block where these exist."""
    missing = tower.n_layers - len(tower.adding)
    if not missing:
        return "exact", ""
    where = f" in {missing} of {tower.n_layers} blocks" if tower.adding else ""
    return "exact", f"without attn_out and mlp_out{where}: {no_sites(tower)}"


def of_the_head(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Probes that need the LM head."""
    if tower.tower == "vision":
        return "unavailable", "the vision tower has no LM head"
    return "exact", ""


def of_attention(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Probes that read the attention call: its tensors as the model made them."""
    if not tower.attending:
        return "unavailable", reason_of(tower)
    missing = tower.n_layers - len(tower.attending)
    if missing:
        return "exact", f"on {len(tower.attending)} of {tower.n_layers} blocks: {reason_of(tower)}"
    return "exact", ""


def of_the_call(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Probes that ask the attention call again, in the model's dtype."""
    status, why = of_attention(tower, dtype)
    if status == "unavailable":
        return status, why
    if tower.learned_sink:
        why = join(why, "a learned sink takes a share: masses sum to less than 1")
    if dtype in MASS_TOLERANCE:
        rounding = f"rounded to {str(dtype).removeprefix('torch.')}, about {MASS_TOLERANCE[dtype]}"
        return "approximate", join(why, rounding)
    return "exact", why


def of_contributions(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Probes that follow what heads write into the stream."""
    status, why = of_the_call(tower, dtype)
    missing = len(tower.attending) - len(tower.writing)
    if status == "unavailable" or not missing:
        return status, why
    reason = "no output projection was found"
    if len(tower.adding) < tower.n_layers:
        reason = no_sites(tower)
    if not tower.writing:
        return "unavailable", reason
    return status, join(why, f"not in {missing} of {tower.n_layers} blocks: {reason}")


def of_head_writes(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """As `of_contributions`, without what a norm makes of a query."""
    status, why = of_contributions(tower, dtype)
    ways = tower.attention_out
    if status != "unavailable" and any(isinstance(way, Branch) and way.norm for way in ways):
        why = join(why, "norms are without what the norm after attention divides a query by")
    return status, why


def of_masses(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """As `of_the_call`, with fp32 on request."""
    status, why = of_the_call(tower, dtype)
    if status == "approximate" and "flash" not in tower.kernel:
        why = join(why, "precision='float32' is exact")
    return status, why


def of_gradients(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Probes that take the gradient of the attention call in fp32."""
    status, why = of_attention(tower, dtype)
    if status == "unavailable":
        return status, why
    if "flash" in tower.kernel:
        return "unavailable", f"{tower.kernel} has no fp32 gradient: load with 'sdpa' or 'eager'"
    if tower.heads // tower.kv_heads > tower.d_head:
        shared = f"{tower.heads // tower.kv_heads} heads share a key-value head of {tower.d_head}"
        return "unavailable", f"{shared} dimensions"
    if tower.learned_sink:
        why = join(why, "a learned sink takes a share: rows sum to less than 1")
    return "exact", why


JUDGES: MappingProxyType[str, Callable[[TowerAnatomy, torch.dtype], Judged]] = MappingProxyType(
    {
        "AttentionMass": of_masses,
        "AttentionPatterns": of_gradients,
        "ReceivedAttention": of_gradients,
        "SinkEvidence": of_gradients,
        "ContributionNorms": of_contributions,
        "HeadWrites": of_head_writes,
        "ValueNorms": of_attention,
        "AttentionValues": of_attention,
        "MassiveActivations": of_states,
        "TokenNorms": of_states,
        "SinkDimensionScores": of_states,
        "CosineToFirst": of_states,
        "ChannelValues": of_states,
        "GroupMeans": of_states,
        "ResidualStates": of_states,
        "LogitLens": of_the_head,
    }
)

"""Every public probe and what decides whether it works."""


def of_weights(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Edits of keys, values and weights: the model's own call on other tensors."""
    status, why = of_attention(tower, dtype)
    if status == "unavailable":
        return status, why
    if dtype in MASS_TOLERANCE:
        rounding = f"what is edited is rounded to {str(dtype).removeprefix('torch.')}"
        return "approximate", join(why, rounding)
    return "exact", why


def of_bias(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Edits that ride as a bias in extra head dimensions, or as an explicit mask."""
    status, why = of_weights(tower, dtype)
    reason = needs_a_mask(tower)
    if status == "unavailable" or not reason:
        return status, why
    if "flash" in tower.kernel:
        return "unavailable", f"{tower.kernel} takes no explicit mask, and {reason}"
    return status, join(why, f"by an explicit mask: {reason}")


def of_redistribution(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Weights moved between keys: one call in which the others are masked."""
    status, why = of_bias(tower, dtype)
    if status != "unavailable" and tower.tower == "vision":
        why = join(why, "select and 'after image' on the decoder only")
    return status, why


def of_the_decoder(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Edits of attention that are defined on the decoder only."""
    if tower.tower == "vision":
        return "unavailable", "defined on the decoder only"
    return of_weights(tower, dtype)


def of_gates(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Gates: keys of the decoder scaled, by coefficients in fp32."""
    status, why = of_the_decoder(tower, dtype)
    if status == "unavailable":
        return status, why
    return status, join(why, "its rules judge every token by itself")


def of_eviction(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """The streaming baseline."""
    status, why = of_the_decoder(tower, dtype)
    if status == "unavailable":
        return status, why
    if "flash" in tower.kernel:
        return "unavailable", f"{tower.kernel} takes no mask that differs by query"
    return status, join(why, "by an explicit mask; positions keep their angle")


def of_embeddings(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Edits of image tokens where they enter the decoder."""
    if tower.tower == "vision":
        return "unavailable", "image tokens are edited where they enter the decoder"
    return "exact", ""


def of_packed_values(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Replacements of values: a packed tower has no row of its own per image."""
    status, why = of_weights(tower, dtype)
    if status != "unavailable" and tower.packed:
        why = join(why, "in a packed tower without 'mean' and 'resample'")
    return status, why


def of_patches(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Patches: of states everywhere, of values where the attention call was found."""
    status, why = of_attention(tower, dtype)
    if status == "unavailable":
        why = f"unavailable: {why}"
    sites = of_states(tower, dtype)[1]
    return "exact", join(f"values {why}" if why else "", sites)


def of_registers(tower: TowerAnatomy, dtype: torch.dtype, feeds: tuple[int, ...] = (0,)) -> Judged:
    """Test-time registers.

    Args:
        tower: The tower.
        dtype: The model's dtype.
        feeds: The vision blocks that feed the projector.
    """
    if tower.tower == "language":
        return "unavailable", "a register is a token of the vision tower"
    if tower.packed:
        return "unavailable", "images share one sequence: registers have no place in it"
    if not all(tower.neurons):
        return "unavailable", "its MLPs have no last linear map, so no neurons"
    if len(feeds) > 1:
        return "unavailable", f"the projector reads several blocks, {feeds}"
    return "exact", ""


EDIT_JUDGES: MappingProxyType[str, Callable[[TowerAnatomy, torch.dtype], Judged]] = (
    MappingProxyType(
        {
            "MaskKeys": of_bias,
            "AttentionKnockout": of_bias,
            "ScaleKeys": of_weights,
            "ScaleAttention": of_bias,
            "Redistribute": of_redistribution,
            "EvictKeys": of_eviction,
            "AblateValues": of_packed_values,
            "AblateActivations": of_states,
            "PatchActivations": of_patches,
            "ScaleTokens": of_embeddings,
            "SinkToFront": of_embeddings,
            "TestTimeRegister": of_registers,
            "LSG": of_gates,
        }
    )
)

"""Every public intervention and what decides whether it works."""


def judge_edit(
    name: str, tower: TowerAnatomy, dtype: torch.dtype, feeds: tuple[int, ...]
) -> Judged:
    """The judgement on one intervention.

    Args:
        name: Its class.
        tower: The tower.
        dtype: The model's dtype.
        feeds: The vision blocks that feed the projector.
    """
    if name == "TestTimeRegister":
        return of_registers(tower, dtype, feeds)
    return EDIT_JUDGES[name](tower, dtype)


def reason_of(tower: TowerAnatomy) -> str:
    """Why a block's attention call was not found, in a few words."""
    found = next(call for call in tower.calls if isinstance(call, NoAttentionCall))
    return found.reason.partition(";")[0]


def no_sites(tower: TowerAnatomy) -> str:
    """Why what a block adds could not be read, in a few words."""
    found = next(way for way in tower.attention_out if isinstance(way, NoBranch))
    return found.reason.partition(";")[0]


def join(first: str, second: str) -> str:
    """Two remarks as one."""
    return "; ".join(remark for remark in (first, second) if remark)

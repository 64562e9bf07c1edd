"""What a probe or an edit needs of a tower, and whether a model has it: one rule per need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from sinkscope.anatomy.attention_call import NoAttentionCall
from sinkscope.anatomy.block_sum import NoBranch
from sinkscope.anatomy.towers import TowerAnatomy
from sinkscope.interventions.base import needs_a_mask

Status = Literal["exact", "approximate", "unavailable"]
MASS_TOLERANCE = MappingProxyType({torch.bfloat16: "6e-3", torch.float16: "1e-3"})
"""How far group masses in half precision lie from those in fp32."""


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


Condition = Callable[[Asked], tuple[Status, str] | None]


def judge(need: str, asked: Asked) -> tuple[Status, str]:
    """Whether what needs this works, and why: the first refusal, or all remarks."""
    status, remarks = "exact", []
    for condition in RULES[need]:
        found, why = condition(asked) or ("exact", "")
        if found == "unavailable":
            return found, why
        status = found if found == "approximate" else status
        remarks += [why] if why else []
    return status, "; ".join(remarks)


def missing_call(tower: TowerAnatomy) -> str:
    """Why a block's attention call was not found, in a few words; "" if all were."""
    reasons = [call.reason for call in tower.calls if isinstance(call, NoAttentionCall)]
    return reasons[0].partition(";")[0] if reasons else ""


def missing_sites(tower: TowerAnatomy) -> str:
    """Why what a block adds could not be read, in a few words; "" if all could."""
    reasons = [found.reason for found in tower.branches if isinstance(found, NoBranch)]
    return reasons[0].partition(";")[0] if reasons else ""


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
    return lambda asked: (
        ("approximate", text.format(half=asked.half, mass=MASS_TOLERANCE[asked.dtype]))
        if asked.half
        else None
    )


def learned(what: str) -> Condition:
    """A remark on learned sinks."""
    why = f"a learned sink takes a share: {what} sum to less than 1"
    return note(why, lambda asked: asked.tower.learned_sink)


def sites(asked: Asked) -> tuple[Status, str] | None:
    """Sites within a block, where these exist; the others always do."""
    tower, why = asked.tower, missing_sites(asked.tower)
    count = f" in {tower.n_layers - len(tower.adding)} of {tower.n_layers} blocks"
    where = count if tower.adding else ""
    return ("exact", f"without attn_out and mlp_out{where}: {why}") if why else None


def call(asked: Asked) -> tuple[Status, str] | None:
    """The attention call, in some block at least."""
    tower, why = asked.tower, missing_call(asked.tower)
    if why and not tower.attending:
        return "unavailable", why
    return (
        ("exact", f"on {len(tower.attending)} of {tower.n_layers} blocks: {why}") if why else None
    )


def values(asked: Asked) -> tuple[Status, str] | None:
    """As `call`, where states can be edited instead."""
    status, why = call(asked) or ("exact", "")
    unavailable = "unavailable: " if status == "unavailable" else ""
    return ("exact", f"values {unavailable}{why}") if why else None


def writes(asked: Asked) -> tuple[Status, str] | None:
    """What lies between a head and the stream."""
    tower = asked.tower
    missing = len(tower.attending) - len(tower.writing)
    why = missing_sites(tower) or "no output projection was found"
    if missing and not tower.writing:
        return "unavailable", why
    return ("exact", f"not in {missing} of {tower.n_layers} blocks: {why}") if missing else None


def shared_heads(asked: Asked) -> tuple[Status, str] | None:
    """A gradient per head: as many value dimensions as heads that share them."""
    shared, d_head = asked.tower.heads // asked.tower.kv_heads, asked.tower.d_head
    why = f"{shared} heads share a key-value head of {d_head} dimensions"
    return ("unavailable", why) if shared > d_head else None


def mask(asked: Asked) -> tuple[Status, str] | None:
    """A bias of logits, or an explicit mask in its place."""
    why = needs_a_mask(asked.tower)
    if why and asked.flash:
        return "unavailable", f"{asked.flash} takes no explicit mask, and {why}"
    return ("exact", f"by an explicit mask: {why}") if why else None


def registers(asked: Asked) -> tuple[Status, str] | None:
    """Room for one more token, and neurons to move."""
    blocks = f"the projector reads several blocks, {asked.feeds}"
    for bad, why in (
        (asked.tower.packed, "images share one sequence: registers have no place in it"),
        (not all(asked.tower.neurons), "its MLPs have no last linear map, so no neurons"),
        (len(asked.feeds) > 1, blocks),
    ):
        if bad:
            return "unavailable", why
    return None


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
